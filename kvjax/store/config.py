"""What a store is made of and how it behaves: frozen, validated once."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from kvjax.store.eviction import POLICIES

Prefetch = Literal["best_effort", "wait_complete", "timeout"]
Write = Literal["write_through", "write_through_selective", "write_back"]
Promotion = Literal["retain", "temporary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Sizes in bytes, times in seconds.

    Attributes:
        host_bytes: of memory for chunks; all of it is allocated at the start. Every chunk passes through it.
        disk: a folder for chunks; None for no disk tier.
        disk_bytes: most that may lie under that folder, whatever it is.
        sync: whether a chunk on the disk survives a power cut, not only a crash of the server.
        remote: URL of a remote tier; None for none.
        remote_deadline: most that one call to the remote tier may take.
        prefetch: how long a waiting request lets chunks come nearer: until a slot is free, until they are all there,
            or for `prefetch_base` seconds and `prefetch_per_1k` more for each 1,000 tokens that are stored.
        write: when a chunk goes to the tiers below: at once, once it was found `selective_hits` times, or when it
            leaves the host.
        promotion: whether a chunk that came from below stays in the host tier after its use.
        eviction: which chunk leaves a full tier first.
    """

    host_bytes: int
    disk: Path | None = None
    disk_bytes: int = 0
    sync: bool = False
    remote: str | None = None
    remote_deadline: float = 5.0
    prefetch: Prefetch = "timeout"
    prefetch_base: float = 1.0
    prefetch_per_1k: float = 0.25
    write: Write = "write_through"
    selective_hits: int = 2
    promotion: Promotion = "retain"
    eviction: str = "lru"

    def __post_init__(self) -> None:
        for name, choices in (
            ("prefetch", get_args(Prefetch)),
            ("write", get_args(Write)),
            ("promotion", get_args(Promotion)),
            ("eviction", tuple(POLICIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        for name in ("host_bytes", "disk_bytes", "prefetch_base", "prefetch_per_1k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.remote_deadline <= 0 or self.selective_hits < 1:
            raise ValueError(f"remote_deadline={self.remote_deadline} and selective_hits must be positive")
        if (self.disk is None) != (self.disk_bytes == 0):
            raise ValueError("a disk tier takes both a folder (disk) and a size (disk_bytes)")
        if not self.host_bytes and (self.disk or self.remote):
            raise ValueError("chunks of a disk or a remote tier pass through host memory: give host_bytes as well")

    def patience(self, tokens: int) -> float:
        """Seconds that a request waits for so many stored tokens, if its turn has come."""
        if self.prefetch == "best_effort":
            return 0.0
        if self.prefetch == "wait_complete":
            return LONGEST_WAIT
        return min(self.prefetch_base + self.prefetch_per_1k * tokens / 1000, LONGEST_WAIT)


LONGEST_WAIT = 60.0  # no tier may hold a request longer, whatever the policy
