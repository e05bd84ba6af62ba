"""`python -m kvjax.models`: the models known by name and those that the hub's cache holds, as a table."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from kvjax.models import read_config
from kvjax.models.catalog import CATALOG
from kvjax.models.gguf import find_gguf, is_gguf

HEADER = ("name", "size", "context", "lies in")
MORE = """
Serve one of them:      python -m kvjax.serve NAME
Serve any other model:  python -m kvjax.serve FILE.gguf
                        python -m kvjax.serve FOLDER         (config.json, safetensors and a tokenizer)
                        python -m kvjax.serve OWNER/NAME     (on the Hugging Face hub, fetched once)
                        python -m kvjax.serve OWNER/NAME/FILE.gguf"""


def main() -> int:
    """Prints the table; returns the exit status, 0 also where a reader as `head` closes the pipe early."""
    try:
        print_table()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
    return 0


def print_table() -> None:
    rows = [HEADER, *catalog(), *cached()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, size, context, place in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {context:>{widths[2]}}  {place}")
    print()
    width = max(len(each.name) for each in CATALOG)
    for each in CATALOG:
        print(f"{each.name:<{width}}  {each.parameters} parameters: {each.ability}")
    print(MORE)


def catalog() -> Iterator[tuple[str, str, str, str]]:
    """A row for each model of the catalog."""
    for each in CATALOG:
        path = each.locate()
        yield row(each.name, path) if path is not None else (each.name, "-", "-", f"not here: {each.source}")


def cached() -> Iterator[tuple[str, str, str, str]]:
    """A row for each model in the hub's cache that can be served."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        for revision in repository.revisions:
            folder = revision.snapshot_path
            try:
                file = find_gguf([path.name for path in folder.glob("*.gguf")], repository.repo_id)
                path = folder if file is None or any(folder.glob("*.safetensors")) else folder / file
                yield row(repository.repo_id, path)
            except (OSError, ValueError):
                continue  # another kind of model, or half a download


def row(name: str, path: Path) -> tuple[str, str, str, str]:
    """Name, size, context and place of one model. Raises what `read_config` raises."""
    files = [path] if is_gguf(path) else list(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return name, show_size(size), f"{read_config(path).max_position:,}", str(path)


def show_size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
