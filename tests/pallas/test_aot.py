"""Every kernel compiles for devices that are not here, without spills and without a copy of the cache.

`make test-aot` runs this with `-s`, so that what each takes is printed.
"""

import functools

import pytest

from benchmarks.compiled import aot

LARGEST_SHARE = 0.02  # of the cache: temporaries beyond it, and beyond activations, are a copy nobody asked for
MOST_SPILLED = 0  # bytes

NOT_SERVED = {
    ("h200", "selected attention, pages of 4"): "page_size=4",
    # compiled over eight of them instead: tests/plan/test_compiled.py
    ("v5e", "decode step, rocketkv 1024"): "GiB of arguments do not fit",
    ("v5e", "decode step, full cache"): "GiB of arguments do not fit",
}


@functools.cache  # which keeps no exceptions, and every test of a target would compile all of it again
def reports(target: str) -> dict[str, aot.Report] | RuntimeError:
    try:
        measured = {report.program: report for report in aot.measure(target)}
    except RuntimeError as error:
        return error
    print("", *measured.values(), sep="\n")
    return measured


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(3600)  # the first test of a target compiles all its programs: minutes, and many on a busy machine
@pytest.mark.parametrize("program", sorted(aot.programs()))
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_without_spills_or_hidden_copies(target, program):
    measured = reports(target)
    if isinstance(measured, RuntimeError):
        raise measured
    report = measured[program]
    if (target, program) in NOT_SERVED:
        assert report.refused is not None
        assert NOT_SERVED[target, program] in report.refused
        return
    assert report.refused is None
    assert report.kernels, "no kernel is in what was compiled"
    assert report.share <= LARGEST_SHARE, f"{report}: over {LARGEST_SHARE:.0%} of the cache"
    assert (report.spilled or 0) <= MOST_SPILLED, str(report)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v6e", "h200"])
def test_a_copied_cache_is_seen(target):
    [report] = aot.measure(target, list(aot.control()))
    print(f"\n{report}")
    assert report.share > LARGEST_SHARE


def test_what_ptxas_says_is_read():
    text = "0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nptxas info : Used 104 registers, used 2\n"
    assert aot.read_ptxas(text) == (104, 20)
    assert aot.read_ptxas(text + text.replace("104", "31")) == (104, 40)
    with pytest.raises(ValueError, match="no registers"):
        aot.read_ptxas("")
