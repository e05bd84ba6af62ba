"""`python -m kvjax.store`, as somebody with a full disk meets it."""

import io
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from kvjax.store.__main__ import main
from kvjax.store.disk import DiskTier
from kvjax.store.sizes import show_size
from tests.store.chains import FORMAT, blob_of, names_of


@pytest.fixture
def folder(tmp_path):
    """Five blocks, the first used last."""
    tier = DiskTier(tmp_path / "store", 1 << 30, least_free=0)
    for age, name in enumerate(names_of(5)):
        tier.write(name.hex, memoryview(blob_of(name)))
        path = tmp_path / "store" / "kvjax-kv-2" / name.hex[:2] / name.hex
        os.utime(path, (time.time() - 3600 * age,) * 2)
    tier.close()
    return tmp_path / "store"


def path_of(folder, index):
    name = names_of(5)[index].hex
    return folder / "kvjax-kv-2" / name[:2] / name


def run(capsys, *args) -> tuple[int, str]:
    code = main([str(arg) for arg in args])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_ls_and_stat(folder, capsys):
    code, shown = run(capsys, "ls", folder, "--limit", 2)
    assert code == 0
    lines = shown.splitlines()
    assert [name.hex in line for name, line in zip(names_of(2), lines, strict=False)] == [True, True]
    assert lines[-1] == "and 3 more (--limit)"
    code, shown = run(capsys, "stat", folder)
    assert code == 0
    assert "1,280" in shown
    assert show_size(5 * FORMAT.nbytes) in shown
    assert "4 h ago" in shown


def test_verify_finds_what_is_harmed_and_removes_it_if_told(folder, capsys):
    assert run(capsys, "verify", folder) == (0, "5 blocks are good, 0 are harmed\n")
    blob = bytearray(path_of(folder, 1).read_bytes())
    blob[-5] ^= 4
    path_of(folder, 1).write_bytes(blob)
    path_of(folder, 2).write_bytes(path_of(folder, 3).read_bytes())
    path_of(folder, 4).write_bytes(b"")
    code, shown = run(capsys, "verify", folder)
    assert code == 1
    assert "2 blocks are good, 3 are harmed" in shown
    assert "it is the block " + names_of(5)[3].hex in shown
    code, shown = run(capsys, "verify", folder, "--remove")
    assert code == 0
    assert run(capsys, "verify", folder) == (0, "2 blocks are good, 0 are harmed\n")


def test_gc_by_size_and_by_age(folder, capsys):
    code, shown = run(capsys, "gc", folder, "--older-than", "150m")
    assert (code, shown[:17]) == (0, "removed 2 blocks;")
    assert not path_of(folder, 4).exists()
    code, shown = run(capsys, "gc", folder, "--size", FORMAT.nbytes)
    assert (code, shown[:17]) == (0, "removed 2 blocks;")
    assert path_of(folder, 0).exists()
    code, shown = run(capsys, "gc", folder)
    assert (code, shown) == (2, "kvjax.store: gc needs --size or --older-than\n")


def test_purge_asks(folder, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "no")
    assert run(capsys, "purge", folder) == (1, "nothing was removed\n")
    assert run(capsys, "purge", folder, "--yes") == (0, "removed 5 blocks\n")
    assert run(capsys, "verify", folder)[1].startswith("0 blocks")


def test_export_and_import(folder, tmp_path, capsys):
    bundle = tmp_path / "bundle.tar"
    path_of(folder, 1).write_bytes(b"rubbish")
    code, shown = run(capsys, "export", folder, bundle)
    assert code == 1
    assert "left out" in shown
    DiskTier(tmp_path / "other", 1 << 30).close()
    assert run(capsys, "import", tmp_path / "other", bundle) == (0, f"took 4 blocks from {bundle}\n")
    assert run(capsys, "verify", tmp_path / "other") == (0, "4 blocks are good, 0 are harmed\n")


def test_import_takes_only_what_is_proven(folder, tmp_path, capsys):
    harmed = blob_of(names_of(1)[0])
    harmed[-1] ^= 1
    members = {
        names_of(1)[0].hex: harmed.tobytes(),
        names_of(2)[1].hex: blob_of(names_of(1)[0]).tobytes(),
        "../../escape": b"x",
        "empty": b"",
    }
    bundle = tmp_path / "bundle.tar"
    with tarfile.open(bundle, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    main(["purge", str(folder), "--yes"])
    code, shown = run(capsys, "import", folder, bundle)
    assert code == 1
    assert "took 0 blocks" in shown
    bundle.write_bytes(np.random.default_rng(0).bytes(5000))
    assert run(capsys, "import", folder, bundle)[0] == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("stat", "/nowhere"), "not the folder of a disk cache"),
        (("stat", "ftp://host"), "gs://"),
        (("gc", ".", "--older-than", "soon"), "not an age like 7d"),
        (("gc", ".", "--size", "much"), "not a size of memory: write 4GiB"),
    ],
)
def test_wrong_calls_say_what_to_do(args, says, capsys):
    try:
        code = main(args)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_help_reads_well_and_needs_no_jax():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvjax.store", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("ls", "stat", "verify", "gc", "purge", "export", "import"):
        assert f"\n    {command} " in shown.stdout
    assert " jax\n" not in shown.stderr


def test_sizes():
    assert [show_size(size) for size in (0, 1023, 1536, 20 << 30)] == ["0 B", "1023 B", "1.5 KiB", "20.00 GiB"]
