"""Conversations and retrieved documents: the arithmetic of what is found, and both commands against real servers."""

import json

import pytest

from benchmarks.serving import multi_round_qa, rag
from benchmarks.serving.server import Answer


def answer(asked: float, first: float, last: float, cached: int) -> Answer:
    return Answer(asked, first, last, "text", prompt=1000, generated=10, cached=cached)


def test_documents_in_another_order_are_seen_but_no_same_beginning():
    first, second, head = [1, 2, 3], [4, 5, 6], [0]
    prompts = [[*head, *first, *second, 7], [*head, *second, *first, 8], [*head, *first, *second, 9]]
    assert [rag.begins_alike(prompt, prompts[:index]) for index, prompt in enumerate(prompts)] == [0, 1, 7]
    assert rag.common(prompts[0], prompts[0][:3]) == 3
    orders = [[0, 1], [1, 0], [0, 1]]
    assert rag.seen(orders) == 4
    answers = [Answer(0.0, 1.0, 2.0, "", 8, 1, cached) for cached in (0, 0, 6)]
    found = rag.summarize(answers, prompts, orders, tokens=3, head=1)
    assert (found["found"], found["same_beginning"], found["seen"]) == (6 / 24, 8 / 24, 14 / 24)


def test_a_round_is_from_its_first_question_to_its_last_answer():
    rounds = [
        [answer(0.0, 1.0, 2.0, cached=0), answer(1.0, 4.0, 6.0, cached=0)],
        [answer(2.0, 2.5, 5.0, cached=500), answer(6.0, 6.5, 8.0, cached=500)],
    ]
    found = multi_round_qa.summarize([rounds])
    assert found["ttft_by_round_s"] == [2.0, 0.5]
    assert found["ttft_s"]["mean"] == 1.25
    assert found["ttft_s"]["p50"] == 0.75
    assert found["round_s"] == 6.0
    assert found["generated_per_second"] == 40 / 8
    assert found["cached"] == 0.25


def row(command, tmp_path) -> dict:
    output = tmp_path / "row.json"
    assert command.main(["--quick", "--output", str(output)]) == 0
    [row] = json.loads(output.read_text())["rows"]
    return row


@pytest.mark.slow  # two servers start
def test_conversations_find_what_was_said_before(tmp_path):
    talk = row(multi_round_qa, tmp_path)
    assert talk["same_answers"] == talk["answers"] == 4
    assert talk["without"]["sources"] == {"computed": 1.0}
    assert 0 < talk["with"]["sources"]["host"] == talk["with"]["cached"] < 1


@pytest.mark.slow  # three servers start
def test_no_more_is_found_than_what_prompts_begin_with(tmp_path, capsys):
    documents = row(rag, tmp_path)
    for arm in ("as ranked", "sorted"):
        assert 0 < documents[arm]["found"] <= documents[arm]["same_beginning"] <= documents[arm]["seen"] < 1
    assert documents["without"]["found"] == 0
    assert "seen in any place" in capsys.readouterr().out
