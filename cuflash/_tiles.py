"""Which tiles of rows and keys see each other, as plain integers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cuflash._arrays import limit_of
from cuflash._problem import Problem


class Band(NamedTuple):
    """The keys that rows of one batch entry see, masks aside: i + first <= j <= i + last."""

    rows: int  # valid ones
    keys: int
    first: int | None  # None: unbounded
    last: int | None
    # The call's: query i stands at key i + offset. Integers that broadcast to (heads, 1, rows,
    # keys), and so `hidden`, where heads belong to sequences of several lengths.
    offset: int | np.ndarray = 0
    hidden: np.ndarray | None = None  # in place of first and last

    @classmethod
    def of(cls, problem: Problem, batch: int) -> Band:
        """The band of one batch entry."""
        rows, keys = problem.seqlen_q, problem.seqlen_k
        if problem.q_lens is not None:
            rows = int(problem.q_lens[batch])
        if problem.kv_lens is not None:
            keys = int(problem.kv_lens[batch])
        offset = keys - rows
        if problem.offset is not None:
            single = isinstance(problem.offset, int)
            offset = problem.offset if single else int(problem.offset[batch])
        left, right = problem.window
        first = None if left is None else offset - left
        last = None if right is None else offset + right
        return cls(rows, keys, first, last, offset)

    def keys_of(self, rows: slice) -> slice:
        """The keys that any of these rows sees."""
        start = 0 if self.first is None else max(0, rows.start + self.first)
        stop = self.keys if self.last is None else min(self.keys, rows.stop + self.last)
        return slice(start, stop)

    def rows_of(self, keys: slice) -> slice:
        """The rows that see any of these keys."""
        start = 0 if self.last is None else max(0, keys.start - self.last)
        stop = self.rows if self.first is None else min(self.rows, keys.stop - self.first)
        return slice(start, stop)

    def limit(
        self, rows: slice, keys: slice, dtype: np.dtype, by_key: bool = True
    ) -> np.ndarray | None:
        """(rows, keys) or (heads, 1, rows, keys), as of `limit_of`; None if all is seen."""
        if self.hidden is not None:
            return limit_of(self.hidden[..., rows, keys], dtype, by_key)
        edges = _edges(rows, keys, self.first, self.last)
        return None if edges is None else _limit(edges, dtype, by_key)


def hidden_by_band(
    rows: slice, keys: slice, first: int | None, last: int | None
) -> np.ndarray | None:
    """(rows, keys), True where not i + first <= j <= i + last; None if that is nowhere."""
    edges = _edges(rows, keys, first, last)
    return None if edges is None else _outside(*edges)


Edges = tuple[tuple[int, int], int | None, int | None]


def _edges(rows: slice, keys: slice, first: int | None, last: int | None) -> Edges | None:
    """The shape, and the band from the first row and key on; None if it has no edge there."""
    shift = rows.start - keys.start
    early = late = None
    if first is not None and keys.start < rows.stop - 1 + first:
        early = shift + first
    if last is not None and keys.stop - 1 > rows.start + last:
        late = shift + last
    if early is None and late is None:
        return None
    return (rows.stop - rows.start, keys.stop - keys.start), early, late


@lru_cache(maxsize=8)
def _outside(shape: tuple[int, int], first: int | None, last: int | None) -> np.ndarray:
    """True where not i + first <= j <= i + last; the same for every head, so it is kept."""
    outside = np.zeros(shape, dtype=bool)
    if first is not None:
        outside |= np.tri(*shape, first - 1, dtype=bool)
    if last is not None:
        outside |= ~np.tri(*shape, last, dtype=bool)
    outside.flags.writeable = False
    return outside


@lru_cache(maxsize=8)
def _limit(edges: Edges, dtype: np.dtype, by_key: bool) -> np.ndarray:
    return limit_of(_outside(*edges), dtype, by_key)


def visible_tiles(
    band: Band, rows: slice, keys: slice, tile_rows: int
) -> Iterator[tuple[slice, slice]]:
    """The tiles of these rows that see some of these keys, each with those that it sees."""
    some = intersection(rows, band.rows_of(keys))
    for tile in blocks(some, tile_rows):
        start = tile.start // tile_rows * tile_rows
        whole = slice(start, min(start + tile_rows, band.rows))
        yield whole, intersection(keys, band.keys_of(whole))


def blocks(span: slice, size: int) -> Iterator[slice]:
    """Cut a span at the multiples of size."""
    start = span.start
    while start < span.stop:
        stop = min(start // size * size + size, span.stop)
        yield slice(start, stop)
        start = stop


def intersection(a: slice, b: slice) -> slice:
    """What both spans contain; nothing where the stop is not above the start."""
    return slice(max(a.start, b.start), min(a.stop, b.stop))
