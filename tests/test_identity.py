"""The identity of KV: each field counts, flags count by what they say, and a difference is named."""

import dataclasses
import json
import types

import jax
import pytest

import kvjax
from kvjax import identity
from kvjax.identity import HARMLESS_FLAGS, KVIdentity, flags_of, instruction_set, normalise_flags

MODEL = {
    "weights": "w" * 64, "tokenizer": "t" * 64, "rope": "theta=10000", "shape": "2 x 2 x 4", "kv_dtype": "float32",
    "dtype": "float32", "devices": "1", "prefill_shapes": "chunks of 512 tokens",
}  # fmt: skip
PLAIN = KVIdentity(**MODEL, versions="jax 1", platform="cpu", device_kind="cpu")


def of_this_process(**changes: str) -> KVIdentity:
    return KVIdentity.of_device(jax.devices()[0], **(MODEL | changes))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KVIdentity)])
def test_every_field_counts_and_is_explained(field):
    other = dataclasses.replace(PLAIN, **{field: "another"})
    assert other.digest() != PLAIN.digest()
    assert other.fields() != PLAIN.fields()
    [difference] = PLAIN.explain(other)
    assert difference.startswith(f"{field}: ")
    assert "'another'" in difference
    stored_apart = field in ("weights", "tokenizer", "rope", "shape", "kv_dtype")
    assert (other.numerics == PLAIN.numerics) is stored_apart
    assert not PLAIN.explain(dataclasses.replace(PLAIN))


def test_fields_do_not_run_into_each_other():
    one = dataclasses.replace(PLAIN, xla_flags="a", libtpu_flags="b")
    other = dataclasses.replace(PLAIN, xla_flags='a", "libtpu_flags": "b', libtpu_flags="")
    assert one.digest() != other.digest()
    assert one.numerics != other.numerics


def test_of_a_list_what_differs_is_explained():
    one, other = (dataclasses.replace(PLAIN, versions=f"jax 1, jaxlib {n}, kvjax 3") for n in (1, 2))
    assert one.explain(other) == ["versions: 'jaxlib 1', not 'jaxlib 2'"]


def test_this_process():
    here = of_this_process()
    assert here == of_this_process()
    assert f"jax {jax.__version__}" in here.versions
    assert f"kvjax {kvjax.__version__}" in here.versions
    assert json.loads(here.numerics)["platform"].startswith(jax.devices()[0].platform)
    if jax.devices()[0].platform == "cpu":
        assert here.instruction_set


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_of_products_counts(precision):
    before = of_this_process()
    with jax.default_matmul_precision(precision):
        assert before.explain(of_this_process()) == [
            f"settings: 'jax_default_matmul_precision None', not 'jax_default_matmul_precision {precision}'"
        ]


@pytest.mark.parametrize("variable", identity.VARIABLES)
def test_variables_that_libraries_read_count(monkeypatch, variable):
    monkeypatch.delenv(variable, raising=False)
    before = of_this_process()
    monkeypatch.setenv(variable, "0")
    assert [line.partition(":")[0] for line in before.explain(of_this_process())] == ["variables"]


def test_an_accelerator_has_compilers_and_no_instruction_set(monkeypatch):
    packages = {"libtpu": "0.0.44", "nvidia-cublas-cu13": "13.1", "numpy": "2", "jax-cuda13-pjrt": "0.11.2", None: "1"}
    found = [types.SimpleNamespace(metadata={"Name": name}, version=version) for name, version in packages.items()]
    monkeypatch.setattr(identity.metadata, "distributions", lambda: found)
    client = types.SimpleNamespace(platform_version="PJRT C API, built on a day")
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v6e", client=client)
    here = KVIdentity.of_device(device, **MODEL)
    for version in ("libtpu 0.0.44", "nvidia-cublas-cu13 13.1", "jax-cuda13-pjrt 0.11.2"):
        assert version in here.versions
    assert "numpy" not in here.versions
    assert here.platform == "tpu PJRT C API, built on a day"
    assert not here.instruction_set
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--b=2 --a=1")
    assert KVIdentity.of_device(device, **MODEL).libtpu_flags == "a=1 b=2"
    assert not of_this_process().libtpu_flags


@pytest.mark.parametrize(
    ("flags", "normal"),
    [
        ("", ""),
        ("--b=1 --a=2", "a=2 b=1"),
        ("--a --b=True --c=FALSE", "a=true b=true c=false"),
        ("--a=1 --a=2", "a=1 a=2"),
        ("--a=2 --a=1", "a=2 a=1"),
        ("--a='x y' --b=", "a='x y' b=''"),
        ("--a='x", "a=''\"'\"'x'"),
    ],
)
def test_flags_in_one_order(flags, normal):
    assert normalise_flags(flags_of(flags)) == normal


@pytest.mark.parametrize("flag", sorted(HARMLESS_FLAGS))
def test_harmless_flags_do_not_count(flag):
    assert normalise_flags([f"--{flag}=x", f"--{flag}", f"--{flag}_too=1"], HARMLESS_FLAGS) == f"{flag}_too=1"


def test_flags_may_stand_in_a_file(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--b=1\n--a=2\n")
    assert normalise_flags(flags_of(str(file))) == "a=2 b=1"
    assert flags_of(str(tmp_path / "missing")) == [str(tmp_path / "missing")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: GenuineIntel\ncpu family : 6\nflags : fpu avx2 fma sse4_2 avx512f amx_bf16 ht\n\nflags : x",
         "GenuineIntel 6 amx_bf16 avx2 avx512f fma sse4_2"),
        ("CPU implementer : 0x41\nFeatures : fp asimd crc32 sve bf16 i8mm\nCPU part : 0xd40\n",
         "0x41 0xd40 asimd bf16 fp i8mm sve"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_instruction_set_of_a_cpu(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(identity.platform, "machine", lambda: "arch")
    (tmp_path / "cpuinfo").write_text(text)
    assert instruction_set(tmp_path / "cpuinfo") == f"arch {expected}".strip()
    monkeypatch.setattr(identity.platform, "processor", lambda: "")
    assert instruction_set(tmp_path / "missing") == "arch"
