"""Attention in NumPy, float64, one query at a time and no cleverness: what the real thing must agree with."""

import numpy as np


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """One query head [D] over keys [T, D]; only those with `visible` [T] exist."""
    keys, values = k[visible].astype(np.float64), v[visible].astype(np.float64)
    scores = keys @ q.astype(np.float64) * scale
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def sees(asking: int, keys: np.ndarray, window: int | None) -> np.ndarray:
    """Which key positions a query sees: not the empty ones, not the later ones, not those its window has left."""
    return np.array([0 <= key <= asking and (window is None or asking - key < window) for key in keys])


def prefill(q, k, v, start: int, scale: float, window: int | None) -> np.ndarray:
    """Queries [P, H, D] of positions from `start` on, keys and values [K, T, D] of positions from 0 on."""
    group = q.shape[1] // k.shape[0]
    out = np.zeros(q.shape)
    for row in range(q.shape[0]):
        visible = sees(start + row, np.arange(k.shape[1]), window)
        for head in range(q.shape[1]):
            out[row, head] = attend(q[row, head], k[head // group], v[head // group], visible, scale)
    return out


def decode(q, k, v, positions, asking, scale: float, window: int | None) -> np.ndarray:
    """Queries [B, H, D], keys and values [B, K, C, D] of `positions` [B, K, C]; zeros where a slot sees nothing."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for slot in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv = head // group
            visible = sees(int(asking[slot]), positions[slot, kv], window)
            if visible.any():
                out[slot, head] = attend(q[slot, head], k[slot, kv], v[slot, kv], visible, scale)
    return out
