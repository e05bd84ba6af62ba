"""The command: names, mistakes with a way out, text, JSON and a picture."""

import builtins
import json

import pytest

from kvjax.plan.__main__ import main
from kvjax.plan.devices import CHIPS, find_device
from kvjax.plan.model_configs import FOLDER, names, read_model
from tests.engine import tiny
from tests.models import published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config without weights."""
    from kvjax.models.families import find

    path = tmp_path_factory.mktemp("tiny")
    family = find(tiny.CONFIG.family)
    fields = family.to_hf(tiny.CONFIG) | {"model_type": family.model_type}
    (path / "config.json").write_text(json.dumps(fields))
    return path


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--no-compile"])
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


def test_built_in_configs_are_the_published_ones():
    assert read_model("llama-3.1-8b").num_layers == 32
    ours = {name: json.loads((FOLDER / name / "config.json").read_text()) for name in names()}
    for fields in ours.values():
        assert fields in [known for known, _ in published.COUNTED.values()]


def test_devices_are_found_by_name_and_number():
    assert find_device("h200").parts == 1
    assert find_device("h200").mesh is None
    eight = find_device("V5e-8")
    assert eight.parts == 8
    assert eight.mesh.size == 8
    assert eight.memory == CHIPS["v5e"].memory
    assert find_device("tpu7x-2").parts == 4  # JAX sees two devices in a chip
    assert find_device("tpu7x").memory == CHIPS["tpu7x"].memory // 2
    for wrong in ("h300", "v5e-0", "8-v5e", ""):
        with pytest.raises(ValueError, match="is not known: one of a100, h100, h200"):
            find_device(wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--device", "h200"], "neither a folder with a config.json nor one of gemma-3-4b"),
        (["--device", "h300"], "'h300' is not known: one of a100"),
        (["--device", "v5e-3"], "has 3 parts"),
        (["--device", "h200", "--context", "2000"], "more than the 1000 tokens"),
        (["--device", "h200", "--context", "lots"], "'lots' is not a size: write 32768"),
        (["--device", "h200", "--disk-bandwidth", "fast"], "'fast' is not a size of memory"),
        (["--device", "h200", "--disk-bandwidth", "0"], "--disk-bandwidth 0 must be more than 0"),
        (["--device", "h200", "--gpu-memory-utilization", "2"], "must be above 0 and at most 1"),
        (["--device", "h200", "--method", "rocketkv"], "needs a token_budget"),
        (["--device", "h200", "--picture", "out.gif"], "ends in none of .svg"),
    ],
)
def test_mistakes_name_the_value_and_the_way_out(capsys, folder, arguments, said):
    model = [] if arguments[0] == "nothing" else [folder]
    code, text = run(capsys, *model, *arguments)
    assert code == 2
    assert said in " ".join(text.split())


def test_it_prints_and_draws(capsys, folder, tmp_path):
    picture = tmp_path / "plan.svg"
    code, text = run(capsys, folder, "--device", "v5e-2", "--token-budget", 64, "--headroom", 32, "--picture", picture)
    assert code == 0
    for said in ("fits", "page summaries", "each of 2 devices", "roofline", "always computed", "rocketkv 64"):
        assert said in text
    assert "<svg" in picture.read_text()


def test_what_does_not_fit_says_what_would(capsys, folder):
    _, text = run(capsys, folder, "--device", "v5e", "--num-seqs", 64, "--json")
    share = (json.loads(text)["this"]["bytes"] - 1) / CHIPS["v5e"].memory
    share = ("--gpu-memory-utilization", f"{share:.12f}")
    code, text = run(capsys, folder, "--device", "v5e", "--num-seqs", 64, *share)
    assert code == 1
    assert "does not fit" in text
    assert "--num-seqs 63 fits" in text
    code, text = run(capsys, folder, "--device", "v5e", "--num-seqs", 63, *share, "--json")
    assert code == 0
    assert json.loads(text)["this"]["most"] == 63


def test_without_matplotlib_the_error_says_what_to_install(capsys, folder, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, text = run(capsys, folder, "--device", "v5e", "--picture", tmp_path / "plan.png")
    assert code == 2
    assert "pip install matplotlib" in text
