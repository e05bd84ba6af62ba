"""Budget profiles as files: JSON that follows `schema.json`, written in one canonical form; version 1 is read too."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.budget.fingerprint import ModelFingerprint
from kvjax.budget.layer import LayerBudget, OptionValue, sorted_options

VERSION = 2
READABLE = (1, 2)
_FIELDS = ("$schema", "version", "model", "provenance", "layers")  # in the order of the text
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
    layers, layer = [], _layer_of_version_1 if document["version"] == 1 else _layer
    for index, fields in enumerate(document["layers"]):
        try:
            layers.append(layer(fields))
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
        "$schema": f"urn:kvjax:budget-profile:{VERSION}",
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
    text = canonical({"version": VERSION, "layers": [_fields(budget) for budget in layers]})
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """The document in a text, once it is known to follow the schema of its version.

    Args:
        text: JSON.
        name: what errors call it: its path.

    Raises:
        ValueError: not JSON, of another version, or not as the schema says; names each field at fault.
    """
    from kvjax.budget.schema import faults  # pydantic, which those who read no file do without

    try:
        document = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no budget profile: it is not JSON ({error}); save it again") from error
    version, identifier = VERSION, None
    if isinstance(document, dict):
        version, identifier = document.get("version"), document.get("$schema")
    if type(version) is int and version not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise ValueError(f"{name} has version {version}, and this kvjax reads {readable}: save it again with this one")
    if type(version) is not int:
        version = 1 if identifier == "urn:kvjax:budget-profile:1" else VERSION
    errors = faults(document, version)
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
    for field in _FIELDS:
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


def _layer(fields: Mapping[str, Any]) -> LayerBudget:
    """The budget of a layer in JSON."""
    heads, eviction = fields.get("head_tokens"), fields["eviction_options"]
    return LayerBudget(
        fields["capacity"],
        selected_tokens=fields["selected_tokens"],
        page_size=fields["page_size"],
        head_tokens=None if heads is None else tuple(heads),
        eviction_options=None if eviction is None else sorted_options(eviction),
        selection_options=sorted_options(fields.get("selection_options", {})),
    )


def _layer_of_version_1(fields: Mapping[str, Any]) -> LayerBudget:
    """The budget of a layer in JSON of version 1, where the options of RocketKV were fields.

    Raises:
        ValueError: as `LayerBudget`, or an option without the window or the tokens that it is about.
    """
    window, dims = fields["observation_window"], fields["head_dims"]
    options: dict[str, OptionValue] = {"pooling_kernel": fields["pooling_kernel"]}
    if "sinks" in fields:
        options["sinks"] = fields["sinks"]
    if window is None:
        for name, default in (("pooling_kernel", 1), ("sinks", 0)):
            if options.get(name, default) != default:
                raise ValueError(
                    f"{name}={options[name]} has no effect while observation_window is null: give a window (RocketKV "
                    f"has 32), or leave {name} at {default}"
                )
    return _layer(
        {
            "capacity": fields["capacity"],
            "selected_tokens": fields["stage2_tokens"],
            "page_size": fields["page_size"],
            "head_tokens": fields.get("head_tokens"),
            "eviction_options": None if window is None else options | {"observation_window": window},
            "selection_options": {} if dims is None else {"head_dims": dims},
        }
    )


def _fields(budget: LayerBudget) -> dict[str, Any]:
    """A budget as JSON, in the schema's order; head tokens and selection options only where there are any."""
    fields: dict[str, Any] = {name: getattr(budget, name) for name in ("capacity", "selected_tokens", "page_size")}
    if budget.head_tokens is not None:
        fields["head_tokens"] = budget.head_tokens
    fields["eviction_options"] = None if budget.eviction_options is None else dict(budget.eviction_options)
    if budget.selection_options:
        fields["selection_options"] = dict(budget.selection_options)
    return fields


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
