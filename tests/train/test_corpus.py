"""The training corpus and the held-out files are disjoint."""

import pytest

from kvjax.eval.tasks.library import HELD_OUT, standard_library


def test_whole_packages_are_held_out():
    seen = {name for name, _ in standard_library()}
    unseen = {name for name, _ in standard_library(held_out=True)}
    assert not seen & unseen
    assert {name.split("/")[0].removesuffix(".py") for name in unseen} == set(HELD_OUT)
    assert "dataclasses.py" in seen
    assert not [name for name in seen if name.startswith(("test/", "site-packages/"))]


def test_a_folder_without_source_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source"):
        standard_library(root=tmp_path)
