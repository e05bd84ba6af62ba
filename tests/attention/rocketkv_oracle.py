"""RocketKV in NumPy, float64, one query, one head and one token at a time: what the real thing must agree with."""

import math

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def stable_top(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest: score down, then index up."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


# Stage 1


def received(queries, k, length: int, observed: int, scale: float) -> np.ndarray:
    """[H, length]: the weight each token gets from the last `observed` of the queries of positions before `length`."""
    window, heads, _ = queries.shape
    group = heads // k.shape[0]
    out = np.zeros((heads, length))
    for head in range(heads):
        for position in range(length - observed, length):
            query = queries[position - (length - window), head].astype(np.float64)
            seen = k[head // group, : position + 1].astype(np.float64)
            out[head, : position + 1] += softmax(seen @ query * scale)
    return out


def pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    reach = kernel // 2
    return np.array([scores[max(0, i - reach) : i + reach + 1].max() for i in range(len(scores))])


def stage1_scores(queries, k, length, observed, scale, kernel, per_head=False) -> list[np.ndarray]:
    """For each row the pooled scores of the tokens before the window."""
    weights = received(queries, k, length, observed, scale)
    if not per_head:
        weights = weights.reshape(k.shape[0], -1, length).sum(axis=1)
    weights = weights[:, : length - observed]
    return [pooled(row, kernel) if len(row) else row for row in weights]


def eviction(queries, k, length, observed, scale, kernel, max_retained, per_head=False) -> list[list[int]]:
    """For each row the kept positions, ascending."""
    if length <= max_retained:
        rows = queries.shape[1] if per_head else k.shape[0]
        return [list(range(length))] * rows
    window = list(range(length - observed, length))
    scores = stage1_scores(queries, k, length, observed, scale, kernel, per_head)
    return [sorted(stable_top(row, max_retained - observed)) + window for row in scores]


def streaming(length: int, sinks: int, max_retained: int) -> list[int]:
    """The first `sinks` positions and as many of the last as make up `max_retained`."""
    return [position for position in range(length) if position < sinks or position >= length - (max_retained - sinks)]


# Stage 2, for one kv head: q [G, D], keys [n, D] that exist


def pages_of(keys: np.ndarray, page_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Elementwise (max, min) of each page."""
    starts = range(0, len(keys), page_size)
    return [(keys[s : s + page_size].max(axis=0), keys[s : s + page_size].min(axis=0)) for s in starts]


def hybrid(q: np.ndarray, keys: np.ndarray, page_size: int, dims: int) -> np.ndarray:
    """The paper's score of each token [n]."""
    q, keys = q.astype(np.float64), keys.astype(np.float64)
    group, head_dim = q.shape
    importance = sum(abs(q[g]) for g in range(group))
    total = sum(q[g] for g in range(group))
    best = stable_top(importance, dims)
    pages = pages_of(keys, page_size)
    shares = []
    for g in range(group):
        logits = []
        for token in range(len(keys)):
            maximum, minimum = pages[token // page_size]
            logits.append(sum(q[g, d] * (maximum[d] if total[d] > 0 else minimum[d]) for d in best))
        tau = math.sqrt(head_dim * sum(abs(q[g, d]) for d in best) / sum(abs(q[g])))
        shares.append(softmax(np.array(logits) / tau))
    return sum(shares) / group


def sparq(q: np.ndarray, keys: np.ndarray, dims: int) -> np.ndarray:
    """SparQ's estimate of the weights with a shared set of dims, averaged over the group [n]."""
    q, keys = q.astype(np.float64), keys.astype(np.float64)
    best = stable_top(np.abs(q).sum(axis=0), dims)
    rows = []
    for query in q:
        tau = math.sqrt(len(query) * np.abs(query[best]).sum() / np.abs(query).sum())
        rows.append(softmax(keys[:, best] @ query[best] / tau))
    return np.mean(rows, axis=0)


def bounds_on(query: np.ndarray, keys: np.ndarray, page_size: int) -> np.ndarray:
    """For each page the largest q.k that its elementwise extremes allow, one head [P]."""
    out = []
    for maximum, minimum in pages_of(keys.astype(np.float64), page_size):
        out.append(sum(max(x * a, x * b) for x, a, b in zip(query.astype(np.float64), maximum, minimum, strict=True)))
    return np.array(out)


def engine(q: np.ndarray, keys: np.ndarray, page_size: int, scale: float) -> np.ndarray:
    """The weight of a token of each page [P]: softmax over tokens of each head's bound, averaged over the group."""
    rows = []
    for query in q:
        logits = np.repeat(bounds_on(query, keys, page_size), page_size)[: len(keys)] * scale
        rows.append(softmax(logits)[::page_size])
    return np.mean(rows, axis=0)


def exact(q: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """Mean over the group of the attention weights [n]."""
    return np.mean([softmax(keys.astype(np.float64) @ query.astype(np.float64) * scale) for query in q], axis=0)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, chosen: list[int], scale: float) -> np.ndarray:
    """Exact attention of all heads over the chosen tokens [G, D]."""
    keys, values = keys[chosen].astype(np.float64), values[chosen].astype(np.float64)
    return np.stack([softmax(keys @ query.astype(np.float64) * scale) @ values for query in q])


# What a step reads of one kv head


def decided(scores: np.ndarray, count: int, slack: float) -> bool:
    """Whether scores that are off by less than `slack` still have the same `count` best: a gap, or true equals."""
    if not 0 < count < len(scores):
        return True
    order = np.sort(scores)[::-1]
    last = order[count - 1]
    return bool(last - order[count] > slack or (order[abs(order - last) <= slack] == last).all())


def best_pages(scores: np.ndarray, held: int, page_size: int, tokens: int) -> list[int]:
    """The page that is being written and the best of the others, as many as make up `tokens` entries."""
    written = (held - 1) // page_size
    others = [page for page in stable_top(scores, len(scores)) if page != written]
    return sorted([written, *others[: tokens // page_size - 1]])


def entries_of(pages: list[int], held: int, page_size: int) -> list[int]:
    return [entry for entry in range(held) if entry // page_size in pages]
