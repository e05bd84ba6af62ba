"""What a person reads when the engine is ready: seconds of each phase, memory by purpose, and what fits."""

from collections.abc import Mapping

import jax

from kvjax.engine.memory import in_units, plan
from kvjax.engine.runner import Runner


def startup_report(runner: Runner, seconds: Mapping[str, float], compiled: Mapping[str, float]) -> str:
    """Lines of text; bytes are over all devices, from the shapes of the arrays."""
    layout, model = runner.layout, runner.model_config
    devices = 1 if runner.mesh is None else runner.mesh.size
    device = jax.devices()[0]
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
    shapes = ", ".join(f"{shape} {value:.1f} s" for shape, value in compiled.items())
    memory = plan(runner.caches)
    table = [f"  {purpose:<14} {in_units(value):>10}" for purpose, value in memory.items()]
    per_token = memory["views"] / (layout.slots * layout.max_model_len)
    return "\n".join(
        [
            f"device      {devices} x {device.device_kind} ({device.platform})",
            f"model       {model.family}, {model.num_layers} layers in {len(runner.groups)} groups, {layout.dtype}",
            f"start-up    {phases}",
            f"compiled    {shapes} (tokens of a prompt's bucket)",
            "memory",
            *table,
            f"  {'total':<14} {in_units(sum(memory.values())):>10}",
            f"fits        {layout.slots} conversations of {layout.max_model_len:,} tokens,"
            f" {layout.slots * layout.max_model_len:,} tokens in all, {in_units(per_token)} of KV a token",
        ]
    )
