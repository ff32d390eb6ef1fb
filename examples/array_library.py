"""The array library that the examples compute with: CuPy where a GPU serves, NumPy elsewhere."""

from __future__ import annotations

from types import ModuleType

import numpy as np

OLDEST_GPU = 80  # compute capability 8.0, Ampere


def array_library() -> ModuleType:
    """CuPy if it is installed and finds a GPU that has kernels, else NumPy."""
    try:
        import cupy

        capability = int(cupy.cuda.Device().compute_capability)
    except ImportError:
        return np
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, or no GPU
        return np
    return cupy if capability >= OLDEST_GPU else np
