"""Families read from config.json: sizes, kinds of layer, rope in both spellings, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import models
from kvjax.models.families import FAMILIES
from kvjax.models.rope import Linear, LongRope, RopeConfig, Yarn
from tests.models import published


@pytest.fixture
def read(tmp_path):
    """`read_config` of a config.json with these fields."""

    def read(fields, **options):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return models.read_config(tmp_path, **options)

    return read


@pytest.mark.parametrize("name", published.COUNTED)
def test_a_published_config_has_its_published_parameter_count(name, read):
    fields, count = published.COUNTED[name]
    decoder = models.abstract(read(fields), jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(decoder))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count


@pytest.mark.parametrize("name", published.COUNTED)
def test_a_config_is_hashable_and_survives_writing_and_reading(name, read):
    config = read(published.COUNTED[name][0])
    family = FAMILIES[config.family]
    again = read({"model_type": family.model_type} | family.to_hf(config))
    assert again == config
    assert hash(again) == hash(config)


def test_llama_reads_rope_in_both_spellings(read):
    old = published.LLAMA_3_1
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert read(new) == read(old)
    oldest = old | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read(oldest).layers[0].rope == RopeConfig(128, 500000.0, Linear(2.0))


def test_gemma_reads_rope_in_both_spellings(read):
    old = published.GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {name: value for name, value in old.items() if not name.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read(new) == read(old)


def test_gemma_has_a_global_layer_after_five_sliding_ones(read):
    config = read(published.GEMMA_3_4B)
    windows = [layer.window for layer in config.layers]
    assert windows[:7] == [1024] * 5 + [None, 1024]
    assert windows.count(None) == 34 // 6
    assert config.layers[5].rope == RopeConfig(256, 1e6, Linear(8.0))
    assert config.layers[0].rope == RopeConfig(256, 1e4)
    assert len(set(config.layers)) == 2


def test_qwen_slides_above_its_full_layers_only_if_told_to(read):
    fields = published.QWEN_2_5_7B | {"sliding_window": 8192, "max_window_layers": 20}
    assert {layer.window for layer in read(fields).layers} == {None}
    windows = [layer.window for layer in read(fields | {"use_sliding_window": True}).layers]
    assert windows == [None] * 20 + [8192] * 8


def test_a_window_that_no_text_outgrows_is_none(read):
    assert read(published.PHI_3_5_MINI).layers[0].window is None
    assert read(published.PHI_3_5_MINI, max_model_len=300_000).layers[0].window == 262144
    assert read(published.MISTRAL_7B).layers[0].window == 4096
    assert read(published.MISTRAL_7B | {"sliding_window": None}).layers[0].window is None


def test_yarn_as_qwen_documents_it(read):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(published.QWEN_2_5_7B | {"rope_scaling": scaling})
    assert config.layers[0].rope == RopeConfig(128, 1e6, Yarn(4.0, 32768))
    assert config.max_position == 131_072  # though max_position_embeddings is left at 32,768
    qwen3 = read(published.QWEN_3_8B | {"rope_scaling": scaling})
    assert qwen3.max_position == 131_072
    finetuned = read(published.QWEN_2_5_7B | {"rope_scaling": scaling | {"finetuned": True}})
    assert finetuned == config


def test_a_window_within_the_context_that_yarn_stretches_is_kept(read):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    fields = {"use_sliding_window": True, "sliding_window": 65_536, "max_window_layers": 0}
    config = read(published.QWEN_2_5_7B | fields | {"rope_scaling": scaling})
    assert {layer.window for layer in config.layers} == {65_536}


def test_llama3_scaling_leaves_the_context_that_a_config_claims(read):
    scaling = published.LLAMA_3_1["rope_scaling"] | {"factor": 32.0}
    assert read(published.LLAMA_3_1 | {"rope_scaling": scaling}).max_position == 131_072


def test_default_rope_has_no_use_for_a_factor(read):
    scaling = {"rope_type": "default", "factor": 4.0}
    assert read(published.QWEN_2_5_7B | {"rope_scaling": scaling}) == read(published.QWEN_2_5_7B)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        (published.LLAMA_3_1 | {"rope_scaling": None}, 2048),
        (published.MISTRAL_7B, 131_072),
        (published.QWEN_2_5_7B, 32_768),
        (published.QWEN_3_8B, 32_768),
        (published.PHI_3_5_MINI | {"rope_scaling": None}, 4096),
    ],
)
def test_a_config_without_a_context_has_that_of_transformers(fields, context, read):
    fields = {name: value for name, value in fields.items() if name != "max_position_embeddings"}
    assert read(fields).max_position == context


def test_longrope_chooses_its_factors_by_the_longest_text_served(read):
    def uses_long(**options):
        scaling = read(published.PHI_3_5_MINI, **options).layers[0].rope.scaling
        assert isinstance(scaling, LongRope)
        return scaling.use_long

    assert uses_long()
    assert uses_long(max_model_len=4097)
    assert not uses_long(max_model_len=4096)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3_knew_longrope_under_other_names(kind, read):
    scaling = published.PHI_3_5_MINI["rope_scaling"] | {"type": kind}
    assert read(published.PHI_3_5_MINI | {"rope_scaling": scaling}) == read(published.PHI_3_5_MINI)


def test_part_of_a_head_may_turn(read):
    config = read(published.PHI_4_MINI)
    assert (config.head_dim, config.layers[0].rope.dim) == (128, 96)


def test_generation_config_adds_tokens_that_end_a_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published.MISTRAL_7B))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 9]}))
    assert models.read_config(tmp_path).eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; these are: gemma3, gemma3_text, llama, mistral"),
        ({"model_type": None}, "None is not supported"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": 4100}, "set head_dim"),
        ({"hidden_act": "relu2"}, "'relu2' is not implemented; these are: silu"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' to {'bits': 4}"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' to 30.0"),
        ({"layer_types": ["sliding_attention"] * 32}, "'layer_types'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' changes every frequency"),
        (
            {"rope_scaling": {"rope_type": "spiral"}},
            "'spiral' is not implemented; these are: default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' is incomplete: .*'factor'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section is not impl"),
        ({"num_key_value_heads": 5}, r"num_heads \(32\) must be a multiple of num_kv_heads \(5\)"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, message, read):
    with pytest.raises(ValueError, match=message):
        read(published.LLAMA_3_1 | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (published.QWEN_3_8B | {"layer_types": ["chunked_attention"] * 36}, "'chunked_attention' is not"),
        (published.QWEN_3_8B | {"layer_types": ["full_attention"] * 3}, "3 layer_types for 36 layers"),
        (published.MISTRAL_7B | {"attention_bias": True}, "'attention_bias' to True"),
        (published.QWEN_3_8B | {"mlp_bias": True}, "'mlp_bias' to True; only False"),
        (published.GEMMA_3_1B | {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        (published.GEMMA_3_4B | {"quantization_config": {"bits": 4}}, "'quantization_config'"),
        (
            published.PHI_3_5_MINI | {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": []}},
            "0 short factors and 1 long",
        ),
    ],
)
def test_what_a_family_does_not_implement_is_refused_by_name(fields, message, read):
    with pytest.raises(ValueError, match=message):
        read(fields)


def test_a_folder_without_a_config_is_an_error_that_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there; a checkpoint is a local folder"):
        models.read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"head_dim": 64}, "rope turns 128 dimensions of a head of 64"),
    ],
)
def test_a_config_refuses_sizes_that_do_not_fit(changes, message, read):
    config = read(published.LLAMA_3_1)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_a_window_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        models.LayerConfig(RopeConfig(8, 1e4), window=0)


def test_an_odd_number_of_rotated_dimensions_is_refused():
    with pytest.raises(ValueError, match="rope dim is 7"):
        RopeConfig(7, 1e4)
