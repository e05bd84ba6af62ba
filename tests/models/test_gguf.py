"""GGUF files in: the same decoder as from the checkpoint that a file was made of, and refusals that name the fault."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import models
from kvjax.models.gguf import QUANTISATIONS, GGUFFile, find_gguf, model_name
from kvjax.models.parameters import walk
from kvjax.models.rope import LongRope
from kvjax.store.digest import weights_digest
from tests.models import gguf_file, tiny

# mistral slides in every layer, which no GGUF file can say
NAMES = ["llama", "qwen2", "qwen3", "gemma3", "phi3"]


def arrays(decoder):
    return {path: np.asarray(param[...]) for path, param in walk(decoder)}


def convert(name, tmp_path, *arguments, **options):
    folder = tmp_path / name
    if not folder.exists():
        models.save(decoder(name), folder)
    return gguf_file.convert(folder, tmp_path / f"{name}.gguf", *arguments, **options)


def decoder(name):
    if name != "qwen2":
        return tiny.decoder(name)
    config = tiny.CONFIGS[name]  # without its window, which no converter writes
    return tiny.fill(dataclasses.replace(config, layers=(config.layers[0],) * 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_is_the_same_decoder(name, tmp_path):
    # Gemma's pattern of layers is not in the file: every second one instead of every sixth
    pattern = {"gemma3.attention.sliding_window_pattern": 2} if name == "gemma3" else {}
    path = convert(name, tmp_path, metadata=pattern | {f"{tiny_architecture(name)}.rope.freq_base_swa": 1e4})
    expected, loaded = decoder(name), models.load(path)
    assert loaded.config.num_layers == expected.config.num_layers
    assert (loaded.config.bos_token_id, loaded.config.eos_token_ids) == (1, (2, 0))
    for ours, theirs in zip(loaded.config.layers, expected.config.layers, strict=True):
        assert ours.window == theirs.window
        np.testing.assert_allclose(ours.rope.frequencies()[0], theirs.rope.frequencies()[0], rtol=1e-6)
        assert ours.rope.frequencies()[1] == pytest.approx(theirs.rope.frequencies()[1])
    # adding 1 to a norm and taking it away again rounds
    tolerance = 1e-7 if name == "gemma3" else 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), arrays(loaded), arrays(expected)
    )


def tiny_architecture(name):
    return gguf_file.ARCHITECTURES[tiny.CONFIGS[name].family]


def test_llama3_scaling_comes_from_the_factors_in_the_file(tmp_path):
    loaded = models.read_config(convert("llama", tmp_path)).layers[0].rope
    assert isinstance(loaded.scaling, LongRope)
    expected = tiny.CONFIGS["llama"].layers[0].rope
    np.testing.assert_allclose(loaded.frequencies()[0], expected.frequencies()[0], rtol=1e-6)


def test_bfloat16_weights_and_a_mesh_are_as_for_safetensors(tmp_path):
    path = convert("llama", tmp_path)
    query = models.load(path, dtype=jnp.bfloat16).layers[0].attention.query[...]
    np.testing.assert_array_equal(query, decoder("llama").layers[0].attention.query[...].astype(jnp.bfloat16))


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *gguf_file.K_QUANTS])
def test_every_format_is_dequantised_in_slabs_as_in_one(quantisation, tmp_path, monkeypatch):
    import gguf

    values = {"token_embd.weight": np.random.default_rng(0).normal(0, 1, (40, 512)).astype(np.float32)}
    path = gguf_file.write(tmp_path / "x.gguf", "llama", {}, values, quantisation)
    reference = next(t for t in gguf.GGUFReader(path).tensors)
    expected = gguf.dequantize(reference.data, reference.tensor_type)
    monkeypatch.setattr("kvjax.models.gguf.reader._SLAB", 512 * 7)
    read = GGUFFile(path).read("token_embd.weight")
    np.testing.assert_array_equal(read, expected)
    if quantisation not in gguf_file.K_QUANTS:
        np.testing.assert_allclose(read, values["token_embd.weight"], atol=0.5)
    assert quantisation in QUANTISATIONS


def refused(path, match):
    with pytest.raises(ValueError, match=match) as error:
        models.load(path)
    assert path.name in str(error.value) or "does not fit" in str(error.value)


def test_tensors_that_do_not_fit_are_named_as_in_the_file(tmp_path):
    def spoil(tensors):
        del tensors["blk.1.ffn_up.weight"]
        tensors["blk.0.attn_q.bias_2"] = np.zeros(48, np.float32)
        tensors["blk.7.attn_q.weight"] = np.zeros((48, 24), np.float32)
        tensors["output_norm.weight"] = np.zeros(7, np.float32)

    path = convert("llama", tmp_path, edit=spoil)
    with pytest.raises(ValueError, match="does not fit a 'llama' model") as error:
        models.load(path)
    for fault in (
        "missing: blk.1.ffn_up.weight",
        "unknown: blk.0.attn_q.bias_2",
        "unknown: blk.7.attn_q.weight",
        "wrong shape: output_norm.weight is (7,), its metadata makes it (24,)",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("name", "metadata", "match"),
    [
        ("llama", {"llama.expert_count": 8}, r"has 8 as 'llama\.expert_count'; only 0 is implemented"),
        ("llama", {"llama.brand_new": 1.5}, r"has the field 'llama\.brand_new', which is not implemented"),
        ("llama", {"llama.block_count": 4_000_000_000}, r"has 4000000000 as 'llama\.block_count'; 1 to \d+ are"),
        ("llama", {"llama.block_count": None}, r"has no 'llama\.block_count' in its metadata"),
        ("llama", {"llama.context_length": "long"}, r"has 'long' as 'llama\.context_length'; only one whole number"),
        ("llama", {"llama.attention.head_count_kv": [2, 1, 2]}, r"has a list of 3 as .*head_count_kv"),
        ("llama", {"llama.attention.value_length": 16}, "has values of other lengths than keys"),
        ("llama", {"llama.rope.dimension_count": 4}, "turns a part of each head"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, r"has rope_freqs\.weight beside rope scaling of type 'yarn'"),
        ("qwen2", {"qwen2.rope.scaling.type": "ntk"}, "has rope scaling of type 'ntk'; these are implemented"),
        ("qwen2", {"qwen2.attention.sliding_window": 64}, "has a sliding window of 64 tokens"),
        ("qwen3", {"qwen3.rope.scaling.attn_factor": 1.5}, "only 1.0 is implemented"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, r"final_logit_softcapping'; only 0\.0"),
        ("llama", {"tokenizer.ggml.bos_token_id": 48}, r"has 48 as .*bos_token_id'; the model has tokens 0 to 47"),
        ("llama", {"split.count": 3}, "is one of 3 parts; join them first"),
    ],
)
def test_a_field_that_cannot_be_served_is_named(name, metadata, match, tmp_path):
    refused(convert(name, tmp_path, metadata=metadata), match)


def test_another_architecture_is_named_with_those_there_are(tmp_path):
    path = gguf_file.write(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    refused(path, "is a model of architecture 'mamba'; these are implemented: gemma3, llama, phi3, qwen2, qwen3")


def test_a_format_without_an_implementation_is_named(tmp_path):
    import gguf

    path = tmp_path / "x.gguf"
    models.save(decoder("llama"), tmp_path / "llama")

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in gguf_file._fields("llama", LLAMA_FIELDS).items():
        gguf_file._add(writer, key, value)
    kind = gguf.GGMLQuantizationType.Q2_K
    writer.add_tensor("token_embd.weight", np.zeros((320, 84), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, r"has tensor 'token_embd\.weight' in Q2_K; these are implemented: F32, F16")


LLAMA_FIELDS = {
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4},
}


def test_a_file_has_a_digest_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = convert("llama", tmp_path)
    first = weights_digest(path)
    assert weights_digest(path) == first
    path.write_bytes(path.read_bytes() + b"\0")
    assert weights_digest(path) != first


def test_the_one_gguf_of_a_folder():
    assert find_gguf(["README.md", "config.json"], "folder") is None
    assert find_gguf(["a.gguf", "mmproj-a.gguf", "b.txt"], "folder") == "a.gguf"
    with pytest.raises(
        ValueError, match=r"'org/name' has several GGUF files: a\.gguf, b\.gguf\. Name one, as org/name/a"
    ):
        find_gguf(["b.gguf", "a.gguf"], "org/name")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "qwen2.5-0.5b-instruct"),
        ("Llama-3.2-1B-Instruct-UD-IQ2_XXS.gguf", "Llama-3.2-1B-Instruct"),
        ("model-f16.GGUF", "model"),
        ("gemma-3-1b-it.gguf", "gemma-3-1b-it"),
    ],
)
def test_the_name_of_a_model_is_that_of_its_file_without_the_format(file, name, tmp_path):
    assert model_name(tmp_path / file) == name
