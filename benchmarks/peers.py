"""kvjax beside llama.cpp on the same weights: time to first token, cold and warm, and decode of a lone user.

    python -m benchmarks.peers [--lengths 2000 6000] [--rounds 3] [--output FILE.json]

The model is SmolLM2-135M from its GGUF file, in float32 for both: llama.cpp gets a copy with each tensor dequantised,
for it rounds inputs of quantised products to eight bits. Both run in this process with two threads, in turns: A B A B.

    cold    a prompt that was never seen
    host    the same prompt again: kvjax from host memory, llama.cpp from the slot that still holds it
    disk    the same prompt after another one: kvjax by an engine that has just started on the folder, llama.cpp by
            restoring the slot from a file. Both include the first token
    decode  tokens a second behind that prompt, one user, on an engine of one slot

Ratios are kvjax over llama.cpp, in pairs; below 1 kvjax takes less time. Needs the extra `clients`.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gguf
import httpx

from benchmarks.common.report import write_rows
from benchmarks.store_engine import ONE, engine_on, prompt, settle
from kvjax.engine import Engine, SamplingParams
from kvjax.models.catalog import SMOLLM2
from kvjax.store.config import StoreConfig

GENERATED = 64
MANY = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
THREADS = 2
SEED = 7


def dequantised(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LlamaCpp:
    """llama.cpp's server in this process, with one slot."""

    def __init__(self, model: pathlib.Path, folder: pathlib.Path, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.slot_save_path = context, 1, f"{folder}/"
        params.cache_ram_mib, params.endpoint_slots = 0, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        self._server = xllamacpp.Server(params)
        self._client = httpx.Client(base_url=self._server.listening_address, timeout=600)

    def complete(self, tokens: Sequence[int], count: int) -> tuple[float, float]:
        """Seconds until the answer, and tokens a second of its decode."""
        body = {"prompt": list(tokens), "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        began = time.perf_counter()
        answer = self._client.post("/completion", json=body).raise_for_status().json()
        return time.perf_counter() - began, answer["timings"]["predicted_per_second"]

    def slot(self, action: str, name: str) -> float:
        """Seconds to save the slot to a file, or to restore it."""
        began = time.perf_counter()
        self._client.post(f"/slots/0?action={action}", json={"filename": name}).raise_for_status()
        return time.perf_counter() - began


def kvjax_seconds(engine: Engine, tokens: list[int], params: SamplingParams = ONE) -> float:
    began = time.perf_counter()
    engine.generate([tokens], params, progress=False)
    return time.perf_counter() - began


def measure(source: pathlib.Path, folder: pathlib.Path, length: int, rounds: int) -> dict[str, Any]:
    """One length: seconds of each arm of each round, for both."""
    context = length + 2 * GENERATED
    store = StoreConfig(
        host_cache_size=4 << 30, disk_cache=folder / f"kv-{length}", disk_cache_size=32 << 30,
        prefetch_policy="wait_complete",
    )  # fmt: skip
    prompts = [prompt(length, seed=SEED + number, vocabulary=40_000) for number in range(rounds)]
    other = prompt(256, seed=SEED - 1, vocabulary=40_000)
    peer = LlamaCpp(dequantised(source, folder / "f32.gguf"), folder, context)
    ours: dict[str, list[float]] = {arm: [] for arm in ("cold", "host", "disk", "decode")}
    theirs: dict[str, list[float]] = {arm: [] for arm in ours}
    with engine_on(str(source), context, store) as engine:
        for number, tokens in enumerate(prompts):
            ours["cold"].append(kvjax_seconds(engine, tokens))
            theirs["cold"].append(peer.complete(tokens, 1)[0])
            settle(engine)
            ours["host"].append(kvjax_seconds(engine, tokens))
            theirs["host"].append(peer.complete(tokens, 1)[0])
            peer.slot("save", f"{number}.bin")
            ours["decode"].append((GENERATED - 1) / (kvjax_seconds(engine, tokens, MANY) - ours["host"][-1]))
            theirs["decode"].append(peer.complete(tokens, GENERATED)[1])
            peer.complete(other, 1)
        engine.drain(60.0)
    with engine_on(str(source), context, store) as engine:
        for number, tokens in enumerate(prompts):
            ours["disk"].append(kvjax_seconds(engine, tokens))
            restored = peer.slot("restore", f"{number}.bin")
            theirs["disk"].append(restored + peer.complete(tokens, 1)[0])
            peer.complete(other, 1)
    row: dict[str, Any] = {"tokens": length, "rounds": rounds}
    for arm in ours:
        ratios = [a / b for a, b in zip(ours[arm], theirs[arm], strict=True)]
        row[arm] = {"kvjax": ours[arm], "llama.cpp": theirs[arm], "ratio": statistics.median(ratios)}
        unit = "tok/s" if arm == "decode" else "s"
        print(
            f"{length:6,} tokens  {arm:7} kvjax {statistics.median(ours[arm]):8.3f} {unit:5}  llama.cpp "
            f"{statistics.median(theirs[arm]):8.3f} {unit:5}  ratio {statistics.median(ratios):5.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    return row


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="kvjax-peers-") as folder:
        yield pathlib.Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 6000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    source = SMOLLM2.locate()
    if source is None:
        parser.error(f"{SMOLLM2.name} is not installed: {SMOLLM2.source}")
    rows = []
    for length in options.lengths:
        with scratch() as folder:
            rows.append(measure(source, folder, length, options.rounds))
        if options.output is not None:
            write_rows(options.output, "benchmarks.peers", rows, {"lengths": options.lengths, "rounds": options.rounds})


if __name__ == "__main__":
    main()
