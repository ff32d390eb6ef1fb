"""A problem on the CPU: its arrays by key head, and how they are cut into tiles.

A tile is (heads, group * rows, keys): some key heads of one batch entry, and for each of them all
query heads that read it, so that k and v are read once per group and never repeated. Tiles depend
on the shapes alone, not on the number of threads, and so does every bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cuflash._arrays import LOG2_E, Hidden, Scratch, in_units_of_log2, packed
from cuflash._problem import Problem
from cuflash._tiles import Band, blocks, visible_tiles

# Rows and keys of a tile: scores that a core's L2 cache holds, a MiB of float32, in few steps of
# Python. Where rows see a band of keys, fewer rows waste less of its edges.
TILE = (512, 512)
TILE_OF_BAND = (256, 512)

# Heads, rows and keys are split until there are this many tasks: by shape, for any machine.
MANY_TASKS = 16


class Work:
    """A problem's arrays by key head, and how they are cut."""

    def __init__(self, problem: Problem, splits_rows: bool) -> None:
        self.problem = problem
        self.dtype = problem.lse_dtype
        self.group = problem.group
        self.scale = problem.scale * LOG2_E
        self.softcap = problem.softcap * LOG2_E
        self.q = self.by_key_head(problem.q)
        self.k, self.v = (self.by_key_head(x, 1) for x in (problem.k, problem.v))
        scores_shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
        self.mask, self.bias = (
            None if x is None else self.scores_by_key_head(np.broadcast_to(x, scores_shape))
            for x in (None if problem.mask is None else problem.mask.array, problem.bias)
        )
        self.slopes = self.sinks = None  # (B, Hk, group, 1, 1) and (Hk, group, 1), units of log 2
        if problem.alibi_slopes is not None:
            slopes = np.broadcast_to(problem.alibi_slopes, (problem.batch, problem.heads_q))
            by_head = (problem.batch, problem.heads_k, self.group, 1, 1)
            with np.errstate(all="ignore"):
                self.slopes = in_units_of_log2(slopes, self.dtype).reshape(by_head)
        if problem.sinks is not None:
            by_head = (problem.heads_k, self.group, 1)
            with np.errstate(all="ignore"):
                self.sinks = in_units_of_log2(problem.sinks, self.dtype).reshape(by_head)
        self.bands = [Band.of(problem, batch) for batch in range(problem.batch)]
        rows, keys = TILE if problem.window == (None, None) else TILE_OF_BAND
        self.tile_rows = max(1, min(problem.seqlen_q, rows // self.group))
        self.tile_keys = max(1, min(problem.seqlen_k, keys))
        items = problem.batch * problem.heads_k
        tile_size = self.group * self.tile_rows * self.tile_keys
        tiles = math.ceil(problem.seqlen_q / self.tile_rows)
        # Several heads to a tile mean less Python, where there are enough tasks without them.
        tasks = items * tiles if splits_rows else items
        self.tile_heads = max(1, min(math.prod(TILE) // tile_size, tasks // MANY_TASKS))
        tasks_of_item = math.ceil(MANY_TASKS * self.tile_heads / max(1, items))
        self.task_rows = self.tile_rows * max(1, tiles // tasks_of_item)
        self.scratch = Scratch(self.tile_heads * tile_size, self.dtype)
        self.ones = np.ones(self.tile_keys, self.dtype)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The bias's own shape, with all four axes."""
        return (1,) * (4 - self.problem.bias.ndim) + self.problem.bias.shape

    def items(self) -> list[Item]:
        """What shares no output."""
        heads = list(blocks(slice(0, self.problem.heads_k), self.tile_heads))
        return [Item(self, batch, some) for batch in range(self.problem.batch) for some in heads]

    def families(self) -> list[list[Item]]:
        """Items that share elements of dbias: one thread adds to them, in order."""
        shared = (False, False)
        if self.bias is not None:
            shared = (self.bias_shape[0] == 1, self.bias_shape[1] == 1)
        families: dict[tuple[int, int], list[Item]] = {}
        for item in self.items():
            key = (0 if shared[0] else item.batch, 0 if shared[1] else item.heads.start)
            families.setdefault(key, []).append(item)
        return list(families.values())

    def by_key_head(self, x: np.ndarray, group: int | None = None) -> np.ndarray:
        """A view: (B, S, H, D) to (B, Hk, group, S, D)."""
        group = self.group if group is None else group
        batch, seqlen, heads, size = x.shape
        return x.reshape(batch, seqlen, heads // group, group, size).transpose(0, 2, 3, 1, 4)

    def rows_by_key_head(self, x: np.ndarray) -> np.ndarray:
        """A view: (B, Hq, Sq) to (B, Hk, group, Sq)."""
        return x.reshape(x.shape[0], x.shape[1] // self.group, self.group, x.shape[2])

    def scores_by_key_head(self, x: np.ndarray) -> np.ndarray:
        """A view: (B or 1, Hq or 1, Sq or 1, Sk or 1) to (B, Hk, group, Sq, Sk), or 1 likewise."""
        group = 1 if x.shape[1] == 1 else self.group
        return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


class Run(NamedTuple):
    """Keys side by side, and which of a tile's rows do not see them."""

    keys: slice
    hidden: np.ndarray | None  # broadcasts to (heads, group, rows, keys); None: all rows see all


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of an item and keys that they see, which need not lie side by side.

    The backward's key and value have a column of 1 at the end.
    """

    item: Item
    rows: slice
    runs: tuple[Run, ...]
    key: np.ndarray  # (heads, keys, D) or (heads, keys, D + 1)
    value: np.ndarray  # (heads, keys, Dv) or (heads, keys, Dv + 1)

    @property
    def columns(self) -> Iterator[tuple[slice, slice]]:
        """For each run its columns of the tile, and its keys."""
        start = 0
        for run in self.runs:
            stop = start + run.keys.stop - run.keys.start
            yield slice(start, stop), run.keys
            start = stop

    @property
    def hidden(self) -> Hidden | None:
        """The pairs that do not see each other."""
        parts = [
            (columns, run.hidden)
            for (columns, _), run in zip(self.columns, self.runs, strict=True)
            if run.hidden is not None
        ]
        return Hidden(self.item.work.group, parts) if parts else None

    @property
    def bias(self) -> np.ndarray | None:
        """(heads, group, rows, keys)."""
        bias = self.item.work.bias
        if bias is None:
            return None
        parts = [bias[self.item.index][:, :, self.rows, run.keys] for run in self.runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def places(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """b, h, i and j, the last three integers that broadcast to (heads, group, rows, keys)."""
        work, heads = self.item.work, self.item.heads
        first = np.arange(heads.start, heads.stop) * work.group
        h = first[:, None] + np.arange(work.group)
        i = np.arange(self.rows.start, self.rows.stop)
        j = np.concatenate([np.arange(run.keys.start, run.keys.stop) for run in self.runs])
        return self.item.batch, h[:, :, None, None], i[:, None], j


@dataclass(frozen=True, slots=True)
class Item:
    """Some key heads of one batch entry, and the query heads that read them."""

    work: Work
    batch: int
    heads: slice

    @property
    def start(self) -> tuple[int, int]:
        """The batch entry and the first key head: no two items have the same."""
        return (self.batch, self.heads.start)

    @property
    def index(self) -> tuple[int, slice]:
        """Into arrays by key head."""
        return (self.batch, self.heads)

    @property
    def sinks(self) -> np.ndarray | None:
        """(heads, group, 1), in units of log 2."""
        return None if self.work.sinks is None else self.work.sinks[self.heads]

    @property
    def band(self) -> Band:
        return self.work.bands[self.batch]

    def query(self, rows: slice, columns: int = 0) -> np.ndarray:
        """(heads, group * rows, D + columns), scaled."""
        work = self.work
        return packed(work.q[self.index][:, :, rows], work.dtype, columns, work.scale)

    def keys_and_values(self, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """(heads, keys, D) and (heads, keys, Dv)."""
        work = self.work
        key, value = (x[self.index][:, 0, keys] for x in (work.k, work.v))
        return key.astype(work.dtype, copy=False), value.astype(work.dtype, copy=False)

    def tiles(self, rows: slice, keys: slice, key: np.ndarray, value: np.ndarray) -> Iterator[Tile]:
        """What some rows see of some keys; key and value: of these keys."""
        for tile_rows, seen in visible_tiles(self.band, rows, keys, self.work.tile_rows):
            hidden = self.band.hidden(tile_rows, seen)
            if self.work.mask is not None:
                masked = ~self.work.mask[self.index][:, :, tile_rows, seen]
                hidden = masked if hidden is None else hidden | masked
                if hidden.all():
                    continue
            part = slice(seen.start - keys.start, seen.stop - keys.start)
            yield Tile(self, tile_rows, (Run(seen, hidden),), key[:, part], value[:, part])
