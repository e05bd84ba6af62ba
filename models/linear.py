"""The one matrix product of the models: weights stand outputs first, sums are in float32.

Its gradients are products in the operands' own dtypes. The automatic ones would multiply a float32 cotangent
with a bfloat16 weight, at the speed of float32.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def linear(x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """x [*B inputs] times weight [*outputs inputs]: [*B *outputs].

    Sums in float32 and returns `dtype`, x's own if None. Differentiable in reverse mode only.
    """
    return cast(Array, _contract(x, weight, jnp.dtype(dtype or x.dtype)))


def _product(x: Array, y: Array, over_x: Sequence[int], over_y: Sequence[int], dtype: DTypeLike) -> Array:
    axes = ((tuple(over_x), tuple(over_y)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    # as two matrices: XLA's CPU backend transposes a weight of three dimensions at every call
    outputs = weight.shape[:-1]
    matrix = weight.reshape(math.prod(outputs), -1)
    return _product(x, matrix, [x.ndim - 1], [1], dtype).reshape(*x.shape[:-1], *outputs)


def _forward(x: Array, weight: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, weight, dtype), (x, weight)


def _backward(dtype: DTypeLike, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = saved
    batch, outputs = x.ndim - 1, weight.ndim - 1
    over = range(batch, batch + outputs)
    to_x = _product(cotangent.astype(weight.dtype), weight, over, range(outputs), x.dtype)
    to_weight = _product(cotangent.astype(x.dtype), x, range(batch), range(batch), weight.dtype)
    return to_x, to_weight


_contract.defvjp(_forward, _backward)
