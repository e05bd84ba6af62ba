"""Authentication: one middleware over every route, closed unless a path is listed as open.

Keys are held and compared as SHA-256 digests, in constant time. Nothing here ever logs a key.
"""

import dataclasses
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvjax.serve.errors import ApiError

# The page (it asks for the key itself) and what a probe needs; none contains anything of a request.
OPEN_PATHS = frozenset({"/", "/live", "/health"})


@dataclasses.dataclass(frozen=True)
class Keyring:
    """The keys that open the server, as digests. Without any, everyone who reaches the port has access."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keyring":
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)))

    def find(self, presented: bytes) -> bytes | None:
        """The digest of the presented key, None if it opens nothing. Compares all, so time does not tell which."""
        digest = hashlib.sha256(presented).digest()
        equal = [known for known in self.digests if hmac.compare_digest(known, digest)]
        return equal[0] if equal else None

    def salt(self, digest: bytes | None, requested: str) -> str:
        """The cache salt of a request. Of several keys each has its own cache: none can probe another's."""
        if digest is None or len(self.digests) < 2:
            return requested
        return hmac.digest(digest, b"cache salt\0" + requested.encode(), "sha256").hex()


class Guard:
    """ASGI middleware: 401 for anything but `OPEN_PATHS` without a key of `keyring`."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self.app, self.keyring = app, keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        scope.setdefault("state", {})["key"] = None
        if self.keyring.digests and scope["path"] not in OPEN_PATHS:
            digest = self.keyring.find(_bearer(scope))
            if digest is None:
                return await _unauthorised(scope).response()(scope, receive, send)
            scope["state"]["key"] = digest
        await self.app(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _unauthorised(scope: Scope) -> ApiError:
    given = "authorization" in Headers(scope=scope)
    reason = "the API key is not known to this server" if given else "this server wants an API key"
    scope["state"]["note"] = "invalid_request_error invalid_api_key"
    return ApiError(
        401,
        f"{reason}; send it as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
