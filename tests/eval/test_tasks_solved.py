"""Every answer follows from what the context says: solvers that read nothing but the text find it."""

import itertools
import json
import re
from collections import Counter

import pytest

from kvjax.eval.tasks import find_task
from kvjax.eval.tasks.chain import ChainTask, MiniChain
from kvjax.eval.tasks.counting import RULER_COMMON, FrequentWordsTask
from kvjax.eval.tasks.library import HELD_OUT
from kvjax.eval.tasks.library_uses import held_out_files, held_out_uses
from kvjax.eval.tasks.needle import NeedleTask
from kvjax.eval.tasks.surface import MINI
from kvjax.eval.tasks.turns import JsonTurnsTask, NeedleTurnsTask
from kvjax.eval.tasks.words import NOUNS
from tests.eval.test_tasks import words

SEEDS = range(6)


def samples(name, length=1200):
    task = find_task(name)
    return [task.sample(length=length, seed=seed, count=words) for seed in SEEDS]


def listed(sample):
    text = sample.context.split("often.\n")[-1].split("coded words. ")[-1]
    return Counter(re.findall(r"[a-z][a-z-]*", text))


@pytest.mark.parametrize(
    ("name", "length", "often", "seldom"),
    [
        ("mini/cwe", 400, 6, 1),
        ("mini/cwe", 1200, 30, 3),
        ("mini/cwe", 5000, 120, 12),  # the nouns are used up: four times as often
        ("ruler/cwe", 1200, 6, 1),
        ("ruler/cwe", 5000, 30, 3),
    ],
)
def test_common_words_are_those_that_appear_most_often(name, length, often, seldom):
    for sample in samples(name, length)[:3]:
        counts = listed(sample)
        assert {counts[answer] for answer in sample.answers} == {often}
        assert {count for word, count in counts.items() if word not in sample.answers} == {seldom}
        assert len(sample.answers) == len(set(sample.answers)) == 10
        assert set(sample.answers) == {word for word, _ in counts.most_common(10)}


def test_common_words_of_long_lists_are_pairs_of_words():
    task = find_task("ruler/cwe")
    sample = task.sample(length=20_000, seed=0, count=words)
    counts = listed(sample)
    assert set(counts.values()) == {30, 3}
    assert all("-" in word for word in counts)
    assert RULER_COMMON.text(["a", "b"]) == "1. a 2. b"


@pytest.mark.parametrize("name", ["mini/fwe", "ruler/fwe"])
@pytest.mark.parametrize("length", [400, 3000])
def test_frequent_words_are_ranks_2_to_4_in_their_order(name, length):
    for sample in samples(name, length):
        (_, first), (_, second), (_, third), (_, fourth) = (ranked := listed(sample).most_common(4))
        assert first > second > third > fourth
        assert tuple(word for word, _ in ranked[:3]) == sample.answers
        assert sample.context.count("...") > first


def test_counts_of_ranks_are_those_worked_out_by_hand():
    # 100 / (k^2 * 1.6449...): 60.8, 15.2, 6.8, 3.8, 2.4, 1.7, 1.2
    assert find_task("ruler/fwe").counts(100) == [60, 15, 6, 3, 2, 1, 1]
    assert isinstance(find_task("ruler/fwe"), FrequentWordsTask)


@pytest.mark.parametrize("hops", [1, 2])
def test_documents_of_people_answer_the_question(hops):
    asked = {
        "profession": "as a (.+?),",
        "town": "grew up in (.+?)\\.",
        "instrument": "played the (.+?)\\.",
        "year": "in the year (.+?) and",
    }
    for sample in samples(f"ruler/qa_{hops}", 1500):
        told = re.findall(r"Document \d+:\n(.+)\n(.+)", sample.context)
        documents = dict(told)
        assert len(documents) == len(told) > 10
        person = re.search(r"[A-Z]\w+( [A-Z]\.)? [A-Z]\w+", sample.question.split(": ")[1].split(" ", 2)[2]).group()
        if hops == 2:
            assert "closest friend" in sample.question
            person = re.search(r"friend of .+ was (.+)\.", documents[person]).group(1)
        (aspect,) = [word for word in asked if word in sample.question]
        assert re.search(asked[aspect], documents[person]).group(1) == sample.answers[0]


@pytest.mark.parametrize("hops", [1, 2])
def test_sentences_of_nouns_answer_the_question(hops):
    for sample in samples(f"mini/qa_{hops}"):
        told = re.findall(r"The (\w+) of (\w+) is (\w+)\.", sample.context)
        facts = {(aspect, who): what for aspect, who, what in told}
        assert len(facts) == len(told) > 100
        aspect, who = re.search(r"the (\w+) of (.+)\?", sample.question).groups()
        if hops == 2:
            who = facts["sister", re.fullmatch(r"the sister of (\w+)", who).group(1)]
        assert facts[aspect, who] == sample.answers[0]


def test_nouns_used_up_as_names_are_followed_by_other_sentences():
    sample = find_task("mini/qa_1").sample(length=15_000, seed=0, count=words)
    named = re.findall(r"The sister of (\w+) is", sample.context)
    assert len(named) == len(set(named)) == len(NOUNS) - 4
    assert words(sample.context) > 14_000


@pytest.mark.parametrize("name", ["text/turns_niah", "mini/turns_niah", "mini/turns_kv"])
def test_needles_are_asked_in_turns_each_key_once(name):
    for sample in samples(name):
        facts = dict(re.findall(r"for ([\w-]+) is:? (\d+)\.", sample.context))
        keys = [re.search(r"for ([\w-]+)( mentioned|\?)", turn.question).group(1) for turn in sample.turns]
        assert len(set(keys)) == len(keys) == 5
        assert [turn.answers for turn in sample.turns] == [(facts[key],) for key in keys]
    # the order of asking is not that of telling
    assert any(list(facts).index(one) > list(facts).index(two) for one, two in itertools.pairwise(keys))


def test_pairs_are_a_json_object_that_is_asked_in_turns():
    for sample in samples("text/turns_kv", 2000):
        pairs = json.loads(sample.context.split("below.")[1])
        keys = [re.fullmatch(r'Key: "(.+)"\n', turn.question).group(1) for turn in sample.turns]
        assert len(set(keys)) == 5
        assert len(pairs) > 20
        assert [turn.answers for turn in sample.turns] == [(pairs[key],) for key in keys]


@pytest.mark.parametrize("name", ["text/chain", "mini/chain"])
def test_chains_can_be_computed_from_their_statements(name):
    for sample in samples(name):
        first = re.findall(r"(\w+) has (\d+)(?: apples)?\.", sample.context)
        steps = re.findall(r"(\w+) has (\d+) (more|fewer|less)(?: apples)? than (?:the )?(\w+)\.", sample.context)
        holds = {who: int(value) for who, value in first}
        assert len(first) == 2  # two chains
        waiting = list(steps)
        while waiting:
            left = [step for step in waiting if step[3] not in holds]
            assert len(left) < len(waiting)
            for who, change, direction, other in waiting:
                if other in holds:
                    holds[who] = holds[other] + int(change) * (1 if direction == "more" else -1)
            waiting = left
        assert len(holds) == (10 if name == "text/chain" else 6)
        assert min(holds.values()) >= 0
        (last,) = [who for who in holds if re.search(rf"\b{who}\b", sample.question)]
        assert sample.answers == (str(holds[last]),)
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", sample.reply):
            assert int(left) + int(sign + right) == int(result)
        assert sample.reply.endswith(f"\n#### {holds[last]}")
        assert sample.reply.count(" has ") == len(holds) // 2


@pytest.mark.parametrize("name", ["text/next_line", "mini/next_line"])
def test_the_next_line_is_that_of_a_held_out_file_and_its_definition_is_in_the_context(name):
    files = held_out_files()
    for sample in samples(name):
        path, statement, code = re.match(r"# Path: (\S+)\n(.+)\n\n(?s:(.*))", sample.question).groups()
        assert path.split("/")[0] in HELD_OUT
        code = code.removesuffix("Next line of code:\n")
        assert f"{code}{sample.answers[0]}\n" in files[path]
        assert f"# Path: {path}\n" not in sample.context
        name_there, _, name_here = statement.split(" import ")[1].partition(" as ")
        used = re.search(rf"\b{name_here or name_there}(\.(\w+))?", sample.answers[0])
        assert used, (statement, sample.answers)
        wanted = {name_there, used.group(2)}
        assert wanted & set(re.findall(r"^(?:async )?(?:def|class) (\w+)|^@", sample.context, re.MULTILINE))


def test_there_are_hundreds_of_lines_to_complete():
    uses = held_out_uses()
    assert len(uses) > 300
    assert len({(use.path, use.line) for use in uses}) == len(uses)
    assert len({use.path for use in uses}) > 30
    assert all(use.path != use.source for use in uses)


def test_settings_that_make_no_task_are_refused():
    with pytest.raises(ValueError, match="keys must be at least 2"):
        NeedleTurnsTask("t", NeedleTask("t", MINI))
    with pytest.raises(ValueError, match="turns must be at least 2"):
        JsonTurnsTask("t", turns=1)
    with pytest.raises(ValueError, match="steps must be >= 2"):
        ChainTask("t", MiniChain(), steps=1)
