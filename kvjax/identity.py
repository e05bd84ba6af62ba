"""KV identity: everything that decides the bits of stored KV, by name, for keys, snapshots and handshakes.

Two processes of equal identity compute the same KV from the same tokens, bit for bit. What is unknown to matter is in
the identity too: a difference that does not matter costs a recompute, one that is overlooked costs another answer.
The identity knows nothing of tokens, tenants or compression.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from kvjax import __version__

# Flags of XLA that only say what is written to logs and files, and where; every other one counts.
HARMLESS_FLAGS = frozenset({
    "xla_dump_compress_protos", "xla_dump_disable_metadata", "xla_dump_emitter_re", "xla_dump_enable_mlir_pretty_form",
    "xla_dump_full_hlo_config", "xla_dump_fusion_visualization", "xla_dump_hlo_as_dot", "xla_dump_hlo_as_html",
    "xla_dump_hlo_as_long_text", "xla_dump_hlo_as_proto", "xla_dump_hlo_as_text", "xla_dump_hlo_as_url",
    "xla_dump_hlo_module_re", "xla_dump_hlo_pass_re", "xla_dump_hlo_snapshots", "xla_dump_include_timestamp",
    "xla_dump_large_constants", "xla_dump_latency_hiding_schedule", "xla_dump_max_hlo_modules",
    "xla_dump_module_metadata", "xla_dump_to", "xla_dump_unoptimized_hlo_snapshots", "xla_gpu_dump_llvmir",
    "xla_gpu_dump_hlo_unoptimized_snapshots", "xla_hlo_profile", "xla_log_hlo_text",
    "xla_force_host_platform_device_count",  # how many there are; `devices` says how many are used
})  # fmt: skip
# Environment variables that libraries below XLA read when they choose how to multiply.
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# Settings of JAX that change what is compiled.
SETTINGS = (
    "jax_compiler_enable_remat_pass",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_memory_fitting_level",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_use_shardy_partitioner",
)
# Packages that hold compilers and kernels of an accelerator.
COMPILERS = re.compile(r"(jax-cuda|jax-rocm|libtpu|nvidia-(cublas|cuda-nvcc|cuda-nvrtc|cudnn|nvjitlink)).*")
# Instructions that XLA's CPU compiler and the libraries below it choose between: of x86, and of ARM.
INSTRUCTIONS = re.compile(r"pni|s?sse.*|avx.*|fma.*|f16c|amx.*|asimd.*|sve.*|sme.*|fp|fphp|i8mm|.*bf16.*")
CPU_NAMES = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # LLVM schedules by these


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVIdentity:
    """What two processes must share for the KV of one to be that of the other. Fields are text; "" where none applies.

    Attributes:
        weights: digest of the checkpoint's configuration and tensors.
        tokenizer: digest of its files.
        rope: of the rotary embedding, which is applied to stored keys.
        shape: layers, kv heads and head dim.
        kv_dtype: of K and V.
        dtype: of activations.
        versions: of kvjax, JAX, jaxlib, and an accelerator's compilers and driver.
        xla_flags: of XLA_FLAGS, in the order of their names, without those that change no bits.
        libtpu_flags: of LIBTPU_INIT_ARGS, in the order of their names.
        variables: other environment variables that are set (`VARIABLES`).
        settings: of JAX (`SETTINGS`).
        platform: "cpu", "gpu", "tpu", and the version of its runtime.
        device_kind: as the platform names the device.
        instruction_set: on a CPU the machine and its instructions.
        devices: the mesh, or how many devices there are.
        attention_backend: the kernels, where these are not XLA's own.
        prefill_shapes: the shapes that prompts are computed in.
        row_invariance: which of them were seen to give a row the same bits.
    """

    weights: str
    tokenizer: str
    rope: str
    shape: str
    kv_dtype: str
    dtype: str
    versions: str
    xla_flags: str = ""
    libtpu_flags: str = ""
    variables: str = ""
    settings: str = ""
    platform: str
    device_kind: str
    instruction_set: str = ""
    devices: str
    attention_backend: str = ""
    prefill_shapes: str
    row_invariance: str = ""

    @classmethod
    def of_device(cls, device: Any, **model: str) -> "KVIdentity":
        """The identity of this process on a device.

        Args:
            device: a `jax.Device`.
            model: the fields that the process does not decide: weights, tokenizer, rope, shape, dtypes, devices,
                attention_backend, prefill_shapes, row_invariance.
        """
        import jax

        environment, on_cpu = os.environ, device.platform == "cpu"
        versions = {"kvjax": __version__, "jax": jax.__version__, "jaxlib": metadata.version("jaxlib")}
        return cls(
            versions=_listed(versions if on_cpu else versions | accelerator_versions()),
            xla_flags=normalise_flags(flags_of(environment.get("XLA_FLAGS", "")), HARMLESS_FLAGS),
            libtpu_flags="" if on_cpu else normalise_flags(flags_of(environment.get("LIBTPU_INIT_ARGS", ""))),
            variables=_listed({name: environment[name] for name in VARIABLES if name in environment}),
            settings=_listed({name: str(getattr(jax.config, name, None)) for name in SETTINGS}),
            platform=f"{device.platform} {device.client.platform_version}",
            device_kind=device.device_kind,
            instruction_set=instruction_set() if on_cpu else "",
            **model,
        )

    @property
    def numerics(self) -> str:
        """JSON of the fields that say how sums are rounded: all but those of the model and of what is stored."""
        apart = {"weights", "tokenizer", "rope", "shape", "kv_dtype"}
        return json.dumps({name: value for name, value in self.fields().items() if name not in apart})

    def fields(self) -> dict[str, str]:
        """Names and values, without those that do not apply."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    def digest(self) -> str:
        """SHA-256 of all fields; as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def explain(self, other: "KVIdentity") -> list[str]:
        """The fields in which two identities differ, with both values, this one's first; of a list what differs."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return [_difference(name, mine[name], others[name]) for name in mine if mine[name] != others[name]]


def flags_of(text: str) -> list[str]:
    """The flags of an environment variable as XLA reads it: where it begins with no dash it names a file of them."""
    text = text.strip()
    if text and not text.startswith("-"):
        try:
            text = Path(text).read_text()
        except (OSError, ValueError):
            return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quotation that does not end
        return text.split()


def normalise_flags(flags: Iterable[str], harmless: frozenset[str] = frozenset()) -> str:
    """Flags in the order of their names, without harmless ones; of one that is repeated the order stays."""
    pairs = []
    for flag in flags:
        name, _, value = flag.lstrip("-").partition("=")
        value = value if "=" in flag else "true"
        if name not in harmless:
            pairs.append((name, value.lower() if value.lower() in ("true", "false") else value))
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(pairs, key=lambda pair: pair[0]))


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The architecture, model and vector instructions of this machine's CPU; its bare name where none are listed."""
    try:
        first, _, _ = cpuinfo.read_text().partition("\n\n")
    except (OSError, ValueError):
        return f"{platform.machine()} {platform.processor()}".strip()
    lines = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    model = [fields[name] for name in CPU_NAMES if name in fields]
    return " ".join([platform.machine(), *model, *sorted({flag for flag in flags if INSTRUCTIONS.fullmatch(flag)})])


def accelerator_versions() -> dict[str, str]:
    """Versions of the packages that compile for an accelerator, and of NVIDIA's driver where there is one."""
    names = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    found = {name: version for name, version in names.items() if name and COMPILERS.fullmatch(name.lower())}
    with contextlib.suppress(OSError, ValueError):
        found["driver"] = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    return found


def _difference(name: str, mine: str, other: str) -> str:
    """`xla_flags: 'xla_cpu_max_isa=AVX2', not ''`."""
    these, those = mine.split(", "), other.split(", ")
    mine = ", ".join(item for item in these if item not in those)
    other = ", ".join(item for item in those if item not in these)
    return f"{name}: {mine!r}, not {other!r}"


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in sorted(values))
