"""`python -m benchmarks.device`: what it predicts, in slices, what it makes of wrong kernels; and a rehearsal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.device import __main__ as device
from benchmarks.device.clock import looped, turns
from benchmarks.device.correctness import difference, mask
from benchmarks.device.kernels import points as kernel_points
from benchmarks.device.model import filled, outside_steps, started
from benchmarks.device.outside import OUTSIDE
from benchmarks.device.point import Point
from benchmarks.device.rig import Rig, noise
from benchmarks.device.table import choosing, ratios, savings
from benchmarks.device.torch_arms import TorchSteps, shared, torch_seconds
from kvjax.attention.read_units import ReadUnits
from kvjax.engine.device import steps
from kvjax.pallas.decode_attention import decode_attention
from kvjax.plan.devices import find_device

H200 = find_device("h200")
ARGUMENTS = ["--quick", "--parts", "copies", "kernels"]


def quick_rig(context: int = 512) -> Rig:
    return Rig(H200, True, (2,), (context,), (128,), 1)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "device.json"


def read(output) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(output.read_text())["rows"]}


def fake(monkeypatch, **measures) -> None:
    """Points of one part, by name, that take a second in prediction."""

    def points(rig):
        about = {"operation": "page_scores", "implementation": "gpu", "batch": 8, "context": 1024}
        return [Point(name, "kernels", about, 1.0, measure, nbytes=100) for name, measure in measures.items()]

    monkeypatch.setattr(device, "PARTS", {"copies": lambda rig: [], "kernels": points})


def test_nothing_is_predicted_to_be_faster_than_its_bytes_allow(output, capsys):
    assert device.main(["--predict", "--device", "h200", "--batches", "8", "--output", str(output)]) == 0
    rows = read(output)
    assert len(rows) > 100
    for row in rows.values():
        if row["part"] not in ("correctness", "memory"):
            least = row["operations"] / H200.flops if "operations" in row else 0.0
            if "host" not in row.get("copy", ""):
                least = max(least, row["bytes"] / H200.bandwidth)
            assert row["predicted"] > least, row["name"]
            assert "measured" not in row
    assert "of views" in rows["decode/full gpu 8x131072"]["skipped"]
    assert "skipped" not in rows["decode/full gpu 8x98304"]
    assert "rocketkv 512   against full" in (said := capsys.readouterr().out)
    assert "98,304 x 8   rocketkv 512 takes" in said
    found = {(ratio.context, ratio.budget): ratio for ratio in ratios(list(rows.values()))}
    assert (131_072, 512) not in found  # the full cache does not fit
    longest = found[98_304, 512]
    assert longest.measured is None
    assert longest.roofline == pytest.approx(7.5, abs=0.5)  # the weights, and a hundred times less of KV
    assert 1 < longest.predicted < longest.roofline


def test_what_was_predicted_before_stays(output, monkeypatch):
    fake(monkeypatch, a=lambda: {"seconds": 0.5})
    assert device.main(["--quick", "--predict", "--output", str(output)]) == 0
    said = json.loads(output.read_text())
    said["rows"][0]["predicted"] = 7.0
    output.write_text(json.dumps(said))
    assert device.main(["--quick", "--output", str(output)]) == 0
    row = read(output)["a"]
    assert (row["predicted"], row["measured"]["seconds"]) == (7.0, 0.5)
    assert row["on"]["device"] == jax.devices()[0].device_kind


def test_slices_go_on_and_measure_nothing_twice(output, monkeypatch, capsys):
    counts = {"a": 0, "b": 0, "c": 0}

    def counting(name, seconds=0.001):
        def measure():
            counts[name] += 1
            return {"seconds": seconds}

        return measure

    def killed():
        raise KeyboardInterrupt

    fake(monkeypatch, a=counting("a"), b=killed, c=counting("c"))
    with pytest.raises(KeyboardInterrupt):
        device.main([*ARGUMENTS, "--output", str(output)])
    assert read(output)["b"]["tries"] == 1
    fake(monkeypatch, a=counting("a"), b=counting("b"), c=counting("c"))
    assert device.main([*ARGUMENTS, "--budget-seconds", "0", "--output", str(output)]) == device.LEFT
    assert "2 points are left" in capsys.readouterr().out
    assert device.main([*ARGUMENTS, "--output", str(output)]) == 0
    assert counts == {"a": 1, "b": 1, "c": 1}


def test_a_point_that_ends_the_process_is_let_be_after_the_second_time(output, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    fake(monkeypatch, a=killed, b=lambda: {"seconds": 1.0})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            device.main([*ARGUMENTS, "--output", str(output)])
    assert device.main([*ARGUMENTS, "--output", str(output)]) == 1
    rows = read(output)
    assert "ended" in rows["a"]["failed"]
    assert rows["b"]["measured"] == {"seconds": 1.0}
    fake(monkeypatch, a=lambda: {"seconds": 2.0}, b=killed)
    assert device.main([*ARGUMENTS, "--retry", "--output", str(output)]) == 0


def test_what_fails_is_said_and_the_others_are_measured(output, monkeypatch, capsys):
    def fails():
        raise RuntimeError("no room\nfor it")

    def unserved():
        raise NotImplementedError("pages of 3")

    fake(monkeypatch, a=fails, b=unserved, c=lambda: {"seconds": 2.0})
    assert device.main([*ARGUMENTS, "--output", str(output)]) == 1
    rows = read(output)
    assert rows["a"]["failed"] == "RuntimeError: no room"
    assert rows["b"]["skipped"] == "not served: pages of 3"
    assert "a" + 57 * " " + " FAILED: RuntimeError: no room\n" in capsys.readouterr().out


def test_times_of_a_wrong_kernel_are_marked(output, monkeypatch, capsys):
    about = {"operation": "page_scores", "implementation": "gpu"}
    judged = {"error": 0.5, "tolerance": 1e-3, "wrong": True, "served": 1, "cases": [{}]}

    def points(rig):
        size = about | {"batch": 8, "context": 1024}
        other = size | {"implementation": "reference"}
        return [
            Point("right?", "correctness", about, 0.0, lambda: judged, order=0),
            Point("a", "kernels", size, 1.0, lambda: {"seconds": 1.0}, nbytes=1),
            Point("b", "kernels", other, 1.0, lambda: {"seconds": 1.0}, nbytes=1),
        ]

    monkeypatch.setattr(device, "PARTS", {"kernels": points})
    assert device.main(["--quick", "--parts", "kernels", "--output", str(output)]) == 1
    rows = read(output)
    assert "not those of the reference" in rows["a"]["marked"]
    assert "marked" not in rows["b"]
    assert "WRONG" in capsys.readouterr().out


def test_another_device_is_refused(output, capsys):
    assert device.main(["--device", "h200", "--output", str(output)]) == 2
    assert "is no h200" in capsys.readouterr().err
    assert device.main(["--quick", "--device", "h200-2"]) == 2
    assert "one chip is measured, not 2" in capsys.readouterr().err


def test_a_ratio_is_of_the_best_arms():
    def row(arm, budget, name, seconds, roofline):
        return {
            "part": "decode", "arm": arm, "budget": budget, "implementation": name, "batch": 8, "context": 1024,
            "predicted": 1.0, "roofline": roofline, "measured": {"seconds": seconds},
        }  # fmt: skip

    rows = [row("full", None, "gpu", 9.0, 4.0), row("full", None, "cudnn", 8.0, 4.0)]
    rows += [row("rocketkv 512", 512, "gpu", 2.0, 0.5), row("rocketkv 512", 512, "reference", 5.0, 0.5)]
    [ratio] = ratios(rows)
    assert (ratio.arm, ratio.roofline, ratio.measured) == ("cudnn", 8.0, 4.0)
    assert "50% of the roofline's" in str(ratio)


def test_choosing_pages_is_compared_with_the_attention_that_it_saves():
    seconds = {"page_scores": 1.0, "page_selection": 2.0, "selected_attention": 1.0, "decode_attention": 7.0}
    rows = [
        {"part": "kernels", "operation": name, "batch": 8, "context": 1024, "measured": {"seconds": value}}
        for name, value in seconds.items()
    ]
    [line] = choosing(rows)
    assert "save 6 s of attention: they take 0.50 of that" in line


def test_memory_that_is_saved_is_of_both_peaks():
    size = {"part": "memory", "batch": 8, "context": 1024}
    rows = [size | {"arm": "full", "predicted_bytes": 1000}, size | {"arm": "rocketkv 512", "predicted_bytes": 200}]
    assert savings(rows[:1]) == []
    assert savings(rows)[0].endswith("80% less  measured -")
    measured = [row | {"measured": {"peak": peak}} for row, peak in zip(rows, (400, 100), strict=True)]
    assert "75% less" in savings(measured)[0]


def test_a_loop_calls_every_set_as_often_as_it_says():
    counted = looped(lambda x, y: jnp.full(x.shape, 1e30) * y, jnp.zeros(2), [(1.0,), (2.0,)], 3)()
    np.testing.assert_allclose(counted, np.full(2, 3 * (1 + 2) * 2), rtol=1e-5)  # a sum over two places enters both
    assert turns(1e-6, 1) == 500
    assert turns(1e-3, 2) == 15
    assert turns(1.0, 1) == 1


def test_noise_has_no_order():
    x = np.asarray(noise((64, 4096), jnp.float32, 3))
    assert abs(x.mean()) < 0.01
    assert x.var() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 0.01
    assert not np.array_equal(x, noise((64, 4096), jnp.float32, 4))


def test_pages_are_compared_as_sets():
    one = ReadUnits(jnp.array([[[3, 1, 0]]]), jnp.array([[[True, True, False]]]))
    other = ReadUnits(jnp.array([[[1, 3, 2]]]), jnp.array([[[True, True, False]]]))
    assert mask(one, 4).tolist() == [[[0, 1, 0, 1]]]
    assert difference(mask(one, 4), mask(other, 4)) == 0
    assert difference(np.array([np.nan]), np.array([1.0])) is None


def test_others_attend_as_the_reference_does():
    q, k, v = (
        noise((2, 4, 32), jnp.float32, 1),
        noise((2, 48, 2, 32), jnp.float32, 2),
        noise((2, 48, 2, 32), jnp.float32, 3),
    )
    entries = jnp.array([48, 17])
    ours = decode_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), entries, scale=0.3, implementation="reference")
    np.testing.assert_allclose(OUTSIDE["xla"](q, k, v, entries, scale=0.3), ours, rtol=1e-4, atol=1e-5)
    pytest.importorskip("torch")
    assert torch_seconds(q, k, v, scale=0.3, rounds=1)["seconds"] > 0


def test_the_arms_of_others_decode_what_the_engine_decodes():
    rig = quick_rig(256)
    caches, weights = rig.caches(2, 256, None), rig.weights
    length, count = 128, 4
    views, everyone = filled(caches, length), np.ones(2, np.bool_)
    retained, again = ([[x.swapaxes(1, 2) + 0 for x in (view.k, view.v)] for view in views] for _ in range(2))
    out, *_ = steps.decode(
        weights.trunk, rig.kinds("reference"), caches.plans, caches.layout.decode_steps, weights.trunk_leaves,
        weights.leaves, views, started(rig, 2, length), everyone, np.int32(count),
    )  # fmt: skip
    attend = lambda *arrays: OUTSIDE["xla"](*arrays, scale=rig.model.query_scale)  # noqa: E731
    token, position = jnp.full(2, 5, jnp.int32), jnp.full(2, length, jnp.int32)
    _, last = outside_steps(rig, attend, count)(weights.trunk_leaves, weights.leaves, retained, token, position)
    assert out.emitted[:count].all()
    np.testing.assert_array_equal(last, out.sample.token[count - 1])
    pytest.importorskip("torch")
    by_torch = TorchSteps(rig, [(k, v) for k, v in again], length, count)(shared(token).long())
    np.testing.assert_array_equal(by_torch, out.sample.token[count - 1])


def test_every_operation_has_its_arms():
    names = {point.name.split()[0] for point in kernel_points(quick_rig())}
    assert {"kernels/page_scores/reference", "kernels/decode_attention/torch", "kernels/decode_attention/cudnn"} < names


def test_a_picture_of_predictions(output, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ["--device", "h200", "--batches", "8", "--output", str(output)]
    assert device.main(["--predict", *asked]) == 0
    assert device.main(["--plot", str(tmp_path / "device.png"), *asked]) == 0
    assert (tmp_path / "device.png").stat().st_size > 10_000


@pytest.mark.slow  # compiles every step of a toy model, and runs kernels in an interpreter
def test_the_rehearsal_measures_everything(output):
    assert device.main(["--quick", "--output", str(output)]) == 0
    rows = read(output)
    assert {row["part"] for row in rows.values()} == set(device.PARTS)
    assert all("measured" in row or "skipped" in row for row in rows.values())
    assert not any("marked" in row for row in rows.values())
