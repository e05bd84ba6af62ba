"""Faults of the KV store's tiers at random, many times: is a wrong block served, a cap exceeded, a caller held up?

    python -m benchmarks.store_faults [--kills 300] [--seconds 60] [--output FILE.json]
    python -m benchmarks.store_faults --quick

Every block that is found is proven against what it ought to be, which its key decides. Exit status 1 on any wrong
answer, or on a byte more than a cap allows.

    kills       `kill -9` of a process that writes to a disk tier, and a fresh opening of its folder after each
    processes   three processes on one folder with a cap, which is sampled all the time
    redis       a server that is stopped and continued under a store that loads and saves
    locks       the lock of a disk tier's folder, held by a process that is stopped
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.common.quick import parse, settings
from benchmarks.common.report import processor_name, write_rows
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from kvjax.store.opening import open_store
from kvjax.store.store import KVStore
from kvjax.store.tier import TierError
from tests.store.chains import FORMAT, blob_of, holds, kv_of, names_of
from tests.store.crash import CAP, CONTEXT, check, crash

# a child reads this file again, as its main module: what it imports is there then
CONTEXT.set_forkserver_preload(["tests.store.crash", "kvjax.store.opening", "benchmarks.common.report"])
PROCESSES = 3
CHAINS, LENGTH = 8, 6  # prompts, and blocks of each
SAMPLED = 0.02  # seconds between two samples of a cap
HOST = 8 * (-(-FORMAT.nbytes // 4096) * 4096)  # bytes: most loads come from the tier below
DEADLINE = 0.5  # seconds of a call to Redis
RUNNING, STOPPED = (0.05, 1.0), (0.05, 2.0)  # seconds, at least and at most


@dataclasses.dataclass
class Outcome:
    """What one kind of fault has done.

    Attributes:
        often: how often it was tried, in words.
        proven: blocks that were found and are right; `wrong`: those that are not, or were lost.
        over: samples in which a cap was exceeded.
        longest: seconds that a caller waited.
    """

    part: str
    tried: str
    often: str = ""
    proven: int = 0
    wrong: int = 0
    over: int = 0
    longest: float = 0.0

    def waited(self, began: float) -> None:
        self.longest = max(self.longest, time.monotonic() - began)

    def prove(self, blob: np.ndarray, key: BlockKey) -> None:
        if holds(blob, key):
            self.proven += 1
        else:
            self.wrong += 1

    def line(self) -> str:
        return (
            f"{self.tried:<46} {self.often:<40} {self.proven:>9,} {self.wrong:>6} {self.over:>9} {self.longest:>9.3f} s"
        )


HEADER = f"{'tried':<46} {'how often':<40} {'proven':>9} {'wrong':>6} {'over cap':>9} {'longest wait':>12}"


def kills(count: int, seconds: float, folder: pathlib.Path) -> Outcome:
    """`count` random kills of a writer; the wait is that of the opening after one."""
    outcome = Outcome("kills", "kill -9 of a writer, then a fresh open", f"{count:,} kills")
    rng, names = random.Random(count), {}
    for seed in range(count):
        names |= {name.hex: name for name in names_of(2000, seed=seed)}
        written = crash(folder, seed, seconds=rng.uniform(0.0, 0.05))
        outcome.over += taken(folder) > CAP
        try:
            there, took = check(folder, written, names)
        except AssertionError as error:
            print(f"kill {seed}: {error}", file=sys.stderr)
            outcome.wrong += 1
            continue
        outcome.proven += there
        outcome.longest = max(outcome.longest, took)
        names = {key: name for key, name in names.items() if (folder / "kvjax-kv-2" / key[:2] / key).exists()}
    return outcome


def processes(count: int, seconds: float, folder: pathlib.Path) -> Outcome:
    """Three processes that write and read one folder; the wait is that of a read or a write."""
    outcome = Outcome("processes", f"{PROCESSES} processes on one folder with a cap")
    DiskTier(folder, CAP, least_free=0).close()
    children, reports = [], []
    for seed in range(PROCESSES):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        children.append(CONTEXT.Process(target=use_folder, args=(folder, seed, seconds, sender)))
        children[-1].start()
        sender.close()
        reports.append(receiver)
    samples = 0
    while any(child.is_alive() for child in children):
        outcome.over += sample(folder) > CAP
        samples += 1
        time.sleep(SAMPLED)
    calls = 0
    for receiver in reports:
        proven, wrong, called, longest = receiver.recv()
        outcome.proven, outcome.wrong, calls = outcome.proven + proven, outcome.wrong + wrong, calls + called
        outcome.longest = max(outcome.longest, longest)
    outcome.often = f"{seconds:g} s, {calls:,} calls, {samples:,} samples"
    outcome.wrong += not intact(folder)
    return outcome


def use_folder(folder: pathlib.Path, seed: int, seconds: float, report: Connection) -> None:
    """A process that writes blocks of common chains, and reads them."""
    tier, rng, outcome = DiskTier(folder, CAP, least_free=0), random.Random(seed), Outcome("", "")
    pool, end, calls = chains(), time.monotonic() + seconds, 0
    blobs = {key.hex: blob_of(key) for chain in pool for key in chain}
    buffer = np.zeros(FORMAT.nbytes, np.uint8)
    while time.monotonic() < end:
        key = (chain := rng.choice(pool))[rng.randrange(len(chain))]
        began = time.monotonic()
        with contextlib.suppress(TierError):  # refused is not wrong
            if rng.random() < 0.5:
                tier.write(key.hex, memoryview(blobs[key.hex]), key.previous.hex())
            elif tier.read(key.hex, memoryview(buffer)):
                outcome.prove(buffer, key)
        outcome.waited(began)
        calls += 1
    tier.close()
    report.send((outcome.proven, outcome.wrong, calls, outcome.longest))


def redis(count: int, seconds: float, folder: pathlib.Path) -> Outcome:
    """A Redis that is stopped and continued; the wait is that of a request."""
    outcome = Outcome("redis", "redis-server, stopped and continued")
    if not (shutil.which("redis-server") or shutil.which("valkey-server")):
        outcome.often = "skipped: no redis-server here"
        return outcome
    from tests.store.redis_server import RedisServer

    server = RedisServer(folder)
    try:
        assert server.process is not None
        config = StoreConfig(host_cache_size=HOST, remote_cache=server.url, remote_deadline=DEADLINE)
        with store_on(config) as store, stopped_at_random(server.process.pid) as stops:
            requests = serve(store, seconds, outcome)
    finally:
        server.kill()
    outcome.often = f"{seconds:g} s, {len(stops):,} stops, {requests:,} requests"
    return outcome


def locks(count: int, seconds: float, folder: pathlib.Path) -> Outcome:
    """The lock of a folder, held by a process that is stopped; the wait is that of a request."""
    outcome = Outcome("locks", "folder's lock held by a stopped process")
    cap = CHAINS * LENGTH * FORMAT.nbytes  # half of what there is with its rounding: blocks leave
    with store_on(StoreConfig(host_cache_size=HOST, disk_cache=folder, disk_cache_size=cap)) as store:
        control, lock_end = CONTEXT.Pipe()
        child = CONTEXT.Process(target=hold_lock, args=(folder / "kvjax-kv-2" / "lock", lock_end))
        child.start()
        lock_end.close()
        assert child.pid is not None

        def before() -> None:
            control.send(True)
            control.recv()

        try:
            with stopped_at_random(child.pid, before=before, after=lambda: control.send(True)) as stops:
                requests = serve(store, seconds, outcome)
        finally:
            child.kill()
            child.join()
    outcome.over += taken(folder) > cap
    outcome.often = f"{seconds:g} s, {len(stops):,} stops, {requests:,} requests"
    outcome.wrong += not intact(folder, cap)
    return outcome


def hold_lock(path: pathlib.Path, pipe: Connection) -> None:
    """A process that locks a file when it is told to, and unlocks it when it is told again."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    while True:
        pipe.recv()
        fcntl.flock(file, fcntl.LOCK_EX)
        pipe.send(True)
        pipe.recv()
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def stopped_at_random(
    pid: int, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> Iterator[list[float]]:
    """Stops and continues a process while the body runs, between `before` and `after`; the seconds of each stop."""
    ended, rng, stops = threading.Event(), random.Random(pid), []

    def run() -> None:
        while not ended.wait(rng.uniform(*RUNNING)):
            before()
            os.kill(pid, signal.SIGSTOP)
            stops.append(rng.uniform(*STOPPED))
            ended.wait(stops[-1])
            os.kill(pid, signal.SIGCONT)
            after()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield stops
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def store_on(config: StoreConfig) -> Iterator[KVStore]:
    store = open_store(FORMAT, config)
    try:
        yield store
        store.wait(30.0)
        store.check_integrity()
    finally:
        store.close()


def serve(store: KVStore, seconds: float, outcome: Outcome) -> int:
    """Requests one after another, each as an engine makes it: waits as long as its policy says, and computes the rest.

    Returns how many there were.
    """
    pool, rng, end, requests = chains(), random.Random(0), time.monotonic() + seconds, 0
    computed = {key.hex: kv_of(key) for chain in pool for key in chain}
    while time.monotonic() < end:
        chain, done, began = rng.choice(pool), threading.Event(), time.monotonic()
        with store.load(chain, on_done=done.set) as load:
            done.wait(store.config.patience(len(chain) * BLOCK_TOKENS))
            load.stop()
            for index in range(load.loaded):
                outcome.prove(load.blob(index), chain[index])
            behind = chain[load.loaded :]
            with store.insert(behind) as writer:
                for index in writer.wanted:
                    for layer, (k, v) in enumerate(computed[behind[index].hex]):
                        writer.fill(index, layer, k, v)
        outcome.waited(began)
        requests += 1
        time.sleep(0.001)
    return requests


def chains() -> list[list[BlockKey]]:
    return [names_of(LENGTH, seed=seed) for seed in range(CHAINS)]


def taken(folder: pathlib.Path) -> int:
    """Bytes of the file system that everything in a folder takes, in whole pages."""
    statuses = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(max(status.st_blocks * 512, -(-status.st_size // 4096) * 4096) for status in statuses)


def sample(folder: pathlib.Path) -> int:
    """As `taken`, under the folder's lock: else a block that moves meanwhile counts twice."""
    with (folder / "kvjax-kv-2" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return taken(folder)


def intact(folder: pathlib.Path, cap: int = CAP) -> bool:
    """Whether a fresh opening holds what it says, and no more than it may."""
    tier = DiskTier(folder, cap, least_free=0)
    try:
        tier.check_integrity()
    except AssertionError as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return False
    finally:
        tier.close()
    return True


PARTS: tuple[Callable[[int, float, pathlib.Path], Outcome], ...] = (kills, processes, redis, locks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries every part and prints one table; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.store_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300, help="processes that are killed (default: 300)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the other parts (default: 60)")
    args = parse(parser, arguments, {"kills": 3, "seconds": 1.0})
    print(f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores of {processor_name()}")
    print(HEADER)
    outcomes = []
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(part(args.kills, args.seconds, pathlib.Path(folder)))
        print(outcomes[-1].line(), flush=True)
    if args.output:
        write_rows(args.output, "benchmarks.store_faults", list(map(dataclasses.asdict, outcomes)), settings(args))
    return int(any(outcome.wrong or outcome.over for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
