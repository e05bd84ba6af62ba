"""A folder with a model of random weights and a tokenizer whose words are `t0`, `t1` ...: speed without a download."""

import dataclasses
import os

import jax

from benchmarks.foundation import write_tokenizer
from benchmarks.memory import make_model
from kvjax import models


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
