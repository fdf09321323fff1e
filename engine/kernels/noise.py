"""The noise of sampling: a hash of (seed, position), so that a draw depends on nothing else.

The draw for position p of a request with seed s is element p of the splitmix64 stream that starts at state mix(s):

    word(s, p) = mix(mix(s) + (p + 1) * 0x9E3779B97F4A7C15)        all modulo 2^64
    mix(z): z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^ z >> 31
    uniform(s, p) = (word(s, p) >> 11) / 2^53

`mix` is splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); the
inner one keeps the streams of related seeds apart. The function is written twice, here in numpy and in csrc/noise.h,
and both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Uniforms = Callable[[NDArray[np.uint64], NDArray[np.int64]], NDArray[np.float64]]

compiled: Uniforms | None
"""The C++ twin, None where the package was installed without a compiler."""
try:
    from engine.kernels._cpu import uniforms as compiled
except ImportError:
    compiled = None

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw one number in [0, 1) for each row.

    seeds: uint64 [N]; positions: int64 [N], the index in the whole sequence of the token to be drawn.
    Returns float64 [N]. Raises ValueError when the arrays are not of one length and these types.
    """
    for name, column, dtype in (("seeds", seeds, np.uint64), ("positions", positions, np.int64)):
        if column.dtype != dtype or column.ndim != 1:
            raise ValueError(f"{name} is {column.dtype}{list(column.shape)}, not {np.dtype(dtype)}[N]")
    if len(seeds) != len(positions):
        raise ValueError(f"{len(seeds)} seeds for {len(positions)} positions")
    draw = compiled or portable_uniforms
    return draw(np.ascontiguousarray(seeds), np.ascontiguousarray(positions))


def portable_uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """`uniforms` in numpy alone."""
    steps = positions.view(np.uint64) + np.uint64(1)
    words = _mix(_mix(seeds) + steps * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
