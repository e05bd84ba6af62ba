"""The profiles in `configs/budgets`: found by the configs that ship, for the weights that ship."""

import json
from pathlib import Path

import pytest

from kvjax import models
from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.search.config import from_fields, read_config
from kvjax.search.result import SearchResult
from kvjax.store.digest import weights_digest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/kvjax_small"
FOUND = sorted((ROOT / "configs/budgets").glob("*.search.json"))


@pytest.fixture(scope="module")
def fingerprint() -> ModelFingerprint:
    return ModelFingerprint.of(models.read_config(MODEL), weights_digest(MODEL))


def test_there_is_a_profile_for_needles():
    assert "needles.search.json" in [path.name for path in FOUND]


@pytest.mark.parametrize("found", FOUND, ids=lambda path: path.stem)
def test_a_profile_is_what_its_command_makes_for_the_weights_that_ship(found, fingerprint):
    name = found.name.removesuffix(".search.json")
    file, command = found.with_name(f"{name}.json"), f"python -m kvjax.search --config configs/search/{name}.yaml"
    provenance, config = json.loads(file.read_text())["provenance"], read_config(ROOT / command.split()[-1])
    assert provenance["made_by"] == command
    assert from_fields(provenance["config"]) == config
    result = SearchResult.from_json(found.read_text())
    for its in result.sweep:
        mean = its.config.token_budget
        expanded = file if mean == config.token_budget else file.with_stem(f"{file.stem}-{mean}")
        assert BudgetProfile.load(expanded, fingerprint) == its.profile
        assert sum(its.chosen.candidate or ()) == mean * len(its.tokens)
    best = max(
        each.selection.mean for each in result.outcomes if each.candidate is not None and each.name != "streaming"
    )
    assert result.chosen.selection.mean == best
