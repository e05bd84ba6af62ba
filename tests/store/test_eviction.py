"""Orders of eviction, each against a list kept by hand."""

import pytest

from kvjax.store.eviction import POLICIES


def after(policy, *events):
    made = POLICIES[policy]()
    for event in events:
        getattr(made, {"+": "add", "*": "use", "-": "remove"}[event[0]])(event[1:])
    return "".join(made.order())


@pytest.mark.parametrize(("policy", "order"), [("fifo", "abcd"), ("lru", "bdca"), ("lfu", "dbca"), ("arc", "dbca")])
def test_who_leaves_first(policy, order):
    events = ["+a", "+b", "+c", "+x", "*a", "*b", "*c", "+d", "*a", "-x", "*c", "*a"]
    assert after(policy, *events) == order


@pytest.mark.parametrize("policy", POLICIES)
def test_what_has_left_is_not_in_the_order(policy):
    assert after(policy, "+a", "+b", "*a", "-a") == "b"
    assert after(policy, "+a", "-a", "-a") == ""
    assert after(policy, "+a", "-a", "+a") == "a"


def test_arc_keeps_what_is_used_again_from_a_scan():
    policy = POLICIES["arc"]()
    for key in "ab":
        policy.add(key)
        policy.use(key)
    for number in range(50):  # each is read once; four fit
        policy.add(f"s{number}")
        if number >= 2:
            policy.remove(next(iter(policy.order())))
    assert {"a", "b"} <= set(policy.order())


def test_arc_learns_that_its_list_of_keys_used_once_is_too_short():
    policy = POLICIES["arc"]()
    for key in "abcd":
        policy.add(key)
    for key in "ab":  # thrown out too soon: each return gives those used once one more place
        policy.remove(key)
        policy.add(key)
    assert list(policy.order()) == ["a", "b", "c", "d"]
    policy.add("e")  # one more than they have places
    assert list(policy.order()) == ["c", "d", "e", "a", "b"]
