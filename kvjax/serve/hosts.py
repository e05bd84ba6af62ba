"""Host check: the names under which a server answers, so that no web page reaches it by DNS rebinding.

A page of evil.example whose name is made to resolve to 127.0.0.1 is of the same origin as the server, and a browser
lets it read every answer. Its requests carry `Host: evil.example`, which is all there is to tell them by.
"""

import dataclasses
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvjax.serve.errors import ApiError
from kvjax.serve.loopback import is_loopback

ANY = "*"
# What a prober outside the machine asks under an address of its own; neither tells anything of a model or a request.
PROBE_PATHS = frozenset({"/live", "/health"})


@dataclasses.dataclass(frozen=True)
class AllowedHosts:
    """Host names that are served besides loopback ones; `*` is any name, `*.example.org` any below it."""

    names: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, names: Iterable[str], *, keys: bool, bound: str = "") -> "AllowedHosts":
        """The names of a configuration: with keys and without names any, for a page does not have the key.

        Args:
            bound: address that the server listens on, which is a name too.
        """
        given = tuple(name.lower().rstrip(".") for name in names)
        if keys:
            return cls(given or (ANY,))
        return cls((*given, bound.lower()) if bound else given)

    def __contains__(self, host: str) -> bool:
        if is_loopback(host):
            return True
        return any(name in (ANY, host) or (name.startswith("*.") and host.endswith(name[1:])) for name in self.names)


class HostGuard:
    """ASGI middleware: 403 for a request whose Host header names no host that is served."""

    def __init__(self, app: ASGIApp, allowed: AllowedHosts) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBE_PATHS:
            presented = Headers(scope=scope).getlist("host") or [""]
            refused = [each for each in presented if host_name(each) not in self.allowed]
            if refused or len(presented) > 1:
                scope.setdefault("state", {})["note"] = "invalid_request_error host_not_allowed"
                return await _refusal(presented).response()(scope, receive, send)
        await self.app(scope, receive, send)


def host_name(header: str) -> str:
    """The host of a Host header, without its port, brackets and the dot at the end of an absolute name."""
    name, _, port = header.strip().lower().rpartition(":")
    if not name or not port.isdecimal():
        name = header.strip().lower()
    if name.startswith("[") and name.endswith("]"):
        return name[1:-1]
    return name.removesuffix(".")


def _refusal(presented: list[str]) -> ApiError:
    shown = ", ".join(f"{each[:100]!r}" for each in presented[:3])
    return ApiError(
        403,
        f"the Host header is {shown}, under which this server does not answer; use localhost or 127.0.0.1, or start "
        "it with --allowed-hosts NAME, or with --api-key",
        code="host_not_allowed",
    )
