"""The reductions of sampling. A row is one program's affair, block after block, so that every sum has one order."""

import triton
import triton.language as tl


@triton.jit
def best_parts(logits, peaks, ids, row_stride, sections, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of one section of a row: the largest and the lowest id that has it; NaN where there is one."""
    row, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = section * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(logits + row * row_stride + column, mask=inside, other=float("-inf"))
    broken = tl.max((value != value).to(tl.int32), 0)
    value = tl.where(value == value, value, float("-inf"))
    peak = tl.max(value, 0)
    best = tl.min(tl.where(inside & (value == peak), column, WIDTH), 0)
    tl.store(peaks + row * sections + section, tl.where(broken > 0, float("nan"), peak))
    tl.store(ids + row * sections + section, best)


@triton.jit(do_not_specialize=["sections"])
def best_whole(peaks, ids, best_peaks, best_ids, sections, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    section = tl.arange(0, BLOCK)
    inside = section < sections
    value = tl.load(peaks + row * sections + section, mask=inside, other=float("-inf"))
    broken = tl.max((value != value).to(tl.int32), 0)
    value = tl.where(value == value, value, float("-inf"))
    peak = tl.max(value, 0)
    best = tl.load(ids + row * sections + section, mask=inside & (value == peak), other=2147483647)
    tl.store(best_peaks + row, tl.where(broken > 0, float("nan"), peak))
    tl.store(best_ids + row, tl.where(broken > 0, 0, tl.min(best, 0)).to(tl.int64))


@triton.jit
def _weights(z, peak, temperature, column, width, BLOCK: tl.constexpr):
    inside = column < width
    value = tl.load(z + column, mask=inside, other=float("-inf"))
    return tl.exp(tl.div_rn(value - peak, temperature))


@triton.jit(do_not_specialize=["row_stride", "width"])
def locate(
    logits, rows, peaks, temperatures, limits, top_ps, min_ps, uniforms, found, row_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    """The index in its row in which `uniform` of the sum of the weights that are kept falls; see `Backend.draw`.

    With a limit below the width or a top_p below 1 the rows are in the order of ranks. Columns: float32 temperatures
    and min_ps, float64 top_ps and uniforms, int32 limits; peaks: of the rows of `logits` that `rows` (int32) names.
    """
    draw = tl.program_id(0)
    row = tl.load(rows + draw).to(tl.int64)
    z = logits + row * row_stride
    peak = tl.load(peaks + draw)
    temperature = tl.load(temperatures + draw)
    limit = tl.load(limits + draw)
    top_p = tl.load(top_ps + draw)
    min_p = tl.load(min_ps + draw)
    offsets = tl.arange(0, BLOCK)
    end = tl.minimum(width, limit)  # what lies behind is not kept, whatever its weight

    most = tl.full([], float("inf"), tl.float64)
    if top_p < 1.0:
        whole = tl.full([], 0.0, tl.float64)
        for start in range(0, width, BLOCK):
            whole += tl.sum(_weights(z, peak, temperature, start + offsets, width, BLOCK).to(tl.float64), 0)
        most = top_p * whole

    before = tl.full([], 0.0, tl.float64)
    kept_sum = tl.full([], 0.0, tl.float64)
    for start in range(0, end, BLOCK):
        weight = _weights(z, peak, temperature, start + offsets, end, BLOCK)
        wide = weight.to(tl.float64)
        reached = before + tl.cumsum(wide, 0)
        kept = tl.where((weight >= min_p) & (reached - wide <= most), wide, 0.0)
        kept_sum += tl.sum(kept, 0)
        before += tl.sum(wide, 0)

    target = tl.load(uniforms + draw) * kept_sum
    before = tl.full([], 0.0, tl.float64)
    kept_before = tl.full([], 0.0, tl.float64)
    index = width
    last = 0
    for start in range(0, end, BLOCK):
        weight = _weights(z, peak, temperature, start + offsets, end, BLOCK)
        wide = weight.to(tl.float64)
        reached = before + tl.cumsum(wide, 0)
        kept = tl.where((weight >= min_p) & (reached - wide <= most), wide, 0.0)
        here = (kept_before + tl.cumsum(kept, 0) > target) & (kept > 0.0)
        index = tl.minimum(index, tl.min(tl.where(here, start + offsets, width), 0))
        last = tl.maximum(last, tl.max(tl.where(kept > 0.0, start + offsets, 0), 0))
        kept_before += tl.sum(kept, 0)
        before += tl.sum(wide, 0)
    # Rounding may have put the target beyond the last sum: the last weight is the one meant.
    tl.store(found + draw, tl.where(index < width, index, last).to(tl.int64))


@triton.jit(do_not_specialize=["row_stride", "width"])
def log_sums(logits, rows, peaks, temperatures, sums, row_stride, width, BLOCK: tl.constexpr):
    """float64 [N]: the logarithm of the sum of exp((z - peak) / temperature); temperatures and sums are float64."""
    draw = tl.program_id(0)
    z = logits + tl.load(rows + draw).to(tl.int64) * row_stride
    peak = tl.load(peaks + draw).to(tl.float64)
    temperature = tl.load(temperatures + draw)
    offsets = tl.arange(0, BLOCK)
    whole = tl.full([], 0.0, tl.float64)
    for start in range(0, width, BLOCK):
        column = start + offsets
        value = tl.load(z + column, mask=column < width, other=float("-inf")).to(tl.float64)
        cooled = ((value - peak) / temperature).to(tl.float32)
        whole += tl.sum(tl.exp(cooled).to(tl.float64), 0)
    tl.store(sums + draw, tl.log(whole))
