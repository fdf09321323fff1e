"""What each tensor-parallel rank holds of a model: which heads, which channels, which part of the vocabulary.

The scheme is Megatron-LM's (https://arxiv.org/abs/1909.08053): the projections into heads and into an MLP are divided
by their outputs, those out of them by their inputs, so that a layer needs two sums over the ranks; the embedding and
the head of a language model are divided by the vocabulary. Each expert of a mixture is divided like an MLP: whichever
experts a token takes, every rank reads its share of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from engine.checkpoints.model_config import ModelConfig
from engine.config import ConfigError

GRANULE = 32
"""Channels of a product that kernels compute together: where there are enough, a part is a multiple of them."""


@dataclass(frozen=True)
class Part:
    """Entries [start, stop) of an axis of `total`."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.size == self.total

    def times(self, factor: int) -> Part:
        """The same part of an axis that has `factor` entries for each of this one."""
        return Part(self.start * factor, self.stop * factor, self.total * factor)


def whole(total: int) -> Part:
    return Part(0, total, total)


@dataclass(frozen=True)
class Division:
    """What rank `rank` of `ranks` holds.

    queries, kv: query heads, and the key/value heads that these read; a key/value head may be held by several ranks.
    mlp: channels of the MLP; expert, shared: of each expert, and of the shared one (None where there are none).
    vocabulary: rows of the embedding and of a language model's head.
    """

    rank: int
    ranks: int
    queries: Part
    kv: Part
    mlp: Part
    expert: Part | None
    shared: Part | None
    vocabulary: Part

    @property
    def leads(self) -> bool:
        """Whether this rank adds what is to be added once, such as a bias."""
        return self.rank == 0


def divide(config: ModelConfig, rank: int = 0, ranks: int = 1) -> Division:
    """What a rank holds. Raises ConfigError where some rank would hold nothing."""
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank is {rank}; allowed are 0 to {ranks - 1}")
    moe = config.moe
    sizes = [config.num_heads, config.intermediate_size, config.vocab_size]
    if moe is not None:
        sizes += [moe.intermediate_size, *([moe.shared_intermediate_size] if moe.shared_intermediate_size else [])]
    if ranks > (most := min(sizes)):
        raise ConfigError(
            f"--tp-size is {ranks}; allowed for this model, with {config.num_heads} attention heads, are 1 to {most}"
        )
    heads = [divide_heads(config.num_heads, config.num_kv_heads, number, ranks) for number in range(ranks)]
    queries, kv = heads[rank]
    weights = _room_for_mlp(config, [(q.size, k.size) for q, k in heads]) if moe is None else [1.0] * ranks
    return Division(
        rank=rank,
        ranks=ranks,
        queries=queries,
        kv=kv,
        mlp=divide_evenly(config.intermediate_size, rank, ranks, weights),
        expert=None if moe is None else divide_evenly(moe.intermediate_size, rank, ranks),
        shared=(
            divide_evenly(moe.shared_intermediate_size, rank, ranks)
            if moe is not None and moe.shared_intermediate_size
            else None
        ),
        vocabulary=even_parts(config.vocab_size, ranks)[rank],
    )


def divide_evenly(total: int, rank: int, ranks: int, weights: list[float] | None = None) -> Part:
    """A part of `total` that is as near as can be to its share by `weights` (None: equal ones), at least one entry.

    Bounds are multiples of GRANULE where each rank can have two of them.
    """
    if total < ranks:
        raise ConfigError(f"{total} entries cannot be divided among {ranks} ranks")
    weights = weights or [1.0] * ranks
    granule = GRANULE if total >= 2 * GRANULE * ranks else 1
    cells, scale = total // granule, sum(weights)
    bounds = [0]
    for number, sum_so_far in enumerate(accumulate(weights), 1):
        wanted = round(cells * sum_so_far / scale)
        bounds.append(min(max(wanted, bounds[-1] + 1), cells - (ranks - number)))
    bounds = [bound * granule for bound in bounds[:-1]] + [total]
    return Part(bounds[rank], bounds[rank + 1], total)


def even_parts(total: int, ranks: int) -> list[Part]:
    """Every rank's part."""
    return [divide_evenly(total, rank, ranks) for rank in range(ranks)]


def divide_heads(heads: int, kv_heads: int, rank: int, ranks: int) -> tuple[Part, Part]:
    """A rank's query heads and key/value heads: whole groups where there are enough, else a part of one group.

    Of several ranks that share a key/value head each keeps it.
    """
    group = heads // kv_heads
    if ranks <= kv_heads:
        kv = _even(kv_heads, rank, ranks)
        return kv.times(group), kv
    # So many ranks share key/value head h as `_even` gives it.
    for head in range(kv_heads):
        sharers = _even(ranks, head, kv_heads)
        if sharers.start <= rank < sharers.stop:
            if sharers.size > group:
                raise ConfigError(
                    f"--tp-size is {ranks}; allowed for {heads} attention heads in {kv_heads} groups are at most "
                    f"{kv_heads * group}"
                )
            own = _even(group, rank - sharers.start, sharers.size)
            first = head * group
            return Part(first + own.start, first + own.stop, heads), Part(head, head + 1, kv_heads)
    raise AssertionError("every rank shares some head")


def _even(total: int, rank: int, ranks: int) -> Part:
    """Parts that differ by at most one, the larger ones first."""
    small, larger = divmod(total, ranks)
    start = rank * small + min(rank, larger)
    return Part(start, start + small + (rank < larger), total)


def _room_for_mlp(config: ModelConfig, heads: list[tuple[int, int]]) -> list[float]:
    """How much of the MLP each rank should take so that all read about as many weights a token: less where it has more
    heads than others."""
    attention = [2.0 * (q + kv) * config.head_dim for q, kv in heads]
    matrices = 2.0 if config.encoder is not None else 3.0
    even = (sum(attention) + matrices * config.intermediate_size) / len(heads)
    return [max(even - own, 0.05 * even) for own in attention]
