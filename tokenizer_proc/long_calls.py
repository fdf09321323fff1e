"""Calls of `/tokenize` with much text: piece by piece, between everybody else's messages."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from engine.checkpoints.tokenizer import Tokenizer
from engine.wire.to_frontend import Tokenized
from engine.wire.to_tokenizer import Tokenize
from tokenizer_proc.replies import tokenized

PIECE = 1 << 16
"""Characters that are tokenized in a turn of the loop, but for a text that is longer."""


@dataclass(slots=True)
class _Open:
    """ids: of the prompts so far."""

    message: Tokenize
    ids: list[list[int]] = field(default_factory=list)


class LongCalls:
    """Those that are open; each has its turn."""

    def __init__(self) -> None:
        self._open: deque[_Open] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, message: object) -> bool:
        """Keep `message` here when it is a call that is long."""
        if not isinstance(message, Tokenize) or sum(map(len, message.prompts or ())) <= PIECE:
            return False
        self._open.append(_Open(message))
        return True

    @property
    def key(self) -> int:
        """Of the call that is next."""
        return self._open[0].message.key

    def go_on(self, tokenizer: Tokenizer | None, context_length: int) -> Tokenized | None:
        """Tokenize a piece of the next call; its answer, when that was the last one."""
        call = self._open.popleft()
        prompts = call.message.prompts or []
        end, size = len(call.ids), 0
        while end < len(prompts) and (size == 0 or size + len(prompts[end]) <= PIECE):
            size += len(prompts[end])
            end += 1
        piece = msgspec.structs.replace(call.message, prompts=prompts[len(call.ids) : end])
        answer = tokenized(piece, tokenizer, context_length)
        if answer.error is not None:
            return answer
        call.ids += answer.ids
        if end == len(prompts):
            return msgspec.structs.replace(answer, ids=call.ids)
        self._open.append(call)
        return None
