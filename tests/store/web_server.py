"""Web servers for tests: one with files, and one that answers whatever it is told."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Script = Callable[[BaseHTTPRequestHandler], None]


class WebServer(ThreadingHTTPServer):
    """Serves `files` by path; a path in `scripts` is answered by its function instead.

    Attributes:
        asked: method and path of every request, in order.
    """

    daemon_threads = True
    request_queue_size = 64  # a connection that finds the queue full waits a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.scripts: dict[str, Script] = {}
        self.asked: list[tuple[str, str]] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        script = self.server.scripts.get(self.path)
        if script is not None:
            return script(self)
        content = self.server.files.get(self.path)
        answer(self, 404 if content is None else 200, content or b"")

    do_HEAD = do_GET  # noqa: N815  # http.server's name

    def log_message(self, format: str, *args: object) -> None:
        pass


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """A whole answer; Content_Length="" leaves that header out and hangs up at the end."""
    request.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        if value:
            request.send_header(name.replace("_", "-"), value)
    request.close_connection = headers.get("Content_Length") is not None
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
