"""`kill -9` at any instant: what was written is served afterwards, nothing else is, and no space leaks."""

import random
from pathlib import Path

import pytest

from tests.store.chains import names_of
from tests.store.crash import check, crash

pytestmark = pytest.mark.timing

STEPS = [
    "before room is made",
    "room is made",
    "opened",
    "half written",
    "written",
    "on the medium",
    "renamed",
    "counted",
]


def checked(folder: Path, said: list[str], names: dict[str, object]) -> None:
    _, seconds = check(folder, said, names)
    assert seconds < 5


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [0, 15])
def test_killed_at_a_step_of_a_write(tmp_path, step, after):
    names = {name.hex: name for name in names_of(100)}
    said = crash(tmp_path, 0, step=step, after=after)
    assert len(said) in (after, after + 1)
    checked(tmp_path, said, names)


@pytest.mark.parametrize(
    "kills", [30, pytest.param(300, marks=pytest.mark.slow(reason="300 processes are started and killed"))]
)
def test_killed_at_random(tmp_path, kills):
    rng, names = random.Random(kills), {}
    for seed in range(kills):
        names |= {name.hex: name for name in names_of(2000, seed=seed)}
        said = crash(tmp_path, seed, seconds=rng.uniform(0.0, 0.05))
        assert said
        checked(tmp_path, said, names)
        for key in [key for key in names if not (tmp_path / "kvjax-kv-2" / key[:2] / key).exists()]:
            del names[key]
