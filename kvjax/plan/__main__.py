"""`python -m kvjax.plan llama-3.1-8b --device h200 --context 128k --token-budget 256`: does it fit, and how well."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from kvjax.plan.estimate import Estimate


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what serving a model on a device would take. Exit status 1 says that it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: an accelerator that is here stays free
    from kvjax.plan.arguments import build_parser, read_deployment
    from kvjax.plan.estimate import estimate
    from kvjax.plan.render import as_json, render
    from kvjax.plan.topology import compile_obstacle

    argv = sys.argv[1:] if argv is None else argv

    parser = build_parser()
    options = parser.parse_args(argv)
    name = Path(options.model).name.removesuffix("config.json") or options.model
    try:
        deployment = read_deployment(options)
        result = estimate(deployment)
        reason = "--no-compile" if not options.compile else compile_obstacle(deployment.device)
        result = dataclasses.replace(result, uncompiled=reason or "")
        if reason is None:
            result = _compiled(result, argv)
        if options.picture is not None:
            from kvjax.plan.figure import draw

            draw(name, result, options.picture)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(as_json(name, result), indent=2))
    else:
        Console().print(render(name, result))
    sys.exit(0 if result.requested.fits else 1)


def _compiled(result: "Estimate", argv: Sequence[str]) -> "Estimate":
    from kvjax.plan.compiled import measure

    try:
        return dataclasses.replace(result, compiled=measure(argv))
    except RuntimeError as error:
        return dataclasses.replace(result, uncompiled=str(error))


if __name__ == "__main__":
    main()
