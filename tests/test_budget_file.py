"""Profiles as files: what is saved is what is loaded, and a bad file says what is bad about it."""

import copy
import dataclasses
import json
import os
import stat
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax import models
from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.budget.schema import faults, schema
from tests.budget_cases import layer_budgets

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "budgets"
MODEL = ModelFingerprint("llama", layers=3, kv_heads=8, head_dim=128)
PROFILE = BudgetProfile(
    (
        LayerBudget(4096),
        LayerBudget(512),
        LayerBudget.selecting(
            1448,
            observation_window=32,
            pooling_kernel=63,
            selected_tokens=128,
            page_size=3,
            selection_options={"head_dims": 67},
        ),
    )
)
TEXT = """{
  "$schema": "urn:kvjax:budget-profile:2",
  "version": 2,
  "model": {"family": "llama", "layers": 3, "kv_heads": 8, "head_dim": 128},
  "provenance": {"scores": [0.5], "seed": 7},
  "layers": [
    {"capacity": 4096, "selected_tokens": null, "page_size": 1, "eviction_options": null},
    {"capacity": 512, "selected_tokens": null, "page_size": 1, "eviction_options": null},
    {"capacity": 1448, "selected_tokens": 128, "page_size": 3, \
"eviction_options": {"observation_window": 32, "pooling_kernel": 63}, "selection_options": {"head_dims": 67}}
  ]
}
"""
TEXT_V1 = """{
  "$schema": "urn:kvjax:budget-profile:1",
  "version": 1,
  "model": {"family": "llama", "layers": 3, "kv_heads": 8, "head_dim": 128},
  "provenance": {"scores": [0.5], "seed": 7},
  "layers": [
    {"capacity": 4096, "stage2_tokens": null, "page_size": 1, "head_dims": null, "observation_window": null, \
"pooling_kernel": 1},
    {"capacity": 512, "stage2_tokens": null, "page_size": 1, "head_dims": null, "observation_window": null, \
"pooling_kernel": 1},
    {"capacity": 1448, "stage2_tokens": 128, "page_size": 3, "head_dims": 67, "observation_window": 32, \
"pooling_kernel": 63}
  ]
}
"""
DOCUMENT, DOCUMENT_V1 = json.loads(TEXT), json.loads(TEXT_V1)


def test_a_file_of_version_1_is_the_same_profile(path):
    path.write_text(TEXT_V1)
    profile = BudgetProfile.load(path, MODEL)
    assert profile == PROFILE
    profile.save(path, MODEL, DOCUMENT_V1["provenance"])
    assert path.read_text() == TEXT


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.json") if ".search." not in file.name))
def test_the_profiles_that_ship_are_read_saved_and_read_again(path, name):
    """Each is of version 1: its numbers are those of its budgets."""
    document = json.loads((CONFIGS / name).read_text())
    assert document["version"] == 1
    model = BudgetProfile.made_for(CONFIGS / name)
    profile = BudgetProfile.load(CONFIGS / name, model)
    for fields, budget in zip(document["layers"], profile.layers, strict=True):
        options = dict(budget.eviction_options or ())
        assert budget.capacity == fields["capacity"]
        assert budget.selected_tokens == fields["stage2_tokens"]
        assert budget.page_size == fields["page_size"]
        assert options.get("observation_window") == fields["observation_window"]
        assert options.get("pooling_kernel", 1) == fields["pooling_kernel"]
        assert options.get("sinks", 0) == fields.get("sinks", 0)
        assert list(budget.head_tokens or []) == fields.get("head_tokens", [])
    profile.save(path, model)
    assert BudgetProfile.load(path, model) == profile
    assert json.loads(path.read_text())["version"] == 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.json"


def test_a_profile_has_one_text(path):
    PROFILE.save(path, MODEL, {"seed": 7, "scores": [0.5]})
    assert path.read_text() == TEXT
    assert BudgetProfile.load(path, MODEL) == PROFILE
    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_provenance_is_optional_and_changes_nothing(path):
    PROFILE.save(path, MODEL)
    assert "provenance" not in json.loads(path.read_text())
    assert BudgetProfile.load(path, MODEL) == PROFILE


def test_any_order_and_spacing_is_read(path):
    shuffled = {name: DOCUMENT[name] for name in reversed(DOCUMENT)}
    shuffled["layers"] = [dict(reversed(layer.items())) for layer in shuffled["layers"]]
    path.write_text(json.dumps(shuffled, indent=7))
    assert BudgetProfile.load(path, MODEL) == PROFILE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.given(
    st.lists(layer_budgets(), min_size=1, max_size=12), st.text(min_size=1), st.dictionaries(st.text(), JSON)
)
def test_profiles_come_back_equal(tmp_path_factory, budgets, family, provenance):
    first, second = (tmp_path_factory.getbasetemp() / name for name in ("first.json", "second.json"))
    profile = BudgetProfile(tuple(budgets))
    model = ModelFingerprint(family, len(budgets), 2, 128)
    profile.save(first, model, provenance)
    loaded = BudgetProfile.load(first, ModelFingerprint(family, len(budgets), 2, 128))
    assert loaded == profile
    assert hash(loaded) == hash(profile)
    retained = json.loads(first.read_text())["provenance"]
    assert retained == provenance
    loaded.save(second, model, retained)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("model", "differing"),
    [
        (ModelFingerprint("qwen3", 3, 8, 128), "family"),
        (ModelFingerprint("llama", 4, 8, 128), "layers"),
        (ModelFingerprint("llama", 3, 4, 128), "kv_heads"),
        (ModelFingerprint("llama", 3, 8, 64), "head_dim"),
        (ModelFingerprint("qwen3", 3, 4, 128), "family, kv_heads"),
    ],
)
def test_a_profile_for_another_model_is_refused(path, model, differing):
    path.write_text(TEXT)
    with pytest.raises(ValueError, match=r"profile\.json is for llama with 3 layers, 8 kv heads and") as caught:
        BudgetProfile.load(path, model)
    assert f"this model is {model}: they differ in {differing};" in str(caught.value)


def test_a_profile_for_some_weights_is_refused_for_others_and_read_where_nobody_knows_them(path):
    mine, other = (dataclasses.replace(MODEL, weights=digit * 64) for digit in "ab")
    PROFILE.save(path, mine)
    assert BudgetProfile.made_for(path) == mine
    assert BudgetProfile.load(path, mine) == BudgetProfile.load(path, MODEL) == PROFILE
    with pytest.raises(ValueError, match=r"weights aaaaaaaaaaaa; .*weights bbbbbbbbbbbb: they differ in weights;"):
        BudgetProfile.load(path, other)


def test_the_fingerprint_of_a_configuration():
    config = models.read_config(ROOT / "models" / "kvjax_small")
    fingerprint = ModelFingerprint.of(config)
    assert fingerprint == ModelFingerprint("qwen3", config.num_layers, config.num_kv_heads, config.head_dim)


@pytest.mark.parametrize(
    "fields",
    [{"family": ""}, {"layers": 0}, {"kv_heads": -1}, {"head_dim": 0}],
)
def test_an_impossible_model_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(MODEL, **fields)


GONE = object()


def changed(*steps: tuple[str, object], of: dict = DOCUMENT) -> dict:
    """A document with values put, or taken away, at paths like layers/0/capacity."""
    document = copy.deepcopy(of)
    for place, value in steps:
        at, *names = document, *place.split("/")
        for name in names[:-1]:
            at = at[int(name) if isinstance(at, list) else name]
        if value is GONE:
            del at[names[-1]]
        elif isinstance(at, list):
            at[int(names[-1])] = value
        else:
            at[names[-1]] = value
    return document


BAD_DOCUMENTS = [
    ([], r"the document is \[\], must be object"),
    (None, "the document is null, must be object"),
    (changed(("version", GONE)), "version is missing"),
    (changed(("version", True)), "version is true, must be 2"),
    (changed(("version", "1")), 'version is "1", must be 2'),
    (changed(("$schema", "urn:kvjax:other")), r'\$schema is "urn:kvjax:other", must be "urn:kvjax:budget-profile:2"'),
    (changed(("$schema", GONE)), r"\$schema is missing"),
    (changed(("model", GONE)), "model is missing"),
    (changed(("model/family", "")), "model.family is empty"),
    (changed(("model/family", 3)), "model.family is 3, must be string"),
    (changed(("model/head_dim", 0)), "model.head_dim is 0, must be at least 1"),
    (changed(("model/kv_heads", GONE)), "model.kv_heads is missing"),
    (changed(("model/depth", 3)), r"model.depth is unknown \(known: family, layers, kv_heads, head_dim, weights\)"),
    (changed(("provenance", [])), r"provenance is \[\], must be object"),
    (changed(("comment", "mine")), "comment is unknown"),
    (changed(("layers", [])), "layers is empty"),
    (changed(("layers", {})), "layers is {}, must be array"),
    (changed(("layers/1", 512)), r"layers\[1\] is 512, must be object"),
    (changed(("layers/2/capacity", 0)), r"layers\[2\].capacity is 0, must be at least 1"),
    (changed(("layers/2/capacity", 12.5)), r"layers\[2\].capacity is 12.5, must be integer"),
    (changed(("layers/2/capacity", True)), r"layers\[2\].capacity is true, must be integer"),
    (changed(("layers/2/capacity", None)), r"layers\[2\].capacity is null, must be integer"),
    (changed(("layers/2/capacity", "9" * 99)), r'layers\[2\].capacity is "9{56}\.\.\., must be integer'),
    (changed(("layers/2/selected_tokens", "all")), r'layers\[2\].selected_tokens is "all", must be integer or null'),
    (changed(("layers/2/selected_tokens", 0)), r"layers\[2\].selected_tokens is 0, must be at least 1"),
    (changed(("layers/0/page_size", GONE)), r"layers\[0\].page_size is missing"),
    (changed(("layers/0/sink", 4)), r"layers\[0\].sink is unknown \(known: capacity, selected_tokens,"),
    (changed(("layers/0/page_size", GONE), ("layers/1/kernel", 4)), r"layers\[0\].page_size .*; layers\[1\].kernel"),
    (changed(("layers", [{}, {}])), r"layers\[1\].capacity is missing; and 3 more"),
    (changed(("layers/0/eviction_options", 3)), r"layers\[0\].eviction_options is 3, must be object or null"),
    (changed(("layers/2/eviction_options/sinks", None)), r"eviction_options.sinks is null, must be boolean or integer"),
    (changed(("layers/2/eviction_options/sinks", [])), r"eviction_options.sinks is \[\], must be .* number or string"),
    (changed(("layers/2/selection_options", None)), r"layers\[2\].selection_options is null, must be object"),
    (changed(("layers/2/head_tokens", [])), r"layers\[2\].head_tokens is empty"),
    (changed(("layers/2/head_tokens", [8, 0])), r"layers\[2\].head_tokens\[1\] is 0, must be at least 1"),
    (changed(("layers/2/observation_window", 8)), r"layers\[2\].observation_window is unknown \(known: capacity, sel"),
]


def changed_v1(*steps: tuple[str, object]) -> dict:
    return changed(*steps, of=DOCUMENT_V1)


BAD_DOCUMENTS_V1 = [
    ([], r"the document is \[\], must be object"),
    (None, "the document is null, must be object"),
    (changed_v1(("version", GONE)), "version is missing"),
    (changed_v1(("version", True)), "version is true, must be 1"),
    (changed_v1(("version", "1")), 'version is "1", must be 1'),
    (
        changed_v1(("$schema", "urn:kvjax:other")),
        r'\$schema is "urn:kvjax:other", must be "urn:kvjax:budget-profile:1"',
    ),
    (changed_v1(("$schema", GONE)), r"\$schema is missing"),
    (changed_v1(("model", GONE)), "model is missing"),
    (changed_v1(("model/family", "")), "model.family is empty"),
    (changed_v1(("model/family", 3)), "model.family is 3, must be string"),
    (changed_v1(("model/head_dim", 0)), "model.head_dim is 0, must be at least 1"),
    (changed_v1(("model/kv_heads", GONE)), "model.kv_heads is missing"),
    (changed_v1(("model/depth", 3)), r"model.depth is unknown \(known: family, layers, kv_heads, head_dim, weights\)"),
    (changed_v1(("provenance", [])), r"provenance is \[\], must be object"),
    (changed_v1(("comment", "mine")), "comment is unknown"),
    (changed_v1(("layers", [])), "layers is empty"),
    (changed_v1(("layers", {})), "layers is {}, must be array"),
    (changed_v1(("layers/1", 512)), r"layers\[1\] is 512, must be object"),
    (changed_v1(("layers/2/capacity", 0)), r"layers\[2\].capacity is 0, must be at least 1"),
    (changed_v1(("layers/2/capacity", 12.5)), r"layers\[2\].capacity is 12.5, must be integer"),
    (changed_v1(("layers/2/capacity", True)), r"layers\[2\].capacity is true, must be integer"),
    (changed_v1(("layers/2/capacity", None)), r"layers\[2\].capacity is null, must be integer"),
    (changed_v1(("layers/2/capacity", "9" * 99)), r'layers\[2\].capacity is "9{56}\.\.\., must be integer'),
    (changed_v1(("layers/2/stage2_tokens", "all")), r'layers\[2\].stage2_tokens is "all", must be integer or null'),
    (changed_v1(("layers/2/stage2_tokens", 0)), r"layers\[2\].stage2_tokens is 0, must be at least 1"),
    (changed_v1(("layers/0/page_size", GONE)), r"layers\[0\].page_size is missing"),
    (changed_v1(("layers/0/sink", 4)), r"layers\[0\].sink is unknown \(known: capacity, stage2_tokens,"),
    (changed_v1(("layers/0/page_size", GONE), ("layers/1/kernel", 4)), r"layers\[0\].page_size .*; layers\[1\].kernel"),
    (changed_v1(("layers", [{}])), r"layers\[0\].observation_window is missing; and 1 more"),
]


@pytest.mark.parametrize(("document", "message"), [*BAD_DOCUMENTS, *BAD_DOCUMENTS_V1])
def test_a_file_that_breaks_the_schema_names_the_field(path, document, message):
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"profile.json is no budget profile: .*{message}"):
        BudgetProfile.load(path, MODEL)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(("version", 3)), "profile.json has version 3, and this kvjax reads 1 and 2"),
        ({"version": 0}, "profile.json has version 0, and this kvjax reads 1 and 2"),
        (
            changed_v1(("layers/0/pooling_kernel", 63)),
            r"profile.json: layers\[0\]: pooling_kernel=63 has no effect .*RocketKV has 32.*at 1",
        ),
        (changed_v1(("layers/0/sinks", 4)), r"profile.json: layers\[0\]: sinks=4 has no effect while .*at 0"),
        (changed_v1(("layers/0/head_dims", 4)), r"profile.json: layers\[0\]: selection_options=.*4.* has no effect"),
        (changed_v1(("layers/2/stage2_tokens", 1448)), r"profile.json: layers\[2\]: selected_tokens=1448 must be"),
        (changed(("layers/2/selected_tokens", 1448)), r"profile.json: layers\[2\]: selected_tokens=1448 must be"),
        (changed(("layers/0/head_tokens", [4])), r"profile.json: layers\[0\]: head_tokens=\(4,\) has no effect while"),
        (changed(("layers", DOCUMENT["layers"][:2])), "profile.json: the profile has 2 layers, the model 3"),
    ],
)
def test_a_file_that_follows_the_schema_but_makes_no_sense_is_refused(path, document, message):
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        BudgetProfile.load(path, MODEL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (TEXT[:-9].encode(), "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (TEXT.replace("4096", "NaN").encode(), "NaN is no number of JSON"),
        (TEXT.replace("4096", "-Infinity").encode(), "-Infinity is no number of JSON"),
        (TEXT.replace('"capacity": 512,', '"capacity": 512, "capacity": 9,').encode(), "capacity is there twice"),
        (TEXT.replace("4096", "9" * 5000).encode(), "is not JSON"),
    ],
)
def test_a_file_that_is_no_json_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"profile.json is no budget profile: .*{message}"):
        BudgetProfile.load(path, MODEL)


def test_a_file_that_is_not_there(path):
    with pytest.raises(FileNotFoundError):
        BudgetProfile.load(path, MODEL)


@pytest.mark.parametrize(
    ("model", "provenance", "message"),
    [
        (dataclasses.replace(MODEL, layers=4), None, "the profile has 3 layers, the model 4"),
        (dataclasses.replace(MODEL, layers=2), None, "the profile has 3 layers, the model 2"),
        (MODEL, {"score": float("nan")}, "JSON compliant"),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(path, model, provenance, message):
    path.write_text(TEXT)
    with pytest.raises(ValueError, match=message):
        PROFILE.save(path, model, provenance)
    assert path.read_text() == TEXT
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_fails_leaves_the_old_file(path, monkeypatch):
    path.write_text(TEXT)

    def fails(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        BudgetProfile.full([None] * 3, 9).save(path, MODEL)
    assert path.read_text() == TEXT
    assert os.listdir(path.parent) == [path.name]


def test_the_schema_names_the_fields_of_the_dataclasses():
    layer = schema()["$defs"]["Layer"]
    fields = [field.name for field in dataclasses.fields(LayerBudget)]
    assert list(layer["properties"]) == fields
    assert layer["required"] == [name for name in fields if name not in ("head_tokens", "selection_options")]
    model = schema()["$defs"]["Model"]
    fields = [field.name for field in dataclasses.fields(ModelFingerprint)]
    assert list(model["properties"]) == fields
    assert model["required"] == fields[:-1]
    assert schema()["$id"] == schema()["properties"]["$schema"]["const"]


def test_the_schema_that_ships_is_that_of_the_code():
    """`python -m kvjax.budget.schema > kvjax/budget/schema.json` writes it."""
    assert (ROOT / "kvjax" / "budget" / "schema.json").read_text() == json.dumps(schema(), indent=2) + "\n"


def test_later_fields_are_written_where_they_say_something(path):
    layers = (
        LayerBudget(9),
        LayerBudget.selecting(8, observation_window=2, sinks=1),
        LayerBudget.selecting(8, observation_window=2, head_tokens=(2,) * MODEL.kv_heads),
    )
    BudgetProfile(layers).save(path, MODEL)
    assert [
        json.loads(line.strip().rstrip(",")).get("head_tokens")
        for line in path.read_text().split("\n")
        if '"capacity"' in line
    ] == [None, None, [2] * MODEL.kv_heads]
    assert BudgetProfile.load(path, MODEL).layers == layers


def test_another_reader_of_the_schema_agrees():
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the extra `clients`; `make nightly` has it")
    validator = jsonschema.Draft202012Validator
    for version, good, bad in ((1, DOCUMENT_V1, BAD_DOCUMENTS_V1), (2, DOCUMENT, BAD_DOCUMENTS)):
        validator.check_schema(schema(version))
        other = validator(schema(version))
        assert other.is_valid(good)
        assert not faults(good, version)
        for document, _ in bad:
            assert faults(document, version)
            assert not other.is_valid(document)
