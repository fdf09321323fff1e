"""What the next step computes: all running decodes, and as many prefill chunks as the token budget holds.

Waiting requests are admitted in the order of the policy, as far as the KV pool can really hold them. When the
pool is full the youngest running request is preempted: what it has computed stays in the tree (and may be
evicted there), and it comes back from the front of the queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from scheduler_proc.memory import Memory
from scheduler_proc.radix_cache import shared_length
from scheduler_proc.request import Request

logger = logging.getLogger(__name__)

GROW_AFTER = 8
"""After so many steps that memory has sufficed for, a step may be half as large again as before."""
DECODE_RESERVE = 16
"""Slots kept in hand for the growth of each running request when another one is admitted."""
SHARED_PREFIX_WORTH_WAITING = 32
"""A request whose prompt shares this many uncached tokens with one being prefilled waits for that prefill."""
MOST_PASSED_OVER = 256
"""So many waiting requests are passed over for a shared prefill before the search for one to admit ends: each costs a
comparison of prompts, and a queue may hold thousands that begin alike."""
LPM_CANDIDATES = 128
"""Longest prefix first looks at this many waiting requests, oldest first."""


class PlannerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """prefill_budget: prompt tokens a step. chunked: a prompt may be cut to fit the budget.

    max_running: requests at once. max_prefills: requests that may prefill in one step (None: any).
    longest_prefix_first: else first come first served. max_wait: seconds after which a request is served in the
    order of arrival whatever the policy. priorities: order by priority first; low_first: the smaller the sooner.
    """

    prefill_budget: int
    chunked: bool
    max_running: int
    max_prefills: int | None = None
    longest_prefix_first: bool = False
    max_wait: float = 5.0
    priorities: bool = False
    low_first: bool = False
    default_priority: int = 0


@dataclass(frozen=True, slots=True)
class Extend:
    """`count` tokens of `request` are computed in this step, from `request.computed` on."""

    request: Request
    count: int

    @property
    def completes(self) -> bool:
        """Whether all tokens so far are computed after this step, so that the next one can be sampled."""
        return self.count == self.request.outstanding


@dataclass(slots=True)
class Planner:
    """The queues: `waiting` in order of arrival, `running` in order of admission. `preemptions`: since the start.

    hold: no request is admitted that has not begun already. at: the request that `plan` has looked at last.
    queued_tokens: prompt tokens of those that wait. queued_probes: how many of these are the server's own.
    room: most tokens of a step while memory is short; None: what the limits allow.
    """

    limits: PlannerLimits
    memory: Memory
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    preemptions: int = 0
    hold: bool = False
    at: Request | None = None
    queued_tokens: int = 0
    queued_probes: int = 0
    room: int | None = None
    _good_steps: int = 0
    _served: int = 0

    def plan(self, plan: list[Extend], hopeless: list[Request]) -> None:
        """Plan one step into `plan` and take its slots; into `hopeless` go the requests that can never be served (a
        lone request for which the pool is too small)."""
        self.at = None
        self.memory.begin_step()
        for request in self._in_turn([r for r in self.running if r.outstanding == 1 and not r.trial and not r.is_full]):
            self._extend(request, 1, plan, hopeless)
        budget = self._budget(len(plan))
        most = self.limits.max_prefills or len(self.running) + len(self.waiting)
        decodes = len(plan)
        # Sorting the queue costs milliseconds when it is long; while every place is taken nobody can be admitted.
        order = iter(self._policy_order() if len(self.running) < self.limits.max_running else [])
        prefilling = iter([r for r in self.running if r.outstanding > 1 and not r.trial])
        while budget > 0 and len(plan) - decodes < most:
            candidate = next(prefilling, None) or self._admit(order, plan)
            if candidate is None:
                break
            count = self._chunk(candidate, budget, first=len(plan) == decodes)
            if count and self._extend(candidate, count, plan, hopeless):
                budget -= count

    def plan_alone(self, request: Request, plan: list[Extend], hopeless: list[Request]) -> None:
        """As `plan`, of `request` alone; the plan stays empty while there is no place for it."""
        self.at = None
        self.memory.begin_step()
        candidate: Request | None = request
        if request not in self.running:
            may_begin = request.begun or not self.hold
            full = len(self.running) >= self.limits.max_running
            candidate = self._admit(iter([request]), plan) if may_begin and not full else None
        if candidate is not None:
            count = self._chunk(candidate, self._budget(0), first=True)
            self._extend(candidate, count, plan, hopeless)

    def shrink(self, tokens: int) -> None:
        """Memory did not suffice for a step: no step has more than `tokens` for a while."""
        self.room, self._good_steps = tokens, 0

    def grow(self) -> None:
        """Memory has sufficed for a step."""
        if self.room is None:
            return
        self._good_steps += 1
        if self._good_steps >= GROW_AFTER:
            self.room, self._good_steps = self.room + max(1, self.room // 2), 0
            if self.room >= self.limits.prefill_budget + self.limits.max_running:
                self.room = None
                logger.info("Memory suffices again: steps are of full size")

    @property
    def queued(self) -> int:
        """Waiting requests; the server's own do not count."""
        return len(self.waiting) - self.queued_probes

    def enqueue(self, request: Request, position: int | None = None) -> None:
        """Have a request wait, by default behind all others."""
        self.waiting.insert(len(self.waiting) if position is None else position, request)
        self.queued_tokens += request.prompt_length
        self.queued_probes += request.admit.probe

    def unqueue(self, request: Request) -> None:
        """Take a request out of those that wait."""
        self.waiting.remove(request)
        self.queued_tokens -= request.prompt_length
        self.queued_probes -= request.admit.probe

    def make_room(self, request: Request, most: int | None, most_tokens: int | None) -> list[Request] | None:
        """Who has to leave the queue so that `request` finds room in it, the least urgent first; None: it finds none.

        most, most_tokens: requests, and prompt tokens, that may wait. A prompt of any length may wait alone, and the
        server's own requests always may.
        """
        if request.admit.probe:
            return []
        count, tokens = self.queued, self.queued_tokens + request.prompt_length

        def full() -> bool:
            over = (most is not None and count >= most) or (most_tokens is not None and tokens > most_tokens)
            return over and count > 0

        leaving: list[Request] = []
        if not full():
            return leaving
        if not self.limits.priorities:
            return None
        # A preempted request that has produced something already keeps its place: its client reads it.
        unopened = [r for r in self.waiting if not r.delivered and not r.admit.probe]
        for last in sorted(unopened, key=lambda r: (self.urgency(r), r.number), reverse=True):
            if self.urgency(last) <= self.urgency(request):
                return None
            leaving.append(last)
            count, tokens = count - 1, tokens - last.prompt_length
            if not full():
                return leaving
        return None

    def preempt(self, request: Request) -> None:
        """Send a running request back to the queue; what it has computed stays in the tree."""
        self.running.remove(request)
        self.memory.release(request)
        request.retractions += 1
        self.preemptions += 1
        position = next((i for i, other in enumerate(self.waiting) if other.number > request.number), None)
        self.enqueue(request, position)

    def finish(self, request: Request) -> None:
        """Take a running request out; what it has computed stays in the tree."""
        self.running.remove(request)
        self.memory.release(request)

    def _in_turn(self, decodes: list[Request]) -> list[Request]:
        """As many of `decodes` as a step has room for; in the next step it is the turn of the others."""
        if self.room is None or len(decodes) <= self.room:
            return decodes
        start = self._served % len(decodes)
        self._served = start + self.room
        return (decodes[start:] + decodes[:start])[: self.room]

    def _budget(self, decodes: int) -> int:
        """Prompt tokens of a step that has so many decodes."""
        budget = self.limits.prefill_budget
        return budget if self.room is None else min(budget, self.room - decodes)

    def _chunk(self, request: Request, budget: int, *, first: bool) -> int:
        """How many tokens of `request` to compute with `budget` left; 0: none in this step."""
        if request.outstanding <= budget:
            return request.outstanding
        if self.limits.chunked:
            return budget
        return request.outstanding if first else 0

    def _extend(self, request: Request, count: int, plan: list[Extend], hopeless: list[Request]) -> bool:
        """Take slots for the next `count` tokens of `request` and enter it into the plan.

        When there is no room, younger requests that are not in the plan are preempted, and at last this one.
        """
        self.at = request
        if request not in self.running:
            return False  # preempted a moment ago, to make room for an older one
        while not self.memory.extend(request, count):
            planned = {step.request.number for step in plan}
            younger = [r for r in self.running if r.number > request.number and r.number not in planned]
            if younger:
                self.preempt(max(younger, key=lambda r: r.number))
            elif len(self.running) > 1:
                self.preempt(request)
                return False
            else:
                self.finish(request)
                hopeless.append(request)
                return False
        plan.append(Extend(request, count))
        return True

    def _admit(self, order: Iterator[Request], plan: list[Extend]) -> Request | None:
        """Admit the next request of `order` for which there is room; None when there is none."""
        passed_over = 0
        for request in order:
            self.at = request
            if len(self.running) >= self.limits.max_running or passed_over == MOST_PASSED_OVER:
                return None
            if self._shares_a_prefill(request):
                passed_over += 1
                continue
            self.memory.attach(request)
            if self.running and self.memory.available < self._reserved(plan) + request.outstanding + _growth(request):
                self.memory.detach(request)
                return None
            self.unqueue(request)
            self.running.append(request)
            if request.cached_tokens < 0:
                request.cached_tokens = min(request.computed, request.prompt_length)
                request.started_at = request.admitted_at = time.monotonic()
            return request
        return None

    def _reserved(self, plan: list[Extend]) -> int:
        """Slots that running requests will still want beyond this step: the rest of their prompts, some growth."""
        wanted = sum(r.outstanding + _growth(r) for r in self.running)
        return wanted - sum(step.count for step in plan)

    def _shares_a_prefill(self, request: Request) -> bool:
        """Whether a running prefill is about to compute a prefix that this request could then reuse."""
        if not self.memory.reuse:
            return False
        prefills = [r for r in self.running if r.outstanding > 1 and r.admit.extra_key == request.admit.extra_key]
        if not prefills:
            return False
        mine = request.tokens[: request.reusable]
        shared = max(shared_length(r.tokens[: r.length - 1], mine) for r in prefills)
        if shared < SHARED_PREFIX_WORTH_WAITING:
            return False
        return shared - self.memory.cached_length(request) >= SHARED_PREFIX_WORTH_WAITING

    def _policy_order(self) -> list[Request]:
        """The waiting requests in the order in which they are to be admitted."""
        order = [r for r in self.waiting if not (r.trial or r.awaits_grammar) and (r.begun or not self.hold)]
        if self.limits.longest_prefix_first:
            overdue = time.monotonic() - self.limits.max_wait
            late = [r for r in order if r.arrived_at < overdue]
            fresh = [r for r in order if r.arrived_at >= overdue][:LPM_CANDIDATES]
            matched = {r.number: self.memory.cached_length(r) for r in fresh}
            order = late + sorted(fresh, key=lambda r: -matched[r.number])
        if self.limits.priorities:
            order.sort(key=self.urgency)
        return order

    def urgency(self, request: Request) -> int:
        """Sort key of the request's priority: smaller goes first."""
        priority = request.admit.priority
        value = self.limits.default_priority if priority is None else priority
        return value if self.limits.low_first else -value


def _growth(request: Request) -> int:
    return min(max(request.remaining_new, 0), DECODE_RESERVE)
