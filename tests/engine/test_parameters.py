"""What the parameters of a request do to its answer."""

import dataclasses

import numpy as np

from kvjax.engine import Finish, SamplingParams
from tests.engine import tiny
from tests.engine.client import GREEDY, generate


def test_temperature_zero_is_greedy_whatever_else_is_set(engine):
    plain, filtered = generate(
        engine,
        [
            (tiny.prompt(33), GREEDY),
            (tiny.prompt(33), dataclasses.replace(GREEDY, top_p=0.1, top_k=2, min_p=0.9, seed=7)),
        ],
    )
    assert plain == filtered


def test_penalties_bias_and_minimum_length_step_by_step(engine):
    """The whole chain on the dense model's logits, written once more in NumPy."""
    params = dataclasses.replace(
        GREEDY,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias={5: 2.0, 6: 2.5, tiny.EOS: 100.0},
        min_tokens=12,
        ignore_eos=False,
        max_tokens=30,
        logprobs=0,
    )
    prompt = tiny.prompt(120)
    [completion] = generate(engine, [(prompt, params)])
    dense = tiny.logits([*prompt, *completion.tokens])
    for step, token in enumerate(completion.tokens):
        logits, before = dense[len(prompt) - 1 + step].astype(np.float64), completion.tokens[:step]
        for biased, bias in params.logit_bias.items():
            logits[biased] += bias
        if step < params.min_tokens:
            logits[tiny.EOS] = -np.inf
        seen = [*{*prompt, *before}]
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for other in {*before}:
            logits[other] -= 0.7 + 0.4 * before.count(other)
        assert token == logits.argmax()
    assert len(completion.tokens) == 13
    assert completion.tokens[-1] == tiny.EOS
    assert completion.finish is Finish.STOP
    assert completion.stop_reason is None


def test_bias_of_100_forces_and_of_minus_100_forbids(engine):
    prompt = tiny.prompt(60)
    [plain] = generate(engine, [(prompt, GREEDY)])
    forced, forbidden = generate(
        engine,
        [
            (prompt, SamplingParams(logit_bias={77: 100.0}, max_tokens=9, seed=1)),
            (prompt, dataclasses.replace(GREEDY, logit_bias=dict.fromkeys(plain.tokens, -100.0))),
        ],
    )
    assert forced.tokens == (77,) * 9
    assert not {*plain.tokens} & {*forbidden.tokens}


def test_ends_of_a_text(engine):
    prompt = tiny.prompt(60)
    toward_eos = dataclasses.replace(GREEDY, logit_bias={tiny.EOS: 100.0}, max_tokens=9)
    [plain] = generate(engine, [(prompt, GREEDY)])
    third = next(i for i in range(2, 20) if plain.tokens[i] not in plain.tokens[:i])
    stop = (plain.tokens[third],)
    cases = [
        (dataclasses.replace(toward_eos, ignore_eos=False), ((tiny.EOS,), Finish.STOP, None)),
        (toward_eos, ((tiny.EOS,) * 9, Finish.LENGTH, None)),
        (dataclasses.replace(toward_eos, ignore_eos=False, min_tokens=9), None),
        (dataclasses.replace(toward_eos, stop_token_ids=(tiny.EOS,)), ((tiny.EOS,), Finish.STOP, tiny.EOS)),
        (
            dataclasses.replace(GREEDY, stop_token_ids=stop),
            (plain.tokens[: third + 1], Finish.STOP, plain.tokens[third]),
        ),
        (
            dataclasses.replace(GREEDY, stop_token_ids=stop, max_tokens=third),
            (plain.tokens[:third], Finish.LENGTH, None),
        ),
        (
            dataclasses.replace(GREEDY, stop_token_ids=stop, max_tokens=third + 1),
            (plain.tokens[: third + 1], Finish.STOP, plain.tokens[third]),
        ),
        (dataclasses.replace(GREEDY, max_tokens=1), (plain.tokens[:1], Finish.LENGTH, None)),
        (dataclasses.replace(GREEDY, max_tokens=0), ((), Finish.LENGTH, None)),
    ]
    for (_params, want), got in zip(cases, generate(engine, [(prompt, params) for params, _ in cases]), strict=True):
        if want is None:
            assert len(got.tokens) == 9
            assert tiny.EOS not in got.tokens[:8]
        else:
            assert (got.tokens, got.finish, got.stop_reason) == want
        written = got.tokens[:-1] if got.finish is Finish.STOP else got.tokens
        assert got.text.rstrip("�") == engine.tokenizer.decode(written).rstrip("�")


def test_stop_strings_across_tokens(engine):
    """Every chunk of the greedy answer's text is a stop string once; the text ends before its first place."""
    letters = dict.fromkeys(engine.tokenizer.encode("abcdefgh .!"), 50.0)
    params = SamplingParams(seed=11, max_tokens=40, logit_bias=letters, logprobs=0, temperature=2.0)
    [whole] = generate(engine, [(tiny.prompt(10), params)])
    assert len(whole.text) == len(whole.tokens) == 40
    stops = [whole.text[i : i + n] for i in (0, 1, 7, 20, 36) for n in (1, 2, 3, 4)] + ["zzz", whole.text + "a"]
    stops = [(stop,) for stop in stops] + [(whole.text[9:12], whole.text[10:12]), (whole.text[9:11], whole.text[9:13])]
    got = generate(engine, [(tiny.prompt(10), dataclasses.replace(params, stop=stop)) for stop in stops])
    for stop, completion in zip(stops, got, strict=True):
        end, met = min(((whole.text.find(s) + len(s), s) for s in stop if s in whole.text), default=(None, None))
        if met is None:
            assert completion.text == whole.text
            assert completion.finish is Finish.LENGTH
            continue
        assert completion.finish is Finish.STOP
        assert whole.text[: end - len(completion.stop_reason)] == completion.text
        assert completion.stop_reason in stop
        assert completion.tokens == whole.tokens[:end], "the tokens go to the end of the stop string and no further"
        assert completion.logprobs == whole.logprobs[:end]


def test_a_stop_string_may_end_inside_a_token(engine):
    """Then its text is cut there, and the token still counts."""
    [token] = engine.tokenizer.encode("th")
    params = SamplingParams(max_tokens=9, logit_bias={token: 100.0})
    cases = {("ht",): ("t", 2), ("h",): ("t", 1), ("th",): ("", 1), ("hth",): ("t", 2), ("x", "tt"): ("th" * 9, 9)}
    answers = generate(engine, [(tiny.prompt(3), dataclasses.replace(params, stop=stop)) for stop in cases])
    assert [(answer.text, len(answer.tokens)) for answer in answers] == list(cases.values())


def test_stop_strings_wait_for_the_minimum_length(engine):
    letters = dict.fromkeys(engine.tokenizer.encode("ab"), 50.0)
    params = SamplingParams(seed=1, max_tokens=30, logit_bias=letters, stop=("a", "b"), temperature=2.0)
    for minimum in (0, 1, 2, 10):
        [completion] = generate(engine, [(tiny.prompt(5), dataclasses.replace(params, min_tokens=minimum))])
        assert len(completion.tokens) == max(minimum, 1)
        assert completion.finish is Finish.STOP
