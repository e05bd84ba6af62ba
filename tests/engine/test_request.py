import dataclasses
import math
import types

import numpy as np
import pytest

from kvjax.engine import Completion, ContextLengthExceededError, Delta, Finish, SamplingParams, TokenLogprob, request

BOUNDS = [
    # field, smallest, largest, one below, one above
    ("temperature", 0.0, 100.0, -0.001, 100.001),
    ("top_p", 1e-9, 1.0, 0.0, 1.001),
    ("min_p", 0.0, 1.0, -0.001, 1.001),
    ("top_k", 0, 2**31 - 1, -1, 2**31),
    ("presence_penalty", -2.0, 2.0, -2.001, 2.001),
    ("frequency_penalty", -2.0, 2.0, -2.001, 2.001),
    ("repetition_penalty", 1e-9, 100.0, 0.0, 100.001),
    ("max_tokens", 0, 2**31 - 1, -1, 2**31),
    ("seed", -(2**63), 2**64 - 1, -(2**63) - 1, 2**64),
    ("logprobs", 0, 20, -1, 21),
    ("prompt_logprobs", 0, 20, -1, 21),
]


@pytest.mark.parametrize(("field", "low", "high", "below", "above"), BOUNDS)
def test_bounds_are_held_and_named(field, low, high, below, above):
    for value in (low, high):
        assert getattr(SamplingParams(**{field: value}), field) == value
    for value in (below, above):
        with pytest.raises(ValueError, match=rf"{field}={value} is outside [\[(].*{high}\]"):
            SamplingParams(**{field: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", [field for field, low, *_ in BOUNDS if isinstance(low, float)])
def test_what_is_no_finite_number_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is not a finite number"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("bias", [math.nan, 100.5, -101.0, math.inf])
def test_logit_bias_is_bounded(bias):
    with pytest.raises(ValueError, match=r"logit_bias\[7\]="):
        SamplingParams(logit_bias={3: 100.0, 7: bias})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_tokens": -1}, r"min_tokens=-1 is outside \[0, "),
        ({"min_tokens": 17}, "min_tokens=17 is larger than max_tokens=16"),
        ({"stop": ("a",) * 17}, "stop holds 17 strings; at most 16"),
        ({"stop": ("a", "")}, "each stop string needs 1 to 64 characters; one has 0"),
        ({"stop": ("a" * 65,)}, "each stop string needs 1 to 64 characters; one has 65"),
        ({"stop_token_ids": tuple(range(9))}, "stop_token_ids holds 9; at most 8"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias holds 301 tokens; at most 300"),
    ],
)
def test_lists_are_bounded(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


def test_the_largest_lists_are_accepted():
    SamplingParams(
        stop=("a" * 64,) * 16,
        stop_token_ids=tuple(range(8)),
        logit_bias=dict.fromkeys(range(300), -100.0),
        min_tokens=16,
    )
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6
    assert SamplingParams(max_tokens=0).max_tokens == 0


def test_params_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.0


def test_a_stop_string_is_not_taken_for_its_letters():
    """Types are checked in tests only; elsewhere a string is a sequence of strings."""
    unchecked = types.SimpleNamespace(**{**vars(SamplingParams()), "stop": "END"})
    with pytest.raises(ValueError, match=r"stop='END' is one string: give a tuple of strings, \('END',\)"):
        SamplingParams.__post_init__(unchecked)


def test_what_is_no_number_and_no_float_either_is_refused():
    with pytest.raises(ValueError, match=r"top_p=nan is outside \[0.0, 1.0\]"):
        request._bounded.__wrapped__("top_p", np.float32("nan"), 0.0, 1.0)


def test_deltas_join_to_a_completion():
    first, second = TokenLogprob(5, -0.5), TokenLogprob(6, -1.5, ((7, -0.1),))
    deltas = [
        Delta(text="a", tokens=(5,), logprobs=(first,), prompt_logprobs=(None, second), cached_tokens=3),
        Delta(text="bc", tokens=(6, 7), logprobs=(second,)),
        Delta(finish=Finish.STOP, stop_reason="x"),
    ]
    assert Completion.join([1, 2], deltas) == Completion(
        prompt_tokens=(1, 2),
        tokens=(5, 6, 7),
        text="abc",
        finish=Finish.STOP,
        stop_reason="x",
        logprobs=(first, second),
        prompt_logprobs=(None, second),
        cached_tokens=3,
    )


def test_an_overflow_says_all_numbers():
    error = ContextLengthExceededError(10, 5, 12)
    assert isinstance(error, ValueError)
    for number in (10, 5, 15, 12):
        assert str(number) in str(error)
