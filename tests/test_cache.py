import jax
import jax.numpy as jnp
import numpy as np

from kvjax import cache
from kvjax.cache import ArraySpec, View, Workspace

VIEW = View.declare(slots=3, kv_heads=2, capacity=5, head_dim=4, dtype=jnp.bfloat16)


def test_arrays_are_what_was_declared():
    view = cache.allocate(VIEW)
    for spec, array in zip(jax.tree.leaves(VIEW, is_leaf=cache._is_spec), jax.tree.leaves(view), strict=True):
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        assert (np.asarray(array) == spec.fill).all()
    assert (np.asarray(view.positions) == -1).all(), "an empty view holds position 0 of nobody"


def test_bytes_are_exact_before_anything_is_allocated():
    specs = (VIEW, [Workspace.declare(kv_heads=2, tokens=7, head_dim=4, dtype=jnp.float32)])
    assert cache.nbytes(specs) == sum(array.nbytes for array in jax.tree.leaves(cache.allocate(specs)))
    assert ArraySpec((3, 2), "float16", (None, None)).nbytes == 12


def test_every_dimension_has_an_axis():
    workspace = Workspace.declare(kv_heads=2, tokens=7, head_dim=4, dtype=jnp.float32)
    for spec in jax.tree.leaves((VIEW, workspace), is_leaf=cache._is_spec):
        assert len(spec.axes) == len(spec.shape)


def test_heads_are_split_and_stay_split_in_a_step():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (cache.TENSOR,))
    view = cache.allocate(VIEW, mesh)
    assert view.k.sharding.spec == jax.sharding.PartitionSpec(None, cache.TENSOR, None, None)
    same = jax.jit(lambda view: cache.constrain(jax.tree.map(lambda x: x + 1, view), VIEW, mesh))(view)
    assert same.k.sharding.is_equivalent_to(view.k.sharding, 4)
    assert cache.constrain(view, VIEW, None) is view
