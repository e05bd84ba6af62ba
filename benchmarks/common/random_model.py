"""Random model: a folder with random weights, and a tokenizer whose words are `t0`, `t1` ...; no download."""

import dataclasses
import os

import jax

from kvjax import models
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig

VOCABULARY = 32_000


def write_random_model(path: str | os.PathLike[str], tokens: int, *, toy: bool = False) -> None:
    """Writes the model of `benchmarks.foundation` with so many tokens of context.

    Args:
        toy: two layers of a quarter of the width, for a rehearsal.
    """
    config = make_model(tokens)
    if toy:
        config = dataclasses.replace(config, layers=config.layers[:2], width=128, mlp_width=256)
    models.save(models.random(config, jax.random.key(0)), path)
    write_tokenizer(os.fspath(path))


def make_model(tokens: int) -> DecoderConfig:
    """A Llama of 8 layers and width 512, with so many tokens of context."""
    layer = LayerConfig(RopeConfig(dim=64, theta=10_000.0))
    return DecoderConfig(
        family="llama",
        vocab_size=VOCABULARY,
        width=512,
        mlp_width=1408,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        layers=(layer,) * 8,
        query_scale=64**-0.5,
        norm_eps=1e-5,
        max_position=tokens,
    )


def write_tokenizer(path: str) -> None:
    """Writes a tokenizer whose words are `t0`, `t1` ..., and a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2", unk_token="t0")
    wrapped.chat_template = "{% for message in messages %}{{ message.content }} t2 {% endfor %}"
    wrapped.save_pretrained(path)
