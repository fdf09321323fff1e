"""How large what ranks exchange can become."""

from __future__ import annotations

_CACHE_LINE = 64
_PANEL = 32


def part_bytes(tokens: int, width: int) -> int:
    """Bytes of a rank's part of a sum: `tokens` rows of `width` float32 channels, as the buffers of csrc lie: padded to
    whole panels, and to an odd number of cache lines."""
    lines = -(-(-(-width // _PANEL) * _PANEL * 4) // _CACHE_LINE)
    return tokens * (lines | 1) * _CACHE_LINE
