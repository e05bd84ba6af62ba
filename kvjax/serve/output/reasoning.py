"""Reasoning: what a model thinks before it answers, between <think> and </think>, told apart as it comes."""

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """Splits the text of one choice.

    Args:
        thinking: whether the prompt itself has opened the thought, as some templates do.
    """

    def __init__(self, thinking: bool) -> None:
        self._state = "thought" if thinking else "start"
        self._held = ""

    @staticmethod
    def applies(template: str | None) -> bool:
        """Whether a chat template is that of a model that thinks."""
        return END in (template or "")

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """Thought and answer that are certain after more text; with `last` all there is."""
        self._held += text
        thought = ""
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(BEGIN):
                self._state, self._held = "thought", begun.removeprefix(BEGIN)
            elif last or not BEGIN.startswith(begun):
                self._state = "answer"
            else:
                return "", ""
        if self._state == "thought":
            before, end, behind = self._held.partition(END)
            if end:
                self._state, self._held, thought = "gap", behind, before
            else:
                kept = 0 if last else open_end(self._held, END)
                thought, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
                return thought, ""
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            self._state = "answer" if self._held else "gap"
        answer, self._held = self._held, ""
        return thought, answer


def open_end(text: str, marker: str) -> int:
    """Characters at the end of a text that may be the beginning of a marker."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)
