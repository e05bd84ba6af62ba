"""Sampling: drawing the next token on the device. Slots have their own parameters, and none causes a compilation.

The order is vLLM's: logit bias, minimum length, penalties, constraints, temperature, min-p, top-k,
top-p. Thresholds are found
by bisection over the bits of the logits (32 count-and-compare passes) instead of a sort: exact, and it lowers
well on every device. Parts that no slot asks for are skipped at run time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvjax.cache import ArraySpec
from kvjax.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams, TokenLogprob

MAX_STOP_TOKEN_IDS = 2 * MAX_STOP_TOKENS  # a request's stop tokens and the model's own end-of-sequence tokens

COLDEST = 1e-5  # below this temperature draws are greedy, as in vLLM: quotients would overflow


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits for a bit a token."""
    return -(-vocab_size // 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Sampling parameters and counts of each slot. Leaves are arrays, or specs of them, with the slots in front.

    Attributes:
        key: a raw threefry key; the draw of generated token i uses `fold_in(key, i)`, whatever the slot.
        bias_ids: token ids of `logit_bias`; the vocabulary's size where unused.
        stop_token_ids: tokens that end the text; the vocabulary's size where unused. They cannot be drawn before
            `min_tokens`.
        in_prompt: which tokens the prompt holds; `counts` is how often each was generated.
        top: whether the slot reports alternatives to each token.
        constrained: whether only some tokens may be drawn: those whose bit in `allowed` is set, token t being bit
            t % 32 of word t // 32.
    """

    key: Any  # [B, 2] uint32
    temperature: Any  # [B]
    top_k: Any  # [B] int32
    top_p: Any  # [B]
    min_p: Any  # [B]
    presence: Any  # [B]
    frequency: Any  # [B]
    repetition: Any  # [B]
    bias_ids: Any  # [B, N] int32
    bias: Any  # [B, N]
    stop_token_ids: Any  # [B, M] int32
    min_tokens: Any  # [B] int32
    top: Any  # [B] bool
    constrained: Any  # [B] bool
    allowed: Any  # [B, W] uint32
    in_prompt: Any  # [B, V] bool
    counts: Any  # [B, V] int32

    @classmethod
    def declare(cls, slots: int, vocab_size: int) -> "SamplerState":
        def array(dtype: Any, *shape: int, fill: int = 0) -> ArraySpec:
            return ArraySpec((slots, *shape), dtype, (None,) * (1 + len(shape)), fill)

        number, integer = array(jnp.float32), array(jnp.int32)
        return cls(
            key=array(jnp.uint32, 2),
            temperature=number,
            top_k=integer,
            top_p=array(jnp.float32, fill=1),
            min_p=number,
            presence=number,
            frequency=number,
            repetition=array(jnp.float32, fill=1),
            bias_ids=array(jnp.int32, MAX_LOGIT_BIAS, fill=vocab_size),
            bias=array(jnp.float32, MAX_LOGIT_BIAS),
            stop_token_ids=array(jnp.int32, MAX_STOP_TOKEN_IDS, fill=vocab_size),
            min_tokens=integer,
            top=array(jnp.bool_),
            constrained=array(jnp.bool_),
            allowed=array(jnp.uint32, mask_words(vocab_size)),
            in_prompt=array(jnp.bool_, vocab_size),
            counts=array(jnp.int32, vocab_size),
        )

    @classmethod
    def of(cls, params: SamplingParams, prompt: np.ndarray, stop_token_ids: tuple[int, ...], seed: int,
           vocab_size: int, allowed: UInt32[np.ndarray, "W"] | None = None) -> "SamplerState":  # fmt: skip
        """One request's row (NumPy, no slot dimension): `prompt` [T] token ids, `seed` any 64-bit integer.

        `allowed` are the tokens that may be drawn first, as bits; None for all.
        """
        in_prompt = np.zeros(vocab_size, np.bool_)
        in_prompt[prompt] = True
        return cls(
            key=np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
            temperature=np.float32(params.temperature if params.temperature >= COLDEST else 0),
            top_k=np.int32(params.top_k if params.top_k < vocab_size else 0),
            top_p=np.float32(max(params.top_p, np.finfo(np.float32).tiny)),  # 0 would keep no token
            min_p=np.float32(params.min_p),
            presence=np.float32(params.presence_penalty),
            frequency=np.float32(params.frequency_penalty),
            repetition=np.float32(params.repetition_penalty),
            bias_ids=_padded(params.logit_bias.keys(), MAX_LOGIT_BIAS, np.int32, vocab_size),
            bias=_padded(params.logit_bias.values(), MAX_LOGIT_BIAS, np.float32, 0),
            stop_token_ids=_padded(stop_token_ids, MAX_STOP_TOKEN_IDS, np.int32, vocab_size),
            min_tokens=np.int32(params.min_tokens),
            top=np.bool_(bool(params.logprobs)),
            constrained=np.bool_(allowed is not None),
            allowed=np.zeros(mask_words(vocab_size), np.uint32) if allowed is None else allowed,
            in_prompt=in_prompt,
            counts=np.zeros(vocab_size, np.int32),
        )

    @classmethod
    def greedy(cls, vocab_size: int) -> "SamplerState":
        """The row of a slot that draws greedily, with nothing else asked for."""
        return cls.of(SamplingParams(temperature=0.0), np.zeros(0, np.int32), (), 0, vocab_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSample:
    """One token a slot, with log-probabilities under the model itself (before bias, penalties and temperature)."""

    token: Any  # [B] int32
    logprob: Any  # [B]
    top_ids: Any  # [B, MAX_LOGPROBS] int32, best first; zeros unless some slot asks
    top_logprobs: Any  # [B, MAX_LOGPROBS]


def sample(
    logits: Float[Array, "B V"], state: SamplerState, generated: Int[Array, "B"], active: Bool[Array, "B"]
) -> tuple[TokenSample, SamplerState]:
    """Draws one token a slot and counts it. `generated` is how many tokens each slot has drawn before."""
    rows = jnp.arange(logits.shape[0])
    adjusted = _adjust(logits, state, generated)
    greedy = state.temperature == 0
    token = jax.lax.cond(
        jnp.all(greedy | ~active),
        lambda: jnp.argmax(adjusted, axis=-1).astype(jnp.int32),
        lambda: jnp.where(greedy, jnp.argmax(adjusted, axis=-1), _draw(adjusted, state, generated, active)),
    )
    counts = state.counts.at[rows, token].add(active.astype(jnp.int32))
    reported = report(logits, token, jnp.any(state.top & active))
    return reported, dataclasses.replace(state, counts=counts)


def report(logits: Float[Array, "N V"], token: Int[Array, "N"], top: Bool[Array, ""]) -> TokenSample:
    """The log-probability of each token and, if `top`, of the most likely ones at its place."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    width = min(MAX_LOGPROBS, logits.shape[-1])

    def best() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, width)
        return ids.astype(jnp.int32), values - normalizer

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros((len(token), width), jnp.int32), jnp.zeros((len(token), width))

    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1) - normalizer
    return TokenSample(token, chosen[:, 0], *jax.lax.cond(top, best, nothing))


def token_logprobs(rows: TokenSample, alternatives: int) -> list[TokenLogprob]:
    """Each row of a sample on the host, with its most likely `alternatives`."""
    tokens, logprobs = rows.token.tolist(), rows.logprob.tolist()
    ids, values = rows.top_ids[:, :alternatives].tolist(), rows.top_logprobs[:, :alternatives].tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(top, best, strict=True)))
        for token, logprob, top, best in zip(tokens, logprobs, ids, values, strict=True)
    ]


def _adjust(logits: Float[Array, "B V"], state: SamplerState, generated: Int[Array, "B"]) -> Float[Array, "B V"]:
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, state.bias_ids].add(state.bias, mode="drop")
    too_early = jnp.where(generated < state.min_tokens, -jnp.inf, 0.0)[:, None]
    logits = logits.at[rows, state.stop_token_ids].add(
        jnp.broadcast_to(too_early, state.stop_token_ids.shape), mode="drop"
    )
    seen = state.in_prompt | (state.counts > 0)
    repetition = jnp.where(seen, state.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= state.frequency[:, None] * state.counts
    logits -= state.presence[:, None] * (state.counts > 0)
    return jax.lax.cond(jnp.any(state.constrained), lambda: _masked(logits, state), lambda: logits)


def _masked(logits: Float[Array, "B V"], state: SamplerState) -> Float[Array, "B V"]:
    """Removes what a constraint does not allow. What it allows can be drawn, even if everything else forbids it."""
    bits = (state.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]].astype(jnp.bool_)
    kept = jnp.where(allowed, jnp.maximum(logits, jnp.finfo(logits.dtype).min / 2), -jnp.inf)
    return jnp.where(state.constrained[:, None], kept, logits)


def _draw(
    logits: Float[Array, "B V"], state: SamplerState, generated: Int[Array, "B"], active: Bool[Array, "B"]
) -> Int[Array, "B"]:
    """Draws by Gumbel's trick from the tokens that min-p, top-k and top-p leave."""
    scaled = logits / jnp.where(state.temperature == 0, 1.0, state.temperature)[:, None]
    filtered = (state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0)
    scaled = jax.lax.cond(jnp.any(filtered & active), lambda: _filter(scaled, state), lambda: scaled)

    def gumbel(key: UInt32[Array, "2"], index: Int[Array, ""]) -> Float[Array, "V"]:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key), index), logits.shape[1:])

    return jnp.argmax(scaled + jax.vmap(gumbel)(state.key, generated), axis=-1).astype(jnp.int32)


def _filter(logits: Float[Array, "B V"], state: SamplerState) -> Float[Array, "B V"]:
    best = jnp.max(logits, axis=-1, keepdims=True)
    min_p = state.min_p[:, None]
    logits = jnp.where((min_p > 0) & (logits < best + jnp.log(min_p)), -jnp.inf, logits)
    ordered = _ordered(logits)

    top_k = jnp.where(state.top_k > 0, state.top_k, logits.shape[-1])
    kth = _threshold(ordered, jnp.ones_like(logits), top_k.astype(jnp.float32))
    logits = jnp.where(ordered >= kth[:, None], logits, -jnp.inf)

    probabilities = jax.nn.softmax(logits, axis=-1)
    nucleus = _threshold(ordered, probabilities, state.top_p)
    keep = (ordered >= nucleus[:, None]) | (state.top_p == 1)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """float32 as int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _threshold(ordered: Int[Array, "B V"], mass: Float[Array, "B V"], least: Float[Array, "B"]) -> Int[Array, "B"]:
    """The largest t such that the entries >= t weigh at least `least`, bit by bit from the sign down.

    Where even all entries weigh less (rounding), t is the smallest integer and everything is kept.
    """
    lowest = jnp.full(least.shape, jnp.iinfo(jnp.int32).min, jnp.int32)

    def try_bit(index: Int[Array, ""], threshold: Int[Array, "B"]) -> Int[Array, "B"]:
        # adding 2**31 to the lowest int32 gives 0: the sign bit is tried like the others
        candidate = threshold + jax.lax.shift_left(jnp.int32(1), jnp.int32(31) - index.astype(jnp.int32))
        weight = jnp.sum(jnp.where(ordered >= candidate[:, None], mass, 0), axis=-1)
        return jnp.where(weight >= least, candidate, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, lowest)


def _padded(values: Any, length: int, dtype: Any, fill: int) -> np.ndarray:
    values = list(values)
    return np.array(values + [fill] * (length - len(values)), dtype)
