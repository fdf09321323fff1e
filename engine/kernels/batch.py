"""One step's inputs: the new tokens of several sequences, laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """T new tokens of S sequences (T >= S >= 1), and where the context of each lies in the KV pool.

    Sequence s owns the new tokens `query_starts[s]:query_starts[s + 1]` (at least one) and the context slots
    `context_starts[s]:context_starts[s + 1]`. Its new tokens are the last ones of its context: new token i of n
    has index `context_lengths[s] - n + i` there, and sees what stands at that index and before it.

    token_ids: int64 [T]. positions: int64 [T], what rotary embeddings are computed from.
    slots: int64 [T], where each new token's K and V go in the pool; no slot may occur twice.
    query_starts: S + 1 offsets into T. context_lengths: S, tokens of each sequence including the new ones.
    context_slots: int64 [sum(context_lengths)], the slots of each context in order, the new ones included.
    context_starts: S + 1 offsets into context_slots.
    type_ids: int64 [T], the segment of each token, for models that tell segments apart; None: all 0.

    Contexts may share slots, and a context may hold a slot that another sequence writes in the same step
    (a layer writes all new K and V before any attention reads them).
    The tensors live on the model's device, the tuples on the host. Raises ValueError where the lengths disagree.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]
    context_slots: torch.Tensor
    context_starts: tuple[int, ...]
    type_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tokens, sequences = self.token_ids.shape[0], len(self.context_lengths)
        if self.positions.shape[0] != tokens or self.slots.shape[0] != tokens:
            raise ValueError(
                f"token_ids, positions and slots must have one length, not {tokens}, "
                f"{self.positions.shape[0]} and {self.slots.shape[0]}"
            )
        if self.type_ids is not None and self.type_ids.shape[0] != tokens:
            raise ValueError(f"type_ids must hold {tokens} entries, not {self.type_ids.shape[0]}")
        if len(self.query_starts) != sequences + 1 or self.query_starts[0] != 0 or self.query_starts[-1] != tokens:
            raise ValueError(
                f"query_starts of {sequences} sequences and {tokens} tokens must be {sequences + 1} offsets "
                f"from 0 to {tokens}, not {self.query_starts}"
            )
        if self.context_starts != offsets(self.context_lengths):
            raise ValueError(f"context_starts {self.context_starts} disagrees with context_lengths")
        if self.context_slots.shape[0] != self.context_starts[-1]:
            raise ValueError(f"context_slots must hold {self.context_starts[-1]} slots, not {len(self.context_slots)}")
        for sequence, (start, stop) in enumerate(zip(self.query_starts, self.query_starts[1:], strict=False)):
            if not 1 <= stop - start <= self.context_lengths[sequence]:
                raise ValueError(
                    f"sequence {sequence} has {stop - start} new tokens; allowed: 1 to its context length, "
                    f"{self.context_lengths[sequence]}"
                )

    @property
    def num_sequences(self) -> int:
        return len(self.context_lengths)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]


def offsets(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each of several pieces laid end to end starts, and where the last one ends."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return tuple(starts)
