"""Abstract steps: the largest steps with the shapes of all their arguments, to be traced or compiled, never run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding

from kvjax import models
from kvjax.cache import ArraySpec, SlotLimits, rows
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.split_model import SplitModel
from kvjax.models.parameters import materialise
from kvjax.models.sharding import spec


def abstract_steps(
    caches: CacheConfig, mesh: Mesh | None, here: Sharding | None, backend: str | None, bucket: int
) -> dict[str, Callable[[], Any]]:
    """Each step as the engine would call it, by name; calling it traces it.

    Args:
        here: where arrays are that no mesh splits; None leaves that open.
        backend: attention backend, as in `LayerKind`.
        bucket: tokens of the prompts that are prefilled, one of the layout's.
    """
    config, layout = caches.model, caches.layout

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        where = leaf.sharding(mesh) if isinstance(leaf, ArraySpec) and mesh is not None else here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def placed(tree: Any) -> Any:
        return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, ArraySpec))

    def weight(_: str, param: Any) -> Any:
        where = here if mesh is None else NamedSharding(mesh, spec(param.get_metadata()["axes"]))
        return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=where)

    abstract = materialise(models.abstract(config, layout.dtype), weight)
    model = SplitModel.of(abstract, mesh, backend)
    chunk = min(layout.prefill_chunk_size, bucket)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    hidden = jax.ShapeDtypeStruct((bucket, config.width), layout.dtype, sharding=here)
    workspace = placed(caches.workspace(bucket))
    views = placed(caches.views)
    state = placed(steps.DecodeState.declare(layout.max_num_seqs, config.vocab_size))
    alive = jax.ShapeDtypeStruct((layout.max_num_seqs,), jnp.bool_, sharding=here)

    def prefill(layer: int) -> Callable[[], Any]:
        return lambda: steps.prefill_layer.trace(
            model.kinds[layer], chunk, model.layer_leaves[layer], hidden, workspace, number, number
        )

    def install(layer: int) -> Callable[[], Any]:
        limits = placed(rows(SlotLimits.declare(layout.max_num_seqs)))
        return lambda: steps.write_slot.trace(
            model.kinds[layer], caches.plans[layer], views[layer], workspace, number, number, limits
        )

    def decode() -> Any:
        return steps.decode.trace(
            model.trunk, model.kinds, caches.plans, layout.decode_steps, model.trunk_leaves, model.layer_leaves, views,
            state, alive, number,
        )  # fmt: skip

    named: dict[str, Callable[[], Any]] = {}
    layers = {(config.layers[i], caches.plans[i]): i for i in range(config.num_layers)}  # one of each kind
    for index, layer in enumerate(layers.values()):
        suffix = "" if len(layers) == 1 else f" {index + 1}"  # of the kinds of layers
        named[f"prefill{suffix}"], named[f"install{suffix}"] = prefill(layer), install(layer)
    return named | {"decode": decode}
