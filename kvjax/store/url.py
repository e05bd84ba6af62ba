"""Tiers by URL: which one, where, and under which prefix; or a class of one's own by the path to it."""

import importlib
import re
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvjax.store.tier import Tier

FORMS = {
    "gs": "gs://bucket/prefix",
    "s3": "s3://bucket/prefix?endpoint=http://host:port&region=name",
    "redis": "redis://user:password@host:port/db?prefix=kvjax",
    "rediss": "rediss://user:password@host:port/db?prefix=kvjax",
    "http": "http://host:port/path (read-only)",
    "https": "https://host/path (read-only)",
    "mooncake": "mooncake://host:port?segment=bytes&buffer=bytes&local=host&metadata=address&protocol=tcp&device=name",
}
# A tier of one's own: its options are keyword arguments of the class, each a text.
CLASS_FORM = "package.module:Class?option=value"
CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)(?:\?(?P<query>.*))?")
# Names are made of these and of keys, so that no server has to escape any, nor takes one for a pattern.
PREFIX = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


def open_tier(url: str, *, timeout: float = 1.0) -> Tier:
    """The tier at `url`. Nothing is connected yet: a server that is down is an error of the first call, not of a start.

    Put it into `Guarded`, which keeps it to its deadlines.

    Args:
        url: one of FORMS, or CLASS_FORM. Credentials in it are never printed.
        timeout: seconds for one call, as far as the tier's library can be held to that.

    Raises:
        ValueError: the URL has none of the forms; says which there are. Or there is no such class.
        ImportError: the package for it is missing; says what to install.
    """
    path = CLASS.fullmatch(url)
    if path is not None and path["module"] not in FORMS:
        return _own(path["module"], path["name"], path["query"] or "")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise _wrong("not a URL") from error
    if parts.scheme not in FORMS:
        raise _wrong(f"{parts.scheme!r} is no scheme of a tier" if parts.scheme else "no scheme")
    form = FORMS[parts.scheme]
    if not parts.hostname:
        raise _wrong("no bucket" if parts.scheme in ("gs", "s3") else "no host", form)
    if parts.fragment:
        raise _wrong("a fragment (#...) means nothing here", form)
    return OPENERS[parts.scheme](parts, timeout)


def _cloud(parts: SplitResult, timeout: float) -> Tier:
    from kvjax.store.cloud import CloudTier

    form = FORMS[parts.scheme]
    if "@" in parts.netloc or ":" in parts.netloc:
        raise _wrong("a bucket has no user and no port; credentials come from the environment", form)
    options = _options(parts, {"endpoint", "region"} if parts.scheme == "s3" else set())
    endpoint = options.get("endpoint")
    if endpoint is not None and not re.fullmatch(r"https?://[^/?#@]+", endpoint):
        raise _wrong("endpoint must be http(s)://host:port", form)
    prefix = _prefix(parts.path.strip("/"), form)
    return CloudTier(
        parts.scheme, parts.netloc, prefix, endpoint=endpoint, region=options.get("region"), timeout=timeout
    )


def _redis(parts: SplitResult, timeout: float) -> Tier:
    from kvjax.store.redis_tier import RedisTier

    form = FORMS[parts.scheme]
    db = parts.path.strip("/") or "0"
    if not re.fullmatch(r"[0-9]{1,6}", db):
        raise _wrong("a database is a number", form)
    prefix = _prefix(_options(parts, {"prefix"}).get("prefix", "kvjax"), form)
    if not prefix:
        raise _wrong("an empty prefix would take every key of the database for ours", form)
    return RedisTier(
        parts.hostname or "",
        parts.port or 6379,
        int(db),
        prefix,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme == "rediss",
        timeout=timeout,
    )


def _web(parts: SplitResult, timeout: float) -> Tier:
    import httpx

    from kvjax.store.web import WebTier

    form = FORMS[parts.scheme]
    _options(parts, set())
    path = _prefix(parts.path.strip("/"), form)
    place = parts.netloc.rpartition("@")[2]
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    base = f"{parts.scheme}://{place}/{path}".rstrip("/")
    try:
        return WebTier(base, user=user, password=password, timeout=timeout)
    except (httpx.InvalidURL, UnicodeError) as error:  # its message may quote what stands before the host
        raise _wrong("no server can have this host", form) from error


def _mooncake(parts: SplitResult, timeout: float) -> Tier:
    from kvjax.store.mooncake_tier import BUFFER, MooncakeTier

    form = FORMS[parts.scheme]
    if "@" in parts.netloc or parts.path.strip("/"):
        raise _wrong("Mooncake has neither users nor prefixes", form)
    texts = _options(parts, {"segment", "buffer", "local", "metadata", "protocol", "device"})
    sizes = [texts.pop("segment", "0"), texts.pop("buffer", str(BUFFER))]
    if not all(re.fullmatch(r"[0-9]{1,15}", size) for size in sizes):
        raise _wrong("segment and buffer must be numbers of bytes", form)
    segment, buffer = map(int, sizes)
    port = parts.port or 50051
    return MooncakeTier(parts.hostname or "", port, segment=segment, buffer=buffer, **texts, timeout=timeout)


def _own(module: str, name: str, query: str) -> Tier:
    path, options = f"{module}:{name}", _pairs(query, CLASS_FORM)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"tier {path!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Tier)):
        raise ValueError(f"tier {path!r} is no class of tiers: derive it from kvjax.store.tier.Tier")
    try:
        return kind(**options)
    except TypeError as error:  # without the values, which may hold a password
        raise ValueError(f"tier {path!r} cannot be made with the options {sorted(options)}: {error}") from error


OPENERS: Mapping[str, Callable[[SplitResult, float], Tier]] = {
    "gs": _cloud,
    "s3": _cloud,
    "redis": _redis,
    "rediss": _redis,
    "http": _web,
    "https": _web,
    "mooncake": _mooncake,
}


def _options(parts: SplitResult, known: set[str]) -> dict[str, str]:
    """The query of a URL, every name in it known and once."""
    form = FORMS[parts.scheme]
    options = _pairs(parts.query, form)
    if unknown := sorted(options.keys() - known):
        raise _wrong(f"unknown options {unknown}, known are {sorted(known)}", form)
    return options


def _pairs(query: str, form: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise _wrong("its query is not of the form name=value&name=value", form) from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise _wrong("an option is given twice", form)
    return options


def _prefix(prefix: str, form: str) -> str:
    if prefix and (not PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise _wrong("a prefix is made of letters, digits and ._- between slashes", form)
    return prefix


def _wrong(what: str, form: str | None = None) -> ValueError:
    """Says what is wrong and what would be right, without the URL, which may hold a password."""
    forms = [form] if form else [*FORMS.values(), CLASS_FORM]
    return ValueError(f"the URL of a tier: {what}. It should be like\n  " + "\n  ".join(forms))
