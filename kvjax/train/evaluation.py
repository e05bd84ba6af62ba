"""Evaluation while training: the share of whole replies that are right, not only the loss.

Retrieval appears as a sudden change that the mean loss hides; the share of right replies shows it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvjax.models import Decoder
from kvjax.train.documents import Document, Documents
from kvjax.train.step import Params, forward

Predict = Callable[[Params, Int[Array, "B T"]], tuple[Int[Array, "B T"], Float[Array, "B T"]]]


@dataclass(frozen=True)
class Score:
    """Teacher-forced scores of one kind of document.

    Attributes:
        tokens: share of counting tokens that were predicted.
        replies: share of unbroken runs of counting tokens that were predicted whole.
        loss: mean cross-entropy of counting tokens in nats.
    """

    tokens: float
    replies: float
    loss: float


def make_predict(graph: nnx.GraphDef[Decoder], dtype: str) -> Predict:
    """Compiled: (params, tokens [B, T]) to the likeliest next tokens and the true ones' losses [B, T-1]."""

    @jax.jit
    def predict(params: Params, tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
        logits = forward(graph, params, tokens[:, :-1], dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.argmax(logits, axis=-1), losses

    return predict


def runs(mask: Bool[np.ndarray, "T"]) -> list[slice]:
    """The unbroken stretches of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def score(predict: Predict, params: Params, documents: list[Document], batch: int) -> Score:
    """Scores documents of one length, `batch` at a time; their number must be a multiple of it."""
    right: list[bool] = []
    whole: list[bool] = []
    losses: list[float] = []
    for start in range(0, len(documents), batch):
        chosen = documents[start : start + batch]
        guesses, costs = map(np.asarray, predict(params, jnp.asarray(np.stack([d.tokens for d in chosen]))))
        for document, guess, cost in zip(chosen, guesses, costs, strict=True):
            mask, hits = document.mask[1:], guess == document.tokens[1:]
            right += hits[mask].tolist()
            losses += cost[mask].tolist()
            whole += [bool(hits[run].all()) for run in runs(mask)]
    return Score(float(np.mean(right)), float(np.mean(whole)), float(np.mean(losses)))


def held_out(documents: Documents, kind: str, length: int, count: int) -> list[Document]:
    """`count` documents that no training seed draws; Python text is the caller's to hold out."""
    return [documents.of_kind(kind, length, random.Random(f"held out/{kind}/{length}/{i}")) for i in range(count)]
