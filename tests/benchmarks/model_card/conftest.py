"""The fixtures of a small training run; shapes in the measurements are checked at run time as in the library."""

from jaxtyping import install_import_hook

install_import_hook("benchmarks.model_card", "beartype.beartype")

from tests.train.conftest import tokenizer_folder, toy  # noqa: E402

__all__ = ["tokenizer_folder", "toy"]
