"""Who holds which slot: the free pool, the radix tree, or a running request."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from scheduler_proc.memory import Usage
from scheduler_proc.radix_cache import RadixCache
from scheduler_proc.request import Request
from scheduler_proc.slot_pool import SlotPool


class InvariantError(AssertionError):
    """Slots have been lost or are held twice: a bug in the scheduler."""


class KvMemory:
    """The slot pool and the radix tree over it. With `reuse` off nothing is ever put into the tree."""

    def __init__(self, size: int, *, reuse: bool) -> None:
        self.pool = SlotPool(size)
        self.tree = RadixCache()
        self.reuse = reuse

    @property
    def available(self) -> int:
        """Slots that are free or could be made free by eviction."""
        return self.pool.free_count + self.tree.evictable_count

    def usage(self) -> Usage:
        free = self.pool.free_count
        return Usage(self.pool.size, self.pool.size - self.available, self.tree.token_count, free)

    def begin_step(self) -> None:
        pass

    def attach(self, request: Request) -> None:
        """Give a request the cached prefix it may reuse, and lock that path."""
        assert request.node is None and request.computed == 0
        if not self.reuse:
            return
        match = self.tree.match(request.admit.extra_key, request.tokens[: request.reusable])
        count = len(match.slots)
        request.slots[:count] = match.slots
        request.computed = request.tree_owned = count
        request.node = match.node
        self.tree.lock(match.node)

    def detach(self, request: Request) -> None:
        """Undo `attach` of a request that is not admitted after all."""
        if request.node is not None:
            self.tree.unlock(request.node)
            request.node = None
        request.computed = request.tree_owned = 0

    def cached_length(self, request: Request) -> int:
        """How many tokens of a request's prompt `attach` would find."""
        if not self.reuse:
            return 0
        return self.tree.match_length(request.admit.extra_key, request.tokens[: request.reusable])

    def extend(self, request: Request, count: int) -> bool:
        """Give a request slots for its next `count` tokens, evicting cached prefixes if need be.

        False, and nothing done, when not even eviction makes enough room.
        """
        missing = count - self.pool.free_count
        if missing > 0:
            if missing > self.tree.evictable_count:
                return False
            self.pool.give_back(self.tree.evict(missing))
        request.slots[request.computed : request.computed + count] = self.pool.take(count)
        return True

    def withdraw(self, request: Request, start: int, count: int) -> None:
        """Take back the slots that `extend` gave for `count` tokens, from the `start`th on: they were not computed."""
        first = request.computed + start
        self.pool.give_back(request.slots[first : first + count])

    def store(self, request: Request) -> None:
        """Put what a request has computed into the tree, and go on with the tree's slots for it."""
        if not self.reuse or request.computed == request.tree_owned:
            return
        end = request.computed
        tokens, slots = request.tokens[:end], request.slots[:end]
        match, known = self.tree.insert(request.admit.extra_key, tokens, slots)
        if known > request.tree_owned:  # another request was quicker: keep the tree's copy, drop ours
            self.pool.give_back(slots[request.tree_owned : known])
        slots[:] = match.slots
        self.tree.lock(match.node)
        if request.node is not None:
            self.tree.unlock(request.node)
        request.node = match.node
        request.tree_owned = end

    def release(self, request: Request) -> None:
        """Let go of everything a request holds; what it has computed stays in the tree."""
        if request.computed > request.length:  # of a token that nobody knows yet
            self.pool.give_back(request.slots[request.length : request.computed])
            request.computed = request.length
        request.queued = 0
        self.store(request)
        if not self.reuse:
            self.pool.give_back(request.slots[: request.computed])
        if request.node is not None:
            self.tree.unlock(request.node)
            request.node = None
        request.computed = request.tree_owned = 0

    def flush(self) -> None:
        """Empty the tree. Raises RuntimeError while a request uses it."""
        self.pool.give_back(self.tree.clear())

    def check(self, running: Iterable[Request]) -> None:
        """Raise `InvariantError` unless every slot is free, cached or owned, and exactly one of these."""
        owned = [request.slots[request.tree_owned : request.computed] for request in running]
        parts = [self.pool.free_slots(), self.tree.all_slots(), *owned]
        held = np.concatenate(parts)
        seen = np.zeros(self.pool.size, np.bool_)  # not np.unique: its sort would hold up the next request
        seen[held] = True
        if len(held) != self.pool.size or not seen.all():
            free, cached = len(parts[0]), len(parts[1])
            raise InvariantError(
                f"free {free} + cached {cached} + owned {sum(map(len, owned))} != pool {self.pool.size}, "
                f"or a slot is held twice ({np.count_nonzero(seen)} different ones)"
            )
        if len(parts[1]) != self.tree.token_count:
            raise InvariantError(f"the tree counts {self.tree.token_count} tokens and holds {len(parts[1])}")
        if not any(True for _ in running) and self.tree.locked_count:
            raise InvariantError(f"{self.tree.locked_count} cached tokens are locked while nothing runs")
