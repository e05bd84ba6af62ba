"""`python -m kvjax.serve` as a user starts it: its own process, the model that ships, a real client."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "models" / "kvjax_small"


class ServerProcess:
    """A running server; use it as a context manager, which ends it by force if nothing else has."""

    def __init__(self, log: pathlib.Path, *flags: str, model: str = "kvjax-small") -> None:
        self._log = log
        # the tests' own settings (no compilation cache, one device) hold here too
        command = [sys.executable, "-m", "kvjax.serve", model, "--port", "0", "--compile-cache", "none", *flags]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with log.open("w") as out:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.log)) is None:
            assert self._process.poll() is None, f"the server ended:\n{self.log}"
            assert time.monotonic() < end, f"no {pattern!r} after {seconds} s in:\n{self.log}"
            time.sleep(0.05)
        return found

    def ready(self) -> str:
        """Waits until it serves; returns its address."""
        url = self.wait_for(r"listening on (http://\S+)")[1]
        self.wait_for("ready after")
        return url

    def terminate(self) -> int:
        """Asks it to end; returns its exit status."""
        self.send(signal.SIGTERM)
        return self.wait(60)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Waits for its end; returns its exit status."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
