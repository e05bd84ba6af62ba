"""Where a chain of blocks lies: few questions to each tier, though a chain is long and an answer may be far away."""

from collections.abc import Callable, Sequence

from kvjax.store.keys import BlockKey
from kvjax.store.tier import Tier

HOST = "host"


def locate(
    names: Sequence[BlockKey],
    here: Sequence[bool],
    tiers: Sequence[Tier],
    contains: Callable[[Tier, BlockKey], bool],
    stop: Callable[[], bool],
) -> list[str]:
    """The tier of each block from the first on, up to the first that is nowhere.

    Args:
        here: which of the blocks are in host memory.
        tiers: the others, nearest first; `contains` asks one of them.
        stop: whether nobody wants to know any more.
    """
    found: list[str] = []
    while len(found) < len(names) and not stop():
        if here[len(found)]:
            found.append(HOST)
            continue
        rest = names[len(found) :]
        tier = next((tier for tier in tiers if contains(tier, rest[0])), None)
        if tier is None:
            break
        found += [tier.name] * _extent(tier, rest, contains)
    return found


def _extent(tier: Tier, names: Sequence[BlockKey], contains: Callable[[Tier, BlockKey], bool]) -> int:
    """How many blocks from the first on a tier holds, which it does hold, by bisection."""
    low, step = 1, 1
    while low < len(names) and contains(tier, names[min(low + step, len(names)) - 1]):
        low, step = min(low + step, len(names)), 2 * step
    high = min(low + step, len(names))  # the answer is in [low, high)
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if contains(tier, names[middle - 1]) else (low, middle)
    return low
