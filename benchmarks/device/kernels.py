"""Speed of each operation on views of a model's shape, by every implementation, and its share of the bandwidth.

A part of `benchmarks.device`. Bytes are those that an operation must read and write at least once. Views are larger
than a device's caches where they can be: `resident` says what the loop goes over.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.clock import clock, looped, turns
from benchmarks.device.correctness import EXACT, ROUNDING, SCORES, difference, mask
from benchmarks.device.outside import OUTSIDE, unserved
from benchmarks.device.point import XLA, Guess, Point
from benchmarks.device.rig import Rig, noise
from benchmarks.device.torch_arms import torch_seconds
from kvjax.attention.dense import DECODE_BLOCK
from kvjax.attention.read_units import ReadUnits
from kvjax.engine.device.cache_config import HALVED
from kvjax.pallas.decode_attention import decode_attention
from kvjax.pallas.dispatch import REFERENCE
from kvjax.pallas.observation_scores import observation_scores
from kvjax.pallas.page_scores import page_scores
from kvjax.pallas.page_selection import page_selection
from kvjax.pallas.prefill_attention import prefill_attention
from kvjax.pallas.selected_attention import selected_attention

PART = "kernels"
SETS = 8  # views that a loop goes over, where one is small
COLD = 256 << 20  # bytes that no cache of a device holds
WINDOW, POOLING = 32, 63


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on views of one size.

    Attributes:
        call: from an implementation to a function of `first` and the arrays of a set.
        first, arrays: what makes them on the device; a seed makes other arrays of the same shapes.
        nbytes: of what must be read and written.
        kernels: that the reference runs, one after another.
        compared: the array of an output by which implementations are compared; `tolerance` is the largest difference.
    """

    name: str
    call: Callable[[str], Callable[..., Any]]
    first: Callable[[], Any]
    arrays: Callable[[int], tuple[Any, ...]]
    nbytes: int
    operations: float = 0.0
    kernels: int = 1
    compared: Callable[[Any], np.ndarray] = lambda out: np.asarray(out, np.float32)
    tolerance: float = 2 * ROUNDING  # the reference rounds as well


def points(rig: Rig) -> list[Point]:
    """Every operation at every size by every implementation that there is."""
    rows = []
    for batch, context in itertools.product(rig.batches, rig.contexts):
        for operation in _of_views(rig, batch, context):
            rows += [_point(rig, operation, name, batch, context) for name in rig.implementations]
        rows += [_outside(rig, name, batch, context) for name in (*OUTSIDE, "torch")]
    for context in rig.contexts:
        for operation in _of_prompts(rig, context):
            rows += [_point(rig, operation, name, 1, context) for name in rig.implementations]
    return rows


def _of_views(rig: Rig, batch: int, context: int) -> list[Operation]:
    model, page, read = rig.model, rig.page, rig.read
    kv_heads, group, dim = model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim
    pages, item, scale = context // page, jnp.dtype(rig.dtype).itemsize, model.query_scale
    narrow = jnp.dtype(HALVED[jnp.dtype(rig.dtype).name])
    rows = batch * kv_heads
    entry = 2 * dim * item  # of K and V
    entries = jnp.full(batch, context, jnp.int32)

    def queries() -> Any:
        return noise((batch, kv_heads, group, dim), rig.dtype, 1)

    def view(seed: int) -> tuple[Any, ...]:
        shape = (batch, kv_heads, context, dim)
        return noise(shape, rig.dtype, 2 * seed), noise(shape, rig.dtype, 2 * seed + 1)

    def scores(name: str) -> Callable[..., Any]:
        return lambda q, bounds: page_scores(q, bounds, entries, page_size=page, scale=scale, implementation=name)

    def selected(name: str) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any, units: Any) -> Any:
            selection = ReadUnits(units, jnp.ones(units.shape, jnp.bool_))
            return selected_attention(q, k, v, entries, selection, page_size=page, scale=scale, implementation=name)

        return call

    def chosen(seed: int) -> Any:
        """Pages that lie scattered, as scores choose them."""
        random = np.random.default_rng(seed)
        picked = [random.choice(pages, min(read // page, pages), replace=False) for _ in range(rows)]
        return jnp.asarray(np.stack(picked).reshape(batch, kv_heads, -1), jnp.int32)

    def choice(name: str) -> Callable[..., Any]:
        options = {"page_size": page, "count": read // page, "implementation": name}
        return lambda scores: page_selection(scores, entries, **options)

    def dense(name: str) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any) -> Any:
            flat = q.reshape(batch, -1, dim)
            return decode_attention(flat, k, v, entries, scale=scale, implementation=name).reshape(q.shape)

        return call

    return [
        Operation(
            "page_scores", scores, queries, lambda seed: (noise((batch, kv_heads, pages, 2, dim), narrow, seed),),
            rows * pages * (2 * dim * narrow.itemsize + 4), kernels=6, tolerance=SCORES,
        ),
        Operation(
            "page_selection", choice,
            lambda: noise((batch, kv_heads, pages), jnp.float32, 1), lambda seed: (),
            rows * (4 * pages + 5 * read // page), kernels=8, compared=lambda out: mask(out, pages),
            tolerance=EXACT,
        ),
        Operation(
            "selected_attention", selected, queries, lambda seed: (*view(seed), chosen(seed)),
            rows * min(read, context) * entry, kernels=8,
        ),
        Operation(
            "decode_attention", dense, queries, view, rows * context * entry, kernels=6 * -(-context // DECODE_BLOCK),
        ),
    ]  # fmt: skip


def _of_prompts(rig: Rig, context: int) -> list[Operation]:
    model, chunk, item = rig.model, 256 if rig.quick else 2048, jnp.dtype(rig.dtype).itemsize
    kv_heads, heads, dim, scale = model.num_kv_heads, model.num_heads, model.head_dim, model.query_scale
    length, start = jnp.int32(context), context - chunk
    keys = kv_heads * context * dim * item

    def observed(name: str) -> Callable[..., Any]:
        options = {"pooling_kernel": POOLING, "scale": scale, "implementation": name}
        return lambda q, k: observation_scores(q, k, length, jnp.int32(WINDOW), **options)

    def attend(name: str) -> Callable[..., Any]:
        return lambda q, k, v: prefill_attention(q, k, v, jnp.int32(start), scale=scale, implementation=name)

    def workspace(seed: int) -> tuple[Any, ...]:
        shape = (kv_heads, context, dim)
        return noise(shape, rig.dtype, 2 * seed), noise(shape, rig.dtype, 2 * seed + 1)

    pairs = chunk * start + chunk * (chunk + 1) // 2
    return [
        Operation(
            "observation_scores", observed, lambda: noise((WINDOW, heads, dim), rig.dtype, 1),
            lambda seed: workspace(seed)[:1], keys + 4 * kv_heads * context, 2.0 * heads * dim * WINDOW * context,
            kernels=12 * -(-context // 512), compared=lambda out: np.asarray(out, np.float32)[:, : context - WINDOW],
            tolerance=SCORES,
        ),
        Operation(
            "prefill_attention", attend, lambda: noise((chunk, heads, dim), rig.dtype, 1), workspace, 2 * keys,
            4.0 * heads * dim * pairs, kernels=6 * -(-context // 512),
        ),
    ]  # fmt: skip


def _point(rig: Rig, operation: Operation, name: str, batch: int, context: int) -> Point:
    guess = Guess(rig.device) if name != REFERENCE else Guess(rig.device, XLA)
    kernels = 2 if name != REFERENCE else operation.kernels  # a kernel, and what puts its splits together
    predicted = guess(operation.nbytes, kernels, operation.operations)
    return Point(
        f"{PART}/{operation.name}/{name} {batch}x{context}",
        PART,
        {"operation": operation.name, "implementation": name, "batch": batch, "context": context},
        predicted,
        functools.partial(_measure, rig, operation, name, predicted),
        operation.nbytes,
        operation.operations,
        order=rig.order(batch, context) if operation.name not in ("observation_scores", "prefill_attention")
        else 0 if context == max(rig.contexts) else 2,
    )  # fmt: skip


def _measure(rig: Rig, operation: Operation, name: str, predicted: float) -> dict[str, Any]:
    call, first = operation.call(name), operation.first()
    arrays = operation.arrays(0)
    extra = {}
    if name != REFERENCE:
        actual, expected = (
            operation.compared(jax.jit(each)(first, *arrays)) for each in (call, operation.call(REFERENCE))
        )
        error = difference(actual, expected)
        extra = {"error": error, "wrong": error is None or error > operation.tolerance}
    sets = [arrays]
    if operation.nbytes < COLD and arrays:
        sets += [operation.arrays(seed) for seed in range(1, 2 if rig.quick else SETS)]
    count = 1 if rig.quick else turns(predicted, len(sets))
    timed = clock(looped(call, first, sets, count), rig.rounds, count * len(sets))
    return {**timed, **extra, "resident": sum(x.nbytes for x in jax.tree.leaves(sets))}


def _outside(rig: Rig, name: str, batch: int, context: int) -> Point:
    """Attention over a whole view by those who are not of this library, in the layout that they like."""
    model = rig.model
    shape = (batch, context, model.num_kv_heads, model.head_dim)
    nbytes = 2 * int(np.prod(shape)) * jnp.dtype(rig.dtype).itemsize
    predicted = Guess(rig.device, XLA if name == "xla" else Guess.share)(nbytes, 3)

    def measure() -> dict[str, Any]:
        q = noise((batch, model.num_heads, model.head_dim), rig.dtype, 1)
        kv = noise(shape, rig.dtype, 2), noise(shape, rig.dtype, 3)
        if name == "torch":
            return torch_seconds(q, *kv, scale=model.query_scale, rounds=rig.rounds)
        attend = functools.partial(OUTSIDE[name], scale=model.query_scale)
        count = 1 if rig.quick else turns(predicted, 1)
        return clock(looped(attend, q, [kv], count), rig.rounds, count)

    return Point(
        f"{PART}/decode_attention/{name} {batch}x{context}",
        PART,
        {"operation": "decode_attention", "implementation": name, "batch": batch, "context": context},
        predicted,
        measure,
        nbytes,
        unfit=unserved(rig, name),
        order=rig.order(batch, context),
    )
