"""Bandwidth of a device: copies in its memory, reads from it, and transfers to the host and back.

A part of `benchmarks.device`, the first one: all other figures are a share of its copy. Host memory is of two kinds:
what NumPy allocates, through which a runtime passes it in small parts, and "pinned", which the device reaches itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from benchmarks.device.clock import clock, turns
from benchmarks.device.point import COPY, Point
from benchmarks.device.rig import Rig

PART = "copies"
DEVICE_COPY = f"{PART}/device copy"
# of the link's published rate, what is expected from memory of NumPy's, and from pinned memory
PAGEABLE, PINNED = 0.15, 0.8


def points(rig: Rig) -> list[Point]:
    large, small = (1 << 22, 1 << 20) if rig.quick else (4 << 30, 512 << 20)
    link = rig.device.chip.host_link
    host = {
        "host to device": (_to_device, PAGEABLE),
        "device to host": (_to_host, PAGEABLE),
        "pinned host to device": (functools.partial(_pinned, back=False), PINNED),
        "device to pinned host": (functools.partial(_pinned, back=True), PINNED),
    }
    inside = {"device copy": (_copy, 2 * large), "device read": (_read, large)}

    def point(name: str, measure: Callable[[], Any], nbytes: int, predicted: float) -> Point:
        return Point(f"{PART}/{name}", PART, {"copy": name}, predicted, measure, nbytes, order=0)

    rows = []
    for name, (measure, nbytes) in inside.items():
        predicted = nbytes / (COPY * rig.device.bandwidth)
        count = 1 if rig.quick else turns(predicted, 1)
        rows.append(point(name, functools.partial(measure, large, count, rig.rounds), nbytes, predicted))
    for name, (measure, share) in host.items():
        rows.append(point(name, functools.partial(measure, small, rig.rounds), small, small / (share * link)))
    return rows


def _copy(nbytes: int, count: int, rounds: int) -> dict[str, float]:
    """Every byte is read, changed and written: in place, as a cache is updated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(x: Any) -> Any:
        return lax.fori_loop(0, count, lambda turn, x: x ^ turn.astype(x.dtype), x)

    held = [jnp.ones(nbytes // 4, jnp.uint32)]

    def once() -> Any:
        held[0] = run(held[0])
        return held[0]

    return clock(once, rounds, count)


def _read(nbytes: int, count: int, rounds: int) -> dict[str, float]:
    """Every byte is read; what is written is one number."""

    @jax.jit
    def run(x: Any) -> Any:
        def body(turn: Any, total: Any) -> Any:
            return total + jnp.sum(x ^ (total + turn.astype(x.dtype)), dtype=x.dtype)

        return lax.fori_loop(0, count, body, jnp.uint32(0))

    x = jnp.ones(nbytes // 4, jnp.uint32)
    return clock(lambda: run(x), rounds, count)


def _to_device(nbytes: int, rounds: int) -> dict[str, float]:
    x = np.ones(nbytes // 4 + 1, np.uint32)[1:]  # beside the alignment at which a CPU backend would share it
    return clock(lambda: jax.device_put(x), rounds)


def _to_host(nbytes: int, rounds: int) -> dict[str, float]:
    """An array keeps what was copied of it: each time another one."""
    made = iter([jax.block_until_ready(jnp.full(nbytes // 4, seed, jnp.uint32)) for seed in range(rounds + 1)])
    return clock(lambda: np.array(next(made)), rounds)


def _pinned(nbytes: int, rounds: int, *, back: bool) -> dict[str, float]:
    """Raises RuntimeError where the device reaches no host memory of its own."""
    device = jax.devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        raise RuntimeError(f"memory of {device.device_kind} is {', '.join(sorted(kinds))}: none is pinned_host")
    near = SingleDeviceSharding(device)
    far = SingleDeviceSharding(device, memory_kind="pinned_host")
    source, target = (near, far) if back else (far, near)
    x = jax.block_until_ready(jax.device_put(jnp.ones(nbytes // 4, jnp.uint32), source))
    return clock(lambda: jax.device_put(x, target), rounds)
