"""Records, the results of single samples, and the journal: the file of them that an interrupted run resumes from."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvjax.eval.targets import TargetReply
from kvjax.eval.tasks import Question

FORMAT = 1
Key = tuple[str, int, int]  # task, length, index


@dataclass(frozen=True)
class Turn:
    """One question and its reply.

    Attributes:
        text, finish, prompt_tokens, tokens, first_token_seconds, seconds: as in `TargetReply`.
        score: in [0, 1].
    """

    question: str
    answers: tuple[str, ...]
    text: str
    score: float
    finish: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float

    @classmethod
    def of(cls, question: Question, reply: TargetReply, score: float) -> "Turn":
        """The turn of a scored reply, its times in tenths of milliseconds."""
        times = {name: round(getattr(reply, name), 4) for name in ("first_token_seconds", "seconds")}
        return cls(question.question, question.answers, score=score, **(asdict(reply) | times))


@dataclass(frozen=True)
class Record:
    """One sample: either scored, or failed with the reason. A failed one has no score, which is not a score of 0.

    Attributes:
        length: tokens of the sample and its answers, which one from a file may stay below.
        index: among the samples of its task and length.
        score: the mean over its turns; None if a request failed.
        error: the reason of a failure; None if it was scored.
        turns: those with a reply.
    """

    task: str
    length: int
    index: int
    score: float | None
    error: str | None
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if (self.score is None) == (self.error is None):
            raise ValueError(f"a record has a score or an error, got score={self.score} and error={self.error!r}")

    @property
    def key(self) -> Key:
        return self.task, self.length, self.index

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Record":
        """The inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for other fields."""
        turns = tuple(Turn(**{**turn, "answers": tuple(turn["answers"])}) for turn in fields["turns"])
        return cls(**{**fields, "turns": turns})


class JournalError(ValueError):
    """The file cannot take these results; the message says why and what to do."""


class Journal:
    """A JSON Lines file: the settings first, then one line a finished sample, written at once.

    A process that is killed loses at most the line it was writing, which the next one cuts off. Of several lines
    of one sample the last counts, so a failed sample can be tried again.

    Attributes:
        records: the file's records by key.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Opens the file for going on, or starts it.

        Raises:
            JournalError: it holds something else, or results of other settings, or cannot be written, or is being.
        """
        self.path = path
        self.records: dict[Key, Record] = {}
        head = {"kvjax.eval": FORMAT, "settings": dict(settings)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise JournalError(f"output={str(path)!r} cannot be used: {error.strerror}; choose another") from error
        try:
            self._lock()
            whole = self._read(head)
        except JournalError:
            self.close()
            raise
        self._file.truncate(whole)
        if not whole:
            self._write(head)

    def append(self, record: Record) -> None:
        """Writes one record through to the file. Raises OSError if the disk is full."""
        self._write(asdict(record))
        self.records[record.key] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        # in ASCII: a reply may hold half a character, or a line end that only Unicode knows
        self._file.write(json.dumps(content).encode("ascii") + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        """Holds the file until it is closed, for this process alone."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"output={str(self.path)!r} is being written by another run: wait for it") from error

    def _read(self, head: Mapping[str, Any]) -> int:
        """Fills `records`; returns the length of the file's whole lines in bytes."""
        end = 0
        for number, (line, end) in enumerate(self._lines(), start=1):  # noqa: B007
            try:
                content = json.loads(line)
                if number == 1:
                    _compare(self.path, content["settings"], head["settings"], content["kvjax.eval"])
                else:
                    record = Record.from_json(content)
                    self.records[record.key] = record
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, JournalError):
                    raise
                fault = "is no file of kvjax.eval" if number == 1 else f"is damaged in line {number} ({error})"
                raise JournalError(f"output={str(self.path)!r} {fault}: choose another name") from error
        if not end and self.path.stat().st_size:
            raise JournalError(f"output={str(self.path)!r} is no file of kvjax.eval: choose another name")
        return end

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Each line that has its end, and where that is; not the one that a killed process was writing."""
        end = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield line, end


def _compare(path: Path, recorded: Mapping[str, Any], current: Mapping[str, Any], version: int) -> None:
    if version != FORMAT:
        raise JournalError(
            f"output={str(path)!r} has format {version}, this kvjax writes {FORMAT}: choose another name"
        )
    names = dict.fromkeys([*recorded, *current])
    other = [f"{name} was {recorded.get(name)!r} and now is {current.get(name)!r}" for name in names]
    other = [text for name, text in zip(names, other, strict=True) if recorded.get(name) != current.get(name)]
    if other:
        raise JournalError(
            f"output={str(path)!r} holds results of other settings: {'; '.join(other)}. "
            f"Use the former settings to go on with it, or choose another name"
        )
