"""Orders of eviction, each against a list kept by hand and against a search through everything."""

import itertools
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvjax.store.eviction import POLICIES, never


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


@pytest.mark.parametrize("policy", POLICIES)
def test_the_end_of_a_chain_leaves_first_however_often_it_is_used(policy):
    made = POLICIES[policy]()
    for key, parent in ("a", ""), ("b", "a"), ("c", "b"), ("x", ""):
        made.add(key, parent)
    for key in "cbcccbx":
        made.use(key)
    order = "".join(made.order())
    assert order.replace("x", "") == "cba"
    assert list(made.ancestors("c")) == ["b", "a"]
    assert list(made.ancestors("nobody")) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_what_stays_keeps_its_ancestors(policy):
    made = POLICIES[policy]()
    for key, parent in ("a", ""), ("b", "a"), ("c", "b"), ("d", "b"), ("x", ""):
        made.add(key, parent)
    assert set(made.order(lambda key: key == "b")) == {"c", "d", "x"}
    assert set(made.order(lambda key: key == "c")) == {"d", "x"}
    assert list(made.order(lambda key: True)) == []
    assert set(made.order()) == set("abcdx"), "a look changes nothing"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_dead_end_leaves_before_everything_else(policy):
    made = POLICIES[policy]()
    for key, parent in ("x", ""), ("a", ""), ("b", "a"), ("c", "b"):
        made.add(key, parent)
    made.remove("a")
    made.use("c")
    assert list(made.order()) == ["c", "b", "x"]
    made.add("a")
    assert list(made.order())[-1] == "a" or policy == "arc"
    assert "".join(made.order()).replace("x", "") == "cba"


def test_children_may_come_before_their_parent():
    made = POLICIES["lru"]()
    for key, parent in ("c", "b"), ("x", ""), ("b", "a"):
        made.add(key, parent)
    assert list(made.order()) == ["c", "b", "x"], "nobody can reach c and b"
    made.add("a")
    assert list(made.order()) == ["c", "x", "b", "a"]


def test_a_parent_may_become_known_later():
    made = POLICIES["lru"]()
    for key in "abc":
        made.add(key)
    made.add("b", "a")
    assert list(made.order()) == ["b", "a", "c"]
    made.add("b")
    assert list(made.order()) == ["b", "a", "c"], "what is known stays known"
    made.add("b", "c")
    assert list(made.order()) == ["a", "b", "c"]


KEYS = "abcdefghij"


class Model:
    """The order by a search through all keys for each that leaves."""

    def __init__(self, policy: str) -> None:
        self.policy, self.clock = policy, itertools.count()
        self.parents: dict[str, str] = {}
        self.uses: dict[str, int] = {}
        self.last: dict[str, int] = {}

    def add(self, key: str, parent: str) -> None:
        if key not in self.parents:
            self.uses[key], self.last[key], self.parents[key] = 0, next(self.clock), ""
        self.parents[key] = parent or self.parents[key]

    def use(self, key: str) -> None:
        if key in self.parents:
            self.uses[key] += 1
            self.last[key] = self.last[key] if self.policy == "fifo" else next(self.clock)

    def dead(self, key: str) -> bool:
        while parent := self.parents[key]:
            if parent not in self.parents:
                return True
            key = parent
        return False

    def order(self, stays) -> list[str]:
        left, taken = dict(self.parents), []
        rank = (lambda key: (self.uses[key], self.last[key])) if self.policy == "lfu" else self.last.__getitem__
        while leaves := [key for key in left if key not in left.values() and not stays(key)]:
            taken.append(min(leaves, key=lambda key: (not self.dead(key), rank(key))))
            del left[taken[-1]]
        return taken


class Trees(RuleBasedStateMachine):
    """Anything in any order, over trees in which the parent of a key is a key before it in the alphabet."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def start(self, policy):
        self.name, self.policy, self.model = policy, POLICIES[policy](), Model(policy)

    @rule(key=st.integers(0, 9), parent=st.integers(0, 9))
    def add(self, key, parent):
        parent = KEYS[parent] if parent < key else ""
        self.policy.add(KEYS[key], parent)
        self.model.add(KEYS[key], parent)

    @rule(key=st.sampled_from(KEYS))
    def use(self, key):
        self.policy.use(key)
        self.model.use(key)

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key):
        self.policy.remove(key)
        self.model.parents.pop(key, None)

    @rule(count=st.integers(1, 3), stay=st.sets(st.sampled_from(KEYS), max_size=2))
    def evict(self, count, stay):
        for key in list(itertools.islice(self.policy.order(stay.__contains__), count)):
            assert key not in self.model.parents.values(), f"{key} leaves before a descendant"
            assert key not in stay
            self.remove(key)

    @rule(stay=st.sets(st.sampled_from(KEYS), max_size=3))
    def what_stays(self, stay):
        self.look(stay.__contains__)

    @invariant()
    def everything(self):
        if hasattr(self, "policy"):
            self.look(never)
            assert len(self.policy) == len(self.model.parents)

    def look(self, stays):
        order, expected = list(self.policy.order(stays)), self.model.order(stays)
        assert sorted(order) == sorted(expected)
        for index, key in enumerate(order):
            assert self.model.parents[key] not in order[:index], "a parent leaves before its child"
        if self.name != "arc":
            assert order == expected


TestTrees = Trees.TestCase


# In a process of its own: the check of every call's types costs more than the calls.
COST = """
import gc, itertools, random, sys, time
from kvjax.store.eviction import POLICIES
def seconds_a_write(policy, keys):
    # one block leaves, one arrives and one is used, in a full tier of chains of 100
    made, rng = POLICIES[policy](), random.Random(0)
    for number in range(keys):
        made.add(f"{number:08}", f"{number - 1:08}" if number % 100 else "")
    for number in rng.sample(range(keys), keys // 10):
        made.use(f"{number:08}")
    gc.collect()
    gc.freeze()
    began = time.thread_time()
    for number in range(keys, keys + 3000):
        for key in itertools.islice(made.order(), 1):
            made.remove(key)
        made.add(f"{number:08}", f"{number - 1:08}" if number % 100 else "")
        made.use(f"{rng.randrange(keys):08}")
    return (time.thread_time() - began) / 3000
print(*(min(seconds_a_write(sys.argv[1], keys) for _ in range(2)) for keys in (10_000, 1_000_000)))
"""


@pytest.mark.slow(reason="a million keys")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_million_keys_cost_no_more_than_ten_thousand_but_for_a_logarithm(policy):
    done = subprocess.run([sys.executable, "-c", COST, policy], capture_output=True, text=True, check=True, timeout=300)
    few, many = map(float, done.stdout.split())
    assert many < 10 * few, f"{many * 1e6:.0f} against {few * 1e6:.0f} microseconds"
