"""SCBench's data: `scbench_NAME.jsonl` (or `.parquet`), several questions on each context.

Fields relied on: `context` (a string, or a list of numbers in scbench_mf; `input` in scbench_vt), `multi_turns`, and in
each turn `input`, `answer`, and `options` in scbench_choice_eng.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.rows import LoadError, Row, read_rows
from kvjax.eval.tasks import Question, Sample


@dataclass(frozen=True)
class Kind:
    """The form and the metric of a data set; `before` stands before the context."""

    metric: str
    max_new_tokens: int
    before: str = ""


_JSON = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
KINDS = {
    "kv": Kind("string_match_part", 150, _JSON),
    "kv_hard": Kind("string_match_part", 150, _JSON),
    "prefix_suffix": Kind("string_match_part", 150),
    "vt": Kind("string_match_all", 30),
    "many_shot": Kind("string_match_part", 10),
    "qa_eng": Kind(
        "string_match_part", 40, "Read the book and answer the question. Be very concise in your answer.\n\n"
    ),
    "choice_eng": Kind("choice", 40, "Read the book and answer the question.\n\n"),
    "mf": Kind("leading_number", 5),
    "summary": Kind("rouge_l", 200),
}
_NOT_SUPPORTED = {
    "repoqa": "functions are compared as syntax trees",
    "repoqa_and_kv": "functions are compared as syntax trees",
    "summary_with_needles": "its turns have different scores",
    "qa_chn": "it is scored in characters of Chinese",
}


def load_scbench(path: Path, *, name: str | None = None) -> DataSet:
    """A file of one of SCBench's data sets, in its multi-turn mode.

    Text is matched whatever its case, and ROUGE-L is that of whole texts, where SCBench's is that of lines.

    Args:
        name: SCBench's name of the data set; the file's by default.

    Raises:
        LoadError: a field is missing, or the data set is not one that can be scored.
    """
    task = (name or path.stem).removeprefix("scbench_")
    if task in _NOT_SUPPORTED:
        raise LoadError(f"{path}: {task!r} is not supported: {_NOT_SUPPORTED[task]}")
    if task not in KINDS:
        raise LoadError(f"{path}: {task!r} is no data set of SCBench's ({', '.join(KINDS)}): give `name`")
    kind = KINDS[task]
    samples = []
    for row in read_rows(path):
        turns = [_turn(turn, task) for turn in row.rows("multi_turns")]
        context = kind.before + _context(row) + "\n\n"
        samples.append(Sample.of(context, turns, kind.max_new_tokens))
    return DataSet(f"scbench/{task}", kind.metric, tuple(samples))


def _context(row: Row) -> str:
    """Numbers are written as Python writes a list, which is what SCBench's prompts hold."""
    value = row.value("context", "input")
    if isinstance(value, list):
        return f"[{', '.join(row.texts('context', 'input'))}]"
    return row.text("context", "input")


def _turn(turn: Row, task: str) -> Question:
    question, answers = turn.text("input"), turn.texts("answer")
    if task == "qa_eng":
        return Question(f"Question: {question}\n", "Answer:", answers, f" {answers[0]}")
    if task == "mf":
        match = re.search(r"The (.+) is", question)
        if not match:
            raise turn.error(f"field 'input' of a turn must say 'The ... is', it is {question[:60]!r}")
        question = f"What is the {match.group(1).lower()}?\n\n{question}"
    if task == "choice_eng":
        options = turn.texts("options")
        if len(options) != 4:
            raise turn.error(f"field 'options' must hold 4 options, it holds {len(options)}")
        listed = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
        letters = tuple("ABCD"[options.index(answer)] if answer in options else answer for answer in answers)
        return Question(f"Question: {question}\n{listed}\n", "The correct answer is", letters, f" {letters[0]}")
    return Question(question, "", answers, f" {', '.join(answers)}")
