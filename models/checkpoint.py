"""Reads checkpoints, and writes them, in the Hugging Face layout: config.json and safetensors, in one file or
several. A path that is a file is read as GGUF.

Tensors are read one at a time, cast, placed on their devices and let go, so host memory holds one tensor, not
a model. Names and shapes are all checked before the first byte of a weight is read.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.models.config import DecoderConfig
from kvjax.models.decoder import Decoder
from kvjax.models.families import find
from kvjax.models.family import Family
from kvjax.models.gguf import GGUFFile, GGUFTensors, hf_config, is_gguf
from kvjax.models.hf import ids
from kvjax.models.parameters import materialise, walk
from kvjax.models.sharding import check_mesh, spec

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


def read_config(path: str | os.PathLike[str], *, max_model_len: int | None = None) -> DecoderConfig:
    """What the checkpoint in folder `path`, or in that GGUF file, is; no weight is read.

    Args:
        max_model_len: the longest sequence in tokens that will be served; longrope models choose their
            frequencies by it. None means what the checkpoint claims.

    Raises:
        FileNotFoundError: no config.json there.
        ValueError: a family, or a field that changes the arithmetic, that is not implemented; a GGUF file that is
            damaged; says which.
    """
    return _read_config(Path(path), max_model_len)[0]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    max_model_len: int | None = None,
) -> Decoder:
    """The decoder of the checkpoint in folder `path`, or in that GGUF file, its weights cast to `dtype` and, with a
    mesh, sharded.

    Raises:
        FileNotFoundError: config.json or safetensors files are not there.
        ValueError: what `read_config` raises; a damaged file; missing or unknown tensors or wrong shapes (all of
            them named); a mesh that does not fit.
    """
    path = Path(path)
    config, family = _read_config(path, max_model_len)
    if mesh is not None:
        check_mesh(config, mesh)
    with _tensors(path, family, config) as tensors:
        # like transformers: the file wins over a config that says tied, if its head is another matrix
        if config.tied and tensors.shape(_HEAD) and not np.array_equal(tensors.read(_HEAD), tensors.read(_TABLE)):
            config = dataclasses.replace(config, tied=False)
        decoder = Decoder(config, dtype)
        declared = dict(walk(decoder))
        expected = family.tensors(config, set(declared))
        _check(tensors, expected, declared, config)
        values = {}
        for name, paths in expected.items():
            whole = tensors.read(name)
            rows = np.cumsum([_hf_shape(declared[p])[0] for p in paths])[:-1]
            for part, p in zip(np.split(whole, rows), paths, strict=True):
                values[p] = _place(part.reshape(declared[p].shape).astype(dtype, copy=False), declared[p], mesh)
    return materialise(decoder, lambda p, _: values[p])


def save(decoder: Decoder, path: str | os.PathLike[str]) -> None:
    """Write `decoder` to folder `path` as its family's checkpoint: config.json and model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config, parameters = decoder.config, dict(walk(decoder))
    family = find(config.family)
    dtype = parameters["embedding"].dtype
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": jnp.dtype(dtype).name,
        **family.to_hf(config),
    }
    (path / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    arrays = {
        name: np.concatenate([np.asarray(parameters[p][...]).reshape(_hf_shape(parameters[p])) for p in paths])
        for name, paths in family.tensors(config, set(parameters)).items()
    }
    save_file(arrays, path / _WEIGHTS, metadata={"format": "pt"})


def _read_config(path: Path, max_model_len: int | None) -> tuple[DecoderConfig, Family]:
    if is_gguf(path):
        fields = hf_config(file := GGUFFile(path))
        family = find(fields["model_type"])
        try:
            return family.from_hf(fields, max_model_len), family
        except ValueError as error:
            raise file.fault(f"cannot be served: {error}") from error
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(f"{path / _CONFIG} is not there; a checkpoint is a local folder with config.json")
    fields = json.loads((path / _CONFIG).read_text())
    family = find(fields.get("model_type"))
    config = family.from_hf(fields, max_model_len)
    generation = path / "generation_config.json"
    if generation.is_file():
        # chat models list there the tokens that end a turn, which config.json often has not
        extra = ids(json.loads(generation.read_text()).get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))
    return config, family


def _hf_shape(param: nnx.Param[Any]) -> tuple[int, ...]:
    """A parameter's shape in a checkpoint, where a head and its dimensions are one axis."""
    axes: tuple[str, ...] = param.get_metadata()["axes"]
    shape: list[int] = []
    for i, (axis, size) in enumerate(zip(axes, param.shape, strict=True)):
        if axis == "head_dim" and i:
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)


def _place(array: np.ndarray, param: nnx.Param[Any], mesh: jax.sharding.Mesh | None) -> Array:
    if mesh is None:
        return jnp.asarray(array)
    sharding = jax.sharding.NamedSharding(mesh, spec(param.get_metadata()["axes"]))
    # each process hands over only the shards of its own devices
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _tensors(
    path: Path, family: Family, config: DecoderConfig
) -> contextlib.AbstractContextManager["_Tensors | GGUFTensors"]:
    return contextlib.nullcontext(GGUFTensors(GGUFFile(path), config)) if is_gguf(path) else _Tensors(path, family)


class _Tensors(contextlib.ExitStack):
    """The tensors of a checkpoint by the names of its family's table, read on demand while the block lasts."""

    source = _CONFIG

    def __init__(self, path: Path, family: Family) -> None:
        super().__init__()
        self._where: dict[str, tuple[Any, str]] = {}
        files = _weight_files(path)
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is named by {_INDEX} but is not there: the download is incomplete")
        for file in files:
            try:
                handle = self.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{file} is no whole safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if not name.startswith(family.ignored) and not name.endswith("rotary_emb.inv_freq"):
                    self._where[family.canonical(name)] = (handle, name)

    @property
    def names(self) -> Iterable[str]:
        return self._where

    def spelling(self, name: str) -> str:
        """A tensor's name for a person to read."""
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; () if the checkpoint has none of that name."""
        if name not in self._where:
            return ()
        handle, stored = self._where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def dtype(self, name: str) -> str:
        handle, stored = self._where[name]
        return handle.get_slice(stored).get_dtype()

    def read(self, name: str) -> np.ndarray:
        handle, stored = self._where[name]
        return handle.get_tensor(stored)


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        return [path / name for name in sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))]
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    raise FileNotFoundError(f"{path} has neither {_WEIGHTS} nor {_INDEX}; other formats (pickle) are never read")


def _check(
    tensors: _Tensors | GGUFTensors,
    expected: dict[str, tuple[str, ...]],
    declared: dict[str, nnx.Param[Any]],
    config: DecoderConfig,
) -> None:
    """Raises ValueError that names every missing, unknown and misshapen tensor."""
    found = set(tensors.names) - ({_HEAD} if config.tied else set())
    faults = [f"missing: {tensors.spelling(name)}" for name in expected if name not in found]
    faults += [f"unknown: {tensors.spelling(name)}" for name in sorted(found - set(expected))]
    for name, paths in expected.items():
        if name not in found:
            continue
        shapes = [_hf_shape(declared[p]) for p in paths]
        want = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if (shape := tensors.shape(name)) != want:
            faults.append(f"wrong shape: {tensors.spelling(name)} is {shape}, {tensors.source} makes it {want}")
        elif tensors.dtype(name) not in _FLOATS:
            faults.append(f"not a float: {name} is {tensors.dtype(name)}; quantised checkpoints are not supported")
    if faults:
        shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise ValueError(f"the checkpoint does not fit a {config.family!r} model:\n  " + "\n  ".join(shown))
    assert {p for paths in expected.values() for p in paths} == set(declared), "the family's table is incomplete"


# sampling parameters that generation_config.json may recommend, and their bounds
_SAMPLING = {
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 100),
}


def sampling_defaults(path: str | os.PathLike[str]) -> dict[str, float]:
    """Values of sampling parameters in a model's generation_config.json: what its publisher recommends.

    Empty without such a file. A value out of bounds is left out.
    """
    file = Path(path) / "generation_config.json"
    try:
        read = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {
        name: read[name]
        for name, (low, high) in _SAMPLING.items()
        if type(read.get(name)) in (int, float) and low <= read[name] <= high
    }
