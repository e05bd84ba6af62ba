"""Correctness of every kernel on this device: against the reference in float32, on the cases that the tests run.

A part of `benchmarks.device`. Cases hold numbers that bfloat16 has, so that both compute with the same ones; what no
entry holds is NaN.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.point import Point
from benchmarks.device.rig import Rig
from kvjax.attention.read_units import ReadUnits
from kvjax.pallas.decode_attention import decode_attention
from kvjax.pallas.dispatch import REFERENCE
from kvjax.pallas.observation_scores import observation_scores
from kvjax.pallas.page_scores import page_scores
from kvjax.pallas.page_selection import page_selection
from kvjax.pallas.prefill_attention import prefill_attention
from kvjax.pallas.selected_attention import selected_attention

PART = "correctness"
SCORES = 1e-3  # a device's exponential is not the CPU's
ROUNDING = 2**-7  # of what is bfloat16 in the end
EXACT = 0.0  # a page is chosen or it is not

Call = Callable[[str, Any], np.ndarray]  # from an implementation and a type of arrays to what comes out
Check = tuple[str, Call]  # the case's name, and the case


def points(rig: Rig) -> list[Point]:
    """One for each operation and implementation: kernels where they can run, else the reference and an interpreter."""
    names = (REFERENCE, "tpu interpreter") if rig.attention_backend is None else (rig.attention_backend,)
    return [
        Point(
            f"{PART}/{operation}/{name}",
            PART,
            {"operation": operation, "implementation": name},
            0.0,
            functools.partial(_measure, checks, name, tolerance, rig.quick),
            order=0,
        )
        for operation, (checks, tolerance) in _operations().items()
        for name in names
    ]


def _operations() -> dict[str, tuple[Callable[[], Sequence[Check]], float]]:
    return {
        "page_scores": (_page_scores, SCORES),
        "page_selection": (_page_selection, EXACT),
        "selected_attention": (_selected_attention, ROUNDING),
        "decode_attention": (_decode_attention, ROUNDING),
        "observation_scores": (_observation_scores, SCORES),
        "prefill_attention": (_prefill_attention, ROUNDING),
    }


def _measure(checks: Callable[[], Sequence[Check]], name: str, tolerance: float, quick: bool) -> dict[str, Any]:
    """The largest error of any case, which of them are wrong, and which are not served."""
    results, implementation = [], name.split()[0]
    cases = checks()
    if quick:
        cases = cases[: 2 if name == implementation else 1]  # an interpreter takes seconds for each
    for case, call in cases:
        with jax.default_matmul_precision("highest"):
            expected = call(REFERENCE, jnp.float32)
        try:
            with _interpreter(name):
                actual = call(implementation, None)
        except NotImplementedError as reason:
            results.append({"case": case, "unserved": str(reason)})
            continue
        worst = difference(actual, expected)
        results.append({"case": case, "error": worst, "wrong": worst is None or worst > tolerance})
    served = [row for row in results if "error" in row]
    errors = [row["error"] for row in served]
    return {
        "error": None if None in errors else max(errors, default=0.0),
        "tolerance": tolerance,
        "wrong": any(row["wrong"] for row in served),
        "served": len(served),
        "cases": results,
    }


def difference(actual: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest error, as a share of the largest value; None where something is no number."""
    if not np.isfinite(actual).all():
        return None
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def mask(selection: ReadUnits, pages: int) -> np.ndarray:
    """[B, R, P]: 1 for each page that is chosen, in whatever order."""
    units, chosen = np.asarray(selection.units), np.asarray(selection.chosen)
    out = np.zeros((*units.shape[:2], pages + 1), np.float32)
    np.put_along_axis(out, np.where(chosen, units, pages), 1, axis=2)
    return out[..., :pages]


def _interpreter(name: str) -> contextlib.AbstractContextManager[Any]:
    if "interpreter" not in name:
        return contextlib.nullcontext()
    from tests.pallas.interpreter import interpreted

    return interpreted(name.split()[0])


def _run(operation: Callable[..., Any], name: str, *arrays: Any, **options: Any) -> np.ndarray:
    compiled = jax.jit(functools.partial(operation, implementation=name, **options))
    return np.asarray(compiled(*arrays)).astype(np.float32)


def _page_scores() -> Sequence[Check]:
    from tests.pallas.cases import CASES, SUMMARIES
    from tests.pallas.test_page_scores import summary

    def check(case: Any) -> Check:
        bounds = summary(case)  # as it is stored, widened

        def call(name: str, dtype: Any) -> np.ndarray:
            arrays = case.array(case.q, dtype), case.array(bounds, dtype or case.summary), case.held
            return _run(page_scores, name, *arrays, page_size=case.page, scale=case.scale)

        return str(case), call

    return [check(case) for case in _plain(CASES + SUMMARIES)]


def _selected_attention() -> Sequence[Check]:
    from tests.pallas.cases import CASES
    from tests.pallas.test_selected_attention import draw

    def check(case: Any) -> Check:
        def call(name: str, dtype: Any) -> np.ndarray:
            arrays = [case.array(x, dtype) for x in (case.q, case.keys, case.values)]
            return _run(
                selected_attention, name, *arrays, case.held, draw(case, 19), page_size=case.page, scale=case.scale
            )

        return str(case), call

    return [check(case) for case in _plain(CASES)]


def _decode_attention() -> Sequence[Check]:
    from tests.pallas.cases import CASES

    def check(case: Any) -> Check:
        def call(name: str, dtype: Any) -> np.ndarray:
            q = case.q.reshape(len(case.entries), -1, case.dim)
            arrays = [case.array(x, dtype) for x in (q, case.keys, case.values)]
            return _run(decode_attention, name, *arrays, case.held, scale=case.scale)

        return str(case), call

    return [check(case) for case in _plain(CASES)]


def _observation_scores() -> Sequence[Check]:
    from tests.pallas.test_observation_scores import PROMPTS

    def check(case: Any) -> Check:
        def call(name: str, dtype: Any) -> np.ndarray:
            arrays = case.array(case.queries, dtype), case.array(case.keys[0], dtype)
            numbers = jnp.int32(case.length), jnp.int32(case.observed)
            options = {"pooling_kernel": case.pooling_kernel, "scale": case.scale, "per_head": case.per_head}
            return _run(observation_scores, name, *arrays, *numbers, **options)[:, : case.length - case.observed]

        return str(case), call

    return [check(case) for case in _plain(PROMPTS)]


def _page_selection() -> Sequence[Check]:
    from tests.pallas.test_page_selection import CHOICES, PAGE

    def check(case: Any) -> Check:
        def call(name: str, dtype: Any) -> np.ndarray:
            scores, entries, most = case.arrays
            options = {"page_size": PAGE, "count": case.count, "most": most, "implementation": name}
            chosen = jax.jit(functools.partial(page_selection, **options))(scores, entries)
            return mask(chosen, scores.shape[2])

        return str(case), call

    return [check(case) for case in _plain(CHOICES)]


def _prefill_attention() -> Sequence[Check]:
    from tests.pallas.test_prefill_attention import CHUNKS

    def check(case: Any) -> Check:
        def call(name: str, dtype: Any) -> np.ndarray:
            if name == "gpu" and case.start % 8:
                raise NotImplementedError(f"a chunk that starts at {case.start}, which is no multiple of 8")
            arrays = [case.array(x, dtype) for x in (case.queries, case.keys[0], case.values[0])]
            return _run(prefill_attention, name, *arrays, jnp.int32(case.start), scale=case.scale, window=case.window)

        return str(case), call

    return [check(case) for case in _plain(CHUNKS)]


def _plain(cases: Sequence[Any]) -> list[Any]:
    """Cases that the tests leave to the nightly run are marked; here all of them run."""
    return [case.values[0] if hasattr(case, "marks") else case for case in cases]
