"""Renders an estimate for the terminal, and as JSON."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvjax.plan.estimate import EnginePlan, Estimate
from kvjax.store.sizes import show_size

FULL = "full cache"


def render(name: str, result: Estimate) -> RenderableType:
    """The terminal's view: the verdict first, then memory, a step, and the store."""
    return Group(
        _verdict(name, result), "", _memory(result), _temporaries(result), "", _step(result), "", *_prefix(result)
    )


def as_json(name: str, result: Estimate) -> dict[str, Any]:
    """Bytes, tokens and seconds as numbers; bytes of `memory` are on each device."""
    deployment, device, prefix = result.deployment, result.deployment.device, result.prefix
    return {
        "model": name,
        "device": {
            "name": device.name,
            "parts": device.parts,
            "memory": device.memory,
            "free": deployment.free,
            "bandwidth": device.bandwidth,
            "flops": device.flops,
            "host_link": deployment.tiers[0].bandwidth,
        },
        "context": result.layout.max_model_len,
        "num_seqs": result.layout.max_num_seqs,
        "method": result.layout.method,
        "token_budget": result.layout.token_budget,
        "budgets": result.layout.budgets,
        "dtype": result.layout.dtype,
        "kv_cache_dtype": result.layout.kv_dtype,
        "compiled": None if result.compiled is None else dataclasses.asdict(result.compiled),
        "full": _engine(result.full),
        "this": _engine(result.requested),
        "ratio": result.ratio,
        "prefix": {
            "tokens": prefix.tokens,
            "bytes": prefix.nbytes,
            "compute_seconds": prefix.compute_seconds,
            "even_bandwidth": prefix.even_bandwidth,
            "loads": [dataclasses.asdict(load) for load in prefix.loads],
        },
    }


def title(name: str, result: Estimate) -> str:
    """`llama-3.1-8b on h200: 8 conversations of 128,000 tokens`."""
    layout = result.layout
    many = "conversation" if layout.max_num_seqs == 1 else "conversations"
    return f"{name} on {result.deployment.device.name}: {layout.max_num_seqs} {many} of {layout.max_model_len:,} tokens"


def label(result: Estimate) -> str:
    """`rocketkv 256`, or the name of the file of budgets."""
    layout = result.layout
    return f"{layout.method} {layout.token_budget or layout.budgets or ''}".strip()


def columns(result: Estimate) -> list[tuple[str, EnginePlan]]:
    """The full cache, and the compressed engine where there is one."""
    return [(FULL, result.full)] + ([] if result.compressed is None else [(label(result), result.compressed)])


def show_seconds(seconds: float) -> str:
    """`3.42 ms`, `25.1 s`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def show_rate(rate: float) -> str:
    """Bytes a second in powers of ten, as makers have them: `64 GB/s`."""
    return f"{rate / 1e12:.3g} TB/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GB/s"


def _engine(engine: EnginePlan) -> dict[str, Any]:
    step = dataclasses.asdict(engine.step) | {"bytes": engine.step.nbytes}
    return {"memory": engine.memory, "bytes": engine.nbytes, "fits": engine.fits, "most": engine.most, "step": step}


def _verdict(name: str, result: Estimate) -> Text:
    requested, free = result.requested, result.deployment.free
    each = "" if result.deployment.device.parts == 1 else " of each device"
    text = Text.assemble((title(name, result), "bold"), ", ", label(result), "\n")
    if requested.fits:
        text.append("fits", "bold green")
        text.append(f": {show_size(free - requested.nbytes)}{each} stay free")
    else:
        text.append("does not fit", "bold red")
        text.append(f": {show_size(requested.nbytes - free)}{each} are missing; {_way_out(result)}")
    return text.append(f"\n{requested.keeps}")


def _way_out(result: Estimate) -> str:
    if result.requested.most:
        return f"--num-seqs {result.requested.most} fits"
    if result.requested.memory["weights"] > result.deployment.free:
        return "the weights alone are too large: take more chips (v5e-8 is eight)"
    return "not one conversation fits: a shorter --context, a smaller --group-layers, or more chips"


def _table(first: str, result: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, min_width=30)
    for name, _ in columns(result):
        table.add_column(name, justify="right", min_width=14)
    return table


def _memory(result: Estimate) -> Table:
    deployment, engines = result.deployment, [engine for _, engine in columns(result)]
    device = deployment.device
    table = _table("memory" if device.parts == 1 else f"memory of each of {device.parts} devices", result)
    for purpose in result.full.memory:
        table.add_row(purpose, *(_bytes(engine.memory[purpose]) for engine in engines))
    table.add_section()
    table.add_row("total", *(show_size(engine.nbytes) for engine in engines), style="bold")
    limit = f"fits in {deployment.share:.0%} of {show_size(device.memory)}"
    table.add_row(limit, *(Text("yes", "green") if engine.fits else Text("no", "red") for engine in engines))
    table.add_row("conversations that fit", *(f"{engine.most:,}" for engine in engines), style="bold")
    return table


def _temporaries(result: Estimate) -> Text:
    """The source of the temporaries: the engine's prediction, or the compiler."""
    compiled, requested, text = result.compiled, result.requested, Text(style="dim")
    text.append("temporaries: the engine's prediction, which it admits by; ")
    if compiled is None:
        return text.append(result.uncompiled)
    steps = ", ".join(f"{step} {show_size(nbytes)}" for step, nbytes in compiled.temporaries.items())
    text.append(f"compiled for {result.deployment.device.name}, {label(result)}: {steps or 'nothing'}")
    for step, reason in compiled.refused.items():
        text.append(f"\n{step} was not compiled: {reason}", style="red")
    free = result.deployment.free - requested.nbytes + requested.memory["temporaries"] - compiled.largest
    if not compiled.refused and (free >= 0) != requested.fits:
        text.append(f"\nwith these it {'fits' if free >= 0 else 'does not fit'}", style="bold")
    return text


def _step(result: Estimate) -> Table:
    engines = [engine for _, engine in columns(result)]
    slots = result.layout.max_num_seqs
    table = _table(f"a decode step of {slots} reads", result)
    table.add_row("weights", *(show_size(engine.step.weights) for engine in engines))
    table.add_row("KV and summaries", *(_bytes(engine.step.kv) for engine in engines))
    table.add_section()
    table.add_row(
        f"roofline, {show_rate(result.deployment.device.bandwidth)}",
        *(show_seconds(engine.step.seconds) for engine in engines),
        style="bold",
    )
    if result.compressed is not None:
        table.add_row("full / this", "", f"{result.ratio:.1f}x")
    return table


def _prefix(result: Estimate) -> list[RenderableType]:
    prefix = result.prefix
    if prefix.even_bandwidth is None:
        chunk = result.layout.prefill_chunk_size
        return [f"load or recompute: a context shorter than a chunk of {chunk:,} is always computed"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"{prefix.tokens:,} tokens of full KV", min_width=30)
    for head in ("rate", "time", "is loaded"):
        table.add_column(head, justify="right", min_width=10)
    for load in prefix.loads:
        loaded = "never" if load.break_even is None else f"from {load.break_even:,} tokens"
        table.add_row(f"load from {load.tier}", show_rate(load.bandwidth), show_seconds(load.seconds), loaded)
    device = result.deployment.device
    peak = f"{device.flops * device.parts / 1e12:,.0f} TFLOP/s"
    table.add_row("compute, roofline", peak, show_seconds(prefix.compute_seconds), "")
    return [
        table,
        "",
        f"{show_size(prefix.nbytes)}; loading is as fast as computing at {show_rate(prefix.even_bandwidth)}. "
        "Rooflines are the least time, not a measurement: a prefill at half of the peak halves that rate.",
    ]


def _bytes(value: int) -> str:
    return show_size(value) if value else "-"
