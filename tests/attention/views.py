"""Views to decode from, and what each method of stage 2 must read of them: the oracle's word, method by method."""

import dataclasses

import numpy as np

from kvjax.attention.ops import REFERENCE_OPS, Ops, PageView
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection, Selection
from tests.attention import rocketkv_oracle as oracle


def page_view(q, k, v, positions, entries, bounds=None, ops: Ops = REFERENCE_OPS) -> PageView:
    """A `PageView` of queries [B, H, D] that attend from a slot's last position."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    last = positions.max(axis=(1, 2))
    return PageView(grouped, k, v, positions, last, entries, bounds, scale=q.shape[2] ** -0.5, ops=ops)


HEADS = {"mha": (2, 2), "mqa": (4, 1), "gqa3": (6, 2), "gqa4": (8, 2)}  # query heads, kv heads


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def integers(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: sums of their products are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@dataclasses.dataclass
class Views:
    """The arguments of one decode step over views that are NaN wherever they hold nothing."""

    q: np.ndarray  # [B, H, D]
    k: np.ndarray  # [B, K, C, D]
    v: np.ndarray  # [B, K, C, D]
    positions: np.ndarray  # [B, K, C]
    entries: np.ndarray  # [B]

    @classmethod
    def draw(cls, heads: str, dim: int, capacity: int, entries: tuple[int, ...], seed: int = 0, of=normal) -> "Views":
        count, kv_heads = HEADS[heads]
        slots = len(entries)
        q = of(seed, slots, count, dim)
        k, v = (of(seed + i, slots, kv_heads, capacity, dim) for i in (1, 2))
        places = np.where(np.arange(capacity) < np.array(entries)[:, None], 5 * np.arange(capacity) + 2, -1)
        positions = np.broadcast_to(places[:, None], k.shape[:3]).astype(np.int32)
        k[positions < 0] = v[positions < 0] = np.nan
        return cls(q, k, v, positions, np.array(entries, np.int32))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k, self.v, self.positions, self.entries

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def head(self, slot: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries [G, D] and the keys and values [n, D] that exist of one kv head."""
        group, held = self.q.shape[1] // self.k.shape[1], self.entries[slot]
        return self.q[slot, head * group : (head + 1) * group], self.k[slot, head, :held], self.v[slot, head, :held]


@dataclasses.dataclass
class Row:
    """What a set of query heads that select together has to read.

    Attributes:
        heads: those query heads, counted within their group.
        scores: of each unit.
        read: the entries, ascending.
        sure: whether rounding of the scores cannot change `read`.
    """

    heads: list[int]
    scores: np.ndarray
    read: list[int]
    sure: bool


def rows_of(method: Selection, q: np.ndarray, keys: np.ndarray, scale: float) -> list[Row]:
    """The rows of one kv head with queries [G, D] and keys [n, D] that exist."""
    group = range(len(q))
    if isinstance(method, HybridTokens):
        shared = oracle.hybrid(q, keys, method.page_size, method.dims)
        return [_row(method, list(group), shared, np.log(shared), len(keys))]
    if isinstance(method, HybridPages):
        shared = oracle.engine(q, keys, method.page_size, scale)
        return [_row(method, list(group), shared, np.log(shared), len(keys))]
    if isinstance(method, QuestSelection):
        each = [oracle.bounds_on(query, keys, method.page_size) for query in q]
        return [_row(method, [g], each[g], each[g] / abs(each[g]).max(), len(keys)) for g in group]
    assert isinstance(method, ExactTopK)
    if method.shared:
        shared = oracle.exact(q, keys, scale)
        return [_row(method, list(group), shared, np.log(shared), len(keys))]
    each = [keys.astype(np.float64) @ query.astype(np.float64) * scale for query in q]
    return [_row(method, [g], each[g], each[g] / abs(each[g]).max(), len(keys)) for g in group]


def _row(method: Selection, heads: list[int], scores: np.ndarray, even: np.ndarray, held: int) -> Row:
    """`even` are the scores in units in which rounding is alike for all."""
    if not method.always_newest_page:
        sure = oracle.decided(even, method.tokens, 4e-5)
        return Row(heads, scores, sorted(oracle.stable_top(scores, method.tokens)), sure)
    pages = oracle.best_pages(scores, held, method.unit, method.tokens)
    sure = oracle.decided(even[:-1], len(pages) - 1, 4e-5)
    return Row(heads, scores, oracle.entries_of(pages, held, method.unit), sure)


def read_of(method: Selection, units: np.ndarray, chosen: np.ndarray, held: int) -> list[int]:
    """The entries that a row of a selection reads, ascending."""
    units = units[chosen]
    assert len(set(units)) == len(units), "an entry is read twice"
    entries = np.sort((units[:, None] * method.unit + np.arange(method.unit)).ravel())
    return [int(entry) for entry in entries if entry < held]


def check_step(method: Selection, views: Views, scores, selection, out, slots=None) -> int:
    """Asserts that scores, what is read and the output are the oracle's; returns how many rows were beyond doubt."""
    scores, out, units, chosen = (np.asarray(x) for x in (scores, out, selection.units, selection.chosen))
    group, sure = views.q.shape[1] // views.k.shape[1], 0
    for slot in range(len(views.entries)) if slots is None else slots:
        held = int(views.entries[slot])
        if not held:
            assert (out[slot] == 0).all()
            continue
        for head in range(views.k.shape[1]):
            q, keys, values = views.head(slot, head)
            for number, row in enumerate(rows_of(method, q, keys, views.scale)):
                at = (slot, head * group + number if method.per_head else head)
                size = abs(row.scores).max() if method.per_head else 0  # logits pass through zero, weights do not
                np.testing.assert_allclose(scores[at][: len(row.scores)], row.scores, rtol=2e-5, atol=2e-6 * size)
                read = read_of(method, units[at], chosen[at], held)
                assert len(read) <= method.tokens
                assert len(read) == len(row.read)
                if row.sure:
                    assert read == row.read
                    sure += 1
                inside = np.isin(np.arange(len(row.scores)), [entry // method.unit for entry in read])
                if method.always_newest_page:
                    assert inside[-1]
                rivals = inside & (np.arange(len(inside)) < len(inside) - 1) if method.always_newest_page else inside
                if rivals.any() and not inside.all():
                    assert row.scores[rivals].min() >= row.scores[~inside].max() - 4e-5 * abs(row.scores).max()
                seen = list(range(held)) if held <= method.dense_threshold else read
                want = oracle.attend(q[row.heads], keys, values, seen, views.scale)
                got = out[slot, [head * group + g for g in row.heads]]
                np.testing.assert_allclose(got, want, rtol=5e-4, atol=5e-4)
    return sure
