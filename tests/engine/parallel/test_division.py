"""How a model is divided: everything is held once, nothing is forgotten, no rank is empty."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ConfigError
from engine.parallel.division import divide_evenly, divide_heads


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_heads(kv_heads: int, group: int, ranks: int) -> None:
    heads = kv_heads * group
    if ranks > heads:
        with pytest.raises(ConfigError, match=f"--tp-size is {ranks}|cannot be divided"):
            for rank in range(ranks):
                divide_heads(heads, kv_heads, rank, ranks)
        return
    try:
        parts = [divide_heads(heads, kv_heads, rank, ranks) for rank in range(ranks)]
    except ConfigError as error:  # more ranks share a head than it has queries
        assert ranks > kv_heads and "at most" in str(error)
        return
    owned = [head for queries, _ in parts for head in range(queries.start, queries.stop)]
    assert owned == list(range(heads))
    for queries, kv in parts:
        assert queries.size and kv.size and queries.size % kv.size == 0
        local = queries.size // kv.size
        for number, head in enumerate(range(queries.start, queries.stop)):
            assert head // group == kv.start + number // local, "a query head reads the head that it reads undivided"


@given(st.integers(1, 3000), st.integers(1, 40), st.data())
def test_channels(total: int, ranks: int, data: st.DataObject) -> None:
    weights = data.draw(st.none() | st.lists(st.floats(0.05, 3.0), min_size=ranks, max_size=ranks))
    if total < ranks:
        with pytest.raises(ConfigError, match="cannot be divided"):
            divide_evenly(total, 0, ranks, weights)
        return
    parts = [divide_evenly(total, rank, ranks, weights) for rank in range(ranks)]
    assert parts[0].start == 0 and parts[-1].stop == total and all(part.size > 0 for part in parts)
    assert all(left.stop == right.start for left, right in pairwise(parts))
    if weights is None and total >= 64 * ranks:
        assert max(part.size for part in parts) - min(part.size for part in parts) < 64
