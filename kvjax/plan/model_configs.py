"""Model configs: by the name of a built-in config.json, or by the folder of a checkpoint."""

from pathlib import Path

from kvjax import models
from kvjax.models import DecoderConfig

FOLDER = Path(__file__).parents[1] / "configs" / "models"


def names() -> list[str]:
    """Of the built-in configs."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").is_file())


def read_model(model: str, max_model_len: int | None = None) -> DecoderConfig:
    """The config of a model; no weight is read, and none need be there.

    Args:
        model: a folder with a config.json, that file itself, or a built-in name, in this order.
        max_model_len: the longest sequence in tokens.

    Raises:
        ValueError: it is none of these, or a config that is not implemented; says what there is.
    """
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    if not (path / "config.json").is_file():
        if model.lower() not in names():
            raise ValueError(f"model {model!r} is neither a folder with a config.json nor one of {', '.join(names())}")
        path = FOLDER / model.lower()
    return models.read_config(path, max_model_len=max_model_len)
