"""Ahead-of-time compilation: memory and registers of every kernel, compiled on a CPU by the device's real compiler.

    python -m benchmarks.compiled.aot [TARGET ...] [--programs NAME ...] [--json]

Needs the extra `aot`. Shapes are those of Llama 3.1 8B with views of 131,072 entries and 8 slots, and workspaces of as
many tokens. "Temporaries" is what XLA sets aside beside arguments and results: a cache that is copied to another layout
shows up there, and `share` is its part of the K, V and summary that are read. Registers and spills are those of
`ptxas`; VMEM is what a TPU kernel takes of it. A kernel that needs more SMEM, VMEM, shared or device memory than there
is does not compile. Nothing is run, so nothing here says how fast anything is.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from kvjax.plan.devices import find_device
from kvjax.plan.topology import ENVIRONMENT, as_if_on, topology_devices

TARGETS = ("v5e", "v6e", "tpu7x", "h200")
_ENVIRONMENT = ENVIRONMENT | {"MOSAIC_GPU_DUMP_PTXAS": "1"}

SLOTS, CONTEXT, KV_HEADS, GROUP, HEAD_DIM = 8, 131_072, 8, 4, 128
READ = 1024  # entries that a step attends to exactly


@dataclasses.dataclass(frozen=True)
class Report:
    """One program compiled for one target. Bytes, unless said otherwise.

    Attributes:
        refused: why the implementation or the device does not serve the case; then nothing was compiled.
        activations: as in `Program`.
        share: what part of `cache` the other temporaries are.
        vmem: of the hungriest kernel, on a TPU; a tpu7x says what a kernel may take.
        registers: of a thread of the hungriest kernel, on a GPU; `spilled` bytes of them were stored elsewhere.
    """

    target: str
    program: str
    refused: str | None = None
    seconds: float = 0
    cache: int = 0
    arguments: int = 0
    temporaries: int = 0
    activations: int = 0
    kernels: int = 0
    vmem: int | None = None
    registers: int | None = None
    spilled: int | None = None

    @property
    def share(self) -> float:
        return max(self.temporaries - self.activations, 0) / max(self.cache, 1)

    def __str__(self) -> str:
        name = f"{self.target:6} {self.program:34}"
        if self.refused is not None:
            return f"{name} not served: {self.refused}"
        used = "" if self.vmem is None else f"VMEM {self.vmem / 2**20:5.1f} MiB"
        if self.registers is not None:
            used = f"{self.registers:3} registers, {self.spilled} bytes spilled"
        if self.activations:
            used += f"  activations {self.activations / 2**20:.1f} MiB"
        return (
            f"{name} {self.kernels} kernels  cache {self.cache / 2**20:8.1f} MiB  temporaries "
            f"{self.temporaries / 2**20:6.1f} MiB ({self.share:.2%})  {used}  ({self.seconds:.1f} s)"
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        make: from the name of the implementation, a function and the shapes of its arguments.
        cache: bytes of K, V and summary of the view or workspace that it reads.
        donated: arguments that are updated in place.
        activations: bytes of a prefill chunk on its way through a layer. They are temporaries, but of no cache.
        on_tpu7x: bytes that its compiler sets aside besides, of no cache either: before a loop it lays out all weights
            in tiles of 16 rows, it does so to a product of the MLP, and what a view keeps it gathers before it writes.
    """

    make: Callable[[str], tuple[Callable[..., Any], tuple[Any, ...]]]
    cache: int
    donated: tuple[int, ...] = ()
    activations: int = 0
    on_tpu7x: int = 0


def programs() -> dict[str, Program]:
    """All of them by name."""
    import jax
    import jax.numpy as jnp

    from kvjax.attention.read_units import ReadUnits
    from kvjax.pallas.decode_attention import decode_attention
    from kvjax.pallas.observation_scores import observation_scores
    from kvjax.pallas.page_scores import page_scores
    from kvjax.pallas.selected_attention import selected_attention

    shape = jax.ShapeDtypeStruct
    q = shape((SLOTS, KV_HEADS, GROUP, HEAD_DIM), jnp.bfloat16)
    flat = shape((SLOTS, KV_HEADS * GROUP, HEAD_DIM), jnp.bfloat16)
    kv = shape((SLOTS, KV_HEADS, CONTEXT, HEAD_DIM), jnp.bfloat16)
    entries = shape((SLOTS,), jnp.int32)
    scale = HEAD_DIM**-0.5
    full = 2 * kv.size * 2

    def scores(page: int, dtype: Any) -> Program:
        bounds = shape((SLOTS, KV_HEADS, CONTEXT // page, 2, HEAD_DIM), dtype)

        def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            operation = functools.partial(page_scores, page_size=page, scale=scale, implementation=name)
            return operation, (q, bounds, entries)

        return Program(make, full + bounds.size * bounds.dtype.itemsize)

    def selected(page: int) -> Program:
        units = shape((SLOTS, KV_HEADS, READ // page), jnp.int32)
        chosen = shape(units.shape, jnp.bool_)

        def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            def operation(q: Any, k: Any, v: Any, entries: Any, units: Any, chosen: Any) -> Any:
                selection = ReadUnits(units, chosen)
                return selected_attention(q, k, v, entries, selection, page_size=page, scale=scale, implementation=name)

            return operation, (q, kv, kv, entries, units, chosen)

        return Program(make, full)

    def dense(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial(decode_attention, scale=scale, implementation=name), (flat, kv, kv, entries)

    # not those of each query head: before they are pooled they alone are 3% of a workspace, and no copy of it
    def observed(window: int) -> Program:
        queries = shape((window, KV_HEADS * GROUP, HEAD_DIM), jnp.bfloat16)
        number = shape((), jnp.int32)

        def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            operation = functools.partial(observation_scores, pooling_kernel=63, scale=scale, implementation=name)
            return operation, (queries, shape(kv.shape[1:], kv.dtype), number, number)

        return Program(make, full // SLOTS)

    return {
        **{f"observation scores, window of {window}": observed(window) for window in (32, 128)},
        **{f"page scores, pages of {page}": scores(page, jnp.bfloat16) for page in (4, 8, 16)},
        "page scores, float8 summary": scores(16, jnp.float8_e4m3fn),
        **{f"page selection, pages of {page}": page_choice(page) for page in (4, 8, 16)},
        **{f"selected attention, pages of {page}": selected(page) for page in (4, 8, 16)},
        "decode attention": Program(dense, full),
        **steps(),
        **prefills(),
    }


def page_choice(page: int, implementation: str | None = None) -> Program:
    """Page selection for all slots, by the target's kernel where no other implementation is named."""
    import jax
    import jax.numpy as jnp

    from kvjax.pallas.page_selection import page_selection

    scores = jax.ShapeDtypeStruct((SLOTS, KV_HEADS, CONTEXT // page), jnp.float32)
    number = jax.ShapeDtypeStruct((SLOTS,), jnp.int32)

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def operation(scores: Any, entries: Any, most: Any) -> Any:
            return page_selection(
                scores, entries, page_size=page, count=READ // page, most=most, implementation=implementation or name
            )

        return operation, (scores, number, number)

    return Program(make, 2 * SLOTS * KV_HEADS * CONTEXT * HEAD_DIM * 2)


def steps() -> dict[str, Program]:
    """Whole decode steps: compressed views of 8 conversations, and one full cache."""
    from benchmarks.compiled.decode import LLAMA, caches, decode_step
    from kvjax.engine.device.memory import weights

    # of the embedding table a step reads single rows
    read = sum(nbytes for path, nbytes in weights(LLAMA, "bfloat16").items() if path != "embedding")
    made = {
        "decode step, rocketkv 1024": decode_step(caches(SLOTS, token_budget=READ)),
        "decode step, full cache": decode_step(caches(1)),
    }
    return {name: Program(make, cache, donated=(2, 3), on_tpu7x=read) for name, (make, cache) in made.items()}


def prefills() -> dict[str, Program]:
    """Attention of one chunk, one layer's whole step over it, and what a view keeps in the end."""
    from benchmarks.compiled import prefill
    from benchmarks.compiled.decode import caches

    kept = caches(SLOTS, token_budget=READ)
    install, workspace = prefill.write_slot(kept)
    return {
        "prefill attention": Program(*prefill.attention(None)),
        "prefill attention, window of 4096": Program(*prefill.attention(4096)),
        "prefill step of a layer": prefill_step(),
        "install, rocketkv 1024": Program(install, workspace, donated=(0,), on_tpu7x=prefill.retained_bytes(kept)),
    }


def prefill_step(implementation: str | None = None) -> Program:
    """By the target's kernels where no other implementation is named."""
    from benchmarks.compiled import prefill
    from benchmarks.compiled.decode import caches

    step, workspace = prefill.layer(caches(SLOTS, token_budget=READ))
    return Program(
        lambda name: step(implementation or name),
        workspace,
        donated=(1, 2),
        activations=prefill.ACTIVATIONS,
        on_tpu7x=prefill.PRODUCT,
    )


def compared() -> dict[str, Program]:
    """The same operations in `jax.numpy`, as XLA compiles them, for comparison. No gate holds these."""
    return {
        **{f"lax.top_k, pages of {page}": page_choice(page, "reference") for page in (4, 8, 16)},
        "prefill step of a layer, reference": prefill_step("reference"),
    }


def control() -> dict[str, Program]:
    """A program that no gate may let through: attention over a cache that is copied first."""
    import jax

    program = programs()["decode attention"]

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        attend, arguments = program.make(name)

        def copying(q: Any, k: Any, v: Any, entries: Any) -> jax.Array:
            return attend(q, 2 * k, v, entries)

        return copying, arguments

    return {"control: a copied cache": dataclasses.replace(program, make=make)}


def measure(target: str, names: list[str] | None = None) -> list[Report]:
    """Compiles programs for one target, all by default, in a process of its own: a compiler may end it.

    Raises:
        RuntimeError: it ended without a report; says what it had printed.
    """
    command = [sys.executable, "-m", "benchmarks.compiled.aot", target, "--json"]
    if names is not None:
        command += ["--programs", *names]
    done = subprocess.run(command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"target"')]
    if done.returncode or not lines:
        raise RuntimeError(
            f"compiling for {target} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return [Report(**json.loads(line)) for line in lines]


def compile_for(target: str, name: str, program: Program) -> Report:
    """Compiles one program in this process, which must have the environment of `measure`."""
    import jax
    from jax.sharding import SingleDeviceSharding

    gpu = target == "h200"
    device = topology_devices(find_device(target))[0]
    begin = time.monotonic()
    with _printed() as printed:
        try:
            operation, arguments = program.make("gpu" if gpu else "tpu")
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
            if size > find_device(target).memory:
                return Report(target, name, refused=f"{size / 2**30:.1f} GiB of arguments do not fit into one device")
            here = SingleDeviceSharding(device)
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
            with as_if_on(device):
                traced = jax.jit(operation, donate_argnums=program.donated).trace(*arguments)
                lowered = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",))
            compiled = lowered.compile()
        except NotImplementedError as reason:
            return Report(target, name, refused=str(reason))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    calls = [line for line in text.splitlines() if re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu)', line)]
    report = Report(
        target,
        name,
        seconds=round(time.monotonic() - begin, 2),
        cache=program.cache,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        activations=program.activations + (program.on_tpu7x if target == "tpu7x" else 0),
        kernels=len(calls),
    )
    if not calls:
        return report
    if gpu:
        registers, spilled = read_ptxas(printed())
        return dataclasses.replace(report, registers=registers, spilled=spilled)
    used = [re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', call) for call in calls]
    return dataclasses.replace(report, vmem=max(int(size) for sizes in used for size in sizes))


def read_ptxas(text: str) -> tuple[int, int]:
    """Registers of the hungriest kernel, and bytes that all of them spill."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    if not registers:
        raise ValueError(f"ptxas reported no registers: {text[-500:]!r}")
    return max(registers), sum(spilled)


@contextlib.contextmanager
def _printed() -> Iterator[Callable[[], str]]:
    """Gathers what compilers write to the process's own outputs, past Python."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)

        def text() -> str:
            return gathered

        gathered = ""
        try:
            yield text
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            gathered = file.read().decode(errors="replace")


def main() -> None:
    """Prints a line for each program and target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument(
        "--programs", nargs="*", help="by name, also of `control` and `compared`; all others by default"
    )
    parser.add_argument("--json", action="store_true", help="in this process, as JSON")
    options = parser.parse_args()
    for target in options.targets:
        if target not in TARGETS:
            parser.error(f"{target!r} is not known: {', '.join(TARGETS)}")
        if not options.json:
            for report in measure(target, options.programs):
                print(report, flush=True)
            continue
        served = programs()
        known = served | control() | compared()
        for name in options.programs or served:
            print(json.dumps(dataclasses.asdict(compile_for(target, name, known[name]))), flush=True)


if __name__ == "__main__":
    main()
