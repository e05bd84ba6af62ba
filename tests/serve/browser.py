"""A headless Chromium for tests of the page, driven by its DevTools protocol: no package is needed for that."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import subprocess
import sys
import time
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
# The browser reads commands from file 3 and writes answers to file 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium, driven by its DevTools protocol through two pipes."""

    def __init__(self, program: str, profile: str) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # out of the way of 3 and 4
        high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10) for file in (theirs_in, theirs_out)]
        command = [sys.executable, "-c", LAUNCH, *map(str, high), program, *FLAGS, f"--user-data-dir={profile}"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=high, stdin=quiet, stdout=quiet, stderr=quiet)
        for file in (theirs_in, theirs_out, *high):
            os.close(file)
        self._ids, self._buffer = itertools.count(1), b""
        self.events: list[dict] = []

    def ask(self, method: str, session: str | None = None, **params) -> dict:
        """The result of a command; events that come meanwhile are kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(30.0)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self, seconds: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], seconds)
            part = os.read(self._in, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Tab:
    """A tab with a profile of its own that has opened an address."""

    def __init__(self, browser: Browser, address: str, width: int = 1280) -> None:
        self._browser, self._ask = browser, browser.ask
        browser.events.clear()
        self._context = self._ask("Target.createBrowserContext")["browserContextId"]
        target = self._ask("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.protocol === 'http:'")

    def ask(self, method: str, **params) -> dict:
        return self._ask(method, self._session, **params)

    def run(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):  # an element has no value
            assert time.monotonic() < end, f"{expression} did not come true; the page says: {self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.ask("Input.insertText", text=text)

    def press(self, key: str, **options) -> None:
        """A key by name, with `modifiers` 2 for Ctrl or 8 for Shift."""
        code = {"Enter": 13, "Escape": 27, "ArrowRight": 39}[key]
        typed = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed, **options)

    def idle(self) -> None:
        self.until("document.querySelector('#stop').disabled")

    def requests(self) -> list[str]:
        self.run("0")  # collects what was reported until now
        events = (each for each in self._browser.events if each.get("sessionId") == self._session)
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Exceptions, breaches of the page's policy and other errors, but for answers that are no success."""
        self.run("0")
        found = []
        for each in self._browser.events:
            if each.get("sessionId") == self._session and each["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(each["params"]["exceptionDetails"]))
            elif each.get("sessionId") == self._session and each["method"] == "Log.entryAdded":
                found.append(each["params"]["entry"]["text"])
        return [text for text in found if "the server responded with a status of" not in text]

    def close(self) -> None:
        self._ask("Target.disposeBrowserContext", browserContextId=self._context)
