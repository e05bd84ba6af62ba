"""The command `kvjax`: its sub-commands, its errors, and the time to its first line."""

import importlib.util
import resource
import subprocess
import sys

import pytest

from kvjax.__main__ import COMMANDS, main


def test_every_command_has_a_main():
    for name in COMMANDS:
        assert importlib.util.find_spec(f"kvjax.{name}.__main__") is not None, name


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(("name", "way_out"), [("serv", "did you mean 'serve'?"), ("zzz", "the commands are serve, ")])
def test_an_unknown_command_ends_with_status_2_and_one_sentence(name, way_out, capsys):
    assert main([name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert repr(name) in printed.err
    assert way_out in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.timing
@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["store", "--help"]])
def test_the_first_line_takes_at_most_300_ms_of_cpu_and_imports_no_jax(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvjax", *arguments], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("usage: ")
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jax" not in modules
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_models_ends_in_silence_where_the_reader_closes_the_pipe():
    command = [sys.executable, "-m", "kvjax.models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
