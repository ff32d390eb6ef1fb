"""Do strided arrays share memory? Decided from addresses alone, for NumPy and CuPy arrays alike."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

MAX_WORK = 100_000  # candidate solutions that NumPy tries, a few milliseconds


def overlap(a: Array, b: Array) -> bool:
    """Whether an element of `a` and one of `b` share a byte."""
    a_low, a_high = _extent(a.shape, a.strides, a.dtype.itemsize)
    b_low, b_high = _extent(b.shape, b.strides, b.dtype.itemsize)
    distance = address(b) - address(a)
    if a_high <= distance + b_low or distance + b_high <= a_low:
        return False
    try:
        return np.shares_memory(_addresses(a), _addresses(b), max_work=MAX_WORK)
    except np.exceptions.TooHardError:
        return True  # their extents meet, and telling their elements apart takes too long


def overlaps_itself(array: Array) -> bool:
    """Whether two elements may share a byte: some axis steps over less than the finer ones span."""
    return _overlaps_itself(array.shape, array.strides, array.dtype.itemsize)


@lru_cache(maxsize=1024)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    if 0 in shape:
        return False
    span = itemsize
    for stride, n in sorted(zip(map(abs, strides), shape, strict=True)):
        if n > 1:
            if stride < span:
                return True
            span += stride * (n - 1)
    return False


@lru_cache(maxsize=1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes from an array's pointer to its first byte and to past its last one."""
    if 0 in shape:
        return 0, 0
    reaches = [stride * (n - 1) for stride, n in zip(strides, shape, strict=True)]
    low = sum(reach for reach in reaches if reach < 0)
    high = sum(reach for reach in reaches if reach > 0)
    return low, high + itemsize


def address(array: Array) -> int:
    """Where an array's first element is, on the device that it is on."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def _addresses(array: Array) -> np.ndarray:
    """A NumPy array of the same addresses, on whatever device, that nobody may read."""
    interface = {
        "data": (address(array), False),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.dtype.itemsize}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
