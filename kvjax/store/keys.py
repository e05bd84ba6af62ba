"""Block keys: everything that decided the values of a block of KV, hashed.

    key(i) = SHA256(key(i - 1) || tokens of block i as little-endian int32)        key(-1) = the namespace's root

A key says all tokens from the first on, so blocks are shared by prefix and by nothing else. SHA-256 over explicit
bytes: no process, no hash seed and no machine has keys of its own.

Where decode steps have computed KV, the chain leaves that of dense prefill, and everything behind is computed from it:

    key(i) = SHA256(fork(key(i - 1)) || tokens of block i)        fork(key) = SHA256(key || root with the profile)

at the first such block only. Whoever does not know the profile never finds one, and no dense block is hidden by it.
"""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Integer

BLOCK_TOKENS = 256  # tokens: the unit of hashing, storing and hitting
FORMAT = "kvjax-kv-2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Namespace:
    """What two runs must share, beside the tokens, for the KV of one to be that of the other, bit for bit.

    Attributes:
        weights: digest of the checkpoint's configuration and tensors.
        tokenizer: digest of its files.
        rope: of the rotary embedding, which is applied to stored keys.
        numerics: what decides how sums are rounded: compiler, device, and the shapes that it computes with.
        dtype: of K and V.
        shape: layers, kv heads and head dim.
        adapter: of fine-tuned weights on top; "" for none.
        profile: digest of the method and budget profile of KV that decode steps computed; "" for that of dense prefill.
    """

    weights: str
    tokenizer: str
    rope: str
    numerics: str
    dtype: str
    shape: str
    adapter: str = ""
    profile: str = ""

    def root(self, salt: str = "") -> bytes:
        """The key before the first block of everything that a tenant of this `salt` stores."""
        digest = hashlib.sha256()
        fields = {"format": FORMAT, "block": str(BLOCK_TOKENS), **dataclasses.asdict(self), "salt": salt}
        for name, value in fields.items():
            for part in (name.encode(), value.encode("utf-8", "surrogatepass")):
                digest.update(len(part).to_bytes(4, "little") + part)  # no two lists of fields are the same bytes
        return digest.digest()

    def fork(self, key: bytes, profile: str) -> bytes:
        """The key that stands for `key` before the first block in which a decode step of this `profile` had part.

        The tenant's salt is in `key` already.
        """
        return hashlib.sha256(key + dataclasses.replace(self, profile=profile).root()).digest()


@dataclasses.dataclass(frozen=True)
class BlockKey:
    """A block by what it holds. Each field is 32 bytes, but for a `previous` of none.

    Attributes:
        key: what it is found by.
        parent: what its key goes on from: a root, a fork, or the key of the block before it.
        tokens: SHA-256 of its tokens.
        previous: key of the block before it, without which it is of no use; b"" for the first of a prompt.
    """

    key: bytes
    parent: bytes
    tokens: bytes
    previous: bytes = b""

    @classmethod
    def chain(
        cls, root: bytes, tokens: Integer[np.ndarray, "T"], previous: bytes = b"", *, tail: bool = False
    ) -> list["BlockKey"]:
        """The keys of all whole blocks of a prompt, behind the block `previous`.

        Args:
            tail: whether what is left over has a key as well, the last one. Its length is in the hash.

        Raises:
            ValueError: a token id does not fit int32.
        """
        keys, parent = [], root
        end = len(tokens) if tail else len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        for start in range(0, end, BLOCK_TOKENS):
            read = _token_bytes(tokens[start : start + BLOCK_TOKENS])
            key = cls(hashlib.sha256(parent + read).digest(), parent, hashlib.sha256(read).digest(), previous)
            keys.append(key)
            parent = previous = key.key
        return keys

    @property
    def hex(self) -> str:
        """The key as tiers spell it."""
        return self.key.hex()


def _token_bytes(tokens: Integer[np.ndarray, "T"]) -> bytes:
    """Token ids as they are hashed.

    Raises:
        ValueError: an id does not fit int32.
    """
    wide = np.asarray(tokens, np.int64)
    if wide.size and not (wide.min() >= -(1 << 31) and wide.max() < 1 << 31):
        raise ValueError(f"token ids must fit int32, got {wide.min()} to {wide.max()}")
    return wide.astype("<i4").tobytes()
