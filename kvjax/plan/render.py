"""An estimate as a terminal shows it, and as JSON."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvjax.plan.estimate import Estimate, Side
from kvjax.store.sizes import show_size

FULL = "full cache"


def render(name: str, answer: Estimate) -> RenderableType:
    """What a person reads: the verdict first, then memory, a step, and the store."""
    return Group(
        _verdict(name, answer), "", _memory(answer), _temporaries(answer), "", _step(answer), "", *_prefix(answer)
    )


def as_json(name: str, answer: Estimate) -> dict[str, Any]:
    """Bytes, tokens and seconds as numbers; bytes of `memory` are on each device."""
    question, device, prefix = answer.question, answer.question.device, answer.prefix
    return {
        "model": name,
        "device": {
            "name": device.name,
            "parts": device.parts,
            "memory": device.memory,
            "free": question.free,
            "bandwidth": device.bandwidth,
            "flops": device.flops,
            "host_link": question.tiers[0].bandwidth,
        },
        "context": answer.layout.max_model_len,
        "num_seqs": answer.layout.max_num_seqs,
        "method": answer.layout.method,
        "token_budget": answer.layout.token_budget,
        "budgets": answer.layout.budgets,
        "dtype": answer.layout.dtype,
        "kv_cache_dtype": answer.layout.kv_dtype,
        "compiled": None if answer.compiled is None else dataclasses.asdict(answer.compiled),
        "full": _side(answer.full),
        "this": _side(answer.asked),
        "ratio": answer.ratio,
        "prefix": {
            "tokens": prefix.tokens,
            "bytes": prefix.nbytes,
            "compute_seconds": prefix.compute_seconds,
            "even_bandwidth": prefix.even_bandwidth,
            "loads": [dataclasses.asdict(load) for load in prefix.loads],
        },
    }


def title(name: str, answer: Estimate) -> str:
    """`llama-3.1-8b on h200: 8 conversations of 128,000 tokens`."""
    layout = answer.layout
    many = "conversation" if layout.max_num_seqs == 1 else "conversations"
    return f"{name} on {answer.question.device.name}: {layout.max_num_seqs} {many} of {layout.max_model_len:,} tokens"


def label(answer: Estimate) -> str:
    """`rocketkv 256`, or the name of the file of budgets."""
    layout = answer.layout
    return f"{layout.method} {layout.token_budget or layout.budgets or ''}".strip()


def columns(answer: Estimate) -> list[tuple[str, Side]]:
    """The full cache, and what is compared with it if anything is."""
    return [(FULL, answer.full)] + ([] if answer.this is None else [(label(answer), answer.this)])


def show_seconds(seconds: float) -> str:
    """`3.42 ms`, `25.1 s`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def show_rate(rate: float) -> str:
    """Bytes a second in powers of ten, as makers have them: `64 GB/s`."""
    return f"{rate / 1e12:.3g} TB/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GB/s"


def _side(side: Side) -> dict[str, Any]:
    step = dataclasses.asdict(side.step) | {"bytes": side.step.nbytes}
    return {"memory": side.memory, "bytes": side.nbytes, "fits": side.fits, "most": side.most, "step": step}


def _verdict(name: str, answer: Estimate) -> Text:
    asked, free = answer.asked, answer.question.free
    each = "" if answer.question.device.parts == 1 else " of each device"
    text = Text.assemble((title(name, answer), "bold"), ", ", label(answer), "\n")
    if asked.fits:
        text.append("fits", "bold green")
        text.append(f": {show_size(free - asked.nbytes)}{each} stay free")
    else:
        text.append("does not fit", "bold red")
        text.append(f": {show_size(asked.nbytes - free)}{each} are missing; {_way_out(answer)}")
    return text.append(f"\n{asked.keeps}")


def _way_out(answer: Estimate) -> str:
    if answer.asked.most:
        return f"--num-seqs {answer.asked.most} fits"
    if answer.asked.memory["weights"] > answer.question.free:
        return "the weights alone are too large: take more chips (v5e-8 is eight)"
    return "not one conversation fits: a shorter --context, a smaller --group-layers, or more chips"


def _table(first: str, answer: Estimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, min_width=30)
    for name, _ in columns(answer):
        table.add_column(name, justify="right", min_width=14)
    return table


def _memory(answer: Estimate) -> Table:
    question, sides = answer.question, [side for _, side in columns(answer)]
    device = question.device
    table = _table("memory" if device.parts == 1 else f"memory of each of {device.parts} devices", answer)
    for purpose in answer.full.memory:
        table.add_row(purpose, *(_bytes(side.memory[purpose]) for side in sides))
    table.add_section()
    table.add_row("total", *(show_size(side.nbytes) for side in sides), style="bold")
    limit = f"fits in {question.share:.0%} of {show_size(device.memory)}"
    table.add_row(limit, *(Text("yes", "green") if side.fits else Text("no", "red") for side in sides))
    table.add_row("conversations that fit", *(f"{side.most:,}" for side in sides), style="bold")
    return table


def _temporaries(answer: Estimate) -> Text:
    """Who says how large they are."""
    compiled, asked, text = answer.compiled, answer.asked, Text(style="dim")
    text.append("temporaries: the engine's prediction, which it admits by; ")
    if compiled is None:
        return text.append(answer.uncompiled)
    steps = ", ".join(f"{step} {show_size(nbytes)}" for step, nbytes in compiled.temporaries.items())
    text.append(f"compiled for {answer.question.device.name}, {label(answer)}: {steps or 'nothing'}")
    for step, reason in compiled.refused.items():
        text.append(f"\n{step} was not compiled: {reason}", style="red")
    free = answer.question.free - asked.nbytes + asked.memory["temporaries"] - compiled.largest
    if not compiled.refused and (free >= 0) != asked.fits:
        text.append(f"\nwith these it {'fits' if free >= 0 else 'does not fit'}", style="bold")
    return text


def _step(answer: Estimate) -> Table:
    sides = [side for _, side in columns(answer)]
    slots = answer.layout.max_num_seqs
    table = _table(f"a decode step of {slots} reads", answer)
    table.add_row("weights", *(show_size(side.step.weights) for side in sides))
    table.add_row("KV and summaries", *(_bytes(side.step.kv) for side in sides))
    table.add_section()
    table.add_row(
        f"roofline, {show_rate(answer.question.device.bandwidth)}",
        *(show_seconds(side.step.seconds) for side in sides),
        style="bold",
    )
    if answer.this is not None:
        table.add_row("full / this", "", f"{answer.ratio:.1f}x")
    return table


def _prefix(answer: Estimate) -> list[RenderableType]:
    prefix = answer.prefix
    if prefix.even_bandwidth is None:
        return [
            f"load or recompute: a context shorter than a chunk of {answer.layout.prefill_chunk_size:,} is always computed"
        ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"{prefix.tokens:,} tokens of full KV", min_width=30)
    for head in ("rate", "time", "is loaded"):
        table.add_column(head, justify="right", min_width=10)
    for load in prefix.loads:
        loaded = "never" if load.break_even is None else f"from {load.break_even:,} tokens"
        table.add_row(f"load from {load.tier}", show_rate(load.bandwidth), show_seconds(load.seconds), loaded)
    device = answer.question.device
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
