"""URLs of tiers: what each form opens, and what an error says of the others."""

import builtins
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.store import url as urls
from kvjax.store.tier import TierError
from kvjax.store.url import open_tier


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("gs://bucket", "gs://bucket/"),
        ("gs://bucket/", "gs://bucket/"),
        ("gs://bucket/a/b/", "gs://bucket/a/b/"),
        ("s3://bucket/a?region=eu-north-1", "s3://bucket/a/"),
        ("s3://bucket?endpoint=http://127.0.0.1:9000&region=x", "s3://bucket/"),
        ("redis://localhost", "redis://localhost:6379/0?prefix=kvjax"),
        ("redis://me:pw@127.0.0.1:7000/3?prefix=a/b", "redis://127.0.0.1:7000/3?prefix=a/b"),
        ("rediss://:pw@localhost/0", "rediss://localhost:6379/0?prefix=kvjax"),
        ("http://localhost", "http://localhost"),
        ("https://me:pw@localhost:8443/a/b/", "https://localhost:8443/a/b"),
        ("http://[::1]:8000/kv", "http://[::1]:8000/kv"),
    ],
)
def test_what_opens(opened, url, where):
    tier = opened(url)
    assert tier.where == where
    assert tier.name == "remote"
    assert tier.read_only == url.startswith("http")
    assert "pw" not in str(tier._error("io", "x"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no scheme"),
        ("/var/cache", "no scheme"),
        ("ftp://host/x", "'ftp' is no scheme"),
        ("gs:///prefix", "no bucket"),
        ("s3:bucket", "no bucket"),
        ("redis:///0", "no host"),
        ("http://host/x#y", "fragment"),
        ("http://host:port/x", "not a URL"),
        ("http://[::1/x", "not a URL"),
        ("gs://bucket?endpoint=http://x", r"unknown options \['endpoint'\]"),
        ("s3://bucket?colour=red", r"known are \['endpoint', 'region'\]"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?region", "name=value"),
        ("s3://bucket?endpoint=host:9000", r"endpoint must be http\(s\)"),
        ("s3://bucket?endpoint=http://u:p@host", r"endpoint must be http\(s\)"),
        ("s3://key:hunter2@bucket", "credentials come from the environment"),
        ("s3://bucket/../other", "a prefix is made of"),
        ("gs://bucket/a b", "a prefix is made of"),
        ("redis://host/one", "a database is a number"),
        ("redis://host?prefix=", "empty prefix"),
        ("redis://host?prefix=a*", "a prefix is made of"),
        ("redis://:hunter2@host?socket_timeout=0", "unknown options"),
        ("https://host/kv?token=hunter2", "unknown options"),
        ("https://me:hunter2@host/%2e%2e/", "a prefix is made of"),
        ("http://\u2603", "no server can have this host"),
        ("https://me:hunter2@v1.x \u202e/kv", "no server can have this host"),
        ("https://me:hunter2@\udcff/", "no server can have this host"),
        ("mooncake://host/prefix", "neither users nor prefixes"),
        ("mooncake://me:hunter2@host", "neither users nor prefixes"),
        ("mooncake://host?segment=1GB", "numbers of bytes"),
    ],
)
def test_what_does_not_open(url, says):
    with pytest.raises(ValueError, match=says) as error:
        open_tier(url)
    assert "It should be like\n  " in str(error.value)
    assert "hunter2" not in str(error.value)


PARTS = ["://", "/", ":", "@", "?", "#", "[", "]", "::1", "%00", "\0", "\udcff", "\u2603", "xn--", "..", "prefix="]
PARTS += ["&", "9999", "-1", " ", "\n", "host", "v1.x", "%2e", "segment=", "a" * 300]


@given(st.sampled_from(["redis", "rediss", "http", "https", "mooncake", "ftp", ""]), st.lists(st.sampled_from(PARTS)))
def test_any_text_opens_or_says_what_would(scheme, parts):
    refused: ValueError | None = None
    try:
        open_tier(f"{scheme}://{''.join(parts)}").close()
    except ImportError:
        return  # a client that is not installed
    except ValueError as error:
        refused = error
    assert refused is None or "It should be like\n  " in str(refused)


def test_a_bucket_that_cannot_be():
    with pytest.raises(ValueError, match="s3://x/"):
        open_tier("s3://x/?region=a")


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_needed(timeout):
    with pytest.raises(ValueError, match="timeout must be"):
        open_tier("http://host", timeout=timeout)


def test_every_form_has_its_opener():
    assert urls.OPENERS.keys() == urls.FORMS.keys()


@pytest.mark.parametrize(("url", "package", "extra"), [("redis://host", "redis", "kvjax[redis]")])
def test_a_missing_package_is_named(monkeypatch, url, package, extra):
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "') as error:
        open_tier(url)
    assert extra in str(error.value)


def test_mooncake_is_missed_without_being_imported(monkeypatch):
    """Its client is imported by another process only."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "kvjax\[mooncake\]"'):
        open_tier("mooncake://host")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert open_tier("mooncake://host:7?segment=5&local=me").where == "mooncake://host:7"


def test_nothing_is_connected_by_opening(opened):
    """Ports where nobody listens: the first call says so, and says where."""
    tiers = [opened(f"{scheme}://127.0.0.1:1", timeout=5.0) for scheme in ("redis", "rediss", "http", "https")]
    for tier in tiers:
        with pytest.raises(TierError, match=r"://127\.0\.0\.1:1") as error:
            tier.contains("abcd")
        assert error.value.reason == "io"
