"""Timing on a device that works asynchronously: waits for the result, repeats, takes the median."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOOP = 0.03  # seconds of work in one call, beside which what a call costs the host is little
MOST = 500  # turns of a loop
TINY = 1e-30  # of a result enters the next call's input, whose rounding takes it away again


def clock(run: Callable[[], Any], rounds: int, each: int = 1) -> dict[str, float]:
    """Seconds of one of the `each` things that a call of `run` does, after one call that compiles and warms up.

    Args:
        run: returns arrays that are there once it is done.
    """
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append((time.perf_counter() - began) / each)
    return {"seconds": statistics.median(taken), "low": min(taken), "high": max(taken), "rounds": rounds}


def turns(seconds: float, calls: int) -> int:
    """Rounds of a loop of so many calls, if a call takes so long."""
    return max(1, min(math.ceil(LOOP / (calls * seconds)), MOST))


def looped(operation: Callable[..., Any], first: Any, sets: Sequence[tuple[Any, ...]], count: int) -> Callable[[], Any]:
    """Calls `operation(x, *arrays)` on the device: over each of the sets of arrays, and all of that `count` times.

    A kernel of microseconds is shorter than what a call of its own costs the host. Each call's `x` depends on all of
    what the last one gave, so that none is left out or moved out of the loop; reading that is part of what is timed.
    """

    @jax.jit
    def run(x: Any, sets: Any) -> Any:
        def body(_: Any, x: Any) -> Any:
            for arrays in sets:
                leaves = jax.tree.leaves(operation(x, *arrays))
                total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)
                x = x + (TINY * total).astype(x.dtype)
            return x

        return lax.fori_loop(0, count, body, x)

    return lambda: run(first, tuple(sets))
