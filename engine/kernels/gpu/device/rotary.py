"""Queries, keys and values out of a fused projection: normed, rotated, written."""

import triton
import triton.language as tl


@triton.jit
def rotary_store(
    qkv, q_norm, k_norm, cos, sin, slots, queries, keys, values, eps, head_stride,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token. HALF: half the channels that are rotated, 0 for none; cos, sin: [T, HALF].

    slots: -1 for a token that only fills a batch up, and leaves nothing in the pool.

    What is normed is rounded before it is rotated, and that before it goes into the pool, as between two ops.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head < QUERY_HEADS + 2 * KV_HEADS)[:, None] & (column < DIM)[None, :]
    of_query = (head < QUERY_HEADS)[:, None]
    of_value = (head >= QUERY_HEADS + KV_HEADS)[:, None]
    kind = qkv.dtype.element_ty
    source = qkv + (token * (QUERY_HEADS + 2 * KV_HEADS) + head)[:, None] * DIM
    given = tl.load(source + column[None, :], mask=inside, other=0.0)
    value = given.to(tl.float32)
    turned = column < 2 * HALF
    partner = column
    if HALF > 0:
        partner = tl.where(column < HALF, column + HALF, tl.where(turned, column - HALF, column))
    if q_norm is not None:
        inverse = (1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / DIM + eps))[:, None]
        value = value * inverse * _scale(q_norm, k_norm, column, of_query, DIM)
        value = value.to(kind).to(tl.float32)
    if HALF > 0:
        other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if q_norm is not None:
            other = other * inverse * _scale(q_norm, k_norm, partner, of_query, DIM)
            other = other.to(kind).to(tl.float32)
        angle = token * HALF + tl.where(column < HALF, column, column - HALF)
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        value = value * c[None, :] + other * tl.where(column < HALF, -s, s)[None, :]
    result = value.to(kind)
    where = (token * QUERY_HEADS + head)[:, None] * DIM + column[None, :]
    tl.store(queries + where, result, mask=inside & of_query)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    kv_head = tl.where(head < QUERY_HEADS, 0, (head - QUERY_HEADS) % KV_HEADS).to(tl.int64)
    where = (kv_head * head_stride + slot * DIM)[:, None] + column[None, :]
    tl.store(keys + where, result.to(keys.dtype.element_ty), mask=inside & (of_query == 0) & (of_value == 0))
    tl.store(values + where, given.to(values.dtype.element_ty), mask=inside & of_value)


@triton.jit
def _scale(q_norm, k_norm, column, of_query, DIM: tl.constexpr):
    """[HEADS, BLOCK]: the norms' scale of a channel."""
    of_queries = tl.load(q_norm + column, mask=column < DIM, other=0.0).to(tl.float32)
    of_keys = tl.load(k_norm + column, mask=column < DIM, other=0.0).to(tl.float32)
    return tl.where(of_query, of_queries[None, :], of_keys[None, :])
