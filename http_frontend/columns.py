"""Whether the columns of a step fit together. Nothing of one that fails is applied: a row in the wrong place would be
another request's text."""

from __future__ import annotations

from typing import Any

from engine.wire.to_detokenizer import NO_TOKEN
from engine.wire.to_frontend import TextStep, Vectors

_MOST_TOKENS = 1 << 31
"""Ids travel as int32 when a request is replayed."""


def check_text_step(step: TextStep) -> None:
    """Raise ValueError of columns that differ in length, and of ids that are none."""
    _check_lengths(step.keys, step.attempts, step.texts, step.tokens)
    if step.tokens and not (min(step.tokens) >= NO_TOKEN and max(step.tokens) < _MOST_TOKENS):
        raise ValueError(f"token ids must lie in [0, {_MOST_TOKENS}), got {min(step.tokens)} to {max(step.tokens)}")


def check_vectors(step: Vectors) -> None:
    """Raise ValueError of columns that differ in length, and of entries that are not what the widths say."""
    _check_lengths(step.keys, step.attempts, step.prompt_tokens, step.widths)
    if min(step.widths, default=0) < 0 or 4 * sum(step.widths) != len(step.entries):
        raise ValueError(f"vectors of {step.widths} entries do not come to {len(step.entries)} bytes")


def _check_lengths(*columns: list[Any]) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"the columns of a step must be as long as each other, got {lengths}")
