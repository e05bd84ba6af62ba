"""`python -m kvjax.serve [MODEL]`: reads the arguments, and only then imports what serving needs."""

import sys
from collections.abc import Sequence

from kvjax.serve.arguments import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until stopped; returns the exit status."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        from kvjax.serve.lifecycle import run

        return run(config)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
