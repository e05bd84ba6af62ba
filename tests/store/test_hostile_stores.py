"""`python -m kvjax.store` over folders and bundles that anybody may have written: a status and sentences, ever."""

import contextlib
import dataclasses
import gzip
import io
import os
import socket
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kvjax.store.__main__ import main
from kvjax.store.block import BlockLayout
from kvjax.store.bundle import read_bundle
from kvjax.store.folder import Folder
from kvjax.store.keys import BlockKey
from tests.store.chains import NAMESPACE, blob_of, names_of
from tests.store.memory_tier import MemoryTier

LAYOUT = BlockLayout(layers=1, kv_heads=1, head_dim=1, dtype="float16")  # 5 KiB
NAMES = names_of(4)
BLOBS = {name.hex: blob_of(name, LAYOUT).tobytes() for name in NAMES}
GOOD = [name.hex for name in NAMES[2:]]  # the others are harmed
VERBS = ("ls", "stat", "verify", "export", "gc", "import", "purge")
EXAMPLES = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 20
MANY = hypothesis.settings(max_examples=EXAMPLES, deadline=None)


def path_of(root: Path, key: str) -> Path:
    path = root / "kvjax-kv-2" / key[:2] / key
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def fill(root: Path, keys: list[str] = GOOD) -> Path:
    (root / "kvjax-kv-2").mkdir(parents=True, exist_ok=True)
    for key in keys:
        path_of(root, key).write_bytes(BLOBS[key])
    return root


def run(*args: object) -> tuple[int, str]:
    """Status and output of a command; any exception is the test's."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        status = main([str(arg) for arg in args])
    assert status in (0, 1, 2)
    assert "Traceback" not in shown.getvalue()
    assert all(each.isprintable() or each == "\n" for each in shown.getvalue())
    return status, shown.getvalue()


def sparse(path: Path, head: bytes = b"") -> None:
    path.write_bytes(head)
    os.truncate(path, 3 << 30)


def huge_claim() -> bytes:
    """A proper header of a block of 3 GiB."""
    layout = BlockLayout(layers=1, kv_heads=1 << 10, head_dim=1 << 10, dtype="float32")
    blob = np.zeros(layout.start, np.uint8)
    blob[:] = np.frombuffer(layout._header(NAMES[0], [0, 0]), np.uint8)
    return blob.tobytes()


def sock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


def key_of_nothing(path: Path) -> None:
    blob = np.frombuffer(BLOBS[NAMES[0].hex], np.uint8).copy()
    LAYOUT.seal(blob, BlockKey(b"", bytes(32), bytes(32)))
    path.write_bytes(blob.tobytes())


HARMS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(BLOBS[NAMES[0].hex][:-1]),
    "cut in its header": lambda path: path.write_bytes(BLOBS[NAMES[0].hex][:77]),
    "another block": lambda path: path.write_bytes(BLOBS[NAMES[1].hex]),
    "of an empty key": key_of_nothing,
    "recursion": lambda path: path.write_bytes((900_000).to_bytes(8, "little") + b"[" * 900_000),
    "a huge number": lambda path: path.write_bytes(
        (4096).to_bytes(8, "little") + b'{"layers.0.k":{"shape":[' + b"9" * 5000 + b"]}}"
    ),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": sock,
    "sparse": sparse,
    "sparse with a good header": lambda path: sparse(path, BLOBS[NAMES[0].hex]),
    "sparse with a huge claim": lambda path: sparse(path, huge_claim()),
    "not used since 1901": lambda path: (path.write_bytes(b"x"), os.utime(path, (-(2**31), -(2**31)))),
}


@pytest.mark.parametrize("harm", HARMS)
def test_one_bad_object_hides_no_other(tmp_path, harm):
    store, bad = fill(tmp_path / "store"), NAMES[0].hex
    HARMS[harm](path_of(store, bad))
    for verb in ("ls", "stat"):
        status, shown = run(verb, store)
        assert status == 1
        assert bad in shown
    assert "512" in run("stat", store)[1], "the tokens of two good blocks"
    status, shown = run("verify", store)
    assert status == 1
    assert f"{bad}: " in shown
    assert shown.endswith("2 blocks are good, 1 are harmed\n")
    status, shown = run("export", store, tmp_path / "bundle.tar")
    assert status == 1
    assert f"{bad}: left out: " in shown
    assert "wrote 2 blocks" in shown
    other = fill(tmp_path / "other", [])
    HARMS[harm](path_of(other, bad))
    assert run("import", other, tmp_path / "bundle.tar") == (0, f"took 2 blocks from {tmp_path / 'bundle.tar'}\n")
    assert "2 blocks are good, 1 are harmed" in run("verify", other)[1]
    assert run("verify", store, "--remove")[0] == 0
    assert not os.path.lexists(path_of(store, bad))
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")
    HARMS[harm](path_of(store, bad))
    assert run("gc", store, "--older-than", "36500d")[0] == 0
    assert run("purge", store, "--yes") == (0, "removed 3 blocks\n")


@pytest.mark.parametrize("harm", ["sparse", "sparse with a good header", "sparse with a huge claim", "recursion"])
def test_what_only_claims_to_be_large_takes_no_memory(tmp_path, harm):
    store = fill(tmp_path / "store")
    HARMS[harm](path_of(store, NAMES[0].hex))
    tracemalloc.start()
    try:
        for verb in ("ls", "stat", "verify"):
            run(verb, store)
        run("export", store, tmp_path / "bundle.tar")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_folder_that_holds_files_is_not_removed(tmp_path):
    store, bad = fill(tmp_path / "store"), path_of(tmp_path / "store", NAMES[0].hex)
    bad.mkdir()
    (bad / "mine").write_text("precious")
    os.utime(bad, (1e9, 1e9))
    for verb in (("verify", store, "--remove"), ("gc", store, "--older-than", "1d"), ("purge", store, "--yes")):
        status, shown = run(*verb)
        assert status == 1
        assert "remove it by hand" in shown
    assert (bad / "mine").read_text() == "precious"
    assert not path_of(store, GOOD[0]).exists(), "the others were removed"


def test_a_part_of_the_store_that_cannot_be_listed(tmp_path):
    store = fill(tmp_path / "store")
    shard = next(f"{n:02x}" for n in range(256) if not (store / "kvjax-kv-2" / f"{n:02x}").exists())
    (store / "kvjax-kv-2" / shard).write_bytes(b"a file")
    for args in (
        ("ls",),
        ("stat",),
        ("verify",),
        ("gc", "--size", "1GiB"),
        ("export", tmp_path / "b.tar"),
        ("purge", "--yes"),
    ):
        status, shown = run(args[0], store, *args[1:])
        assert status == 1
        assert f"{shard} cannot be listed: Not a directory" in shown
    assert not path_of(store, GOOD[0]).exists()


def test_looking_changes_nothing(tmp_path):
    """Neither when a block was used, which decides what leaves, nor what else lies in the folder."""
    store = fill(tmp_path / "store")
    (path_of(store, GOOD[0]).parent / "x.__lock").write_bytes(b"of a writer")
    for key in GOOD:
        os.utime(path_of(store, key), (1e9, 1e9))
    before = {path: path.lstat().st_mtime_ns for path in store.rglob("*")}
    for verb in (("ls",), ("stat",), ("verify",), ("export", tmp_path / "b.tar")):
        assert run(verb[0], store, *verb[1:])[0] == 0
    assert {path: path.lstat().st_mtime_ns for path in store.rglob("*")} == before


def test_what_cannot_be_read_is_neither_good_nor_removed(tmp_path, monkeypatch):
    store = fill(tmp_path / "store")
    real = os.preadv
    failing = [True]

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if failing and failing.pop():
            raise OSError(5, "Input/output error")
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    status, shown = run("verify", store, "--remove")
    assert status == 1
    assert "cannot be read: " in shown
    assert shown.endswith("1 blocks are good, 0 are harmed, 1 cannot be read\n")
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gc", "--older-than=-1d"), "above 0 s"),
        (("gc", "--older-than=0s"), "above 0 s"),
        (("gc", "--older-than=nand"), "above 0 s"),
        (("gc", "--older-than=infd"), "100 years"),
        (("gc", "--older-than=1e300d"), "100 years"),
        (("gc", "--older-than=36501d"), "100 years"),
        (("gc", "--older-than="), "not an age like 7d"),
        (("gc", "--size=0"), "that is what purge does"),
        (("gc", "--size=-1GiB"), "not a size of memory"),
        (("gc", f"--size={'9' * 400}TiB"), "not a"),
        (("gc",), "needs --size or --older-than"),
        (("ls", "--limit=-3"), "not a number like 20"),
        (("import", "/nowhere/bundle.tar"), "cannot be read: No such file"),
        (("import", "/"), "cannot be read: Is a directory"),
        (("export", "/nowhere/bundle.tar"), "cannot be written: No such file"),
        (("export", "/dev/null"), "cannot be written: it is there and not a file"),
    ],
)
def test_wrong_calls_remove_nothing(tmp_path, capsys, args, says):
    store = fill(tmp_path / "store")
    try:
        status = main([args[0], str(store), *args[1:]])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert says in capsys.readouterr().err
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")


@pytest.mark.parametrize("where", ["", "\0", "a" * 5000, "\udcff", "http://[", "http://\udcff/", "gs://\0", "s3://b?x"])
def test_wrong_places(where):
    status, shown = run("stat", where)
    assert status == 2
    assert shown.startswith("kvjax.store: ")


def test_purge_without_anybody_to_answer(tmp_path, monkeypatch):
    store = fill(tmp_path / "store")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, shown = run("purge", store)
    assert status == 2
    assert "purge --yes does not ask" in shown
    assert path_of(store, GOOD[0]).exists()


def test_a_store_that_knows_no_ages_or_sizes_is_not_emptied(monkeypatch):
    """As a bucket, whose every block would be of 1970 and have no bytes."""

    class Bucket(MemoryTier):
        def scan(self):
            return iter([dataclasses.replace(stored, nbytes=0) for stored in super().scan()])

    tier = Bucket()
    for key in GOOD:
        tier.write(key, memoryview(BLOBS[key]))
    monkeypatch.setattr("kvjax.store.verbs.open_store", lambda where: tier)
    monkeypatch.setattr(tier, "close", lambda: None)
    for option, says in (("--older-than=7d", "does not say when"), ("--size=1", "does not say how large")):
        status, shown = run("gc", "gs://bucket", option)
        assert status == 2
        assert says in shown
    assert sum(1 for _ in tier.scan()) == 2


# Bundles


def header(name: str, size: int = 0, **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def member(key: str, name: str | None = None) -> bytes:
    blob = BLOBS[key]
    return (header(name or key, len(blob)) + blob).ljust(-(-(512 + len(blob)) // 512) * 512, b"\0")


def with_claim(size: bytes) -> bytes:
    """A member whose header claims another size."""
    block = bytearray(member(NAMES[0].hex))
    block[124:136] = size.rjust(12, b"\0") if size[:1] != b"\x80" else size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


END = bytes(1024)
BEFORE, AFTER = member(GOOD[0]), member(GOOD[1])
BUNDLES: dict[str, tuple[bytes, str]] = {
    "an absolute name": (member(NAMES[0].hex, f"/{NAMES[0].hex}"), "another key"),
    "a name that climbs": (member(NAMES[0].hex, f"../../{NAMES[0].hex}"), "another key"),
    "a name of markup and escapes": (member(NAMES[0].hex, "[/red]\x1b[2J\udcff"), "another key"),
    "a link": (header("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "it is a link, not a file"),
    "a hard link": (header("link", type=tarfile.LNKTYPE, linkname=GOOD[0]), "it is a link, not a file"),
    "a device": (header("zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "it is a device, not a file"),
    "a pipe": (header("pipe", type=tarfile.FIFOTYPE), "it is a pipe, not a file"),
    "a folder": (header("folder/", type=tarfile.DIRTYPE), "it is a folder, not a file"),
    "sparse": (header("sparse", type=tarfile.GNUTYPE_SPARSE), "it is of type b'S', not a file"),
    "twice": (BEFORE, "it comes twice"),
    "empty": (header(NAMES[0].hex), "no header of a block"),
    "rubbish": (header("rubbish", 1000) + b"x" * 1024, "no header of a block"),
    "harmed": (member(NAMES[0].hex).replace(BLOBS[NAMES[0].hex][-9:], b"123456789"), "do not belong together"),
    "a size of 8 GiB": (with_claim(b"100000000000"), "instead of"),
    "a size of 2^80": (with_claim(b"\x80" + (1 << 80).to_bytes(11)), "instead of"),
    "a size that swallows others": (with_claim(b"%011o" % (len(BLOBS[GOOD[0]]) * 2)), "instead of"),
    "a size below 0": (with_claim(b"-1"), "there is no member"),
    "a header that is none": (b"\xff" * 512, "there is no member"),
    "a harmed checksum": (b"x" + member(NAMES[0].hex)[1:], "there is no member"),
    "an end in the middle": (END, "more behind its end"),
    "zeros, as after a power cut": (member(NAMES[0].hex)[:700] + bytes(12 * 512 - 700), "no header of a block"),
    "an extended header that swallows others": (header("x", 5000, type=tarfile.XHDTYPE) + b"x" * 512 + BEFORE, "twice"),
    "a huge extended header": (header("x", 1 << 33, type=tarfile.XHDTYPE), "it is of type b'x', not a file"),
}


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_members_are_refused_one_by_one(tmp_path, bundle, compress):
    content, says = BUNDLES[bundle]
    store, file = fill(tmp_path / "store", []), tmp_path / "bundle.tar"
    file.write_bytes(compress(BEFORE + content + AFTER + END))
    status, shown = run("import", store, file)
    assert status == 1
    assert says in shown
    assert f"took 2 blocks from {file}" in shown
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.tar", "store"]


@pytest.mark.parametrize(
    "content", [BEFORE, BEFORE + AFTER[:-700], BEFORE + AFTER[:700], BEFORE + AFTER[:9], BEFORE + AFTER]
)
@pytest.mark.parametrize("compress", [bytes, lambda content: gzip.compress(content)[:-9]], ids=["plain", "gzip"])
def test_a_cut_bundle_says_so_and_what_is_whole_is_taken(tmp_path, content, compress):
    store, file = fill(tmp_path / "store", []), tmp_path / "bundle.tar"
    file.write_bytes(compress(content))
    status, shown = run("import", store, file)
    assert status == 1
    assert "its end is missing" in shown
    assert ("took 2" if content == BEFORE + AFTER else "took 1") in shown


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_bundle_may_have_been_packed_anew(tmp_path, format, mode):
    with tarfile.open(tmp_path / "bundle.tar", mode, format=format) as file:
        for key in GOOD:
            info = tarfile.TarInfo(key)
            info.size, info.pax_headers = len(BLOBS[key]), {"atime": "1.5", "comment": "x" * 600}
            file.addfile(info, io.BytesIO(BLOBS[key]))
    store = fill(tmp_path / "store", [])
    assert run("import", store, tmp_path / "bundle.tar")[0] == 0
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")


def test_an_import_mends_harmed_blocks_and_leaves_good_ones(tmp_path):
    store, file = fill(tmp_path / "store"), tmp_path / "bundle.tar"
    assert run("export", store, file)[0] == 0
    harmed = bytearray(BLOBS[GOOD[0]])
    harmed[-1] ^= 1
    path_of(store, GOOD[0]).write_bytes(harmed)
    inode = path_of(store, GOOD[1]).stat().st_ino
    assert run("import", store, file) == (0, f"took 2 blocks from {file}\n")
    assert run("verify", store) == (0, "2 blocks are good, 0 are harmed\n")
    assert path_of(store, GOOD[1]).stat().st_ino == inode


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    store, file = fill(tmp_path / "store"), tmp_path / "bundle.tar"
    file.write_bytes(b"an older bundle")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        status, shown = run("export", store, file)
    assert status == 2
    assert "No space left" in shown
    assert file.read_bytes() == b"an older bundle"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.tar", "store"]
    assert run("export", store, file)[0] == 0
    assert sorted(block.name for block in read_bundle(file)) == sorted(GOOD)


# Anything


def mutated(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with places overwritten, a part cut out, doubled or moved, or something added."""
    place = st.integers(0, len(whole))

    def overwrite(at: int, new: bytes) -> bytes:
        return whole[:at] + new + whole[at + len(new) :]

    return st.one_of(
        st.builds(overwrite, place, st.binary(min_size=1, max_size=20)),
        st.builds(lambda a, b: whole[: min(a, b)] + whole[max(a, b) :], place, place),
        st.builds(lambda a, b: whole[: max(a, b)] + whole[min(a, b) :], place, place),
        st.builds(lambda at: whole[:at], place),
        st.builds(lambda at, new: whole[:at] + new + whole[at:], place, st.binary(max_size=600)),
        st.builds(lambda at: whole[:at] + bytes(len(whole) - at), place),
    )


def with_header(text: bytes) -> bytes:
    return (len(text).to_bytes(8, "little") + text).ljust(LAYOUT.nbytes, b"\0")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["__metadata__", "layers.0.k", "shape", "dtype", "key", "x"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)
CONTENTS = st.one_of(
    mutated(BLOBS[NAMES[0].hex]),
    st.binary(max_size=200),
    JSON.map(lambda value: with_header(repr(value).replace("'", '"').encode("utf-8", "replace"))),
)
KEYS = st.sampled_from([NAMES[0].hex, NAMES[1].hex, "abcd", "0" * 100])
OBJECTS = st.dictionaries(KEYS, CONTENTS | st.sampled_from(sorted(HARMS)), max_size=3)
COUNTER = iter(range(1 << 30))


@pytest.mark.timeout(60 + EXAMPLES)  # seconds, for each example is a store and eleven commands
@MANY
@hypothesis.given(OBJECTS)
def test_every_verb_over_any_objects(tmp_path_factory, objects):
    folder = tmp_path_factory.getbasetemp() / f"objects-{next(COUNTER)}"
    store = fill(folder / "store")
    bad = 0
    for key, content in objects.items():
        if isinstance(content, bytes):
            path_of(store, key).write_bytes(content)
        else:
            HARMS[content](path_of(store, key))
        bad += key not in BLOBS or content != BLOBS[key]
    status, shown = run("verify", store)
    assert (status, shown.splitlines()[-1]) == (
        bool(bad), f"{2 + len(objects) - bad} blocks are good, {bad} are harmed",
    )  # fmt: skip
    assert sum(line.startswith(tuple(objects)) for line in shown.splitlines()) == bad
    for verb in (("ls",), ("stat",), ("gc", "--size", "5KiB"), ("gc", "--older-than", "1d")):
        assert run(verb[0], store, *verb[1:])[0] in (0, 1)
    fill(store)
    status, shown = run("export", store, folder / "bundle.tar")
    blocks = [block.name for block in read_bundle(folder / "bundle.tar")]
    assert set(GOOD) <= set(blocks)
    assert run("verify", store, "--remove")[0] == 0
    assert run("verify", store) == (0, f"{len(blocks)} blocks are good, 0 are harmed\n")
    assert run("purge", store, "--yes") == (0, f"removed {len(blocks)} blocks\n")
    assert not list(Folder(store).scan())
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


PARTS = st.lists(
    st.sampled_from([content for content, _ in BUNDLES.values()])
    | mutated(member(NAMES[0].hex))
    | mutated(header("x", 100, type=tarfile.XHDTYPE) + bytes(512))
    | st.binary(max_size=3).map(lambda rubbish: rubbish.ljust(512, b"x")),
    max_size=3,
)


@pytest.mark.timeout(60 + EXAMPLES)
@MANY
@hypothesis.given(PARTS, st.sampled_from([0, 1, 511, 512, 1024, 3000]), st.sampled_from([bytes, gzip.compress]))
def test_any_bundle(tmp_path_factory, parts, cut, compress):
    """Whatever stands in front, as long as it ends with a whole unit, the blocks behind it are taken."""
    folder = tmp_path_factory.getbasetemp()
    file = folder / "any.tar"
    content = b"".join(part.ljust(-(-len(part) // 512) * 512, b"\0") for part in parts) + b"\xff" * 512
    content += BEFORE + AFTER + END
    file.write_bytes(compress(content[: len(content) - cut] if cut else content))
    blocks = list(read_bundle(file))
    taken = {block.name for block in blocks if block.key is not None}
    assert GOOD[0] in taken
    assert GOOD[1] in taken or cut > 1024
    assert all(block.problem or block.key is not None for block in blocks)
    assert all(bytes(memoryview(block.blob)) == BLOBS[block.name] for block in blocks if block.blob is not None)
    status, shown = run("import", fill(folder / "any-store", []), file)
    twice = len(taken) < sum(block.key is not None for block in blocks)
    assert status == (twice or any(block.problem for block in blocks))
    assert f"took {len(taken)} blocks" in shown


@MANY
@hypothesis.given(st.binary(max_size=3000))
def test_a_file_of_any_bytes_is_no_bundle(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.tar"
    file.write_bytes(content)
    assert all(block.problem for block in read_bundle(file))


def test_a_namespace_of_another_model_travels_too(tmp_path):
    """A bundle says nothing of models: what was exported is found by those who know its keys."""
    name = BlockKey.chain(dataclasses.replace(NAMESPACE, weights="v" * 64).root(), np.arange(256))[0]
    store = fill(tmp_path / "store")
    path_of(store, name.hex).write_bytes(blob_of(name).tobytes())
    assert run("export", store, tmp_path / "bundle.tar")[0] == 0
    assert run("import", fill(tmp_path / "other", []), tmp_path / "bundle.tar")[1].startswith("took 3 blocks")
