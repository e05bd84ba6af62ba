"""The disk tier at its limits: no more bytes than it may have, and any system call may fail."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvjax.store.disk import DiskTier
from kvjax.store.eviction import POLICIES
from kvjax.store.tier import TierError
from kvjax.store.whole_file import TEMPORARY
from tests.store.test_disk import SIZE, key, read, taken, write

numbers, sizes = st.integers(0, 9), st.integers(1, 3 * SIZE)


def failure(act: Callable[[], object]) -> str | None:
    """The reason, if it fails."""
    try:
        act()
    except TierError as error:
        return error.reason
    return None


class Limits(RuleBasedStateMachine):
    """Writes of any size by two servers, what others have put there, files of writers that died, other limits."""

    @initialize(before=st.lists(sizes, max_size=3), policy=st.sampled_from(sorted(POLICIES)), pages=st.integers(0, 12))
    def start(self, before, policy, pages):
        self.root, self.policy, self.tiers = Path(tempfile.mkdtemp()), policy, []
        for number, size in enumerate(before):
            (self.root / f"mine {number}").write_bytes(bytes(size))
        self.foreign = sum(taken(path) for path in self.root.iterdir())
        self.open(pages)

    @rule(pages=st.integers(0, 12))
    def open(self, pages):
        """All servers are started anew, with another limit."""
        for tier in self.tiers:
            tier.close()
        self.cap, self.rubbish = pages * 4096, False
        policy = POLICIES[self.policy]
        self.tiers = [DiskTier(self.root, self.cap, policy=policy(), least_free=0) for _ in range(2)]

    @rule(which=st.integers(0, 1), number=numbers, size=sizes)
    def write(self, which, number, size):
        tier, blob = self.tiers[which], bytes([number + 1]) * size
        known = tier.contains(key(number))
        refused = failure(lambda: tier.write(key(number), memoryview(blob)))
        fits = -(-size // 4096) * 4096 + self.foreign <= self.cap
        assert refused == (None if fits or known else "full")
        if fits and not known:
            assert read(tier, number, size) == blob
        self.rubbish = False

    @rule(which=st.integers(0, 1), number=numbers)
    def delete(self, which, number):
        self.tiers[which].delete(key(number))
        assert not self.tiers[1 - which].contains(key(number))

    @rule(number=numbers, size=sizes)
    def a_writer_dies(self, number, size):
        (self.tiers[0]._path(key(number)).with_suffix(TEMPORARY)).write_bytes(bytes(size))
        self.rubbish = True  # until somebody looks: a tier's own temporary files are of what it has made room for

    @precondition(lambda self: not self.rubbish)
    @invariant()
    def no_more_than_it_may(self):
        if hasattr(self, "tiers"):
            assert sum(taken(path) for path in self.root.rglob("*") if path.is_file()) <= max(self.cap, self.foreign)

    def teardown(self):
        if hasattr(self, "tiers"):
            for tier in self.tiers:
                tier.close()
            shutil.rmtree(self.root)


Limits.TestCase.settings = settings(stateful_step_count=10)
TestLimits = Limits.TestCase

CALLS = ("open", "preadv", "pwrite", "fsync", "rename", "statvfs", "scandir", "stat", "fstat", "utime", "unlink")
# of the folders in which no block of the test ever is: each of them is looked at in the same way
IDLE = {f"{number:02x}" for number in range(6, 256)}


class Faults:
    """Counts what the process asks of the system; once armed, the n-th of these calls fails."""

    def __init__(self, patch: pytest.MonkeyPatch, tier: DiskTier) -> None:
        self.left, self.error = 0, 0
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(fcntl, "flock", self._counted(fcntl.flock))

    def arm(self, call: int, error: int) -> None:
        self.left, self.error = call, error

    def disarm(self) -> bool:
        """Whether nothing has failed."""
        fired, self.left = self.left <= 0, 0
        return not fired

    def _counted(self, function):
        def counted(*args, **kwargs):
            idle = args and not isinstance(args[0], int) and os.fspath(args[0])[-2:] in IDLE
            if self.left > 0 and not idle:
                self.left -= 1
                if not self.left:
                    self.left = -1
                    raise OSError(self.error, os.strerror(self.error))
            return function(*args, **kwargs)

        return counted


SLOW = pytest.mark.slow(reason="200 times all that a tier does")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=SLOW)])
def test_an_error_at_any_system_call_costs_no_more_than_that_call(tmp_path, error, step):
    tier = DiskTier(tmp_path, 2 * SIZE, least_free=0, sync=True)
    with pytest.MonkeyPatch.context() as patch:
        faults, call, through = Faults(patch, tier), -(error % step), False
        while not through:
            call += step
            faults.arm(call, error)
            failed = list(filter(None, map(failure, use(tier))))
            through = faults.disarm()
            assert failed in ([], ["full" if error == errno.ENOSPC else "io"])
            write(tier, 5)
            assert read(tier, 5) == bytes([5]) * SIZE
            tier.check_integrity()
            for stored in list(tier.scan()):
                tier.delete(stored.key)
    assert call > 50
    tier.close()


def use(tier: DiskTier) -> Iterator[Callable[[], object]]:
    """Three blocks where two fit, and all that is ever asked of a tier."""
    for number in range(3):
        yield lambda number=number: write(tier, number)
        yield lambda number=number: check(tier, number)
    yield lambda: tier.contains(key(1))
    yield lambda: list(tier.scan())
    yield lambda: tier.delete(key(2))


def check(tier: DiskTier, number: int) -> None:
    assert read(tier, number) in (None, bytes([number]) * SIZE)


FILL = """
import sys
from pathlib import Path
from kvjax.store.disk import DiskTier
from kvjax.store.tier import TierError
from tests.store.test_disk import SIZE, key, read, write
tier = DiskTier(Path(sys.argv[1]), 1 << 30, least_free=0)
for number in range(20):
    write(tier, number)
    assert read(tier, number) == bytes([number]) * SIZE
left = [number for number in range(20) if read(tier, number)]
assert left == list(range(20 - len(left), 20)), left
tier.check_integrity()
tier.delete(key(19))
write(tier, 30)
assert read(tier, 30) == bytes([30]) * SIZE
print(len(left), tier.evictions)
"""


@pytest.mark.parametrize("full", ["size=8m,nr_inodes=270", "size=40k"])
def test_a_file_system_that_is_really_full(tmp_path, full):
    """One without an inode, or a byte, left for the next file: older blocks leave for it, as they do for the limit."""
    mounted = f"mount -t tmpfs -o {full} kvjax {tmp_path} && exec {sys.executable} -c '{FILL}' {tmp_path}"
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no file system of our own")
    done = subprocess.run(
        [*apart, "sh", "-c", mounted], env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    left, evicted = map(int, done.stdout.split())
    assert left >= 2
    assert left + evicted == 20
