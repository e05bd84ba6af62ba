"""Opening a store: the tiers that its configuration names, nearest first, each behind a guard."""

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from kvjax.store.block import BlockLayout
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.eviction import POLICIES
from kvjax.store.guard import Guarded
from kvjax.store.managed_tier import LOADS, WRITES
from kvjax.store.sizes import memory
from kvjax.store.store import KVStore
from kvjax.store.tier import Tier
from kvjax.store.url import open_tier

THREADS = LOADS + WRITES + 2  # calls of one tier at once: also a look-up and a touch
DISK_FORM = "disk:///path?size=100GiB&sync=yes"


def open_store(layout: BlockLayout, config: StoreConfig) -> KVStore:
    """Opens every tier that `config` names.

    Raises:
        TierError: the folder of a disk tier cannot be used.
        ValueError: a URL of no known form; says which there are.
        ImportError: a package is missing for it; says what to install.
    """
    below: list[Tier] = []
    try:
        if config.disk_cache is not None:
            below.append(_disk(config, config.disk_cache, config.disk_cache_size, config.disk_sync))
        for url in config.tiers:
            below.append(_by_url(config, url))
        if config.remote_cache is not None:
            below.append(_remote(config, config.remote_cache))
    except BaseException:
        for tier in below:
            tier.close()
        raise
    return KVStore(layout, config, below)


def _by_url(config: StoreConfig, url: str) -> Tier:
    if not url.startswith("disk:"):
        return _remote(config, url)
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = options.keys() - {"size", "sync"}
    if parts.netloc or not parts.path.startswith("/") or unknown or "size" not in options:
        raise ValueError(f"tier {url!r}: write {DISK_FORM}, where sync may be left out")
    if options.get("sync", "no") not in ("yes", "no"):
        raise ValueError(f"tier {url!r}: sync={options['sync']!r} is neither yes nor no")
    try:
        size = memory(options["size"])
    except ValueError as error:
        raise ValueError(f"tier {url!r}: size={options['size']!r}: {error}") from error
    return _disk(config, Path(unquote(parts.path)), size, options.get("sync") == "yes")


def _disk(config: StoreConfig, root: Path, size: int, sync: bool) -> Tier:
    disk = DiskTier(root, size, policy=POLICIES[config.eviction_policy](), sync=sync)
    # no copies: they would be most of the time that a read from the page cache takes
    return Guarded(disk, deadline=config.disk_deadline, attempts=1, threads=THREADS, copies=False)


def _remote(config: StoreConfig, url: str) -> Tier:
    remote = open_tier(url, timeout=config.remote_deadline)
    return Guarded(remote, deadline=config.remote_deadline, threads=THREADS)
