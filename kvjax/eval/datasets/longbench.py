"""LongBench's data: `DATA_SET.jsonl` and `DATA_SET_e.jsonl`, with its own prompts.

Fields relied on: `context`, `input`, `answers`, and `all_classes` for `trec`. The prompts and the lengths of answers
are read from LongBench's `config/dataset2prompt.json` and `config/dataset2maxlen.json`, so that they are those of
the version at hand.
"""

import json
from pathlib import Path
from typing import Any

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.rows import LoadError, Row, read_rows
from kvjax.eval.tasks import Sample

METRIC = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), "token_f1"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), "rouge_l"),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), "number_share"),
    **dict.fromkeys(("lcc", "repobench-p"), "edit_similarity"),
    "trec": "classification",
    "triviaqa": "first_line_token_f1",
    "samsum": "first_line_rouge_l",
}
# Scored in words of Chinese, which takes a segmenter.
_CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht")


def load_longbench(path: Path, *, name: str | None = None, config: Path | None = None) -> DataSet:
    """A file of one of LongBench's data sets; contexts that are too long are cut in the middle, as LongBench does.

    Args:
        name: LongBench's name of the data set; the file's by default, without `_e`.
        config: LongBench's folder `config`; by default one of that name in a folder above the file.

    Raises:
        FileNotFoundError: `config` is not found.
        LoadError: a field is missing, or the data set is not one that can be scored.
    """
    task = (name or path.stem).removesuffix("_e")
    if task in _CHINESE:
        raise LoadError(f"{path}: {task!r} is scored in words of Chinese, which is not supported")
    if task not in METRIC:
        raise LoadError(f"{path}: {task!r} is no data set of LongBench's ({', '.join(METRIC)}): give `name`")
    config = config or _find_config(path)
    template, size = _setting(config / "dataset2prompt.json", task), _setting(config / "dataset2maxlen.json", task)
    if not isinstance(template, str) or template.count("{context}") != 1 or not isinstance(size, int):
        raise LoadError(f"{config}: {task!r} must have a prompt with one {{context}} and a number of tokens")
    samples = tuple(_sample(row, task, template, size) for row in read_rows(path))
    return DataSet(f"longbench/{path.stem}", METRIC[task], samples, may_cut=True)


def _find_config(path: Path) -> Path:
    folders = [folder / "config" for folder in path.resolve().parents]
    for folder in folders:
        if (folder / "dataset2prompt.json").is_file():
            return folder
    raise FileNotFoundError(f"no folder config with dataset2prompt.json above {path}: give LongBench's own as `config`")


def _setting(path: Path, task: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: it is part of LongBench's folder config")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if task not in settings:
        raise LoadError(f"{path}: field {task!r} is missing; there are {', '.join(settings)}")
    return settings[task]


def _sample(row: Row, task: str, template: str, max_new_tokens: int) -> Sample:
    before, _, after = template.partition("{context}")
    gap = after[: len(after) - len(after.lstrip())]
    question = after[len(gap) :].replace("{input}", row.text("input"))
    answers = row.texts("answers")
    if task == "trec":
        answers = (answers[0], *row.texts("all_classes"))
    context = before + row.text("context") + gap
    return Sample(context, question, "", answers, max_new_tokens, reply=answers[0])
