"""Flags, environment and file to one `ServeConfig`: command line > `KVJAX_*` > `--config` file > default.

Imports nothing heavy: `--help`, `--version` and mistakes are answered in a blink.
"""

import argparse
import dataclasses
import difflib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import kvjax
from kvjax.serve.config import (
    ATTENTION_BACKENDS,
    AUTO,
    DTYPES,
    GENERATION_CONFIGS,
    LOG_LEVELS,
    WHEN_FULL,
    ServeConfig,
)
from kvjax.store.config import PREFETCH, WRITE
from kvjax.store.eviction import POLICIES
from kvjax.store.sizes import memory, show_size, size


def yes_no(text: str) -> bool:
    """`yes` or `no`, or as YAML has them. Raises ValueError."""
    try:
        return {"yes": True, "true": True, "no": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError("neither yes nor no") from None


def memory_or_auto(text: str) -> int | Literal["auto"]:
    """As `memory`, or `auto`. Raises ValueError."""
    if text == AUTO:
        return AUTO
    try:
        return memory(text)
    except ValueError as error:
        raise ValueError(f"{error}, or {AUTO}") from None


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of ServeConfig as a flag, a variable and a key. `parse` raises ValueError with a reason.

    Attributes:
        many: whether it may be given several times.
        former: its names one version ago, which still work and are not shown.
    """

    field: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    many: bool = False
    former: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def variable(self) -> str:
        return "KVJAX_" + self.field.upper()


GROUPS: Mapping[str, Sequence[Option]] = {
    "model": (
        Option("served_model_name", str, "NAME", "what requests may call it; the first is shown", many=True),
        Option("dtype", str, "|".join(DTYPES), "of weights; auto is float32 on CPU, else bfloat16"),
        Option("kv_cache_dtype", str, "|".join(DTYPES), "of the KV cache; auto is that of the weights"),
        Option(
            "attention_backend",
            str,
            "|".join(ATTENTION_BACKENDS),
            "what computes attention: jax.numpy; kernels where they serve; or those of a TPU or a Hopper GPU alone. "
            "No device has run the kernels yet, so they are off by default",
        ),
        Option("chat_template", str, "FILE", "a Jinja chat template, instead of the model's own"),
        Option(
            "generation_config",
            str,
            "|".join(GENERATION_CONFIGS),
            "whether the model's generation_config.json gives the defaults of requests",
        ),
        Option("seed", int, "N", "where the seeds of requests without one start"),
    ),
    "size": (
        Option("max_model_len", size, "TOKENS", "tokens of one conversation (32k, 32K); default: the model's"),
        Option("max_num_seqs", int, "N", "requests that run at once"),
        Option("max_num_queued_reqs", int, "N", "requests that may wait; more are refused with 503"),
        Option("tensor_parallel_size", int, "N", "devices to split heads over"),
        Option("gpu_memory_utilization", float, "SHARE", "share of the device's memory to take, as 0.9"),
    ),
    "compression": (
        Option("method", str, "NAME", "how the KV cache is compressed: full, rocketkv, snapkv ... or module:Class"),
        Option("token_budget", size, "TOKENS", "KV pairs a step reads a layer; alone it means rocketkv"),
        Option("budgets", str, "FILE", "a budget for each layer, found by search, instead of --token-budget"),
        Option(
            "headroom",
            size,
            "TOKENS",
            "entries of a compressed view that are reserved for generated tokens",
            former=("room",),
        ),
        Option("when_full", str, "|".join(WHEN_FULL), "what an output does that is longer than the headroom"),
        Option("group_layers", int, "N", "most layers prefilled together: fewer take less memory"),
    ),
    "store": (
        Option(
            "host_cache_size",
            memory_or_auto,
            "SIZE",
            "host memory for the KV of earlier prompts, as 4GiB; 0 for no store; auto goes by model and free memory",
        ),
        Option("disk_cache", str, "DIR", "a folder where that KV outlives the server; servers may share it"),
        Option("disk_cache_size", memory, "SIZE", "most that may lie in that folder, as 100GiB"),
        Option("disk_sync", yes_no, "yes|no", "whether a block on the disk survives a power cut"),
        Option("remote_cache", str, "URL", "gs://, s3://, redis://, mooncake://, or http(s):// read-only"),
        Option(
            "tier",
            str,
            "URL",
            "a tier below host memory, as disk:///path?size=100GiB or s3://bucket/kv; may repeat, nearest first",
            many=True,
        ),
        Option("prefetch_policy", str, "|".join(PREFETCH), "how long a request waits for stored KV"),
        Option("write_policy", str, "|".join(WRITE), "when KV goes to the disk and the remote tier"),
        Option("eviction_policy", str, "|".join(POLICIES), "which KV leaves a full tier first"),
        Option(
            "store_generated", yes_no, "yes|no", "keep answers too; turns behind them may differ from computed ones"
        ),
        Option(
            "verify_hits",
            float,
            "SHARE",
            "share of found KV that is computed all the same and compared",
            former=("canary",),
        ),
    ),
    "server": (
        Option("host", str, "ADDRESS", "address to listen on; one that others reach wants a key"),
        Option(
            "allowed_hosts",
            str,
            "NAME",
            "a name under which to answer besides localhost, as *.example.org; with keys any, unless some are given",
            many=True,
        ),
        Option("port", int, "PORT", "port to listen on; 0 takes a free one"),
        Option(
            "api_key",
            str,
            "KEY",
            "a key that opens the server; may repeat (`ps` shows it: prefer a file)",
            True,
        ),
        Option("shutdown_timeout", float, "SECONDS", "time for running requests after SIGTERM"),
        Option(
            "session_dir",
            str,
            "DIR",
            "a folder where answers that it cuts off wait for the next start, to go on there",
            former=("park",),
        ),
        Option("compile_cache", str, "DIR", "where compiled steps wait for the next start; none: nowhere"),
        Option("log_level", str, "|".join(LOG_LEVELS), "how much to log"),
    ),
}
OPTIONS = {option.field: option for group in GROUPS.values() for option in group}
FORMER = {former: option.field for option in OPTIONS.values() for former in option.former}
FILES = {
    "api_key_file": "keys that open the server, one a line, # for comments",
    "config": "flags by name, as `max-model-len: 32k`",
}


class ConfigError(ValueError):
    """A setting that is wrong; the message says where it came from."""


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServeConfig:
    """The configuration of one server. Ends the process with status 2 and a sentence if anything is wrong."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    try:
        return merge(given, environment)
    except ValueError as error:
        parser.error(str(error))


def merge(given: Mapping[str, Any], environment: Mapping[str, str]) -> ServeConfig:
    """Joins the parsed command line with the environment and the file. Raises ConfigError or ValueError."""
    names = ("model", *OPTIONS, "api_key_file")
    variables = {
        FORMER.get(name, name): environment["KVJAX_" + name.upper()]
        for name in (*FORMER, *names)  # the name of today wins
        if "KVJAX_" + name.upper() in environment
    }
    path = given.get("config") or environment.get("KVJAX_CONFIG")
    if len(given.get("served_model_name", ())) > 1 and "model" not in given:
        raise ConfigError("--served-model-name takes all names after it: write MODEL before the flags")
    settings: dict[str, Any] = {}
    for source, values in (
        (path or "", read_config(path) if path else {}),
        ("the environment", variables),
        ("the command line", given),
    ):
        for name, value in values.items():
            if name in OPTIONS:
                settings[name] = _parsed(OPTIONS[name], value, source)
            elif name != "config":
                settings[name] = str(value)
    key_file = settings.pop("api_key_file", None)
    if key_file:
        settings["api_key"] = (*settings.get("api_key", ()), *read_keys(key_file))
    if settings.get("chat_template"):
        settings["chat_template"] = _read(settings["chat_template"], "chat_template")
    if settings.get("budgets"):
        _read(settings["budgets"], "budgets")  # the engine reads it again, for a model that is not known yet
    return ServeConfig(**settings)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.serve",
        usage="%(prog)s [MODEL] [flags]",
        description="Serve a model to OpenAI clients.",
        epilog="Every flag is also a variable (KVJAX_MAX_MODEL_LEN) and a key of the --config file. "
        "The command line wins over the environment, and that over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a directory, a .gguf file, a hub id or a name that `python -m kvjax.models` lists; "
        "left out: SmolLM2-135M-Instruct",
    )
    parser.add_argument("--version", action="version", version=f"kvjax {kvjax.__version__}")
    parser.add_argument("--config", metavar="FILE.yaml", help=FILES["config"])
    defaults = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            default = defaults[option.field]
            shown = "" if option.many or default is None else f" (default: {_shown(option, default)})"
            group.add_argument(
                option.flag,
                dest=option.field,
                metavar=option.metavar,
                help=option.help + shown,
                # names as vLLM takes them; keys one a flag, or they would swallow MODEL
                nargs="+" if option.field == "served_model_name" else None,
                action={"served_model_name": "extend", "api_key": "append", "tier": "append"}.get(
                    option.field, "store"
                ),
            )
            for former in option.former:
                parser.add_argument("--" + former.replace("_", "-"), dest=option.field, help=argparse.SUPPRESS)
        if title == "server":
            group.add_argument("--api-key-file", metavar="FILE", help=FILES["api_key_file"])
    return parser


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of flags, with dashes or underscores. Raises ConfigError for a name that is no flag."""
    import yaml  # slow, and needed with --config alone

    try:
        content = yaml.safe_load(_read(path, "config"))
    except yaml.YAMLError as error:
        raise ConfigError(f"config={path!r} is not YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"config={path!r} holds a {type(content).__name__}; write `flag: value` lines")
    known = ("model", *OPTIONS, "api_key_file")
    values: dict[str, Any] = {}
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        name = FORMER.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise ConfigError(f"config={path!r} has {key!r}, which is no flag{hint}")
        if name in values:
            raise ConfigError(f"config={path!r} has {name!r} twice")
        if value is not None:
            values[name] = value
    return values


def read_keys(path: str) -> tuple[str, ...]:
    """The keys of a file, one a line. Raises ConfigError if it holds none."""
    lines = (line.strip() for line in _read(path, "api_key_file").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file={path!r} holds no key: write one a line")
    return keys


def _parsed(option: Option, value: Any, source: str) -> Any:
    if option.many:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_parsed(dataclasses.replace(option, many=False), each, source) for each in values)
    if isinstance(value, list | dict) or (isinstance(value, bool) and option.parse is not yes_no):
        _wrong(option, value, source, f"one value is wanted, not a {type(value).__name__}")
    try:
        return option.parse(str(value))
    except ValueError as error:
        kind = _KINDS.get(option.parse)
        _wrong(option, value, source, f"not {kind}" if kind else str(error))


def _shown(option: Option, value: Any) -> str:
    if option.parse is memory:
        return show_size(value)
    return ("no", "yes")[value] if option.parse is yes_no else str(value)


_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number"}


def _wrong(option: Option, value: Any, source: str, reason: str) -> NoReturn:
    shown = "" if option.field == "api_key" else f"={value!r}"
    raise ConfigError(f"{option.flag}{shown} from {source}: {reason}")


def _read(path: str, what: str) -> str:
    try:
        return pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{what}={path!r} cannot be read: {reason}") from error
