"""Problems for tests of arguments, on the CPU and on a GPU that need not exist.

The CuPy arrays made here have shapes, strides and addresses; their elements nobody may read.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash._problem import Problem

B, SQ, SK, HQ, HK, D, DV = 2, 5, 7, 4, 2, 8, 6
SHAPES = {"q": (B, SQ, HQ, D), "k": (B, SK, HK, D), "v": (B, SK, HK, DV)}
OUT, LSE = (B, SQ, HQ, DV), (B, HQ, SQ)

FIRST_ADDRESS = 0x7F00_0000_0000
MIB = 1 << 20


def array(
    shape: tuple[int, ...], dtype: Any = np.float16, *, address: int = 0, device: int = 0
) -> Any:
    """An uninitialised CuPy array `address` bytes into the memory of a GPU that need not exist."""
    cupy = pytest.importorskip("cupy")
    nbytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    memory = cupy.cuda.UnownedMemory(FIRST_ADDRESS + address, nbytes, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def readable(values: Any) -> Any:
    """A CuPy array whose values can be read, as those on a GPU after a wait."""
    array = np.asarray(values)

    def read(name: str) -> Any:
        def method(self: Any) -> Any:
            self.reads.append(name)
            return getattr(array, name)()

        return method

    def get(self: Any, index: Any) -> Any:
        self.reads.append(index)
        return array[index]

    attributes = {
        "__module__": "cupy",
        "__dlpack__": None,
        "data": SimpleNamespace(device_id=0, ptr=0),
        "reads": [],
        "min": read("min"),
        "max": read("max"),
        "__getitem__": get,
        **{name: getattr(array, name) for name in ("shape", "dtype", "size", "strides", "ndim")},
    }
    return type("ndarray", (), attributes)()


class Maker:
    """Arrays on one device; on the GPU each in a mebibyte of its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.count = 0

    def __call__(self, shape: tuple[int, ...], dtype: Any = np.float16) -> Any:
        if self.device == "cpu":
            return np.zeros(shape, dtype)
        self.count += 1
        return array(shape, dtype, address=self.count * MIB)

    def problem(self, function: str = "attention", **changes: Any) -> Problem:
        arguments = {name: self(shape) for name, shape in SHAPES.items()}
        return Problem.create(function, self.device, **{**arguments, **changes})


def refused(error: type[Exception], message: str):
    return pytest.raises(error, match="^" + re.escape("cuflash.attention: " + message) + "$")
