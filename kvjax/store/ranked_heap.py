"""A binary heap of keys by rank: any key is changed or removed in O(log n), and the smallest are read in order.

index i ── its entry is no larger than those at 2 i + 1 and 2 i + 2
"""

from typing import Any

Entry = tuple[Any, str]


class RankedHeap:
    """Keys, each with a rank; ranks of one heap compare with one another and no two are equal."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, rank: Any) -> None:
        """Adds a key, or gives it another rank."""
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self._entries)
            self._entries.append((rank, key))
            if self._entries[(place - 1) // 2] <= (rank, key):  # as for the latest in an order of time
                return
        self._sift(place, (rank, key))

    def discard(self, key: str) -> None:
        """Removes a key; no effect if it is not there."""
        place = self._places.pop(key, None)
        if place is not None:
            last = self._entries.pop()
            if place < len(self._entries):
                self._sift(place, last)

    def entry(self, index: int) -> Entry | None:
        """The rank and the key at an index, 0 for the smallest; None behind the end."""
        return self._entries[index] if index < len(self._entries) else None

    def _sift(self, place: int, entry: Entry) -> None:
        """Puts an entry where it belongs, from `place` upwards or downwards."""
        entries, places = self._entries, self._places
        while place and entry < (above := entries[(place - 1) // 2]):
            entries[place] = above
            places[above[1]] = place
            place = (place - 1) // 2
        while (child := 2 * place + 1) < len(entries):
            if child + 1 < len(entries) and entries[child + 1] < entries[child]:
                child += 1
            if entry < entries[child]:
                break
            entries[place] = entries[child]
            places[entries[place][1]] = place
            place = child
        entries[place] = entry
        places[entry[1]] = place
