"""Flags of `python -m kvjax.plan`; flags that the server has too have its names and meaning."""

import argparse
from collections.abc import Callable
from pathlib import Path

from kvjax.engine.config import ATTENTION_BACKENDS, EngineConfig
from kvjax.plan.deployment import DISK, REMOTE, SHARE, Deployment
from kvjax.plan.devices import CHIPS, find_device
from kvjax.plan.model_configs import names, read_model
from kvjax.store.sizes import memory, size

DTYPES = ("float32", "bfloat16", "float16")
PICTURES = (".svg", ".png", ".pdf")


def build_parser() -> argparse.ArgumentParser:
    """Every flag that has a default shows it in `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.plan",
        description="Whether a model fits on a device, for how many conversations, and the least time of a step: from "
        "its config.json alone. The times are rooflines, not measurements.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"a folder with a config.json, or one of {', '.join(names())}")
    parser.add_argument(
        "--device", required=True, help=f"{', '.join(CHIPS)}; v5e-8 is eight chips, over which heads are split"
    )
    group = parser.add_argument_group("what is served")
    group.add_argument(
        "--context", "--max-model-len", type=_checked(size), metavar="TOKENS", help="128k, 128K; the model's by default"
    )
    group.add_argument(
        "--num-seqs", "--max-num-seqs", type=int, default=4, metavar="N", help="conversations at a time (%(default)s)"
    )
    group.add_argument("--method", metavar="NAME", help="full, rocketkv, snapkv ...: docs/compression.md")
    group.add_argument("--token-budget", type=_checked(size), metavar="TOKENS", help="KV pairs a step reads a layer")
    group.add_argument("--budgets", metavar="FILE", help="a budget for each layer, instead of --token-budget")
    group.add_argument(
        "--headroom", type=_checked(size), default=128, metavar="TOKENS", help="for answers (%(default)s)"
    )
    group.add_argument("--group-layers", type=int, metavar="N", help="most layers prefilled together")
    group.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        default=ATTENTION_BACKENDS[0],
        help="what computes attention (%(default)s)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of weights; bfloat16 by default")
    group.add_argument("--kv-cache-dtype", choices=DTYPES, help="of the KV cache; that of the weights by default")
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=SHARE, metavar="SHARE", help="of the memory (%(default)s)"
    )
    group.add_argument("--host-bandwidth", type=_rate, metavar="RATE", help="host to devices, as 64GB a second")
    group.add_argument("--disk-bandwidth", type=_rate, default=DISK, metavar="RATE", help="(7GB)")
    group.add_argument("--remote-bandwidth", type=_rate, default=REMOTE, metavar="RATE", help="(1.25GB)")
    group = parser.add_argument_group("what comes out")
    group.add_argument(
        "--no-compile", dest="compile", action="store_false", help="predict temporaries even where they can be compiled"
    )
    group.add_argument("--json", action="store_true", help="everything, to the byte")
    group.add_argument("--picture", type=_picture, metavar="FILE", help=f"also draw it, as {', '.join(PICTURES)}")
    return parser


def read_deployment(options: argparse.Namespace) -> Deployment:
    """The deployment of a parsed command line.

    Raises:
        ValueError: a value that is wrong or fits no other; says what would do.
    """
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
        headroom=options.headroom,
        group_layers=options.group_layers,
        attention_backend=options.attention_backend,
    )
    return Deployment(
        model=read_model(options.model, options.context),
        device=device,
        config=config,
        share=options.gpu_memory_utilization,
        host_bandwidth=options.host_bandwidth,
        disk_bandwidth=options.disk_bandwidth,
        remote_bandwidth=options.remote_bandwidth,
    )


def _checked(parse: Callable[[str], int]) -> Callable[[str], int]:
    def checked(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None

    return checked


def _rate(text: str) -> float:
    return float(_checked(memory)(text.removesuffix("/s")))


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(PICTURES)}")
    return path
