"""Greedy decoding of many prompts at once with the full cache: what a compressed cache is compared with.

Prompts of one padded length are read together and answered together, so a measurement of thousands of answers
takes minutes on two cores. It serves nobody: there is no queue, no sampling and no memory of the last prompt.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.models import Attend, Decoder, DecoderConfig, causal
from kvjax.train.step import Params

Cache = tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]]


class Greedy:
    """Answers prompts with one decoder; compiles once for each shape."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        self._graph, self._params = nnx.split(decoder)
        self._run = partial(jax.jit(_generate, static_argnums=(0, 4)), self._graph, self._params)

    def generate(self, prompts: list[list[int]], *, size: int, batch: int, new: int) -> list[list[int]]:
        """The likeliest continuation of each prompt, at most `new` tokens, without the token that ends it.

        Args:
            size: tokens that each prompt is padded to.
            batch: prompts read together.

        Raises:
            ValueError: a prompt is empty or longer than `size`.
        """
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            tokens, lengths = np.zeros((batch, size), np.int32), np.ones(batch, np.int32)
            for row, prompt in enumerate(some):
                if not 0 < len(prompt) <= size:
                    raise ValueError(f"a prompt has {len(prompt)} tokens, must be 1 to size={size}")
                tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            ids = np.asarray(self._run(jnp.asarray(tokens), jnp.asarray(lengths), new))
            found += [self.cut(row.tolist()) for row in ids[: len(some)]]
        return found

    def cut(self, ids: list[int]) -> list[int]:
        """Generated tokens up to the first that ends a text."""
        ends = [index for index, token in enumerate(ids) if token in self.config.eos_token_ids]
        return ids[: ends[0]] if ends else ids


def _generate(
    graph: nnx.GraphDef[Decoder], params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], new: int
) -> Int[Array, "B N"]:
    decoder = nnx.merge(graph, params)
    config, rows = decoder.config, jnp.arange(tokens.shape[0])
    ends = jnp.array(config.eos_token_ids or (-1,))
    x, caches = _read(decoder, tokens, new)
    first = jnp.argmax(decoder.head(x[rows, lengths - 1]), axis=-1)

    def going(carry: tuple) -> Array:
        step, _, _, _, done = carry
        return (step < new) & ~done.all()

    def body(carry: tuple) -> tuple:
        step, token, caches, out, done = carry
        out, done = out.at[:, step].set(token), done | jnp.isin(token, ends)
        positions = lengths + step
        x, written = decoder.embed(token), []
        for layer, cache in zip(decoder.layers, caches, strict=True):
            x = layer(x, positions, _over(config, cache, positions, written))
        return step + 1, jnp.argmax(decoder.head(x), axis=-1), written, out, done

    empty = jnp.zeros((tokens.shape[0], new), first.dtype)
    return jax.lax.while_loop(going, body, (0, first, caches, empty, jnp.zeros(lengths.shape, bool)))[3]


def _read(decoder: Decoder, tokens: Int[Array, "B T"], new: int) -> tuple[Float[Array, "B T E"], list[Cache]]:
    """Hidden states of the prompts, and each layer's keys and values with room for `new` more."""
    caches: list[Cache] = []
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = decoder.embed(tokens)
    for layer, kind in zip(decoder.layers, decoder.config.layers, strict=True):
        if kind.window is not None:
            raise NotImplementedError(f"a layer with a window of {kind.window} tokens: only global layers are decoded")
        dense = causal(decoder.config, kind)

        def attend(q: Array, k: Array, v: Array, dense: Attend = dense) -> Array:
            room = ((0, 0), (0, new), (0, 0), (0, 0))
            caches.append((jnp.pad(k, room), jnp.pad(v, room)))
            return dense(q, k, v)

        x = layer(x, positions, attend)
    return x, caches


def _over(config: DecoderConfig, cache: Cache, positions: Int[Array, "B"], written: list[Cache]) -> Attend:
    """An `attend` of one new token a row: puts its key and value into the cache, then reads all up to it."""

    def attend(q: Float[Array, "B H D"], k: Float[Array, "B K D"], v: Float[Array, "B K D"]) -> Float[Array, "B H D"]:
        rows = jnp.arange(positions.size)
        keys, values = cache[0].at[rows, positions].set(k), cache[1].at[rows, positions].set(v)
        written.append((keys, values))
        grouped = q.reshape(q.shape[0], config.num_kv_heads, config.group_size, config.head_dim)
        scores = jnp.einsum("bkgd,bskd->bkgs", grouped * config.query_scale, keys, preferred_element_type=jnp.float32)
        seen = jnp.arange(keys.shape[1]) <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgs,bskd->bkgd", weights.astype(v.dtype), values).reshape(q.shape)

    return attend
