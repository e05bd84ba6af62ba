"""Which implementation of an operation runs: the one asked for by name, or the platform's if it serves the case."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

REFERENCE = "reference"
_PLATFORMS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
_log = logging.getLogger(__name__)


def dispatch(
    operation: str, implementations: Mapping[str, Callable[..., Any]], name: str | None, *arguments: Any, **options: Any
) -> Any:
    """Calls an implementation of an operation.

    Args:
        implementations: by name; `reference` is among them and serves every case.
        name: which; None for that of the platform JAX runs on, and for the reference where the platform has none or
            its own does not serve the case.

    Raises:
        ValueError: there is none of that name.
        NotImplementedError: the one asked for by name does not serve the case; says why.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"{operation} has no implementation {name!r}: one of {', '.join(implementations)}")
        return implementations[name](*arguments, **options)
    name = _PLATFORMS.get(jax.default_backend(), REFERENCE)
    if name in implementations and name != REFERENCE:
        try:
            return implementations[name](*arguments, **options)
        except NotImplementedError as reason:
            _log.info("%s runs as jax.numpy: %s", operation, reason)
    return implementations[REFERENCE](*arguments, **options)
