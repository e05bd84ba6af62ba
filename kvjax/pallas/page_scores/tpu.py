"""Page scores on a TPU: one pass over the summaries, all logits of a kv head in VMEM, the softmax there too.

XLA lays a summary out by its type, and a kernel that wanted another order would have it copied whole at every step.
Of 16 and 32 bits the maximum and the minimum of a page are neighbouring rows: both halves of the product are computed
for every row, the half that a row is not for is dropped, and neighbours are added. Of 8 bits all maxima come first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

BLOCK = 1024  # pages in VMEM at a time, twice
PAGES = 1 << 16  # of one kv head, whose logits fill 4 MiB for 8 query heads


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
        NotImplementedError: for heads that fill no lane, and for more pages than VMEM has room for.
    """
    slots, kv_heads, group, head_dim = q.shape
    pages = bounds.shape[2]
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    if pages > PAGES:
        raise NotImplementedError(f"{pages} pages: the logits of more than {PAGES} do not fit into VMEM")
    per_page = 2 if bounds.dtype.itemsize > 1 else 1  # logits of one page, of which the first counts
    rows = pages * per_page
    block = min(BLOCK * per_page, rows + -rows % 128)
    blocks = pl.cdiv(rows, block)
    last = (jnp.maximum(entries, 1) - 1) // page_size * per_page // block  # of each slot, the last block with an entry
    # what is taken for a copy here is how the summary lies already
    if per_page == 2:
        summary, shape = bounds.reshape(slots, kv_heads, 1, rows, head_dim), (1, 1, 1, block, head_dim)
    else:
        summary, shape = bounds.swapaxes(2, 3), (1, 1, 2, block, head_dim)

    def head(slot, head, block, *_):
        return slot, head, 0, 0

    def part(slot, head, block, _, last):  # a block that was there already is not fetched again
        return slot, head, 0, jnp.minimum(block, last[slot]), 0

    scores = pl.pallas_call(
        functools.partial(_kernel, page_size=page_size, per_page=per_page, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, kv_heads, blocks),
            in_specs=[pl.BlockSpec((1, 1, group, head_dim), head), pl.BlockSpec(shape, part)],
            out_specs=pl.BlockSpec((1, 1, blocks, block), head),
            scratch_shapes=[pltpu.VMEM((blocks, group, block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((slots, kv_heads, blocks, block), jnp.float32),
        name="page_scores",
    )(entries.astype(jnp.int32), last.astype(jnp.int32), q, summary)
    return scores.reshape(slots, kv_heads, -1)[:, :, :rows:per_page]


def _kernel(entries, last, q_ref, summary, out, logits, *, page_size, per_page, scale):
    slot, index = pl.program_id(0), pl.program_id(2)
    group, block = logits.shape[1:]
    held = entries[slot]

    def counts(index):
        """Entries of the page that a logit is of; 0 for one that only serves its neighbour."""
        row = index * block + jax.lax.broadcasted_iota(jnp.int32, (group, block), 1)
        return jnp.where(row % per_page == 0, jnp.clip(held - row // per_page * page_size, 0, page_size), 0)

    @pl.when(index <= last[slot])
    def _():
        q = q_ref[0, 0].astype(jnp.float32)

        def times(side, rows):
            return jax.lax.dot_general(
                side.astype(q_ref.dtype),
                rows.astype(q_ref.dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        up, down = jnp.maximum(q, 0), jnp.minimum(q, 0)
        if per_page == 2:
            rows = summary[0, 0, 0]
            row = jax.lax.broadcasted_iota(jnp.int32, (group, block), 1)
            half = jnp.where(row % 2 == 0, times(up, rows), times(down, rows))
            score = half + pltpu.roll(half, block - 1, 1)
        else:
            score = times(up, summary[0, 0, 0]) + times(down, summary[0, 0, 1])
        logits[index] = jnp.where(counts(index) > 0, score * scale, MASKED)

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
