"""Steps on NumPy arrays that the CPU backend's tiles are made of."""

from __future__ import annotations

import math
import threading

import numpy as np

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Scratch(threading.local):
    """Each thread's room for the scores of a tile, and for what has their shape."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.buffers: dict[int, np.ndarray] = {}

    def array(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """The buffer of this index as a contiguous array, with whatever it holds."""
        if index not in self.buffers:
            self.buffers[index] = np.empty(self.size, self.dtype)
        return self.buffers[index][: math.prod(shape)].reshape(shape)


def in_units_of_log2(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x log2(e); a finite number stays finite, as the lowest one that stands for a mask."""
    scaled = x * np.asarray(LOG2_E, dtype)
    overflown = np.isinf(scaled)
    if overflown.any():
        largest = np.copysign(np.finfo(dtype).max, scaled)
        np.copyto(scaled, largest, where=overflown & np.isfinite(x))
    return scaled


def exp2(x: np.ndarray) -> np.ndarray:
    """2 to the power of x, in place; 0 where that is no normal number."""
    numbers = np.finfo(x.dtype)
    if np.minimum.reduce(x.reshape(-1)) >= numbers.minexp:
        return np.exp2(x, out=x)
    # Where results underflow, NumPy's exp2 is a hundred times slower, and so are products of them.
    np.maximum(x, numbers.minexp, out=x)
    np.exp2(x, out=x)
    np.copyto(x, 0, where=x < 2 * numbers.tiny)
    return x


def hide(x: np.ndarray, hidden: np.ndarray | None, value: float) -> np.ndarray:
    """Overwrite what is not seen, in place."""
    if hidden is not None:
        np.copyto(x, value, where=hidden)
    return x


def product(weights: np.ndarray, values: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    """weights @ values; a hidden pair adds nothing, although 0 * NaN and 0 * inf are NaN.

    A hidden weight is 0, or is not finite and overwritten with 0.
    """
    total = weights @ values
    # What is not finite, on either side, shows in the product: few numbers to look at.
    if hidden is None or np.isfinite(np.vdot(total, total)):
        return total
    weights, hidden = hide(weights, hidden, 0), np.broadcast_to(hidden, weights.shape)
    bad = ~np.isfinite(values).all(axis=-1)
    total = weights @ np.where(bad[..., None], 0, values)
    for head, i in zip(*bad.nonzero(), strict=True):
        seen = ~hidden[head, :, i]
        total[head, seen] += weights[head, seen, i, None] * values[head, i]
    return total


def packed(
    x: np.ndarray, dtype: np.dtype, columns: int = 0, factor: float | None = None
) -> np.ndarray:
    """(heads, group, rows, size) to a new (heads, group * rows, size + columns), columns of 1."""
    heads, group, rows, size = x.shape
    wider = np.empty((heads, group, rows, size + columns), dtype)
    if factor is None:
        wider[..., :size] = x
    else:
        np.multiply(x, factor, out=wider[..., :size], dtype=dtype)
    wider[..., size:] = 1
    return wider.reshape(heads, group * rows, size + columns)


def transposed(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else x.swapaxes(-1, -2)


def empty_like(x: np.ndarray, size: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """An array of x's shape and order of axes; only the size of the last may be another."""
    batch, seqlen, heads, own_size = x.shape
    size, dtype = size or own_size, dtype or x.dtype
    if abs(x.strides[2]) > abs(x.strides[1]):
        return np.empty((batch, heads, seqlen, size), dtype).swapaxes(1, 2)
    return np.empty((batch, seqlen, heads, size), dtype)
