"""Scores of RULER and LongBench beside those of lm-eval, which has both benchmarks, over generated replies.

Not compared are ROUGE, which lm-eval computes over sentences and ours is compared with Google's, and the similarity of
code, which lm-eval rounds to whole percent of another distance.
"""

import importlib.util
import sys
import types
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.eval.metrics import METRICS
from kvjax.eval.metrics.benchmark import classification

pytestmark = pytest.mark.clients

WORDS = [
    "cat",
    "Dog",
    "the",
    "an",
    "42",
    "7",
    "3.5",
    "Paris",
    "don't",
    "x-ray",
    "ÉTÉ",
    "paragraph",
    "42nd",
    "",
    "\n",
    ".",
]
PHRASES = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
REPLIES = PHRASES | st.text(max_size=30)
NAMES = st.sampled_from(["cat", "dog", "Paris", "x-ray", "été", "42", "753", "a b"])
ANSWERS = st.lists(NAMES, min_size=1, max_size=4)
LONGBENCH = ("jieba", "fuzzywuzzy", "rouge")  # which lm-eval's file imports, and what is compared does not use


@pytest.fixture(scope="module")
def ruler():
    return module("ruler/common_utils.py")


@pytest.fixture(scope="module")
def longbench():
    with pytest.MonkeyPatch.context() as patch:
        for name in LONGBENCH:
            stub = types.ModuleType(name)
            stub.__dict__.update(fuzz=None, Rouge=None)
            patch.setitem(sys.modules, name, stub)
        return module("longbench/metrics.py")


def module(path: str):
    """A file of lm-eval's tasks, without the rest of lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-eval comes with the extra `clients`; `make nightly` has it")
    file = Path(spec.origin).parent / "tasks" / path
    spec = importlib.util.spec_from_file_location(f"lm_eval_{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@hypothesis.given(reply=REPLIES, answers=ANSWERS)
def test_the_share_of_answers_is_rulers(ruler, reply, answers):
    expected = ruler.process_results({"max_length": 4096, "outputs": answers}, [reply])["4096"]
    assert METRICS["string_match_all"](reply, answers) == pytest.approx(expected)


@hypothesis.given(reply=REPLIES, answer=NAMES)
def test_any_of_the_answers_is_rulers_where_there_is_one(ruler, reply, answer):
    expected = ruler.process_results_part({"max_length": 4096, "outputs": [answer]}, [reply])["4096"]
    assert METRICS["string_match_part"](reply, [answer]) == expected


def test_one_of_two_answers_is_all_to_rulers_own_script_and_half_to_lm_evals(ruler):
    assert METRICS["string_match_part"]("a cat", ["cat", "dog"]) == 1
    assert ruler.process_results_part({"max_length": 4096, "outputs": ["cat", "dog"]}, ["a cat"])["4096"] == 0.5


@hypothesis.given(reply=REPLIES, answers=ANSWERS)
def test_the_f1_of_words_is_longbenchs(longbench, reply, answers):
    expected = longbench.get_qa_f1_score({"answers": answers}, [reply])["qa_f1_score"]
    assert METRICS["token_f1"](reply, answers) == pytest.approx(expected)


@hypothesis.given(reply=REPLIES, numbers=st.lists(st.sampled_from(["3", "7", "42"]), min_size=1, max_size=3))
def test_the_share_of_numbers_is_longbenchs(longbench, reply, numbers):
    expected = longbench.get_count_score({"answers": numbers}, [reply])["count_score"]
    assert METRICS["number_share"](reply, numbers) == pytest.approx(expected)
    paragraphs = [f"Paragraph {number}" for number in numbers]
    expected = longbench.get_retrieval_score({"answers": paragraphs}, [reply])["retrieval_score"]
    assert METRICS["number_share"](reply, paragraphs) == pytest.approx(expected)


@hypothesis.given(reply=REPLIES, classes=st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_classes_are_longbenchs(longbench, reply, classes):
    """None of these names is part of another, which is where LongBench's script skips every second one."""
    right = classes[0]
    expected = longbench.get_classification_score({"answers": [right], "all_classes": classes}, [reply])
    assert classification(reply, classes) == pytest.approx(expected["classification_score"])
