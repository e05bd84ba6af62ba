"""`python -m kvjax.serve [MODEL]`: reads the arguments, and only then imports what serving needs."""

import os
import sys
from collections.abc import Sequence

from kvjax.serve.arguments import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until stopped; returns the exit status."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    if config.gpu_memory_utilization is not None:
        # the older name is refused beside the newer one
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{config.gpu_memory_utilization:.4f}"
    try:
        from kvjax.serve.lifecycle import run

        return run(config)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
