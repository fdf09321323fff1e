"""A request inside the scheduler: its tokens, its slots, and how far it has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from engine.wire.results import InputLogprobs, Scored
from engine.wire.to_scheduler import Admit
from scheduler_proc.constraint import Constraint
from scheduler_proc.radix_cache import Node, Tokens
from scheduler_proc.slot_pool import Slots


@dataclass(slots=True, eq=False)
class PromptLogprobs:
    """Logprobs of the prompt, filled in as its chunks are computed. Entry j is of prompt token start + j."""

    start: int
    tokens: list[tuple[float | None, int]]
    top: list[list[Scored] | None] | None
    ids: list[list[Scored] | None] | None

    def next_row(self) -> int:
        """The position whose logits are wanted next: those at p say how likely token p + 1 was."""
        return self.start + len(self.tokens) - 1

    def message(self) -> InputLogprobs:
        return InputLogprobs(self.tokens, self.top, self.ids)


@dataclass(slots=True, eq=False)
class Request:
    """State of one admitted request.

    tokens: int32 buffer; the first `length` are known: the prompt (`prompt_length`), then the output.
    slots: int32 buffer; the first `computed` hold the slots of tokens whose KV is in the pool. The radix tree
    owns the first `tree_owned` of them (path locked at `node`), the request the rest.
    number: order of arrival; the youngest has the largest.
    queued: so many tokens behind these are computed on a device now; row: of the last one (`overlap.py`).
    trial: so many tokens it must make alone before it may join others (`trials.py`).
    constraint: of one with a grammar, once that is compiled (`grammars.py`).
    arrived_at, started_at: for its time limits, which pauses do not count against; admitted_at: when it began.
    """

    admit: Admit
    number: int
    prompt_length: int
    tokens: Tokens
    length: int
    max_new_tokens: int
    min_new_tokens: int
    slots: Slots
    computed: int = 0
    tree_owned: int = 0
    node: Node | None = None
    cached_tokens: int = -1
    opened: bool = False
    retractions: int = 0
    queued: int = 0
    row: int = 0
    trial: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    output_counts: dict[int, int] | None = None
    constraint: Constraint | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    admitted_at: float = 0.0

    @property
    def key(self) -> int:
        return self.admit.key

    @property
    def known(self) -> Tokens:
        """Prompt and output so far."""
        return self.tokens[: self.length]

    @property
    def awaits_grammar(self) -> bool:
        """Whether it cannot be planned yet."""
        return self.constraint is None and self.admit.sampling.grammar is not None

    @property
    def begun(self) -> bool:
        """Whether it has ever been admitted, by this attempt or an earlier one that has delivered output: something of
        it has been computed, though perhaps not delivered."""
        return self.cached_tokens >= 0 or self.generated > 0

    @property
    def delivered(self) -> bool:
        """Whether something of it has gone out, by this attempt or an earlier one."""
        return self.opened or self.generated > 0

    @property
    def generated(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return self.length - self.prompt_length

    @property
    def outstanding(self) -> int:
        """Tokens, known ones and queued ones, whose KV is not in the pool yet."""
        return self.length + self.queued - self.computed

    @property
    def is_full(self) -> bool:
        """Whether its last token is queued."""
        return self.queued > 0 and self.generated + self.queued >= self.max_new_tokens

    @property
    def remaining_new(self) -> int:
        return self.max_new_tokens - self.generated

    @property
    def reusable(self) -> int:
        """The longest prefix that may come from the cache: the last token is always computed, and so is every
        position whose logits the prompt logprobs still want."""
        limit = self.length - 1
        if self.prompt_logprobs is not None:
            wanted = self.prompt_logprobs.next_row()
            if wanted < self.prompt_length - 1:  # the last prompt token's row is about the output
                limit = min(limit, wanted)
        return limit

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1
        if self.constraint is not None:
            self.constraint.advance([token])
        if self.output_counts is not None:
            self.output_counts[token] = self.output_counts.get(token, 0) + 1


def new_request(admit: Admit, number: int, longest: int) -> Request:
    """Build the state of a request that may grow to `longest` tokens in all (prompt and output).

    `max_new_tokens` is cut to what fits and `min_new_tokens` with it (contract §5.3).
    """
    prompt = np.frombuffer(admit.input_ids, "<i4")
    earlier = np.frombuffer(admit.output_ids, "<i4")
    sampling = admit.sampling
    room = max(longest - len(prompt) - 1, 0)
    max_new = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
    capacity = max(len(prompt) + max_new, len(prompt) + len(earlier)) + 1
    tokens = np.empty(capacity, np.int32)
    tokens[: len(prompt)] = prompt
    tokens[len(prompt) : len(prompt) + len(earlier)] = earlier
    request = Request(
        admit=admit,
        number=number,
        prompt_length=len(prompt),
        tokens=tokens,
        length=len(prompt) + len(earlier),
        max_new_tokens=max_new,
        min_new_tokens=min(sampling.min_new_tokens, max_new),
        slots=np.empty(capacity, np.int32),
    )
    if sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0:
        ids, counts = np.unique(earlier, return_counts=True)
        request.output_counts = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    request.prompt_logprobs = _prompt_logprobs(admit, prompt)
    return request


def _prompt_logprobs(admit: Admit, prompt: Tokens) -> PromptLogprobs | None:
    wanted = admit.logprobs
    if wanted is None or wanted.start < 0 or wanted.start >= len(prompt):
        return None
    return PromptLogprobs(
        start=wanted.start,
        tokens=[(None, int(prompt[wanted.start]))],
        top=[None] if wanted.top else None,
        ids=[None] if wanted.ids else None,
    )
