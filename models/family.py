"""Model family: the reading of its config.json and the table of its tensor names. One family a file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.models.config import DecoderConfig

HFConfig = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A checkpoint format of Hugging Face transformers.

    Attributes:
        model_type: what config.json calls it.
        architecture: the transformers class that a saved checkpoint names.
        from_hf: reads config.json; the second argument is the longest sequence that will be served, or None
            for what the checkpoint claims. Raises ValueError for what is not implemented.
        to_hf: its inverse.
        keys: tensor names to parameter paths; `*` is the layer. A tuple says that the tensor holds several
            parameters, one after the other along its first axis. Parameters that a config has not are passed
            over.
        prefixes: other spellings of the start of a tensor's name, and what it is in `keys`.
        ignored: starts of names of tensors that are not part of the text model.
    """

    model_type: str
    architecture: str
    from_hf: Callable[[HFConfig, int | None], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    keys: Mapping[str, str | tuple[str, ...]]
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def tensors(self, config: DecoderConfig, parameters: set[str]) -> dict[str, tuple[str, ...]]:
        """Every tensor that a checkpoint of `config` must hold, with the parameters it fills, in layer
        order.
        """
        expected = {}
        for name, paths in self.keys.items():
            paths = (paths,) if isinstance(paths, str) else paths
            for i in range(config.num_layers) if "*" in name else (0,):
                here = tuple(path.replace("*", str(i)) for path in paths)
                if parameters.issuperset(here):
                    expected[name.replace("*", str(i))] = here
        return expected

    def canonical(self, name: str) -> str:
        """A tensor's name as `keys` spells it."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return name
