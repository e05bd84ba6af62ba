"""Small blocks for tests: a format, prompts, and the KV that belongs to each name."""

import numpy as np

from kvjax.store.block import DTYPES, BlockLayout
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS, BlockKey, Namespace
from kvjax.store.store import KVStore
from kvjax.store.tier import Tier

FORMAT = BlockLayout(layers=2, kv_heads=2, head_dim=4, dtype="float32")
NAMESPACE = Namespace(
    weights="w" * 64, tokenizer="t" * 64, rope="theta=10000", numerics="jax 0.11 cpu chunk=512", dtype="float32",
    shape="2 x 2 x 4",
)  # fmt: skip


def names_of(blocks: int, seed: int = 0, salt: str = "") -> list[BlockKey]:
    """The chain of a prompt of so many whole blocks."""
    tokens = np.random.default_rng(seed).integers(0, 1000, blocks * BLOCK_TOKENS, np.int32)
    return BlockKey.chain(NAMESPACE.root(salt), tokens)


def kv_of(name: BlockKey, format: BlockLayout = FORMAT) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V of every layer: a function of the name, so that anybody can say what ought to be there."""
    rng = np.random.default_rng(list(name.key))
    dtype = DTYPES[format.dtype][1]
    pairs = rng.standard_normal((format.layers, 2, *format.shape), np.float32).astype(dtype)
    return [(k, v) for k, v in pairs]


def blob_of(name: BlockKey, format: BlockLayout = FORMAT) -> np.ndarray:
    """The bytes of a block as tiers hold them."""
    blob = np.zeros(format.nbytes, np.uint8)
    for layer, (k, v) in enumerate(kv_of(name, format)):
        keys, values = format.tensors(blob, layer)
        keys[...], values[...] = k, v
    format.seal(blob, name)
    return blob


def save(store: KVStore, names: list[BlockKey]) -> None:
    """Saves those of the blocks that are not there."""
    with store.insert(names) as saving:
        for index in saving.wanted:
            for layer, (k, v) in enumerate(kv_of(names[index])):
                saving.fill(index, layer, k, v)


def forget_host(store: KVStore) -> None:
    """Only the tiers below hold anything now."""
    with store._mutex:
        for buffer in store._host.ready():
            store._host._drop(buffer)


def holds(blob: np.ndarray, name: BlockKey) -> bool:
    """Whether these bytes are the right KV."""
    pairs = zip([FORMAT.tensors(blob, layer) for layer in range(FORMAT.layers)], kv_of(name), strict=True)
    return all((k == key).all() and (v == value).all() for (k, v), (key, value) in pairs)


def store_of(*below: Tier, blocks: int = 8, **settings) -> KVStore:
    """A store whose host tier has room for so many blocks."""
    stride = -(-FORMAT.nbytes // 4096) * 4096
    return KVStore(FORMAT, StoreConfig(host_cache_size=blocks * stride, **settings), below)
