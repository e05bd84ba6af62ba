"""Where a model's files are: the one that ships with kvjax, a directory, or the Hugging Face hub."""

import importlib.resources
import pathlib
import re

SMALL_MODEL = "kvjax_small"
# Weights as safetensors only: other formats run code when they are read.
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ModelNotFoundError(ValueError):
    """There is no such model; the message says what would be one."""


def find_model(model: str) -> pathlib.Path:
    """The directory of `model`, downloaded if it is a hub id. Raises ModelNotFoundError."""
    if not model:
        path = pathlib.Path(str(importlib.resources.files("kvjax") / "models" / SMALL_MODEL))
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"this installation has no {SMALL_MODEL} (looked in {path}): name a model, as a directory "
                f"or a hub id, as in `python -m kvjax.serve Qwen/Qwen3-0.6B`"
            )
        return path
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{model!r} is a directory without a config.json: no model is in it")
        return path
    if path.exists():
        raise ModelNotFoundError(f"{model!r} is a file; name the directory that holds the model")
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(f"{model!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B")
    return _download(model)


def served_names(model: str, path: pathlib.Path) -> tuple[str, ...]:
    """What requests may call the model if the operator said nothing: its short name, and `model` as given."""
    if not model:
        return (SMALL_MODEL.replace("_", "-"), SMALL_MODEL)
    if pathlib.Path(model).expanduser().is_dir():
        return tuple(dict.fromkeys((path.resolve().name, model)))
    return (model,)


def _download(model: str) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{model!r} is no directory here, and the hub did not give it: {reason}. Check the name; for a "
            f"gated model set HF_TOKEN"
        ) from error
