"""Retained shares: which parts of a prompt the views keep, in few numbers, for the positions are megabytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax.serve.limits import MAX_RETAINED_BINS
from kvjax.serve.tally import StreamTally


def summarise(layers: Sequence[Int[np.ndarray, "_ _"]], prompt_tokens: int) -> dict[str, Any]:
    """The share kept of each part of a prompt, for each layer, averaged over its heads.

    Args:
        layers: the positions [K, C] that each layer keeps, -1 where its view is empty.
        prompt_tokens: of these positions those in [0, prompt_tokens) are the prompt's.

    Returns:
        `layers` are lists of shares, one a bin. Bin i holds the tokens from `i * prompt_tokens // bins` up to where
        bin i + 1 begins; a prompt of few tokens has a bin for each.
    """
    bins = min(prompt_tokens, MAX_RETAINED_BINS)
    edges = np.arange(bins + 1) * prompt_tokens // bins
    widths = np.diff(edges)
    shares = []
    for positions in layers:
        here = positions[(positions >= 0) & (positions < prompt_tokens)]
        counts = np.add.reduceat(np.bincount(here, minlength=prompt_tokens), edges[:-1])
        shares.append(np.round(counts / (widths * len(positions)), 3).tolist())
    return {"prompt_tokens": prompt_tokens, "bins": bins, "layers": shares}


def extension(tally: StreamTally) -> dict[str, Any]:
    """The `kvjax` field of a choice that has ended, by name; {} unless the request has `return_retained`."""
    if tally.retained is None or tally.timing is None:
        return {}
    return {"kvjax": {"view_fraction": round(tally.timing.view_fraction, 4), "retained": tally.retained}}
