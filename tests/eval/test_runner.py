"""Asking and scoring, with a model whose answers are known."""

import signal
from dataclasses import dataclass

import pytest

from kvjax.eval.runner import PATIENCE, SEEDS, Case, Conduct, evaluate
from kvjax.eval.targets import TargetFailedError, TargetGoneError
from kvjax.eval.tasks import Question, Sample, find_task
from tests.eval.fake_target import TEMPLATE, FakeTarget, reads

NEEDLE = find_task("mini/niah_single_1")


def cases(count: int, task=NEEDLE, length: int = 200) -> list[Case]:
    return [Case(task, length, index) for index in range(count)]


@dataclass(frozen=True)
class Several:
    """A task of three turns about one context."""

    name: str = "several"
    metric: str = "string_match_all"

    def sample(self, *, length, seed, count):
        later = tuple(Question(f"Then {n}?\n", "It is", (f"{n}{n}",), f" {n}{n}.") for n in (2, 3))
        return Sample("Facts.\n", "What?\n", "It was", ("11",), 4, later, " 11.")


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_a_perfect_reader_has_a_perfect_score(form):
    records = evaluate(FakeTarget(reads), cases(6), Conduct(form))
    assert sorted(record.key for record in records) == [("mini/niah_single_1", 200, index) for index in range(6)]
    assert [record.score for record in records] == [1.0] * 6
    assert {record.turns[0].finish for record in records} == {"stop"}


def test_a_wrong_answer_scores_0_and_is_no_failure():
    [record] = evaluate(FakeTarget(lambda prompt: "no idea"), cases(1), Conduct())
    assert (record.score, record.error, record.turns[0].text) == (0.0, None, "no idea")


def test_the_same_seed_asks_the_same_and_another_one_nothing_of_it():
    def prompts_of(seed: int) -> set[str]:
        target = FakeTarget()
        evaluate(target, cases(5), Conduct(seed=seed))
        assert sorted(request_seed for _, _, request_seed in target.requests) == [seed * SEEDS + i for i in range(5)]
        return {prompt for prompt, _, _ in target.requests}

    assert prompts_of(1) == prompts_of(1)
    assert len(prompts_of(1) | prompts_of(2)) == 10


def test_turns_of_a_completion_go_on_from_what_was_said():
    says = iter([" 11.", " nothing\n", " 33"])
    target = FakeTarget(lambda prompt: next(says))
    [record] = evaluate(target, cases(1, Several()), Conduct())
    assert [prompt for prompt, _, _ in target.requests] == [
        "Facts.\nWhat?\nIt was",
        "Facts.\nWhat?\nIt was 11.\nThen 2?\nIt is",
        "Facts.\nWhat?\nIt was 11.\nThen 2?\nIt is nothing\nThen 3?\nIt is",
    ]
    assert [turn.score for turn in record.turns] == [1.0, 0.0, 1.0]
    assert record.score == pytest.approx(2 / 3)


def test_turns_of_a_chat_are_messages():
    says = iter(["It was 11.", "nothing", ""])
    target = FakeTarget(lambda prompt: next(says))
    evaluate(target, cases(1, Several()), Conduct("chat"))
    first = [{"role": "user", "content": "Facts.\nWhat?"}]
    second = [*first, {"role": "assistant", "content": "It was 11."}, {"role": "user", "content": "Then 2?"}]
    third = [*second, {"role": "assistant", "content": "nothing"}, {"role": "user", "content": "Then 3?"}]
    assert [prompt for prompt, _, _ in target.requests] == [first, second, third]


def context_prefix(conduct: Conduct) -> list:
    """The context prefix of each of three turns."""
    says = iter(["11.", "22.", "33."])
    target = FakeTarget(lambda prompt: next(says))
    evaluate(target, cases(1, Several()), conduct)
    return target.context_prefix


def test_what_a_compressed_cache_knows_is_said_only_where_it_is_not_the_whole_prompt():
    assert context_prefix(Conduct()) == [None] * 3
    before = ["Facts.\n", "Facts.\nWhat?\nIt was11.\n", "Facts.\nWhat?\nIt was11.\nThen 2?\nIt is22.\n"]
    assert context_prefix(Conduct(query_agnostic=True)) == before
    assert context_prefix(Conduct(evict=True)) == [None, *["Facts.\nWhat?\nIt was"] * 2]
    assert context_prefix(Conduct(query_agnostic=True, evict=True)) == before[:1] * 3


def test_what_came_before_the_newest_turn_is_said_from_the_second_on():
    says = iter(["11.", "22.", "33."])
    target = FakeTarget(lambda prompt: next(says))
    evaluate(target, cases(1, Several()), Conduct())
    assert target.history == [None, "Facts.\nWhat?\nIt was11.\n", "Facts.\nWhat?\nIt was11.\nThen 2?\nIt is22.\n"]


def test_a_question_is_hidden_in_a_chat_too():
    says = iter(["11.", "22.", "33."])
    target = FakeTarget(lambda prompt: next(says))
    evaluate(target, cases(1, Several()), Conduct("chat", query_agnostic=True))
    first, second, third = target.context_prefix
    assert first == [{"role": "user", "content": "Facts."}]
    assert second == [{"role": "user", "content": "Facts.\nWhat?"}, {"role": "assistant", "content": "11."}]
    assert [message["content"] for message in third] == ["Facts.\nWhat?", "11.", "Then 2?", "22."]


def test_a_failed_request_has_its_error_and_no_score():
    def say(prompt):
        if "11" in prompt:
            raise TargetFailedError("too long")
        return " 11."

    [record] = evaluate(FakeTarget(say), cases(1, Several()), Conduct())
    assert (record.score, record.error) == (None, "too long")
    assert [turn.score for turn in record.turns] == [1.0]  # what was answered before stays


def test_one_failure_does_not_touch_the_others():
    fails = iter([True, False, True, False, True, False])

    def say(prompt):
        if next(fails):
            raise TargetGoneError("nobody there")
        return reads(prompt)

    records = evaluate(FakeTarget(say), cases(6), Conduct(concurrency=1))
    assert [record.score for record in records] == [None, 1.0] * 3


def test_when_nobody_answers_any_more_the_rest_is_not_tried():
    def gone(prompt):
        raise TargetGoneError("nobody there")

    records = evaluate(FakeTarget(gone), cases(50), Conduct(concurrency=1))
    assert [record.error for record in records] == ["nobody there"] * PATIENCE
    assert len(evaluate(FakeTarget(gone), cases(50), Conduct(concurrency=4))) <= PATIENCE + 3


def test_requests_in_flight_are_bounded():
    target = FakeTarget(reads)
    evaluate(target, cases(20), Conduct(concurrency=3))
    assert target.most == 3


def test_an_answer_gets_the_room_that_the_context_has():
    size = FakeTarget().count(NEEDLE.sample(length=200, seed=0, count=FakeTarget().count).prompt)
    wide, tight, full = (FakeTarget(reads, max_model_len=n) for n in (None, size + 3, size))
    for target in (wide, tight):
        evaluate(target, cases(1), Conduct())
    assert (wide.requests[0][1], tight.requests[0][1]) == (48, 3)
    [record] = evaluate(full, cases(1), Conduct())
    assert record.error == f"the prompt has {size} tokens, and the model's context is {size}"
    assert not full.requests


def test_a_chat_keeps_its_length_with_what_the_template_writes():
    target = FakeTarget(reads)
    evaluate(target, cases(8, length=120), Conduct("chat"))
    sizes = [target.count(prompt) for prompt, _, _ in target.requests]
    assert all(120 - TEMPLATE - 20 < size <= 120 - 5 for size in sizes), sizes  # five: the least answer


def test_a_length_that_does_not_hold_the_task_fails_by_name():
    [record] = evaluate(FakeTarget(reads), cases(1, length=5), Conduct())
    assert record.score is None
    assert "mini/niah_single_1 at 5 tokens" in record.error


def test_ctrl_c_ends_it_with_what_was_seen(interruptible):
    seen = []

    def saw(record):
        seen.append(record)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)

    target = FakeTarget(reads)
    with pytest.raises(KeyboardInterrupt):
        evaluate(target, cases(100), Conduct(concurrency=2), saw)
    assert 5 <= len(seen) <= 7
    assert target._flying == 0


def test_what_the_caller_raises_arrives_as_it_is():
    def full(record):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        evaluate(FakeTarget(reads), cases(10), Conduct(), full)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"seed": -1}, {"temperature": -0.1}])
def test_conduct_is_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Conduct(**wrong)
