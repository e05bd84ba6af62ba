"""Sensitivity to eviction: needle tasks with most of the context's keys evicted, against the full cache.

The eviction is SnapKV's, uniform: every KV head of every layer keeps the same few keys, chosen once by what the last
queries of the prompt attend to. It is a measurement, not how kvjax serves: keys are hidden behind a mask, no memory is
saved, and replies are checked in one pass. A reply is right if each of its tokens is the likeliest after those before
it, which is when greedy decoding writes exactly that reply.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.eviction import Observation, PromptState
from kvjax.eval.metrics import wilson_interval
from kvjax.eval.tasks import find_task
from kvjax.models import Attend, Decoder, DecoderConfig, LayerConfig, causal_attention, load

FIRST_SEED = 2_000_000
TASKS = ("mini/niah_single_1", "mini/niah_single_2", "mini/niah_multikey_1", "mini/niah_multikey_2")
TAIL = 64  # tokens after the boundary, padded: a question with its reply, or a reply
LEAST_LOSS = 0.10


@dataclass(frozen=True)
class UniformEviction:
    """Uniform eviction: every KV head of every layer retains the same number of a prompt's keys.

    Attributes:
        budget: keys kept, the window's among them.
        window: last tokens of the prompt, whose queries choose; their own keys are always kept.
        kernel: odd width of the max-pool over positions, so that a key's neighbours come along.
    """

    budget: int
    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.window <= self.budget:
            raise ValueError(f"budget is {self.budget}, must be at least window={self.window}, which is positive")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}, must be positive and odd")


def retained_mask(
    eviction: UniformEviction,
    q: Float[Array, "W K G D"],
    k: Float[Array, "T K D"],
    boundary: Int[Array, ""],
    scale: float,
) -> Bool[Array, "K T"]:
    """A mask of the keys retained of the first `boundary` tokens of T; q are the queries of the last W of them.

    Attention of the window over all keys before it and, causally, its own; summed over its queries and over the heads
    that share a KV head; max-pooled; the best stay, ties to the earlier. Everything stays if it fits the budget.
    """
    queries, keys = q.reshape(q.shape[0], -1, q.shape[-1]), k.swapaxes(0, 1)
    budget, tokens = eviction.budget, k.shape[0]
    method = Observation(eviction.window, eviction.kernel)
    state = PromptState(queries, keys, keys, boundary, scale=scale)  # the rule looks at no values
    positions = method.select(state, max_retained=budget, capacity=budget)
    rows = jnp.arange(positions.shape[0])[:, None]
    return (
        jnp.zeros((len(rows), tokens), bool)
        .at[rows, jnp.where(positions < 0, tokens, positions)]
        .set(True, mode="drop")
    )


def evicting(eviction: UniformEviction, boundary: Int[Array, "B"]) -> Callable[[DecoderConfig, LayerConfig], Attend]:
    """Attention for whole sequences [B T] in which the TAIL tokens from `boundary` on see only the kept keys before it.

    Tokens before the boundary see everything: prompts are read densely, and then compressed.
    """

    def make(config: DecoderConfig, layer: LayerConfig) -> Attend:
        dense, scale = causal_attention(config, layer), config.query_scale

        def one(
            q: Float[Array, "T K G D"],
            k: Float[Array, "T K D"],
            v: Float[Array, "T K D"],
            out: Float[Array, "T K G D"],
            end: Int[Array, ""],
        ) -> Float[Array, "T K G D"]:
            observing = jax.lax.dynamic_slice_in_dim(q, end - eviction.window, eviction.window)
            stay = retained_mask(eviction, observing, k, end, scale)
            tail = jax.lax.dynamic_slice_in_dim(q, end, TAIL)
            positions = jnp.arange(k.shape[0])
            seen = (positions <= end + jnp.arange(TAIL)[:, None]) & (stay | (positions >= end))[:, None]
            scores = jnp.einsum("rkgd,tkd->kgrt", tail * scale, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
            mixed = jnp.einsum("kgrt,tkd->rkgd", weights.astype(v.dtype), v)
            return jax.lax.dynamic_update_slice_in_dim(out, mixed, end, axis=0)

        def attend(
            q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]
        ) -> Float[Array, "B T H D"]:
            shape = (*q.shape[:2], config.num_kv_heads, config.group_size, config.head_dim)
            out = jax.vmap(one)(q.reshape(shape), k, v, dense(q, k, v).reshape(shape), boundary)
            return out.reshape(q.shape)

        return attend

    return make


@dataclass(frozen=True)
class EvictionCase:
    """Token ids of a prompt with its reply; `boundary` tokens are compressed, the last `reply` tokens are checked."""

    ids: list[int]
    boundary: int
    reply: int


@dataclass(frozen=True)
class Loss:
    """One task at one length: share of replies right with the full cache and after eviction.

    Attributes:
        query_aware: the question stood in the compressed prompt; otherwise it came after the eviction.
    """

    task: str
    length: int
    budget: int
    query_aware: bool
    samples: int
    full: float
    evicted: float


class EvictionMeasurement:
    """A decoder and its tokenizer; compiles once for each length and budget."""

    def __init__(self, decoder: Decoder, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._graph, self._params = nnx.split(decoder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def case(self, task: str, length: int, index: int, *, query_aware: bool) -> EvictionCase:
        """A held-out sample as tokens. Query-agnostic, the context ends before the question does begin."""
        sample = find_task(task).sample(
            length=length - 4, seed=FIRST_SEED + index, count=lambda text: len(self.ids(text))
        )
        context, question, reply = (
            self.ids(text) for text in (sample.context, sample.question + sample.answer_prefix, sample.reply)
        )
        boundary = len(context) + len(question) * query_aware
        return EvictionCase(context + question + reply, boundary, len(reply))

    def right(self, cases: list[EvictionCase], length: int, eviction: UniformEviction | None, batch: int) -> list[bool]:
        """Whether each reply is what greedy decoding writes.

        Raises:
            ValueError: a case has more than `length` tokens, more than TAIL after its boundary, or fewer than the
                window before it.
        """
        right: list[bool] = []
        for start in range(0, len(cases), batch):
            rows = cases[start : start + batch]
            rows += rows[:1] * (batch - len(rows))
            tokens = np.zeros((batch, length + TAIL), np.int32)
            for row, case in enumerate(rows):
                window = eviction.window if eviction else 0
                if len(case.ids) > length or len(case.ids) - case.boundary > TAIL or case.boundary < window:
                    raise ValueError(
                        f"a case of {len(case.ids)} tokens, compressed up to {case.boundary}: at most {length}, "
                        f"at most {TAIL} after that and at least window={window} before"
                    )
                tokens[row, : len(case.ids)] = case.ids
            ends = jnp.array([case.boundary for case in rows], jnp.int32)
            best = np.asarray(_likeliest(self._graph, self._params, jnp.asarray(tokens), ends, eviction))
            for row in range(min(batch, len(cases) - start)):
                case = rows[row]
                stop = len(case.ids)
                right.append(best[row, stop - case.reply - 1 : stop - 1].tolist() == case.ids[stop - case.reply :])
        return right

    def measure(self, task: str, length: int, eviction: UniformEviction, *, query_aware: bool, samples: int) -> Loss:
        """Scores the same samples with the full cache and after eviction."""
        cases = [self.case(task, length, index, query_aware=query_aware) for index in range(samples)]
        batch = max(1, min(samples, 8192 // length))
        full, evicted = (float(np.mean(self.right(cases, length, how, batch))) for how in (None, eviction))
        return Loss(task, length, eviction.budget, query_aware, samples, full, evicted)


@partial(jax.jit, static_argnums=(0, 4))
def _likeliest(
    graph: nnx.GraphDef[Decoder], params: Any, tokens: Array, boundary: Array, eviction: UniformEviction | None
) -> Array:
    attend = causal_attention if eviction is None else evicting(eviction, boundary)
    return jnp.argmax(nnx.merge(graph, params)(tokens, attend), axis=-1)


def main(argv: list[str] | None = None) -> None:
    """Measures what uniform eviction loses; ends with status 1 if it is nowhere 10 points."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.eviction", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of prompt and reply")
    parser.add_argument("--budget", type=int, default=64, help="keys kept in each head")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--kernel", type=int, default=7)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    measurement = EvictionMeasurement(load(args.model), AutoTokenizer.from_pretrained(args.model))
    eviction = UniformEviction(args.budget, args.window, args.kernel)
    print(f"share of replies that greedy decoding writes exactly, {args.samples} held-out samples; {eviction}")
    losses: list[Loss] = []
    for length in args.lengths:
        for task in args.tasks:
            for query_aware in (True, False):
                loss = measurement.measure(task, length, eviction, query_aware=query_aware, samples=args.samples)
                losses.append(loss)
                low, high = wilson_interval(loss.evicted, loss.samples)
                print(
                    f"{length:6d}  {task:22s} {'query-aware' if query_aware else 'query-agnostic':15s} "
                    f"full {loss.full:6.1%}  evicted {loss.evicted:6.1%} [{low:6.1%}, {high:6.1%}]  "
                    f"lost {100 * (loss.full - loss.evicted):5.1f} points",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps([asdict(loss) for loss in losses], indent=1) + "\n")
    most = max(losses, key=lambda loss: loss.full - loss.evicted)
    lost = most.full - most.evicted
    enough = lost >= LEAST_LOSS
    print(
        f"most lost: {100 * lost:.1f} points, {most.task} at {most.length}, "
        f"{'query-aware' if most.query_aware else 'query-agnostic'}: "
        + ("there is something to compress" if enough else f"below {LEAST_LOSS:.0%}: longer contexts or less budget")
    )
    raise SystemExit(not enough)


if __name__ == "__main__":
    main()
