"""Exit statuses and sentences of the store's commands."""

import sys

GOOD, HARMED, WRONG = 0, 1, 2


class UsageError(Exception):
    """The call makes no sense; says what would."""


def say(text: str) -> None:
    print(shown(text, sys.stdout.encoding))


def fail(status: int, text: str) -> int:
    print(f"kvjax.store: {shown(text, sys.stderr.encoding)}", file=sys.stderr)
    return status


def shown(text: str, encoding: str | None) -> str:
    """Text without what a terminal would act on or cannot show, which is escaped: names come from anywhere."""
    lines = text.split("\n") if "\n  " in text else [text]  # the forms of a URL stand on lines of their own
    safe = ["".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line) for line in lines]
    return "\n".join(safe).encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
