"""JSON scanner: finds where a JSON value ends while its text still arrives."""

import dataclasses


@dataclasses.dataclass
class JsonScanner:
    """Attributes:

    complete: whether the value has ended. A number or a word at the top ends only with what follows it.
    """

    complete: bool = False
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _begun: bool = False

    def push(self, text: str) -> int:
        """How many characters of `text` belong to the value; fewer than all of them once it has ended."""
        for index, character in enumerate(text):
            if self.complete:
                return index
            if self._in_string:
                self._string(character)
            elif character in "}],":
                if self._depth == 0:
                    self.complete = True
                    return index
                self._depth -= character != ","
                self.complete = self._depth == 0
            elif self._depth == 0 and self._begun and character.isspace():
                self.complete = True
                return index
            else:
                self._begun = self._begun or not character.isspace()
                self._depth += character in "{["
                self._in_string = character == '"'
        return len(text)

    def _string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.complete = self._depth == 0
