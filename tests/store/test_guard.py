"""The guard: every call ends in time, and what was given up never touches the caller's memory again."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.store.guard import Guarded
from kvjax.store.tier import Stored, Tier, TierError
from tests.store.contract import SIZE, ReadOnlyContract, TierContract, blob, fill, key
from tests.store.memory_tier import MemoryTier
from tests.store.test_breaker import Clock

pytestmark = pytest.mark.timing

SLACK = 1.0  # seconds that a machine with other work may take to notice a deadline


class Scripted(MemoryTier):
    """A tier that does first what `script` says: a function a call, in turn, then nothing special."""

    def __init__(self, *script: Callable[[], object]) -> None:
        super().__init__()
        self.script = list(script)
        self.calls: list[str] = []
        self.at_once = self.most_at_once = 0
        self._count = threading.Lock()

    def _first(self, what: str) -> None:
        with self._count:
            self.calls.append(what)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            step = self.script.pop(0) if self.script else None
        try:
            if step is not None:
                step()
        finally:
            with self._count:
                self.at_once -= 1

    def read(self, key: str, into: memoryview) -> bool:
        self._first("read")
        return super().read(key, into)

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        self._first("write")
        super().write(key, blob)

    def contains(self, key: str) -> bool:
        self._first("contains")
        return super().contains(key)

    def delete(self, key: str) -> None:
        self._first("delete")
        super().delete(key)

    def scan(self) -> Iterator[Stored]:
        self._first("scan")
        return super().scan()


def fails(reason: str = "io") -> Callable[[], object]:
    def step() -> None:
        raise TierError(reason, "as scripted")

    return step


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(TierError) as error:
        call()
    return error.value.reason


def settles(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """`hang.wait` as a step of a script hangs until the test lets go, at its end at the latest."""
    event = threading.Event()
    yield event
    event.set()


class TestGuarded(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return fill(Guarded(MemoryTier(), 5.0))


class TestGuardedReadOnly(ReadOnlyContract):
    @pytest.fixture
    def tier(self) -> Tier:
        inner = fill(MemoryTier())
        inner.read_only = True
        return Guarded(inner, 5.0)


def test_it_has_the_name_of_its_tier():
    assert Guarded(MemoryTier()).name == "memory"


def test_what_it_tells_of_itself():
    inner = Scripted(fails())
    inner.held = lambda: {"blocks": 7}
    guard = Guarded(inner, 5.0, attempts=1, failures=1)
    assert guard.held() == {"blocks": 7, "breaker": "closed"}
    assert reason_of(lambda: guard.contains(key(1))) == "io"
    assert guard.held() == {"blocks": 7, "breaker": "open"}


# Deadlines


@pytest.mark.parametrize("what", ["read", "write", "contains", "delete", "scan"])
def test_a_call_that_hangs_ends_at_its_deadline(what, hang):
    tier = Scripted(hang.wait)
    guard = Guarded(tier, 0.05, scan_deadline=0.05)
    calls = {
        "read": lambda: guard.read(key(0), memoryview(bytearray(9))),
        "write": lambda: guard.write(key(0), blob(0)),
        "contains": lambda: guard.contains(key(0)),
        "delete": lambda: guard.delete(key(0)),
        "scan": lambda: list(guard.scan()),
    }
    begun = time.monotonic()
    assert reason_of(calls[what]) == "timeout"
    assert 0.05 <= time.monotonic() - begun < 0.05 + SLACK
    assert tier.calls == [what]
    assert guard.lost == 1
    assert guard.contains(key(1)) is False, "the next call is not held up"
    hang.set()
    assert settles(lambda: guard.lost == 0)


def test_when_every_thread_hangs_the_next_call_is_told_at_once(hang):
    tier = Scripted(hang.wait, hang.wait)
    guard = Guarded(tier, 0.05, threads=2, failures=100)
    for _ in range(2):
        assert reason_of(lambda: guard.contains(key(0))) == "timeout"
    begun = time.monotonic()
    for _ in range(20):
        assert reason_of(lambda: guard.contains(key(0))) == "breaker"
    assert time.monotonic() - begun < 0.05 * 20
    assert len(tier.calls) == 2
    hang.set()
    assert settles(lambda: guard.lost == 0)
    assert guard.contains(key(0)) is False
    assert guard.errors == {"timeout": 2, "breaker": 20}


def test_who_finds_all_threads_busy_waits_until_the_deadline_only(hang):
    guard = Guarded(Scripted(hang.wait), 0.1, threads=1, failures=100)
    reasons = []

    def ask() -> None:
        reasons.append(reason_of(lambda: guard.contains(key(0))))

    first = threading.Thread(target=ask)
    first.start()
    time.sleep(0.02)
    begun = time.monotonic()
    ask()
    assert time.monotonic() - begun < 0.1 + SLACK
    first.join()
    assert set(reasons) <= {"timeout", "breaker"}


def test_no_more_calls_at_once_than_threads():
    tier = Scripted(*[lambda: time.sleep(0.005)] * 24)
    guard = Guarded(tier, 5.0, threads=3)
    threads = [threading.Thread(target=lambda: guard.contains(key(0))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tier.calls) == 24
    assert tier.most_at_once == 3
    assert guard.errors == {}


def test_an_interrupted_caller_gives_up(monkeypatch):
    """As Ctrl-C does, in the middle of waiting."""
    guard = Guarded(Scripted(), 5.0)
    wait = threading.Event.wait

    def interrupted(event: threading.Event, *seconds: float) -> bool:
        if seconds:
            raise KeyboardInterrupt
        return wait(event)  # as a thread that starts does

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guard._workers.run(lambda _: time.sleep(0.05), 5.0)
    assert guard.lost == 1
    assert settles(lambda: guard.lost == 0)


def test_a_process_without_a_thread_left(monkeypatch):
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    guard = Guarded(Scripted(), 0.05, threads=1, failures=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            assert reason_of(lambda: guard.contains(key(1))) == "timeout"
    assert guard.contains(key(1)) is False
    assert guard.state == "closed"


# Attempts


def test_reads_are_tried_three_times():
    tier = Scripted(fails(), fails("timeout"))
    guard = Guarded(fill_quietly(tier), 5.0, backoff=0.001)
    into = bytearray(SIZE)
    assert guard.read(key(1), memoryview(into))
    assert into == bytes(blob(1))
    assert tier.calls == ["read"] * 3
    assert guard.retries == 2
    assert guard.errors == {}


def test_no_fourth_attempt():
    tier = Scripted(*[fails()] * 9)
    guard = Guarded(tier, 5.0, backoff=0.001)
    assert reason_of(lambda: guard.contains(key(1))) == "io"
    assert tier.calls == ["contains"] * 3
    assert guard.errors == {"io": 1}


@pytest.mark.parametrize("reason", ["length", "refused", "full"])
def test_what_will_not_pass_is_not_tried_again(reason):
    tier = Scripted(fails(reason))
    assert reason_of(lambda: Guarded(tier, 5.0).contains(key(1))) == reason
    assert tier.calls == ["contains"]


def test_what_changes_the_tier_is_tried_once():
    tier = Scripted(*[fails()] * 3)
    guard = Guarded(tier, 5.0, backoff=0.001)
    for call in (lambda: guard.write(key(0), blob(0)), lambda: guard.delete(key(0)), lambda: list(guard.scan())):
        assert reason_of(call) == "io"
    assert tier.calls == ["write", "delete", "scan"]


def test_attempts_end_before_the_deadline():
    tier = Scripted(*[fails()] * 3)
    begun = time.monotonic()
    assert reason_of(lambda: Guarded(tier, 0.1, backoff=0.5).contains(key(1))) == "io", "its own reason, not ours"
    assert time.monotonic() - begun < 0.1, "a pause that would outlast the deadline is not begun"
    assert tier.calls == ["contains"]


def test_no_attempt_after_giving_up():
    """The last of the deadline goes in a slow failure; the thread must not go on behind our back."""

    def slow_failure() -> None:
        time.sleep(0.08)
        raise TierError("io", "slow")

    tier = Scripted(slow_failure, slow_failure)
    guard = Guarded(tier, 0.05, backoff=0.001)
    assert reason_of(lambda: guard.contains(key(1))) == "timeout"
    assert settles(lambda: guard.lost == 0)
    assert tier.calls == ["contains"]


def test_a_tier_that_breaks_its_contract_is_an_io_error():
    def broken() -> None:
        raise RuntimeError("a bug")

    guard = Guarded(Scripted(broken), 5.0, attempts=1)
    with pytest.raises(TierError, match="RuntimeError: a bug") as error:
        guard.contains(key(1))
    assert error.value.reason == "io"


# The breaker


def test_it_opens_and_answers_at_once_and_heals():
    clock = Clock()
    tier = Scripted(*[fails()] * 4)
    guard = Guarded(tier, 5.0, attempts=1, failures=3, pause=60.0, clock=clock)
    for _ in range(3):
        assert guard.state == "closed"
        assert reason_of(lambda: guard.contains(key(1))) == "io"
    assert guard.state == "open"
    assert reason_of(lambda: guard.read(key(1), memoryview(bytearray(4)))) == "breaker"
    assert reason_of(lambda: guard.write(key(1), blob(1))) == "breaker"
    assert len(tier.calls) == 3
    clock.now += 60
    assert guard.state == "half-open"
    assert reason_of(lambda: guard.contains(key(1))) == "io", "the probe"
    assert guard.state == "open"
    clock.now += 60
    assert guard.contains(key(1)) is False
    assert guard.state == "closed"
    assert guard.errors == {"io": 4, "breaker": 2}


def test_one_probe_however_many_ask(hang):
    clock = Clock()
    tier = Scripted(fails(), hang.wait)
    guard = Guarded(tier, 2.0, attempts=1, failures=1, pause=1.0, clock=clock)
    assert reason_of(lambda: guard.contains(key(1))) == "io"
    clock.now += 1
    probe = threading.Thread(target=lambda: guard.contains(key(1)))
    probe.start()
    assert settles(lambda: len(tier.calls) == 2)
    assert guard.state == "half-open"
    for _ in range(5):
        assert reason_of(lambda: guard.contains(key(1))) == "breaker"
    hang.set()
    probe.join()
    assert guard.state == "closed"
    assert guard.contains(key(1)) is False


@pytest.mark.parametrize(("hangs", "reason"), [(False, "io: as scripted"), (True, "timeout: memory: no answer within")])
def test_one_log_line_when_it_opens_and_one_when_it_closes(caplog, hang, hangs, reason):
    clock = Clock()
    tier = Scripted(*[hang.wait if hangs else fails()] * 4)
    guard = Guarded(tier, 0.2, attempts=1, failures=2, pause=60.0, threads=9, clock=clock)
    with caplog.at_level("DEBUG", "kvjax"):
        for _ in range(2):
            assert reason_of(lambda: guard.contains(key(1))) in ("io", "timeout")
        for _ in range(2):
            for _ in range(5):
                assert reason_of(lambda: guard.contains(key(1))) == "breaker"
            clock.now += 60
            assert reason_of(lambda: guard.contains(key(1))) in ("io", "timeout"), "the probe"
        [opened] = caplog.records
        assert opened.levelname == "WARNING"
        assert "the memory tier is left alone: 2 calls in a row failed" in opened.getMessage()
        assert reason in opened.getMessage()
        assert "again every 60 s" in opened.getMessage()
        clock.now += 60
        for _ in range(3):
            assert guard.contains(key(1)) is False
        [_, closed] = caplog.records
        assert closed.levelname == "INFO"
        assert closed.getMessage() == "the memory tier answers again after 180.0 s, in which 10 calls were refused"


def test_failures_that_do_not_open_it_are_not_logged(caplog):
    guard = Guarded(Scripted(fails(), fails("refused"), fails()), 5.0, attempts=1, failures=2)
    with caplog.at_level("DEBUG", "kvjax"):
        for _ in range(3):
            reason_of(lambda: guard.contains(key(1)))
        guard.close()
    assert not caplog.records


def test_an_object_is_rejected_where_its_tier_is(opened):
    tier = fill(MemoryTier())
    guard = Guarded(tier, 5.0)
    guard.reject(key(1))
    assert not tier.contains(key(1))
    rejected = []
    tier.read_only = True
    tier.reject = rejected.append
    Guarded(tier, 5.0).reject(key(2))
    assert rejected == [key(2)]
    assert guard.peek(key(2), 5) == bytes(blob(2))[:5]


@pytest.mark.parametrize("reason", ["length", "refused", "full"])
def test_an_answer_that_is_an_error_is_an_answer(reason):
    guard = Guarded(Scripted(*[fails(reason)] * 9), 5.0, failures=2)
    for _ in range(9):
        assert reason_of(lambda: guard.write(key(1), blob(1))) == reason
    assert guard.state == "closed"


# Memory


class Dripping(Tier):
    """Reads and writes byte by byte over a time, whoever waits; it remembers what was written."""

    name = "dripping"

    def __init__(self, pauses: list[float]) -> None:
        self.pauses = pauses
        self.written: dict[str, bytes] = {}

    def read(self, key: str, into: memoryview) -> bool:
        for at, pause in enumerate(self.pauses):
            time.sleep(pause)
            into[at] = 1 + at
        return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        taken = bytearray()
        for at, pause in enumerate(self.pauses):
            time.sleep(pause)
            taken.append(blob[at])
        self.written[key] = bytes(taken)

    def contains(self, key: str) -> bool:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        raise NotImplementedError

    def scan(self) -> Iterator[Stored]:
        raise NotImplementedError


PAUSES = st.lists(st.sampled_from([0.0, 0.0005, 0.002, 0.004]), min_size=1, max_size=6)


@settings(max_examples=40)
@given(PAUSES, st.sampled_from([0.001, 0.003, 0.006, 0.010]))
def test_a_late_read_never_writes_into_the_callers_memory(pauses, deadline):
    guard = Guarded(Dripping(pauses), deadline, threads=2)
    whole = bytes(range(1, 1 + len(pauses)))
    for _ in range(3):
        buffer = bytearray(len(whole))
        found = False
        with contextlib.suppress(TierError):
            found = guard.read(key(0), memoryview(buffer))
        assert buffer == (whole if found else bytes(len(whole))), "all or nothing"
        buffer[:] = b"\xff" * len(buffer)  # it is somebody else's now
        time.sleep(0.001)
        assert buffer == b"\xff" * len(buffer)
        assert settles(lambda: guard.lost == 0)
        assert buffer == b"\xff" * len(buffer)


@settings(max_examples=40)
@given(PAUSES, st.sampled_from([0.001, 0.003, 0.006, 0.010]))
def test_a_late_write_never_reads_the_callers_memory(pauses, deadline):
    tier = Dripping(pauses)
    guard = Guarded(tier, deadline, threads=2)
    whole = bytes(range(1, 1 + len(pauses)))
    buffer = bytearray(whole)
    with contextlib.suppress(TierError):
        guard.write(key(0), memoryview(buffer))
        assert tier.written[key(0)] == whole
    buffer[:] = bytes(len(buffer))
    assert settles(lambda: guard.lost == 0)
    assert tier.written.get(key(0), whole) == whole


def test_a_failed_attempt_leaves_nothing_behind():
    class Torn(MemoryTier):
        def read(self, key: str, into: memoryview) -> bool:
            into[:] = b"?" * len(into)
            raise TierError("io", "broke off")

    buffer = bytearray(SIZE)
    assert reason_of(lambda: Guarded(Torn(), 5.0, backoff=0.001).read(key(1), memoryview(buffer))) == "io"
    assert buffer == bytes(SIZE)


def test_a_tier_cannot_change_what_is_written():
    class Scribbler(MemoryTier):
        def write(self, key: str, blob: memoryview, parent: str = "") -> None:
            blob[0] = 0

    guard = Guarded(Scribbler(), 5.0)
    assert reason_of(lambda: guard.write(key(1), blob(1))) == "io"


def test_buffers_are_used_again_and_few():
    guard = Guarded(fill(MemoryTier()), 5.0, threads=2)
    for size in (10, SIZE, 5 * SIZE, 30):
        for n in range(3):
            guard.write(key(n), blob(n, size))
            assert guard.read(key(n), memoryview(bytearray(size)))
    assert 1 <= len(guard._buffers._free) <= 2


def test_an_empty_object():
    guard = Guarded(MemoryTier(), 5.0)
    guard.write(key(1), memoryview(b""))
    assert guard.read(key(1), memoryview(bytearray()))


# The end


def test_close_of_a_tier_that_hangs(hang):
    class Stuck(MemoryTier):
        def close(self) -> None:
            hang.wait()

    guard = Guarded(Stuck(), 0.05)
    begun = time.monotonic()
    guard.close()
    assert time.monotonic() - begun < 0.05 + SLACK
    assert guard.errors == {"timeout": 1}
    assert reason_of(lambda: guard.contains(key(1))) == "refused"


def test_close_of_a_tier_that_fails():
    class Broken(MemoryTier):
        def close(self) -> None:
            raise OSError("gone")

    guard = Guarded(Broken())
    guard.close()
    assert guard.errors == {"io": 1}


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"attempts": 4}, {"deadline": 0.0}, {"scan_deadline": -1.0}, {"backoff": -1.0}, {"threads": 0}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=r"must be|need"):
        Guarded(MemoryTier(), **wrong)


def fill_quietly(tier: Scripted) -> Scripted:
    for n in range(3):
        MemoryTier.write(tier, key(n), blob(n))
    return tier
