"""Split model: a decoder taken apart, once, into static halves that compiled steps hash and flat leaves that they get.

The trunk is all but the layers: embedding, last norm and head. Layers of a kind have equal static halves, so that one
compiled body serves all of them.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from kvjax.models import Decoder
from kvjax.models.decoder import Layer
from kvjax.pallas.dispatch import REFERENCE
from kvjax.pallas.ops import backend_ops


@dataclasses.dataclass(frozen=True)
class Part[M: nnx.Module]:
    """The static half of a module; its arrays travel as flat leaves. Equal for layers of the same kind."""

    graphdef: Any
    treedef: Any

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # static arguments are hashed at every call, and a graph is large
        return hash((self.graphdef, self.treedef))

    @classmethod
    def split(cls, module: M) -> tuple["Part[M]", tuple[Array, ...]]:
        graphdef, state = nnx.split(module)
        leaves, treedef = jax.tree.flatten(state)
        return cls(graphdef, treedef), tuple(leaves)

    def merge(self, leaves: tuple[Array, ...]) -> M:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """All that the compiled body of a layer depends on.

    Attributes:
        attention_backend: the implementation of what reads a workspace or a view, see `pallas.dispatch`.
    """

    part: Part[Layer]
    window: int | None
    scale: float
    mesh: Mesh | None
    attention_backend: str | None = REFERENCE

    @property
    def reading(self) -> dict[str, Any]:
        """The options of attention, beside arrays."""
        return {"scale": self.scale, "ops": backend_ops(self.attention_backend, self.mesh)}


@dataclasses.dataclass(frozen=True, eq=False)
class SplitModel:
    """One decoder. Leaves are arrays, or the shapes of them where the decoder is abstract.

    Attributes:
        trunk: static half of the decoder without its layers; `trunk_leaves` are its arrays.
        kinds: static half of each layer; equal ones are one object.
        layer_leaves: arrays of each layer.
    """

    trunk: Part[Decoder]
    trunk_leaves: tuple[Any, ...]
    kinds: tuple[LayerKind, ...]
    layer_leaves: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, decoder: Decoder, mesh: Mesh | None = None, backend: str | None = REFERENCE) -> "SplitModel":
        """Takes a decoder apart, which keeps its layers; no array is copied.

        Args:
            mesh: devices over which the layers compute; None is a single one.
            backend: attention backend of every layer, as `LayerKind` has it.
        """
        trunk = nnx.merge(*nnx.split(decoder))  # the same arrays in another module
        parts = [Part.split(layer) for layer in trunk.layers]
        trunk.layers = nnx.List([])
        config = decoder.config
        kinds = [
            LayerKind(part, layer.window, config.query_scale, mesh, backend)
            for (part, _), layer in zip(parts, config.layers, strict=True)
        ]
        first = {kind: kind for kind in kinds}  # equal kinds become one object: compared at every call
        return cls(*Part.split(trunk), tuple(first[kind] for kind in kinds), tuple(leaves for _, leaves in parts))

    def without_leaves(self) -> "SplitModel":
        """The static halves alone: lets go of every array."""
        return dataclasses.replace(self, trunk_leaves=(), layer_leaves=())
