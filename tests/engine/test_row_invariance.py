"""Row invariance: what is found agrees with a comparison by hand, and a product that does not have it is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.dense import prefill_attention
from kvjax.engine.row_invariance import ProductShapes, RowInvariance, check_row_invariance
from kvjax.models.linear import linear

SMALL = ProductShapes(weights=((24, 16), (16, 40)), heads=4, kv_heads=2, head_dim=16, rows=(64, 128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_finds_is_so(dtype):
    """Of attention, by other random numbers: the same chunk of a prompt in one part and in two."""
    shapes = ProductShapes((), heads=12, kv_heads=2, head_dim=64, dtype=dtype, kv_dtype=dtype, rows=(128, 256))
    found = check_row_invariance(shapes)
    assert found == check_row_invariance(shapes)
    assert 256 in found.rows
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (256, 12, 64), dtype)
    k, v = (jax.random.normal(key, (2, 1024, 64), dtype) for key in keys[1:])
    run = jax.jit(prefill_attention, static_argnames="scale")
    whole = np.asarray(run(q, k, v, jnp.asarray(512), scale=0.125))
    parts = [np.asarray(run(q[at : at + 128], k, v, jnp.asarray(512 + at), scale=0.125)) for at in (0, 128)]
    assert (np.concatenate(parts).tobytes() == whole.tobytes()) == (128 in found.attention)


def test_products_with_weights_outputs_first_agree():
    found = check_row_invariance(SMALL)
    x, weight = (jax.random.normal(jax.random.key(n), shape) for n, shape in ((1, (128, 16)), (2, (24, 16))))
    run = jax.jit(linear)
    same = np.asarray(run(x[64:], weight)).tobytes() == np.asarray(run(x, weight))[64:].tobytes()
    assert same or 64 not in found.products
    assert found.rows == tuple(rows for rows in (64, 128) if rows in found.products and rows in found.attention)
    assert str(found) == f"rows {', '.join(map(str, found.rows))}"


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight: linear(x, weight) * (1.0 if x.shape[0] == 128 else 1.0 + 1e-6),
        lambda x, weight: linear(x, weight).at[0].multiply(1.0 + 1e-6),
        lambda x, weight: linear(x, weight) * (1.0 + 1e-6 * jnp.arange(x.shape[0])[:, None]),
        lambda x, weight: jnp.where(weight.shape[0] == 16, linear(x, weight) + jnp.sum(x) * 1e-3, linear(x, weight)),
    ],
    ids=["by the number of rows", "by the place of a row", "by the place of all", "of one of the weights"],
)
def test_a_product_without_it_is_seen(product):
    assert check_row_invariance(SMALL, product).products == (128,)


def test_what_differs_in_either_may_not_be_mixed():
    found = RowInvariance(products=(64, 256, 512), attention=(64, 128, 512))
    assert found.rows == (64, 512)
    assert str(found) == "rows 64, 512"


@pytest.mark.parametrize(
    "wrong",
    [{"rows": ()}, {"rows": (128, 64)}, {"rows": (64, 64)}, {"rows": (64, 100)}, {"weights": ((0, 4),)}, {"heads": 3}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="must"):
        ProductShapes(**({"weights": ((4, 4),), "heads": 4, "kv_heads": 2, "head_dim": 8} | wrong))
