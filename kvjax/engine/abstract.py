"""An engine's largest steps with the shapes of all their arguments: to be traced or compiled, never to be run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from kvjax import models
from kvjax.cache import ArraySpec, SlotLimits, rows
from kvjax.engine import steps
from kvjax.engine.caches import CacheConfig
from kvjax.models.parameters import materialise
from kvjax.models.sharding import spec


def abstract_steps(
    caches: CacheConfig, mesh: Mesh | None, here: Sharding | None, kernels: str | None, bucket: int
) -> dict[str, Callable[[], Any]]:
    """Each step as the engine would call it, by name; calling it traces it.

    Args:
        here: where arrays are that no mesh splits; None leaves that open.
        kernels: as in `steps.LayerKind`.
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

    model = materialise(models.abstract(config, layout.dtype), weight)
    split = [steps.Part.split(layer) for layer in model.layers]
    kinds = tuple(
        steps.LayerKind(part, layer.window, config.query_scale, mesh, kernels)
        for (part, _), layer in zip(split, config.layers, strict=True)
    )
    leaves = tuple(arrays for _, arrays in split)
    model.layers = nnx.List([])
    trunk, trunk_leaves = steps.Part.split(model)
    chunk = min(layout.prefill_chunk_size, bucket)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    hidden = jax.ShapeDtypeStruct((bucket, config.width), layout.dtype, sharding=here)
    workspace = placed(caches.workspace(bucket))
    views = placed(caches.views)
    state = placed(steps.DecodeState.declare(layout.max_num_seqs, config.vocab_size))
    alive = jax.ShapeDtypeStruct((layout.max_num_seqs,), jnp.bool_, sharding=here)

    def prefill(layer: int) -> Callable[[], Any]:
        return lambda: steps.prefill_layer.trace(kinds[layer], chunk, leaves[layer], hidden, workspace, number, number)

    def install(layer: int) -> Callable[[], Any]:
        limits = placed(rows(SlotLimits.declare(layout.max_num_seqs)))
        return lambda: steps.write_slot.trace(
            kinds[layer], caches.plans[layer], views[layer], workspace, number, number, limits
        )

    def decode() -> Any:
        return steps.decode.trace(
            trunk, kinds, caches.plans, layout.decode_steps, trunk_leaves, leaves, views, state, alive, number
        )

    named: dict[str, Callable[[], Any]] = {}
    layers = {(config.layers[i], caches.plans[i]): i for i in range(config.num_layers)}  # one of each kind
    for index, layer in enumerate(layers.values()):
        suffix = "" if len(layers) == 1 else f" {index + 1}"  # of the kinds of layers
        named[f"prefill{suffix}"], named[f"install{suffix}"] = prefill(layer), install(layer)
    return named | {"decode": decode}
