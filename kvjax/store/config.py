"""Store configuration: tiers, sizes and policies; frozen, validated once."""

import dataclasses
from pathlib import Path

from kvjax.store.eviction import POLICIES

PREFETCH = ("timeout", "best_effort", "wait_complete")
WRITE = ("write_through", "write_through_selective", "write_back")
PROMOTION = ("retain", "temporary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Sizes in bytes, times in seconds.

    Attributes:
        host_cache_size: of memory for blocks; all of it is allocated at the start. Every block passes through it.
        host_cache_auto: whether `host_cache_size` was derived from the model instead of given, for reports.
        disk_cache: a folder for blocks; None for no disk tier.
        disk_cache_size: most that may lie under that folder, whatever it is.
        disk_sync: whether a block on the disk survives a power cut, not only a crash of the server.
        remote_cache: URL of a remote tier; None for none.
        tiers: URLs of more tiers, nearest first: `disk:///path?size=100GiB&sync=yes`, a form of
            `url.FORMS`, or the path of a class of your own, `package.module:Class?option=value`. They come behind
            `disk_cache` and before `remote_cache`.
        disk_deadline, remote_deadline: most that one call to such a tier may take.
        prefetch_policy: how long a waiting request lets blocks come nearer: until a slot is free, until they are all
            there, or for `prefetch_base` seconds and `prefetch_per_1k` more for each 1,000 tokens that are stored.
        write_policy: when a block goes to the tiers below: at once, once it was found `selective_hits` times, or when
            it leaves the host.
        promotion: whether a block that came from below stays in the host tier after its use.
        eviction_policy: which block leaves a full tier first.
        verify_hits: share of the hits that are computed all the same and compared, bit by bit.
        store_generated: whether the KV of generated tokens is kept as well, and found by prompts that go on from there.
            It is what decode steps computed, so an answer may be another one than after computing the whole prompt.

    Raises:
        ValueError: settings that are none, or do not go together; says which.
    """

    host_cache_size: int
    host_cache_auto: bool = False
    disk_cache: Path | None = None
    disk_cache_size: int = 0
    disk_sync: bool = False
    remote_cache: str | None = None
    tiers: tuple[str, ...] = ()
    disk_deadline: float = 10.0
    remote_deadline: float = 5.0
    prefetch_policy: str = "timeout"
    prefetch_base: float = 1.0
    prefetch_per_1k: float = 0.25
    write_policy: str = "write_through"
    selective_hits: int = 2
    promotion: str = "retain"
    eviction_policy: str = "lru"
    verify_hits: float = 0.0
    store_generated: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("prefetch_policy", PREFETCH),
            ("write_policy", WRITE),
            ("promotion", PROMOTION),
            ("eviction_policy", tuple(POLICIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        for name in ("host_cache_size", "disk_cache_size", "prefetch_base", "prefetch_per_1k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.verify_hits <= 1:
            raise ValueError(f"verify_hits={self.verify_hits} is a share, from 0 to 1")
        for name in ("disk_deadline", "remote_deadline", "selective_hits"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if (self.disk_cache is None) != (self.disk_cache_size == 0):
            raise ValueError("a disk tier takes both a folder (--disk-cache) and a size (--disk-cache-size)")
        if not self.host_cache_size and (self.disk_cache or self.remote_cache or self.tiers or self.store_generated):
            raise ValueError("blocks of every tier pass through host memory: give --host-cache-size as well")

    def patience(self, tokens: int) -> float:
        """Seconds that a request waits for so many stored tokens, if its turn has come."""
        if self.prefetch_policy == "best_effort":
            return 0.0
        if self.prefetch_policy == "wait_complete":
            return LONGEST_WAIT
        return min(self.prefetch_base + self.prefetch_per_1k * tokens / 1000, LONGEST_WAIT)


LONGEST_WAIT = 60.0  # no tier may hold a request longer, whatever the policy
