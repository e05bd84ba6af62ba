"""The hand-set transformer: exact at every length, unharmed by what it does not need, lost without what it does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.model_card.induction import Induction, write
from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.models import load


def followers(tokens):
    """At each place what followed the last earlier occurrence of the token there; -1 if there was none."""
    last, found = {}, []
    for index, token in enumerate(tokens):
        found.append(int(tokens[last[token] + 1]) if token in last else -1)
        last[token] = index
    return np.array(found)


def accuracy(best, tokens):
    wanted = followers(tokens.tolist())
    asked = wanted >= 0
    assert asked.sum() > 5
    return np.mean(np.asarray(best)[asked] == wanted[asked])


def masked(hidden):
    """An `attend` for Decoder: `hidden[layer][t, s]` says that the query at t must not see the key at s."""
    layers = itertools.count()

    def make(config, _):
        mask = jnp.asarray(hidden[next(layers)])

        def attend(q, k, v):
            grouped = q.reshape(*q.shape[:2], config.num_kv_heads, config.group_size, -1) * config.query_scale
            scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k)
            tokens = jnp.arange(q.shape[1])
            seen = (tokens <= tokens[:, None]) & ~mask
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)

        return attend

    return make


@pytest.mark.parametrize(
    ("vocabulary", "longest", "length"), [(256, 4096, 1000), (64, 512, 512), (2048, 131072, 1000), (8, 64, 64)]
)
def test_it_says_what_followed_the_last_occurrence(vocabulary, longest, length):
    tokens = np.random.default_rng(length).integers(0, vocabulary, (1, length))
    logits = Induction(vocabulary, longest).build()(jnp.asarray(tokens))
    assert accuracy(logits[0].argmax(-1), tokens[0]) == 1.0


def test_one_token_over_and_over_is_its_own_follower():
    logits = Induction(16, 64).build()(jnp.full((1, 20), 7))
    assert (logits[0].argmax(-1) == 7).all()


@pytest.fixture(scope="module")
def decoder():
    return Induction(256, 512).build()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 256, 512)


def older_than(window, length=512):
    places = np.arange(length)
    return places[None] <= places[:, None] - window


@pytest.mark.parametrize("window", [2, 8])
def test_layer_0_needs_only_its_window(decoder, tokens, window):
    hidden = [older_than(window), np.zeros((512, 512), bool)]
    logits = decoder(jnp.asarray(tokens[None]), masked(hidden))
    assert accuracy(logits[0].argmax(-1), tokens) == 1.0


def test_layer_0_without_the_token_before_is_lost(decoder, tokens):
    hidden = [older_than(1), np.zeros((512, 512), bool)]
    logits = decoder(jnp.asarray(tokens[None]), masked(hidden))
    assert accuracy(logits[0].argmax(-1), tokens) < 0.05


def needles(tokens):
    """[T, T]: the one key that each place needs in layer 1, which is the one after the last occurrence."""
    mask, last = np.zeros((len(tokens), len(tokens)), bool), {}
    for index, token in enumerate(tokens.tolist()):
        if token in last:
            mask[index, last[token] + 1] = True
        last[token] = index
    return mask


def test_layer_1_needs_only_the_needles(decoder, tokens):
    needed = needles(tokens)
    # a place that asks for nothing needs something to see, or the softmax has no key
    needed[~needed.any(axis=1)] = True
    logits = decoder(jnp.asarray(tokens[None]), masked([older_than(2), ~needed]))
    assert accuracy(logits[0].argmax(-1), tokens) == 1.0


def test_layer_1_without_the_needles_is_at_chance(decoder):
    # each token stands twice, so there is no earlier needle to fall back on
    rng = np.random.default_rng(3)
    tokens = np.concatenate([rng.permutation(256), rng.permutation(256)])
    hidden = needles(tokens)
    logits = decoder(jnp.asarray(tokens[None]), masked([older_than(2), hidden]))
    assert accuracy(logits[0].argmax(-1), tokens) < 0.05
    kept = decoder(jnp.asarray(tokens[None]), masked([older_than(2), np.zeros_like(hidden)]))
    assert accuracy(kept[0].argmax(-1), tokens) == 1.0


def test_scores_of_the_longest_context_are_told_apart_in_float32():
    """The last query of 128K tokens, each of which stands dozens of times: nothing else is computed there."""
    longest = 131_072
    decoder = Induction(300, longest).build()
    tokens = np.random.default_rng(5).integers(0, 300, longest)
    tokens[-1] = tokens[0] = 299
    tokens[1:-1][tokens[1:-1] == 299] = 7  # the needle is the farthest of all keys
    layers = itertools.count()

    def make(config, _):
        first = next(layers) == 0

        def attend(q, k, v):
            shape = (q.shape[1], config.num_kv_heads, config.group_size, config.head_dim)
            grouped, scale = q[0].reshape(shape), config.query_scale
            if first:  # this key and the one before: what layer 0 needs
                pairs = [jnp.concatenate([x[0, :1], x[0, :-1]]) for x in (k, v)]
                keys, values = (jnp.stack([a, x[0]], 1) for a, x in zip(pairs, (k, v), strict=True))
                weights = jax.nn.softmax(jnp.einsum("tkgd,tskd->tkgs", grouped * scale, keys), axis=-1)
                return jnp.einsum("tkgs,tskd->tkgd", weights, values).reshape(q.shape)
            weights = jax.nn.softmax(jnp.einsum("kgd,skd->kgs", grouped[-1] * scale, k[0]), axis=-1)
            last = jnp.einsum("kgs,skd->kgd", weights, v[0]).reshape(q.shape[2:])
            return jnp.zeros_like(q).at[0, -1].set(last)

        return attend

    logits = decoder(jnp.asarray(tokens[None]), make)
    assert int(logits[0, -1].argmax()) == tokens[1]


def test_it_is_an_ordinary_llama_to_the_engine(tmp_path):
    write(Induction(256, 512), tmp_path)
    rng = np.random.default_rng(2)
    prompts = [rng.permutation(256)[:length].tolist() for length in (30, 250)]
    for prompt in prompts:
        prompt.append(prompt[10])
    with Engine.from_pretrained(tmp_path, EngineConfig(max_num_seqs=2, decode_steps=1)) as engine:
        found = engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0.0), progress=False)
    for prompt, completion in zip(prompts, found, strict=True):
        assert list(completion.tokens) == prompt[11:17]
        assert completion.text.split() == [f"t{token}" for token in prompt[11:17]]


def test_what_was_saved_is_what_was_built(tmp_path, decoder):
    write(Induction(256, 512), tmp_path)
    for a, b in zip(jax.tree.leaves(nnx.split(decoder)[1]), jax.tree.leaves(nnx.split(load(tmp_path))[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [(1, 64), (4096, 64), (256, 8), (256, 262144)])
def test_sizes_that_cannot_be_told_apart_are_refused(sizes):
    with pytest.raises(ValueError, match=r"must be \d+ to \d+"):
        Induction(*sizes)
