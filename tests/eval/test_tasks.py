"""Generated tasks: what a sample says, that it is the same everywhere, fits, and can be solved."""

import hashlib
import random
import re
from dataclasses import astuple
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kvjax.eval.metrics import METRICS, score_turns
from kvjax.eval.tasks import TASKS, Sample, Task, find_task
from kvjax.eval.tasks.fitting import largest_fit
from kvjax.eval.tasks.needle import NeedleTask
from kvjax.eval.tasks.surface import MINI, RULER
from kvjax.eval.tasks.variables import VariableTask
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS, noise, sentences

ALL = sorted(TASKS)
EIGHT = [
    *(
        "single_1",
        "single_2",
        "single_3",
        "multikey_1",
        "multikey_2",
        "multikey_3",
        "multivalue",
        "multiquery",
    )
]


def words(text: str) -> int:
    """A tokenizer for tests: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def total(sample: Sample) -> int:
    """Tokens of everything that is said with perfect replies; a line end closes each turn."""
    turns = [turn.question + turn.answer_prefix + turn.reply + "\n" for turn in sample.turns]
    return words(sample.context) + sum(map(words, turns))


def test_the_names_are_those_that_documents_and_training_know():
    shapes = ["turns_niah", "turns_kv", "chain", "next_line"]
    ruler = [*(f"niah_{name}" for name in EIGHT), "vt", "cwe", "fwe", "qa_1", "qa_2"]
    wanted = {f"ruler/{name}" for name in ruler} | {f"text/{name}" for name in shapes}
    assert set(TASKS) == wanted | {f"mini/{name}" for name in ruler + shapes}
    for name, task in TASKS.items():
        assert isinstance(task, Task)
        assert (task.name, task.metric in METRICS) == (name, True)


@pytest.mark.parametrize(
    ("surface", "digest"),
    [("ruler", "a46b917911486773"), ("text", "e404c90cd08a17d3"), ("mini", "04d6e541340ad2a3")],
)
def test_every_word_of_a_sample_is_pinned(surface, digest):
    """Published scores and trained weights depend on the wording; next_line, on the version of Python, is left out."""
    tasks = [task for name, task in TASKS.items() if name.startswith(f"{surface}/") and "next_line" not in name]
    samples = [
        task.sample(length=700, seed=seed, count=lambda text: len(text) // 4) for task in tasks for seed in (0, 1)
    ]
    assert hashlib.sha256(repr(list(map(astuple, samples))).encode()).hexdigest()[:16] == digest


def test_an_unknown_task_is_named_with_all_that_exist():
    with pytest.raises(KeyError, match="mini/niah_single_1"):
        find_task("mini/niah_single_9")


@pytest.mark.parametrize("name", ALL)
def test_a_sample_depends_on_name_length_and_seed_only(name):
    task = find_task(name)
    one = task.sample(length=700, seed=3, count=words)
    random.seed(99)  # the global generator has no say
    assert task.sample(length=700, seed=3, count=words) == one
    different = {task.sample(length=700, seed=seed, count=words).prompt for seed in range(5)}
    assert len(different) == 5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [700, 1500, 3000])
def test_a_sample_fills_its_length_and_never_exceeds_it(name, length):
    sample = find_task(name).sample(length=length, seed=1, count=words)
    assert length - 80 < total(sample) <= length


@pytest.mark.parametrize("name", [name for name in ALL if re.search("mini|niah_.*[12]$", name)])
def test_a_short_length_is_enough_for_tasks_of_short_words(name):
    sample = find_task(name).sample(length=300, seed=1, count=words)
    assert 300 - 80 < total(sample) <= 300


@pytest.mark.parametrize("name", ALL)
def test_a_perfect_reply_scores_1_and_silence_0(name):
    task = find_task(name)
    turns = task.sample(length=900, seed=2, count=words).turns
    answers = [turn.answers for turn in turns]
    assert score_turns(task.metric, [turn.reply for turn in turns], answers) == 1.0
    assert score_turns(task.metric, [""] * len(turns), answers) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_a_sample_has_the_form_that_models_are_asked_in(name):
    sample = find_task(name).sample(length=800, seed=5, count=words)
    assert sample.prompt == sample.context + sample.question + sample.answer_prefix
    assert sample.context.endswith("\n")
    assert sample.max_new_tokens > 0
    for turn in sample.turns:
        assert turn.question.endswith("\n")
        assert turn.answer_prefix == turn.answer_prefix.rstrip()
        assert turn.reply[0].isspace()
        assert all(answer in turn.reply for answer in turn.answers)


@pytest.mark.parametrize("name", [name for name in ALL if not re.search("chain|next_line", name)])
def test_the_context_holds_every_answer_and_question_and_prefix_hold_no_value(name):
    for turn in (sample := find_task(name).sample(length=800, seed=5, count=words)).turns:
        for answer in turn.answers:
            assert answer in sample.context
            if "vt" not in name:
                assert not re.search(rf"\b{answer}\b", turn.question + turn.answer_prefix)


def test_a_hand_worked_mini_needle():
    asked = MINI.ask({"apple": ("4719",)}, "number")
    assert asked.question == "What is the code for apple?\n"
    assert asked.answer_prefix + asked.reply == "The code for apple is 4719."
    assert MINI.needle("apple", "4719", "number") in ("The code for apple is 4719.",)


def test_hand_worked_mini_questions_for_several_values_and_several_keys():
    several = MINI.ask({"apple": ("1111", "2222")}, "number")
    assert several.answer_prefix + several.reply == "The codes for apple are 1111, 2222."
    keys = MINI.ask({"apple": ("1111",), "tiger": ("2222",), "moon": ("3333",)}, "number")
    assert keys.question == "What are the codes for apple, tiger and moon?\n"
    assert keys.answer_prefix + keys.reply == "The codes are: apple is 1111, tiger is 2222, moon is 3333."
    assert keys.answers == ("1111", "2222", "3333")


def test_hand_worked_ruler_strings():
    key = {"calm-dog": ("1234567",)}
    assert RULER.needle("calm-dog", "1234567", "number") == (
        "One of the special magic numbers for calm-dog is: 1234567."
    )
    assert RULER.ask(key, "number").question == (
        "What is the special magic number for calm-dog mentioned in the provided text?\n"
    )
    four = RULER.ask({"a": ("1",), "b": ("2",), "c": ("3",)}, "number")
    assert four.question == ("What are all the special magic numbers for a, b, and c mentioned in the provided text?\n")
    assert RULER.context("x", values=1, kind="id").startswith("A special magic uuid is hidden")
    assert RULER.context("x", values=4, kind="word").startswith("Some special magic words are hidden")
    assert RULER.assign("B", "A", first=False) == "VAR B = VAR A."


def test_a_multivalue_answer_is_in_order_of_appearance():
    sample = find_task("mini/niah_multivalue").sample(length=800, seed=2, count=words)
    places = [sample.context.index(f" is {answer}.") for answer in sample.answers]
    assert len(places) == 4
    assert places == sorted(places)


def test_needle_filler_states_other_facts_once_each():
    sample = find_task("mini/niah_multikey_2").sample(length=2000, seed=2, count=words)
    keys = re.findall(r"The code for (\w+) is \d{4}\.", sample.context)
    assert len(keys) == len(set(keys)) > 150
    (asked,) = re.findall(r"for (\w+)\?", sample.question)
    assert keys.count(asked) == 1


def test_needle_filler_beyond_the_supply_of_nouns_goes_on_with_noise():
    sample = find_task("mini/niah_multikey_2").sample(length=6000, seed=2, count=words)
    assert len(re.findall("The code for", sample.context)) == len(NOUNS)
    assert "The grass is green." in sample.context


def test_needles_lie_at_all_depths():
    depths = []
    for seed in range(60):
        sample = find_task("mini/niah_single_1").sample(length=500, seed=seed, count=words)
        depths.append(sample.context.index("The code") / len(sample.context))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.35 < sum(depths) / len(depths) < 0.65


@pytest.mark.parametrize("surface", ["mini", "ruler"])
def test_variables_can_be_followed_by_reading_the_statements(surface):
    sample = find_task(f"{surface}/vt").sample(length=900, seed=7, count=words)
    form = r"Copy (\w+) to (\w+)\." if surface == "mini" else r"VAR (\w+) = (?:VAR )?(\w+)\."
    pairs = re.findall(form, sample.context)
    pairs = pairs if surface == "mini" else [(source, target) for target, source in pairs]
    assert len(pairs) == 10  # two chains of five
    (value,) = re.findall(r"\d{4,}", sample.question)
    held, order = {value}, []
    for source, target in pairs:  # a name is assigned only after its source: one pass suffices
        if source in held:
            held.add(target)
            order.append(target)
    assert tuple(order) == sample.answers


def test_messages_ask_what_the_prompt_asks():
    sample = Sample("Facts.\n", "What?\n", "It is", ("1",), 4)
    assert sample.messages == [{"role": "user", "content": "Facts.\nWhat?"}]


def test_too_short_a_length_says_so():
    with pytest.raises(ValueError, match="greater length"):
        find_task("mini/niah_multikey_1").sample(length=40, seed=0, count=words)


@pytest.mark.parametrize(
    ("counts", "text"),
    [({"queries": 2}, "queries must be"), ({"keys": 2, "values": 2}, "take exactly one key")],
)
def test_counts_that_make_no_task_are_refused(counts, text):
    with pytest.raises(ValueError, match=text):
        NeedleTask("t", MINI, **counts)


def test_a_variable_task_needs_a_chain():
    with pytest.raises(ValueError, match="chains >= 1"):
        VariableTask("t", MINI, chains=0)


@pytest.mark.parametrize("bound", [0, 1, 7, 64])
def test_largest_fit_finds_the_bound(bound):
    assert largest_fit(lambda n: n <= bound, upper=64) == bound


def test_words_are_distinct_and_filler_is_what_it_says():
    assert len(set(NOUNS)) == len(NOUNS) > 380
    assert not set(NOUNS) & set(ADJECTIVES)
    assert noise(7)[5:] == noise(2)
    assert len(set(sentences(50, random.Random(0)))) == 50


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(Path(__file__).parents[2] / "models" / "kvjax_small" / "tokenizer.json"))


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("mini/")])
def test_mini_tasks_fit_the_tokens_of_the_model_that_ships(name, length, tokenizer):
    def count(text):
        return len(tokenizer.encode(text).ids)

    for seed in range(3):
        sample = find_task(name).sample(length=length, seed=seed, count=count)
        said = [turn.question + turn.answer_prefix + turn.reply for turn in sample.turns]
        assert length - 48 < count(sample.context + "\n".join(said)) <= length
        assert all(count(turn.reply) <= sample.max_new_tokens for turn in sample.turns)
