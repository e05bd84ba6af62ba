"""Baselines of torch: its `scaled_dot_product_attention` over one cache, and decode steps of the whole model with it.

Arrays are JAX's, which torch reads and writes where they lie. Torch runs eagerly: its host launches each kernel while
the device works on those before, and is the limit where a step is shorter than that takes.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.device.rig import Rig, noise
from kvjax.models.rope import rotation


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
    queries, keys, values = (shared(x) for x in (q, k, v))
    return _timed(lambda: _attend(queries, keys, values, scale), rounds, calls)


def shared(x: Array) -> Any:
    """A torch tensor over an array of JAX's, in the same memory.

    Raises:
        RuntimeError: torch sees another device than JAX.
    """
    import torch

    tensor = torch.from_dlpack(jax.block_until_ready(x))
    if jax.default_backend() == "gpu" and not tensor.is_cuda:
        raise RuntimeError(f"torch {torch.__version__} has no CUDA: it would compute on the CPU")
    return tensor


def torch_decode(rig: Rig, batch: int, context: int, length: int, count: int) -> dict[str, Any]:
    """Seconds of a step of the whole model over full caches [B, C, K, D], after so many tokens, `count` at a time."""
    model = rig.model
    shape = (batch, context, model.num_kv_heads, model.head_dim)
    kept = [
        (noise(shape, rig.dtype, 2 * layer), noise(shape, rig.dtype, 2 * layer + 1))
        for layer in range(model.num_layers)
    ]
    steps = TorchSteps(rig, kept, length, count)
    token = shared(jnp.full(batch, 5, jnp.int32)).long()
    return _timed(lambda: steps(token), rig.rounds, 1, count)


class TorchSteps:
    """Greedy decode steps, all slots at the same position, which begin at `length` again at every call.

    Args:
        kept: of each layer K and V [B, C, K, D], whose entries from `length` on are written.
    """

    def __init__(self, rig: Rig, kept: Sequence[tuple[Array, Array]], length: int, count: int) -> None:
        import torch

        self._torch, self._model, self._begin = torch, rig.model, length
        self._arrays = kept  # torch does not keep them alive
        self._kept = [(shared(k), shared(v)) for k, v in kept]
        decoder = rig.decoder
        self._layers = [
            {
                "attention_norm": shared(layer.attention_norm.weight[...]),
                "mlp_norm": shared(layer.mlp_norm.weight[...]),
                **{name: shared(getattr(layer.attention, name)[...]) for name in ("query", "key", "value", "output")},
                **{name: shared(getattr(layer.mlp, name)[...]) for name in ("gate", "up", "down")},
            }
            for layer in decoder.layers
        ]
        self._ends = [shared(x[...]) for x in (decoder.embedding, decoder.norm.weight, decoder.unembedding)]
        # [N, 1, D / 2]: of each step, for all slots and heads
        at = jnp.arange(length, length + count)
        self._rotation = [shared(jnp.asarray(x)) for x in rotation(rig.model.layers[0].rope, at)]

    def __call__(self, token: Any) -> Any:
        """The last of `count` tokens [B]."""
        embedding, norm, unembedding = self._ends
        with self._torch.inference_mode():
            for step in range(len(self._rotation[0])):
                x = embedding[token]
                for layer, kept in zip(self._layers, self._kept, strict=True):
                    x = self._layer(x, layer, kept, step)
                token = self._product(self._norm(x, norm), unembedding).argmax(-1)
        return token

    def _layer(self, x: Any, layer: dict[str, Any], kept: tuple[Any, Any], step: int) -> Any:
        functional, model, at = self._torch.nn.functional, self._model, self._begin + step
        normed = self._norm(x, layer["attention_norm"])
        q, k, v = (self._product(normed, layer[name]) for name in ("query", "key", "value"))
        for whole, one in zip(kept, (self._rotate(k, step), v), strict=True):
            whole[:, at] = one
        attended = _attend(self._rotate(q, step), *(whole[:, : at + 1] for whole in kept), model.query_scale)
        x = x + self._product(attended.flatten(1), layer["output"])
        normed = self._norm(x, layer["mlp_norm"])
        wide = functional.silu(self._product(normed, layer["gate"])) * self._product(normed, layer["up"])
        return x + self._product(wide, layer["down"])

    def _product(self, x: Any, weight: Any) -> Any:
        """Outputs stand first in a weight; those of a head stay apart."""
        out = self._torch.nn.functional.linear(x, weight.reshape(-1, x.shape[-1]))
        outputs = weight.shape[:-1] if weight.shape[-1] == x.shape[-1] else weight.shape[:1]
        return out.reshape(len(x), *outputs)

    def _norm(self, x: Any, weight: Any) -> Any:
        return self._torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, self._model.norm_eps)

    def _rotate(self, x: Any, step: int) -> Any:
        cos, sin = (each[step] for each in self._rotation)
        first, second = x.float().chunk(2, -1)
        turned = self._torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)


def _attend(q: Any, k: Any, v: Any, scale: float) -> Any:
    """q [B, H, D] over k, v [B, C, K, D]."""
    import torch

    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=True)
    return out[:, :, 0]


def _timed(run: Callable[[], Any], rounds: int, calls: int, each: int = 1) -> dict[str, Any]:
    """Seconds of one of the `each` things that a call does."""
    import torch

    with_events = jax.default_backend() == "gpu"
    taken = _by_events(torch, run, rounds, calls) if with_events else _by_clock(run, rounds, calls)
    taken = [seconds / each for seconds in taken]
    timing = {"seconds": statistics.median(taken), "low": min(taken), "high": max(taken), "rounds": rounds}
    return timing | {"version": torch.__version__}


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
