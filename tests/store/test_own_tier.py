"""A tier defined outside the library, behind the disk of an engine, by the path of its class."""

import dataclasses
from collections.abc import Iterator

import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.store.config import StoreConfig
from kvjax.store.names import object_name
from kvjax.store.tier import Stored, Tier, TierError
from kvjax.store.url import open_tier
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle
from tests.store.contract import TierContract, fill

SHELVES: dict[str, dict[str, bytes]] = {}  # the service behind the tier: it outlives engines


class ShelfTier(Tier):
    """Objects in a dictionary of this process."""

    name = "shelf"

    def __init__(self, shelf: str) -> None:
        self._objects: dict[str, bytes] | None = SHELVES.setdefault(shelf, {})

    def read(self, key: str, into: memoryview) -> bool:
        blob = self._open(key).get(key)
        if blob is None:
            return False
        if len(blob) != into.nbytes:
            raise TierError("length", f"{key} has {len(blob)} bytes, expected {into.nbytes}")
        into[:] = blob
        return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        self._open(key)[key] = bytes(blob)

    def contains(self, key: str) -> bool:
        return key in self._open(key)

    def delete(self, key: str) -> None:
        self._open(key).pop(key, None)

    def scan(self) -> Iterator[Stored]:
        return iter([Stored(key, len(blob)) for key, blob in self._open("0000").copy().items()])

    def close(self) -> None:
        self._objects = None

    def _open(self, key: str) -> dict[str, bytes]:
        object_name(key)  # raises for what is no key
        if self._objects is None:
            raise TierError("refused", "closed")
        return self._objects


PATH = f"{__name__}:{ShelfTier.__name__}"


class TestShelfTier(TierContract):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        yield fill(open_tier(f"{PATH}?shelf=contract"))
        SHELVES.clear()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (PATH, "options \\[\\].*shelf"),
        (f"{PATH}?colour=red", "options \\['colour'\\]"),
        (f"{PATH}?shelf=a&shelf=b", "twice"),
        (f"{__name__}:NoTier", "cannot be imported"),
        ("no.such.module:Tier", "cannot be imported"),
        (f"{__name__}:fill", "derive it from kvjax.store.tier.Tier"),
        ("builtins:dict", "derive it from kvjax.store.tier.Tier"),
    ],
)
def test_a_path_that_is_no_tier(url, says):
    with pytest.raises(ValueError, match=says):
        open_tier(url)


@pytest.mark.heavy
def test_an_engine_serves_from_a_tier_behind_the_disk(tmp_path):
    folder, prompt = tiny.write(tmp_path / "model"), tiny.prompt(850, seed=11)

    def serve(disk: str) -> tuple:
        """The answer and the counters of the tiers, of a new engine with an empty host tier."""
        store = StoreConfig(
            host_cache_size=1 << 22,
            disk_cache=tmp_path / disk,
            disk_cache_size=1 << 30,
            tiers=(f"{PATH}?shelf=served",),
            prefetch_policy="wait_complete",
        )
        config = EngineConfig(max_model_len=900, max_num_seqs=2, prefill_chunk_size=256, store=store)
        with Engine.from_pretrained(folder, config) as engine:
            [answer] = generate(engine, [(prompt, dataclasses.replace(GREEDY, logprobs=3))])
            settle(engine)
            engine.drain(20.0)
            return answer, engine.store_stats()

    cold, _ = serve("first disk")
    assert cold.cached_tokens == 0
    assert len(SHELVES["served"]) >= 3
    warm, tiers = serve("another disk")
    assert list(tiers) == ["host", "disk", "shelf"], "nearest first"
    assert warm.cached_tokens == 768
    assert (tiers["disk"].hits, tiers["shelf"].hits) == (0, 3)
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
