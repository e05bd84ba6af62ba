"""Page scores on a TPU: one pass over the summaries, all logits of a kv head in VMEM, the softmax there too.

The summary lies as rows, maximum and minimum in turn, and stays so: both halves of the product are computed for
every row, the half that a row is not for is dropped, and neighbours are added.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

BLOCK = 2048  # rows of the summary in VMEM at a time
ROWS = 1 << 17  # of one kv head, whose logits fill 4 MiB for 8 query heads


def page_scores(
    q: Float[Array, "B K G D"],
    bounds: Float[Array, "B K P 2 D"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K P"]:
    """As `reference`; blocks beyond a slot's entries are not read.

    Raises:
        NotImplementedError: the summary would be copied whole before it is read (float8, heads that fill no lane), or
            its logits do not fit.
    """
    slots, kv_heads, group, head_dim = q.shape
    rows = 2 * bounds.shape[2]
    if bounds.dtype.itemsize == 1:
        raise NotImplementedError(
            f"a summary of {bounds.dtype}: two rows of it fill half a tile, and a TPU would copy it whole at every step"
        )
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    if rows > ROWS:
        raise NotImplementedError(f"{rows // 2} pages: the logits of more than {ROWS // 2} do not fit into VMEM")
    block = min(BLOCK, rows + -rows % 128)
    blocks = pl.cdiv(rows, block)
    last = (jnp.maximum(entries, 1) - 1) // page_size * 2 // block  # of each slot, the last block with an entry

    def head(slot, head, block, *_):
        return slot, head, 0, 0

    scores = pl.pallas_call(
        functools.partial(_kernel, page_size=page_size, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, kv_heads, blocks),
            in_specs=[
                pl.BlockSpec((1, 1, group, head_dim), head),
                # a block that was there already is not fetched again
                pl.BlockSpec(
                    (1, 1, block, head_dim),
                    lambda slot, head, block, _, last: (slot, head, jnp.minimum(block, last[slot]), 0),
                ),
            ],
            out_specs=pl.BlockSpec((1, 1, blocks, block), head),
            scratch_shapes=[pltpu.VMEM((blocks, group, block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((slots, kv_heads, blocks, block), jnp.float32),
        name="page_scores",
    )(entries.astype(jnp.int32), last.astype(jnp.int32), q, bounds.reshape(slots, kv_heads, rows, head_dim))
    return scores.reshape(slots, kv_heads, -1)[:, :, :rows:2]


def _kernel(entries, last, q_ref, rows_ref, out, logits, *, page_size, scale):
    slot, index = pl.program_id(0), pl.program_id(2)
    group, block = logits.shape[1:]
    held = entries[slot]

    def counts(index):
        """Entries that the page of a row holds, at its maximum; 0 at its minimum, which only serves it."""
        row = index * block + jax.lax.broadcasted_iota(jnp.int32, (group, block), 1)
        return jnp.where(row % 2 == 0, jnp.clip(held - row // 2 * page_size, 0, page_size), 0)

    @pl.when(index <= last[slot])
    def _():
        q, rows = q_ref[0, 0].astype(jnp.float32), rows_ref[0, 0].astype(q_ref.dtype)

        def times(side):
            return jax.lax.dot_general(
                side.astype(rows.dtype), rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )

        row = jax.lax.broadcasted_iota(jnp.int32, (group, block), 1)
        mine = jnp.where(row % 2 == 0, times(jnp.maximum(q, 0)), times(jnp.minimum(q, 0)))
        found = (mine + pltpu.roll(mine, block - 1, 1)) * scale
        logits[index] = jnp.where(counts(index) > 0, found, MASKED)

    @pl.when(index == pl.num_programs(2) - 1)
    def _():
        blocks = last[slot] + 1
        out[...] = jnp.zeros_like(out)

        def highest(index, maximum):
            return jnp.maximum(maximum, jnp.max(logits[index], axis=1, keepdims=True))

        maximum = jax.lax.fori_loop(0, blocks, highest, jnp.full((group, 1), MASKED, jnp.float32))

        def weights(index):
            return jnp.where(counts(index) > 0, jnp.exp(logits[index] - maximum), 0)

        def add(index, total):
            return total + jnp.sum(weights(index) * counts(index), axis=1, keepdims=True)

        total = jax.lax.fori_loop(0, blocks, add, jnp.zeros((group, 1), jnp.float32))

        @pl.loop(0, blocks)
        def _(index):
            share = weights(index) / jnp.maximum(total, 1e-30)
            out[0, 0, pl.ds(index, 1)] = jnp.mean(share, axis=0, keepdims=True)
