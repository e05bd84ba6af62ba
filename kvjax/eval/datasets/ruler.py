"""RULER's data: what its `prepare.py` writes to `TASK/validation.jsonl`.

Fields relied on: `input`, `outputs`, and `answer_prefix` (or `gen_prefix`). Older files have no such field, and the
answer's beginning is the end of `input`.
"""

import re
from pathlib import Path

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.rows import LoadError, Row, read_rows
from kvjax.eval.tasks import Sample

# By the beginning of the task's name: the tokens that RULER lets an answer take.
_MAX_NEW_TOKENS = {
    "niah": 128,
    "vt": 30,
    "variable_tracking": 30,
    "cwe": 120,
    "common_words": 120,
    "fwe": 50,
    "freq_words": 50,
    "qa": 32,
}
_NEEDLE = re.compile(r"(?:^|\n)(?=What (?:is|are all) the special magic )")
_OTHER = re.compile(r"(?:^|\n)(?=Question: )")


def load_ruler(path: Path, *, name: str | None = None) -> DataSet:
    """A file of one of RULER's tasks; the question is split off its input, and together they are the input again.

    Args:
        name: RULER's name of the task; the file's or its folder's by default.

    Raises:
        LoadError: a field is missing, or no question is found in an input.
    """
    task = name or (path.parent.name if path.stem in ("validation", "test") else path.stem)
    family = next((family for family in _MAX_NEW_TOKENS if task.startswith(family)), None)
    if family is None:
        raise LoadError(f"{path}: {task!r} is no task of RULER's ({', '.join(_MAX_NEW_TOKENS)}): give `name`")
    samples = tuple(_sample(row, family) for row in read_rows(path))
    return DataSet(f"ruler/{task}", "string_match_part" if family == "qa" else "string_match_all", samples)


def _sample(row: Row, family: str) -> Sample:
    text, answers = row.text("input"), row.texts("outputs")
    pattern = _NEEDLE if family == "niah" else _OTHER
    start = max((match.end() for match in pattern.finditer(text)), default=None)
    if start is None:
        raise row.error(f"no question is found in field 'input' of a task of kind {family!r}")
    question = text[start:]
    if row.has("answer_prefix") or row.has("gen_prefix"):
        prefix = row.text("answer_prefix", "gen_prefix")
        gap = "" if prefix[:1].isspace() else " "
        question, prefix = question + gap, prefix.rstrip()
    else:
        mark = "?" if family == "niah" else "Answer:"
        end = question.rfind(mark) + (len(mark) if mark == "?" else 0)
        question, prefix = question[:end], question[end:]
    reply = f" {', '.join(answers if family != 'qa' else answers[:1])}"
    return Sample(text[:start], question, prefix, answers, _MAX_NEW_TOKENS[family], reply=reply)
