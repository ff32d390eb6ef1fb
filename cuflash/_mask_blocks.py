"""A mask on NumPy arrays: what it leaves of blocks of rows and keys, and how rows form tiles.

Arrays here are by key head, (B, Hk, group, rows, keys), with 1 for an axis that shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cuflash import _mask_rules as rules
from cuflash import _mask_tree as tree
from cuflash import _tiles
from cuflash._mask_rules import Area, Grid
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
    kept_tiles: dict[tuple[int, ...], list[slice]] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, block: tuple[int, int]) -> BlockMask:
        """Of a call that has a mask, in blocks of (rows, keys)."""
        shape = problem.scores_shape
        bands = (_tiles.Band.of(problem, batch) for batch in range(problem.batch))
        grid = Grid(shape, np.array([band.offset for band in bands]), block)
        mask = problem.mask
        if problem.window != (None, None):
            mask = tree.And(mask, tree.Band(*problem.window, None))
        per_batch = (problem.offset, problem.q_lens, problem.kv_lens)
        if not isinstance(problem.mask, tree.Compiled) or any(map(_is_array, per_batch)):
            return cls(mask, grid, classify(mask, grid))
        key = ("cpu", shape, block, problem.window, problem.offset)
        return cls(mask, grid, problem.mask.kept(key, lambda: classify(mask, grid)))

    @property
    def shares_heads(self) -> bool:
        """Whether all key heads have the same mask."""
        return self.states.shape[1] == 1

    @property
    def shares_group(self) -> bool:
        """Whether the query heads that read a key head have the same mask."""
        return self.states.shape[2] == 1

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
        numbers = [rows.start // row_size for rows in row_tiles]
        return (self.blocks_seen[self.place(batch, head, member)][numbers] * size).tolist()

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
        visible = np.asarray(rules.visible(self.mask, area))
        visible = visible[(None,) * (4 - visible.ndim)]
        shape = (area.rows.stop - area.rows.start, area.keys.stop - area.keys.start)
        if visible.shape[2:] == shape:
            return visible
        return np.broadcast_to(visible, (*visible.shape[:2], *shape))


def classify(mask: tree.Mask, grid: Grid) -> np.ndarray:
    """NOTHING, SOME or ALL of each block: (B or 1, Hk or 1, group or 1, of rows, of keys).

    Nothing and all are certain; of some blocks that are called partly visible nothing may be.
    """
    some, everything = rules.sight(mask, grid)
    blocks = (grid.rows[0].size, grid.keys[0].size)
    shape = np.broadcast_shapes(some.shape, everything.shape, (1, 1, 1, *blocks))
    states = np.zeros(shape, np.uint8)
    np.copyto(states, SOME, where=some)
    np.copyto(states, ALL, where=everything)
    return states


def _is_array(x: object) -> bool:
    return isinstance(x, np.ndarray)
