"""An engine in front of each remote tier: its answers are the same to the bit, whatever becomes of what is stored."""

import time
from urllib.parse import urlsplit

import pytest

from kvjax.store.config import StoreConfig
from kvjax.store.guard import Guarded
from kvjax.store.names import object_name
from kvjax.store.tier import Tier
from tests.engine import tiny
from tests.engine.test_prefix import CHUNK, Everything, ask, engine_of, equal
from tests.engine.test_prefix_disk import forget_host
from tests.store.faulty_proxy import FAULTS, FaultyProxy
from tests.store.memory_tier import MemoryTier
from tests.store.web_server import WebServer

pytestmark = pytest.mark.heavy

PROMPT, FOUND = tiny.prompt(850, seed=5), 768
STORE = StoreConfig(host_cache_size=1 << 24, prefetch_policy="wait_complete")
DEADLINE, PATIENT = 0.3, 20.0  # seconds of a call, while there are faults and while there are none
SLACK = 20.0  # that a machine with other work may take for a prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def engine(folder):
    with engine_of(folder, STORE) as engine:
        engine._prefix.store.planner = Everything()
        yield engine


@pytest.fixture
def put_behind(engine):
    """Puts a tier behind the host tier of the engine, which holds nothing then."""
    store = engine._prefix.store

    def put(tier: Tier) -> Guarded:
        guard = Guarded(tier, PATIENT, threads=16, failures=2)
        forget_host(engine)
        store.replace_tiers((guard,))
        store._counters._counts.clear()
        return guard

    yield put
    store.replace_tiers(())
    forget_host(engine)


@pytest.fixture(scope="module")
def cold(engine):
    return ask(engine, PROMPT, "cold")


@pytest.mark.parametrize("kind", ["redis", "s3", "gcs"])
def test_what_a_remote_tier_had_is_answered_to_the_bit(engine, cold, put_behind, opened, request, kind):
    put_behind(opened(request.getfixturevalue(f"{kind}_url"), timeout=PATIENT))
    assert ask(engine, PROMPT).cached_tokens == 0
    for length in (FOUND - 1, FOUND, FOUND + 1, len(PROMPT)):
        forget_host(engine)
        warm = ask(engine, PROMPT[:length])
        assert warm.cached_tokens == (length - max(engine.caches.window, 1)) // CHUNK * CHUNK
        equal(cold if length == len(PROMPT) else ask(engine, PROMPT[:length], f"cold {length}"), warm)
    assert not engine.store_stats()["remote"].errors


def test_a_folder_that_a_web_server_shows(engine, cold, put_behind, opened):
    copied = MemoryTier()
    copied.name = "remote"
    put_behind(copied)
    ask(engine, PROMPT)
    server = WebServer()
    for stored in copied.scan():
        server.files[f"/kv/{object_name(stored.key)}"] = copied.load(stored.key)
    put_behind(opened(f"{server.url}/kv", timeout=PATIENT))
    warm = ask(engine, PROMPT)
    server.stop()
    assert warm.cached_tokens == FOUND
    equal(cold, warm)


@pytest.mark.slow(reason="a second engine compiles, for each kind of bucket")
@pytest.mark.parametrize("kind", ["redis", "s3", "gcs"])
def test_two_servers_share_a_bucket(engine, cold, folder, put_behind, opened, request, kind):
    url = request.getfixturevalue(f"{kind}_url")
    put_behind(opened(url, timeout=PATIENT))
    ask(engine, PROMPT)
    config = StoreConfig(
        host_cache_size=1 << 24, prefetch_policy="wait_complete", remote_cache=url, remote_deadline=PATIENT
    )
    with engine_of(folder, config) as other:
        warm = ask(other, PROMPT)
        assert warm.cached_tokens == FOUND
        equal(cold, warm)
        assert ask(other, PROMPT, "another tenant").cached_tokens == 0


@pytest.fixture
def proxy(redis_server):
    proxy = FaultyProxy(redis_server.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def redis_behind_proxy(engine, redis_url, proxy, put_behind, opened) -> Guarded:
    """With the KV of PROMPT."""
    url = redis_url.replace(f":{urlsplit(redis_url).port}", f":{proxy.port}")
    guard = put_behind(opened(url, timeout=PATIENT))
    ask(engine, PROMPT)
    forget_host(engine)
    guard.deadline = DEADLINE
    return guard


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_network_costs_a_recompute_until_it_is_left_alone_and_heals(
    engine, cold, redis_behind_proxy, proxy, fault
):
    guard = redis_behind_proxy
    guard._breaker.pause = 600.0
    proxy.set(fault)
    for turn in range(6):
        forget_host(engine)
        began = time.monotonic()
        warm = ask(engine, PROMPT)
        assert time.monotonic() - began < SLACK
        assert warm.cached_tokens == 0, turn
        equal(cold, warm)
        if guard.state == "open":
            break
    assert guard.state == "open", guard.errors
    forget_host(engine)
    before = guard.errors
    equal(cold, ask(engine, PROMPT))
    after = guard.errors
    assert after.pop("breaker") > before.pop("breaker", 0)
    assert after == before, "nobody is asked"
    proxy.set(None)
    guard.deadline, guard._breaker.pause = PATIENT, 0.0
    for _ in range(8):  # connections of before may still be broken, and a probe may get one
        forget_host(engine)
        warm = ask(engine, PROMPT)
        equal(cold, warm)
        if warm.cached_tokens == FOUND:
            break
    assert warm.cached_tokens == FOUND
    assert guard.state == "closed"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda blob: b"", "length"),
        (lambda blob: blob[:-1], "length"),
        (lambda blob: blob + b"x", "length"),
        (lambda blob: blob[::-1], "corrupt"),
        (lambda blob: bytes([*blob[:-1], blob[-1] ^ 1]), "corrupt"),
    ],
    ids=["empty", "cut", "longer", "other bytes", "one bit"],
)
def test_wrong_bytes_of_a_remote_cost_a_recompute(engine, cold, redis_behind_proxy, redis_url, harm, reason):
    import redis

    with redis.Redis.from_url(redis_url.split("?")[0]) as client:
        prefix = redis_url.split("prefix=")[1]
        names = list(client.scan_iter(f"{prefix}/*"))
        assert len(names) == 3
        for name in names:
            client.set(name, harm(client.get(name)))
    redis_behind_proxy.deadline = PATIENT
    warm = ask(engine, PROMPT)
    assert warm.cached_tokens == 0
    equal(cold, warm)
    assert set(engine.store_stats()["remote"].errors) == {reason}
    forget_host(engine)
    equal(cold, ask(engine, PROMPT))
