"""Anything in any order, against a set of what was ever saved: what is found is right, and a prefix; limits hold.

Crashes are a store that is opened anew on the same folder without a word to the old one; the clock of the files jumps.
"""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvjax.store.disk import DiskTier
from kvjax.store.eviction import POLICIES
from tests.store.chains import FORMAT, holds, names_of, save, store_of

CHAINS = [names_of(4, seed=seed) for seed in range(3)]
CAP = 6 * FORMAT.nbytes

chains, lengths, picks = st.integers(0, 2), st.integers(0, 4), st.integers(0, 99)


class StoreMachine(RuleBasedStateMachine):
    @initialize(
        write_policy=st.sampled_from(["write_through", "write_through_selective", "write_back"]),
        promotion=st.sampled_from(["retain", "temporary"]),
        eviction_policy=st.sampled_from(sorted(POLICIES)),
    )
    def start(self, **settings):
        self.folder = Path(tempfile.mkdtemp())
        self.settings = settings
        self.saved: set[str] = set()
        self.held, self.old = [], []
        self.open()

    def open(self):
        policy = POLICIES[self.settings["eviction_policy"]]()
        self.disk = DiskTier(self.folder, CAP, policy=policy, least_free=0)
        self.store = store_of(self.disk, blocks=5, **self.settings)

    @rule(chain=chains, length=lengths, flush=st.booleans())
    def save(self, chain, length, flush):
        save(self.store, CHAINS[chain][:length])
        if flush:
            self.store.flush(20.0)
        self.saved |= {name.hex for name in CHAINS[chain][:length]}

    @rule(chain=chains, length=lengths, unit=st.integers(1, 2), keep=st.booleans())
    def fetch(self, chain, length, unit, keep):
        done = threading.Event()
        fetch = self.store.load(CHAINS[chain][:length], unit=unit, on_done=done.set)
        assert done.wait(20)
        count = fetch.loaded
        assert count % unit == 0
        assert {name.hex for name in CHAINS[chain][:count]} <= self.saved
        if keep and len(self.held) < 2:
            self.held.append((fetch, CHAINS[chain][:count]))
        else:
            self.look(fetch, CHAINS[chain][:count])

    @rule()
    def use_what_is_held(self):
        if self.held:
            self.look(*self.held.pop(0))

    def look(self, fetch, names):
        with fetch:
            assert all(holds(fetch.blob(index), name) for index, name in enumerate(names))

    @rule(pick=picks, place=st.integers(0, FORMAT.nbytes - 1) | st.integers(FORMAT.start, FORMAT.nbytes - 1))
    def harm(self, pick, place):
        def flip(paths):
            with paths[pick % len(paths)].open("r+b") as file:
                file.seek(place)
                byte = file.read(1) or b"."
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))

        self.meddle(flip)
        self.crash()  # what is in host memory would hide it

    @rule(pick=picks, length=st.integers(0, FORMAT.nbytes))
    def cut(self, pick, length):
        self.meddle(lambda paths: os.truncate(paths[pick % len(paths)], length))
        self.crash()

    @rule(pick=picks, other=picks)
    def swap(self, pick, other):
        def replace(paths):
            shutil.copyfile(paths[pick % len(paths)], self.folder / "copy")
            os.replace(self.folder / "copy", paths[other % len(paths)])

        self.meddle(replace)
        self.crash()

    @rule(pick=picks, seconds=st.integers(-(10**6), 10**6))
    def clocks_jump(self, pick, seconds):
        def jump(paths):
            path = paths[pick % len(paths)]
            for each in (path, path.parent, self.disk._base / "lock"):
                os.utime(each, (time.time() + seconds,) * 2)

        self.meddle(jump)

    @rule(chain=chains, length=lengths)
    def another_server_writes(self, chain, length):
        other = store_of(DiskTier(self.folder, CAP, least_free=0), blocks=5)
        save(other, CHAINS[chain][:length])
        other.flush(20.0)
        other.close()
        self.saved |= {name.hex for name in CHAINS[chain][:length]}

    @rule()
    def crash(self):
        while self.held:
            self.use_what_is_held()
        self.old.append(self.store)
        self.open()

    def meddle(self, change):
        """Hands the files of blocks to `change` while no store, of those left by a crash too, writes or removes any."""
        with self.disk._alone():
            if paths := [p for p in sorted(self.folder.rglob("*")) if len(p.name) == 64 and p.stat().st_size]:
                change(paths)

    @invariant()
    def limits_hold(self):
        if hasattr(self, "store"):
            stats = self.store.stats()
            assert stats["host"].used_bytes <= stats["host"].capacity_bytes
            with self.disk._alone():
                assert sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) <= CAP

    def teardown(self):
        if hasattr(self, "store"):
            while self.held:
                self.use_what_is_held()
            for store in (*self.old, self.store):
                assert store.wait(20.0)
                store.check_integrity()
                store.close()
            shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(stateful_step_count=15)
TestStore = StoreMachine.TestCase
