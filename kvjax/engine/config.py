"""Engine configuration: frozen, validated once, derived values as properties."""

import dataclasses
from pathlib import Path

from kvjax.budget import LEAST_TOKEN_BUDGET, MAX_GROUP_LAYERS
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS

SHORTEST_BUCKET = 32
# Tokens of small units of a prefill, each tried at every start: an identical prompt computes the smallest alone.
SMALL_CHUNKS = (16, 64)
ATTENTION_BACKENDS = ("reference", "auto", "tpu", "gpu")
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes that are static to every compiled step.

    Attributes:
        max_model_len: most tokens of one sequence, prompt and generated; None takes the model's own context.
        max_num_seqs: slots, that is sequences decoding or prefilling at the same time. Every decode step computes
            all of them, in use or not: an answer never depends on the other requests.
        max_num_queued_reqs: how many more requests may wait.
        prefill_chunk_size: tokens pushed through a layer group at a time, a multiple of 256; None chooses by device.
        decode_steps: most decode steps a dispatch, that is between two looks at the queue.
        seed: where the seeds of requests without one start.
        dtype: of weights and KV: "float32", "bfloat16" or "float16"; None is float32 on CPU and bfloat16 elsewhere.
        tensor_parallel_size: devices over which heads are split.
        method: how the KV cache is compressed, a name of `kvjax.attention.methods`; None is "rocketkv" where a budget
            is given and "full" where none is.
        token_budget: KV pairs that a decode step reads for each kv head and layer; the method makes a budget of it.
        budgets: a file with a budget for each layer, instead of `token_budget`.
        headroom: entries of a compressed view that stay free for generated tokens.
        reselect: a view whose headroom is used up is selected anew; otherwise the output ends there.
        store: where the full KV of earlier prompts is kept, so that a prompt which begins as one of them computes only
            what is new; None is 1 GiB of host memory for "rocketkv-mt" and nothing otherwise.
        session_dir: folder in which conversations that `Engine.drain` cuts off wait for the next engine; None cancels
            them.
        group_layers: most layers prefilled together; None is 8, but 2 where the cache is compressed: then the
            workspaces of two groups are most of a prefill's memory.
        attention_backend: what computes attention: "reference" is `jax.numpy`, "tpu" and "gpu" the kernels for such a
            device, "auto" those for the device that is there, and `jax.numpy` wherever they do not serve;
            "package.module:TABLE" is an `attention.ops.Ops` of your own.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 4
    max_num_queued_reqs: int = 256
    prefill_chunk_size: int | None = None
    decode_steps: int = 4
    seed: int = 0
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: int = 1
    method: str | None = None
    token_budget: int | None = None
    budgets: str | None = None
    headroom: int = 128
    reselect: bool = True
    store: StoreConfig | None = None
    session_dir: Path | None = None
    group_layers: int | None = None
    attention_backend: str = "reference"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "decode_steps", "tensor_parallel_size", "headroom"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_num_queued_reqs < 0:
            raise ValueError(f"max_num_queued_reqs={self.max_num_queued_reqs} must not be negative")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len}: a sequence has at least 2 tokens")
        if self.prefill_chunk_size is not None and (
            self.prefill_chunk_size < BLOCK_TOKENS or self.prefill_chunk_size % BLOCK_TOKENS
        ):
            raise ValueError(
                f"prefill_chunk_size={self.prefill_chunk_size} must be a positive multiple of {BLOCK_TOKENS}"
            )
        self._check_method()
        if self.attention_backend not in ATTENTION_BACKENDS and ":" not in self.attention_backend:
            raise ValueError(
                f"attention_backend={self.attention_backend!r}: choose one of {', '.join(ATTENTION_BACKENDS)}, or your "
                "own table of operations as module:TABLE"
            )
        for name in ("dtype", "kv_cache_dtype"):
            if getattr(self, name) not in (None, "float32", "bfloat16", "float16"):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose float32, bfloat16 or float16, or leave it out"
                )

    def _check_method(self) -> None:
        budgeted = self.token_budget is not None or self.budgets is not None
        if self.token_budget is not None and self.budgets is not None:
            raise ValueError("token_budget and budgets say the same thing twice: give one of them")
        if self.method == "full" and budgeted:
            raise ValueError("method 'full' takes no budget: leave the budget out, or choose another method")
        if self.method not in (None, "full") and not budgeted:
            raise ValueError(f"method {self.method!r} needs a token_budget, or a file of budgets")
        if self.token_budget is not None and self.token_budget < LEAST_TOKEN_BUDGET:
            raise ValueError(f"token_budget={self.token_budget} must be at least {LEAST_TOKEN_BUDGET}")
        if self.group_layers is not None and not 1 <= self.group_layers <= MAX_GROUP_LAYERS:
            raise ValueError(f"group_layers={self.group_layers} must be 1 to {MAX_GROUP_LAYERS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """An `EngineConfig` with nothing left open, for one model on one kind of device.

    Attributes:
        attention_backend: "auto" only where the device has kernels.
    """

    max_model_len: int
    max_num_seqs: int
    prefill_chunk_size: int
    decode_steps: int
    dtype: str
    kv_dtype: str
    method: str = "full"
    token_budget: int | None = None
    budgets: str | None = None
    headroom: int = 128
    reselect: bool = True
    store: StoreConfig | None = None
    group_layers: int = MAX_GROUP_LAYERS
    attention_backend: str = "reference"

    @classmethod
    def resolve(cls, config: EngineConfig, max_position: int, platform: str) -> "ResolvedConfig":
        """Fills what the configuration leaves to the model and the device.

        Args:
            max_position: tokens of context that the model was trained for.
            platform: JAX's name of the device: "cpu", "gpu" or "tpu".

        Raises:
            ValueError: the context is longer than the model has, or kernels for another device.
        """
        length = config.max_model_len or max_position
        if length > max_position:
            raise ValueError(
                f"max_model_len={length} is more than the {max_position} tokens that this model was trained for"
            )
        if ":" not in config.attention_backend and config.attention_backend not in ("reference", "auto", platform):
            raise ValueError(
                f"attention_backend={config.attention_backend!r} runs on a {config.attention_backend.upper()} and not "
                f"on a {platform.upper()}: choose --attention-backend reference, or auto for the kernels of whatever "
                "device there is"
            )
        on_cpu = platform == "cpu"
        # XLA's CPU backend runs bfloat16 dozens of times slower than float32
        dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
        budgeted = config.token_budget is not None or config.budgets is not None
        method = config.method or ("rocketkv" if budgeted else "full")
        default_store = StoreConfig(host_cache_size=GIB) if method == "rocketkv-mt" else None
        return cls(
            max_model_len=length,
            max_num_seqs=config.max_num_seqs,
            prefill_chunk_size=config.prefill_chunk_size or (2 * BLOCK_TOKENS if on_cpu else 8 * BLOCK_TOKENS),
            decode_steps=config.decode_steps,
            dtype=dtype,
            kv_dtype=config.kv_cache_dtype or dtype,
            method=method,
            token_budget=config.token_budget,
            budgets=config.budgets,
            headroom=config.headroom,
            reselect=config.reselect,
            store=config.store or default_store,
            group_layers=config.group_layers or (MAX_GROUP_LAYERS if method == "full" else 2),
            attention_backend="reference"
            if config.attention_backend == "auto" and platform not in ATTENTION_BACKENDS
            else config.attention_backend,
        )

    @property
    def candidate_sizes(self) -> tuple[int, ...]:
        """Tokens that a unit of a prefill may have, in increasing order, if these give a row the same bits.

        Small ones serve what is left behind a stored prefix: without a store there is one size.
        """
        if self.store is None or not self.store.host_cache_size:
            return (self.prefill_chunk_size,)
        large = self.prefill_chunk_size
        return tuple(size for size in (*SMALL_CHUNKS, BLOCK_TOKENS, large) if size == large or 4 * size <= large)

    def bucket(self, length: int) -> int:
        """Workspace length of a prompt of so many tokens."""
        return next(tokens for tokens in self.buckets if tokens >= length)

    def stores(self, length: int) -> bool:
        """Whether the KV of a prompt of so many tokens may be shared; a shorter one has shapes of its own."""
        return length > 0 and self.bucket(length) >= self.prefill_chunk_size

    @property
    def implementation(self) -> str | None:
        """The kernels as `pallas.dispatch` has them."""
        return None if self.attention_backend == "auto" else self.attention_backend

    @property
    def buckets(self) -> tuple[int, ...]:
        """Workspace lengths in tokens. A prompt shorter than a chunk is one chunk of its bucket's length.

        From the chunk on they double, and the last one holds `max_model_len`; below it they are quarters, so that a
        short question does not cost a whole chunk.
        """
        needed = -(-self.max_model_len // self.prefill_chunk_size) * self.prefill_chunk_size
        lengths = [self.prefill_chunk_size]
        while lengths[0] >= 4 * SHORTEST_BUCKET:
            lengths.insert(0, lengths[0] // 4)
        while lengths[-1] < needed:
            lengths.append(min(2 * lengths[-1], needed))
        return tuple(b for a, b in zip([0, *lengths], lengths, strict=False) if a < self.max_model_len)
