"""Which files a model's name stands for."""

import importlib.metadata
import logging
import pathlib

import huggingface_hub
import pytest

from kvjax.models.catalog import CATALOG, SMOLLM2
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


@pytest.fixture
def no_package(monkeypatch):
    """An installation without the package that holds SmolLM2."""

    def files(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.files", files)


@pytest.fixture
def offline(monkeypatch):
    def download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_gguf_file(tmp_path):
    file = tmp_path / "Some-1B-Chat.Q4_K_M.gguf"
    file.touch()
    assert find_model(str(file)) == file
    assert served_names(str(file), file) == ("Some-1B-Chat", str(file))
    assert find_model(str(tmp_path)) == file
    (tmp_path / "config.json").write_text("{}")  # many repositories of GGUF files have one
    assert find_model(str(tmp_path)) == file
    (tmp_path / "model.safetensors").touch()
    assert find_model(str(tmp_path)) == tmp_path


def test_a_directory_with_several_gguf_files(tmp_path):
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj-a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        ModelNotFoundError, match=r"several GGUF files: a-Q4_0\.gguf, a-Q8_0\.gguf\. Name one, as .*/a-Q4_0"
    ):
        find_model(str(tmp_path))


def test_a_gguf_file_that_is_not_there():
    with pytest.raises(ModelNotFoundError, match=r"is not there; a GGUF file on the hub is OWNER/NAME/FILE\.gguf"):
        find_model("nowhere.gguf")


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository on the hub with these files: what is downloaded of it."""

    def make(*names: str) -> pathlib.Path:
        def download(name, allow_patterns):
            for file in names:
                if any(pathlib.PurePath(file).match(pattern) for pattern in allow_patterns):
                    (tmp_path / file).touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: list(names))
        return tmp_path

    return make


def test_a_repository_with_one_gguf_file(repository):
    folder = repository("README.md", "config.json", "A-1B-Q4_0.gguf")
    assert find_model("org/name") == folder / "A-1B-Q4_0.gguf"
    assert served_names("org/name", folder / "A-1B-Q4_0.gguf") == ("A-1B", "org/name")


def test_a_repository_with_several_gguf_files(repository):
    folder = repository("a-Q4_0.gguf", "a-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError, match=r"'org/name' has several GGUF .* Name one, as org/name/a-Q4_0\.gguf"):
        find_model("org/name")
    assert find_model("org/name/a-Q8_0.gguf") == folder / "a-Q8_0.gguf"
    assert not (folder / "a-Q4_0.gguf").exists()
    with pytest.raises(ModelNotFoundError, match=r"'org/name' on the hub has no file 'b\.gguf'"):
        find_model("org/name/b.gguf")


def test_a_repository_with_both_is_read_as_safetensors(repository):
    folder = repository("config.json", "model.safetensors", "a.gguf", "b.gguf")
    assert find_model("org/name") == folder


def test_without_a_name_it_is_the_package_that_holds_a_language_model(monkeypatch, tmp_path):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()

    class Stored(str):
        def locate(self):
            return tmp_path / self

    monkeypatch.setattr("importlib.metadata.files", lambda package: [Stored(file.name), Stored("__init__.py")])
    assert find_model("") == find_model(SMOLLM2.name) == file
    assert served_names("", file) == ("SmolLM2-135M-Instruct",)


@pytest.mark.usefixtures("no_package")
def test_without_the_package_it_is_that_of_the_hub(repository):
    folder = repository("config.json", "model.safetensors", "tokenizer.json")
    assert find_model("") == folder
    assert served_names("", folder) == ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.usefixtures("no_package", "offline")
def test_without_both_it_is_the_one_that_ships_with_a_line_that_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no kvjax_small .* name a model"):
        find_model("")
    folder = tmp_path / "models" / "kvjax_small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with caplog.at_level(logging.INFO, "kvjax.serve"):
        assert find_model("") == folder
    [line] = caplog.messages
    assert "SmolLM2-135M-Instruct is not installed" in line
    assert "kvjax-small: it finds facts in a long text, and holds no conversation" in line
    assert served_names("", folder) == ("kvjax-small", "kvjax_small")


def test_every_name_of_the_catalog_is_a_model():
    for each in CATALOG:
        if each.locate() is not None:
            assert find_model(each.name) == each.locate()
            assert served_names(each.name, each.locate())[0] == each.name


def test_a_folder_in_reach_wins_over_a_name(monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    model.rename(tmp_path / "kvjax-small")
    assert find_model("kvjax-small") == pathlib.Path("kvjax-small")
