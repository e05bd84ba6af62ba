"""One step of training: the loss, the optimiser, and the state that goes from step to step.

Weights are kept in float32; the arithmetic runs in the dtype that the model's config names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from kvjax.models import Decoder, DecoderConfig, LayerConfig, RopeConfig
from kvjax.models import random as random_decoder
from kvjax.train.config import StageConfig, TrainConfig
from kvjax.train.documents import Documents
from kvjax.train.feed import Drawn, draw_batch

Params = Any
State = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences and which of their tokens count in the loss."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


def decoder_config(config: TrainConfig, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> DecoderConfig:
    """The decoder to train: Qwen3's format, so that other programs read the weights too."""
    model = config.model
    layer = LayerConfig(RopeConfig(dim=model.head_dim, theta=model.rope_theta))
    return DecoderConfig(
        family="qwen3",
        vocab_size=vocab_size,
        width=model.width,
        mlp_width=model.mlp_width,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        layers=(layer,) * model.layers,
        query_scale=model.head_dim**-0.5,
        norm_eps=1e-6,
        max_position=config.max_context,
        qk_norm=True,
        tied=model.tied,
        eos_token_ids=eos_token_ids,
    )


def first_params(config: TrainConfig, decoder: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A random decoder, split into what it is and its float32 weights."""
    made = random_decoder(decoder, jax.random.key(config.seed), jnp.float32, embedding_std=config.model.embedding_std)
    if decoder.tied:
        # A token's own embedding would else outshout all others: with this its first logit is about one. The dtype
        # is named because a weak one is lost in the first step, and the second would compile anew.
        made.norm.weight[...] = jnp.full((decoder.width,), 1.0 / decoder.width, jnp.float32)
    graph, params = nnx.split(made)
    return graph, params


def optimiser(config: TrainConfig, stage: StageConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient: warm-up, a constant rate, and a linear end if the stage has one."""

    def rate(count: ArrayLike) -> Array:
        step = jnp.asarray(count)
        up = jnp.minimum(1.0, (step + 1) / max(stage.warmup, 1))
        down = jnp.minimum(1.0, (stage.steps - step) / max(stage.cooldown, 1))
        return stage.learning_rate * up * down

    first, second = config.betas
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b1=first, b2=second, weight_decay=config.weight_decay),
    )


def forward(
    graph: nnx.GraphDef[Decoder], params: Params, tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T V"]:
    """Float32 logits; the arithmetic before them is in `dtype`."""
    cast = jax.tree.map(lambda array: array.astype(dtype), params)
    return nnx.merge(graph, cast)(tokens)


def loss(graph: nnx.GraphDef[Decoder], params: Params, batch: Batch, dtype: str) -> Float[Array, ""]:
    """Mean cross-entropy in nats over the tokens that count.

    A document's tokens weigh 1/sqrt(their number): a needle's six are not drowned by a repeat's hundred.
    """
    logits = forward(graph, params, batch.tokens[:, :-1], dtype)
    mask = batch.mask[:, 1:].astype(jnp.float32)
    weights = mask / jnp.sqrt(jnp.maximum(mask.sum(axis=1, keepdims=True), 1.0))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return (losses * weights).sum() / weights.sum()


def make_step(
    graph: nnx.GraphDef[Decoder], optimise: optax.GradientTransformation, dtype: str
) -> Callable[[State, Batch], tuple[State, Float[Array, ""]]]:
    """The compiled step: (state, batch) to (next state, loss). The state is donated."""

    def step(state: State, batch: Batch) -> tuple[State, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(lambda params: loss(graph, params, batch, dtype))(state["params"])
        updates, optimiser_state = optimise.update(gradient, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimiser": optimiser_state}, value

    return jax.jit(step, donate_argnums=0)


def on_device(drawn: Drawn) -> Batch:
    """A drawn batch as the step takes it."""
    tokens, mask = drawn
    return Batch(jnp.asarray(tokens), jnp.asarray(mask))


def make_batch(documents: Documents, config: TrainConfig, stage: int, step: int) -> Batch:
    """The batch of one step, drawn now."""
    return on_device(draw_batch(documents, config, stage, step))
