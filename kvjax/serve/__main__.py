"""`python -m kvjax.serve [MODEL]`: reads the arguments, and only then imports what serving needs."""

import os
import pathlib
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
    if config.compile_cache != "none":
        keep_compiled(pathlib.Path(config.compile_cache).expanduser())
    try:
        from kvjax.serve.lifecycle import run

        return run(config)
    except KeyboardInterrupt:
        return 130


def keep_compiled(folder: pathlib.Path) -> None:
    """Has JAX keep what it compiles in `folder`, unless its own variables say otherwise already."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        print(f"kvjax: no compile cache in {folder}: {error.strerror}; this start compiles anew", file=sys.stderr)
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


if __name__ == "__main__":
    sys.exit(main())
