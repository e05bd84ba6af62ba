"""GSM8K's data: `train.jsonl`, `test.jsonl` (or `.parquet`).

Fields relied on: `question` and `answer`, which ends in '#### ' and the result.
"""

from pathlib import Path

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.rows import LoadError, Row, read_rows
from kvjax.eval.tasks import Sample


def load_gsm8k(path: Path, *, examples: Path | None = None, shots: int = 8) -> DataSet:
    """The problems of a file, each after the first `shots` solved problems of the file `examples`.

    Args:
        examples: usually `train.jsonl`; without it nothing stands before a problem.

    Raises:
        LoadError: a field is missing, an answer has no result, or `examples` holds fewer than `shots`.
    """
    before = ""
    if examples is not None:
        rows = read_rows(examples)
        if not 1 <= shots <= len(rows):
            raise LoadError(f"{examples}: shots={shots} must be 1 to {len(rows)}, the problems of the file")
        before = "".join(f"Question: {row.text('question')}\nAnswer: {_solved(row)}\n\n" for row in rows[:shots])
    return DataSet("gsm8k/" + path.stem, "gsm8k", tuple(_sample(row, before) for row in read_rows(path)))


def _solved(row: Row) -> str:
    answer = row.text("answer")
    if "####" not in answer:
        raise row.error("field 'answer' must end in '#### ' and the result")
    return answer


def _sample(row: Row, before: str) -> Sample:
    answer = _solved(row)
    result = answer.split("####")[-1].strip()
    return Sample(before, f"Question: {row.text('question')}\n", "Answer:", (result,), 256, reply=f" {answer}")
