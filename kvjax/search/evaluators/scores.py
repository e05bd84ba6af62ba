"""Scores of candidates on samples, and the arithmetic from logits to scores that all evaluators share."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Evaluated = tuple[Array, Array, Array]  # the fields of `Scores`


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of candidates (rows) on samples (columns).

    Attributes:
        exact: 1 where greedy decoding writes exactly the reply.
        tokens: share of the reply's tokens that are the likeliest after the right ones before them.
        log_probability: mean over the reply's tokens, in nats.
    """

    exact: Float[np.ndarray, "P S"]
    tokens: Float[np.ndarray, "P S"]
    log_probability: Float[np.ndarray, "P S"]


def target_logprobs(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B 2"]:
    """The log-probability of each target, and 1 if no token is likelier."""
    logits = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.stack([logprob, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)], axis=-1)


def weighted_scores(logprobs: Float[Array, "*#B R 2"], weight: Float[Array, "*#B R"]) -> Evaluated:
    """The fields of `Scores` from `target_logprobs` of a tail, of whose tokens those of weight 1 count."""
    logprob, right = logprobs[..., 0], logprobs[..., 1]
    total = jnp.sum(weight, axis=-1)
    exact = jnp.all((right > 0) | (weight == 0), axis=-1).astype(jnp.float32)
    return exact, jnp.sum(right * weight, axis=-1) / total, jnp.sum(logprob * weight, axis=-1) / total


def check_candidates(candidates: Int[np.ndarray, "..."], layers: int) -> None:
    """Raises ValueError unless there is a number, or one for each kv head, for every layer with a budget."""
    if candidates.ndim not in (2, 3) or candidates.shape[1] != layers:
        raise ValueError(f"candidates of shape {candidates.shape}: one row each, for {layers} layers")


def in_batches(
    evaluate: Callable[[Int[np.ndarray, "N ..."]], Sequence[Evaluated]],
    candidates: Int[np.ndarray, "P ..."],
    batch: int,
    samples: int,
) -> Scores:
    """Scores of any number of candidates by a function that was compiled for `batch`.

    Args:
        evaluate: of `batch` candidates, a part for each block of samples. Copies of the last candidate fill up a batch.
        samples: how many samples are real; those behind fill up the last block.
    """
    batches: list[list[np.ndarray]] = []
    for begin in range(0, len(candidates), batch):
        rows = candidates[begin : begin + batch]
        parts = evaluate(np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)]))
        joined = [np.concatenate([np.asarray(x) for x in field], axis=1) for field in zip(*parts, strict=True)]
        batches.append([x[: len(rows), :samples] for x in joined])
    return Scores(*(np.concatenate(field) for field in zip(*batches, strict=True)))
