"""Kernel support: whether kernels serve an engine, with the reason if not, known before a weight is read."""

import dataclasses
import logging

from kvjax.engine.config import ResolvedConfig
from kvjax.engine.device.abstract import abstract_steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models.sharding import tensor_mesh
from kvjax.pallas.dispatch import native, no_kernels

logger = logging.getLogger(__name__)


def resolve_backend(layout: ResolvedConfig) -> ResolvedConfig:
    """The layout for the devices that are here: "auto" is the reference where they are not those of the kernels.

    Raises:
        ValueError: kernels are requested by name, and no device here runs them.
    """
    elsewhere = layout.attention_backend == "reference" or ":" in layout.attention_backend
    reason = None if elsewhere else no_kernels()
    if reason is None:
        return layout
    if layout.attention_backend != "auto":
        raise ValueError(
            f"attention_backend={layout.attention_backend!r}: {reason}; choose --attention-backend reference, or auto"
        )
    logger.info("attention is computed in jax.numpy: %s", reason)
    return dataclasses.replace(layout, attention_backend="reference")


def check_kernels(caches: CacheConfig, devices: int) -> None:
    """Traces every step with the kernels that the layout asks for; where it asks for "auto", logs what they leave out.

    Args:
        devices: how many share the model.

    Raises:
        ValueError: kernels are requested by name and do not serve a step; says why, and what to choose.
    """
    backend, buckets = caches.layout.attention_backend, caches.layout.buckets
    if backend == "reference":
        return
    reasons: dict[str, list[str]] = {}
    name = native() if backend == "auto" else backend
    for bucket in {buckets[0], buckets[-1]}:  # what serves the shortest prompt and the longest serves those between
        for step, trace in abstract_steps(caches, tensor_mesh(devices), None, name, bucket).items():
            try:
                trace()
            except NotImplementedError as reason:
                reasons.setdefault(str(reason), []).append(step)
    listed = "; ".join(f"{reason} ({', '.join(dict.fromkeys(steps))})" for reason, steps in reasons.items())
    if reasons and backend != "auto":
        raise ValueError(
            f"attention_backend={backend!r} does not serve this engine: {listed}. Choose --attention-backend auto, "
            "which leaves that to jax.numpy, or reference"
        )
    if reasons:
        logger.info("kernels do not serve all, and jax.numpy does what they leave: %s", listed)
