"""Objects in a Mooncake Store (`mooncake://`), by its own client, over TCP or RDMA.

    callers, one at a time ── socket ──> `mooncake_process` ── Mooncake's client ──> master, other clients' memory

Objects are leased while they are read: a delete just after a read is refused. The client cannot list. Besides the
wheel it needs Debian's libibverbs1, librdmacm1, libnuma1 and liburing2, even for TCP.
"""

import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvjax.store import mooncake_process as far
from kvjax.store.remote import Remote
from kvjax.store.tier import Reason, Stored

MISSING, EXISTS = -704, -705
# Of Mooncake's errors those that are an answer; the rest are faults that may pass.
REASONS: dict[int, Reason] = {-200: "full", -600: "refused", -706: "refused"}
BUFFER = 256 << 20  # bytes
PREFIX = "kvjax/"  # a master has one space of names for everybody
CONNECT_SECONDS = 60.0  # that a client may take before it is given up and started anew; it tries for 90 by itself
SCRIPT = Path(far.__file__)
QUIET = {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}


class MooncakeTier(Remote):
    """All objects of one Mooncake master. The process starts with the first call, which may come too early for it."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        metadata: str = "P2PHANDSHAKE",
        segment: int = 0,
        buffer: int = BUFFER,
        local: str = "",
        protocol: str = "tcp",
        device: str = "",
        timeout: float = 1.0,
    ) -> None:
        """Connects to nothing yet.

        Args:
            metadata: address of Mooncake's metadata server, or the word that says there is none.
            segment: bytes of this machine's memory given to the store; with 0 it uses that of others.
            buffer: bytes for objects in transit; no object may be larger.
            local: this machine's name for the other clients; "" for its address towards the master.
            protocol: "tcp" or "rdma", then with the `device`.
        """
        if importlib.util.find_spec("mooncake") is None:
            raise ImportError('a tier in Mooncake needs the client: pip install "kvjax[mooncake]"')
        super().__init__(f"mooncake://{host}:{port}", timeout)
        self._options = {"host": host, "port": port, "metadata": metadata, "segment": segment, "buffer": buffer}
        self._options |= {"local": local, "protocol": protocol, "device": device}
        self._lock = threading.Lock()  # of what follows
        self._process: subprocess.Popen[bytes] | None = None
        self._peer: socket.socket | None = None
        self._started = 0.0
        self._connected = False

    def read(self, key: str, into: memoryview) -> bool:
        into = into.cast("B")
        status = self._ask(far.READ, key, size=into.nbytes, into=into)
        if status == MISSING:
            return False
        if status >= 0 and status != into.nbytes:
            raise self._wrong_length(key, status, into.nbytes)
        self._check(status, key)
        return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        status = self._ask(far.WRITE, key, size=blob.nbytes, blob=blob)
        if status != EXISTS:
            self._check(status, key)

    def contains(self, key: str) -> bool:
        status = self._ask(far.CONTAINS, key)
        self._check(status, key)
        return status == 1

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        self._check_open()
        names = "\n".join(PREFIX + self._name(key) for key in keys).encode()
        there = bytearray(len(keys))
        if keys:
            payload = {"size": len(names), "blob": memoryview(names), "into": memoryview(there)}
            self._check(self._ask(far.CONTAINS_MANY, keys[0], **payload), f"{len(keys)} keys from {keys[0]} on")
        return [bool(byte) for byte in there]

    def delete(self, key: str) -> None:
        status = self._ask(far.DELETE, key)
        if status != MISSING:
            self._check(status, key)

    def scan(self) -> Iterator[Stored]:
        raise self._error("refused", "Mooncake's client cannot list objects")

    def close(self) -> None:
        super().close()
        with self._lock:  # a call that runs ends within its timeout
            self._hang_up(patience=far.CLOSE_SECONDS / 2)

    def _check(self, status: int, key: str) -> None:
        if status < 0:
            raise self._error(REASONS.get(status, "io"), f"{key}: Mooncake's error {status}")

    def _ask(
        self,
        operation: int,
        key: str,
        *,
        size: int = 0,
        blob: memoryview | None = None,
        into: memoryview | None = None,
    ) -> int:
        """The status of the answer, its bytes in `into`."""
        name = (PREFIX + self._name(key)).encode()
        end = time.monotonic() + self.timeout
        if not self._lock.acquire(timeout=self.timeout):
            raise self._error("timeout", f"others' calls took all of {self.timeout:g} s")
        try:
            self._check_open()  # it may have been closed while we waited
            peer = self._connect(end)
            peer.settimeout(max(0.001, end - time.monotonic()))
            peer.sendall(far.ASK.pack(operation, len(name), size) + name)
            if blob is not None:
                peer.sendall(blob)
            status, length = self._receive_answer(peer, end)
            if length and (into is None or length != into.nbytes):
                raise OSError(f"{length} bytes nobody asked for")
            if into is not None and length:
                self._receive(peer, into, end)
            return status
        except (OSError, EOFError) as error:  # whatever comes back now belongs to a call that is over
            self._hang_up()
            if isinstance(error, TimeoutError):
                raise self._error("timeout", f"no answer within {self.timeout:g} s") from error
            raise self._error("io", f"its process ended: {error!r}") from error
        except KeyboardInterrupt:
            self._hang_up()
            raise
        finally:
            self._lock.release()

    def _connect(self, end: float) -> socket.socket:
        """The socket of a process that is ready, which a first call may have to leave to a later one."""
        if self._peer is None:
            self._start()
        assert self._peer is not None
        if not self._connected:
            readable, _, _ = select.select([self._peer], [], [], max(0.0, end - time.monotonic()))
            if not readable:
                if time.monotonic() - self._started > CONNECT_SECONDS:
                    self._hang_up()
                raise self._error("timeout", "still connecting")
            status, length = self._receive_answer(self._peer, end)
            if status:
                text = bytearray(length)
                self._receive(self._peer, memoryview(text), end)
                self._hang_up()
                raise self._error("io", text.decode("utf-8", "replace"))
            self._connected = True
        return self._peer

    def _start(self) -> None:
        peer, child = socket.socketpair()
        with child:
            # -P: our folder is not where the client's own imports should look
            command = [sys.executable, "-P", str(SCRIPT), str(child.fileno()), json.dumps(self._options)]
            self._process = subprocess.Popen(
                command,
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=QUIET | os.environ,
                start_new_session=True,  # Ctrl-C is for us, who then close it
            )
        self._peer, self._started, self._connected = peer, time.monotonic(), False

    def _hang_up(self, patience: float = 0.0) -> None:
        """Ends the process: with patience it may take leave of its master first."""
        process, peer = self._process, self._peer
        self._process = self._peer = None
        if peer is not None:
            peer.close()
        if process is not None:
            try:
                process.wait(patience if self._connected else 0.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _receive_answer(self, peer: socket.socket, end: float) -> tuple[int, int]:
        head = bytearray(far.ANSWER.size)
        self._receive(peer, memoryview(head), end)
        return far.ANSWER.unpack(head)

    def _receive(self, peer: socket.socket, into: memoryview, end: float) -> None:
        while into.nbytes:
            peer.settimeout(max(0.001, end - time.monotonic()))
            got = peer.recv_into(into)
            if not got:
                raise EOFError
            into = into[got:]
