"""The radix tree over token prefixes: which slots already hold the keys and values of a prompt's beginning.

Every edge carries a run of tokens and the slots of their KV; two sequences that begin alike share the path of
what they have in common. Nodes on the path of a running request are locked by reference count; what is not
locked may be evicted, least recently used leaf first. After RadixAttention (Zheng et al., 2024,
"SGLang: Efficient Execution of Structured Language Model Programs").
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler_proc.slot_pool import Slots

Tokens = NDArray[np.int32]

_NO_TOKENS: Tokens = np.empty(0, np.int32)


class Node:
    """A node and the edge that leads to it: `tokens` and their `slots`, equally long."""

    __slots__ = ("children", "last_used", "locks", "number", "parent", "slots", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, slots: Slots, last_used: int, number: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.last_used = last_used
        self.number = number


@dataclass(frozen=True, slots=True)
class Match:
    """A cached prefix: the node where it ends and the slots of its tokens (int32, one a token)."""

    node: Node
    slots: Slots


def shared_length(a: Tokens, b: Tokens) -> int:
    """How many leading tokens `a` and `b` have in common."""
    length = min(len(a), len(b))
    if length == 0 or a[0] != b[0]:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


class RadixCache:
    """The tree. Sequences in different `space`s (LoRA, extra_key) never share anything.

    token_count: tokens in the tree. locked_count: those on a locked path.
    """

    def __init__(self) -> None:
        self.token_count = 0
        self.locked_count = 0
        self._roots: dict[str | None, Node] = {}
        self._clock = 0
        self._numbers = itertools.count()
        self._leaves: list[tuple[int, int, Node]] = []
        self._node_count = 0

    @property
    def evictable_count(self) -> int:
        return self.token_count - self.locked_count

    def match(self, space: str | None, tokens: Tokens) -> Match:
        """The longest cached prefix of `tokens`. Nodes are split so that it ends at a node."""
        root = self._roots.get(space)
        if root is None:
            return Match(Node(None, _NO_TOKENS, _NO_TOKENS, 0, -1), _NO_TOKENS)
        node, slots = self._walk(root, tokens)
        return Match(node, np.concatenate(slots) if slots else _NO_TOKENS)

    def match_length(self, space: str | None, tokens: Tokens) -> int:
        """Length of the longest cached prefix, leaving the tree and its order of use as they are."""
        node = self._roots.get(space)
        done = 0
        while node is not None and done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            common = shared_length(child.tokens, tokens[done:])
            done += common
            if common < len(child.tokens):
                break
            node = child
        return done

    def insert(self, space: str | None, tokens: Tokens, slots: Slots) -> tuple[Match, int]:
        """Put a sequence in. Returns its path and how many leading tokens were in the tree before.

        The tree owns `slots[known:]` from now on; for the first `known` tokens it keeps its own slots
        (the match has them), and the caller's, where they differ, stay the caller's.
        """
        root = self._roots.get(space)
        if root is None:
            root = self._roots[space] = Node(None, _NO_TOKENS, _NO_TOKENS, 0, next(self._numbers))
        node, path = self._walk(root, tokens)
        known = sum(len(part) for part in path)
        if known < len(tokens):
            rest = slots[known:].copy()
            child = Node(node, tokens[known:].copy(), rest, self._clock, next(self._numbers))
            node.children[int(tokens[known])] = child
            self.token_count += len(rest)
            self._node_count += 1
            path.append(rest)
            node = child
            self._offer(node)
        return Match(node, np.concatenate(path) if path else _NO_TOKENS), known

    def lock(self, node: Node) -> None:
        """Keep the path to `node` from eviction until `unlock`."""
        for step in _path_to_root(node):
            if step.locks == 0:
                self.locked_count += len(step.tokens)
            step.locks += 1

    def unlock(self, node: Node) -> None:
        for step in _path_to_root(node):
            step.locks -= 1
            if step.locks == 0:
                self.locked_count -= len(step.tokens)
                self._offer(step)

    def evict(self, count: int) -> Slots:
        """Drop least recently used unlocked leaves until at least `count` tokens are gone, or no more can go.

        Returns their slots, which are the caller's now.
        """
        freed: list[Slots] = []
        missing = count
        while missing > 0 and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if node.last_used != last_used or not self._is_evictable(node):
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[int(node.tokens[0])]
            node.parent = None
            self.token_count -= len(node.tokens)
            self._node_count -= 1
            missing -= len(node.tokens)
            freed.append(node.slots)
            self._offer(parent)
        for space in [space for space, root in self._roots.items() if not root.children]:
            del self._roots[space]
        return np.concatenate(freed) if freed else _NO_TOKENS

    def clear(self) -> Slots:
        """Drop everything. Returns all slots. Raises RuntimeError while a path is locked."""
        if self.locked_count:
            raise RuntimeError(f"{self.locked_count} cached tokens are in use")
        slots = self.all_slots()
        self._roots.clear()
        self._leaves.clear()
        self.token_count = 0
        self._node_count = 0
        return slots

    def all_slots(self) -> Slots:
        """The slots of every token in the tree, in no particular order."""
        parts = [node.slots for node in self.nodes()]
        return np.concatenate(parts) if parts else _NO_TOKENS

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _walk(self, root: Node, tokens: Tokens) -> tuple[Node, list[Slots]]:
        """Follow `tokens` as far as the tree goes, marking the path as used; split where it ends inside an edge."""
        self._clock += 1
        node = root
        path: list[Slots] = []
        done = 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            common = shared_length(child.tokens, tokens[done:])
            if common < len(child.tokens):
                child = self._split(child, common)
            self._use(child)
            path.append(child.slots)
            done += common
            node = child
        return node, path

    def _split(self, node: Node, length: int) -> Node:
        """Cut the edge to `node` after `length` tokens; returns the new upper node."""
        assert node.parent is not None
        upper = Node(
            node.parent, node.tokens[:length].copy(), node.slots[:length].copy(), node.last_used, next(self._numbers)
        )
        upper.locks = node.locks
        upper.children[int(node.tokens[length])] = node
        node.parent.children[int(node.tokens[0])] = upper
        node.parent = upper
        node.tokens = node.tokens[length:].copy()  # copies: a view would keep the whole run alive
        node.slots = node.slots[length:].copy()
        self._node_count += 1
        return upper

    def _use(self, node: Node) -> None:
        node.last_used = self._clock
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Enter `node` into the heap of eviction candidates, if it is one. Older entries of it become stale."""
        if not self._is_evictable(node):
            return
        heapq.heappush(self._leaves, (node.last_used, node.number, node))
        if len(self._leaves) > 1024 + 4 * self._node_count:
            self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        fresh = {entry[1]: entry for entry in self._leaves if entry[0] == entry[2].last_used}
        self._leaves = [entry for entry in fresh.values() if self._is_evictable(entry[2])]
        heapq.heapify(self._leaves)

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return not node.children and node.locks == 0 and node.parent is not None


def _path_to_root(node: Node) -> Iterator[Node]:
    step: Node | None = node
    while step is not None and step.parent is not None:
        yield step
        step = step.parent
