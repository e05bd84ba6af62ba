"""Objects on any web server (`http://`, `https://`), to be read only: a published cache, as static files.

By httpx rather than urllib, for its pool of connections: a handshake for each block would cost more than the block.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvjax.store.rejected import RejectedKeys
from kvjax.store.remote import Remote
from kvjax.store.tier import Stored, TierError

if TYPE_CHECKING:
    import httpx

REDIRECTS = 3
CONNECTIONS = 16
MISSING = {404, 410}
REFUSED = {400, 401, 403, 405, 407, 451}


class WebTier(Remote):
    """Files called `base/ab/abcdef...`. No byte of a body is read before its announced length is the right one.

    An object that was rejected counts as missing for 10 minutes: nobody can remove it, and each request would download
    it again.
    """

    read_only = True

    def __init__(self, base: str, *, user: str = "", password: str = "", timeout: float = 1.0) -> None:
        """Connects to nothing yet.

        Args:
            base: "http(s)://host:port/path", without a slash at its end.
        """
        import httpx

        super().__init__(base, timeout)
        self._httpx = httpx
        self._auth = httpx.BasicAuth(user, password) if user else None
        self._home = _origin(httpx.URL(base))
        self._rejected = RejectedKeys()
        self._client = httpx.Client(
            timeout=timeout,
            limits=httpx.Limits(max_connections=CONNECTIONS),
            headers={"Accept-Encoding": "identity"},  # so that Content-Length is the object's own
        )

    def read(self, key: str, into: memoryview) -> bool:
        if self._is_rejected(key):
            return False
        end = time.monotonic() + self.timeout
        with self._ask("GET", key, end) as response:
            if response is None:
                return False
            size, target = into.nbytes, into.cast("B")
            announced = response.headers.get("Content-Length")
            if announced is not None and announced != str(size):
                raise self._wrong_length(key, f"{announced:.20}", size)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise self._error("io", f"{key} comes encoded, which was not asked for")
            at = 0
            for piece in response.iter_raw():
                if at + len(piece) > size:
                    raise self._wrong_length(key, "more", size)
                target[at : at + len(piece)] = piece
                at += len(piece)
                self._check_time(end)
            if at < size:
                raise self._wrong_length(key, at, size)
            return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        raise self._error("refused", "read-only")

    def contains(self, key: str) -> bool:
        if self._is_rejected(key):
            return False
        with self._ask("HEAD", key, time.monotonic() + self.timeout) as response:
            return response is not None

    def delete(self, key: str) -> None:
        raise self._error("refused", "read-only")

    def reject(self, key: str) -> None:
        self._name(key)
        self._rejected.add(key)

    def scan(self) -> Iterator[Stored]:
        raise self._error("refused", "a web server does not say what it holds")

    def close(self) -> None:
        super().close()
        self._client.close()

    def _is_rejected(self, key: str) -> bool:
        self._name(key)  # raises for what is no key, and after close
        return key in self._rejected

    @contextlib.contextmanager
    def _ask(self, method: str, key: str, end: float) -> Iterator["httpx.Response | None"]:
        """The answer, its body not yet read, after as many redirects as we follow; None if there is no such file."""
        httpx = self._httpx
        request = self._client.build_request(method, f"{self.where}/{self._name(key)}")
        try:
            for _ in range(REDIRECTS + 1):
                auth = self._auth if _origin(request.url) == self._home else None  # a password is for one server only
                response = self._client.send(request, stream=True, auth=auth)
                with contextlib.closing(response):
                    self._check_time(end)
                    if response.next_request is None:
                        yield self._found(response)
                        return
                    if request.url.scheme == "https" and response.next_request.url.scheme != "https":
                        raise self._error("refused", "redirected from https to http")
                    request = response.next_request
            raise self._error("io", f"more than {REDIRECTS} redirects")
        except httpx.TimeoutException as error:
            raise self._error("timeout", f"no answer within {self.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise self._error("io", f"{type(error).__name__}: {error}") from error

    def _found(self, response: "httpx.Response") -> "httpx.Response | None":
        status = response.status_code
        if status in MISSING:
            return None
        if status != 200:
            raise self._error("refused" if status in REFUSED else "io", f"HTTP {status}")
        return response

    def _check_time(self, end: float) -> None:
        """httpx counts its timeout anew with every packet, which a server that drips would live on."""
        if time.monotonic() > end:
            raise TierError("timeout", f"{self.where}: not done within {self.timeout:g} s")


def _origin(url: "httpx.URL") -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
