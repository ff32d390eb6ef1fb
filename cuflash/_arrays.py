"""Steps on NumPy arrays that the CPU backend's tiles are made of."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

LOG2_E = math.log2(math.e)


# From this many rows on, the scores of a tile are stored key by key, which halves the time to find
# each row's largest score.
ROWS_BY_KEY = 16


# Memory is kept for tiles of at least this many elements; malloc is quick with smaller ones.
LEAST_KEPT = 2**14


class Scratch:
    """Each thread's room for a tile: fresh memory would cost more than the arithmetic on it.

    `size` is that of the scores of the largest tile; `by_row`: however many rows there are.
    """

    def __init__(self, size: int, dtype: np.dtype, by_row: bool = False) -> None:
        self.size, self.dtype, self.by_row = size, dtype, by_row
        self.kept = threading.local() if size >= LEAST_KEPT else None

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The buffer of this name as a contiguous array, with whatever it holds."""
        if self.kept is None:
            return np.empty(shape, self.dtype)
        buffers: dict[str, np.ndarray] = vars(self.kept)  # this thread's
        size = math.prod(shape)
        if name not in buffers or buffers[name].size < size:
            buffers[name] = np.empty(max(size, self.size), self.dtype)
        return buffers[name][:size].reshape(shape)

    def scores(self, name: str, shape: tuple[int, int, int]) -> np.ndarray:
        """The buffer of this name as the scores of a tile, (heads, rows, keys)."""
        heads, rows, keys = shape
        if rows >= ROWS_BY_KEY and not self.by_row:
            return transposed(self.array(name, (heads, keys, rows)))
        return self.array(name, shape)


def row_maxima(scores: np.ndarray) -> np.ndarray:
    """(heads, rows) of the scores of a tile."""
    longer = _in_longer_rows(scores, 8)
    if longer is None:
        return np.maximum.reduce(scores, axis=-1)
    heads, rows, _ = scores.shape
    return np.maximum.reduce(np.maximum.reduce(longer, axis=1).reshape(heads, -1, rows), axis=1)


def apply_by_row(function: np.ufunc, scores: np.ndarray, x: np.ndarray) -> None:
    """function(scores, x) of the scores of a tile and (heads, rows), in place."""
    longer = _in_longer_rows(scores, 16)
    if longer is None:
        function(scores, x[..., None], out=scores)
    else:
        function(longer, np.tile(x, longer.shape[-1] // x.shape[-1])[:, None], out=longer)


def _in_longer_rows(scores: np.ndarray, count: int) -> np.ndarray | None:
    """(heads, keys / count, count * rows), a view: NumPy's inner loops would be short for few rows.

    None where the keys can't be divided so, or the scores do not lie by key.
    """
    heads, rows, keys = scores.shape
    by_key = transposed(scores)
    if rows < ROWS_BY_KEY or keys % count or not by_key.flags.c_contiguous:
        return None
    return by_key.reshape(heads, keys // count, count * rows)


def small_scores(dtype: np.dtype) -> float:
    """Scores of at most this size differ by so little that no exponential of theirs underflows."""
    return -0.49 * np.finfo(dtype).minexp / LOG2_E


def exponentials(x: np.ndarray, unit: float, clips: bool = False) -> np.ndarray:
    """exp(x / unit) in place, for x <= 0; 0 where the result would be subnormal.

    `clips`: positive x count as 0. The unit log2(e) is for differences of small scores.
    """
    if unit != 1:
        return np.exp2(x, out=x)  # twice as fast as exp
    numbers = np.finfo(x.dtype)
    lowest = numbers.minexp * (1 - 4 * numbers.eps) / LOG2_E
    underflows = not np.minimum.reduce(x, axis=None) >= lowest
    # Where results underflow, exp2 is a hundred times slower, and so are products of them.
    if underflows or clips:
        np.clip(x, lowest, 0, out=x)
    x *= LOG2_E
    np.exp2(x, out=x)
    if underflows:  # rounds to multiples of 4 * tiny, so that 0 is left of what was clipped
        x += 4 * numbers.tiny / numbers.eps
        x -= 4 * numbers.tiny / numbers.eps
    return x


class Hidden(NamedTuple):
    """The pairs of a tile that do not see each other, (heads, group * rows, keys)."""

    group: int
    # Columns, and their limit, which broadcasts to (heads, group, rows, those columns).
    parts: list[tuple[slice, np.ndarray]]

    def array(self, shape: tuple[int, int, int]) -> np.ndarray:
        """All pairs of a tile of this shape, True where hidden."""
        return hide(np.zeros(shape, bool), self, True)


def limit_of(hidden: np.ndarray, dtype: np.dtype, by_key: bool) -> np.ndarray:
    """(..., rows, keys): 0 where hidden, else NaN; by key as the scores that it meets."""
    *heads, rows, keys = hidden.shape
    if by_key:
        limit = transposed(np.full((*heads, keys, rows), np.nan, dtype))
    else:
        limit = np.full((*heads, rows, keys), np.nan, dtype)
    np.copyto(limit, 0, where=hidden)
    return limit


def hide(x: np.ndarray, hidden: Hidden | None, value: float) -> np.ndarray:
    """Overwrite what is not seen of (heads, group * rows, keys), in place."""
    for some, limit in _hidden_parts(x, hidden):
        np.copyto(some, value, where=limit == 0)
    return x


def lower(x: np.ndarray, hidden: Hidden | None, to: float) -> None:
    """`hide` by a number below all that is seen, or that is NaN, in place."""
    for some, limit in _hidden_parts(x, hidden):
        np.fmin(some, limit + to, out=some)


def hide_exponentials(x: np.ndarray, hidden: Hidden | None) -> np.ndarray:
    """`hide` by 0 of what is not negative, or NaN."""
    for some, limit in _hidden_parts(x, hidden):
        np.fmin(some, limit, out=some)  # it passes over NaN, and has no branch
    return x


def _hidden_parts(x: np.ndarray, hidden: Hidden | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of the columns of x in which something is hidden, and their limits."""
    if hidden is not None:
        heads, rows, keys = x.shape
        by_head = x.reshape(heads, hidden.group, rows // hidden.group, keys)
        for columns, limit in hidden.parts:
            yield by_head[..., columns], limit


def drop(x: np.ndarray, dropped: np.ndarray | None, value: np.ndarray | float) -> None:
    """Overwrite what dropout takes away, in place."""
    if dropped is not None:
        np.copyto(x, value, where=dropped)


def product(
    weights: np.ndarray, values: np.ndarray, hidden: Hidden | None, by_key: bool = False
) -> np.ndarray:
    """weights @ values; a hidden pair adds nothing, although 0 * NaN and 0 * inf are NaN.

    A hidden weight is 0, or is not finite and overwritten with 0. `by_key`: the product sums over
    the rows, transposed(weights) @ values.
    """
    factor = transposed(weights) if by_key else weights
    total = factor @ values
    # What is not finite, on either side, shows in the product: few numbers to look at.
    if hidden is None or np.isfinite(np.vdot(total, total)):
        return total
    hide(weights, hidden, 0)
    seen = ~hidden.array(weights.shape)
    seen = transposed(seen) if by_key else seen
    bad = ~np.isfinite(values).all(axis=-1)
    total = factor @ np.where(bad[..., None], 0, values)
    for head, i in zip(*bad.nonzero(), strict=True):
        some = seen[head, :, i]
        total[head, some] += factor[head, some, i, None] * values[head, i]
    return total


def packed(
    x: np.ndarray,
    dtype: np.dtype,
    columns: int = 0,
    factor: float | None = None,
    room: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> np.ndarray:
    """(heads, group, rows, size) to (heads, group * rows, size + columns), columns of 1.

    `room` gives the memory of this shape; by default it is new.
    """
    heads, group, rows, size = x.shape
    shape = (heads, group, rows, size + columns)
    wider = np.empty(shape, dtype) if room is None else room(shape)
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
