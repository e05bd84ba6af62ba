"""Server configuration: one frozen value, checked once, before a model is touched or jax is imported."""

import dataclasses
from pathlib import Path
from typing import Literal

from kvjax.serve.loopback import is_loopback
from kvjax.store.config import StoreConfig

AUTO: Literal["auto"] = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")
WHEN_FULL = ("reselect", "stop")
ATTENTION_BACKENDS = ("reference", "auto", "tpu", "gpu")  # those of `kvjax.engine.config`, which imports jax
GENERATION_CONFIGS = (AUTO, "none")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Attributes, each with a flag of its name (`python -m kvjax.serve --help`):

    model: a directory, a GGUF file, a hub id, a name of `kvjax.models.catalog`, or "" for its first.
    served_model_name: what requests may call the model; the first is shown. Empty takes it from `model`.
    api_key: keys that open the server; none at all leaves it open, which only a loopback host may be.
    allowed_hosts: names under which the server answers, as in `kvjax.serve.hosts.AllowedHosts`.
    generation_config: whether the model's generation_config.json gives defaults of requests, "auto", or not, "none".
    max_model_len: tokens of one conversation; None takes the model's own context.
    gpu_memory_utilization: share of the device's memory to take; None leaves it to JAX.
    compile_cache: directory where compiled steps wait for the next start; "none" for no such cache.
    shutdown_timeout: seconds that running requests get to finish after SIGTERM.
    session_dir: directory where the conversations of requests that are cut off then wait for the next start; None ends
        them.
    method, token_budget, budgets, headroom, group_layers: how the KV cache is compressed, as in `EngineConfig`.
    host_cache_size, disk_cache, disk_cache_size, disk_sync, remote_cache, tier, prefetch_policy, write_policy,
        eviction_policy, verify_hits, store_generated: where the KV of earlier prompts is kept, as in `StoreConfig`;
        sizes in bytes. A `host_cache_size` of "auto" is that of `engine.host_memory.auto_host_cache_size`.
    attention_backend: what computes attention, as in `EngineConfig`.
    when_full: what happens to an output longer than the headroom of a compressed view.
    """

    model: str = ""
    served_model_name: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    generation_config: str = AUTO
    max_model_len: int | None = None
    max_num_seqs: int = 4
    max_num_queued_reqs: int = 256
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    attention_backend: str = "reference"
    compile_cache: str = "~/.cache/kvjax/compiled"
    seed: int = 0
    chat_template: str | None = None
    shutdown_timeout: int | float = 30.0
    session_dir: str | None = None
    log_level: str = "info"
    method: str | None = None
    token_budget: int | None = None
    budgets: str | None = None
    headroom: int = 128
    when_full: str = "reselect"
    group_layers: int | None = None
    host_cache_size: int | Literal["auto"] = AUTO
    disk_cache: str | None = None
    disk_cache_size: int = 0
    disk_sync: bool = False
    remote_cache: str | None = None
    tier: tuple[str, ...] = ()
    prefetch_policy: str = "timeout"
    write_policy: str = "write_through"
    eviction_policy: str = "lru"
    verify_hits: float = 0.0
    store_generated: bool = False

    def __post_init__(self) -> None:
        _within("port", self.port, 0, 65535)
        _within("max_num_seqs", self.max_num_seqs, 1, 4096)
        _within("max_num_queued_reqs", self.max_num_queued_reqs, 0, 1_000_000)
        _within("tensor_parallel_size", self.tensor_parallel_size, 1, 4096)
        _within("seed", self.seed, -(2**63), 2**63 - 1)
        _within("shutdown_timeout", self.shutdown_timeout, 0, 86400)
        if self.max_model_len is not None:
            _within("max_model_len", self.max_model_len, 2, 2**31 - 1)
        if self.gpu_memory_utilization is not None:
            _within("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        if self.token_budget is not None:
            _within("token_budget", self.token_budget, 16, 2**31 - 1)
        _within("headroom", self.headroom, 1, 2**31 - 1)
        if self.group_layers is not None:
            _within("group_layers", self.group_layers, 1, 8)
        if self.host_cache_size != AUTO:
            _within("host_cache_size", self.host_cache_size, 0, 2**62)
        _within("disk_cache_size", self.disk_cache_size, 0, 2**62)
        self.store_config(1 if self.host_cache_size == AUTO else self.host_cache_size)  # which checks itself
        for name, value, allowed in (
            ("attention_backend", self.attention_backend, ATTENTION_BACKENDS),
            ("when_full", self.when_full, WHEN_FULL),
            ("dtype", self.dtype, DTYPES),
            ("kv_cache_dtype", self.kv_cache_dtype, DTYPES),
            ("log_level", self.log_level, LOG_LEVELS),
            ("generation_config", self.generation_config, GENERATION_CONFIGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        self._check_method()
        for name in self.served_model_name:
            if not name.strip():
                raise ValueError("served_model_name holds an empty name")
        for key in self.api_key:
            # the only header a key fits in cannot hold anything else
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise ValueError("an api_key must be printable ASCII without spaces, and not empty")
        if not self.api_key and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host!r} can be reached from other machines and no API key is set: anyone could "
                f"use the model. Set --api-key or --api-key-file, or stay on --host 127.0.0.1"
            )

    def store_config(self, host_cache_size: int) -> StoreConfig:
        """Configuration of the store for the KV of earlier prompts.

        Args:
            host_cache_size: bytes; those of this configuration, or what `AUTO` comes to for the model.
        """
        return StoreConfig(
            host_cache_size=host_cache_size,
            host_cache_auto=self.host_cache_size == AUTO,
            disk_cache=None if self.disk_cache is None else Path(self.disk_cache).expanduser(),
            disk_cache_size=self.disk_cache_size,
            disk_sync=self.disk_sync,
            remote_cache=self.remote_cache,
            tiers=self.tier,
            prefetch_policy=self.prefetch_policy,
            write_policy=self.write_policy,
            eviction_policy=self.eviction_policy,
            verify_hits=self.verify_hits,
            store_generated=self.store_generated,
        )

    def _check_method(self) -> None:
        budgeted = self.token_budget is not None or self.budgets is not None
        if self.token_budget is not None and self.budgets is not None:
            raise ValueError(
                f"token_budget={self.token_budget} and budgets={self.budgets!r} say the same thing twice: leave out "
                "--token-budget or --budgets"
            )
        if self.method == "full" and budgeted:
            given = "budgets" if self.token_budget is None else "token_budget"
            raise ValueError(
                f"method='full' keeps everything and takes no {given}: leave out --{given.replace('_', '-')}, or "
                "choose another --method, as rocketkv"
            )
        if self.method not in (None, "full") and not budgeted:
            raise ValueError(f"method={self.method!r} needs a budget: add --token-budget, as 256, or --budgets FILE")


def _within(name: str, value: int | float, low: int | float, high: int | float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name}={value} is outside [{low}, {high}]")
