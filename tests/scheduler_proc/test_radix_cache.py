"""The radix tree against a naive model that keeps every cached token path in a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_proc.radix_cache import Node, RadixCache, shared_length

Path = tuple[int, ...]


class NaiveCache:
    """Every cached token by the path that leads to it: path → (slot, time of last use)."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str | None, Path], int] = {}

    def match(self, space: str | None, tokens: list[int]) -> list[int]:
        slots = []
        for end in range(1, len(tokens) + 1):
            slot = self.tokens.get((space, tuple(tokens[:end])))
            if slot is None:
                break
            slots.append(slot)
        return slots

    def insert(self, space: str | None, tokens: list[int], slots: list[int]) -> int:
        known = len(self.match(space, tokens))
        for end in range(known + 1, len(tokens) + 1):
            self.tokens[(space, tuple(tokens[:end]))] = slots[end - 1]
        return known


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "match", "lock", "unlock", "evict"]),
        st.sampled_from([None, "a"]),
        SEQUENCES,
        st.integers(1, 8),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS)
def test_agrees_with_a_naive_cache(operations: list[tuple[str, str | None, list[int], int]]) -> None:
    tree, naive = RadixCache(), NaiveCache()
    next_slot = 0
    locked: list[tuple[str | None, Path, Node]] = []
    for kind, space, tokens, count in operations:
        array = np.array(tokens, np.int32)
        if kind == "insert":
            slots = list(range(next_slot, next_slot + len(tokens)))
            next_slot += len(tokens)
            match, known = tree.insert(space, array, np.array(slots, np.int32))
            assert known == naive.insert(space, tokens, slots)
            assert match.slots.tolist() == naive.match(space, tokens)
        elif kind == "match":
            assert tree.match_length(space, array) == len(naive.match(space, tokens))
            assert tree.match(space, array).slots.tolist() == naive.match(space, tokens)
        elif kind == "lock":
            match = tree.match(space, array)
            tree.lock(match.node)
            locked.append((space, tuple(tokens[: len(match.slots)]), match.node))
        elif kind == "unlock" and locked:
            tree.unlock(locked.pop(count % len(locked))[2])
        elif kind == "evict":
            before = tree.evictable_count
            freed = tree.evict(count).tolist()
            assert len(freed) >= min(count, before)
            gone = set(freed)
            assert len(gone) == len(freed)
            naive.tokens = {path: slot for path, slot in naive.tokens.items() if slot not in gone}
        protected = {(s, path[:end]) for s, path, _ in locked for end in range(1, len(path) + 1)}
        assert protected <= naive.tokens.keys()
        assert sorted(tree.all_slots().tolist()) == sorted(naive.tokens.values())
        assert tree.token_count == len(naive.tokens)
        assert tree.locked_count == len(protected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), SEQUENCES), min_size=1, max_size=30))
def test_evicts_the_least_recently_used_leaf(uses: list[tuple[bool, list[int]]]) -> None:
    tree = RadixCache()
    for insert, tokens in uses:
        array = np.array(tokens, np.int32)
        if insert:
            tree.insert(None, array, np.arange(len(tokens), dtype=np.int32))
        else:
            tree.match(None, array)
    while tree.token_count:
        leaves = [node for node in tree.nodes() if not node.children]
        oldest = min(node.last_used for node in leaves)
        candidates = [node for node in leaves if node.last_used == oldest]
        tree.evict(1)
        left = {id(node) for node in tree.nodes()}
        assert sum(id(node) not in left for node in candidates) == 1
        assert all(id(node) in left for node in leaves if node not in candidates)


def test_clear_returns_every_slot_and_refuses_while_locked() -> None:
    tree = RadixCache()
    match, _ = tree.insert(None, np.array([1, 2, 3], np.int32), np.array([7, 8, 9], np.int32))
    tree.lock(match.node)
    with pytest.raises(RuntimeError, match="3 cached tokens are in use"):
        tree.clear()
    tree.unlock(match.node)
    assert sorted(tree.clear().tolist()) == [7, 8, 9]
    assert tree.token_count == 0 and tree.match_length(None, np.array([1], np.int32)) == 0


def test_an_unused_space_leaves_nothing_behind() -> None:
    tree = RadixCache()
    for number in range(100):
        tree.match(f"key {number}", np.array([1], np.int32))
        tree.insert(f"key {number}", np.array([1], np.int32), np.array([number], np.int32))
    tree.evict(100)
    assert not tree._roots


def test_heap_of_candidates_stays_small() -> None:
    tree = RadixCache()
    tokens = np.arange(10, dtype=np.int32)
    tree.insert(None, tokens, tokens)
    for _ in range(10_000):
        tree.match(None, tokens)
    assert len(tree._leaves) < 2_000


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_shared_length(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert shared_length(np.array(a, np.int32), np.array(b, np.int32)) == expected
