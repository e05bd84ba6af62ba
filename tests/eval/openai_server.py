"""A server of canned answers, for what a real one does only on a bad day."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

Reply = tuple[int, Any]  # status, JSON or the bytes of a stream


def stream(*chunks: dict[str, Any], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def text(piece: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": piece, "finish_reason": finish, "logprobs": None}
    return {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}


@contextlib.contextmanager
def serving(reply: Callable[[str, dict[str, Any], dict[str, str]], Reply]) -> Iterator[str]:
    """Its address. `reply` gets path, body and headers; a stream shorter than announced breaks off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(*reply(self.path, {}, {name.lower(): value for name, value in self.headers.items()}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*reply(self.path, body, {name.lower(): value for name, value in self.headers.items()}))

        def _answer(self, status: int, content: Any) -> None:
            streamed = isinstance(content, bytes)
            payload = content if streamed else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if streamed else "application/json")
            cut = streamed and not payload.endswith(b"[DONE]\n\n")
            self.send_header("Content-Length", str(len(payload) + 100 * cut))
            self.send_header("Connection", "close")  # so that whoever stops it is gone for its clients, too
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
