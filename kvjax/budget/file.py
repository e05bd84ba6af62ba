"""Budget profiles as files: JSON that follows `schema.json`, written in one canonical form."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.budget.fingerprint import ModelFingerprint
from kvjax.budget.layer import LayerBudget
from kvjax.budget.schema import faults, schema

VERSION = 1
_SHOWN_FAULTS = 5


def made_for(path: str | os.PathLike[str]) -> ModelFingerprint:
    """The model that the profile in a file names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no profile.
    """
    return ModelFingerprint(**parse(Path(path).read_bytes(), str(path))["model"])


def read(path: str | os.PathLike[str], model: ModelFingerprint) -> tuple[LayerBudget, ...]:
    """The budgets in a file, once it is known to be a profile for that model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no profile, or one for another model; names the fields at fault.
    """
    document = parse(Path(path).read_bytes(), str(path))
    made_for = ModelFingerprint(**document["model"])
    differing = [
        name
        for name, value in dataclasses.asdict(made_for).items()
        if value != getattr(model, name) and not (name == "weights" and None in (value, model.weights))
    ]
    if differing:
        raise ValueError(
            f"{path} is for {made_for}; this model is {model}: they differ in "
            f"{', '.join(differing)}; use a profile made for this model"
        )
    layers = []
    for index, fields in enumerate(document["layers"]):
        try:
            heads = fields.get("head_tokens")
            layers.append(LayerBudget(**fields | {"head_tokens": None if heads is None else tuple(heads)}))
        except ValueError as error:
            raise ValueError(f"{path}: layers[{index}]: {error}") from error
    try:
        _check_model(layers, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tuple(layers)


def write(
    path: str | os.PathLike[str],
    layers: Sequence[LayerBudget],
    model: ModelFingerprint,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Puts the canonical text in the place of a file at once: a reader sees the old one or the new, never a part.

    Raises:
        ValueError: the budgets do not fit that model, or `provenance` holds a number that JSON does not have.
    """
    _check_model(layers, model)
    document: dict[str, Any] = {
        "$schema": schema()["$id"],
        "version": VERSION,
        "model": {name: value for name, value in dataclasses.asdict(model).items() if value is not None},
        "layers": [_fields(budget) for budget in layers],
    }
    if provenance is not None:
        document["provenance"] = dict(provenance)
    text = canonical(document)
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's is for its owner only
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def digest(layers: Sequence[LayerBudget]) -> str:
    """SHA-256 of the lines that `write` has for these budgets; as hexadecimal digits."""
    text = canonical({"version": VERSION, "layers": [dataclasses.asdict(budget) for budget in layers]})
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """The document in a text, once it is known to follow the schema.

    Args:
        text: JSON.
        name: what errors call it: its path.

    Raises:
        ValueError: not JSON, of another version, or not as the schema says; names each field at fault.
    """
    try:
        document = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no budget profile: it is not JSON ({error}); save it again") from error
    version = document.get("version", VERSION) if isinstance(document, dict) else VERSION
    if type(version) is int and version != VERSION:
        raise ValueError(f"{name} has version {version}, and this kvjax reads {VERSION}: save it again with this one")
    errors = faults(document)
    if errors:
        more = f"; and {len(errors) - _SHOWN_FAULTS} more" if len(errors) > _SHOWN_FAULTS else ""
        raise ValueError(f"{name} is no budget profile: {'; '.join(errors[:_SHOWN_FAULTS])}{more}")
    return document


def canonical(document: Mapping[str, Any]) -> str:
    """The one text of a document: the schema's order, one line a field and one a layer.

    Raises:
        ValueError: a number that JSON does not have (NaN, infinity).
    """
    lines = []
    for field in schema()["properties"]:
        if field in document:
            value = document[field]
            if field == "layers":
                text = "[\n    " + ",\n    ".join(_compact(layer) for layer in value) + "\n  ]"
            else:
                text = _compact(value, sort_keys=field == "provenance")
            lines.append(f"  {json.dumps(field)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_model(layers: Sequence[LayerBudget], model: ModelFingerprint) -> None:
    if len(layers) != model.layers:
        raise ValueError(f"the profile has {len(layers)} layers, the model {model.layers}: give one budget a layer")
    for index, budget in enumerate(layers):
        if len(budget.head_tokens or ()) not in (0, model.kv_heads):
            raise ValueError(
                f"layers[{index}].head_tokens has {len(budget.head_tokens or ())} numbers, the model {model.kv_heads} "
                "kv heads: give one each"
            )
        if (budget.head_dims or 1) > model.head_dim:
            raise ValueError(
                f"layers[{index}].head_dims={budget.head_dims} must be at most {model.head_dim}, which a head of the "
                "model has: None estimates with all of them"
            )


def _fields(budget: LayerBudget) -> dict[str, Any]:
    """A budget as JSON; fields that came later are there only where they say something."""
    fields = dataclasses.asdict(budget)
    later = {name: fields.pop(name) for name in ("sinks", "head_tokens")}
    return fields | {name: value for name, value in later.items() if value}


def _compact(value: object, *, sort_keys: bool = False) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=sort_keys)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
