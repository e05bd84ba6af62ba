"""The target that a command line names: a server, or an engine that is not started yet."""

import contextlib
import importlib.resources
import os
import sys
from collections.abc import Callable
from pathlib import Path

from kvjax.eval.arguments import ArgumentError, Arguments
from kvjax.eval.targets.target import Target, TargetError

MARGIN = 1024  # tokens beyond the longest sample, for answers longer than the right ones
SMALL_MODEL = "kvjax_small"


def open_target(given: Arguments, resources: contextlib.ExitStack) -> tuple[Target, Callable[[], None]]:
    """The target and the function that starts it, to be called once there are samples to evaluate.

    Args:
        resources: closes, at its end, whatever was opened or started.

    Raises:
        ArgumentError, TargetError: there is no such target, or it cannot run; the message says what to change.
    """
    return _server(given, resources) if given.url is not None else _engine(given, resources)


def _server(given: Arguments, resources: contextlib.ExitStack) -> tuple[Target, Callable[[], None]]:
    from kvjax.eval.targets.openai import OpenAITarget

    assert given.url is not None
    target = OpenAITarget(
        given.url, model=given.model, api_key=given.api_key, tokenizer=given.tokenizer, timeout=given.timeout
    )
    resources.callback(target.close)
    if given.max_model_len is not None:
        target.max_model_len = min(given.max_model_len, target.max_model_len or given.max_model_len)
    return target, lambda: None


def _engine(given: Arguments, resources: contextlib.ExitStack) -> tuple[Target, Callable[[], None]]:
    folder = Path(given.model).expanduser() if given.model else small_model()
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"--model {str(folder)!r} is no folder with a config.json: no model is in it")
    keep_compiled(given.compile_cache)
    from kvjax.models import read_config

    try:
        most = read_config(folder).max_position
    except (ValueError, OSError, NotImplementedError) as error:
        raise TargetError(f"{folder}: {error}") from error
    # samples of files are as long as they are
    length = given.max_model_len or (min(max(given.lengths) + MARGIN, most) if given.lengths else most)
    for flag, tokens, bound in (("--max-model-len", length, most), ("--lengths", max(given.lengths or (0,)), length)):
        if tokens > bound:
            raise ArgumentError(f"{flag} {tokens} is more than the {bound} tokens of context of {folder.name}")
    from kvjax.engine import EngineConfig
    from kvjax.eval.targets.engine import EngineTarget

    options = {name: getattr(given, name) for name in ("method", "token_budget", "budgets", "headroom")}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        config = EngineConfig(max_model_len=length, max_num_seqs=given.conduct.concurrency, **options)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    target = EngineTarget.from_pretrained(folder, config)
    flags = {
        "--query-agnostic": given.conduct.query_agnostic,
        "--evict": given.conduct.evict,
        "--show-retained": given.show_retained,
    }
    for flag in (flag for flag, value in flags.items() if value):
        if not target.engine.caches.window:
            raise ArgumentError(
                f"{flag} says nothing here: {target.engine.layout.method} keeps all of {length} tokens; leave it out, "
                "or give a --method that retains fewer, as rocketkv, and a smaller --token-budget"
            )

    def start() -> None:
        try:
            resources.enter_context(target.engine)
        except (ValueError, OSError, NotImplementedError) as error:
            raise TargetError(f"{folder}: {error}") from error

    return target, start


def small_model() -> Path:
    """The folder of the model that ships with kvjax."""
    return Path(str(importlib.resources.files("kvjax") / "models" / SMALL_MODEL))


def keep_compiled(folder: str) -> None:
    """Has JAX keep what it compiles in `folder`, unless it is 'none' or JAX's own variables say otherwise."""
    if folder == "none":
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        print(f"kvjax: no compile cache in {path}: {error.strerror}; this run compiles anew", file=sys.stderr)
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(path))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
