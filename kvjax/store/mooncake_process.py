"""The process that Mooncake's client lives in, at the other end of a socket. Started by `mooncake_tier`.

A process of its own, because the client holds Python's lock while it connects and while it closes (90 s when its
master is down) and ends its process when it is called after that. Here it may: who waits for it can kill it.

Frames, little-endian. Asked: operation, bytes of the name, bytes of the object; the name; for a write the object, and
for a question after many names those, a line each. Answered: a status, which is below 0 an error of Mooncake's, and the
bytes that follow. First comes an answer unasked: 0 when connected, or 1 and a text.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

READ, WRITE, CONTAINS, DELETE, CONTAINS_MANY = range(5)
ASK = struct.Struct("<BHQ")
ANSWER = struct.Struct("<qQ")
UNREADABLE = -1  # it is there and comes not, for which Mooncake has no number
CLOSE_SECONDS = 10


def connect(options: dict[str, Any]) -> Any:
    """The client, connected; waits for the master as long as the library does."""
    library = importlib.import_module("mooncake.store")  # of an extra
    local = options["local"]
    if not local:  # the address that the master would see
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((options["host"], options["port"]))
            local = probe.getsockname()[0]
    store = library.MooncakeDistributedStore()
    master = f"{options['host']}:{options['port']}"
    sizes = options["segment"], options["buffer"]
    status = store.setup(local, options["metadata"], *sizes, options["protocol"], options["device"], master)
    if status:
        raise ConnectionError(f"Mooncake does not connect to {master} (status {status})")
    return store


def answer(store: Any, operation: int, name: str, blob: memoryview | None, size: int) -> tuple[int, Any]:
    """Status and what to send with it. Of a read: the object's size, and its bytes if that is the one expected."""
    if operation == WRITE:
        return store.put(name, blob), b""
    if operation == CONTAINS:
        return store.is_exist(name), b""
    if operation == CONTAINS_MANY:
        assert blob is not None
        statuses = exist(store, bytes(blob).decode().split("\n"))
        return min(0, *statuses), bytes(status == 1 for status in statuses)
    if operation == DELETE:
        return store.remove(name), b""
    held = store.get_buffer(name)  # the client's own memory: it may write there late, and nobody minds
    if held is None:
        status = store.get_size(name)
        return (UNREADABLE if status == size else status), b""
    blob = memoryview(held)
    return blob.nbytes, (blob if blob.nbytes == size else b"")


def exist(store: Any, names: list[str]) -> list[int]:
    """For each name 1, 0, or an error below 0."""
    if hasattr(store, "batch_is_exist"):  # not in clients of before 2025
        return list(store.batch_is_exist(names))
    return [store.is_exist(name) for name in names]


def receive(peer: socket.socket, buffer: memoryview) -> None:
    while buffer.nbytes:
        got = peer.recv_into(buffer)
        if not got:
            raise EOFError
        buffer = buffer[got:]


def serve(peer: socket.socket, store: Any) -> None:
    """GenerationWriters until the other end hangs up."""
    head = bytearray(ASK.size)
    while True:
        receive(peer, memoryview(head))
        operation, length, size = ASK.unpack(head)
        name = bytearray(length)
        receive(peer, memoryview(name))
        blob = None
        if operation in (WRITE, CONTAINS_MANY):
            blob = memoryview(bytearray(size))
            receive(peer, blob)
        status, content = answer(store, operation, name.decode(), blob, size)
        peer.sendall(ANSWER.pack(status, len(content)))
        peer.sendall(content)


def main() -> None:
    descriptor, options = int(sys.argv[1]), json.loads(sys.argv[2])
    peer = socket.socket(fileno=descriptor)
    try:
        store = connect(options)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".encode()
        peer.sendall(ANSWER.pack(1, len(text)) + text)
        return
    with contextlib.suppress(EOFError, OSError):
        peer.sendall(ANSWER.pack(0, 0))
        serve(peer, store)
    signal.alarm(CLOSE_SECONDS)  # ends us if the master does not answer
    store.close()
    os._exit(0)  # the library's own destructors would ask the master once more


if __name__ == "__main__":
    main()
