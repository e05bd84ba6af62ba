"""Search spaces, by the name that a config gives them."""

from typing import Literal

from kvjax.search.spaces.rocketkv import StageSpace
from kvjax.search.spaces.space import Candidate, EvictionSettings, SearchSpace
from kvjax.search.spaces.tokens import HeadSpace, TokenSpace

SpaceName = Literal["tokens", "heads", "rocketkv"]
SPACES: dict[SpaceName, type[SearchSpace]] = {"tokens": TokenSpace, "heads": HeadSpace, "rocketkv": StageSpace}

__all__ = [
    "SPACES",
    "Candidate",
    "EvictionSettings",
    "HeadSpace",
    "SearchSpace",
    "SpaceName",
    "StageSpace",
    "TokenSpace",
]
