"""What a decode loop launches is read from XLA's dump; and in what XLA compiles for an H200 it is what the docs say."""

import pytest

from benchmarks.compiled.command_buffers import BUFFER, KERNEL, LOOP, compiled, describe, parse

ON_THE_HOST = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] wrapped_and grid: [1, 1, 1]
003: kWhile         [prev=000 (1) | sink        ]
condition:
    004: kCustomKernel [source       | next=005 (1)] loop_and_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=010 (1)]
        005: kCustomCall   [source        | next=006 (3)] kCustomCall
        006: kConditional  [source        | next=006 (3)]
          false_branch:
            007: kCopy [source | sink] kCopy
          true_branch:
            008: kCustomCall [source | sink] kCustomCall
    010: kConditional   [prev=000 (1) | sink       ]
      false_branch:
        011: kCopy [source | sink] kCopy
"""
CAPTURED = """\
000: kCommandBuffer [source | sink]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kWhile        [prev=001 (1) | sink        ]
condition:
        003: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
      body:
        004: kCustomCall [source | sink] kCustomCall
"""


def test_a_loop_on_the_host():
    said = describe(parse(ON_THE_HOST))
    assert said[0].startswith("the host goes round the loop")
    assert said[1:] == [
        "  kCustomKernel",
        "  command buffer of 4 thunks, 2 of them our kernels",
        "  conditional of 1 thunks",
    ]


def test_a_loop_that_is_captured():
    said = describe(parse(CAPTURED))
    assert said[0].startswith("the device goes round the loop by itself")
    assert said[1:] == ["  command buffer of 4 thunks, 1 of them our kernels"]


def test_no_loop_is_an_error():
    with pytest.raises(ValueError, match="no loop"):
        describe(parse("000: kCopy [source | sink] kCopy\n"))


@pytest.mark.aot
@pytest.mark.slow  # compiles for most of a minute
@pytest.mark.parametrize("capture", [None, "+WHILE"])
def test_kernels_are_captured_and_the_loop_is_where_it_is_asked_for(capture):
    thunks = compiled(1, "gpu", capture)
    buffers = [each for thunk in thunks for each in thunk.all() if each.kind == BUFFER]
    kernels = sum(each.kind == KERNEL for thunk in thunks for each in thunk.all())
    assert kernels >= 3  # page scores, and attention to what was chosen and to whole views, at least
    assert sum(each.kind == KERNEL for buffer in buffers for each in buffer.all()) == kernels
    assert (LOOP in [thunk.kind for thunk in thunks]) == (capture is None)
