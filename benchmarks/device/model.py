"""Whole decode steps of a model with random weights, over views filled with numbers: full caches and RocketKV.

A part of `benchmarks.device`. A decode step does the same work whatever its views hold, so that they are filled
directly, as after a prompt that leaves entries for the tokens that are timed. The numbers have no order, so that the
pages that are chosen lie scattered, as they do in a real view.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.device.clock import clock
from benchmarks.device.outside import OUTSIDE, unserved
from benchmarks.device.point import XLA, Guess, Point
from benchmarks.device.rig import Rig, noise
from benchmarks.device.torch_arms import torch_decode
from kvjax import cache
from kvjax.attention.dense import DECODE_BLOCK
from kvjax.cache import View
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import plan
from kvjax.pallas.dispatch import REFERENCE
from kvjax.plan.roofline import decode_step
from kvjax.store.sizes import show_size

PART, HOST = "decode", "host"
FULL = "full"
FILLED = "filled with random numbers, not by a prefill"
AT_ONCE = 8  # steps of a dispatch
TIMED = 16  # steps between two looks at the clock
# kernels of a layer's step, counted in what XLA makes of the whole step for an H200
LAUNCHES = {FULL: 20, "rocketkv": 31}
OUTSIDE_LAUNCHES, TORCH_LAUNCHES = 18, 40
CALL = 150e-6  # seconds that a dispatch costs the host, and a device that waits for it
EAGER = 4e-6  # seconds of a kernel's launch by the host, where they are not captured
# turns the capture of kernels into command buffers off: none is long enough
UNCAPTURED: Mapping[str, Any] = {"xla_gpu_graph_min_graph_size": 1 << 30}


def points(rig: Rig) -> list[Point]:
    """Full caches by every arm there is, and RocketKV with every budget."""
    rows = []
    for batch in rig.batches:
        for context in rig.contexts:
            order = rig.order(batch, context)
            for name in rig.implementations:
                rows.append(_point(rig, batch, context, None, name, order))
                for budget in rig.budgets:
                    # of the reference one budget says enough, but where the kernels do not serve its pages
                    late = name != rig.implementations[0] and budget != _headline(rig)
                    rows.append(_point(rig, batch, context, budget, name, 2 if late else order))
            for name in (*OUTSIDE, "torch"):
                rows.append(_outside(rig, batch, context, name, order))
    return rows


def host_points(rig: Rig) -> list[Point]:
    """Cost of the host: steps of a dispatch, with and without capture in command buffers."""
    batch, context = rig.headline
    budget, name = _headline(rig), rig.implementations[0]
    return [
        _point(rig, batch, context, budget, name, 0 if count in (1, AT_ONCE) else 1, count, captured)
        for count in (1, 2, 4, 8)
        for captured in (True, False)
    ]


def unfit(rig: Rig, caches: CacheConfig) -> str | None:
    """The reason why a decode step of these caches does not fit on the device; None if it does."""
    needed = plan(caches)
    total = sum(needed[purpose] for purpose in ("weights", "views", "decode state", "temporaries"))
    if rig.quick or total <= rig.memory:
        return None
    return f"takes {show_size(total)}, and {show_size(rig.memory)} are there: {show_size(needed['views'])} of views"


def _headline(rig: Rig) -> int:
    return 512 if 512 in rig.budgets else rig.budgets[0]


def _point(
    rig: Rig,
    batch: int,
    context: int,
    budget: int | None,
    name: str,
    order: int,
    count: int = AT_ONCE,
    captured: bool | None = None,
) -> Point:
    """One arm. With `captured` it is of the part that asks what the host costs."""
    caches = rig.caches(batch, context, budget, count)
    method = FULL if budget is None else f"rocketkv {budget}"
    roofline = decode_step(caches, rig.device)
    part = PART if captured is None else HOST
    launches = LAUNCHES[method.split()[0]] * rig.model.num_layers
    if name == REFERENCE and budget is None:
        launches += 6 * -(-context // DECODE_BLOCK) * rig.model.num_layers
    share = Guess(rig.device) if name != REFERENCE else Guess(rig.device, XLA)
    predicted = share(roofline.nbytes, launches)
    if captured is False:  # the host launches each while those before run, and is the limit where it falls behind
        predicted = max(predicted, launches * EAGER)
    predicted += CALL / count
    about: dict[str, Any] = {"arm": method, "implementation": name, "batch": batch, "context": context, "views": FILLED}
    reason = unfit(rig, caches)
    if captured is not None:
        about |= {"decode_steps": count, "captured": captured}
        if captured is False and rig.attention_backend != "gpu":
            reason = "command buffers are of GPUs"
    else:
        about |= {"roofline": roofline.seconds, "budget": budget}
    shown = "".join(f" {key} {about[key]}" for key in ("decode_steps", "captured") if key in about)
    return Point(
        f"{part}/{method} {name} {batch}x{context}{shown}",
        part,
        about,
        predicted,
        functools.partial(_measure, rig, caches, name, UNCAPTURED if captured is False else None),
        roofline.nbytes,
        unfit=reason,
        order=order,
    )


def _measure(rig: Rig, caches: CacheConfig, name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    weights, slots, count = rig.weights, caches.layout.max_num_seqs, caches.layout.decode_steps
    length = caches.layout.max_model_len - caches.layout.headroom
    views, state = filled(caches, length), started(rig, slots, length)
    everyone, number = np.ones(slots, np.bool_), np.int32(count)
    compiled = steps.decode.lower(
        weights.trunk, rig.kinds(name), caches.plans, count, weights.trunk_leaves, weights.leaves, views, state,
        everyone, number,
    ).compile(compiler_options=dict(options) if options else None)  # fmt: skip
    held: list[Any] = [views, state]
    del views, state
    emitted = []

    def run() -> Any:
        for _ in range(max(1, _timed(rig) // count)):
            out, *held[:] = compiled(weights.trunk_leaves, weights.leaves, *held, everyone, number)
            emitted.append(out.emitted)
        return held[1], emitted[-1]

    # of what one call is, the steps of all its dispatches
    timed = clock(run, rig.rounds, max(1, _timed(rig) // count) * count)
    if not all(np.asarray(each).all() for each in emitted):
        raise RuntimeError("a slot has stopped before its time: its steps were not all computed")
    memory = compiled.memory_analysis()
    return {
        **timed,
        "tokens_per_second": slots / timed["seconds"],
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "in_place": memory.alias_size_in_bytes,
        "in_use": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"),
    }


def _timed(rig: Rig) -> int:
    """Steps of one look at the clock; with the first one's and all rounds' they stay within a view's room."""
    return TIMED // 4 if rig.quick else TIMED


def filled(caches: CacheConfig, length: int) -> tuple[View, ...]:
    """The views of slots that have all read so many tokens."""

    def view(seed: int, spec: View, layer: Any) -> View:
        held = layer.retained(length)
        order = jnp.arange(spec.positions.shape[2], dtype=jnp.int32)
        limits = None
        if spec.limits is not None:
            slots = caches.layout.max_num_seqs
            limits = jax.tree.map(lambda own: jnp.full(slots, own, jnp.int32), layer.limits())
            limits = dataclasses.replace(spec.limits, **vars(limits))

        def numbers(each: Any, kind: int) -> Any:
            return None if each is None else noise(each.shape, each.dtype, 4 * seed + kind)

        return dataclasses.replace(
            spec,
            k=numbers(spec.k, 0),
            v=numbers(spec.v, 1),
            positions=jnp.broadcast_to(jnp.where(order < held, order, -1), spec.positions.shape),
            used=jnp.full(spec.used.shape, held, jnp.int32),
            bounds=numbers(spec.bounds, 2),
            queries=numbers(spec.queries, 3),
            limits=limits,
        )

    return tuple(view(seed, *each) for seed, each in enumerate(zip(caches.views, caches.plans, strict=True)))


def started(rig: Rig, slots: int, length: int) -> steps.DecodeState:
    """Every slot has a token after so many, and no end."""
    state = cache.allocate(steps.DecodeState.declare(slots, rig.model.vocab_size))
    return dataclasses.replace(
        state,
        token=jnp.full(slots, 5, jnp.int32),
        position=jnp.full(slots, length, jnp.int32),
        limit=jnp.full(slots, 1 << 20, jnp.int32),
        active=jnp.ones(slots, jnp.bool_),
    )


def _outside(rig: Rig, batch: int, context: int, name: str, order: int) -> Point:
    """The same model over a full cache that others attend to: greedy tokens, nothing else."""
    caches = rig.caches(batch, context, None)
    roofline = decode_step(caches, rig.device)
    share = Guess(rig.device, XLA) if name == "xla" else Guess(rig.device)
    # eager kernels are launched one by one, while those before them run
    launched = TORCH_LAUNCHES * EAGER * rig.model.num_layers if name == "torch" else 0.0
    predicted = max(share(roofline.nbytes, OUTSIDE_LAUNCHES * rig.model.num_layers), launched) + CALL / AT_ONCE
    return Point(
        f"{PART}/{FULL} {name} {batch}x{context}",
        PART,
        {"arm": FULL, "implementation": name, "batch": batch, "context": context, "roofline": roofline.seconds,
         "budget": None, "views": FILLED},
        predicted,
        functools.partial(_measure_outside, rig, batch, context, name),
        roofline.nbytes,
        unfit=unserved(rig, name) or unfit(rig, caches),
        order=order,
    )  # fmt: skip


def _measure_outside(rig: Rig, batch: int, context: int, name: str) -> dict[str, Any]:
    model, count = rig.model, _timed(rig)
    if name == "torch":
        timed = torch_decode(rig, batch, context, context - 128, count)
        return {**timed, "tokens_per_second": batch / timed["seconds"]}
    shape = (batch, context, model.num_kv_heads, model.head_dim)
    kept = [[noise(shape, rig.dtype, 2 * layer), noise(shape, rig.dtype, 2 * layer + 1)]
            for layer in range(model.num_layers)]  # fmt: skip
    token = jnp.full(batch, 5, jnp.int32)
    # as long as those of the other arms, and again in every round: nothing is read of what the last one wrote
    position = jnp.full(batch, context - 128, jnp.int32)
    step = outside_steps(rig, functools.partial(OUTSIDE[name], scale=model.query_scale), count)
    held = [kept]

    def run() -> Any:
        held[0], last = step(rig.weights.trunk_leaves, rig.weights.leaves, held[0], token, position)
        return last

    timed = clock(run, rig.rounds, count)
    return {**timed, "tokens_per_second": batch / timed["seconds"]}


def outside_steps(rig: Rig, attend: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A function from weights, caches [B, C, K, D], tokens and their positions to the caches and the last tokens.

    The caches are donated. Greedy, and nothing of a sampler's: less than the engine's steps do.
    """
    weights = rig.weights

    @functools.partial(jax.jit, donate_argnums=2)
    def run(trunk_leaves: Any, leaves: Any, kept: Any, token: Any, position: Any) -> Any:
        decoder = weights.trunk.merge(trunk_leaves)

        def step(turn: Any, carry: Any) -> Any:
            kept, token = carry
            at = jnp.arange(token.shape[0]), position + turn
            x, new = decoder.embed(token), []
            for part, own_leaves, pair in zip(weights.parts, leaves, kept, strict=True):

                def reads(q: Any, k: Any, v: Any, pair: Sequence[Any] = pair) -> Any:
                    new.append([old.at[at].set(one, mode="drop") for old, one in zip(pair, (k, v), strict=True)])
                    return attend(q, *new[-1], at[1] + 1)

                x = part.merge(own_leaves)(x, at[1], reads)
            return new, jnp.argmax(decoder.head(x), axis=-1).astype(jnp.int32)

        return lax.fori_loop(0, count, step, (kept, token))

    return run
