"""Steps that are queued without waiting for those before (`engine.kernels.queued`): sampling on the device, what it has
sampled fed into the next step there, and results copied to pinned memory behind an event."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from engine.kernels.batch import RaggedBatch, offsets
from engine.kernels.gpu.errors import device_errors
from engine.kernels.gpu.launch import as_tensor
from engine.kernels.gpu.ring import Ring, aligned, piece
from engine.kernels.gpu.sampling import best_on_device, check, locate_call, ranks, scored_on_device
from engine.kernels.queued import Draws, Outcome, Scores
from engine.kernels.table import Logprobs, Longs


def fed(batch: RaggedBatch, sources: Longs, last: torch.Tensor | None) -> RaggedBatch:
    """The batch, on the device, with the tokens that the step before has sampled: last int64 [R]."""
    if not (sources >= 0).any():
        return batch
    assert last is not None, "tokens of a step before are asked for, and there was none"
    of = as_tensor(sources, torch.int64, last.device)
    return dataclasses.replace(batch, token_ids=torch.where(of >= 0, last[of.clamp(min=0)], batch.token_ids))


def sample_queued(
    logits: torch.Tensor, draws: Draws | None, scores: Scores | None, ring: Ring
) -> tuple[torch.Tensor, Callable[[], Outcome]]:
    """Queue the sampling of logits, float32 [R, V] on the device, which may be overwritten after that.

    Returns the tokens, int64 [R] on the device, and what waits for the outcome. Raises ValueError and IndexError for
    columns that `Backend.draw` and `Backend.logprobs` refuse.
    """
    width = logits.shape[1]
    tokens, peaks = best_on_device(logits)
    if draws is not None:
        tokens = _drawn(logits, tokens, peaks, draws)
    results = [tokens, peaks]
    tops: Longs | None = None
    if scores is not None:
        tops = np.minimum(scores.tops, width)
        chosen = tokens[as_tensor(scores.rows, torch.int64, logits.device)]
        results += scored_on_device(
            logits, peaks, scores.rows, scores.temperatures, chosen, tops, scores.id_counts, scores.ids
        )
    parts = None if scores is None or tops is None else (len(scores.rows), int(tops.sum()))
    return tokens, _to_host(results, width, parts, ring)


def _drawn(logits: torch.Tensor, best: torch.Tensor, peaks: torch.Tensor, draws: Draws) -> torch.Tensor:
    count, width = logits.shape
    check("rows", draws.rows, count)
    limits = np.where(draws.top_ks < 0, width, np.minimum(draws.top_ks, width)).astype(np.int32)
    if (limits == 0).any():
        raise ValueError("top_ks holds 0; allowed: -1, or at least 1")
    cut = (limits < width) | (draws.top_ps < 1.0)
    tokens = best.clone()
    for ranked in (False, True):
        chosen = np.flatnonzero(cut == ranked)
        if not len(chosen):
            continue
        rows = as_tensor(draws.rows[chosen], torch.int64, logits.device)
        columns = (
            peaks[rows], draws.temperatures[chosen], limits[chosen], draws.top_ps[chosen], draws.min_ps[chosen],
            draws.uniforms[chosen],
        )  # fmt: skip
        found = torch.zeros(len(chosen), dtype=torch.int64, device=logits.device)
        if ranked:
            ordered, order = ranks(logits[rows])
            locate_call(
                ordered, torch.arange(len(chosen), dtype=torch.int32, device=logits.device), columns, found
            ).run()
            found = order.gather(1, found.clamp(0, width - 1)[:, None])[:, 0]
        else:
            locate_call(logits, rows.to(torch.int32), columns, found).run()
        # Where the largest is not finite nothing can be drawn.
        tokens[rows] = torch.where(torch.isfinite(peaks[rows]), found, best[rows])
    return tokens


def _to_host(
    results: list[torch.Tensor], width: int, parts: tuple[int, int] | None, ring: Ring
) -> Callable[[], Outcome]:
    """parts: how many rows logprobs were asked for, and how many most likely ids; None: no logprobs were."""
    starts = offsets(tuple(aligned(tensor.nbytes) for tensor in results))
    slot = ring.take(starts[-1])
    lap, host = slot.lap, []
    for start, tensor in zip(starts, results, strict=False):
        host.append(piece(slot.buffer, start, tuple(tensor.shape), tensor.dtype))
        host[-1].copy_(tensor, non_blocking=True)
    slot.done.record()

    def outcome() -> Outcome:
        assert slot.lap == lap, "an outcome is read after its buffer was given to another step"
        with device_errors():
            slot.done.synchronize()
        made = [tensor.numpy().copy() for tensor in host]
        found = None
        if parts is not None:
            (values, most_likely), (rows, tops) = made[2:], parts
            found = Logprobs(values[:rows], most_likely, values[rows : rows + tops], values[rows + tops :])
        return Outcome(made[0], made[1], width, found)

    return outcome
