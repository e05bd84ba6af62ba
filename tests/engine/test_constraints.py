"""Constraints: what is generated follows the grammar, alone and among others, to its end or to `max_tokens`."""

import json
import re

import pytest

from kvjax.engine import SamplingParams
from kvjax.engine.request import Constraint, ConstraintError, Finish
from tests.engine import tiny

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = tiny.prompt(40)


def params(constraint=None, **options) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 200, "seed": 3, "constraint": constraint} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_json_of_a_schema(engine, temperature):
    constraint = Constraint("json", json.dumps(PERSON))
    done = engine.generate([PROMPT] * 4, [params(constraint, temperature=temperature, seed=s) for s in range(4)])
    for each in done:
        assert each.finish is Finish.STOP
        value = json.loads(each.text)
        assert set(value) == {"name", "age"}
        assert 0 <= value["age"] <= 150
        assert len(value["name"]) <= 8


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", r"[a-c]{3}-\d{2}"), r"[a-c]{3}-\d{2}"),
        (Constraint("choice", '["yes", "no", "perhaps"]'), r"yes|no|perhaps"),
        (Constraint("grammar", 'start: "(" ("a" | "b")+ ")"'), r"\([ab]+\)"),
        (Constraint("grammar", 'root ::= "x" [0-9]+ "."'), r"x[0-9]+\."),
        (Constraint("regex", "é🙂+z"), "é🙂+z"),  # characters of several tokens
    ],
)
def test_regular_and_context_free_grammars(engine, constraint, pattern):
    done = engine.generate([PROMPT] * 3, [params(constraint, seed=s, temperature=1.5) for s in range(3)])
    for each in done:
        if each.finish is Finish.STOP:
            assert re.fullmatch(pattern, each.text), each.text
    assert any(each.finish is Finish.STOP for each in done)


def test_an_answer_cut_by_its_length_says_so(engine):
    [done] = engine.generate([PROMPT], params(Constraint("json", json.dumps(PERSON)), max_tokens=5))
    assert done.finish is Finish.LENGTH
    assert len(done.tokens) == 5
    assert done.text.lstrip().startswith("{")


def test_others_beside_it_are_answered_as_alone(engine):
    free = params(max_tokens=30)
    [alone] = engine.generate([PROMPT], free)
    constrained = params(Constraint("regex", "[0-9]{25}"))
    first, second, third = engine.generate([PROMPT] * 3, [free, constrained, free])
    assert first.tokens == alone.tokens == third.tokens
    assert re.fullmatch("[0-9]{25}", second.text)


def test_the_same_seed_gives_the_same_answer(engine):
    constrained = params(Constraint("regex", "[a-z]{20}"))
    one, other = engine.generate([PROMPT] * 2, constrained)
    assert one.tokens == other.tokens
    [again] = engine.generate([PROMPT], constrained)
    assert again.tokens == one.tokens


def test_log_probabilities_are_those_of_the_model(engine):
    [done] = engine.generate([PROMPT], params(Constraint("regex", "q"), logprobs=3))
    [scored] = engine.generate([[*PROMPT, *done.tokens[:1]]], params(max_tokens=0, prompt_logprobs=0))
    assert done.logprobs[0].logprob == pytest.approx(scored.prompt_logprobs[-1].logprob, abs=1e-4)


def test_penalties_and_bias_cannot_break_a_grammar(engine):
    """All that the grammar allows is forbidden by other means: it comes all the same, and nothing else."""
    token = engine.tokenizer.encode("a", add_special_tokens=False)[0]
    constrained = params(
        Constraint("regex", "a{6}"), temperature=0.0, logit_bias={token: -100.0}, frequency_penalty=2.0,
        repetition_penalty=50.0,
    )  # fmt: skip
    [done] = engine.generate([PROMPT], constrained)
    assert done.text == "aaaaaa"


def test_only_allowed_tokens(engine):
    allowed = tuple(engine.tokenizer.encode("xyz", add_special_tokens=False))
    [done] = engine.generate([PROMPT], params(allowed_token_ids=allowed, max_tokens=20, temperature=2.0))
    assert set(done.tokens) <= set(allowed)
    assert len(set(done.tokens)) > 1


def test_bad_words_do_not_come(engine):
    letters = Constraint("regex", "[ab]{40}")
    [free] = engine.generate([PROMPT], params(letters, temperature=2.0))
    [done] = engine.generate([PROMPT], params(letters, temperature=2.0, bad_words=("ab",)))
    assert "ab" in free.text
    assert re.fullmatch("b*a*", done.text)


def test_constraints_together(engine):
    allowed = tuple(engine.tokenizer.encode("0123", add_special_tokens=False))
    [done] = engine.generate(
        [PROMPT],
        params(Constraint("regex", "[0-9]{12}"), allowed_token_ids=allowed, bad_words=("00",), temperature=2.0),
    )
    assert re.fullmatch("[0-3]{12}", done.text)
    assert "00" not in done.text


def test_what_leaves_no_token_is_refused(engine):
    letters = tuple(engine.tokenizer.encode("abc", add_special_tokens=False))
    with pytest.raises(ConstraintError, match="no token is left"):
        engine.generate([PROMPT], params(Constraint("regex", "[0-9]"), allowed_token_ids=letters))


def test_one_that_runs_into_a_dead_end_fails_alone(engine):
    """The second character is of another constraint's making: the request ends with a sentence, the engine goes on."""
    allowed = tuple(engine.tokenizer.encode("a", add_special_tokens=False))
    with pytest.raises(Exception, match="no token is left"):
        engine.generate([PROMPT], params(Constraint("regex", "ab"), allowed_token_ids=allowed))
    assert engine.generate([PROMPT], params(max_tokens=2))[0].finish is Finish.LENGTH


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("json", "{"), "json: "),
        (Constraint("json", '{"type": "sum"}'), "json: "),
        (Constraint("regex", "(a"), "regex: "),
        (Constraint("regex", r"(?=a)b"), "regex: "),
        (Constraint("grammar", "start: unknown_rule"), "grammar: "),
    ],
)
def test_what_is_no_grammar_is_refused_with_its_reason(engine, constraint, reason):
    with pytest.raises(ConstraintError, match=reason):
        engine.check_constraint(constraint)


def test_nothing_is_compiled_for_a_constraint(engine):
    before = engine.stats().compiles_after_warmup
    engine.generate([PROMPT], params(Constraint("regex", "[a-f]{9}")))
    assert engine.stats().compiles_after_warmup == before
