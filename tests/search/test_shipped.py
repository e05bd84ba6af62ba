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
CONFIGS = sorted((ROOT / "configs/search").glob("*.yaml"))


@pytest.fixture(scope="module")
def fingerprint() -> ModelFingerprint:
    return ModelFingerprint.of(models.read_config(MODEL), weights_digest(MODEL))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_profile_of_a_config_is_for_the_weights_that_ship(path, fingerprint):
    config = read_config(path)
    assert config.output is not None
    file = ROOT / config.output
    provenance = json.loads(file.read_text())["provenance"]
    assert provenance["made_by"] == f"python -m kvjax.search --config {path.relative_to(ROOT)}"
    assert from_fields(provenance["config"]) == config
    result = SearchResult.from_json(file.with_suffix(".search.json").read_text())
    for its in result.sweep:
        mean = its.config.token_budget
        expanded = file if mean == config.token_budget else file.with_stem(f"{file.stem}-{mean}")
        assert BudgetProfile.load(expanded, fingerprint) == its.profile
        assert sum(its.chosen.scheme or ()) == mean * len(its.tokens)
    best = max(each.selection.mean for each in result.outcomes if each.scheme is not None and each.name != "streaming")
    assert result.chosen.selection.mean == best
