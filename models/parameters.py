"""Each array of a model is declared once, here called with its shape, logical axes and initialiser.

A declared array has no values: a model is always built abstract, and `materialise` gives it values (random
ones, or a checkpoint's). Shardings, initial values and checkpoint shapes all derive from the declaration.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with standard deviation `inputs ** -0.5`: a product over that many inputs keeps its variance."""

    inputs: int


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Normal with the standard deviation that a training recipe asks for."""


@dataclasses.dataclass(frozen=True)
class Constant:
    value: float


Initialiser = Normal | Embedding | Constant


def declare(initialiser: Initialiser, dtype: jax.typing.DTypeLike, **axes: int) -> nnx.Param[Any]:
    """A parameter without values; `axes` are its logical axes in order, with their sizes.

    The axes are vocab, width, heads, kv_heads, head_dim and mlp.
    """
    shape = jax.ShapeDtypeStruct(tuple(axes.values()), dtype)
    return nnx.Param(shape, axes=tuple(axes), initialiser=initialiser)


def walk(module: nnx.Module) -> Iterator[tuple[str, nnx.Param[Any]]]:
    """Every parameter with its dotted path ("layers.0.attention.query"), in a fixed order."""
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        yield ".".join(map(str, path)), variable


def initial(param: nnx.Param[Any], key: Array, embedding_std: float) -> Array:
    """First values of a declared parameter, in its shape and dtype."""
    initialiser = param.get_metadata()["initialiser"]
    match initialiser:
        case Constant(value):
            return jnp.full(param.shape, value, param.dtype)
        case Normal(inputs):
            std = inputs**-0.5
        case Embedding():
            std = embedding_std
        case _:
            raise TypeError(f"no such initialiser: {initialiser}")
    return _normal(key, std, param.shape, param.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: Array, std: float | Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def materialise[M: nnx.Module](module: M, value: Callable[[str, nnx.Param[Any]], Array]) -> M:
    """A copy of the module that has `value(path, parameter)` in place of each declared array."""
    graphdef, state = nnx.split(module, nnx.Param)
    filled = [(path, param.replace(value(".".join(map(str, path)), param))) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
