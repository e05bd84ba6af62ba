"""Which files a model's name stands for."""

import pathlib

import huggingface_hub
import pytest

from kvjax.serve.checkpoint import HUB_FILES, ModelNotFoundError, find_model, served_names


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_directory(model):
    assert find_model(str(model)) == model
    assert served_names(str(model), model) == ("llama", str(model))


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"without a config\.json"):
        find_model(str(tmp_path))


def test_a_file(model):
    with pytest.raises(ModelNotFoundError, match="name the directory"):
        find_model(str(model / "config.json"))


@pytest.mark.parametrize("name", ["/nowhere", "a/b/c", "../x", "a b", "-x", "org/"])
def test_what_is_neither(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="neither a directory nor a hub id"):
        find_model(name)


def test_a_hub_id_fetches_only_what_cannot_run_code(monkeypatch, model):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("org/name") == model
    assert asked == {"org/name": {"allow_patterns": list(HUB_FILES)}}
    assert not [pattern for pattern in HUB_FILES if pattern.endswith((".bin", ".pt", ".pkl", ".py"))]
    assert served_names("org/name", model) == ("org/name",)


def test_a_hub_that_does_not_have_it(monkeypatch):
    def download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match="the hub did not give it: offline"):
        find_model("org/name")


def test_without_a_name_it_is_the_one_that_ships(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no kvjax_small .* name a model"):
        find_model("")
    folder = tmp_path / "models" / "kvjax_small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert find_model("") == folder
    assert served_names("", folder) == ("kvjax-small", "kvjax_small")
