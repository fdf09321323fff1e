"""How far along its grammar a request is, and what may come next.

A mask is a function of the grammar and the tokens taken so far, so that it does not depend on the request's company,
and a state that was lost is had again by taking the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarError(Exception):
    """A grammar that cannot be followed, with a message for its client."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """How far along its grammar one request is. width: of a mask. eos_ids: what ends an output; may be empty."""

    matcher: LLMatcher
    width: int
    eos_ids: frozenset[int]

    def forbidden(self) -> NDArray[np.bool_]:
        """Of each id [width] whether it may not come next. Raises GrammarError where the grammar takes too much work,
        or leads nowhere."""
        packed = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            reason = self.matcher.get_error().partition("\n")[0]  # which quotes nothing of the grammar
            raise GrammarError(f"The grammar cannot be followed any further: {reason}")
        bits = np.unpackbits(~np.frombuffer(packed, np.uint8), count=self.width, bitorder="little")
        return bits.view(np.bool_)

    def advance(self, tokens: list[int]) -> None:
        """Take tokens; an end, behind which nothing is asked any more, is not looked at. Raises GrammarError where the
        grammar does not allow them."""
        if not self.matcher.consume_tokens([token for token in tokens if token not in self.eos_ids]):
            raise GrammarError(f"The grammar does not allow the output: {self.matcher.stop_reason()}")

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may come."""
        return self.matcher.is_stopped()

    def ends_with(self, token: int) -> bool:
        """Whether `token`, the newest, has ended the output: an end that the grammar allows, or where the model has
        none, the token behind which nothing may come."""
        return token in self.eos_ids or (not self.eos_ids and self.complete)

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.width, self.eos_ids)
