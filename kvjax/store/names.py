"""Object names where names are paths: the key, in a folder of its first two digits.

So that no folder has to hold a million names, and no string of a user's ever becomes part of one.
"""

import re

from kvjax.store.tier import TierError

KEY = re.compile(r"[0-9a-f]{4,128}")


def object_name(key: str) -> str:
    """`abcdef...` as `ab/abcdef...`.

    Raises:
        TierError: it is not a key ("refused").
    """
    if not KEY.fullmatch(key):
        raise TierError("refused", f"a key is 4 to 128 lower-case hexadecimal digits, not {key!r:.80}")
    return f"{key[:2]}/{key}"


def key_of(name: str) -> str | None:
    """The key of an object called `name`, or None for a name that `object_name` does not give."""
    key = name.rpartition("/")[2]
    return key if KEY.fullmatch(key) and name == object_name(key) else None
