"""Compiled from csrc/; absent where the package was installed without a C++ compiler."""

import numpy as np
from numpy.typing import NDArray

def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]: ...
