"""Callers of an engine: streams on an event loop in a thread of its own, so that a test can do other things."""

import asyncio
import concurrent.futures
import contextlib
import threading

from kvjax.engine import Completion, Delta, Engine, SamplingParams

PATIENCE = 120.0  # seconds after which a test gives up; nothing here takes more than one or two

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def generate(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
    """One batch with parameters of their own."""
    return engine.generate([prompt for prompt, _ in requests], [params for _, params in requests], progress=False)


class Caller:
    """One request being streamed. `deltas` grows while it goes on."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.deltas: list[Delta] = []
        self.future: concurrent.futures.Future[None]
        self._more = threading.Condition()

    def heard(self, delta: Delta) -> None:
        with self._more:
            self.deltas.append(delta)
            self._more.notify_all()

    def wait_for(self, count: int) -> None:
        """Waits until `count` deltas are there."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.deltas) >= count, PATIENCE)

    def wait(self) -> None:
        """Waits until the stream has ended, whichever way."""
        with contextlib.suppress(concurrent.futures.CancelledError):
            self.future.exception(PATIENCE)

    def result(self) -> Completion:
        """The finished request; raises what the stream has raised."""
        self.future.result(PATIENCE)
        return Completion.join(self.prompt, self.deltas)

    def disconnect(self) -> None:
        """Cancels the task that reads the stream, as a server does when its client has gone."""
        self.future.cancel()


class Client:
    """As a context manager: on leaving, all streams must have ended."""

    def __enter__(self) -> "Client":
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def submit(self, engine: Engine, prompt: list[int], params: SamplingParams, leave_after=None, **options) -> Caller:
        """Streams a request; with `leave_after` the stream is closed after so many deltas."""
        caller = Caller(prompt)

        async def read() -> None:
            async with contextlib.aclosing(engine.stream(prompt, params, **options)) as stream:
                async for delta in stream:
                    caller.heard(delta)
                    if len(caller.deltas) == leave_after:
                        return

        caller.future = asyncio.run_coroutine_threadsafe(read(), self._loop)
        return caller


def settle(engine: Engine) -> None:
    """Waits until the engine has nothing to do, and holds that it has nothing left of any request."""
    assert engine._loop is not None
    assert engine._loop.wait_idle(PATIENCE), engine.stats()
    engine.check_integrity()
