"""Targets: the models that are evaluated, behind one interface.

`kvjax.eval.targets.engine` and `kvjax.eval.targets.openai` implement it; each is imported where it is used, for the
first brings JAX and the second needs openai.
"""

from kvjax.eval.targets.target import (
    Footprint,
    Form,
    Prompt,
    Target,
    TargetError,
    TargetFailedError,
    TargetGoneError,
    TargetReply,
    TargetRequest,
)

__all__ = [
    "Footprint",
    "Form",
    "Prompt",
    "Target",
    "TargetError",
    "TargetFailedError",
    "TargetGoneError",
    "TargetReply",
    "TargetRequest",
]
