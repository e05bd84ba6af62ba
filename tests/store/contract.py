"""What every tier must do, whatever it is made of: a test class for each inherits these cases."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvjax.store.tier import Tier, TierError

SIZE = 20_000


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def blob(number: int, size: int = SIZE) -> memoryview:
    """Bytes that no other number has."""
    seed = hashlib.sha256(f"blob {number}".encode()).digest()
    return memoryview((seed * (size // len(seed) + 1))[:size])


def read(tier: Tier, number: int, size: int = SIZE) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if tier.read(key(number), memoryview(into)) else None


class ReadContract:
    """For a fixture `tier` that holds blobs 0, 1 and 2 when a test begins, and nothing else."""

    def test_what_is_there_is_read(self, tier):
        assert [read(tier, n) == bytes(blob(n)) for n in range(3)] == [True] * 3

    def test_read_fills_the_very_memory_it_is_given(self, tier):
        buffer = bytearray(b"x" * (SIZE + 200))
        assert tier.read(key(1), memoryview(buffer)[100 : 100 + SIZE])
        assert buffer == b"x" * 100 + bytes(blob(1)) + b"x" * 100

    def test_what_is_missing_is_no_error(self, tier):
        assert read(tier, 99) is None
        assert not tier.contains(key(99))

    def test_contains(self, tier):
        assert all(tier.contains(key(n)) for n in range(3))

    @pytest.mark.parametrize("call", ["contains_many", "touch"])
    def test_many_at_once(self, tier, call):
        ask = getattr(tier, call)
        assert ask([]) == []
        assert ask([key(n) for n in (2, 99, 0, 98, 1)]) == [True, False, True, False, True]
        assert ask([key(n) for n in (1, 1)]) == [True, True]
        assert ask([key(n) for n in range(60)]) == [n < 3 for n in range(60)]
        assert [read(tier, n) == bytes(blob(n)) for n in range(3)] == [True] * 3
        with pytest.raises(TierError):
            ask([key(1), "../../etc/passwd"])

    def test_pins_are_kept_or_refused(self, tier):
        try:
            assert tier.pin([key(1), key(99)]) == [True, False]
            tier.unpin([key(1), key(98)])
        except TierError as error:
            refused = error
        else:
            return
        assert refused.reason == "refused"
        with pytest.raises(TierError, match="pin"):
            tier.unpin([key(1)])

    @pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1, 10 * SIZE])
    def test_another_length_is_an_error(self, tier, size):
        with pytest.raises(TierError) as error:
            read(tier, 1, size)
        assert error.value.reason == "length"
        assert read(tier, 1) == bytes(blob(1)), "the next read is not disturbed"

    @pytest.mark.parametrize("name", ["", "ABCD", "../../etc/passwd", "ab cd", "ab\n", "ab*"])
    def test_only_a_key_is_a_name(self, tier, name):
        for call in (lambda: tier.read(name, memoryview(bytearray(4))), lambda: tier.contains(name)):
            with pytest.raises(TierError):
                call()

    def test_threads_do_not_mix_objects(self, tier):
        def check(turn: int) -> bool:
            return read(tier, turn % 4) == (bytes(blob(turn % 4)) if turn % 4 < 3 else None)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(check, range(32)))

    def test_after_close_every_call_is_an_error(self, tier):
        tier.close()
        tier.close()
        calls = [lambda: read(tier, 1), lambda: tier.contains(key(1)), lambda: list(tier.scan())]
        calls += [lambda: tier.write(key(1), blob(1)), lambda: tier.delete(key(1))]
        calls += [lambda: tier.contains_many([key(1)]), lambda: tier.touch([key(1)])]
        calls += [lambda: tier.pin([key(1)]), lambda: tier.unpin([key(1)])]
        for call in calls:
            with pytest.raises(TierError):
                call()


class ReadOnlyContract(ReadContract):
    """As above, for a tier that nobody writes to."""

    def test_it_says_so(self, tier):
        assert tier.read_only
        calls = [lambda: tier.write(key(5), blob(5)), lambda: tier.delete(key(1))]
        calls += [lambda: tier.pin([key(1)]), lambda: tier.unpin([key(1)])]
        for call in calls:
            with pytest.raises(TierError) as error:
                call()
            assert error.value.reason == "refused"
        assert tier.contains(key(1))

    def test_what_is_rejected_is_no_error(self, tier):
        tier.reject(key(1))
        tier.reject(key(99))
        assert read(tier, 2) == bytes(blob(2))


class TierContract(ReadContract):
    """As above, for a tier that may also be written to and scanned."""

    knows_sizes = True
    overhead = 0  # bytes that an object may take beyond its own
    can_scan = True
    lease = 0.0  # seconds during which an object that was read cannot be deleted

    def test_writes_are_readable_at_once(self, tier):
        tier.write(key(7), blob(7))
        assert tier.contains(key(7))
        assert read(tier, 7) == bytes(blob(7))

    def test_a_write_may_name_its_parent(self, tier):
        tier.write(key(8), blob(8), key(7))  # which comes after it
        tier.write(key(7), blob(7), key(1))
        assert [read(tier, n) == bytes(blob(n)) for n in (1, 7, 8)] == [True] * 3
        assert tier.touch([key(n) for n in (1, 7, 8, 9)]) == [True, True, True, False]

    def test_a_write_of_memory_that_is_used_again(self, tier):
        buffer = bytearray(blob(8))
        tier.write(key(8), memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        assert read(tier, 8) == bytes(blob(8))

    def test_a_write_from_the_middle_of_a_read_only_slab(self, tier):
        tier.write(key(9), memoryview(b"x" * 100 + bytes(blob(9)) + b"x")[100 : 100 + SIZE])
        assert read(tier, 9) == bytes(blob(9))

    def test_a_whole_object_without_knowing_its_length(self, tier):
        if not self.can_scan:
            return  # whoever does not know which objects there are is not asked this
        assert tier.load(key(1)) == bytes(blob(1))
        assert tier.load(key(99)) is None
        for length in (1, 100, SIZE, SIZE + 100):
            assert tier.peek(key(1), length) == bytes(blob(1))[:length]
        assert tier.peek(key(99), 100) is None

    def test_the_same_may_be_written_again(self, tier):
        tier.write(key(1), blob(1))
        assert read(tier, 1) == bytes(blob(1))
        assert self.held(tier, range(9)) == {0, 1, 2}

    @pytest.mark.parametrize("size", [1, 31, 1_000_003])
    def test_sizes(self, tier, size):
        tier.write(key(10), blob(10, size))
        assert read(tier, 10, size) == bytes(blob(10, size))

    def test_delete(self, tier):
        tier.delete(key(1))
        assert not tier.contains(key(1))
        assert read(tier, 1) is None
        assert self.held(tier, range(9)) == {0, 2}
        tier.delete(key(1))
        tier.write(key(1), blob(1))
        assert read(tier, 1) == bytes(blob(1))

    def test_what_is_rejected_is_gone(self, tier):
        tier.reject(key(1))
        assert not tier.contains(key(1))
        assert read(tier, 1) is None
        tier.reject(key(1))
        tier.write(key(1), blob(1))
        assert read(tier, 1) == bytes(blob(1))

    def test_scan_names_everything_and_its_size(self, tier):
        if not self.can_scan:
            with pytest.raises(TierError) as error:
                list(tier.scan())
            assert error.value.reason == "refused"
            return
        for n in range(3, 30):
            tier.write(key(n), blob(n, 100 + n))
        found = list(tier.scan())
        assert sorted(stored.key for stored in found) == sorted(key(n) for n in range(30))
        sizes = {key(n): SIZE if n < 3 else 100 + n for n in range(30)}
        for stored in found:
            if self.knows_sizes:
                assert 0 <= stored.nbytes - sizes[stored.key] <= self.overhead
            else:
                assert stored.nbytes == 0

    def test_no_user_string_becomes_a_name(self, tier):
        for name in ("", "ABCD", "../x", "a" * 64 + "/"):
            for call in (lambda name=name: tier.write(name, blob(1)), lambda name=name: tier.delete(name)):
                with pytest.raises(TierError):
                    call()
        assert self.held(tier, range(9)) == {0, 1, 2}

    def test_threads_write_and_delete(self, tier):
        def turn(n: int) -> None:
            tier.write(key(100 + n), blob(n))
            assert read(tier, 100 + n) == bytes(blob(n))
            if n % 2:
                time.sleep(self.lease)
                tier.delete(key(100 + n))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(turn, range(24)))
        assert self.held(tier, range(200)) == {0, 1, 2, *range(100, 124, 2)}

    def test_threads_that_write_the_same(self, tier):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: tier.write(key(50), blob(50, 300_000)), range(16)))
        assert read(tier, 50, 300_000) == bytes(blob(50, 300_000))

    def held(self, tier: Tier, numbers: range) -> set[int]:
        """Which of them it has; where it can be scanned, it has no others."""
        there = {n for n in numbers if tier.contains(key(n))}
        if self.can_scan:
            assert sorted(stored.key for stored in tier.scan()) == sorted(key(n) for n in there)
        return there


def fill(tier: Tier) -> Tier:
    """The state in which every case begins."""
    for n in range(3):
        tier.write(key(n), blob(n))
    return tier
