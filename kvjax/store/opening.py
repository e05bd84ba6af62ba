"""A store from its configuration: which tiers there are, and in what order."""

from kvjax.store.block import BlockLayout
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.eviction import POLICIES
from kvjax.store.guard import Guarded
from kvjax.store.store import KVStore
from kvjax.store.tier import Tier
from kvjax.store.url import open_tier


def open_store(format: BlockLayout, config: StoreConfig) -> KVStore:
    """Opens every tier that `config` names.

    Raises:
        TierError: the folder of the disk tier cannot be used.
        ValueError: a URL of no known form; says which there are.
        ImportError: a package is missing for it; says what to install.
    """
    below: list[Tier] = []
    if config.disk_cache is not None:
        below.append(
            DiskTier(
                config.disk_cache,
                config.disk_cache_size,
                policy=POLICIES[config.eviction_policy](),
                sync=config.disk_sync,
            )
        )
    if config.remote_cache is not None:
        remote = open_tier(config.remote_cache, timeout=config.remote_deadline)
        below.append(Guarded(remote, deadline=config.remote_deadline))
    return KVStore(format, config, below)
