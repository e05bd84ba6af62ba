"""Crashes: a child writes blocks to a disk tier and says of each that it is written, until it is killed; a look at what
is left proves every block that is found.

A child is killed at a random instant, or kills itself at a certain step of a write.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from kvjax.store.block import BlockLayout
from kvjax.store.disk import DiskTier
from tests.store.chains import FORMAT, blob_of, names_of

CAP = 12 * FORMAT.nbytes
# a fork of a process without threads: a child begins in milliseconds
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.store.crash"])


def kill_at(step: str, tier: DiskTier) -> None:
    """Has this process kill itself at a step of the write that comes next."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def then_die(function):
        return lambda *args, **kwargs: (function(*args, **kwargs), die())

    if step == "before room is made":
        tier._space.make_room = die
    elif step == "room is made":
        tier._space.make_room = then_die(tier._space.make_room)
    elif step == "half written":
        write = os.pwrite
        os.pwrite = lambda file, blob, at: (write(file, blob[: len(blob) // 2], at), die())
    elif step == "counted":
        put = tier._index.put
        tier._index.put = lambda shard, name, *rest, **how: (
            put(shard, name, *rest, **how),
            len(name) == 64 and die(),  # the file is in its place
        )
    else:
        call = {"opened": "open", "written": "pwrite", "on the medium": "fsync", "renamed": "rename"}[step]
        setattr(os, call, then_die(getattr(os, call)))


def write_and_say(folder: Path, seed: int, said: Connection, step: str | None, after: int) -> None:
    tier = DiskTier(folder, CAP, least_free=0, sync=step is not None)
    for number, name in enumerate(names_of(10_000, seed=seed)):
        if step is not None and number == after:
            kill_at(step, tier)
        tier.write(name.hex, memoryview(blob_of(name)))
        said.send_bytes(name.key)


def crash(folder: Path, seed: int, *, seconds: float = 60.0, step: str | None = None, after: int = 0) -> list[str]:
    """Runs a child until it dies; returns the keys that it said were written."""
    hear, say = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=write_and_say, args=(folder, seed, say, step, after))
    child.start()
    say.close()
    said, until = [], None
    try:
        while until is None or time.monotonic() < until:
            if hear.poll(0.001 if until else 20.0):
                said.append(hear.recv_bytes().hex())
                until = until or time.monotonic() + seconds
    except EOFError:
        pass
    child.kill()
    child.join()
    try:  # what it said between the last look and its end
        while hear.poll():
            said.append(hear.recv_bytes().hex())
    except EOFError:
        pass
    assert child.exitcode == -signal.SIGKILL
    return said


def check(folder: Path, said: list[str], names: dict[str, object]) -> tuple[int, float]:
    """Opens the folder as the next server does, and proves everything that is there.

    Returns how many blocks there are, and the seconds that the opening took.

    Raises:
        AssertionError: a block is lost or harmed, or something else is left.
    """
    began = time.monotonic()
    tier = DiskTier(folder, CAP, least_free=0)
    seconds = time.monotonic() - began
    tier.check_integrity()
    there = {stored.key for stored in tier.scan()}
    fit = CAP // FORMAT.nbytes
    # the newest that fit are there; room for one more may have been made when it ended
    assert set(said[-(fit - 1) :]) <= there, "a block is lost"
    for key in there:
        buffer = bytearray(FORMAT.nbytes)
        assert tier.read(key, memoryview(buffer))
        assert BlockLayout.read(np.frombuffer(buffer, np.uint8)) == (FORMAT, names[key]), "a block is harmed"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.name for path in files} == there, "something else is left"
    tier.close()
    return len(there), seconds
