"""A byte n-gram with Witten-Bell smoothing: the baseline, by counting alone, that a model of code must beat.

P(b | context) = (count(context b) + kinds(context) * P(b | shorter context)) / (count(context) + kinds(context)),
where kinds(context) is how many different bytes were seen after it; below the empty context all 256 bytes are
equally likely. An unseen context says nothing, and the shorter one decides.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8


@dataclass(frozen=True)
class Counts:
    """Grams of one length as sorted numbers in base 256, and their contexts, the first bytes of each."""

    grams: Integer[np.ndarray, "N"]
    counts: Int[np.ndarray, "N"]
    contexts: Integer[np.ndarray, "C"]
    totals: Int[np.ndarray, "C"]
    kinds: Int[np.ndarray, "C"]


class ByteNgram:
    """Counts the grams of up to `order` bytes of some texts.

    Raises:
        ValueError: `order` outside 1 to 7, or no bytes at all.
    """

    def __init__(self, texts: list[bytes], order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"order is {order}, must be 1 to 7 bytes for a gram to fit into an int64")
        if not any(texts):
            raise ValueError("no bytes to count: give at least one text")
        self.order = order
        self._levels = [self._count([_grams(text, size) for text in texts]) for size in range(1, order + 1)]

    @staticmethod
    def _count(grams: list[Int[np.ndarray, "_"]]) -> Counts:
        # texts one by one, so that no gram runs over the end of one into the next
        unique, counts = np.unique(np.concatenate(grams), return_counts=True)
        contexts, first, kinds = np.unique(unique >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(counts) else counts
        return Counts(unique, counts, contexts, totals, kinds)

    def probabilities(self, contexts: list[bytes], following: UInt8[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """P(b | context) for each pair; of a context only the last `order - 1` bytes count."""
        probability = np.full(len(contexts), 1 / 256)
        for size, level in enumerate(self._levels, 1):
            rest = np.array(
                [int.from_bytes(context[len(context) - size + 1 :], "big") for context in contexts], np.int64
            )
            known = np.array([len(context) >= size - 1 for context in contexts])
            probability = self._mixed(level, (rest << 8) | following, known, probability)
        return probability

    def bits(self, text: bytes) -> Float[np.ndarray, "N"]:
        """-log2 P of each byte of a text, after all bytes before it."""
        ids = np.frombuffer(text, np.uint8).astype(np.int64)
        probability = np.full(ids.size, 1 / 256)
        for size, level in enumerate(self._levels, 1):
            grams = np.zeros(ids.size, np.int64)
            grams[size - 1 :] = _grams(text, size)
            probability = self._mixed(level, grams, np.arange(ids.size) >= size - 1, probability)
        return -np.log2(probability)

    def line(self, context: bytes, most: int) -> bytes:
        """The likeliest byte after another, up to a line end or `most` bytes; the line end is left out.

        The first byte is no blank: a line's indentation belongs to the context, and would otherwise never end.
        """
        written, every = bytearray(context), np.arange(256, dtype=np.uint8)
        for index in range(most):
            tail = bytes(written[-self.order :])
            likely = self.probabilities([tail] * 256, every)
            if not index:
                likely[list(b" \t\n\r\f")] = 0
            best = int(np.argmax(likely))
            if best == ord("\n"):
                break
            written.append(best)
        return bytes(written[len(context) :])

    @staticmethod
    def _mixed(
        level: Counts, grams: Int[np.ndarray, "N"], known: np.ndarray, shorter: Float[np.ndarray, "N"]
    ) -> Float[np.ndarray, "N"]:
        count = _lookup(level.grams, level.counts, grams)
        total, kinds = (_lookup(level.contexts, values, grams >> 8) for values in (level.totals, level.kinds))
        mixed = (count + kinds * shorter) / np.maximum(total + kinds, 1)
        return np.where(known & (total > 0), mixed, shorter)


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The value of each query, 0 where it is none of the sorted keys."""
    if not len(keys):
        return np.zeros(len(queries), values.dtype)
    places = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[places] == queries, values[places], 0)


def _grams(text: bytes, size: int) -> Int[np.ndarray, "_"]:
    """Every run of `size` bytes as a number, first byte first."""
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    count = max(ids.size - size + 1, 0)
    grams = np.zeros(count, np.int64)
    for offset in range(size):
        grams = (grams << 8) | ids[offset : offset + count]
    return grams
