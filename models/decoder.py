"""The decoder: embedding, layers, output. One definition for every family, by its `DecoderConfig`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.models.causal_attention import causal_attention
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.layers import MLP, Attend, Attention, RMSNorm
from kvjax.models.linear import linear
from kvjax.models.parameters import Embedding, Normal, declare


class Layer(nnx.Module):
    """One transformer layer. Layers with equal `LayerConfig` have equal graph definitions, and one body serves all."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, dtype: jax.typing.DTypeLike) -> None:
        self.attention_norm = RMSNorm(config.width, config, dtype)
        self.attention = Attention(config, layer, dtype)
        self.mlp_norm = RMSNorm(config.width, config, dtype)
        self.mlp = MLP(config, dtype)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.attention_post_norm = RMSNorm(config.width, config, dtype)
            self.mlp_post_norm = RMSNorm(config.width, config, dtype)

    def __call__(self, x: Float[Array, "*B E"], positions: Int[Array, "*B"], attend: Attend) -> Float[Array, "*B E"]:
        """The hidden states after this layer. `*B` is [T] in prefill, [B] in decode, [B, T] in training.

        `attend` gets q [*B H D] and k [*B K D], rotated, and v, and applies scale and mask itself.
        """
        attended = self.attention(self.attention_norm(x), positions, attend)
        x = x + (self.attention_post_norm(attended) if self.post_norms else attended)
        transformed = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(transformed) if self.post_norms else transformed)


class Decoder(nnx.Module):
    """A decoder-only transformer. Built abstract: its arrays are shapes until `load` or `random` fills them.

    Attributes:
        config: what it is; static.
        layers: called one by one by whoever keeps a cache; `embed` before, `head` after.
    """

    layers: nnx.List[Layer]

    def __init__(self, config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embedding = declare(Embedding(), dtype, vocab=config.vocab_size, width=config.width)
        self.layers = nnx.List([Layer(config, layer, dtype) for layer in config.layers])
        self.norm = RMSNorm(config.width, config, dtype)
        if not config.tied:
            self.unembedding = declare(Normal(config.width), dtype, vocab=config.vocab_size, width=config.width)

    def embed(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B E"]:
        """Hidden states before the first layer, in the dtype of the weights."""
        x = self.embedding[...][tokens]
        # the scale is rounded to the dtype, as in the training of the models that have one
        return x if self.config.embed_scale is None else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def head(self, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states after the last layer: final norm, then the output matrix."""
        table = self.embedding if self.config.tied else self.unembedding
        return linear(self.norm(x), table[...], jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attend: Callable[[DecoderConfig, LayerConfig], Attend] = causal_attention,
    ) -> Float[Array, "B T V"]:
        """Float32 logits at every position of whole sequences that start at position 0; nothing is cached.

        `attend` makes the attention of a kind of layer; the default is dense and differentiable.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = self.embed(tokens)
        for layer, kind in zip(self.layers, self.config.layers, strict=True):
            x = layer(x, positions, attend(self.config, kind))
        return self.head(x)
