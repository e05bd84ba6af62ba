import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def test_a_sum_crosses_all_devices(devices):
    mesh = Mesh(np.asarray(devices), ("model",))
    values = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("model")))
    total = jax.shard_map(
        lambda part: jax.lax.psum(part.sum(), "model"),
        mesh=mesh,
        in_specs=PartitionSpec("model"),
        out_specs=PartitionSpec(),
    )
    assert float(jax.jit(total)(values)) == 120.0
    assert {shard.data.shape for shard in values.addressable_shards} == {(2,)}
