"""What each rule of a mask says of blocks of rows and keys, and of pairs, on NumPy arrays.

Arrays here are by key head, (B, Hk, group, rows, keys), with 1 for an axis that shares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple

import numpy as np

from cuflash import _mask_tree as tree
from cuflash import _tiles


class Grid(NamedTuple):
    """The scores of a call, and the blocks that they are cut into."""

    shape: tree.ScoresShape
    offsets: np.ndarray  # (B,) integers, the call's
    block: tuple[int, int]  # rows and keys

    @property
    def group(self) -> int:
        """Query heads that read the same key head."""
        return max(1, self.shape.heads_q // max(1, self.shape.heads_k))

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each block, and the row after the last: (blocks, 1)."""
        starts, stops = _edges(self.shape.seqlen_q, self.block[0])
        return starts[:, None], stops[:, None]

    @property
    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """First key of each block, and the key after the last: (blocks,)."""
        return _edges(self.shape.seqlen_k, self.block[1])

    def by_key_head(self, x: np.ndarray) -> np.ndarray:
        """(B or 1, Hq, Hk or 1, ...) to (B or 1, Hk or 1, group or 1, ...)."""
        group = self.group if x.shape[1] == self.shape.heads_q else 1
        return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


class Area(NamedTuple):
    """Some heads, rows and keys of one batch entry."""

    grid: Grid
    batch: int
    heads: slice  # key heads
    members: slice  # of each head's group
    rows: slice
    keys: slice

    @property
    def i(self) -> np.ndarray:
        """(rows, 1)."""
        return np.arange(self.rows.start, self.rows.stop)[:, None]

    @property
    def j(self) -> np.ndarray:
        """(keys,)."""
        return np.arange(self.keys.start, self.keys.stop)

    def heads_of(self, x: np.ndarray) -> np.ndarray:
        """(B or 1, Hq, Hk or 1, ...) to (heads or 1, members or 1, ...)."""
        x = self.grid.by_key_head(x)
        x = x[0 if x.shape[0] == 1 else self.batch]
        heads, members = (
            slice(None) if n == 1 else some
            for n, some in zip(x.shape, (self.heads, self.members), strict=False)
        )
        return x[heads, members]


class Sight(NamedTuple):
    """What is visible of each block: (B or 1, Hk or 1, group or 1, blocks of rows, of keys)."""

    some: np.ndarray  # False: nothing is; True: perhaps something
    all: np.ndarray  # True: everything is; False: perhaps not


@singledispatch
def sight(mask: tree.Mask, grid: Grid) -> Sight:
    """What `mask` leaves visible of each block; axes that share may be 1."""
    raise NotImplementedError


@singledispatch
def visible(mask: tree.Mask, area: Area) -> np.ndarray | bool:
    """What broadcasts to (heads, members, rows, keys)."""
    raise NotImplementedError


@sight.register
def _(mask: tree.And, grid: Grid) -> Sight:
    left, right = sight(mask.left, grid), sight(mask.right, grid)
    return Sight(left.some & right.some, left.all & right.all)


@visible.register
def _(mask: tree.And, area: Area) -> np.ndarray | bool:
    return visible(mask.left, area) & visible(mask.right, area)


@sight.register
def _(mask: tree.Or, grid: Grid) -> Sight:
    left, right = sight(mask.left, grid), sight(mask.right, grid)
    return Sight(left.some | right.some, left.all | right.all)


@visible.register
def _(mask: tree.Or, area: Area) -> np.ndarray | bool:
    return visible(mask.left, area) | visible(mask.right, area)


@sight.register
def _(mask: tree.Not, grid: Grid) -> Sight:
    inner = sight(mask.inner, grid)
    return Sight(~inner.all, ~inner.some)


@visible.register
def _(mask: tree.Not, area: Area) -> np.ndarray | bool:
    return np.logical_not(visible(mask.inner, area))


@sight.register
def _(mask: tree.Compiled, grid: Grid) -> Sight:
    return sight(mask.inner, grid)


@visible.register
def _(mask: tree.Compiled, area: Area) -> np.ndarray | bool:
    return visible(mask.inner, area)


@sight.register
def _(mask: tree.Band, grid: Grid) -> Sight:
    (row, row_stop), (key, key_stop) = grid.rows, grid.keys
    offset = grid.offsets if mask.offset is None else np.atleast_1d(mask.offset)
    offset = _by_batch(offset.astype(np.int64))
    # Comparisons of a row with a column: what is as large as all blocks is of one byte each.
    some = everything = np.ones((1, 1, 1, 1, 1), bool)
    if mask.left is not None:
        first = offset - mask.left
        some, everything = key_stop - 1 >= row + first, key >= row_stop - 1 + first
    if mask.right is not None:
        last = offset + mask.right
        some = some & (key <= row_stop - 1 + last)
        everything = everything & (key_stop - 1 <= row + last)
    return Sight(some, everything)


@visible.register
def _(mask: tree.Band, area: Area) -> np.ndarray | bool:
    offset = area.grid.offsets if mask.offset is None else np.atleast_1d(mask.offset)
    offset = int(offset[0 if offset.size == 1 else area.batch])
    hidden = _tiles.hidden_by_band(
        area.rows,
        area.keys,
        None if mask.left is None else offset - mask.left,
        None if mask.right is None else offset + mask.right,
    )
    return True if hidden is None else ~hidden


@sight.register
def _(mask: tree.Lengths, grid: Grid) -> Sight:
    some = everything = np.ones((1, 1, 1, 1, 1), bool)
    for lens, (start, stop) in ((mask.q_lens, grid.rows), (mask.kv_lens, grid.keys)):
        if lens is not None:
            some = some & (start < _by_batch(lens))
            everything = everything & (stop <= _by_batch(lens))
    return Sight(some, everything)


@visible.register
def _(mask: tree.Lengths, area: Area) -> np.ndarray | bool:
    seen: np.ndarray | bool = True
    for lens, index in ((mask.q_lens, area.i), (mask.kv_lens, area.j)):
        if lens is not None:
            seen = seen & (index < lens[area.batch])
    return seen


@sight.register
def _(mask: tree.Prefix, grid: Grid) -> Sight:
    key, key_stop = grid.keys
    return Sight(key < _by_batch(mask.n), key_stop <= _by_batch(mask.n))


@visible.register
def _(mask: tree.Prefix, area: Area) -> np.ndarray:
    return area.j < mask.n[area.batch]


@sight.register
def _(mask: tree.Documents, grid: Grid) -> Sight:
    (rows, _), (keys, _) = grid.rows, grid.keys
    of_keys = mask.ids_of_keys
    q_first, q_last = (
        ufunc.reduceat(mask.q_ids, rows[:, 0], axis=1)[:, None, None, :, None]
        for ufunc in (np.minimum, np.maximum)
    )
    kv_first, kv_last = (
        ufunc.reduceat(of_keys, keys, axis=1)[:, None, None, None, :]
        for ufunc in (np.minimum, np.maximum)
    )
    some = (q_first <= kv_last) & (kv_first <= q_last)
    everything = (q_first == kv_last) & (kv_first == q_last)
    return Sight(some, everything)


@visible.register
def _(mask: tree.Documents, area: Area) -> np.ndarray:
    return mask.q_ids[area.batch, area.rows, None] == mask.ids_of_keys[area.batch, area.keys]


@sight.register
def _(mask: tree.Intervals, grid: Grid) -> Sight:
    (row, row_stop), (keys, _) = grid.rows, grid.keys
    some = everything = np.ones((1, 1, 1, 1, 1), bool)
    start, end = (grid.by_key_head(x) for x in (mask.start, mask.end))
    # An interval of no rows is taken from the end to the beginning, where no other one reaches.
    is_empty = start >= end
    start, end = np.where(is_empty, grid.shape.seqlen_q, start), np.where(is_empty, 0, end)
    for number in range(start.shape[-1]):
        first, last_first = _extremes(start[..., number], keys)
        first_end, end_ = _extremes(end[..., number], keys)
        some = some & ((last_first > row) | (first_end < row_stop))
        everything = everything & ((first >= row_stop) | (end_ <= row))
    return Sight(some, everything)


@visible.register
def _(mask: tree.Intervals, area: Area) -> np.ndarray | bool:
    hidden: np.ndarray | bool = False
    start, end = (area.heads_of(x)[:, :, None, area.keys] for x in (mask.start, mask.end))
    for number in range(start.shape[-1]):
        inside = (start[..., number] <= area.i) & (area.i < end[..., number])
        hidden = hidden | inside
    return ~hidden


@sight.register
def _(mask: tree.Blocks, grid: Grid) -> Sight:
    (row, row_stop), (key, key_stop) = grid.rows, grid.keys
    some = everything = grid.by_key_head(_four_axes(mask.array))
    for axis, start, stop, size in (
        (-2, row[:, 0], row_stop[:, 0], mask.block_q),
        (-1, key, key_stop, mask.block_k),
    ):
        start, stop = start // size, (stop - 1) // size + 1
        some = _over_spans(np.logical_or, some, start, stop, axis)
        everything = _over_spans(np.logical_and, everything, start, stop, axis)
    return Sight(some, everything)


@visible.register
def _(mask: tree.Blocks, area: Area) -> np.ndarray:
    array = area.heads_of(_four_axes(mask.array))
    return array[:, :, area.i // mask.block_q, area.j // mask.block_k]


@sight.register
def _(mask: tree.Dense, grid: Grid) -> Sight:
    some = everything = grid.by_key_head(_four_axes(mask.array))
    for axis, size in zip((-2, -1), grid.block, strict=True):
        if some.shape[axis] > 1:
            some = _by_blocks(np.any, some, size, axis)
            everything = _by_blocks(np.all, everything, size, axis)
    return Sight(some, everything)


@visible.register
def _(mask: tree.Dense, area: Area) -> np.ndarray:
    array = area.heads_of(_four_axes(mask.array))
    rows, keys = (
        slice(None) if n == 1 else some
        for n, some in zip(array.shape[2:], (area.rows, area.keys), strict=True)
    )
    return array[:, :, rows, keys]


@sight.register
def _(mask: tree.Expression, grid: Grid) -> Sight:
    # One pair, for all heads and batch entries: along which axes does the result differ?
    batch, heads, *_ = grid.shape
    pair = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
    b, h = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None]
    result = mask.evaluate((batch, heads, 1, 1), b, h, *pair)
    some = np.ones_like(grid.by_key_head(_four_axes(result)), dtype=bool)
    return Sight(some, ~some)


@visible.register
def _(mask: tree.Expression, area: Area) -> np.ndarray:
    grid = area.grid
    h = np.arange(grid.shape.heads_q).reshape(-1, grid.group)[area.heads, area.members]
    b = np.full((1, 1, 1, 1), area.batch)
    shape = (1, h.size, area.i.size, area.j.size)
    seen = _four_axes(mask.evaluate(shape, b, h.reshape(-1, 1, 1), area.i, area.j))[0]
    return seen.reshape(*(h.shape if seen.shape[0] > 1 else (1, 1)), *seen.shape[1:])


def _edges(seqlen: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(0, seqlen, size)
    return starts, np.minimum(starts + size, seqlen)


def _by_batch(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 1, 1, 1, 1)


def _four_axes(x: np.ndarray) -> np.ndarray:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _extremes(x: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, Hk, group, Sk) to the least and the greatest of each block of keys, (..., 1, blocks)."""
    least, greatest = (ufunc.reduceat(x, starts, axis=-1) for ufunc in (np.minimum, np.maximum))
    return least[..., None, :], greatest[..., None, :]


def _by_blocks(
    reduce: Callable[..., np.ndarray], x: np.ndarray, size: int, axis: int
) -> np.ndarray:
    """What is left of an axis, -1 or -2, when each `size` elements, or fewer at the end, are one.

    `reduceat` does the same, and fifty times slower where elements differ from block to block.
    """
    whole = x.shape[axis] // size * size
    first, rest = np.split(x, [whole], axis=axis)
    shape = list(x.shape)
    shape[x.ndim + axis : x.ndim + axis + 1] = [whole // size, size]
    parts = [reduce(first.reshape(shape), axis=axis)]
    if rest.size:
        parts.append(reduce(rest, axis=axis, keepdims=True))
    return np.concatenate(parts, axis=axis)


def _over_spans(
    ufunc: np.ufunc, x: np.ndarray, starts: np.ndarray, stops: np.ndarray, axis: int
) -> np.ndarray:
    """ufunc.reduce over each span of an axis; spans may overlap."""
    # reduceat reduces from each index to the next: every second result is a span's. It takes no
    # index at the end of the axis, so that there is one more element than the spans reach.
    padded = np.concatenate([x, x.take([-1], axis=axis)], axis=axis)
    indices = np.stack([starts, stops], axis=1).reshape(-1)
    every_second = [slice(None)] * x.ndim
    every_second[axis] = slice(None, None, 2)
    return ufunc.reduceat(padded, indices, axis=axis)[tuple(every_second)]
