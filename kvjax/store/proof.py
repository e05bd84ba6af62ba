"""Proof of stored blocks for tools: header first, so that nothing is read for what an object only claims to be."""

import numpy as np

from kvjax.store.block import PAGE, Blob, BlockLayout, CorruptBlockError, header_bytes
from kvjax.store.folder import NotAFileError
from kvjax.store.keys import BlockKey
from kvjax.store.tier import Stored, Tier, TierError

MOST_BLOCK = 2 << 30  # bytes: what claims to be larger is no block


def read_block(tier: Tier, stored: Stored) -> tuple[Blob, BlockKey] | None:
    """The bytes of an object, proven to be the block of its key; None if it has gone meanwhile.

    Raises:
        CorruptBlockError: it is no block, not an unharmed one, or that of another key.
        TierError: it cannot be read, which says nothing about it.
    """
    try:
        claimed = read_header(tier, stored)
        if claimed is None:
            return None
        layout, key = claimed
        blob = np.empty(layout.nbytes, np.uint8)
        if not tier.read(stored.key, memoryview(blob)):
            return None
    except MemoryError as error:
        raise TierError("io", f"no memory for {stored.nbytes} bytes") from error
    except TierError as error:
        if error.reason == "length":
            raise CorruptBlockError(str(error)) from error
        raise
    layout.check(blob, key)
    return blob, key


def read_header(tier: Tier, stored: Stored) -> tuple[BlockLayout, BlockKey] | None:
    """Layout and key that the header of an object says, as far as its length and its name agree; None if it has gone.

    Raises:
        CorruptBlockError, TierError: as `read_block`.
    """
    try:
        head = tier.peek(stored.key, PAGE)
        if head is not None and (need := 8 + header_bytes(np.frombuffer(head, np.uint8))) > len(head):
            head = tier.peek(stored.key, need)
    except NotAFileError as error:
        raise CorruptBlockError(str(error)) from error
    if head is None:
        return None
    layout, key = BlockLayout.read_header(np.frombuffer(head, np.uint8))
    check_claim(layout, stored.nbytes)
    if key.hex != stored.key:
        raise CorruptBlockError(f"it is the block {key.hex}")
    return layout, key


def check_claim(layout: BlockLayout, nbytes: int) -> None:
    """Raises CorruptBlockError unless an object of so many bytes can have this layout; 0 if they are not known."""
    if layout.nbytes > MOST_BLOCK:
        raise CorruptBlockError(f"a block of {layout.nbytes} bytes, and none has more than {MOST_BLOCK}")
    if nbytes and nbytes != layout.nbytes:
        raise CorruptBlockError(f"{nbytes} bytes instead of {layout.nbytes}")
