"""Attention of one token a slot over all of a cache, by others: what our own best has to be compared with.

Each knows that several query heads share a kv head, and repeats nothing. Caches lie token by token, as they want them.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jaxtyping import Array, Float, Int


def jax_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B C K D"],
    v: Float[Array, "B C K D"],
    entries: Int[Array, "B"] | None = None,
    *,
    scale: float,
    implementation: str,
) -> Float[Array, "B H D"]:
    """`jax.nn.dot_product_attention` over the first `entries` of each slot, or over all of them."""
    out = jax.nn.dot_product_attention(
        q[:, None], k, v, scale=scale, key_value_seq_lengths=entries, implementation=implementation
    )  # pyright: ignore[reportCallIssue, reportArgumentType]
    return out[:, 0]


OUTSIDE: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {name: functools.partial(jax_attention, implementation=name) for name in ("xla", "cudnn")}
)


def torch_seconds(
    q: Float[Array, "B H D"],
    k: Float[Array, "B C K D"],
    v: Float[Array, "B C K D"],
    *,
    scale: float,
    rounds: int,
    calls: int = 5,
) -> dict[str, Any]:
    """Seconds of torch's `scaled_dot_product_attention` on the same arrays, in the same memory where torch can see it.

    Raises:
        RuntimeError: torch sees another device than JAX.
    """
    import torch

    jax.block_until_ready((q, k, v))
    queries, keys, values = (torch.from_dlpack(x) for x in (q, k, v))
    gpu = queries.is_cuda
    if jax.default_backend() == "gpu" and not gpu:
        raise RuntimeError(f"torch {torch.__version__} has no CUDA: it would compute on the CPU")
    queries, (keys, values) = queries[:, :, None], (x.transpose(1, 2) for x in (keys, values))

    def run() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=True)

    taken = _by_events(torch, run, rounds, calls) if gpu else _by_clock(run, rounds, calls)
    return {"seconds": statistics.median(taken), "low": min(taken), "high": max(taken), "version": torch.__version__}


def _by_events(torch: Any, run: Callable[[], Any], rounds: int, calls: int) -> Sequence[float]:
    """Times of the device's own, between two of its events."""
    taken = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / calls)
    return taken[1:]


def _by_clock(run: Callable[[], Any], rounds: int, calls: int) -> Sequence[float]:
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - began) / calls)
    return taken[1:]
