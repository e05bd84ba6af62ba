"""Objects in Redis or Valkey (`redis://`, `rediss://`), by redis-py.

A server bounded with maxmemory and an eviction policy is a shared cache that needs no more care; without a policy a
full one refuses writes, which is an error "full". Certificates of `rediss://` are checked, against those of
SSL_CERT_FILE where that is set.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.store.names import key_of
from kvjax.store.remote import Remote
from kvjax.store.tier import Reason, Stored

PAGE = 1000  # names a step of a scan looks at: a millisecond in which the server does nothing else


class RedisTier(Remote):
    """Strings called `prefix/ab/abcdef...` in one database of one server, which may evict them by last use."""

    evicts = True

    def __init__(
        self,
        host: str,
        port: int = 6379,
        db: int = 0,
        prefix: str = "kvjax",
        *,
        user: str | None = None,
        password: str | None = None,
        tls: bool = False,
        timeout: float = 1.0,
    ) -> None:
        try:
            import redis
            import redis.exceptions
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ImportError('a tier in Redis needs redis-py: pip install "kvjax[redis]"') from error

        super().__init__(f"{'rediss' if tls else 'redis'}://{host}:{port}/{db}?prefix={prefix}", timeout)
        self._prefix = f"{prefix}/"
        self._kinds = redis.exceptions
        self._client: Any = redis.Redis(  # typed for clients of three kinds at once
            host,
            port,
            db,
            username=user,
            password=password,
            ssl=tls,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # `Guarded` decides on that
        )

    def read(self, key: str, into: memoryview) -> bool:
        name, size = self._name(key), into.nbytes
        with self._errors():
            held = self._client.getrange(name, 0, size)  # its end counts: one byte more than there should be
            if not held and not self._client.exists(name):
                return False
        if len(held) != size:
            raise self._wrong_length(key, "more" if len(held) > size else len(held), size)
        into.cast("B")[:] = held
        return True

    def peek(self, key: str, nbytes: int) -> bytes | None:
        name = self._name(key)
        with self._errors():
            return self._client.getrange(name, 0, nbytes - 1) or (b"" if self._client.exists(name) else None)

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        name = self._name(key)
        with self._errors():
            self._client.set(name, blob if blob.c_contiguous else bytes(blob))

    def contains(self, key: str) -> bool:
        name = self._name(key)
        with self._errors():
            return bool(self._client.exists(name))

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        return self._each("exists", keys)

    def touch(self, keys: Sequence[str]) -> list[bool]:
        """As in `Tier`, for the policies of Redis by last use: the end of a chain is touched first."""
        return self._each("touch", keys[::-1])[::-1]

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._errors():
            self._client.unlink(name)

    def scan(self) -> Iterator[Stored]:
        """Bytes of the values; what Redis itself needs for each comes on top."""
        seen: set[str] = set()  # SCAN may name an object twice
        cursor, more = 0, True
        while more:
            self._check_open()
            with self._errors():
                cursor, names = self._client.scan(cursor, match=f"{self._prefix}*", count=PAGE)
                more = cursor != 0
                pipeline = self._client.pipeline(transaction=False)
                for name in names:
                    pipeline.strlen(name)
                sizes = pipeline.execute(raise_on_error=False)  # a stranger's name may be no string
            for name, size in zip(names, sizes, strict=True):
                key = key_of(name.decode("utf-8", "replace").removeprefix(self._prefix))
                if key is not None and key not in seen and isinstance(size, int) and size:
                    seen.add(key)
                    yield Stored(key, size)

    def close(self) -> None:
        super().close()
        self._client.close()

    def _each(self, command: str, keys: Sequence[str]) -> list[bool]:
        """Whether each of these is there, by a command that counts names; in one round trip."""
        self._check_open()
        names = [self._name(key) for key in keys]
        with self._errors():
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                getattr(pipeline, command)(name)
            return [bool(count) for count in pipeline.execute()]

    def _name(self, key: str) -> str:
        return self._prefix + super()._name(key)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        kinds = self._kinds
        try:
            yield
        except kinds.TimeoutError as error:
            raise self._error("timeout", error) from error
        except (kinds.RedisError, OSError) as error:
            refused = kinds.AuthenticationError, kinds.AuthorizationError, kinds.NoPermissionError, kinds.ReadOnlyError
            reason: Reason = "refused" if isinstance(error, refused) else "io"
            raise self._error("full" if isinstance(error, kinds.OutOfMemoryError) else reason, error) from error
