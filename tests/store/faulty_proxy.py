"""A bad network: a proxy before a real server, which lets bytes through or does to them what networks do."""

import contextlib
import random
import socket
import struct
import threading
import time

FAULTS = ("refuse", "stall", "reset", "drip", "break", "garbage")


class FaultyProxy:
    """Pumps between its own port and `target`. A fault holds for old and new connections until it is changed.

    refuse: nobody listens. stall: nothing comes back. reset: connections end. drip: a byte at a time comes back.
    break: half of an answer, then the end. garbage: other bytes than the server's.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.fault: str | None = None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def set(self, fault: str | None) -> None:
        was, self.fault = self.fault, fault
        if fault == "refuse":
            self._shut(self._listener)
            self._drop()
        elif was == "refuse":
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._shut(self._listener)
        self._drop()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                with self._lock:
                    self._sockets |= {peer, server}
                threading.Thread(target=self._pump, args=(peer, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, peer, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self._pass(piece, sink, self.fault if answers else None)
        self._shut(source)
        self._shut(sink)

    def _pass(self, piece: bytes, sink: socket.socket, fault: str | None) -> None:
        if fault == "stall":
            self._stopped.wait(60)
        elif fault == "reset":
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError
        elif fault == "drip":
            for at in range(len(piece)):
                sink.sendall(piece[at : at + 1])
                if self._stopped.is_set():
                    raise ConnectionAbortedError
                time.sleep(0.02)
        elif fault == "break":
            sink.sendall(piece[: len(piece) // 2])
            raise ConnectionAbortedError
        elif fault == "garbage":
            sink.sendall(random.randbytes(len(piece)))
        else:
            sink.sendall(piece)

    def _drop(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            self._shut(each)

    def _shut(self, each: socket.socket) -> None:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
