"""Start-up report: seconds of each phase, memory by purpose, and what fits, as lines of text for people."""

from collections.abc import Mapping

import jax

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import plan
from kvjax.engine.device.runner import Runner
from kvjax.engine.host_memory import prompt_blocks
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.sizes import show_size
from kvjax.store.store import KVStore


def startup_report(
    runner: Runner,
    store: KVStore | None,
    seconds: Mapping[str, float],
    compiled: Mapping[str, float],
    restored: int | None = None,
) -> str:
    """Lines of text; bytes are over all devices, from the shapes of the arrays.

    Args:
        restored: conversations of before that are back in slots; None where none are ever suspended.
    """
    layout, model = runner.layout, runner.caches.model
    devices = 1 if runner.mesh is None else runner.mesh.size
    device = jax.devices()[0]
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
    shapes = ", ".join(f"{shape} {value:.1f} s" for shape, value in compiled.items())
    memory = plan(runner.caches)
    table = [f"  {purpose:<14} {show_size(value):>10}" for purpose, value in memory.items()]
    backend = layout.attention_backend
    attention = "jax.numpy" if backend == "reference" else f"kernels, {backend}"
    per_token = memory["views"] / (layout.max_num_seqs * layout.max_model_len)
    return "\n".join(
        [
            f"device      {devices} x {device.device_kind} ({device.platform})",
            f"model       {model.family}, {model.num_layers} layers in {len(runner.groups)} groups, {layout.dtype}",
            f"keeps       {keeps(runner.caches)}",
            f"attention   {attention}",
            f"store       {stored(store, layout.max_model_len)}",
            *([] if restored is None else [f"suspended      {restored} conversations are back in their slots"]),
            f"start-up    {phases}",
            f"compiled    {shapes} (tokens of a prompt's bucket)",
            "memory",
            *table,
            f"  {'total':<14} {show_size(sum(memory.values())):>10}",
            f"fits        {layout.max_num_seqs} conversations of {layout.max_model_len:,} tokens,"
            f" {layout.max_num_seqs * layout.max_model_len:,} tokens in all, {show_size(per_token)} of KV a token",
        ]
    )


def stored(store: KVStore | None, context: int) -> str:
    """Tiers of the KV of earlier prompts: `host 1.00 GiB for 262,144 tokens; disk 2.1 MiB of 20.00 GiB`.

    Where the size of host memory was derived: `host 1.00 GiB (auto: 6 prompts of 8,192 tokens) for 49,152 tokens`.
    """
    if store is None:
        return "none: every prompt is computed from its first token on (--host-cache-size)"
    tiers = []
    for name, tier in store.stats().items():
        if name == "host":
            auto = f" ({_auto(store.capacity, context)})" if store.config.host_cache_auto else ""
            tiers.append(f"host {show_size(tier.capacity_bytes)}{auto} for {store.capacity * BLOCK_TOKENS:,} tokens")
        elif tier.capacity_bytes:
            used = f"{show_size(tier.used_bytes)} of {show_size(tier.capacity_bytes)}"
            tiers.append(f"{name} {used}, {tier.blocks * BLOCK_TOKENS:,} tokens of any model")
        else:
            tiers.append(name)
    return "; ".join(tiers)


def _auto(blocks: int, context: int) -> str:
    """`auto: 6 prompts of 8,192 tokens`, by the blocks that host memory holds."""
    prompts = blocks // prompt_blocks(context)
    count = f"{prompts} prompt{'s' if prompts > 1 else ''}" if prompts else "less than one prompt"
    return f"auto: {count} of {context:,} tokens"


def keeps(caches: CacheConfig) -> str:
    """Tokens that the views retain of a prompt as long as the context; shares are bytes of the full cache.

    `rocketkv, token budget 64: 298 of 2,048 entries in 8 layers (pages of 8), 15.5% of the full cache's bytes; ...`.
    """
    layout, context = caches.layout, caches.layout.max_model_len
    method = layout.method
    if layout.token_budget is not None:
        method += f", token budget {layout.token_budget:,}"
    if layout.budgets is not None:
        method += f", budgets of {layout.budgets}"
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for each, layer in zip(caches.plans, caches.model.layers, strict=True):
        seen = min(layer.window or context, context)
        retained = each.retained(seen)
        alike.setdefault((seen, each.page_size, retained < seen), []).append(retained)
    layers = ", ".join(_entries(seen, page, sorted(retained)) for (seen, page, _), retained in alike.items())
    full = caches.full_bytes(context)
    retained, read = (
        f"{100 * value / full:.3g}%" for value in (caches.retained_bytes(context), caches.read_bytes(context))
    )
    return f"{method}: {layers}, {retained} of the full cache's bytes; a step reads {read}"


def _entries(seen: int, page: int, retained: list[int]) -> str:
    """`298 of 2,048 entries in 8 layers (pages of 8)`; `retained` by each of these layers, the least first."""
    span = f"{retained[0]:,} to {retained[-1]:,}" if retained[0] < retained[-1] else f"{retained[0]:,}"
    shown = f"all {seen:,}" if retained[0] == seen else f"{span} of {seen:,}"
    pages = f" (pages of {page})" if page > 1 else ""
    return f"{shown} entries in {len(retained)} layer{'s' if len(retained) > 1 else ''}{pages}"
