"""Row invariance: whether a row of a product has the same bits whatever the number of rows computed with it.

Compilers choose how to add up by the shape of a product, and promise nothing between shapes. Where the prefill of a
prompt is cut into chunks of several lengths, loaded KV equals computed KV only for lengths that agree. So a start tries
the shapes that it is about to compile, on random numbers, and mixes what was seen to agree on this device alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import PREFILL_BLOCK, prefill_attention
from kvjax.models.linear import linear

ROWS = (64, 128, 256, 512)
SEED = 0
Compute = Callable[[int, int], np.ndarray]  # first row, number of rows -> their results, one row each


@dataclasses.dataclass(frozen=True)
class ProductShapes:
    """The shapes that the rows of a prefill go through.

    Attributes:
        weights: [outputs, inputs] of representative products: the widest and the narrowest do.
        heads, kv_heads, head_dim: of attention.
        dtype: of weights and activations; `kv_dtype` of K and V.
        rows: numbers of rows to compare, in increasing order; each divides the last one.
    """

    weights: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    kv_dtype: str = "float32"
    rows: tuple[int, ...] = ROWS

    def __post_init__(self) -> None:
        if not self.rows or list(self.rows) != sorted(set(self.rows)) or any(self.rows[-1] % n for n in self.rows):
            raise ValueError(f"rows={self.rows} must increase, and each must divide the last one")
        if min((size for shape in self.weights for size in shape), default=1) < 1:
            raise ValueError(f"weights={self.weights} must be at least 1 x 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")


@dataclasses.dataclass(frozen=True)
class RowInvariance:
    """Which numbers of rows may be mixed without changing a bit. As text it is part of the identity of KV.

    Attributes:
        rows: the largest that was tried, and those that agree with it in every product and in attention.
        products, attention: those that agree with it in each of the two alone.
    """

    products: tuple[int, ...]
    attention: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(rows for rows in self.products if rows in self.attention)

    def __str__(self) -> str:
        return f"rows {', '.join(map(str, self.rows))}"


def check_row_invariance(
    shapes: ProductShapes, product: Callable[[jax.Array, jax.Array], jax.Array] = linear
) -> RowInvariance:
    """Compares, on the default device, each number of rows with the largest one, bit for bit.

    Compiles one program for each number of rows and each shape, which is most of its time: half a second of CPU for
    each number of rows of attention, 50 ms for each of a product.

    Args:
        product: x [rows, inputs] and weight [outputs, inputs] to [rows, outputs].
    """
    largest, generator = shapes.rows[-1], np.random.default_rng(SEED)
    agree = set(shapes.rows)
    for outputs, inputs in shapes.weights:
        agree &= _agreeing(shapes.rows, _product(product, generator, (outputs, inputs), largest, shapes.dtype))
    attention = _agreeing(shapes.rows, _attention(generator, shapes))
    return RowInvariance(tuple(sorted(agree)), tuple(sorted(attention)))


def _agreeing(rows: Sequence[int], compute: Compute) -> set[int]:
    """The numbers of rows whose results equal those of the largest, at three places each."""
    largest = rows[-1]
    whole = compute(0, largest)
    return {count for count in rows if all(_equal(compute(at, count), whole, at) for at in _places(count, largest))}


def _places(count: int, largest: int) -> list[int]:
    """The first, a middle and the last place of so many rows, at multiples of their number."""
    last = largest // count - 1
    return sorted({place * count for place in (0, last // 2, last)})


def _equal(part: np.ndarray, whole: np.ndarray, at: int) -> bool:
    return part.tobytes() == whole[at : at + len(part)].tobytes()


def _product(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    generator: np.random.Generator,
    shape: tuple[int, int],
    largest: int,
    dtype: str,
) -> Compute:
    """Rows of a product; the largest number is computed in another order, so that a row's place counts too."""
    outputs, inputs = shape
    weight = jnp.asarray(generator.standard_normal((outputs, inputs), np.float32), dtype)
    x = generator.standard_normal((largest, inputs), np.float32)
    order = generator.permutation(largest)
    run = jax.jit(product)

    def compute(first: int, count: int) -> np.ndarray:
        if count < largest:
            return np.asarray(run(jnp.asarray(x[first : first + count], dtype), weight))
        result = np.empty_like(permuted := np.asarray(run(jnp.asarray(x[order], dtype), weight)))
        result[order] = permuted
        return result

    return compute


def _attention(generator: np.random.Generator, shapes: ProductShapes) -> Compute:
    """Rows of prefill attention behind as many earlier tokens: keys in blocks at fixed positions."""
    largest = shapes.rows[-1]
    before = max(largest, PREFILL_BLOCK)
    keys, values = (
        jnp.asarray(generator.standard_normal((shapes.kv_heads, before + largest, shapes.head_dim), np.float32), kind)
        for kind in (shapes.kv_dtype, shapes.kv_dtype)
    )
    queries = generator.standard_normal((largest, shapes.heads, shapes.head_dim), np.float32)
    run = jax.jit(prefill_attention, static_argnames="scale")

    def compute(first: int, count: int) -> np.ndarray:
        q = jnp.asarray(queries[first : first + count], shapes.dtype)
        return np.asarray(run(q, keys, values, jnp.asarray(before + first), scale=shapes.head_dim**-0.5))

    return compute
