"""The arithmetic of drawing a token, against NumPy with sorts, and against the distribution it must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kvjax.engine.device.sampling import SamplerState, _adjust, _filter, report, sample
from kvjax.engine.request import MAX_LOGPROBS, SamplingParams
from tests.engine.tiny import log_softmax

VOCAB = 40
ROWS = 64
EDGE = 2e-6  # a cumulative probability so close to top_p may fall to either side


def states(params, prompts=None, stop_token_ids=(), seeds=None) -> SamplerState:
    """One row for each of `params`."""
    prompts = prompts or [[0]] * len(params)
    seeds = range(len(params)) if seeds is None else seeds
    rows = [
        SamplerState.of(each, np.array(prompt, np.int32), stop_token_ids, seed, VOCAB)
        for each, prompt, seed in zip(params, prompts, seeds, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)


@functools.partial(jax.jit, static_argnums=0)
def call(function, *arguments):
    return function(*arguments)


def retained(logits: np.ndarray, params: SamplingParams, top_p: float) -> np.ndarray:
    """Which tokens one row may draw, by sorting."""
    logits = logits.astype(np.float64)
    keep = np.isfinite(logits)
    if params.min_p > 0:
        keep &= logits >= logits.max() + np.log(params.min_p)
    if 0 < params.top_k < keep.sum():
        keep &= logits >= np.sort(logits[keep])[-params.top_k]
    if params.top_p < 1:
        ordered = np.sort(logits[keep])[::-1]
        cumulative = np.cumsum(np.exp(ordered - ordered[0]) / np.exp(ordered - ordered[0]).sum())
        keep &= logits >= ordered[min(np.searchsorted(cumulative, top_p), len(ordered) - 1)]
    return keep


VALUES = {
    "top_k": [0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1],
    "top_p": [1e-45, 1e-10, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 2**-24, 1.0],
    "min_p": [0.0, 1e-30, 1e-6, 0.05, 0.3, 0.99, 1.0],
}


def random_params(random: np.random.Generator, names=tuple(VALUES)) -> SamplingParams:
    return SamplingParams(**{name: random.choice(VALUES[name]).item() for name in names})


LOGITS = {
    "normal": lambda random: random.normal(0, 3, (ROWS, VOCAB)),
    "ties": lambda random: random.integers(-3, 3, (ROWS, VOCAB)),
    "all equal": lambda random: np.full((ROWS, VOCAB), random.normal()),
    "peaked": lambda random: random.normal(0, 100, (ROWS, VOCAB)),
    "forbidden": lambda random: np.where(random.random((ROWS, VOCAB)) < 0.9, -np.inf, random.random((ROWS, VOCAB))),
    "tiny": lambda random: random.normal(0, 1e-30, (ROWS, VOCAB)),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("names", [("top_k",), ("top_p",), ("min_p",), tuple(VALUES)], ids="+".join)
def test_filters_agree_with_sorting(kind, names):
    random = np.random.default_rng(0)
    for _ in range(5):
        logits = LOGITS[kind](random).astype(np.float32)
        logits[:, 0] = np.maximum(logits[:, 0], -5)  # at least one may be drawn
        params = [random_params(random, names) for _ in range(ROWS)]
        filtered = np.asarray(call(_filter, logits, states(params)))
        for row, each in enumerate(params):
            got = np.isfinite(filtered[row])
            low, high = (retained(logits[row], each, each.top_p + shift) for shift in (-EDGE, EDGE))
            assert (low <= got).all(), (each, np.sort(logits[row]))
            assert (got <= high).all(), (each, np.sort(logits[row]))
            assert (got == (logits[row] >= logits[row][got].min())).all()
            np.testing.assert_array_equal(filtered[row][got], logits[row][got])


def test_ties_are_kept_or_dropped_together():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, :3], logits[:, 3:6] = 5, 4
    filtered = call(_filter, logits, states([SamplingParams(top_k=4), SamplingParams(top_p=0.6)]))
    assert np.isfinite(filtered).sum(axis=-1).tolist() == [6, 3]


def expected(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    scaled = logits.astype(np.float64) / params.temperature
    scaled[~retained(scaled, params, params.top_p)] = -np.inf
    return np.exp(log_softmax(scaled))


DRAWN = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=3.0),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.02),
    SamplingParams(temperature=1.7, top_k=12, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("source", ["seeds", "steps"])
@pytest.mark.parametrize("params", DRAWN, ids=range(len(DRAWN)))
def test_draws_have_their_distribution(params, source):
    """Many requests of different seeds, and many steps of one request."""
    count = 20_000
    logits = np.random.default_rng(3).normal(0, 1.2, VOCAB).astype(np.float32)
    logits[5] = logits[7]
    state = states([params])
    keys = np.ones((count, 2)) if source == "steps" else np.arange(2 * count).reshape(count, 2)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), state)
    state = SamplerState(**{**vars(state), "key": jnp.asarray(keys, jnp.uint32)})
    steps = np.zeros(count, np.int32) if source == "seeds" else np.arange(count, dtype=np.int32)
    drawn, _ = call(sample, np.broadcast_to(logits, (count, VOCAB)), state, steps, np.ones(count, bool))
    counts = np.bincount(drawn.token, minlength=VOCAB)
    probability = expected(logits, params)
    assert not counts[probability == 0].any()
    common = probability * count > 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*probability[common] * count, probability[~common].sum() * count]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_draw_depends_on_its_seed_and_step_only():
    """Not on the row, the neighbours, or how many there are."""
    logits = np.random.default_rng(4).normal(0, 1, VOCAB).astype(np.float32)
    everyone = [random_params(np.random.default_rng(i)) if i % 3 else SamplingParams() for i in range(ROWS)]

    def draw(params, seeds, steps):
        count = len(params)
        rows, steps = np.broadcast_to(logits, (count, VOCAB)), np.array(steps, np.int32)
        return np.asarray(call(sample, rows, states(params, seeds=seeds), steps, np.ones(count, bool))[0].token)

    seeds, steps = [2**63 + i for i in range(ROWS)], [i % 7 for i in range(ROWS)]
    together = draw(everyone, seeds, steps)
    order = np.random.default_rng(5).permutation(ROWS)
    mixed = draw([everyone[i] for i in order], [seeds[i] for i in order], [steps[i] for i in order])
    assert (mixed == together[order]).all()
    for row in range(ROWS):
        assert draw([everyone[row]], [seeds[row]], [steps[row]])[0] == together[row]


def test_seeds_differ_in_every_bit():
    seeds = [0, *(1 << bit for bit in range(64)), -1]
    keys = np.asarray(states([SamplingParams()] * len(seeds), seeds=seeds).key)
    assert len(np.unique(keys, axis=0)) == len(seeds)
    assert states([SamplingParams()], seeds=[-(2**63)]).key.tolist() == [[2**31, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 2e-38, 1e-37, 1e-20, 1e-6])
def test_the_smallest_temperatures_are_greedy(temperature):
    """Dividing by them must not make several tokens equally infinite."""
    logits = np.random.default_rng(6).normal(0, 30, (ROWS, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=temperature, top_p=p, min_p=m) for p in (0.5, 1.0) for m in (0.0, 0.1)]
    drawn, _ = call(sample, logits, states(params * (ROWS // 4)), np.zeros(ROWS, np.int32), np.ones(ROWS, bool))
    assert (np.asarray(drawn.token) == logits.argmax(axis=-1)).all()


def test_greedy_ignores_filters_and_neighbours():
    logits = np.random.default_rng(7).normal(0, 1, (ROWS, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=0.0, top_p=0.3, top_k=3) if i % 2 else SamplingParams() for i in range(ROWS)]
    drawn, _ = call(sample, logits, states(params), np.zeros(ROWS, np.int32), np.ones(ROWS, bool))
    assert (np.asarray(drawn.token) == logits.argmax(axis=-1))[1::2].all()
    assert not (np.asarray(drawn.token) == logits.argmax(axis=-1))[::2].all()


def adjusted(logits, params, prompt, generated, stop_token_ids) -> np.ndarray:
    """Bias, minimum length and penalties as OpenAI and vLLM write them down, token by token."""
    out = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        out[token] += bias
    if len(generated) < params.min_tokens:
        out[list(stop_token_ids)] = -np.inf
    for token in range(VOCAB):
        count, penalty = generated.count(token), params.repetition_penalty
        if count or token in prompt:
            out[token] *= 1 / penalty if out[token] > 0 else penalty
        out[token] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    return out


def test_penalties_are_those_of_openai_and_vllm():
    random = np.random.default_rng(8)
    logits = random.normal(0, 2, (ROWS, VOCAB)).astype(np.float32)
    stop_token_ids = (3, 4, 3)
    params = [
        SamplingParams(
            presence_penalty=random.uniform(-2, 2),
            frequency_penalty=random.uniform(-2, 2),
            repetition_penalty=random.uniform(0.2, 3),
            logit_bias={int(t): random.uniform(-100, 100) for t in random.choice(VOCAB, 6, replace=False)},
            min_tokens=int(random.integers(0, 8)),
        )
        for _ in range(ROWS)
    ]
    prompts = [random.integers(0, VOCAB, random.integers(1, 20)).tolist() for _ in range(ROWS)]
    generated = [random.integers(0, VOCAB, random.integers(0, 12)).tolist() for _ in range(ROWS)]
    state = states(params, prompts, stop_token_ids)
    counts = np.stack([np.bincount(tokens, minlength=VOCAB) for tokens in generated]).astype(np.int32)
    state = SamplerState(**{**vars(state), "counts": jnp.asarray(counts)})
    got = call(_adjust, logits, state, np.array([len(tokens) for tokens in generated], np.int32))
    want = [adjusted(*row, stop_token_ids) for row in zip(logits, params, prompts, generated, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-5)


def test_tokens_are_counted_in_active_rows_only():
    params = [SamplingParams(temperature=0.0, frequency_penalty=2.0)] * 2
    state, tokens = states(params), []
    logits = np.tile(np.float32([3, 2, 1.5] + [-9] * (VOCAB - 3)), (2, 1))
    for step in range(4):
        drawn, state = call(sample, logits, state, np.full(2, step, np.int32), np.array([True, False]))
        tokens.append(np.asarray(drawn.token).tolist())
    assert [pair[0] for pair in tokens] == [0, 1, 2, 0]
    assert [pair[1] for pair in tokens] == [0] * 4
    assert np.asarray(state.counts).sum(axis=-1).tolist() == [4, 0]


def test_reports_are_the_models_own_log_probabilities():
    random = np.random.default_rng(9)
    logits = random.normal(0, 4, (ROWS, VOCAB)).astype(np.float32)
    tokens = random.integers(0, VOCAB, ROWS).astype(np.int32)
    want = log_softmax(logits)
    for top in (True, False):
        got = call(report, logits, tokens, np.bool_(top))
        np.testing.assert_allclose(got.logprob, want[np.arange(ROWS), tokens], atol=2e-5)
        if top:
            assert (np.asarray(got.top_ids) == np.argsort(-logits, axis=-1)[:, :MAX_LOGPROBS]).all()
            np.testing.assert_allclose(got.top_logprobs, -np.sort(-want, axis=-1)[:, :MAX_LOGPROBS], atol=2e-5)
        else:
            assert not np.asarray(got.top_ids).any()


def test_a_vocabulary_smaller_than_the_alternatives():
    logits = np.random.default_rng(1).normal(0, 1, (2, 5)).astype(np.float32)
    assert call(report, logits, np.zeros(2, np.int32), np.bool_(True)).top_ids.shape == (2, 5)
