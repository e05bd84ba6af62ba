"""Message reader: the text of one choice as an assistant's message, with its thought, its calls and its words."""

import dataclasses
from typing import Any

from kvjax.serve.output.reasoning import ReasoningParser
from kvjax.serve.output.tool_calls import ToolCallParser


@dataclasses.dataclass
class MessageReader:
    """Parsers of what the model writes; None where it writes no such thing."""

    reasoning: ReasoningParser | None = None
    tools: ToolCallParser | None = None

    @property
    def calls(self) -> int:
        """Calls so far."""
        return 0 if self.tools is None else self.tools.calls

    def push(self, text: str, last: bool) -> dict[str, Any]:
        """What more text adds to the message, as a streamed answer has it; with `last` all there is."""
        delta: dict[str, Any] = {}
        if self.reasoning is not None:
            thought, text = self.reasoning.push(text, last)
            if thought:
                delta["reasoning_content"] = thought
        if self.tools is not None:
            text, parts = self.tools.push(text, last)
            if parts:
                delta["tool_calls"] = [part.as_delta() for part in parts]
        if text:
            delta["content"] = text
        return delta


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole message of its parts."""
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    text = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
