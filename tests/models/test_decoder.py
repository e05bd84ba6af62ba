"""The decoder itself: one body for layers of a kind, any batch, causal and windowed, trainable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kvjax import models
from kvjax.models.linear import linear
from tests.models import tiny

TOKENS = np.random.default_rng(5).integers(0, 48, (2, 20), np.int32)


def with_another(position):
    """TOKENS with other tokens at `position`."""
    changed = TOKENS.copy()
    changed[:, position] = (changed[:, position] + 1) % 48
    return changed


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_layers_of_a_kind_have_equal_graph_definitions(name):
    decoder = tiny.decoder(name)
    kinds = decoder.config.layers
    graphdefs = [nnx.split(layer)[0] for layer in decoder.layers]
    for i, kind in enumerate(kinds):
        for j, other in enumerate(kinds):
            # the window is attend's business: only what the layer itself does must differ
            assert (graphdefs[i] == graphdefs[j]) == (kind.rope == other.rope)
    assert len(set(graphdefs)) == len({kind.rope for kind in kinds})


def test_one_traced_body_serves_all_layers_of_a_kind():
    decoder = tiny.decoder("llama")
    attend = models.causal_attention(decoder.config, decoder.config.layers[0])
    traces = []

    def body(graphdef, leaves, x):
        traces.append(graphdef)
        layer = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        return layer(x, jnp.arange(x.shape[0]), attend)

    structure = jax.tree.structure(nnx.state(decoder.layers[0]))
    step = jax.jit(body, static_argnums=0)
    x = decoder.embed(jnp.asarray(TOKENS[0]))
    for layer in decoder.layers:
        graphdef, state = nnx.split(layer)
        x = step(graphdef, jax.tree.leaves(state), x)
    assert len(traces) == 1
    np.testing.assert_allclose(decoder.head(x), tiny.logits(decoder, TOKENS)[0], atol=1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_layer_takes_any_batch(name):
    """[T], [B] and [B, T] are the same rows when `attend` mixes none of them."""
    decoder = tiny.decoder(name)

    def attend(q, k, v):
        assert (q.shape[-2], k.shape[-2], v.shape[-2]) == (6, 2, 2)
        return q + jnp.repeat(k + v, 3, axis=-2)

    positions = np.arange(40).reshape(2, 20) * 3

    @jax.jit
    def run(tokens, positions):
        x = decoder.embed(tokens)
        return [layer(x, positions, attend) for layer in decoder.layers]

    for whole, one, slots in zip(
        run(TOKENS, positions),
        run(TOKENS[1], positions[1]),
        run(TOKENS[:, 7], positions[:, 7]),
        strict=True,
    ):
        np.testing.assert_allclose(one, whole[1], atol=1e-5)
        np.testing.assert_allclose(slots, whole[:, 7], atol=1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_token_changes_nothing_before_it(name):
    decoder = tiny.decoder(name)
    before, after = (np.asarray(tiny.logits(decoder, t)) for t in (TOKENS, with_another(13)))
    np.testing.assert_array_equal(before[:, :13], after[:, :13])
    assert (np.abs(before[:, 13:] - after[:, 13:]).max(axis=(0, 2)) > 1e-4).all()


def test_a_window_of_n_sees_n_tokens_its_own_included():
    sliding = (models.LayerConfig(tiny.ROPE, 4),)
    config = dataclasses.replace(tiny.LLAMA, layers=sliding)
    decoder = tiny.fill(config)
    first, second = (np.asarray(tiny.logits(decoder, t)) for t in (TOKENS, with_another(10)))
    changed = np.abs(first - second).max(axis=(0, 2)) > 1e-5
    assert np.flatnonzero(changed).tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("block", [6, 20])
def test_blocks_of_queries_change_nothing(block, window):
    config, kind = tiny.LLAMA, models.LayerConfig(tiny.ROPE, window)
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 20, heads, 8)).astype(np.float32) for heads in (6, 2, 2))

    @jax.jit
    def plain(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) * config.query_scale
        distance = jnp.arange(20)[:, None] - jnp.arange(20)
        seen = (distance >= 0) & (distance < (window or 20))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))

    attend = jax.jit(models.causal_attention(config, kind, block))
    np.testing.assert_allclose(attend(q, k, v), plain(q, k, v), atol=1e-5)
    np.testing.assert_allclose(attend(q[0], k[0], v[0]), plain(q, k, v)[0], atol=1e-5)

    def loss(attend):
        return lambda *qkv: (attend(*qkv) ** 2).sum()

    for ours, theirs in zip(
        jax.jit(jax.grad(loss(attend), (0, 1, 2)))(q, k, v),
        jax.jit(jax.grad(loss(plain), (0, 1, 2)))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gradients_of_a_product_are_those_of_einsum():
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 5, 4, 6)).astype(np.float32)
    weight = random.normal(size=(2, 7, 6)).astype(np.float32)

    def value_and_gradients(product):
        return jax.jit(jax.value_and_grad(lambda x, w: (product(x, w) ** 2).mean(), (0, 1)))(x, weight)

    ours = value_and_gradients(lambda x, w: linear(x, w))
    theirs = value_and_gradients(lambda x, w: jnp.einsum("abij,cdj->abicd", x, w))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_products_of_bfloat16_stay_in_bfloat16_and_sum_in_float32():
    x, weight = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((3, 8), jnp.bfloat16)
    gradient = jax.make_jaxpr(jax.grad(lambda x, w: linear(x, w).sum().astype(jnp.float32), (0, 1)))
    equations = [e for e in gradient(x, weight).eqns if e.primitive.name == "dot_general"]
    assert len(equations) == 2
    for equation in equations:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(jnp.bfloat16)}
        assert equation.params["preferred_element_type"] == jnp.float32
    assert linear(x, weight, jnp.float32).dtype == jnp.float32
    # 257 is no bfloat16: summed in bfloat16 the ones would stop at 256
    ones = jnp.ones((1, 257), jnp.bfloat16)
    assert linear(ones, ones, jnp.float32).item() == 257.0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_training_lowers_the_loss(name):
    decoder = models.random(tiny.CONFIGS[name], jax.random.key(0), embedding_std=1.0)
    optimizer = nnx.Optimizer(decoder, optax.adam(1e-2), wrt=nnx.Param)

    def loss(decoder, tokens):
        logits = decoder(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @nnx.jit
    def step(decoder, optimizer, tokens):
        value, gradients = nnx.value_and_grad(loss)(decoder, tokens)
        optimizer.update(decoder, gradients)
        return value, optax.tree.norm(gradients)

    losses = [step(decoder, optimizer, TOKENS) for _ in range(12)]
    assert all(np.isfinite(norm) and norm > 0 for _, norm in losses)
    assert losses[-1][0] < 0.5 * losses[0][0]


def test_bfloat16_stays_near_float32_and_logits_are_float32():
    wide = tiny.decoder("llama")
    graphdef, state = nnx.split(wide)
    narrow = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert narrow.embed(jnp.asarray(TOKENS)).dtype == jnp.bfloat16
    logits, expected = tiny.logits(narrow, TOKENS), tiny.logits(wide, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - np.asarray(expected)).max() < 0.05 * np.abs(expected).max()


def test_the_embedding_scale_is_rounded_to_the_dtype():
    config = dataclasses.replace(tiny.GEMMA, width=60, embed_scale=60**0.5)
    decoder = tiny.fill(config, jnp.bfloat16)
    scale = np.float32(jnp.bfloat16(60**0.5))
    assert scale != np.float32(60**0.5)
    table = np.asarray(decoder.embedding[...], np.float32)
    expected = jnp.asarray(table * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(decoder.embed(jnp.arange(48)), expected)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_initial_weights(std):
    config = dataclasses.replace(tiny.CONFIGS["qwen2"], vocab_size=512, width=64)
    decoder = models.random(config, jax.random.key(0), embedding_std=std)
    assert np.std(decoder.embedding[...]) == pytest.approx(std, rel=0.05)
    assert np.std(decoder.unembedding[...]) == pytest.approx(64**-0.5, rel=0.05)
    layer = decoder.layers[0]
    assert np.std(layer.attention.output[...]) == pytest.approx(48**-0.5, rel=0.1)
    assert np.std(layer.mlp.down[...]) == pytest.approx(32**-0.5, rel=0.1)
    assert (layer.mlp_norm.weight[...] == 1).all()
    assert (layer.attention.query_bias[...] == 0).all()
    assert (models.random(tiny.GEMMA, jax.random.key(0)).norm.weight[...] == 0).all()
    assert not np.array_equal(layer.mlp.up[...], decoder.layers[1].mlp.up[...])


def test_initial_weights_follow_their_key():
    one, same, other = (models.random(tiny.LLAMA, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.embedding[...], same.embedding[...])
    assert not np.array_equal(one.embedding[...], other.embedding[...])


def test_attention_can_be_handed_in():
    decoder = tiny.decoder("gemma3")
    seen = []

    def attend(config, kind):
        seen.append(kind)
        return models.causal_attention(config, kind, block=8)

    handed = jax.jit(lambda tokens: decoder(tokens, attend))(TOKENS)
    np.testing.assert_allclose(handed, tiny.logits(decoder, TOKENS), atol=1e-5)
    assert tuple(seen) == decoder.config.layers
