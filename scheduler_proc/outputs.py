"""Collects what one step produced into the one message that goes to the detokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.wire.results import Finish, TokenLogprobs
from engine.wire.to_detokenizer import NO_TOKEN, Opened, StepOutput
from scheduler_proc.request import Request

PROMPT_TAIL = 8
"""How many prompt ids the detokenizer gets as the context of the first output."""


@dataclass(slots=True)
class StepRows:
    """The columns of a `StepOutput` while they grow. requests: whose rows they are."""

    opened: list[Opened] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: dict[int, Finish] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    retracted: dict[int, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def add(
        self,
        request: Request,
        token: int = NO_TOKEN,
        finish: Finish | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Add a row; a request's first row also opens it at the detokenizer."""
        row = len(self.keys)
        if not request.opened:
            self.opened.append(_opened(request, row_has_token=token != NO_TOKEN))
            request.opened = True
        self.requests.append(request)
        self.keys.append(request.key)
        self.attempts.append(request.admit.attempt)
        self.tokens.append(token)
        if finish is not None:
            self.finished[row] = finish
        if logprobs is not None:
            self.logprobs[row] = logprobs
        if request.retractions:
            self.retracted[request.key] = request.retractions

    def single(self) -> list[StepRows]:
        """The same rows, each by itself."""
        opened = {one.key: one for one in self.opened}
        parts = []
        for row, key in enumerate(self.keys):
            part = StepRows(
                [opened[key]] if key in opened else [], [key], [self.attempts[row]], [self.tokens[row]],
                requests=[self.requests[row]],
            )  # fmt: skip
            if row in self.finished:
                part.finished[0] = self.finished[row]
            if row in self.logprobs:
                part.logprobs[0] = self.logprobs[row]
            if key in self.retracted:
                part.retracted[key] = self.retracted[key]
            parts.append(part)
        return parts

    def message(self, weight_version: str) -> StepOutput:
        return StepOutput(
            self.opened, self.keys, self.attempts, self.tokens, self.finished, self.logprobs, self.retracted,
            weight_version,
        )  # fmt: skip


def _opened(request: Request, *, row_has_token: bool) -> Opened:
    """`request` before the token of its first row, if that has one."""
    end = request.length - 1 if row_has_token else request.length
    prompt = request.tokens[: request.prompt_length]
    logprobs = request.prompt_logprobs
    return Opened(
        key=request.key,
        attempt=request.admit.attempt,
        prompt_tokens=request.prompt_length,
        cached_tokens=max(request.cached_tokens, 0),
        prompt_tail=prompt[-PROMPT_TAIL:].tolist(),
        output_ids=request.tokens[request.prompt_length : end].tolist(),
        text_options=request.admit.text_options,
        input_logprobs=None if logprobs is None else logprobs.message(),
        rid=request.admit.rid,
        admitted_at=request.admitted_at,
    )
