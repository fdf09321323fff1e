"""Attention over the paged pool: one kernel for prefill and decode, and one that merges the parts of a decode.

A tile is some new tokens of one sequence with all query heads of one key head, packed as rows. It goes over the context
in blocks of keys at multiples of BLOCK_KEYS, which are summed within splits at multiples of SPLIT, which are folded in
order. What a row skips or masks adds exact zeros, so its result depends only on what it sees.

In a prefill, an item of work is a tile, with all its splits. In a decode each split is an item that leaves its sums in
memory, and `merge` folds them by the same function. Products of float32 are of float32 ("ieee"), not of tf32.
"""

import triton
import triton.language as tl


@triton.jit
def fold(total, weight, peak, part_total, part_weight, part_peak):
    """Add a split's sums, which are relative to its largest score, to those of the splits before it."""
    highest = tl.maximum(peak, part_peak)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    old = tl.exp2(peak - base)
    new = tl.exp2(part_peak - base)
    return total * old[:, None] + part_total * new[:, None], weight * old + part_weight * new, highest


@triton.jit
def finished(total, weight):
    return total / tl.where(weight == 0.0, 1.0, weight)[:, None]  # 0: a row of the tile that is no token


@triton.jit
def seen_by(first, last, shift, length, window, CAUSAL: tl.constexpr):
    """The keys [low, high) that the tokens [first, last) see; token t stands at t + shift of the context."""
    low = 0
    high = length
    if CAUSAL:
        low = tl.maximum(first + shift + 1 - window, 0)
        high = last + shift
    return low, high


@triton.jit(do_not_specialize=["window", "splits_each", "in_parts"])
def attend(
    queries, keys, values, context_slots, query_starts, context_starts, items, item_count,
    output, part_totals, part_peaks, scale, window, head_stride, splits_each, in_parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """items: [n, 3], of each its sequence, its first token, and the first of its `splits_each` splits. There may
    be more programs than items."""
    item, head = tl.program_id(0), tl.program_id(1)
    if item >= tl.load(item_count):
        return
    sequence = tl.load(items + item * 3)
    first = tl.load(items + item * 3 + 1)
    section = tl.load(items + item * 3 + 2)
    stop = tl.load(query_starts + sequence + 1)
    context = tl.load(context_starts + sequence)
    length = tl.load(context_starts + sequence + 1) - context
    shift = length - stop
    last = tl.minimum(first + ROWS // GROUP, stop)
    low, high = seen_by(first, last, shift, length, window, CAUSAL)
    split_first = tl.maximum(section, low // SPLIT)
    split_stop = tl.minimum(section + splits_each, (high + SPLIT - 1) // SPLIT)
    if split_first >= split_stop:
        return

    rows = tl.arange(0, ROWS)
    token = first + rows // GROUP
    query_head = head * GROUP + rows % GROUP
    index = token + shift
    valid = (rows < ROWS // GROUP * GROUP) & (token < last)
    channels = tl.arange(0, BLOCK_DIM)
    inside = channels < DIM
    row_offsets = (token.to(tl.int64) * (HEADS * GROUP) + query_head) * DIM
    held_rows = valid[:, None] & inside[None, :]
    q = tl.load(queries + row_offsets[:, None] + channels[None, :], mask=held_rows, other=0.0)
    head_keys = keys + head.to(tl.int64) * head_stride
    head_values = values + head.to(tl.int64) * head_stride

    total = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(split_first, split_stop):
        part_total = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
        part_weight = tl.zeros([ROWS], tl.float32)
        part_peak = tl.full([ROWS], float("-inf"), tl.float32)
        begin = tl.maximum(split * SPLIT, low // BLOCK_KEYS * BLOCK_KEYS)
        for start in range(begin, tl.minimum(split * SPLIT + SPLIT, high), BLOCK_KEYS):
            key = start + tl.arange(0, BLOCK_KEYS)
            written = (key >= low) & (key < high)  # what no row sees may never have been written
            slot = tl.load(context_slots + context + key, mask=written, other=0)
            where = slot[:, None] * DIM + channels[None, :]
            held = written[:, None] & inside[None, :]
            k = tl.load(head_keys + where, mask=held, other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            visible = written[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= index[:, None]) & (key[None, :] > index[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            highest = tl.maximum(part_peak, tl.max(scores, 1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            shares = tl.exp2(scores - base[:, None])
            fade = tl.exp2(part_peak - base)
            part_weight = part_weight * fade + tl.sum(shares, 1)
            v = tl.load(head_values + where, mask=held, other=0.0).to(q.dtype)
            part_total = part_total * fade[:, None]
            part_total = tl.dot(shares.to(q.dtype), v, part_total, input_precision="ieee")
            part_peak = highest
        total, weight, peak = fold(total, weight, peak, part_total, part_weight, part_peak)

    if in_parts > 0:
        part = (item.to(tl.int64) * HEADS * GROUP) + query_head
        tl.store(part_totals + part[:, None] * DIM + channels[None, :], total, mask=held_rows)
        tl.store(part_peaks + part * 2, weight, mask=valid)
        tl.store(part_peaks + part * 2 + 1, peak, mask=valid)
    else:
        result = finished(total, weight).to(output.dtype.element_ty)
        tl.store(output + row_offsets[:, None] + channels[None, :], result, mask=held_rows)


@triton.jit(do_not_specialize=["window"])
def merge(
    part_totals, part_peaks, query_starts, context_starts, decodes, output, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Fold the splits of a decode's token, for one key head. decodes: [n, 3], of each its sequence, its token, and the
    item of its first split. Zeros for a sequence without context, which only fills a batch up."""
    decode, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(decodes + decode * 3)
    token = tl.load(decodes + decode * 3 + 1)
    item = tl.load(decodes + decode * 3 + 2)
    stop = tl.load(query_starts + sequence + 1)
    length = tl.load(context_starts + sequence + 1) - tl.load(context_starts + sequence)
    low, high = seen_by(token, token + 1, length - stop, length, window, CAUSAL)
    rows = tl.arange(0, ROWS)
    valid = rows < GROUP
    channels = tl.arange(0, BLOCK_DIM)
    held = valid[:, None] & (channels < DIM)[None, :]
    query_head = head * GROUP + rows
    total = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(low // SPLIT, (high + SPLIT - 1) // SPLIT):
        part = ((item + split).to(tl.int64) * HEADS * GROUP) + query_head
        part_total = tl.load(part_totals + part[:, None] * DIM + channels[None, :], mask=held, other=0.0)
        part_weight = tl.load(part_peaks + part * 2, mask=valid, other=1.0)
        part_peak = tl.load(part_peaks + part * 2 + 1, mask=valid, other=0.0)
        total, weight, peak = fold(total, weight, peak, part_total, part_weight, part_peak)
    result = finished(total, weight).to(output.dtype.element_ty)
    where = (token.to(tl.int64) * (HEADS * GROUP) + query_head)[:, None] * DIM + channels[None, :]
    tl.store(output + where, result, mask=held)
