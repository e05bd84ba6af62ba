"""A server's life: port, model, engine, requests, drain, exit.

    main thread:     uvicorn's event loop; signals arrive here
    start thread:    engine.start(), then prints the report
    drain thread:    engine.drain(), started by the first signal
    deadline thread: ends the process if the steps behind the first signal do not: `deadline.py`
    close thread:    engine.close(), once the port is closed
    engine thread:   the engine's own; if it dies, the watcher ends the process

A signal ends the process within the shutdown timeout and `GRACE_SECONDS`, whatever hangs:

    0 .............. timeout ............................................. timeout + GRACE_SECONDS
    requests finish          cancelled ones end | last answers | close     os._exit

Exit status: 0 after a signal, 1 if the engine failed, 2 for what the operator got wrong; a second signal ends
the process at once with 128 + its number.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import FrameType

import uvicorn

from kvjax.serve.app import create_app
from kvjax.serve.checkpoint import ModelNotFoundError, find_model, served_names
from kvjax.serve.config import AUTO, ServeConfig
from kvjax.serve.deadline import ExitDeadline, leave
from kvjax.serve.hosts import AllowedHosts
from kvjax.serve.http_protocol import bounded_protocol
from kvjax.serve.limits import Limits
from kvjax.serve.probes import read_page
from kvjax.serve.protocol import EngineProtocol
from kvjax.store.tier import TierError

logger = logging.getLogger("kvjax.serve")

LAST_ANSWERS_SECONDS = 5  # for answers that are ready but not yet read, once the engine is empty
GRACE_SECONDS = 1.5  # behind the shutdown timeout; with what the kernel needs to end a process, less than 2
SAVE_SECONDS = 30.0  # more of them with a session directory, whose files are written behind the timeout
DRAIN_GRACE_SECONDS = 1.1  # of the grace, for the drain; what is left is for the last answers and the close
EXIT_SECONDS = 0.5  # for the end of the interpreter
CLOSE_SECONDS = 10.0  # for the engine to close where no signal has set a deadline
WATCH_SECONDS = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048


class StartError(RuntimeError):
    """The server cannot start; the message is for the operator."""


def run(
    config: ServeConfig,
    build: Callable[[ServeConfig], tuple[EngineProtocol, tuple[str, ...]]] | None = None,
    *,
    limits: Limits | None = None,
) -> int:
    """Serves until a signal or a failure; returns the exit status. `build` makes the engine and its names."""
    configure_logging(config.log_level)
    try:
        with bind(config.host, config.port) as listener:
            engine, names = (build or build_engine)(config)
            try:
                listener.listen(BACKLOG)  # here, because uvloop does not report a failure
            except OSError as error:
                raise StartError(f"cannot listen: {error.strerror}; choose another --port") from error
            server = Server(engine, names, config, limits)
            host, port = listener.getsockname()[:2]
            shown, keys = f"[{host}]" if ":" in host else host, "with API key" if config.api_key else "no key"
            if config.generation_config == AUTO and engine.generation_defaults:
                shown_defaults = ", ".join(f"{name} {value:g}" for name, value in engine.generation_defaults.items())
                logger.info("requests default to %s (--generation-config none for OpenAI's)", shown_defaults)
            logger.info("listening on http://%s:%d (%s)", shown, port, keys)
            with server.signals_handled():
                server.run([listener])
                return server.finish()
    except (StartError, ModelNotFoundError) as error:
        print(f"kvjax: {error}", file=sys.stderr)
        return 2


def build_engine(config: ServeConfig) -> tuple[EngineProtocol, tuple[str, ...]]:
    """The engine of `config`, not started yet. Raises StartError or ModelNotFoundError."""
    path = find_model(config.model)
    from kvjax.engine import Engine
    from kvjax.serve.engine_config import engine_config

    names = config.served_model_name or served_names(config.model, path)
    try:
        engine = Engine.from_pretrained(path, engine_config(config, path), chat_template=config.chat_template)
    except (ValueError, OSError, NotImplementedError) as error:
        raise StartError(f"{config.model or names[0]}: {error}") from error
    return engine, names


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before the model loads. Raises StartError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise StartError(f"host {host!r} is no address of this machine: {error.strerror}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    # connections of the server before this one may still linger
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        way_out = {
            "EADDRINUSE": "another process has it; choose another with --port, or 0 for a free one",
            "EACCES": "only root may use it; choose one above 1023 with --port",
        }.get(_errno_name(error), "choose another --host or --port")
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; {way_out}") from error
    return listener


def app_config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        loop="uvloop",
        http=bounded_protocol(),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # the gate logs one line a request
        server_header=False,
        timeout_keep_alive=75,  # longer than clients keep idle connections, so it is they who close
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )


class Server(uvicorn.Server):
    """uvicorn, but a signal drains the engine first, while probes and refusals are still answered."""

    def __init__(
        self, engine: EngineProtocol, names: Sequence[str], config: ServeConfig, limits: Limits | None = None
    ) -> None:
        app = create_app(
            engine,
            names=config.served_model_name or names,
            api_keys=config.api_key,
            allowed_hosts=AllowedHosts.resolve(config.allowed_hosts, keys=bool(config.api_key), bound=config.host),
            defaults=engine.generation_defaults if config.generation_config == AUTO else {},
            max_queued=config.max_num_queued_reqs,
            limits=limits,
            page=read_page(),
        )
        super().__init__(app_config(app))
        self._engine, self._shutdown_timeout = engine, config.shutdown_timeout
        self._grace = GRACE_SECONDS + (0.0 if config.session_dir is None else SAVE_SECONDS)
        self._deadline: ExitDeadline | None = None  # from the first signal on
        self._failure: BaseException | None = None
        self._starter = threading.Thread(target=self._start, name="kvjax-start", daemon=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._starter.start()

    async def main_loop(self) -> None:
        async with self._watched():
            await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._deadline is not None:
            left = self._deadline.left - (GRACE_SECONDS - DRAIN_GRACE_SECONDS)
            # uvicorn passes it to `asyncio.wait_for`, which takes fractions
            self.config.timeout_graceful_shutdown = max(min(left, LAST_ANSWERS_SECONDS), 0.1)  # pyright: ignore[reportAttributeAccessIssue]
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then exit with 0. Second: exit now."""
        if self._deadline is not None:
            with contextlib.suppress(OSError):  # not `print`, which the signal may have interrupted
                os.write(2, f"kvjax: second {signal.Signals(sig).name}, leaving now\n".encode())
            os._exit(128 + sig)
        self._deadline = ExitDeadline(self._shutdown_timeout + self._grace, lambda: self._status)
        threading.Thread(target=self._drain, args=(sig,), name="kvjax-drain", daemon=True).start()

    @contextlib.contextmanager
    def signals_handled(self) -> Iterator[None]:
        """Handles signals behind uvicorn's loop too; after the first one to the end of the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            if self._deadline is None:
                for number, handler in former.items():
                    signal.signal(number, handler)

    def finish(self) -> int:
        """Closes the engine once the port is closed; returns the exit status, or ends the process if threads hang."""
        failure, status = self._failure or self._engine.failure, self._status
        if self._starter.is_alive():
            # it compiles, which nothing can interrupt, and Python would wait for it or crash on it
            logging.shutdown()
            os._exit(status)
        closed = self._close_engine(CLOSE_SECONDS if self._deadline is None else self._deadline.left)
        if status == 2:
            print(f"kvjax: {failure}", file=sys.stderr)
        elif failure is not None:
            logger.critical("the engine failed: %s", _sentence(failure))
        else:
            logger.info("stopped")
        if not closed:
            leave(status, "the engine has not closed in time")
        if self._deadline is not None and self._deadline.left < EXIT_SECONDS:
            leave(status, "no time is left")  # for the interpreter's own end, which no timer can cut short
        return status

    def _close_engine(self, seconds: float) -> bool:
        """Closes the engine in a thread of its own, for signals arrive in this one; returns whether all of it ended."""
        closed = threading.Event()

        def close() -> None:
            if self._engine.close(max(seconds - 0.4, 0.1)):
                closed.set()

        closing = threading.Thread(target=close, name="kvjax-close", daemon=True)
        closing.start()
        closing.join(max(seconds - 0.1, 0.1))
        return closed.is_set()

    @property
    def _status(self) -> int:
        """Exit status, as things stand."""
        if isinstance(self._failure, StartError):
            return 2
        return 0 if (self._failure or self._engine.failure) is None else 1

    def _start(self) -> None:
        try:
            began = time.monotonic()
            self._engine.start()
            for line in report_lines(self._engine.startup_report()):
                logger.info("%s", line)
            logger.info("ready after %.1f s", time.monotonic() - began)
        except (TierError, ValueError, ImportError, MemoryError) as error:  # what was named or asked for cannot be had
            logger.debug("start failed", exc_info=True)
            self._failure = StartError(str(error) or repr(error))
        except BaseException as error:
            logger.debug("start failed", exc_info=True)
            self._failure = error

    def _drain(self, sig: int) -> None:
        try:
            if self._engine.phase == "ready":
                name, running = signal.Signals(sig).name, self._engine.stats().running
                logger.info("%s: draining %d requests, at most %g s", name, running, self._shutdown_timeout)
                self._engine.drain(self._shutdown_timeout)
        except BaseException as error:
            self._failure = error
        finally:
            self.should_exit = True

    @property
    def _late(self) -> bool:
        """Whether the drain has had its time."""
        return self._deadline is not None and self._deadline.left < GRACE_SECONDS - DRAIN_GRACE_SECONDS

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        async def watch() -> None:
            while self._failure is None and self._engine.failure is None and not self._late:
                await asyncio.sleep(WATCH_SECONDS)
            self.should_exit = True

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


def configure_logging(level: str) -> None:
    """Lines as `12:00:00 INFO kvjax.serve: ...` on stderr; other libraries' chatter from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("kvjax").setLevel(level.upper())


def report_lines(report: str | Sequence[tuple[str, str]]) -> list[str]:
    """The start-up report as lines, names aligned."""
    if isinstance(report, str):
        return report.splitlines()
    width = max((len(name) for name, _ in report), default=0)
    return [f"{name:<{width}}  {value}" for name, value in report]


def _errno_name(error: OSError) -> str:
    import errno

    return errno.errorcode.get(error.errno or 0, "")


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
