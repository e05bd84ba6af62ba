"""Files in the form that benchmarks publish, written here by hand, become samples; broken ones say where and why."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from kvjax.eval.datasets import LOADERS, DataSet, LoadError, load
from kvjax.eval.metrics import score_turns
from kvjax.eval.tasks import Sample, Task
from tests.eval.test_tasks import words


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def longbench(folder, name, *records, prompt="Read.\n\n{context}\n\nQuestion: {input}\nAnswer:", size=32):
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps({name: prompt}))
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps({name: size}))
    whole = [{"length": 3, "dataset": name, "language": "en", "all_classes": None, "_id": "a"} | r for r in records]
    return lines(folder / "data" / f"{name}.jsonl", *whole)


def perfect(data):
    """The mean score of perfect replies."""
    scores = []
    for sample in data.samples:
        turns = sample.turns
        scores.append(score_turns(data.metric, [turn.reply for turn in turns], [turn.answers for turn in turns]))
    return sum(scores) / len(scores)


NEEDLE = {
    "index": 0,
    "input": "A special magic number is hidden within the following text.\n"
    "One of the special magic numbers for a-b is: 12.\n"
    "What is the special magic number for a-b mentioned in the provided text?",
    "outputs": ["12"],
    "length": 60,
    "answer_prefix": " The special magic number for a-b mentioned in the provided text is",
}


def test_ruler_input_is_split_at_its_question(tmp_path):
    data = load("ruler", lines(tmp_path / "niah_single_1" / "validation.jsonl", NEEDLE))
    (sample,) = data.samples
    assert (data.name, data.metric, sample.max_new_tokens) == ("ruler/niah_single_1", "string_match_all", 128)
    assert sample.prompt == NEEDLE["input"] + NEEDLE["answer_prefix"]
    assert sample.context.endswith("is: 12.\n")
    assert sample.question.startswith("What is the special magic number for a-b")
    assert sample.answers == ("12",)
    assert isinstance(data, Task)
    assert perfect(data) == 1.0


def test_ruler_files_without_a_prefix_end_in_it(tmp_path):
    whole = {"index": 0, "input": NEEDLE["input"] + NEEDLE["answer_prefix"], "outputs": ["12"], "length": 60}
    (sample,) = load("ruler", lines(tmp_path / "niah_multikey_2.jsonl", whole)).samples
    assert sample.prompt == whole["input"]
    assert sample.question.endswith("provided text?")
    assert sample.answer_prefix == NEEDLE["answer_prefix"]


@pytest.mark.parametrize(
    ("task", "metric", "size"),
    [
        ("vt", "string_match_all", 30),
        ("cwe", "string_match_all", 120),
        ("fwe", "string_match_all", 50),
        ("qa_1", "string_match_part", 32),
    ],
)
def test_ruler_tasks_of_other_kinds(task, metric, size, tmp_path):
    # the worked example before the text asks a question too: the last one is meant
    text = "Text.\nQuestion: an example? Answer: it is 1\nMore text.\nQuestion: what is it? Answer: it is"
    data = load("ruler", lines(tmp_path / "x.jsonl", {"input": text, "outputs": ["AB", "CD"]}), name=task)
    (sample,) = data.samples
    assert (data.metric, sample.max_new_tokens) == (metric, size)
    assert sample.context.endswith("More text.\n")
    assert sample.question == "Question: what is it? "
    assert sample.answer_prefix == "Answer: it is"
    assert perfect(data) == 1.0


def test_longbench_uses_its_own_prompt_and_cuts_in_the_middle(tmp_path):
    context = " ".join(f"word{i}" for i in range(1000))
    file = longbench(tmp_path, "qasper", {"input": "why?", "context": context, "answers": ["the end", "end"]})
    data = load("longbench", file)
    (sample,) = data.samples
    assert (data.name, data.metric, sample.max_new_tokens) == ("longbench/qasper", "token_f1", 32)
    assert sample.prompt == f"Read.\n\n{context}\n\nQuestion: why?\nAnswer:"
    assert sample.question == "Question: why?\nAnswer:"
    assert sample.answers == ("the end", "end")
    assert data.sample(length=2000, seed=0, count=words) == sample
    cut = data.sample(length=300, seed=0, count=words)
    assert 290 - 32 < words(cut.prompt) <= 300 - 32
    assert cut.context.startswith("Read.\n\nword0 word1 ")
    assert cut.context.endswith(" word998 word999\n\n")
    with pytest.raises(ValueError, match=r"takes .* tokens, 30 are allowed"):
        data.sample(length=30, seed=0, count=words)


def test_longbench_text_with_braces_is_left_alone(tmp_path):
    file = longbench(
        tmp_path,
        "lcc",
        {"input": "", "context": "x = {input}\n", "answers": ["y = {}"]},
        prompt="Go.\n{context}Next:\n",
    )
    (sample,) = (data := load("longbench", file)).samples
    assert sample.prompt == "Go.\nx = {input}\nNext:\n"
    assert data.metric == "edit_similarity"
    assert perfect(data) == 1.0


@pytest.mark.parametrize(
    ("name", "metric", "answers"),
    [
        ("hotpotqa", "token_f1", ["Paris"]),
        ("triviaqa", "first_line_token_f1", ["Paris"]),
        ("gov_report", "rouge_l", ["A summary of two lines.\nThe second."]),
        ("samsum", "first_line_rouge_l", ["A summary"]),
        ("passage_count", "number_share", ["7"]),
        ("passage_retrieval_en", "number_share", ["Paragraph 7"]),
        ("repobench-p", "edit_similarity", ["    return x"]),
    ],
)
def test_longbench_scores_each_data_set_in_its_way(name, metric, answers, tmp_path):
    data = load("longbench", longbench(tmp_path, name, {"input": "?", "context": "c", "answers": answers}))
    assert data.metric == metric
    assert perfect(data) == 1.0


def test_longbench_classes_are_answers_of_which_the_first_is_right(tmp_path):
    record = {"input": "?", "context": "c", "answers": ["Food"], "all_classes": ["Date", "Food"]}
    data = load("longbench", longbench(tmp_path, "trec", record))
    assert data.samples[0].answers == ("Food", "Date", "Food")
    assert perfect(data) == 1.0
    assert load("longbench", tmp_path / "data" / "trec.jsonl", config=tmp_path / "config") == data
    with pytest.raises(LoadError, match=r"trec.jsonl:1: field 'all_classes' is missing"):
        load("longbench", longbench(tmp_path, "trec", record | {"all_classes": None}))


KV = {
    "id": 0,
    "context": '{"a": "1", "b": "2"}',
    "multi_turns": [
        {"input": 'Key: "b"\nThe value is: ', "answer": "2"},
        {"input": 'Key: "a"\nThe value is: ', "answer": "1"},
    ],
}


def test_scbench_asks_in_turns(tmp_path):
    data = load("scbench", lines(tmp_path / "scbench_kv.jsonl", KV, KV))
    assert (data.name, data.metric, len(data.samples)) == ("scbench/kv", "string_match_part", 2)
    sample = data.samples[0]
    assert [turn.answers for turn in sample.turns] == [("2",), ("1",)]
    assert sample.prompt == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        '{"a": "1", "b": "2"}\n\nKey: "b"\nThe value is: '
    )
    assert sample.max_new_tokens == 150
    assert perfect(data) == 1.0
    assert data.sample(length=1000, seed=3, count=words) == data.samples[1]
    with pytest.raises(ValueError, match="sample 0 of scbench/kv takes"):
        data.sample(length=320, seed=0, count=words)


def test_scbench_lists_of_numbers_choices_and_contexts_of_another_name(tmp_path):
    numbers = {"context": [5, 9, 7], "multi_turns": [{"input": "Only a number. The largest number is", "answer": 9}]}
    (sample,) = (data := load("scbench", lines(tmp_path / "scbench_mf.jsonl", numbers))).samples
    assert sample.context == "[5, 9, 7]\n\n"
    assert sample.question == "What is the largest number?\n\nOnly a number. The largest number is"
    assert (data.metric, perfect(data)) == ("leading_number", 1.0)

    options = ["sun", "moon", "star", "sky"]
    asked = [
        {"input": "Which?", "answer": "moon", "options": options},
        {"input": "?", "answer": "D", "options": options},
    ]
    data = load("scbench", lines(tmp_path / "scbench_choice_eng.jsonl", {"context": "Book.", "multi_turns": asked}))
    (sample,) = data.samples
    assert [turn.answers for turn in sample.turns] == [("B",), ("D",)]
    assert sample.question == "Question: Which?\nA. sun\nB. moon\nC. star\nD. sky\n\n"
    assert perfect(data) == 1.0

    chain = {"input": "VAR A = 1", "multi_turns": [{"input": "Find all.", "answer": ["A", "B"]}]}
    data = load("scbench", lines(tmp_path / "scbench_vt.jsonl", chain))
    assert data.samples[0].context == "VAR A = 1\n\n"
    assert data.samples[0].answers == ("A", "B")
    assert (data.metric, perfect(data)) == ("string_match_all", 1.0)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_same_records_in_all_kinds_of_files(kind, tmp_path):
    path = tmp_path / f"scbench_kv.{kind}"
    if kind == "jsonl":
        lines(path, KV)
    elif kind == "json":
        path.write_text(json.dumps([KV]))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([KV]), path)
    assert load("scbench", path).samples == load("scbench", lines(tmp_path / "scbench_kv.jsonl", KV)).samples


def problem(number):
    return {
        "question": f"What is {number} + 1?",
        "answer": f"{number} + 1 = <<{number}+1={number + 1}>>\n#### {number + 1:,}",
    }


def test_gsm8k_after_solved_problems(tmp_path):
    test = lines(tmp_path / "test.jsonl", problem(1200), problem(5))
    data = load("gsm8k", test, examples=lines(tmp_path / "train.jsonl", *map(problem, range(9))), shots=2)
    assert (data.name, data.metric, len(data.samples)) == ("gsm8k/test", "gsm8k", 2)
    first = data.samples[0]
    assert first.context.count("Question: ") == 2
    assert first.context.endswith("1 + 1 = <<1+1=2>>\n#### 2\n\n")
    assert first.question == "Question: What is 1200 + 1?\n"
    assert first.answers == ("1,201",)
    assert perfect(data) == 1.0
    assert load("gsm8k", test).samples[0].context == ""
    with pytest.raises(LoadError, match="shots=20 must be 1 to 9"):
        load("gsm8k", test, examples=tmp_path / "train.jsonl", shots=20)


@pytest.mark.parametrize(("code", "mark"), [("cropped_code", "#"), ("code", "//")])
def test_repobench_puts_other_files_first(code, mark, tmp_path):
    end = "py" if mark == "#" else "java"
    record = {
        "repo_name": "r",
        "file_path": f"a/main.{end}",
        "context": [{"identifier": "f", "path": f"a/util.{end}", "snippet": "def f():\n    return 1"}],
        "import_statement": "from a.util import f",
        code: "def g():\n",
        "next_line": "    return f()",
        "gold_snippet_index": 0,
    }
    data = load("repobench", lines(tmp_path / "cross_file_first.jsonl", record))
    (sample,) = data.samples
    assert sample.prompt == (
        f"{mark} Path: a/util.{end}\ndef f():\n    return 1\n\n"
        f"{mark} Path: a/main.{end}\nfrom a.util import f\n\ndef g():\n"
    )
    assert (data.name, data.metric) == ("repobench/cross_file_first", "edit_similarity")
    assert perfect(data) == 1.0


@pytest.mark.parametrize(
    ("benchmark", "record", "field"),
    [
        ("ruler", NEEDLE, "input"),
        ("ruler", NEEDLE, "outputs"),
        ("longbench", {"input": "?", "context": "c", "answers": ["a"]}, "context"),
        ("longbench", {"input": "?", "context": "c", "answers": ["a"]}, "answers"),
        ("scbench", KV, "context"),
        ("scbench", KV, "multi_turns"),
        ("gsm8k", problem(1), "question"),
        ("gsm8k", problem(1), "answer"),
        ("repobench", {"file_path": "a.py", "context": [{"path": "b", "snippet": "c"}]}, "import_statement"),
    ],
)
def test_a_missing_field_is_named_with_file_and_line(benchmark, record, field, tmp_path):
    name = {"ruler": "niah_single_1", "longbench": "qasper", "scbench": "scbench_kv"}.get(benchmark, "test")
    broken = {key: value for key, value in record.items() if key != field}
    if benchmark == "longbench":
        path = longbench(tmp_path, name, record, broken)
    else:
        good = [record] if benchmark != "repobench" else []
        path = lines(tmp_path / f"{name}.jsonl", *good, broken)
    line = 1 if benchmark == "repobench" else 2
    with pytest.raises(LoadError, match=rf"{name}.jsonl:{line}: .*{field}.* is missing; there are '"):
        load(benchmark, path)


@pytest.mark.parametrize(
    ("benchmark", "name", "record", "what"),
    [
        ("ruler", "vt", {"input": "no question", "outputs": ["1"]}, "no question is found in field 'input'"),
        ("ruler", "vt", {"input": "Question: a", "outputs": []}, "'outputs' must be a string or a list of some"),
        ("ruler", "vt", {"input": ["a"], "outputs": ["1"]}, "'input' must be a string, it is list"),
        ("scbench", "scbench_kv", KV | {"multi_turns": "x"}, "'multi_turns' must be a list of objects"),
        ("scbench", "scbench_kv", KV | {"multi_turns": [{"input": "a"}]}, "field 'answer' is missing"),
        (
            "scbench",
            "scbench_mf",
            {"context": [1], "multi_turns": [{"input": "Max?", "answer": 1}]},
            "must say 'The ... is'",
        ),
        ("gsm8k", "test", {"question": "?", "answer": "4"}, "must end in '#### '"),
        ("gsm8k", "test", ["a"], "a record must be an object"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(benchmark, name, record, what, tmp_path):
    with pytest.raises(LoadError, match=f"{name}.jsonl:1: .*{what}"):
        load(benchmark, lines(tmp_path / f"{name}.jsonl", record))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the path of a file"):
        load("gsm8k", tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text('{"question": "a"}\n\n{"question"\n')
    with pytest.raises(LoadError, match=r"test.jsonl:3: not JSON"):
        load("gsm8k", tmp_path / "test.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LoadError, match="holds no record"):
        load("gsm8k", tmp_path / "empty.jsonl")
    for name, content, what in [
        ("a.json", "{}", "must be a list"),
        ("b.json", "[", "not JSON"),
        ("c.csv", "", "'.csv'"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(LoadError, match=what):
            load("gsm8k", tmp_path / name)
    (tmp_path / "d.parquet").write_text("text")
    with pytest.raises(LoadError, match=r"not a .parquet file"):
        load("gsm8k", tmp_path / "d.parquet")


def test_data_sets_that_cannot_be_scored_say_why(tmp_path):
    with pytest.raises(LoadError, match="words of Chinese"):
        load("longbench", tmp_path / "dureader.jsonl")
    with pytest.raises(LoadError, match="syntax trees"):
        load("scbench", tmp_path / "scbench_repoqa.jsonl")
    for benchmark in ("longbench", "scbench", "ruler"):
        with pytest.raises(LoadError, match=r"is no .*: give `name`"):
            load(benchmark, tmp_path / "unknown.jsonl")
    with pytest.raises(KeyError, match=f"there are {', '.join(LOADERS)}"):
        load("mmlu", tmp_path)


def test_longbench_needs_its_prompts(tmp_path):
    record = {"input": "?", "context": "c", "answers": ["a"]}
    with pytest.raises(FileNotFoundError, match=r"no folder config with dataset2prompt.json"):
        load("longbench", lines(tmp_path / "qasper.jsonl", record))
    longbench(tmp_path, "trec", record)
    with pytest.raises(LoadError, match="field 'qasper' is missing; there are trec"):
        load("longbench", tmp_path / "qasper.jsonl")
    with pytest.raises(LoadError, match=r"one {context}"):
        load("longbench", longbench(tmp_path, "qasper", record, prompt="{input}"))


def test_a_data_set_is_scored_in_a_way_that_exists():
    with pytest.raises(ValueError, match="no metric 'bleu'"):
        DataSet("a", "bleu", (Sample("a", "b", "c", ("d",), 1),))
    with pytest.raises(ValueError, match="has no samples"):
        DataSet("a", "gsm8k", ())
