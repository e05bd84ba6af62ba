"""Page selection: every case in every implementation keeps the same set, and nothing better is dropped."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.ops import REFERENCE_OPS
from kvjax.attention.read_units import ReadUnits
from kvjax.attention.selection import HybridPages
from kvjax.pallas.page_selection import page_selection
from tests.attention import rocketkv_oracle as oracle
from tests.attention.views import page_view
from tests.pallas.interpreter import run

PAGE = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rows of scores. Of pages without an entry they are NaN or infinite."""

    name: str
    scores: np.ndarray  # [B, R, P]
    entries: tuple[int, ...]
    count: int
    most: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def eligible(self, slot: int) -> int:
        """Leading pages of a slot that have an entry."""
        return -(-self.entries[slot] // PAGE)

    @property
    def arrays(self) -> tuple:
        scores = self.scores.copy()
        for slot in range(len(scores)):
            behind = scores[slot, :, self.eligible(slot) :]
            behind[...] = np.resize([np.nan, np.inf, -np.inf], behind.shape)
        most = None if self.most is None else jnp.asarray(self.most, jnp.int32)
        return jnp.asarray(scores), jnp.asarray(self.entries, jnp.int32), most

    def expected(self, slot: int, row: int) -> list[int]:
        """The pages of a row, by a stable sort of those with an entry."""
        scores = self.scores[slot, row, : self.eligible(slot)].copy()
        scores[-1:] = np.inf
        known = np.flatnonzero(scores > -np.inf)
        count = self.count if self.most is None else min(self.count, self.most[slot])
        return sorted(int(known[i]) for i in oracle.stable_top(scores[known], min(count, len(known))))


def draw(*shape: int, values: int | None = None) -> np.ndarray:
    """Scores of both signs over some magnitudes, or of so many values, zeros of both signs among them."""
    random = np.random.default_rng(5)
    if values is None:
        return (random.normal(size=shape) * 10.0 ** random.integers(-6, 3, shape)).astype(np.float32)
    return (random.integers(0, values, shape) * random.choice([0.5, -0.5], shape)).astype(np.float32)


def slow(choice: Choice) -> object:
    """Left to `make nightly`: in an interpreter it takes seconds."""
    return pytest.param(choice, marks=pytest.mark.slow)


MINUS = draw(1, 2, 70)
MINUS[:, :, ::3] = -np.inf
CHOICES = [
    # a slot that is empty, one with fewer pages than are chosen, one whose newest page is a partial one, a full one
    Choice("many", draw(4, 3, 150), (0, 37, 801, 1200), 19, (19, 19, 7, 400)),
    Choice("equal", draw(3, 3, 150, values=3), (0, 1200, 1001), 40, (40, 0, 33)),
    slow(Choice("same", np.full((2, 2, 90), -3, np.float32), (720, 500), 33)),
    slow(Choice("one", draw(2, 2, 70), (1, 560), 1)),
    slow(Choice("minus infinity", MINUS, (555,), 64)),
    slow(Choice("all", draw(1, 2, 9), (72,), 30)),
    # more pages than a square of chunks, more of them chosen than are packed at a time, and more rows than sublanes
    slow(Choice("large", draw(1, 9, 4500, values=40), (35_000,), 200)),
]


class PageSelection:
    implementation: str

    def choose(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        def operation(scores, entries, most, implementation):
            chosen = page_selection(
                scores, entries, page_size=PAGE, count=choice.count, most=most, implementation=implementation
            )
            return jnp.stack([chosen.units, chosen.chosen.astype(jnp.int32)])

        units, chosen = run(self.implementation, operation, *choice.arrays)
        return units.astype(int), chosen.astype(bool)

    @pytest.mark.parametrize("choice", CHOICES, ids=str)
    def test_the_best_pages_are_kept_and_of_equal_ones_the_earlier(self, choice: Choice):
        units, chosen = self.choose(choice)
        slots, rows, pages = choice.scores.shape
        assert units.shape == chosen.shape == (slots, rows, min(choice.count, pages))
        assert ((units >= 0) & (units < pages)).all()
        for slot, row in np.ndindex(slots, rows):
            retained = units[slot, row][chosen[slot, row]].tolist()
            assert sorted(retained) == choice.expected(slot, row)
            newest = choice.eligible(slot) - 1
            dropped = [page for page in range(newest) if page not in retained]  # of the others, none is better
            scores = choice.scores[slot, row]
            lowest = min((scores[page] for page in retained if page != newest), default=np.inf)
            assert all(scores[page] <= lowest for page in dropped) or not retained
            assert newest in retained or not retained
            self.check_order(scores, retained, newest)

    def check_order(self, scores: np.ndarray, retained: list[int], newest: int) -> None:
        """Kernels give the pages by their index, which spares them a sort."""
        assert retained == sorted(retained)


class TestReference(PageSelection):
    implementation = "reference"

    def check_order(self, scores: np.ndarray, retained: list[int], newest: int) -> None:
        assert not retained or retained[0] == newest
        assert np.all(np.diff(scores[retained[1:]]) <= 0)

    def test_it_chooses_as_the_engines_method_does(self):
        choice = CHOICES[0]
        scores, entries, most = choice.arrays
        method = HybridPages(choice.count * PAGE, PAGE)
        slots, rows, pages = scores.shape
        empty = jnp.zeros((slots, rows, pages * PAGE, 1))
        positions = jnp.broadcast_to(jnp.arange(pages * PAGE), empty.shape[:3])
        ops = dataclasses.replace(REFERENCE_OPS, page_scores=lambda pages, page_size: scores)
        view = page_view(empty[:, :, 0], empty, empty, positions, entries, ops=ops)
        want: ReadUnits = method.select(view, most * PAGE)
        units, chosen = self.choose(choice)
        np.testing.assert_array_equal(chosen, want.chosen)
        np.testing.assert_array_equal(units[chosen], np.asarray(want.units)[chosen])


class TestTpu(PageSelection):
    implementation = "tpu"


class TestGpu(PageSelection):
    implementation = "gpu"


@pytest.mark.parametrize(("implementation", "pages"), [("tpu", 65_537), ("gpu", 40_961)])
def test_more_pages_than_there_is_room_for_are_refused(implementation, pages):
    with pytest.raises(NotImplementedError, match=f"{pages} pages"):
        page_selection(
            jnp.zeros((1, 1, pages)), jnp.ones(1, jnp.int32), page_size=4, count=8, implementation=implementation
        )
