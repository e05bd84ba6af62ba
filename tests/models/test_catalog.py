"""`python -m kvjax.models`: the table says what is here, and of what is not, how to get it."""

import dataclasses
from types import SimpleNamespace

import huggingface_hub

from kvjax import models
from kvjax.models import __main__ as command
from kvjax.models.catalog import CATALOG, KVJAX_SMALL, SMOLLM2, known
from tests.models import gguf_file, tiny


def table(capsys):
    assert command.main() == 0
    return capsys.readouterr().out.splitlines()


def test_every_model_has_a_row_in_columns(capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=[]))
    lines = table(capsys)
    header, *rows = lines[: len(CATALOG) + 1]
    assert header.split() == ["name", "size", "context", "lies", "in"]
    place = header.index("lies in")
    for row, each in zip(rows, CATALOG, strict=True):
        assert row.startswith(f"{each.name} ")
        assert row[place - 1] == " "
        assert row[place:].startswith(str(each.locate() or "not here: "))
    small = next(row for row in rows if row.startswith("kvjax-small"))
    assert small.split()[1:4] == ["4.1", "MiB", "4,096"]
    assert any("python -m kvjax.serve FILE.gguf" in line for line in lines)


def test_a_model_that_is_not_here_says_how_to_get_it(capsys, monkeypatch):
    absent = dataclasses.replace(SMOLLM2, package="no-such-package")
    monkeypatch.setattr(command, "CATALOG", (absent, KVJAX_SMALL))
    assert absent.locate() is None
    assert "not here: `make serve` installs it" in table(capsys)[1]


def test_the_cache_of_the_hub_is_listed(capsys, monkeypatch, tmp_path):
    for name in ("good", "broken"):
        models.save(tiny.decoder("llama"), tmp_path / name)
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "another"}')
    (tmp_path / "gguf").mkdir()
    gguf_file.convert(tmp_path / "good", tmp_path / "gguf" / "one.gguf")
    repositories = [
        SimpleNamespace(repo_id=f"org/{name}", revisions=[SimpleNamespace(snapshot_path=tmp_path / name)])
        for name in ("good", "broken", "gguf", "empty")
    ]
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=repositories))
    rows = table(capsys)[3:5]
    assert [row.split()[0] for row in rows] == ["org/gguf", "org/good"]
    assert rows[0].endswith("/gguf/one.gguf")
    assert " 256 " in rows[1]


def test_a_name_is_one_model():
    assert known("kvjax-small") is KVJAX_SMALL
    assert known("another") is None
    assert len({each.name for each in CATALOG}) == len(CATALOG)
