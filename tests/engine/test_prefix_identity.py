"""Keys of stored KV and the process that computes it: what may change bits changes the keys, and nothing else does."""

import dataclasses
import os
import subprocess
import sys

import pytest

from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.kv.namespace import namespace
from kvjax.engine.sessions.snapshot import identity
from tests.engine import tiny

PROGRAM = """
import hashlib, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from kvjax.models.causal_attention import causal_attention
from tests.engine import tiny
from tests.engine.test_prefix_identity import keys_of

stored = []
def attend(config, kind):
    inner = causal_attention(config, kind)
    def keep(q, k, v):
        stored.extend((k, v))
        return inner(q, k, v)
    return keep

def kv(tokens):
    tiny.decoder()(tokens, attend)
    return stored[:]

arrays = jax.jit(kv)(jnp.asarray([tiny.prompt(256)]))
print(keys_of(Path(sys.argv[1])), hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest())
"""


def caches() -> CacheConfig:
    return CacheConfig.declare(tiny.CONFIG, ResolvedConfig.resolve(EngineConfig(), tiny.CONTEXT, "cpu"))


def keys_of(folder) -> str:
    return namespace(folder, caches(), 1).root().hex()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def in_a_process(folder, flags: str) -> tuple[str, str]:
    """The root of all keys and the digest of a prompt's KV, in a process with these flags."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    root, digest = printed.split()
    return root, digest


def test_kv_of_another_instruction_set_has_other_bits_and_other_keys(folder):
    root, bits = in_a_process(folder, "--xla_cpu_max_isa=AVX2")
    for isa in ("AVX", "AVX512"):
        other_root, other_bits = in_a_process(folder, f"--xla_cpu_max_isa={isa}")
        assert other_root != root
        if other_bits != bits:
            return
    pytest.skip("this CPU computes the same bits with every instruction set")


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ("--xla_cpu_max_isa=AVX2 --xla_cpu_enable_fast_math=false", True),
        ("  --xla_cpu_enable_fast_math=False\n--xla_cpu_max_isa=AVX2 ", True),
        ("--xla_cpu_enable_fast_math=false --xla_dump_to=/tmp/x --xla_cpu_max_isa=AVX2 --xla_dump_hlo_as_text", True),
        ("--xla_cpu_enable_fast_math=false --xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=4", True),
        ("--xla_cpu_max_isa=AVX2", False),
        ("--xla_cpu_max_isa=AVX --xla_cpu_enable_fast_math=false", False),
        ("--xla_cpu_max_isa=AVX2 --xla_cpu_enable_fast_math", False),
        ("--xla_cpu_max_isa=AVX2 --xla_cpu_enable_fast_math=false --xla_dump_to=/tmp/x --unknown=1", False),
        ("", False),
    ],
)
def test_flags_are_a_part_of_keys_and_of_snapshots(folder, monkeypatch, flags, same):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_cpu_max_isa=AVX2")
    expected = keys_of(folder), identity(folder, caches())
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert (keys_of(folder) == expected[0]) is same
    assert (identity(folder, caches()) == expected[1]) is same


@pytest.mark.parametrize("field", ["weights", "tokenizer", "rope", "numerics", "dtype", "shape"])
def test_no_field_of_the_keys_is_empty(folder, field):
    assert dataclasses.asdict(namespace(folder, caches(), 1))[field]
