"""Checkpoint lookup: a model's files by catalog name, directory, GGUF file or Hugging Face hub id."""

import logging
import pathlib
import re

from kvjax.models.catalog import DEFAULT, KVJAX_SMALL, known
from kvjax.models.gguf.files import find_gguf, is_gguf, model_name
from kvjax.models.gguf.reader import SUFFIX

logger = logging.getLogger("kvjax.serve")

SMALL_MODEL = "kvjax_small"
# Weights as safetensors only: other formats run code when they are read. GGUF files are fetched one by one.
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILE = re.compile(rf"([A-Za-z0-9][\w.-]*/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+{re.escape(SUFFIX)})")


class ModelNotFoundError(ValueError):
    """There is no such model; the message says what would be one."""


def find_model(model: str) -> pathlib.Path:
    """The directory or the GGUF file of `model`, downloaded if it is a hub id. Raises ModelNotFoundError."""
    if not model:
        return _default_model()
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        return _in_directory(model, path)
    if path.is_file() and path.suffix.lower() == SUFFIX:
        return path
    if path.exists():
        raise ModelNotFoundError(f"{model!r} is a file; name the directory that holds the model, or a {SUFFIX} file")
    if (named := known(model)) is not None:
        if (path := named.locate()) is not None:
            return path
        return _small_model() if named is KVJAX_SMALL else _download(named.hub_id or named.name)
    if (file := _HUB_FILE.fullmatch(model)) is not None:
        return _download(file[1], file[2])
    if model.lower().endswith(SUFFIX):
        raise ModelNotFoundError(f"{model!r} is not there; a GGUF file on the hub is OWNER/NAME/FILE{SUFFIX}")
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(
            f"{model!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B; `python -m kvjax.models` lists "
            f"the models that have a name"
        )
    return _download(model)


def served_names(model: str, path: pathlib.Path) -> tuple[str, ...]:
    """Default names of the model in requests: its short name, and `model` as given."""
    if path.name == SMALL_MODEL and model in ("", KVJAX_SMALL.name):
        return (KVJAX_SMALL.name, SMALL_MODEL)
    given = (model,) if model else ()
    if is_gguf(path):
        return tuple(dict.fromkeys((model_name(path), *given)))
    if not model:
        return (DEFAULT.name, DEFAULT.hub_id or DEFAULT.name)
    if pathlib.Path(model).expanduser().is_dir():
        return tuple(dict.fromkeys((path.resolve().name, model)))
    return given


def _default_model() -> pathlib.Path:
    """The first of the catalog, from this machine or the hub; else the small one that ships, and a line says so."""
    if (path := DEFAULT.locate()) is not None:
        return path
    small = _small_model()
    try:
        return _download(DEFAULT.hub_id or DEFAULT.name)
    except ModelNotFoundError as error:
        logger.warning(
            "%s is not installed and the hub does not give it, so this is %s: it %s. To get the other: %s",
            *(DEFAULT.name, KVJAX_SMALL.name, KVJAX_SMALL.ability, DEFAULT.source),
        )
        logger.debug("%s", error)
        return small


def _small_model() -> pathlib.Path:
    path = KVJAX_SMALL.locate()
    if path is None:
        raise ModelNotFoundError(
            f"this installation has no {SMALL_MODEL} in kvjax/models: name a model, as a directory, a {SUFFIX} "
            f"file or a hub id, as in `python -m kvjax.serve Qwen/Qwen3-0.6B`"
        )
    return path


def _in_directory(model: str, path: pathlib.Path) -> pathlib.Path:
    """A directory in the Hugging Face format, or the one GGUF file in it."""
    try:
        file = find_gguf([each.name for each in path.iterdir()], model)
    except ValueError as error:
        if (path / "config.json").is_file():
            return path
        raise ModelNotFoundError(str(error)) from error
    if (path / "config.json").is_file() and (file is None or any(path.glob("*.safetensors"))):
        return path
    if file is None:
        raise ModelNotFoundError(f"{model!r} is a directory without a config.json: no model is in it")
    return path / file


def _download(model: str, file: str | None = None) -> pathlib.Path:
    """The folder of a repository in the Hugging Face format, or its GGUF file: `file`, or the only one."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = model if file is None else f"{model}/{file}"
    try:
        if file is None:
            folder = pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=list(HUB_FILES)))
            if any(folder.glob("*.safetensors")) or (file := _only_gguf(model, folder)) is None:
                return folder
        path = pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=[file])) / file
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{name!r} is no directory here, and the hub did not give it: {reason}. Check the name; for a "
            f"gated model set HF_TOKEN"
        ) from error
    if not path.is_file():
        raise ModelNotFoundError(f"{model!r} on the hub has no file {file!r}: look there for those it has")
    return path


def _only_gguf(model: str, folder: pathlib.Path) -> str | None:
    """The GGUF file of a repository without safetensors; None if it has none. Without a network, that of its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = huggingface_hub.list_repo_files(model)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    try:
        return find_gguf(names, model)
    except ValueError as error:
        raise ModelNotFoundError(str(error)) from error
