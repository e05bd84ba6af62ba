"""GGUF files by name: the one of a folder or a repository, and the name of the model in it."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from kvjax.models.gguf.reader import SUFFIX

# `model.Q4_K_M.gguf`: how the weights are stored, which is no part of a model's name
_QUANTISATION = re.compile(r"[-._](?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32|FP16|FP32)$", re.IGNORECASE)
_PROJECTOR = "mmproj"  # the image encoder of a multimodal model, which lies beside it


def is_gguf(path: Path) -> bool:
    """Whether a path means a GGUF file: a checkpoint of another kind is a folder."""
    return path.suffix.lower() == SUFFIX or path.is_file()


def find_gguf(names: Iterable[str], where: str) -> str | None:
    """The one GGUF model among the names of files; None if there is none.

    Args:
        where: the folder or repository, as a user names it; an error says how to choose.

    Raises:
        ValueError: there are several.
    """
    models = sorted(
        name for name in names if name.lower().endswith(SUFFIX) and _PROJECTOR not in PurePath(name).name.lower()
    )
    if len(models) > 1:
        shown = ", ".join(models[:20]) + (f" and {len(models) - 20} more" if len(models) > 20 else "")
        raise ValueError(f"{where!r} has several GGUF files: {shown}. Name one, as {where.rstrip('/')}/{models[0]}")
    return models[0] if models else None


def model_name(path: Path) -> str:
    """A model's name from that of its file: `SmolLM2-135M-Instruct` of `SmolLM2-135M-Instruct.Q4_1.gguf`.

    The name inside (`general.name`) is often that of a training run, so the file's is the one that is shown.
    """
    stem = path.name[: -len(SUFFIX)] if path.suffix.lower() == SUFFIX else path.name
    return _QUANTISATION.sub("", stem) or stem
