"""Command buffers of a decode loop on a GPU: the launches of each step, and those that XLA captures together.

    python -m benchmarks.compiled.command_buffers [--layers N] [--kernels gpu|reference] [--capture +WHILE]

Needs the extra `aot`: the loop of Llama 3.1 8B, cut to a few layers, is compiled for an H200 that is not here, and the
sequence of thunks is read that XLA dumps after its passes. A command buffer is a CUDA graph: one launch, whatever it
holds. Nothing is run, so nothing here says what a launch costs.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvjax.plan.topology import ENVIRONMENT

_DUMP = "*thunk_sequence_after_thunk_passes.txt"
BUFFER, LOOP, BRANCH, KERNEL = "kCommandBuffer", "kWhile", "kConditional", "kCustomCall"


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One thing that is done on the device, and what it consists of: a loop's condition and body, say."""

    kind: str
    inner: tuple["Thunk", ...] = ()

    def all(self) -> list["Thunk"]:
        """This one and all within it."""
        return [self, *(each for thunk in self.inner for each in thunk.all())]

    def __str__(self) -> str:
        held = [each.kind for each in self.all()[1:]]
        kernels = f", {held.count(KERNEL)} of them our kernels" if KERNEL in held else ""
        name = {BUFFER: "command buffer", LOOP: "loop", BRANCH: "conditional", KERNEL: "our kernel"}
        return name.get(self.kind, self.kind) + (f" of {len(held)} thunks{kernels}" if held else "")


def parse(text: str) -> tuple[Thunk, ...]:
    """The thunks of a dump; what is indented further belongs to the one before."""
    entries = [(len(line[1]), line[2]) for line in re.finditer(r"^( *)\d+: (k\w+)", text, re.MULTILINE)]

    def within(begin: int, end: int) -> tuple[Thunk, ...]:
        thunks = []
        while begin < end:
            depth, kind = entries[begin]
            after = next((index for index in range(begin + 1, end) if entries[index][0] <= depth), end)
            thunks.append(Thunk(kind, within(begin + 1, after)))
            begin = after
        return tuple(thunks)

    return within(0, len(entries))


def describe(thunks: Sequence[Thunk]) -> list[str]:
    """Lines that say where the decode loop, the outermost one, is."""
    for thunk in thunks:
        if thunk.kind == LOOP:
            each = [f"  {inner}" for inner in thunk.inner]
            return ["the host goes round the loop, and in each step, its condition included, launches", *each]
        if thunk.kind == BUFFER and any(each.kind == LOOP for each in thunk.all()):
            return [
                "the device goes round the loop by itself: all steps of a dispatch are one launch of a",
                f"  {thunk}",
            ]
    raise ValueError("there is no loop in what was compiled")


def compiled(layers: int, kernels: str, capture: str | None) -> tuple[Thunk, ...]:
    """The thunks of a decode dispatch, compiled in a process of its own.

    Args:
        capture: for `--xla_gpu_enable_command_buffer`; None is XLA's default.

    Raises:
        RuntimeError: the compiler ended without a dump; says what it printed last.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        if capture is not None:
            flags += f" --xla_gpu_enable_command_buffer={capture}"
        command = [sys.executable, "-m", "benchmarks.compiled.command_buffers", "--here", f"--layers={layers}"]
        environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags}
        done = subprocess.run([*command, f"--kernels={kernels}"], env=environment, capture_output=True, text=True)
        dumps = sorted(Path(folder).glob(_DUMP), key=lambda path: path.stat().st_size)
        if done.returncode or not dumps:
            raise RuntimeError(f"compiling ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        return parse(dumps[-1].read_text())


def _compile(layers: int, kernels: str) -> None:
    from jax.sharding import SingleDeviceSharding

    from benchmarks.compiled.aot import READ, SLOTS
    from benchmarks.compiled.decode import LLAMA
    from kvjax.engine.config import EngineConfig, ResolvedConfig
    from kvjax.engine.device.abstract import abstract_steps
    from kvjax.engine.device.cache_config import CacheConfig
    from kvjax.plan.devices import find_device
    from kvjax.plan.topology import topology_devices

    model = dataclasses.replace(LLAMA, layers=LLAMA.layers[:layers])
    config = EngineConfig(max_num_seqs=SLOTS, token_budget=READ, attention_backend=kernels)
    caches = CacheConfig.declare(model, ResolvedConfig.resolve(config, model.max_position, "gpu"))
    here = SingleDeviceSharding(topology_devices(find_device("h200"))[0])
    decode = abstract_steps(caches, None, here, kernels, caches.layout.buckets[-1])["decode"]
    decode().lower(lowering_platforms=("cuda",)).compile()


def main() -> None:
    """Prints what each step of the loop launches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of the model (%(default)s)")
    parser.add_argument("--kernels", default="gpu", choices=("gpu", "reference"), help="(%(default)s)")
    parser.add_argument("--capture", help="for --xla_gpu_enable_command_buffer, as +WHILE; left out: XLA's default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        _compile(options.layers, options.kernels)
    else:
        print(*describe(compiled(options.layers, options.kernels, options.capture)), sep="\n")


if __name__ == "__main__":
    main()
