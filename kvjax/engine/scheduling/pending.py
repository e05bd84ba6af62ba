"""Pending dispatch: one on its way through the device, and the requests that its results are for."""

import dataclasses

import jax
import numpy as np

from kvjax.engine.active_request import ActiveRequest
from kvjax.engine.device.sampling import TokenSample


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatch whose result is not read yet, with the requests that held its columns then.

    Attributes:
        emitted: [N, B], of decode steps; None for a first token, whose sample is [1] instead of [N, B].
    """

    emitted: jax.Array | None
    sample: TokenSample
    holders: dict[int, ActiveRequest]

    def read(self) -> tuple[np.ndarray, TokenSample]:
        """Waits for it; returns `emitted` and the sample, both [N, B], on the host."""
        sample = jax.device_get(self.sample)
        if self.emitted is None:
            return np.ones((1, 1), np.bool_), jax.tree.map(lambda x: x[None], sample)
        return np.asarray(self.emitted), sample
