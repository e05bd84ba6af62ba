"""A real Redis of a test's own: a subprocess on a free port that keeps nothing."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class RedisServer:
    """Started at once; `kill` and `start` may follow one another on the same port."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if self.binary is None:
            pytest.skip("no redis-server: apt-get install redis-server")
        self.folder = folder
        self.options = options
        self.port = port or free_port()
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", "--logfile", str(self.folder / "redis.log"), *self.options]
        self.process = subprocess.Popen(command)
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._any_port()), 1):
                return
            time.sleep(0.01)
        raise RuntimeError(f"redis-server does not start:\n{(self.folder / 'redis.log').read_text()}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _any_port(self) -> int:
        options = dict(zip(self.options[::2], self.options[1::2], strict=True))
        return int(options.get("--tls-port", self.port)) or self.port
