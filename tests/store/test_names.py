"""Names of objects: from keys and back, and from nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.store.names import key_of, object_name
from kvjax.store.tier import TierError


@given(st.text("0123456789abcdef", min_size=4, max_size=128))
def test_there_and_back(key):
    assert object_name(key).startswith(key[:2] + "/")
    assert key_of(object_name(key)) == key


@given(st.text(max_size=20))
def test_nothing_else_is_a_name_or_a_key(text):
    if not (4 <= len(text) <= 128 and set(text) <= set("0123456789abcdef")):
        with pytest.raises(TierError, match="hexadecimal"):
            object_name(text)
    assert key_of(text) is None or object_name(key_of(text)) == text


@pytest.mark.parametrize("name", ["", "abcdef", "ac/abcdef", "x/ab/abcdef", "ab/abcdef.tmp", "ab/ABCDEF", "ab/ab\n"])
def test_strangers_are_not_taken_for_objects(name):
    assert key_of(name) is None
