"""A mask on NumPy arrays: what it leaves of blocks of rows and keys, and which elements of them.

Arrays here are by key head, (B, Hk, group, rows, keys), with 1 for an axis that shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, singledispatch
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cuflash import _mask_tree as tree
from cuflash import _tiles
from cuflash._problem import Problem

NOTHING, SOME, ALL = 0, 1, 2  # of a block is visible


class TileCounts(NamedTuple):
    """What a mask leaves of the tiles of all batch entries and query heads."""

    hidden: int  # skipped
    partial: int  # evaluated pair by pair; where only that tells, nothing of a tile may be visible
    full: int


@dataclass(frozen=True)
class BlockMask:
    """A call's mask and window in one, and what they leave of each block; lengths aside."""

    mask: tree.Mask
    grid: Grid
    states: np.ndarray  # (B or 1, Hk or 1, group or 1, blocks of rows, of keys): NOTHING, ...
    scattered: bool  # whether rows of a block may change often between visible and hidden
    kept_tiles: dict[tuple[int, ...], list[slice]] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, block: tuple[int, int]) -> BlockMask:
        """Of a call that has a mask, in blocks of (rows, keys)."""
        shape = tree.ScoresShape(
            *(problem.batch, problem.heads_q, problem.heads_k),
            *(problem.seqlen_q, problem.seqlen_k),
        )
        bands = (_tiles.Band.of(problem, batch) for batch in range(problem.batch))
        grid = Grid(shape, np.array([band.offset for band in bands]), block)
        mask = problem.mask
        if problem.window != (None, None):
            mask = tree.And(mask, tree.Band(*problem.window, None))
        spans = (tree.Band, tree.Lengths, tree.Prefix, tree.Intervals)
        scattered = not all(isinstance(leaf, spans) for leaf in mask.leaves())
        per_batch = (problem.offset, problem.q_lens, problem.kv_lens)
        if not isinstance(problem.mask, tree.Compiled) or any(map(_is_array, per_batch)):
            return cls(mask, grid, classify(mask, grid), scattered)
        key = ("cpu", shape, block, problem.window, problem.offset)
        tables = problem.mask.tables
        if key not in tables:
            tables[key] = classify(mask, grid)
        return cls(mask, grid, tables[key], scattered)

    @property
    def shares_heads(self) -> bool:
        """Whether all key heads have the same mask."""
        return self.states.shape[1] == 1

    @property
    def shares_group(self) -> bool:
        """Whether the query heads that read a key head have the same mask."""
        return self.states.shape[2] == 1

    @property
    def spans_of_row(self) -> float:
        """In how many spans, on average, lie the blocks of keys that a block of rows sees."""
        seen = self.states != NOTHING
        starts = np.count_nonzero(seen[..., 0]) + np.count_nonzero(seen[..., 1:] > seen[..., :-1])
        return starts / max(1, np.count_nonzero(seen.any(axis=-1)))

    def count(self, bands: Sequence[_tiles.Band]) -> TileCounts:
        """Of the blocks; `bands` has the valid rows and keys of each batch entry."""
        (rows_of_block, keys_of_block), shape = self.grid.block, self.grid.shape
        heads, members, *blocks = self.states.shape[1:]
        repeats = shape.heads_q // (heads * members)
        partial = full = 0
        for batch, band in enumerate(bands):
            states = self.states[0 if self.states.shape[0] == 1 else batch]
            rows, keys = -(-band.rows // rows_of_block), -(-band.keys // keys_of_block)
            states = states[..., :rows, :keys]
            partial += repeats * int(np.count_nonzero(states == SOME))
            full += repeats * int(np.count_nonzero(states == ALL))
        total = shape.batch * shape.heads_q * math.prod(blocks)
        return TileCounts(total - partial - full, partial, full)

    @cached_property
    def by_distance(self) -> bool:
        """Whether it depends on how far a query and a key are apart, and not on where they are."""
        return all(isinstance(leaf, tree.Band) for leaf in self.mask.leaves())

    # A batch entry, a key head and a query head of its group say which heads share a mask.

    def states_of(self, batch: int, head: int, member: int, rows: slice) -> np.ndarray:
        """Of each block of keys, for a tile of rows: (blocks of keys,)."""
        states = self.states[self.place(batch, head, member)]
        return states[rows.start // self.grid.block[0]]

    def row_tiles(self, batch: int, head: int, member: int, rows: int, most: int) -> list[slice]:
        """The rows in tiles: of one block, or of `most` at most that see the same, in full."""
        place = self.place(batch, head, member)
        key = (*place, rows, most)
        if key in self.kept_tiles:
            return self.kept_tiles[key]
        size = self.grid.block[0]
        states = self.states[place][: -(-rows // size)]
        same = (states[1:] == states[:-1]).all(axis=1) & (states[1:] != SOME).all(axis=1)
        starts: list[int] = []
        for number, joins in enumerate([False, *same.tolist()][: len(states)]):
            if not joins or number - starts[-1] == most:
                starts.append(number)
        edges = [start * size for start in starts] + [rows]
        self.kept_tiles[key] = [slice(*pair) for pair in pairwise(edges)]
        return self.kept_tiles[key]

    @cached_property
    def blocks_seen(self) -> np.ndarray:
        """How many blocks of keys a block of rows sees: (B or 1, Hk or 1, group or 1, of rows)."""
        return np.count_nonzero(self.states, axis=-1)

    def keys_seen(self, batch: int, head: int, member: int, row_tiles: list[slice]) -> list[int]:
        """About how many keys each of some tiles of rows sees."""
        row_size, size = self.grid.block
        seen = (self.blocks_seen[self.place(batch, head, member)] * size).tolist()
        return [seen[rows.start // row_size] for rows in row_tiles]

    def span_of_keys(self, batch: int, head: int, member: int, rows: slice) -> tuple[int, int]:
        """Where the blocks of keys start and end that some tiles of rows see."""
        row_size, size = self.grid.block
        states = self.states[self.place(batch, head, member)]
        states = states[rows.start // row_size : -(-rows.stop // row_size)]
        (seen,) = states.any(axis=0).nonzero()
        return (int(seen[0]) * size, (int(seen[-1]) + 1) * size) if seen.size else (0, 0)

    def place(self, batch: int, head: int, member: int) -> tuple[int, ...]:
        """Into the first axes of the states."""
        shape = self.states.shape
        return tuple(0 if n == 1 else i for n, i in zip(shape, (batch, head, member), strict=False))

    def visible(self, area: Area) -> np.ndarray:
        """(1 or heads, 1 or members, rows, keys)."""
        visible = np.asarray(_visible(self.mask, area))
        visible = visible[(None,) * (4 - visible.ndim)]
        shape = (area.rows.stop - area.rows.start, area.keys.stop - area.keys.start)
        if visible.shape[2:] == shape:
            return visible
        return np.broadcast_to(visible, (*visible.shape[:2], *shape))


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


def classify(mask: tree.Mask, grid: Grid) -> np.ndarray:
    """NOTHING, SOME or ALL of each block: (B or 1, Hk or 1, group or 1, of rows, of keys).

    Nothing and all are certain; of some blocks that are called partly visible nothing may be.
    """
    some, everything = _sight(mask, grid)
    blocks = (grid.rows[0].size, grid.keys[0].size)
    shape = np.broadcast_shapes(some.shape, everything.shape, (1, 1, 1, *blocks))
    states = np.zeros(shape, np.uint8)
    np.copyto(states, SOME, where=some)
    np.copyto(states, ALL, where=everything)
    return states


class Sight(NamedTuple):
    """What is visible of each block: (B or 1, Hk or 1, group or 1, blocks of rows, of keys)."""

    some: np.ndarray  # False: nothing is; True: perhaps something
    all: np.ndarray  # True: everything is; False: perhaps not


@singledispatch
def _sight(mask: tree.Mask, grid: Grid) -> Sight:
    """What `mask` leaves visible of each block; axes that share may be 1."""
    raise NotImplementedError


@singledispatch
def _visible(mask: tree.Mask, area: Area) -> np.ndarray | bool:
    """What broadcasts to (heads, members, rows, keys)."""
    raise NotImplementedError


@_sight.register
def _(mask: tree.And, grid: Grid) -> Sight:
    left, right = _sight(mask.left, grid), _sight(mask.right, grid)
    return Sight(left.some & right.some, left.all & right.all)


@_visible.register
def _(mask: tree.And, area: Area) -> np.ndarray | bool:
    return _visible(mask.left, area) & _visible(mask.right, area)


@_sight.register
def _(mask: tree.Or, grid: Grid) -> Sight:
    left, right = _sight(mask.left, grid), _sight(mask.right, grid)
    return Sight(left.some | right.some, left.all | right.all)


@_visible.register
def _(mask: tree.Or, area: Area) -> np.ndarray | bool:
    return _visible(mask.left, area) | _visible(mask.right, area)


@_sight.register
def _(mask: tree.Not, grid: Grid) -> Sight:
    inner = _sight(mask.inner, grid)
    return Sight(~inner.all, ~inner.some)


@_visible.register
def _(mask: tree.Not, area: Area) -> np.ndarray | bool:
    return np.logical_not(_visible(mask.inner, area))


@_sight.register
def _(mask: tree.Compiled, grid: Grid) -> Sight:
    return _sight(mask.inner, grid)


@_visible.register
def _(mask: tree.Compiled, area: Area) -> np.ndarray | bool:
    return _visible(mask.inner, area)


@_sight.register
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


@_visible.register
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


@_sight.register
def _(mask: tree.Lengths, grid: Grid) -> Sight:
    some = everything = np.ones((1, 1, 1, 1, 1), bool)
    for lens, (start, stop) in ((mask.q_lens, grid.rows), (mask.kv_lens, grid.keys)):
        if lens is not None:
            some = some & (start < _by_batch(lens))
            everything = everything & (stop <= _by_batch(lens))
    return Sight(some, everything)


@_visible.register
def _(mask: tree.Lengths, area: Area) -> np.ndarray | bool:
    visible: np.ndarray | bool = True
    for lens, index in ((mask.q_lens, area.i), (mask.kv_lens, area.j)):
        if lens is not None:
            visible = visible & (index < lens[area.batch])
    return visible


@_sight.register
def _(mask: tree.Prefix, grid: Grid) -> Sight:
    key, key_stop = grid.keys
    return Sight(key < _by_batch(mask.n), key_stop <= _by_batch(mask.n))


@_visible.register
def _(mask: tree.Prefix, area: Area) -> np.ndarray:
    return area.j < mask.n[area.batch]


@_sight.register
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


@_visible.register
def _(mask: tree.Documents, area: Area) -> np.ndarray:
    return mask.q_ids[area.batch, area.rows, None] == mask.ids_of_keys[area.batch, area.keys]


@_sight.register
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


@_visible.register
def _(mask: tree.Intervals, area: Area) -> np.ndarray | bool:
    hidden: np.ndarray | bool = False
    start, end = (area.heads_of(x)[:, :, None, area.keys] for x in (mask.start, mask.end))
    for number in range(start.shape[-1]):
        inside = (start[..., number] <= area.i) & (area.i < end[..., number])
        hidden = hidden | inside
    return ~hidden


@_sight.register
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


@_visible.register
def _(mask: tree.Blocks, area: Area) -> np.ndarray:
    array = area.heads_of(_four_axes(mask.array))
    return array[:, :, area.i // mask.block_q, area.j // mask.block_k]


@_sight.register
def _(mask: tree.Dense, grid: Grid) -> Sight:
    some = everything = grid.by_key_head(_four_axes(mask.array))
    for axis, size in zip((-2, -1), grid.block, strict=True):
        if some.shape[axis] > 1:
            some = _by_blocks(np.any, some, size, axis)
            everything = _by_blocks(np.all, everything, size, axis)
    return Sight(some, everything)


@_visible.register
def _(mask: tree.Dense, area: Area) -> np.ndarray:
    array = area.heads_of(_four_axes(mask.array))
    rows, keys = (
        slice(None) if n == 1 else some
        for n, some in zip(array.shape[2:], (area.rows, area.keys), strict=True)
    )
    return array[:, :, rows, keys]


@_sight.register
def _(mask: tree.Expression, grid: Grid) -> Sight:
    # One pair, for all heads and batch entries: along which axes does the result differ?
    batch, heads, *_ = grid.shape
    pair = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
    b, h = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None]
    result = mask.evaluate((batch, heads, 1, 1), b, h, *pair)
    some = np.ones_like(grid.by_key_head(_four_axes(result)), dtype=bool)
    return Sight(some, ~some)


@_visible.register
def _(mask: tree.Expression, area: Area) -> np.ndarray:
    grid = area.grid
    h = np.arange(grid.shape.heads_q).reshape(-1, grid.group)[area.heads, area.members]
    b = np.full((1, 1, 1, 1), area.batch)
    shape = (1, h.size, area.i.size, area.j.size)
    visible = _four_axes(mask.evaluate(shape, b, h.reshape(-1, 1, 1), area.i, area.j))[0]
    return visible.reshape(*(h.shape if visible.shape[0] > 1 else (1, 1)), *visible.shape[1:])


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


def _is_array(x: object) -> bool:
    return isinstance(x, np.ndarray)
