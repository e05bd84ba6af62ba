"""The temporaries of an engine's largest steps, as the device's own compiler sets them aside. Nothing is run.

The steps are the engine's, with the arrays it would pass. A process of its own compiles them: a compiler may end it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kvjax import models
from kvjax.cache import TENSOR, ArraySpec, Terms, rows
from kvjax.engine import steps
from kvjax.engine.caches import Caches
from kvjax.models.parameters import materialise
from kvjax.models.sharding import spec
from kvjax.plan.devices import Device
from kvjax.plan.estimate import Compiled, declare
from kvjax.plan.topology import ENVIRONMENT, topology_devices


def measure(arguments: Sequence[str]) -> Compiled:
    """Compiles for the command line `arguments` of `kvjax.plan`, in a process of its own.

    Raises:
        RuntimeError: that process ended without an answer; says what it printed last.
    """
    command = [sys.executable, "-m", "kvjax.plan.compiled", *arguments]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"temporaries"')]
    if not lines:
        raise RuntimeError(f"the compiler ended with {done.returncode}: {(done.stdout + done.stderr)[-400:].strip()}")
    return Compiled(**json.loads(lines[-1]))


def compile_steps(caches: Caches, device: Device) -> Compiled:
    """Compiles in this process, which must have the environment of `topology.ENVIRONMENT`."""
    devices = topology_devices(device)
    mesh = None if device.parts == 1 else Mesh(np.array(devices), (TENSOR,))
    here: Sharding = SingleDeviceSharding(devices[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    platform = "cuda" if device.chip.platform == "gpu" else "tpu"
    temporaries, refused = {}, {}
    for name, trace in _steps(caches, mesh, here).items():
        try:
            compiled = trace().lower(lowering_platforms=(platform,)).compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0]
        else:
            temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(temporaries, refused)


def _steps(caches: Caches, mesh: Mesh | None, here: Sharding) -> dict[str, Callable[[], Any]]:
    """Each step as the engine would call it, traced when it is asked for."""
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
        steps.LayerKind(part, layer.window, config.query_scale, mesh)
        for (part, _), layer in zip(split, config.layers, strict=True)
    )
    leaves = tuple(arrays for _, arrays in split)
    model.layers = nnx.List([])
    trunk, trunk_leaves = steps.Part.split(model)
    longest = layout.buckets[-1]
    piece = min(layout.piece, longest)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=here)
    hidden = jax.ShapeDtypeStruct((longest, config.width), layout.dtype, sharding=here)
    workspace = placed(caches.workspace(longest))
    views = placed(caches.views)
    state = placed(steps.DecodeState.declare(layout.slots, config.vocab_size))
    alive = jax.ShapeDtypeStruct((layout.slots,), jnp.bool_, sharding=here)

    def prefill(layer: int) -> Callable[[], Any]:
        return lambda: steps.prefill_layer.trace(kinds[layer], piece, leaves[layer], hidden, workspace, number, number)

    def install(layer: int) -> Callable[[], Any]:
        terms = placed(rows(Terms.declare(layout.slots)))
        return lambda: steps.install.trace(
            kinds[layer], caches.plans[layer], views[layer], workspace, number, number, terms
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


def main() -> None:
    """Prints one line of JSON for the command line of `kvjax.plan`."""
    from kvjax.plan.arguments import build_parser, read_question

    question = read_question(build_parser().parse_args())
    print(json.dumps(dataclasses.asdict(compile_steps(declare(question), question.device))))


if __name__ == "__main__":
    main()
