"""`python -m kvjax.plan llama-3.1-8b --device h200 --context 128k --token-budget 256`: does it fit, and how well."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what serving a model on a device would take. Exit status 1 says that it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: an accelerator that is here stays free
    from kvjax.engine.config import EngineConfig
    from kvjax.plan.arguments import build_parser
    from kvjax.plan.devices import find_device
    from kvjax.plan.estimate import Question, estimate
    from kvjax.plan.named import read_model
    from kvjax.plan.show import as_json, render

    parser = build_parser()
    options = parser.parse_args(argv)
    name = Path(options.model).name.removesuffix("config.json") or options.model
    try:
        device = find_device(options.device)
        config = EngineConfig(
            max_model_len=options.context,
            max_num_seqs=options.num_seqs,
            dtype=options.dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            tensor_parallel_size=device.parts,
            method=options.method,
            token_budget=options.token_budget,
            budgets=options.budgets,
            room=options.room,
            group_layers=options.group_layers,
        )
        question = Question(
            model=read_model(options.model, options.context),
            device=device,
            config=config,
            share=options.gpu_memory_utilization,
            host_bandwidth=options.host_bandwidth,
            disk_bandwidth=options.disk_bandwidth,
            remote_bandwidth=options.remote_bandwidth,
        )
        answer = estimate(question)
        if options.picture is not None:
            from kvjax.plan.picture import draw

            draw(name, answer, options.picture)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(as_json(name, answer), indent=2))
    else:
        Console().print(render(name, answer))
    sys.exit(0 if answer.asked.fits else 1)


if __name__ == "__main__":
    main()
