"""Engine configuration of a server: a `ServeConfig`, for one model, as the engine takes it."""

import dataclasses
from pathlib import Path

import jax

from kvjax import models
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import plan
from kvjax.engine.host_memory import auto_host_cache_size, available_memory
from kvjax.engine.kv.namespace import block_layout
from kvjax.serve.config import AUTO, ServeConfig
from kvjax.store.host import stride


def engine_config(config: ServeConfig, path: Path) -> EngineConfig:
    """The configuration of an engine for the model at `path`, with a host cache sized by it where none is given.

    Raises:
        OSError, ValueError: there is no model at `path`, or its configuration and `config` do not go together.
    """
    engine = EngineConfig(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_queued_reqs=config.max_num_queued_reqs,
        tensor_parallel_size=config.tensor_parallel_size,
        dtype=None if config.dtype == "auto" else config.dtype,
        kv_cache_dtype=None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        seed=config.seed,
        method=config.method,
        token_budget=config.token_budget,
        budgets=config.budgets,
        headroom=config.headroom,
        reselect=config.when_full == "reselect",
        session_dir=None if config.session_dir is None else Path(config.session_dir).expanduser(),
        group_layers=config.group_layers,
        attention_backend=config.attention_backend,
    )
    size = config.host_cache_size
    store = config.store_config(_auto_size(engine, path) if size == AUTO else size)
    return dataclasses.replace(engine, store=store)


def _auto_size(engine: EngineConfig, path: Path) -> int:
    """Bytes of host memory for a store of which nothing is said."""
    model, platform = models.read_config(path), jax.default_backend()
    layout = ResolvedConfig.resolve(engine, model.max_position, platform)
    available = available_memory()
    if available is not None and platform == "cpu":  # where the engine itself is in the same memory
        available = max(available - sum(plan(CacheConfig.declare(model, layout)).values()), 0)
    block_bytes = stride(block_layout(model, layout.kv_dtype).nbytes)
    return auto_host_cache_size(block_bytes, layout.max_model_len, layout.max_num_seqs, available)
