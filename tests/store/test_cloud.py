"""The tiers of TensorStore's cloud drivers, against moto's S3 and our own part of Google's API."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvjax.store.tier import Tier, TierError
from tests.store.contract import TierContract, blob, fill, key, read


class CloudContract(TierContract):
    knows_sizes = False  # TensorStore does not say

    @pytest.fixture
    def tier(self, url, opened) -> Tier:
        return fill(opened(url, timeout=20.0))

    def test_what_is_beside_the_prefix_is_not_ours(self, tier, url, opened):
        place, _, query = url.partition("?")
        beside = opened(f"{place}-beside?{query}" if query else f"{place}-beside", timeout=20.0)
        beside.write(key(60), blob(60))
        assert not tier.contains(key(60))
        assert {stored.key for stored in tier.scan()} == {key(0), key(1), key(2)}

    def test_strangers_under_the_prefix_are_not_listed(self, tier):
        for name in ("notes.txt", f"{key(1)[:2]}/{key(1)}.tmp", f"zz/{key(1)}"):
            tier._store.write(name, b"x").result(timeout=20.0)
        assert {stored.key for stored in tier.scan()} == {key(0), key(1), key(2)}


class TestS3(CloudContract):
    @pytest.fixture
    def url(self, s3_url) -> str:
        return s3_url

    def test_threads_that_write_the_same(self, tier):
        """moto closes an object that is replaced while its first writer is answered: that one may hear of a fault."""

        def write(_: int) -> str | None:
            try:
                tier.write(key(50), blob(50, 300_000))
            except TierError as error:
                return error.reason
            return None

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(write, range(16))) <= {None, "io"}
        tier.write(key(50), blob(50, 300_000))
        assert read(tier, 50, 300_000) == bytes(blob(50, 300_000))

    def test_without_a_region_the_server_is_asked(self, tier, url, opened):
        assert opened(url.replace("&region=us-east-1", ""), timeout=20.0).contains(key(1))


class TestGcs(CloudContract):
    @pytest.fixture
    def url(self, gcs_url) -> str:
        return gcs_url


def test_requests_that_stall_do_not_hold_their_connections():
    """In a process of its own: TensorStore reads how long a request may stall once."""
    program = """
        import socket, threading, time
        from kvjax.store import cloud
        from kvjax.store.tier import TierError

        cloud.WATCHDOG["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"
        cloud.CONCURRENCY = 2
        listener = socket.create_server(("127.0.0.1", 0))
        hung_up = threading.Semaphore(0)

        def serve():
            while True:
                peer, _ = listener.accept()
                threading.Thread(target=listen, args=(peer,), daemon=True).start()

        def listen(peer):
            while peer.recv(9999):
                pass
            hung_up.release()

        threading.Thread(target=serve, daemon=True).start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        tier = cloud.CloudTier("s3", "kvjax-test", endpoint=endpoint, region="us-east-1", timeout=0.1)
        for _ in range(2):
            try:
                tier.contains("abcd")
            except TierError as error:
                print(error.reason)
        for _ in range(2):
            print(hung_up.acquire(timeout=10))
    """
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name in ("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["timeout"] * 2 + ["True"] * 2
