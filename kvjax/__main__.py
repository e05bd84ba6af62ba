"""`kvjax COMMAND`, also `python -m kvjax COMMAND`: each command is the `__main__` of the package of its name."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": "serve a model with the OpenAI API",
    "eval": "score a model on long-context tasks",
    "search": "search how many tokens each layer retains",
    "store": "list, check and clean a store of KV blocks",
    "plan": "estimate whether a model fits on a device",
    "train": "train a model of a YAML config",
    "models": "list the models known by name and those in the hub's cache",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 where no command has the name. Imports that command alone."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        way_out = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"kvjax: no command {name!r}: {way_out}", file=sys.stderr)
        return 2
    sys.argv = [f"kvjax {name}", *rest]  # where the commands read their arguments
    return importlib.import_module(f"kvjax.{name}.__main__").main() or 0


def usage() -> str:
    rows = (f"  {name:<8}{purpose}" for name, purpose in COMMANDS.items())
    return "\n".join(("usage: kvjax COMMAND [ARGUMENTS]", "", *rows, "", "kvjax COMMAND --help lists its arguments."))


if __name__ == "__main__":
    sys.exit(main())
