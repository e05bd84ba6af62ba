"""The methods by name. A name with a colon is a class outside the library: `package.module:Class`."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from kvjax.attention.methods.full import Full
from kvjax.attention.methods.method import Demand, LayerCacheConfig, Method
from kvjax.attention.methods.option import MethodOption
from kvjax.attention.methods.quest import Quest
from kvjax.attention.methods.rocketkv import RocketKV, RocketKVFaithful, RocketKVStage1, RocketKVStage2
from kvjax.attention.methods.snapkv import PyramidKV, SnapKV
from kvjax.attention.methods.streaming import StreamingLLM
from kvjax.attention.methods.topk import TopK

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Full(),
        "rocketkv": RocketKV(),
        "rocketkv-mt": RocketKV(window=128, multi_turn=True),
        "rocketkv-faithful": RocketKVFaithful(),
        "rocketkv-stage1": RocketKVStage1(),
        "rocketkv-stage2": RocketKVStage2(),
        "snapkv": SnapKV(),
        "pyramidkv": PyramidKV(),
        "streaming": StreamingLLM(),
        "quest": Quest(),
        "topk": TopK(),
        "topk-per-head": TopK(shared=False),
    }
)

__all__ = ["METHODS", "Demand", "LayerCacheConfig", "Method", "MethodOption", "find_method"]


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: it is neither in `METHODS` nor the path of a class that is a `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"method {name!r} is not known: one of {', '.join(METHODS)}, or your own as module:Class")
    try:
        method = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"method {name!r} cannot be made: {error}") from error
    if not isinstance(method, Method):
        raise ValueError(f"method {name!r} is a {type(method).__name__}: derive it from kvjax.attention.methods.Method")
    return method
