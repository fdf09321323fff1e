"""The reductions of sampling on the device; see `engine.kernels.table.Backend`.

Results go to the host: `best`, `draw` and `logprobs` wait for the GPU. What is named a call does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.kernels.gpu.device import sampling as kernels
from engine.kernels.gpu.launch import Call, as_tensor, parts, power_of_two
from engine.kernels.reference_sampling import LARGEST
from engine.kernels.table import Doubles, Floats, Logprobs, Longs

# Logits that a program looks through at once: a large vocabulary falls into some forty sections.
SECTION = 4096
# Weights that are summed at once in a row.
BLOCK = 2048


def best_calls(logits: torch.Tensor, ids: torch.Tensor, peaks: torch.Tensor) -> list[Call]:
    """Write the best of each row: ids int64 [R], peaks float32 [R]. Nothing waits."""
    rows, width = logits.shape
    sections = parts(width, SECTION)
    part_peaks = torch.empty((rows, sections), dtype=torch.float32, device=logits.device)
    part_ids = torch.empty((rows, sections), dtype=torch.int32, device=logits.device)
    first = {
        "logits": logits, "peaks": part_peaks, "ids": part_ids, "row_stride": logits.stride(0), "sections": sections,
    }  # fmt: skip
    second = {"peaks": part_peaks, "ids": part_ids, "best_peaks": peaks, "best_ids": ids, "sections": sections}
    return [
        Call(kernels.best_parts, (rows, sections, 1), first, {"WIDTH": width, "BLOCK": SECTION}, warps=8),
        Call(kernels.best_whole, (rows, 1, 1), second, {"BLOCK": power_of_two(sections)}, warps=1),
    ]


def best_on_device(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [R], peaks float32 [R], on the device. Raises ValueError for what are not rows of float32."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 [R, V] with entries side by side, not {logits.dtype}{logits.shape}")
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    peaks = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for call in best_calls(logits, ids, peaks):
        call.run()
    return ids, peaks


def best(logits: torch.Tensor) -> tuple[Longs, Floats]:
    ids, peaks = best_on_device(logits)
    return ids.cpu().numpy(), peaks.cpu().numpy()


def draw(
    logits: torch.Tensor,
    rows: Longs,
    temperatures: Doubles,
    top_ks: Longs,
    top_ps: Doubles,
    min_ps: Doubles,
    uniforms: Doubles,
) -> Longs:
    count, width = logits.shape
    check("rows", rows, count)
    if len(top_ks) and ((top_ks == 0) | (top_ks < -1)).any():
        raise ValueError(f"top_ks holds {int(top_ks[(top_ks == 0) | (top_ks < -1)][0])}; allowed: -1, or at least 1")
    ids, peaks = best(logits)
    drawn = ids[rows].copy()
    limits = np.where(top_ks < 0, width, np.minimum(top_ks, width)).astype(np.int32)
    cut = (limits < width) | (top_ps < 1.0)
    usual = np.isfinite(peaks[rows])
    columns = (peaks[rows], temperatures, limits, top_ps, min_ps, uniforms)
    for ranked in (False, True):
        chosen = np.flatnonzero(usual & (cut == ranked))
        if len(chosen):
            own = [column[chosen] for column in columns]
            drawn[chosen] = _located(logits, rows[chosen], *own, ranked=ranked)
    return drawn


def _located(logits: torch.Tensor, rows: Longs, *columns: Any, ranked: bool) -> Longs:
    """ranked: the draws are counted in the order of ranks, which needs the rows sorted."""
    order = None
    if ranked:
        sorted_rows, where = np.unique(rows, return_inverse=True)
        logits, order = ranks(logits[as_tensor(sorted_rows, torch.int64, logits.device)])
        rows = where
    found = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    locate_call(logits, as_tensor(rows, torch.int32, logits.device), columns, found).run()
    if order is not None:
        found = order[as_tensor(rows, torch.int64, logits.device), found]
    return found.cpu().numpy()


def locate_call(
    logits: torch.Tensor,
    rows: torch.Tensor,
    columns: tuple[Any, ...],
    found: torch.Tensor,
) -> Call:
    """found: int64 [N], written: where in its row each draw falls.

    columns: peaks, temperatures, limits, top_ps, min_ps and uniforms, numpy [N] each.
    """
    device = logits.device
    peaks, temperatures, limits, top_ps, min_ps, uniforms = columns
    arguments = {
        "logits": logits, "rows": rows, "peaks": as_tensor(peaks, torch.float32, device),
        "temperatures": as_tensor(np.minimum(temperatures, LARGEST), torch.float32, device),
        "limits": as_tensor(limits, torch.int32, device), "top_ps": as_tensor(top_ps, torch.float64, device),
        "min_ps": as_tensor(min_ps, torch.float32, device), "uniforms": as_tensor(uniforms, torch.float64, device),
        "found": found, "row_stride": logits.stride(0), "width": logits.shape[1],
    }  # fmt: skip
    return Call(kernels.locate, (len(rows), 1, 1), arguments, {"BLOCK": BLOCK}, warps=8)


def ranks(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted, the largest first and the lower id first among equals; and the ids in that order."""
    # Adding 0 makes the two zeros one, whatever the sort thinks of their signs.
    result = torch.sort(logits + 0.0, dim=-1, descending=True, stable=True)
    return result.values, result.indices


def logprobs(
    logits: torch.Tensor,
    rows: Longs,
    temperatures: Doubles,
    tokens: Longs,
    tops: Longs,
    id_counts: Longs,
    ids: Longs,
) -> Logprobs:
    count, width = logits.shape
    device = logits.device
    check("rows", rows, count)
    check("tokens", tokens, width)
    check("ids", ids, width)
    check("tops", tops, width + 1)
    wanted = as_tensor(tokens, torch.int64, device)
    values, most_likely = scored_on_device(
        logits, best_on_device(logits)[1], rows, temperatures, wanted, tops, id_counts, ids
    )
    found, first = values.cpu().numpy(), len(rows)
    second = first + len(most_likely)
    return Logprobs(found[:first], most_likely.cpu().numpy(), found[first:second], found[second:])


def scored_on_device(
    logits: torch.Tensor,
    peaks: torch.Tensor,
    rows: Longs,
    temperatures: Doubles,
    tokens: torch.Tensor,
    tops: Longs,
    id_counts: Longs,
    ids: Longs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Backend.logprobs` without waiting. peaks: float32 [R], of all rows of the logits; tokens: int64 [N]. Both are on
    the device, and so is what is returned: the logprobs of the tokens, of the most likely ids and of the ids asked
    for, float32, one behind the other; and the most likely ids, int64.

    Raises IndexError for ids, rows or tops that there are not.
    """
    count, width = logits.shape
    device = logits.device
    check("rows", rows, count)
    check("ids", ids, width)
    check("tops", tops, width + 1)
    own = peaks[as_tensor(rows, torch.int64, device)]
    cooling = as_tensor(np.minimum(temperatures, LARGEST), torch.float64, device)
    sums = torch.empty(len(rows), dtype=torch.float64, device=device)
    log_sums_call(logits, as_tensor(rows, torch.int32, device), own, cooling, sums).run()
    most_likely = _most_likely(logits, rows, tops, peaks)
    numbers = np.arange(len(rows))
    owner = np.concatenate((numbers, np.repeat(numbers, tops), np.repeat(numbers, id_counts)))
    wanted = torch.cat((tokens, most_likely, as_tensor(ids, torch.int64, device)))
    of = as_tensor(owner, torch.int64, device)
    z = logits[as_tensor(rows[owner], torch.int64, device), wanted].to(torch.float64)
    values = (z - own[of].to(torch.float64)) / cooling[of] - sums[of]
    return torch.where(torch.isfinite(own[of]), values, torch.nan).to(torch.float32), most_likely


def log_sums_call(
    logits: torch.Tensor, rows: torch.Tensor, peaks: torch.Tensor, temperatures: torch.Tensor, sums: torch.Tensor
) -> Call:
    """sums: float64 [N], written. rows: int32, peaks: float32, temperatures: float64 [N]."""
    arguments = {
        "logits": logits, "rows": rows, "peaks": peaks, "temperatures": temperatures, "sums": sums,
        "row_stride": logits.stride(0), "width": logits.shape[1],
    }  # fmt: skip
    return Call(kernels.log_sums, (len(rows), 1, 1), arguments, {"BLOCK": BLOCK}, warps=8)


def _most_likely(logits: torch.Tensor, rows: Longs, tops: Longs, peaks: torch.Tensor) -> torch.Tensor:
    """The most likely ids of each row, end to end; 0, 1, ... of one whose largest is not finite."""
    device = logits.device
    if not tops.any():
        return torch.empty(0, dtype=torch.int64, device=device)
    needed, place = np.unique(rows[tops > 0], return_inverse=True)
    most = int(tops.max())
    sorted_rows = as_tensor(needed, torch.int64, device)
    order = ranks(logits[sorted_rows])[1][:, :most]
    order = torch.where(torch.isfinite(peaks[sorted_rows])[:, None], order, torch.arange(most, device=device))
    lengths = tops[tops > 0]
    ranks_of_each = np.concatenate([np.arange(length) for length in lengths])
    where = as_tensor(np.repeat(place, lengths), torch.int64, device)
    return order[where, as_tensor(ranks_of_each, torch.int64, device)]


def check(name: str, values: Longs, limit: int) -> None:
    """Raises IndexError for a value outside [0, limit)."""
    wrong = values[(values < 0) | (values >= limit)]
    if len(wrong):
        raise IndexError(f"{name} holds {int(wrong[0])}; allowed: 0 to {limit - 1}")
