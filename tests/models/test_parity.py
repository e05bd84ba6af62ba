"""Each family against transformers on torch: same checkpoint, same logits, same greedy text, float32 on CPU.

The checkpoints are tiny and random, and made so that a mistake shows: three query heads a kv head, random
norms and biases, rope scaling in use, texts longer than the original context and than the sliding window, and
weights large enough that attention is far from uniform and greedy choices are far apart.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import models

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

GENERATED = 64
SIZES = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
GEMMA = {
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 24,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": GEMMA_ROPES,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.2, 2.5, 5.0, 9.0],
    "partial_rotary_factor": 0.5,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint to make and how to serve it; `prompt` is in tokens."""

    name: str
    model: str
    fields: dict[str, Any]
    prompt: int = 96
    max_model_len: int | None = None


CASES = [
    Case("llama", "Llama", {"rope_parameters": LLAMA3}),
    Case("llama-tied-biased", "Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 24}),
    Case("llama-mlp-biased", "Llama", {"mlp_bias": True}),
    Case(
        "llama-default-factor", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}}
    ),
    Case("mistral-sliding", "Mistral", {"sliding_window": 24}),
    Case("mistral-global", "Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    Case("qwen2", "Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    Case(
        "qwen2-yarn-left-context",
        "Qwen2",
        {
            "max_position_embeddings": 48,
            "rope_parameters": YARN | {"original_max_position_embeddings": 48, "finetuned": True},
        },
    ),
    Case("qwen2-sliding", "Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    Case("qwen3", "Qwen3", {"head_dim": 24, "rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0}}),
    Case("qwen3-tied", "Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    Case("gemma3", "Gemma3", GEMMA),
    Case("gemma3-multimodal", "Gemma3Multimodal", GEMMA | {"vocab_size": 160}),
    Case(
        "phi3-long",
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        max_model_len=400,
    ),
    Case(
        "phi3-short",
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 100, "tie_word_embeddings": True},
        prompt=32,
        max_model_len=100,
    ),
    Case("phi3-sliding", "Phi3", {"sliding_window": 24}),
]


@pytest.fixture(scope="module", autouse=True)
def precision():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_num_threads(threads)


def build(case: Case) -> Any:
    """The torch model of a case, every weight random, so that one which is passed over shows."""
    fields = SIZES | case.fields
    if case.model == "Gemma3Multimodal":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        }
        config = transformers.Gemma3Config(
            text_config=fields,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=150,
            boi_token_index=151,
            eoi_token_index=152,
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        text = "TextConfig" if case.model == "Gemma3" else "Config"
        config = getattr(transformers, case.model + text)(**fields)
        model = getattr(transformers, case.model + "ForCausalLM")(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
            if "Gemma" in case.model and "post_" in name:
                weight.add_(8.0)  # else the scaled embedding drowns the layers, and tied it repeats itself
    return model.eval()


def reference(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prompt with its greedy continuation [T], and the logits [T, V] of that text."""
    tokens = torch.tensor(prompt)[None]
    with torch.no_grad():
        text = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=GENERATED)
        return text[0].numpy(), model(text).logits[0].numpy()


def greedy(decoder: models.Decoder, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from whole forward passes of the decoder, with logits of all positions but the last."""
    graphdef, state = nnx.split(decoder)
    total = len(prompt) + GENERATED

    @jax.jit
    def generate(state: Any, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(length: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            text, _ = carry
            logits = nnx.merge(graphdef, state)(text[None])[0]
            return text.at[length].set(jnp.argmax(logits[length - 1])), logits

        logits = jnp.zeros((total, decoder.config.vocab_size))
        return jax.lax.fori_loop(len(prompt), total, step, (text, logits))

    text, logits = generate(state, jnp.zeros(total, jnp.int32).at[: len(prompt)].set(prompt))
    return np.asarray(text), np.asarray(logits[:-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_checkpoint_of_transformers_gives_its_logits_and_its_text(case: Case, tmp_path: Path):
    torch.manual_seed(0)
    model = build(case)
    model.save_pretrained(tmp_path / "reference")
    prompt = np.random.default_rng(1).integers(0, SIZES["vocab_size"], case.prompt)
    text, logits = reference(model, prompt)
    choices = np.sort(logits[case.prompt - 1 : -1], axis=-1)
    assert (choices[:, -1] - choices[:, -2]).min() > 1e-4, "two tokens almost tie: the case proves nothing"
    assert len(set(text[case.prompt :].tolist())) > 8, "the text repeats itself: the case proves little"

    decoder = models.load(tmp_path / "reference", max_model_len=case.max_model_len)
    generated, generated_logits = greedy(decoder, prompt)
    np.testing.assert_array_equal(generated, text)
    np.testing.assert_allclose(generated_logits, logits[:-1], rtol=0, atol=1e-4)

    models.save(decoder, tmp_path / "generated")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "generated").eval()
    with torch.no_grad():
        exported_logits = again(torch.tensor(text)[None]).logits[0].numpy()
    np.testing.assert_allclose(exported_logits, logits, rtol=0, atol=1e-5)
