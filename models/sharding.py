"""Sharding of a model over several devices: one table from logical axes to mesh axes.

Tensor parallelism over heads: a device holds whole heads with their queries, keys, values and cache, and a
slice of the MLP and of the vocabulary. Attention then needs no communication; one sum follows each output
projection.
"""

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kvjax.cache import TENSOR
from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder

# width stays whole because every product either sums over it or follows a sum; a head is never cut
_SHARDED = {
    "vocab": True,
    "width": False,
    "heads": True,
    "kv_heads": True,
    "head_dim": False,
    "mlp": True,
}


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(TENSOR if _SHARDED[axis] else None for axis in axes))


def check_mesh(config: DecoderConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError, naming the flag, unless the mesh cuts every sharded axis into equal whole parts."""
    if TENSOR not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}; a model is sharded over one called {TENSOR!r}")
    parts = mesh.shape[TENSOR]
    sizes = {
        "num_kv_heads": config.num_kv_heads,
        "num_heads": config.num_heads,
        "mlp_width": config.mlp_width,
        "vocab_size": config.vocab_size,
    }
    common = math.gcd(*sizes.values())
    possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(f"--tensor-parallel-size {parts} does not divide {name} ({size}); possible: {possible}")


def shardings(decoder: Decoder, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PyTree[NamedSharding]:
    """The sharding of every array: a pytree like `nnx.state(decoder, nnx.Param)` with `NamedSharding` leaves.

    `decoder` may be abstract. Raises ValueError if the mesh does not fit the model.
    """
    check_mesh(decoder.config, mesh)
    return nnx.from_flat_state(
        [
            (path, param.replace(NamedSharding(mesh, spec(param.get_metadata()["axes"]))))
            for path, param in nnx.to_flat_state(nnx.state(decoder, nnx.Param))
        ]
    )


def tensor_mesh(size: int) -> Mesh | None:
    """A mesh over the first `size` devices, whose one axis splits heads; None for a single device.

    Raises:
        ValueError: there are fewer devices.
    """
    if size == 1:
        return None
    devices = jax.devices()
    if len(devices) < size:
        raise ValueError(f"tensor_parallel_size={size}, but JAX sees {len(devices)} devices")
    return Mesh(np.array(devices[:size]), (TENSOR,))
