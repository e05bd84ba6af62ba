"""HTTP/1.1 with bounds: uvicorn's protocol alone takes headers of any length, for as long as they come.

A connection that has begun a request has `headers_seconds` for its headers, and its body then has to come at
`body_bytes_per_second` at least. What comes later, or is too much, gets an answer and is closed; so is a connection
beyond `max_connections`, and one on which nothing is ever sent.
"""

import asyncio
import json
import resource
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SPARE_FILES = 128  # descriptors for everything that is no connection


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. The bounds are attributes of the class, so that a test can lower them."""

    headers_seconds = 10.0
    body_seconds = 30.0
    body_bytes_per_second = 1024
    max_header_bytes = 64 * 1024
    max_headers = 128
    max_connections = 4096

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._header_bytes = 0  # of the request whose headers are being read
        self._body_bytes = 0  # since the timer was set
        self._reading_headers = True
        self._too_large = ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop's is of no class that asyncio has
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"{self.max_connections} connections are open, the most that this server holds")
        else:
            self._set_timer(self.headers_seconds, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._reading_headers:
            if self._timer is None:  # a further request on this connection
                self._set_timer(self.headers_seconds, self._headers_late)
            self._header_bytes += len(data)
        super().data_received(data)
        if self._reading_headers and self._header_bytes > self.max_header_bytes:
            self._too_large = self._too_long
        if self._too_large:
            self._refuse(431, self._too_large)

    def on_headers_complete(self) -> None:
        size = sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > self.max_headers:
            self._too_large = (
                f"{len(self.headers)} headers are more than {self.max_headers}, the most this server reads"
            )
        elif size + len(self.url) > self.max_header_bytes:
            self._too_large = self._too_long
        if self._too_large:
            return
        self._reading_headers, self._header_bytes, self._body_bytes = False, 0, 0
        self._set_timer(self.body_seconds, self._body_late)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._too_large:
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._too_large:
            self._stop_timer()
            self._reading_headers = True
            super().on_message_complete()

    @property
    def _too_long(self) -> str:
        return f"the headers are longer than {self.max_header_bytes:,} bytes, the most that is read"

    def _headers_late(self) -> None:
        if self._header_bytes:
            self._refuse(408, f"the headers did not come within {self.headers_seconds:g} seconds")
        else:
            self.transport.close()

    def _body_late(self) -> None:
        """Looks how much has come since the last look; where the server itself did not read, that is no fault."""
        if self.flow.read_paused or self._body_bytes >= self.body_seconds * self.body_bytes_per_second:
            self._body_bytes = 0
            self._set_timer(self.body_seconds, self._body_late)
        else:
            self._refuse(408, f"the body came at less than {self.body_bytes_per_second:,} bytes a second")

    def _set_timer(self, seconds: float, late: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        """An answer in OpenAI's form, unless another one has begun, and the end of the connection."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun:
            kind = "invalid_request_error" if status < 500 else "server_error"
            phrase = HTTPStatus(status).phrase
            code = phrase.lower().replace(" ", "_")
            detail = {"message": message, "type": kind, "param": None, "code": code}
            body = json.dumps({"error": detail}).encode()
            self.transport.write(
                f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
        self.transport.close()


def bounded_protocol() -> type[BoundedHttpProtocol]:
    """The protocol of a server in this process, which may hold fewer connections than `max_connections`."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or files - SPARE_FILES >= BoundedHttpProtocol.max_connections:
        return BoundedHttpProtocol
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), {"max_connections": max(files - SPARE_FILES, 16)})
