"""Dispatch of an operation to an implementation: the one given by name, or the platform's where it serves the case."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

REFERENCE = "reference"
HOPPER = "9.0"  # the compute capability that the kernels for GPUs are for
_PLATFORMS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
_log = logging.getLogger(__name__)


def dispatch(
    operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None, *arguments: Any, **options: Any
) -> Any:
    """Calls an implementation of an operation.

    Args:
        implementations: by name; `reference` is among them and serves every case.
        name: which; None for that of the devices JAX runs on (`native`), and for the reference where there is none
            or it does not serve the case.

    Raises:
        ValueError: there is none of that name.
        NotImplementedError: the one given by name does not serve the case; says why.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"{operation} has no implementation {name!r}: one of {', '.join(implementations)}")
        return implementations[name](*arguments, **options)
    name = native()
    if name in implementations and name != REFERENCE:
        try:
            return implementations[name](*arguments, **options)
        except NotImplementedError as reason:
            _log.debug("%s runs as jax.numpy: %s", operation, reason)
    return implementations[REFERENCE](*arguments, **options)


def native() -> str:
    """The implementation for the devices JAX runs on; the reference where no kernels are for them."""
    return REFERENCE if no_kernels() else _PLATFORMS[jax.default_backend()]


def no_kernels() -> str | None:
    """Why the devices JAX runs on have no kernels; None if they have."""
    platform, device = jax.default_backend(), jax.devices()[0]
    if platform not in _PLATFORMS:
        return f"there are no kernels for a {platform.upper()}"
    capability = getattr(device, "compute_capability", HOPPER)
    if _PLATFORMS[platform] == "gpu" and capability != HOPPER:
        return f"{device.device_kind} has compute capability {capability}, and the kernels are for {HOPPER}, Hopper"
    return None
