"""Objects in Google Cloud Storage (`gs://`) or in anything that speaks S3 (`s3://`), by TensorStore's drivers.

Credentials come from where those drivers look: Google's application default credentials; AWS's environment
variables, profile or machine role. TENSORSTORE_GCS_HTTP_URL points `gs://` at an emulator.

Python cannot ask TensorStore for sizes. So a read asks for exactly the bytes it expects and at the same time for one
beyond them, which must not be there; and a scan tells names only, with sizes of 0.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.store.names import key_of
from kvjax.store.remote import Remote
from kvjax.store.tier import Reason, Stored, TierError

DRIVERS = {"gs": "gcs", "s3": "s3"}
# How TensorStore's errors begin. The rest are faults that may pass.
REASONS: dict[str, Reason] = {
    "OUT_OF_RANGE": "length",
    "PERMISSION_DENIED": "refused",
    "UNAUTHENTICATED": "refused",
    "INVALID_ARGUMENT": "refused",
    "DEADLINE_EXCEEDED": "timeout",
}
CONCURRENCY = 16
SCAN_TIMEOUTS = 30
# TensorStore never ends a request that stalls: it holds its connection, one of CONCURRENCY, for half an hour. Its
# HTTP client can be told otherwise only by these variables, which it reads once, at its first request.
WATCHDOG = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "10", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1000"}


class CloudTier(Remote):
    """One prefix of one bucket."""

    def __init__(
        self,
        scheme: str,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        timeout: float = 1.0,
    ) -> None:
        """Opens nothing yet: the first call connects.

        Args:
            scheme: "gs" or "s3".
            prefix: of every name, without a slash at its end.
            endpoint: for S3, "http(s)://host:port" of a server that is not AWS.
            region: for S3; without it the server is asked.
        """
        import tensorstore

        prefix = f"{prefix}/" if prefix else ""
        super().__init__(f"{scheme}://{bucket}/{prefix}", timeout)
        for variable, value in WATCHDOG.items():
            os.environ.setdefault(variable, value)
        driver = DRIVERS[scheme]
        # One attempt, for `Guarded` decides on others, and a pool of its own, which nobody else's stalls can fill.
        retries = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
        context = {f"{driver}_request_retries": retries, f"{driver}_request_concurrency": {"limit": CONCURRENCY}}
        spec = {"driver": driver, "bucket": bucket, "path": prefix}
        spec |= {"endpoint": endpoint} if endpoint else {}
        spec |= {"aws_region": region} if region else {}
        try:
            opening = tensorstore.KvStore.open(spec, context=tensorstore.Context(context))
            self._store = opening.result(timeout=timeout)
        except (ValueError, TimeoutError) as error:
            raise ValueError(f"{self.where}: {error}") from error

    def read(self, key: str, into: memoryview) -> bool:
        name, size = self._name(key), into.nbytes
        end = time.monotonic() + self.timeout
        body = self._store.read(name, byte_range=slice(0, size))
        beyond = self._store.read(name, byte_range=slice(size, size + 1))
        try:
            held = self._part(body, end)
            if held is None:
                return False
            if len(held) != size:
                raise self._wrong_length(key, "fewer", size)
            if self._part(beyond, end):
                raise self._wrong_length(key, "more", size)
        finally:
            body.cancel()
            beyond.cancel()
        into.cast("B")[:] = held
        return True

    def peek(self, key: str, nbytes: int) -> bytes | None:
        end = time.monotonic() + self.timeout
        head = self._part(self._store.read(self._name(key), byte_range=slice(0, nbytes)), end)
        if head != b"":
            return head
        blob = self.load(key)  # it ends before: a range beyond the end has no bytes at all
        return None if blob is None else blob[:nbytes]

    def load(self, key: str) -> bytes | None:
        result = self._result(self._store.read(self._name(key)), time.monotonic() + SCAN_TIMEOUTS * self.timeout)
        return None if result.state == "missing" else result.value

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        # bytes(): a request that stalls outlives the call, and the caller's memory is its own again after that
        self._result(self._store.write(self._name(key), bytes(blob)))

    def contains(self, key: str) -> bool:
        return self._result(self._store.read(self._name(key), byte_range=slice(0, 0))).state == "value"

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """As `contains`, CONCURRENCY at a time; the timeout is that of one call for each so many."""
        self._check_open()
        names = [self._name(key) for key in keys]
        end = time.monotonic() + self.timeout * max(-(-len(names) // CONCURRENCY), 1)
        reads = [self._store.read(name, byte_range=slice(0, 0)) for name in names]
        try:
            return [self._result(future, end).state == "value" for future in reads]
        finally:
            for future in reads:
                future.cancel()

    def delete(self, key: str) -> None:
        self._result(self._store.write(self._name(key), None))

    def scan(self) -> Iterator[Stored]:
        """Names only: `nbytes` is 0. All at once, which may take SCAN_TIMEOUTS times as long as another call."""
        self._check_open()
        names = self._result(self._store.list(), time.monotonic() + SCAN_TIMEOUTS * self.timeout)
        keys = (key_of(name.decode("utf-8", "replace")) for name in names)
        return iter([Stored(key, 0) for key in keys if key is not None])

    def _part(self, future: Any, end: float) -> bytes | None:
        """The bytes of a range, none where the object has none there; None without an object."""
        try:
            result = self._result(future, end)
        except TierError as error:
            if error.reason == "length":
                return b""
            raise
        return None if result.state == "missing" else result.value

    def _result(self, future: Any, end: float | None = None) -> Any:
        """What comes of it by `end`, or within the timeout."""
        try:
            return future.result(timeout=self.timeout if end is None else max(0.0, end - time.monotonic()))
        except TimeoutError as error:
            future.cancel()
            raise self._error("timeout", f"no answer in time ({self.timeout:g} s a call)") from error
        except Exception as error:  # ValueError, whatever it was
            status = str(error).partition(":")[0]
            raise self._error(REASONS.get(status, "io"), f"{error!s:.300}") from error
