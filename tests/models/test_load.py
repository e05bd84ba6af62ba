"""Checkpoints in and out: what is written is read back, and what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvjax import models
from kvjax.models.parameters import walk
from tests.models import tiny


def arrays(decoder):
    return {path: np.asarray(param[...]) for path, param in walk(decoder)}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama, and how to change its tensors and fields."""
    models.save(tiny.decoder("llama"), tmp_path)

    def change(tensors=lambda tensors: tensors, **fields):
        weights = load_file(tmp_path / "model.safetensors")
        save_file(tensors(weights) or weights, tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return tmp_path

    return change


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_what_is_saved_is_loaded(name, tmp_path):
    decoder = tiny.decoder(name)
    models.save(decoder, tmp_path)
    again = models.load(tmp_path)
    assert again.config == decoder.config
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(decoder))
    assert nnx.split(again)[0] == nnx.split(decoder)[0]


def test_names_and_shapes_are_those_of_transformers(checkpoint):
    tensors = load_file(checkpoint() / "model.safetensors")
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (48, 24)
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (16, 24)
    assert tensors["model.layers.0.self_attn.o_proj.weight"].shape == (24, 48)
    assert tensors["lm_head.weight"].shape == (48, 24)
    assert len(tensors) == 3 + 3 * 9


def test_fused_tensors_are_cut_where_transformers_cuts_them(tmp_path):
    decoder = tiny.decoder("phi3")
    models.save(decoder, tmp_path)
    fused = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    attention = decoder.layers[1].attention
    np.testing.assert_array_equal(fused[:24], attention.query[...].reshape(24, 24))
    np.testing.assert_array_equal(fused[24:32], attention.key[...].reshape(8, 24))
    np.testing.assert_array_equal(fused[32:], attention.value[...].reshape(8, 24))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_cast(checkpoint, stored, dtype):
    folder = checkpoint(lambda tensors: {name: tensor.astype(stored) for name, tensor in tensors.items()})
    query = models.load(folder, dtype=dtype).layers[0].attention.query[...]
    tensors = load_file(folder / "model.safetensors")
    assert query.dtype == dtype
    expected = tensors["model.layers.0.self_attn.q_proj.weight"].astype(dtype).reshape(6, 8, 24)
    np.testing.assert_array_equal(query, expected)


def test_a_checkpoint_in_several_files(checkpoint):
    folder = checkpoint()
    whole = models.load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        index |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    jax.tree.map(np.testing.assert_array_equal, arrays(models.load(folder)), arrays(whole))

    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.*the download is incomplete"):
        models.load(folder)


def test_missing_unknown_and_misshapen_tensors_are_all_named(checkpoint):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        tensors["model.layers.2.mlp.gate_proj.weight"] = np.zeros((32, 24), np.int8)

    with pytest.raises(ValueError, match="does not fit a 'llama' model") as error:
        models.load(checkpoint(spoil))
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in message
    assert "wrong shape: model.norm.weight is (7,), config.json makes it (24,)" in message
    assert "not a float: model.layers.2.mlp.gate_proj.weight is I8; quantised" in message


def test_a_long_list_of_faults_is_cut(checkpoint):
    with pytest.raises(ValueError, match=r"and \d+ more$"):
        models.load(checkpoint(num_hidden_layers=6))


def test_frequencies_in_an_old_checkpoint_are_passed_over(checkpoint):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    models.load(checkpoint(add))


def test_a_tied_model_may_store_its_head_once_more(checkpoint):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    decoder = models.load(checkpoint(copy, tie_word_embeddings=True))
    assert decoder.config.tied
    assert "unembedding" not in dict(walk(decoder))


def test_a_head_of_its_own_counts_although_the_config_says_tied(checkpoint):
    decoder = models.load(checkpoint(tie_word_embeddings=True))
    assert not decoder.config.tied
    expected = models.load(checkpoint(tie_word_embeddings=False))
    jax.tree.map(np.testing.assert_array_equal, arrays(decoder), arrays(expected))


def test_an_untied_model_without_its_head_is_refused(checkpoint):
    def drop(tensors):
        del tensors["lm_head.weight"]

    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        models.load(checkpoint(drop))


def test_a_damaged_file_is_named(checkpoint):
    folder = checkpoint()
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], whole[:20], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
            models.load(folder)


def test_pickled_weights_are_never_read(checkpoint):
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .* \(pickle\) are never read"):
        models.load(folder)


def test_gemma_reads_the_text_model_out_of_a_multimodal_checkpoint(tmp_path):
    decoder = tiny.decoder("gemma3")
    models.save(decoder, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": fields, "eos_token_id": [2, 5], "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    text = load_file(tmp_path / "model.safetensors")
    vision = {"vision_tower.x": np.ones(2, np.float32), "multi_modal_projector.y": np.ones(2, np.float32)}
    spellings = {
        "before transformers 4.52": {f"language_model.{name}": tensor for name, tensor in text.items()},
        "since": {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()},
    }
    for tensors in spellings.values():
        save_file(tensors | vision, tmp_path / "model.safetensors")
        again = models.load(tmp_path)
        assert again.config == decoder.config
        jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(decoder))
