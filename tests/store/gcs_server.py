"""The part of Google Cloud Storage's JSON API that TensorStore speaks, in memory."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class GcsServer(ThreadingHTTPServer):
    """One bucket whatever its name; lists in pages of ten, so that paging is tested too."""

    daemon_threads = True
    request_queue_size = 64  # a connection that finds the queue full waits a second
    page = 10

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}  # by "bucket/name": content and generation
        self.generation = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: GcsServer
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query = self._parts()
        listed = re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path)
        if listed:
            return self._list(f"{listed[1]}/", query)
        name = self._name(path)
        with self.server.lock:
            held = self.server.objects.get(name)
        if held is None:
            return self._answer(404)
        blob, generation = held
        if query.get("alt") != "media":
            return self._json(_metadata(name, blob, generation))
        headers = {"x-goog-generation": str(generation), "ETag": hashlib.md5(blob).hexdigest()}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._answer(200, blob, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(blob)), len(blob) - 1)
        if first >= len(blob):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(blob)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob)}"
        return self._answer(206, blob[first : last + 1], headers)

    def do_POST(self) -> None:
        path, query = self._parts()
        blob = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{path.split('/')[5]}/{query['name']}"
        with self.server.lock:
            self.server.generation += 1
            self.server.objects[name] = (blob, self.server.generation)
            metadata = _metadata(name, blob, self.server.generation)
        self._json(metadata)

    def do_DELETE(self) -> None:
        path, _ = self._parts()
        with self.server.lock:
            gone = self.server.objects.pop(self._name(path), None)
        self._answer(404 if gone is None else 204)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _parts(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _name(self, path: str) -> str:
        _, _, _, _, bucket, _, name = path.split("/", 6)
        return f"{bucket}/{unquote(name)}"

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("pageToken", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        with self.server.lock:
            names = sorted(name.removeprefix(bucket) for name in self.server.objects if name.startswith(bucket))
            names = [name for name in names if name.startswith(prefix) and first <= name < end and name > after]
            items = [_metadata(bucket + n, *self.server.objects[bucket + n]) for n in names[: self.server.page]]
        more = {"nextPageToken": names[self.server.page - 1]} if len(names) > self.server.page else {}
        self._json({"items": items} | more)

    def _json(self, content: dict) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _metadata(name: str, blob: bytes, generation: int) -> dict[str, str]:
    bucket, _, inside = name.partition("/")
    return {"bucket": bucket, "name": inside, "generation": str(generation), "size": str(len(blob))}
