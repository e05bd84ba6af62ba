import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.engine.config import BLOCK_TOKENS, SHORTEST_BUCKET, EngineConfig, ResolvedConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_num_seqs", 0, "max_num_seqs=0 must be at least 1"),
        ("decode_steps", 0, "decode_steps=0 must be at least 1"),
        ("tensor_parallel_size", -1, "tensor_parallel_size=-1 must be at least 1"),
        ("max_num_queued_reqs", -1, "max_num_queued_reqs=-1 must not be negative"),
        ("max_model_len", 1, "max_model_len=1: a sequence has at least 2 tokens"),
        ("max_model_len", 0, "max_model_len=0: a sequence has at least 2 tokens"),
        ("prefill_chunk_size", 255, "prefill_chunk_size=255 must be a positive multiple of 256"),
        ("prefill_chunk_size", 0, "prefill_chunk_size=0 must be a positive multiple of 256"),
        ("prefill_chunk_size", 300, "prefill_chunk_size=300 must be a positive multiple of 256"),
        ("attention_backend", "flash", "attention_backend='flash': choose one of reference, auto, tpu, gpu"),
        ("dtype", "fp8", "dtype='fp8': choose float32, bfloat16 or float16"),
        ("kv_cache_dtype", "int8", "kv_cache_dtype='int8': choose float32, bfloat16 or float16"),
    ],
)
def test_values_out_of_bounds_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{field: value})


def test_a_layout_is_chosen_by_model_and_device():
    cpu, gpu = (ResolvedConfig.resolve(EngineConfig(), 4096, platform) for platform in ("cpu", "gpu"))
    assert (cpu.max_model_len, cpu.prefill_chunk_size, cpu.dtype, cpu.kv_dtype) == (4096, 512, "float32", "float32")
    assert (gpu.max_model_len, gpu.prefill_chunk_size, gpu.dtype, gpu.kv_dtype) == (4096, 2048, "bfloat16", "bfloat16")
    asked = EngineConfig(
        max_model_len=1000,
        max_num_seqs=7,
        prefill_chunk_size=512,
        dtype="float16",
        kv_cache_dtype="float32",
        decode_steps=9,
    )
    layout = ResolvedConfig.resolve(asked, 4096, "tpu")
    assert layout == ResolvedConfig(
        max_model_len=1000, max_num_seqs=7, prefill_chunk_size=512, decode_steps=9, dtype="float16", kv_dtype="float32"
    )
    assert ResolvedConfig.resolve(EngineConfig(dtype="float16"), 9, "cpu").kv_dtype == "float16"


def test_a_context_longer_than_the_models_is_refused():
    assert ResolvedConfig.resolve(EngineConfig(max_model_len=4096), 4096, "cpu").max_model_len == 4096
    with pytest.raises(ValueError, match="max_model_len=4097 is more than the 4096 tokens that this model"):
        ResolvedConfig.resolve(EngineConfig(max_model_len=4097), 4096, "cpu")


@pytest.mark.parametrize(
    ("length", "chunk", "buckets"),
    [
        (2, 256, (64,)),
        (64, 256, (64,)),
        (65, 256, (64, 256)),
        (256, 256, (64, 256)),
        (257, 256, (64, 256, 512)),
        (1000, 256, (64, 256, 512, 1024)),
        (1536, 256, (64, 256, 512, 1024, 1536)),
        (1537, 256, (64, 256, 512, 1024, 1792)),
        (600, 512, (32, 128, 512, 1024)),
        (1000, 768, (48, 192, 768, 1536)),
        (32768, 2048, (32, 128, 512, 2048, 4096, 8192, 16384, 32768)),
    ],
)
def test_buckets(length, chunk, buckets):
    assert (
        ResolvedConfig.resolve(EngineConfig(max_model_len=length, prefill_chunk_size=chunk), 1 << 20, "cpu").buckets
        == buckets
    )


@hypothesis.given(length=st.integers(2, 1 << 20), chunks=st.integers(1, 150))
def test_buckets_hold_every_prompt_and_waste_little(length, chunks):
    chunk = chunks * BLOCK_TOKENS
    buckets = ResolvedConfig.resolve(
        EngineConfig(max_model_len=length, prefill_chunk_size=chunk), 1 << 20, "cpu"
    ).buckets
    assert list(buckets) == sorted(set(buckets))
    assert length <= buckets[-1] < max(length + chunk, 4 * length, 2 * SHORTEST_BUCKET * 4)
    assert all(bucket % chunk == 0 or bucket < chunk for bucket in buckets)
    for smaller, larger in itertools.pairwise(buckets):
        assert smaller < length
        assert larger <= 2 * smaller if smaller >= chunk else larger < 4 * (smaller + 1)
    assert len(buckets) < 18, "each is compiled"
