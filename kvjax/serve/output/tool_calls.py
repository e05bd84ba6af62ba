"""Tool calls: a model's own way of writing them, read as it comes.

    Hermes, Qwen    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call
    Mistral         [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    Llama 3         {"name": ..., "parameters": {...}}, with ; between calls
    JSON            an object as Llama's, or a list of them, as the whole answer

The arguments are handed on as the model writes them, so that a client sees them grow. What turns out to be no call of
a tool that the request names is text, and handed on as such.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from kvjax.serve.output.json_scan import JsonScanner
from kvjax.serve.output.reasoning import open_end

# {"name": "f", "arguments": and what follows it
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
_SEPARATORS = " \t\r\n,;"


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How calls stand in a text: between two markers, behind one, or alone."""

    name: str
    begin: str = ""
    end: str = ""


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]")
JSON = ToolFormat("json")


def format_of(template: str | None) -> ToolFormat:
    """The format that a chat template shows; that which it is given for a template that knows no tools."""
    template = template or ""
    if MISTRAL.begin in template:
        return MISTRAL
    if "tools" in template and HERMES.begin not in template:
        return JSON
    return HERMES


@dataclasses.dataclass
class ToolCallPart:
    """More of one call: its name with the first part, then arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def as_delta(self) -> dict[str, Any]:
        """As a streamed answer has it."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class ToolCallParser:
    """The text of one choice as text and calls.

    Args:
        names: of the functions that may be called.
        forced: name of the one function that the text is the arguments of.
        parallel: whether more than one call is handed on.
    """

    def __init__(
        self, form: ToolFormat, names: Sequence[str], *, forced: str | None = None, parallel: bool = True
    ) -> None:
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._held = ""
        self._inside = False
        self._possible = True  # where calls stand alone: nothing else has come before
        self._object: _CallReader | None = None
        self.calls = 0
        self._forced = forced

    def push(self, text: str, last: bool = False) -> tuple[str, list[ToolCallPart]]:
        """Text and parts of calls that are certain after more text; with `last` all there is."""
        if self._forced is not None:
            return "", self._arguments(text)
        self._held += text
        shown, parts = "", []
        while True:
            if not self._inside:
                plain, goes_on = self._outside(last)
                shown += plain
                if not goes_on:
                    return shown, parts
            plain, more, goes_on = self._call(last)
            shown += plain
            parts += more
            if not goes_on:
                return shown, parts

    def _arguments(self, text: str) -> list[ToolCallPart]:
        if self.calls:
            return [ToolCallPart(0, arguments=text)] if text else []
        if not text:
            return []
        self.calls = 1
        return [ToolCallPart(0, call_id(), self._forced, text)]

    def _outside(self, last: bool) -> tuple[str, bool]:
        """Text before the next call, and whether one begins."""
        begin = self._form.begin
        if not begin:
            start = self._held.lstrip()
            self._inside = self._possible and start[:1] in ("{", "[")
            if self._inside or (self._possible and not start and not last):
                return "", self._inside
            self._possible = False
        elif begin in self._held:
            before, _, self._held = self._held.partition(begin)
            self._inside = True
            return "" if self.calls and not before.strip() else before, True
        kept = 0 if last or not begin else open_end(self._held, begin)
        if self.calls and not self._held[: len(self._held) - kept].strip():  # between two calls, or behind the last
            return "", False
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown, False

    def _call(self, last: bool) -> tuple[str, list[ToolCallPart], bool]:
        """Parts of the call that is being read, and whether there is more to read behind it."""
        if self._object is None:
            opened = self._held.lstrip(_SEPARATORS + "[")
            end = self._form.end
            if end and opened.startswith(end):
                self._held, self._inside = opened.removeprefix(end), False
                return "", [], bool(self._held)
            if end and end.startswith(opened) and not last:
                return "", [], False
            if not opened.startswith("{"):
                if opened.strip(_SEPARATORS + "]") == "":
                    self._held = "" if last or opened else self._held
                    return "", [], False
                plain, self._held, self._inside, self._possible = self._form.begin + self._held, "", False, False
                return plain, [], False
            self._object, self._held = _CallReader(self._names), opened
        reader = self._object
        used, name, arguments = reader.push(self._held)
        self._held = self._held[used:]
        parts: list[ToolCallPart] = []
        hidden = self.calls > 0 and not self._parallel
        if name is not None:
            if not hidden:
                parts.append(ToolCallPart(self.calls, call_id(), name, arguments))
        elif arguments and not hidden:
            parts.append(ToolCallPart(self.calls, arguments=arguments))
        if reader.complete:
            self._object = None
            if reader.name is None:  # no call: text, with what stood around it
                plain = f"{self._form.begin}{reader.text}"
                self._inside = self._possible = False
                return plain, parts, bool(self._held)
            self.calls += not hidden
            return "", parts, bool(self._held)
        if last:
            self._object = None
            self.calls += reader.name is not None and not hidden
            return ("" if reader.name is not None else f"{self._form.begin}{reader.text}"), parts, False
        return "", parts, False


class _CallReader:
    """One JSON object that may be a call: its name once it is certain, and its arguments from then on."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._object, self._value = JsonScanner(), JsonScanner()
        self._sent = 0  # characters of `text` before what is not handed on yet
        self.text = ""
        self.name: str | None = None

    @property
    def complete(self) -> bool:
        return self._object.complete

    def push(self, text: str) -> tuple[int, str | None, str]:
        """Characters that belong to the object; the name, if it became certain; more of the arguments."""
        used = self._object.push(text)
        self.text += text[:used]
        name = None
        if self.name is None and (head := _HEAD.match(self.text)):
            named = json.loads(f'"{head[1]}"')
            if named in self._names:
                name = self.name = named
                self._sent = head.end()
        if self.name is not None and self._sent:
            arguments = self.text[self._sent :]
            inside = 0 if self._value.complete else self._value.push(arguments)
            self._sent += inside
            return used, name, arguments[:inside]
        if self.complete and self.name is None:
            return used, *self._whole()
        return used, None, ""

    def _whole(self) -> tuple[str | None, str]:
        """Name and arguments of an object whose members come in another order."""
        try:
            read = json.loads(self.text)
        except ValueError:
            return None, ""
        if read.get("name") not in self._names:
            return None, ""
        self.name = read["name"]
        arguments = read.get("arguments", read.get("parameters", {}))
        return self.name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def required_schema(tools: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """JSON Schema of an answer that calls at least one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": parameters_schema(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": 16 if parallel else 1}


def parameters_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a function's arguments."""
    return tool["function"].get("parameters") or {"type": "object"}
