"""Stage 2: which entries of a view a decode step reads, and exact attention over them alone."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import decode, decode_attention
from kvjax.attention.pages import summarize
from kvjax.attention.read_units import filled_entries
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection, Selection
from tests.attention import rocketkv_oracle as oracle
from tests.attention.views import page_view

HEADS = {"mha": (2, 2), "mqa": (4, 1), "gqa3": (6, 2), "gqa4": (8, 2)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@dataclasses.dataclass
class Step:
    """The arguments of one decode step over views that are NaN wherever they hold nothing."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray
    entries: np.ndarray

    @classmethod
    def draw(cls, heads: str, dim: int, capacity: int, entries: tuple[int, ...], seed: int = 0) -> "Step":
        count, kv_heads = HEADS[heads]
        slots = len(entries)
        q, k, v = (normal(seed + i, slots, n, *rest) for i, n, rest in _shapes(count, kv_heads, capacity, dim))
        places = np.where(np.arange(capacity) < np.array(entries)[:, None], 3 * np.arange(capacity), -1)
        positions = np.broadcast_to(places[:, None], k.shape[:3]).astype(np.int32)
        k[positions < 0] = v[positions < 0] = np.nan
        return cls(q, k, v, positions, np.array(entries, np.int32))

    def slot(self, index: int) -> "Step":
        return Step(*(x[index : index + 1] for x in dataclasses.astuple(self)))

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def heads_of(self, slot: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries [G, D] and the keys and values [n, D] that exist of one kv head."""
        group, held = self.q.shape[1] // self.k.shape[1], self.entries[slot]
        return self.q[slot, head * group : (head + 1) * group], self.k[slot, head, :held], self.v[slot, head, :held]


def _shapes(heads, kv_heads, capacity, dim):
    return [(0, heads, (dim,)), (1, kv_heads, (capacity, dim)), (2, kv_heads, (capacity, dim))]


@functools.partial(jax.jit, static_argnames="method")
def run(method: Selection, q, k, v, positions, entries):
    """Scores, selection, output."""
    bounds = summarize(k, filled_entries(positions, entries), method.summary) if method.summary else None
    pages = page_view(q, k, v, positions, entries, bounds)
    return method.score(pages), method.select(pages), decode.attend(pages, method).reshape(q.shape)


def rows_read(method: Selection, chosen, slot: int, row: int, held: int) -> list[int]:
    """The entries that a row reads, ascending."""
    units = np.asarray(chosen.units)[slot, row][np.asarray(chosen.chosen)[slot, row]]
    assert len(set(units)) == len(units)
    read = np.sort((units[:, None] * method.unit + np.arange(method.unit)).ravel())
    return [int(i) for i in read if i < held]


def expected_scores(method: Selection, step: Step, slot: int, row: int) -> np.ndarray:
    """Of each unit, from the oracle."""
    group = step.q.shape[1] // step.k.shape[1]
    q, keys, _ = step.heads_of(slot, row // group if method.per_head else row)
    if isinstance(method, HybridTokens):
        return oracle.hybrid(q, keys, method.page_size, method.dims)
    if isinstance(method, HybridPages):
        return oracle.engine(q, keys, method.page_size, step.scale)
    if isinstance(method, QuestSelection):
        return oracle.bounds_on(q[row % group], keys, method.page_size)
    if method.per_head:
        return keys.astype(np.float64) @ q[row % group] * step.scale
    return oracle.exact(q, keys, step.scale)


def check(method: Selection, step: Step):
    """Scores agree with the oracle; every unit read scores at least what one that is not does; outputs agree."""
    scores, chosen, out = run(method, *dataclasses.astuple(step))
    scores, out = np.asarray(scores), np.asarray(out)
    slots, heads, _ = step.q.shape
    group = heads // step.k.shape[1]
    for slot in range(slots):
        held = int(step.entries[slot])
        if not held:
            assert (out[slot] == 0).all()
            continue
        for row in range(scores.shape[1]):
            want = expected_scores(method, step, slot, row)
            size = np.abs(want).max() if method.per_head else 0  # logits pass through zero, weights do not
            np.testing.assert_allclose(scores[slot, row, : len(want)], want, rtol=2e-5, atol=2e-6 * size)
            read = rows_read(method, chosen, slot, row, held)
            units = -(-held // method.unit)
            count = min(method.tokens // method.unit, units)
            assert len({i // method.unit for i in read}) == count
            assert len(read) <= method.tokens
            inside = np.zeros(units, bool)
            inside[[i // method.unit for i in read]] = True
            competing = inside.copy()
            if method.always_newest_page:
                assert inside[-1]
                competing[-1] = False
            if competing.any() and not inside.all():
                assert want[competing].min() >= want[~inside].max() - 4e-5 * np.abs(want).max()
            seen = list(range(held)) if held <= method.dense_threshold else read
            every = [row] if method.per_head else range(row * group, (row + 1) * group)
            q, keys, values = step.q[slot, list(every)], *step.heads_of(slot, every[0] // group)[1:]
            np.testing.assert_allclose(
                out[slot, list(every)], oracle.attend(q, keys, values, seen, step.scale), rtol=5e-4, atol=5e-4
            )


@pytest.mark.parametrize(
    ("heads", "dim", "page_size", "dims"),
    [
        ("mha", 64, 1, 17),
        ("mqa", 128, 2, 60),
        ("gqa3", 128, 3, 67),
        ("gqa4", 64, 3, 64),
        ("gqa3", 64, 1, 33),
        ("gqa4", 128, 2, 1),
    ],
)
def test_tokens_agree_with_numpy(heads, dim, page_size, dims):
    """Slots of unlike lengths, one empty, one that fits what is read, one full; some pages are partial."""
    check(HybridTokens(12, dims, page_size), Step.draw(heads, dim, 40, (40, 0, 11, 31)))


@pytest.mark.parametrize(
    ("heads", "dim", "page_size"), [("mha", 64, 4), ("mqa", 128, 8), ("gqa3", 128, 16), ("gqa4", 64, 4)]
)
@pytest.mark.parametrize("kind", [HybridPages, QuestSelection])
def test_pages_agree_with_numpy(kind, heads, dim, page_size):
    check(kind(3 * page_size + 1, page_size), Step.draw(heads, dim, 96, (96, 0, 1, 3 * page_size + 2, 90)))


@pytest.mark.parametrize("heads", ["mha", "gqa3"])
@pytest.mark.parametrize("shared", [True, False])
def test_exact_top_k_agrees_with_numpy(heads, shared):
    check(ExactTopK(9, shared), Step.draw(heads, 64, 40, (40, 0, 8, 31)))


@pytest.mark.parametrize(
    "method",
    [
        HybridTokens(8, 5, 3, dense_threshold=20),
        HybridPages(8, 4, dense_threshold=20),
        HybridPages(8, 4, dense_threshold=19),
        QuestSelection(8, 4, dense_threshold=20),
        ExactTopK(8, dense_threshold=64),
    ],
    ids=repr,
)
def test_a_short_slot_reads_everything_among_long_ones(method):
    check(method, Step.draw("gqa3", 8, 64, (20, 64, 19, 21, 3)))


@pytest.mark.parametrize(
    "method",
    [HybridTokens(60, 8, 1), HybridTokens(60, 8, 3), HybridPages(64, 4), QuestSelection(64, 16), ExactTopK(60)],
    ids=repr,
)
def test_reading_everything_is_dense(method):
    """All head dims and as many tokens as there are: what dense attention gives."""
    step = Step.draw("gqa3", 8, 64, (60, 1, 33))
    _, _, out = run(method, *dataclasses.astuple(step))
    dense_threshold = decode_attention(
        *(jnp.asarray(x) for x in (step.q, step.k, step.v, step.positions)),
        jnp.full(3, 1000),
        jnp.asarray(step.entries),
        scale=step.scale,
    )
    np.testing.assert_allclose(out, dense_threshold, rtol=1e-5, atol=1e-6)


def test_pages_of_one_entry_are_sparq_with_a_shared_set():
    step = Step.draw("gqa3", 64, 40, (40,))
    scores, _, _ = run(HybridTokens(9, 16, 1), *dataclasses.astuple(step))
    for head in range(2):
        q, keys, _ = step.heads_of(0, head)
        np.testing.assert_allclose(scores[0, head], oracle.sparq(q, keys, 16), rtol=2e-5)


@pytest.mark.parametrize("page_size", [2, 3])
def test_one_head_and_all_dims_rank_as_quest_does(page_size):
    """With G = 1 the shared sign is the head's own: the product is QuestSelection's bound, and tau is sqrt(D)."""
    step = Step.draw("mha", 64, 36, (36,))
    tokens, _, _ = run(HybridTokens(8, 64, page_size), *dataclasses.astuple(step))
    bounds, _, _ = run(QuestSelection(12, page_size), *dataclasses.astuple(step))
    pages, _, _ = run(HybridPages(12, page_size), *dataclasses.astuple(step))
    spread = np.repeat(np.asarray(bounds) / 8, page_size, axis=2)
    want = np.stack([oracle.softmax(row) for row in spread[0].astype(np.float64)])
    np.testing.assert_allclose(tokens[0], want, rtol=2e-5)
    np.testing.assert_allclose(np.repeat(pages, page_size, axis=2)[0], want, rtol=2e-5)


def test_the_bound_bounds():
    step = Step.draw("gqa3", 16, 32, (30,))
    bounds, _, _ = run(QuestSelection(8, 4), *dataclasses.astuple(step))
    for head in range(6):
        logits = step.heads_of(0, head // 3)[1] @ step.q[0, head]
        assert (np.repeat(np.asarray(bounds)[0, head], 4)[:30] >= logits - 1e-5).all()


@hypothesis.given(
    method=st.sampled_from(
        [HybridTokens(7, 5, 3), HybridTokens(7, 8, 1, dense_threshold=9), HybridPages(8, 4), QuestSelection(9, 4)]
    ),
    entries=st.tuples(*[st.integers(0, 24)] * 3),
    seed=st.integers(0, 1000),
)
def test_any_batch(method, entries, seed):
    step = Step.draw("gqa3", 8, 24, entries, seed)
    check(method, step)


@pytest.mark.parametrize(
    "method",
    [HybridTokens(7, 5, 3, dense_threshold=9), HybridPages(8, 4), QuestSelection(8, 4), ExactTopK(8, False)],
    ids=repr,
)
def test_a_row_of_a_batch_is_what_it_is_alone(method):
    step = Step.draw("gqa3", 8, 24, (24, 9, 0, 17))
    _, chosen, out = run(method, *dataclasses.astuple(step))
    for slot in range(4):
        _, alone, one = run(method, *dataclasses.astuple(step.slot(slot)))
        np.testing.assert_array_equal(chosen.chosen[slot], alone.chosen[0])
        np.testing.assert_array_equal(
            np.where(chosen.chosen[slot], chosen.units[slot], -1), np.where(alone.chosen[0], alone.units[0], -1)
        )
        np.testing.assert_allclose(out[slot], one[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "method", [HybridTokens(6, 8, 2), HybridPages(8, 4), QuestSelection(8, 4), ExactTopK(6)], ids=repr
)
def test_ties_go_to_the_earlier_entry(method):
    """All keys alike: the first ones are read, and with pages the newest in place of the last of them."""
    step = Step.draw("gqa3", 8, 24, (22,))
    step.k[:, :, :22] = step.k[:, :, :1]
    _, chosen, _ = run(method, *dataclasses.astuple(step))
    pages = [0, 1, 2, 3, 20, 21] if method.always_newest_page else [0, 1, 2, 3, 4, 5]
    for row in range(chosen.units.shape[1]):
        assert rows_read(method, chosen, 0, row, 22) == pages


@pytest.mark.parametrize(
    "method", [HybridTokens(6, 3, 2), HybridPages(8, 4), QuestSelection(8, 4), ExactTopK(6)], ids=repr
)
def test_a_query_of_zeros_is_finite(method):
    step = Step.draw("gqa3", 8, 24, (22, 5))
    step.q[:] = 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(method, *dataclasses.astuple(step))[2]))


def test_heads_may_hold_unlike_numbers_of_tokens():
    """An entry without a position in one head of a slot is neither scored nor read there."""
    step = Step.draw("gqa3", 8, 24, (20,))
    positions = step.positions.copy()
    positions[0, 1, 5:17] = -1
    step.k[0, 1, 5:17] = step.v[0, 1, 5:17] = np.nan
    step.positions = positions
    left = [*range(5), *range(17, 20)]
    for method in (HybridTokens(12, 8, 3), HybridPages(12, 4), QuestSelection(12, 4), ExactTopK(12)):
        _, chosen, out = run(method, *dataclasses.astuple(step))
        rows = range(3, 6) if method.per_head else [1]
        for row in rows:
            assert set(rows_read(method, chosen, 0, row, 20)) - set(range(5, 17)) == set(left)
        want = oracle.attend(step.q[0, 3:], step.k[0, 1], step.v[0, 1], left, step.scale)
        np.testing.assert_allclose(out[0, 3:], want, rtol=5e-4, atol=5e-4)


def test_half_precision_is_accumulated_in_float32():
    step = Step.draw("gqa3", 64, 48, (48, 20))
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (step.q, step.k, step.v)]
    rounded = Step(*(np.asarray(x, np.float32) for x in halves), step.positions, step.entries)
    for method in (HybridTokens(24, 33, 3), HybridPages(24, 4)):
        scores, _, out = run(method, *halves, step.positions, step.entries)
        want, _, exact = run(method, *dataclasses.astuple(rounded))
        assert out.dtype == jnp.bfloat16
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, want, rtol=1e-4)
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2e-2)


@pytest.mark.parametrize("method", [HybridPages(256, 16), HybridTokens(128, 60, 1)], ids=repr)
def test_a_view_is_neither_copied_nor_repeated(method):
    """Temporaries of a step are a fraction of one view's keys, which are not repeated over the group."""
    spec, capacity = jax.ShapeDtypeStruct, 16384
    q, k = spec((2, 8, 64), jnp.float32), spec((2, 2, capacity, 64), jnp.float32)
    positions, entries = spec((2, 2, capacity), jnp.int32), spec((2,), jnp.int32)
    bounds = spec((2, 2, capacity // 16, 2, 64), jnp.float32) if method.summary else None
    step = jax.jit(lambda *arrays: decode.attend(page_view(*arrays), method))
    memory = step.lower(q, k, k, positions, entries, bounds).compile().memory_analysis()
    assert memory.temp_size_in_bytes < k.size * 4 / 2


def test_sizes_that_make_no_sense_are_refused():
    step = Step.draw("mha", 8, 30, (30,))
    with pytest.raises(ValueError, match="capacity=30 is not a multiple of page_size=4"):
        run(HybridPages(8, 4), *dataclasses.astuple(step))
    with pytest.raises(ValueError, match="dims=9 is not in 1 to head_dim=8"):
        run(HybridTokens(8, 9), *dataclasses.astuple(step))
    with pytest.raises(ValueError, match="tokens=3"):
        HybridPages(3, 4)
    with pytest.raises(ValueError, match="page_size=0"):
        QuestSelection(3, 0)
    with pytest.raises(ValueError, match="dims=0"):
        HybridTokens(3, 0)
