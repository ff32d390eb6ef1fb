"""A problem on the CPU: its arrays by key head, and how they are cut into tiles.

A tile is (heads, group * rows, keys): some key heads of one batch entry, and for each of them all
query heads that read it, so that k and v are read once per group and never repeated. With a mask
they are the query heads for which it is the same, and the keys are those that the rows see some of,
gathered block by block. Tiles depend on shapes and mask alone, not on the number of threads, and so
does every bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cuflash._arrays import LOG2_E, Hidden, Scratch, limit_of, packed, small_scores
from cuflash._mask_blocks import ALL, NOTHING, Area, BlockMask
from cuflash._problem import Problem
from cuflash._threads import for_each
from cuflash._tiles import Band, blocks, visible_tiles

# Rows and keys of a tile: scores that a core's L2 cache holds, a MiB of float32, in few steps of
# Python. Where rows see a band of keys, fewer rows waste less of its edges.
TILE = (512, 512)
TILE_OF_BAND = (256, 512)

# Of each block of so many rows and keys a mask says whether nothing, some or all is visible.
MASK_BLOCK = (128, 128)

# Runs of blocks whose limits are kept, in pieces of 256 KiB at most.
KEPT_RUNS = 32

# Heads, rows and keys are split until there are this many tasks, by shape, for any machine; but not
# into tasks of fewer scores than are worth another thread.
MANY_TASKS = 16
LEAST_SCORES = 2**16

# A matrix product of at most this many multiplications is no work for two threads to any BLAS, nor
# a sum of a matrix's rows, if each of its elements counts for 32.
SMALL_PRODUCT = 2**18
SMALLEST_SIZE = 32

# Of fewer scores than this it is not worth while to find out beforehand how large they are.
LEAST_SCORES_BOUNDED = 2**14


class Work:
    """A problem's arrays by key head, and how they are cut.

    A problem may be one of several that share the threads: `share` is its part of all the work.
    A batch of one may be part of a packed batch: `sequences` are the numbers that it has there, and
    its heads are those of them all, one sequence after the other, which see what `band` says.
    """

    def __init__(
        self,
        problem: Problem,
        splits_rows: bool,
        share: float = 1.0,
        sequences: np.ndarray | None = None,
        band: Band | None = None,
    ) -> None:
        self.problem = problem
        self.sequences = sequences
        scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
        many_tasks = min(MANY_TASKS * share, scores / LEAST_SCORES)
        self.many_tasks = max(1, math.ceil(many_tasks))
        self.dtype = problem.lse_dtype
        self.group = problem.group
        self.q = self.by_key_head(problem.q)
        self.k, self.v = (self.by_key_head(x, 1) for x in (problem.k, problem.v))
        self.bias = problem.bias
        if problem.bias is not None:
            bias = np.broadcast_to(problem.bias, problem.sizes.scores_shape)
            self.bias = self.scores_by_key_head(bias)
        # Scores lie in memory as the bias that is added to them, if it is not one for all rows.
        self.by_row = problem.bias is not None and self.bias_shape[2] > 1
        self.slopes = self.sinks = None  # (B, Hk, group, 1, 1) and (Hk, group, 1)
        with np.errstate(all="ignore"):
            if problem.alibi_slopes is not None:
                slopes = problem.alibi_slopes.astype(self.dtype, copy=False)
                slopes = np.broadcast_to(slopes, (problem.batch, problem.heads_q))
                self.slopes = slopes.reshape(problem.batch, problem.heads_k, self.group, 1, 1)
            if problem.sinks is not None:
                sinks = problem.sinks.astype(self.dtype, copy=False)
                self.sinks = sinks.reshape(problem.heads_k, self.group, 1)
        self.units: dict[tuple[int, int], float] = {}  # of items, as they are found
        self.bands = [band] if band else [Band.of(problem, b) for b in range(problem.batch)]
        self.mask = None
        if problem.mask is None or not problem.seqlen_k:
            self._cut(splits_rows)
        else:
            self.mask = BlockMask.of(problem, MASK_BLOCK)
            self.kept_runs: dict[tuple[int, ...], list[Run]] = {}
            self._cut_by_mask(splits_rows)
            # Each tile of rows reads keys of its own choice: they are converted once, before.
            self.k = _with_ones(self.k, self.dtype)
            if splits_rows:
                self.v = self.v.astype(self.dtype, copy=False)
            else:
                self.v = _with_ones(self.v, self.dtype)

    def _cut(self, splits_rows: bool) -> None:
        """Choose the sizes of tiles and tasks."""
        problem = self.problem
        shape = (problem.batch, problem.heads_k, self.group, problem.seqlen_q, problem.seqlen_k)
        limits = (largest_tile(problem.window), math.prod(TILE))
        cut = _cut(shape, *limits, self.many_tasks, splits_rows)
        self.members = self.group
        self.tile_heads, self.tile_rows, self.tile_keys, self.tiles_of_task = cut
        tile_size = self.group * self.tile_rows * self.tile_keys
        self.scratch = Scratch(self.tile_heads * tile_size, self.dtype, self.by_row)
        self.ones = _ones(self.tile_keys, self.dtype)

    def _cut_by_mask(self, splits_rows: bool) -> None:
        """Choose the same where it is the mask that says which rows and keys form a tile."""
        problem, mask, size = self.problem, self.mask, math.prod(TILE)
        rows, keys = MASK_BLOCK
        self.members = min(self.group, size // (rows * keys)) if mask.shares_group else 1
        self.most_rows = max(1, TILE[0] // (self.members * rows))
        self.tile_heads = 1
        items = problem.batch * problem.heads_k * math.ceil(self.group / self.members)
        tiles = sum(len(item.row_tiles()) for item in self.items() if not any(item.start[1:]))
        mean_rows = self.members * problem.batch * problem.seqlen_q / max(1, tiles)
        if mask.shares_heads:
            most = int(size / (mean_rows * min(TILE[1], problem.seqlen_k)))
            if splits_rows:
                tasks = items * tiles // max(1, problem.batch)
                self.tile_heads = max(1, min(most, tasks // self.many_tasks))
            else:
                self.tile_heads = self._heads_without_overlap(min(most, problem.heads_k), items)
        # In blocks; a few keys above the size of a tile are no reason for another one.
        tile_keys = max(1, int(size / (self.tile_heads * mean_rows)) // keys)
        self.most_keys = tile_keys + tile_keys // 4
        heads = self.tile_heads * self.members
        self.most_rows = min(self.most_rows, max(1, size // (heads * rows * tile_keys * keys)))
        tasks_of_item = math.ceil(self.many_tasks * self.tile_heads / max(1, items))
        self.tiles_of_task = max(1, tiles // max(1, problem.batch) // tasks_of_item)
        rows = heads * min(problem.seqlen_q, self.most_rows * rows)
        keys = min(problem.seqlen_k, self.most_keys * keys)
        self.scratch = Scratch(rows * keys, self.dtype, self.by_row)
        self.ones = np.ones(keys, self.dtype)

    def _heads_without_overlap(self, most: int, items: int) -> int:
        """How many heads to a tile, `most` at most, where tasks are spans of rows.

        The more heads, the more spans, each with a dk and dv of its own for the keys that it sees.
        """
        first = Item(self, 0, slice(0, 1), slice(0, self.members))
        for heads in range(most, 1, -1):
            splits = math.ceil(self.many_tasks * heads / items)
            (split,) = split_rows([first], splits)
            spans = map(first.span_of_keys, split)
            if sum(span.stop - span.start for span in spans) <= 2 * self.problem.seqlen_k:
                return heads
        return 1

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The bias's own shape, with all four axes."""
        return (1,) * (4 - self.problem.bias.ndim) + self.problem.bias.shape

    @property
    def is_small(self) -> bool:
        """Whether no product of it is worth several threads."""
        problem = self.problem
        size = max(problem.head_dim, problem.head_dim_v, SMALLEST_SIZE)
        return math.prod(problem.sizes.scores_shape) * size <= SMALL_PRODUCT

    def items(self) -> list[Item]:
        """What shares no output."""
        return [
            Item(self, batch, heads, members)
            for batch in range(self.problem.batch)
            for heads in blocks(slice(0, self.problem.heads_k), self.tile_heads)
            for members in blocks(slice(0, self.group), self.members)
        ]

    def families(self, with_dbias: bool) -> list[list[Item]]:
        """Items that share elements of dk, dv or dbias: one thread adds to them, in order."""
        shared = (False, False)
        if with_dbias:
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


class _Cut(NamedTuple):
    """How a problem without a mask is cut."""

    tile_heads: int
    tile_rows: int
    tile_keys: int
    tiles_of_task: int  # of rows


@lru_cache(maxsize=256)
def _cut(
    shape: tuple[int, int, int, int, int],
    largest: tuple[int, int],
    size: int,
    many_tasks: int,
    splits_rows: bool,
) -> _Cut:
    """Of (B, Hk, group, Sq, Sk), into tiles of at most `size` scores."""
    batch, heads, group, seqlen_q, seqlen_k = shape
    tile_rows = max(1, min(seqlen_q, largest[0] // group))
    tile_keys = max(1, min(seqlen_k, largest[1]))
    items = batch * heads
    tiles = math.ceil(seqlen_q / tile_rows)
    # Several heads to a tile mean less Python, where there are enough tasks without them.
    tasks = items * tiles if splits_rows else items
    most_heads = size // (group * tile_rows * tile_keys)
    tile_heads = max(1, min(most_heads, tasks // many_tasks))
    tasks_of_item = math.ceil(many_tasks * tile_heads / max(1, items))
    return _Cut(tile_heads, tile_rows, tile_keys, max(1, tiles // tasks_of_item))


@lru_cache(maxsize=16)
def _ones(count: int, dtype: np.dtype) -> np.ndarray:
    ones = np.ones(count, dtype)
    ones.flags.writeable = False
    return ones


def largest_tile(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """The most rows, of all query heads that read a key head, and the most keys; masks aside."""
    return TILE if window == (None, None) else TILE_OF_BAND


class Run(NamedTuple):
    """Keys side by side, and the limit of what a tile's rows see of them."""

    keys: slice
    limit: np.ndarray | None  # broadcasts to (heads, group, rows, keys); None: all rows see all

    def cut(self, size: int) -> tuple[Run, Run]:
        """The first `size` keys, and the others."""
        start, stop = self.keys.start, self.keys.stop
        middle = min(start + size, stop)
        first, rest = slice(start, middle), slice(middle, stop)
        if self.limit is None:
            return Run(first, None), Run(rest, None)
        return Run(first, self.limit[..., :size]), Run(rest, self.limit[..., size:])


class Tile(NamedTuple):
    """Some rows of an item and keys that they see, which need not lie side by side.

    The key has a column of 1 at the end, in the backward the value too.
    """

    item: Item
    rows: slice
    runs: tuple[Run, ...]
    key: np.ndarray  # (heads, keys, D + 1)
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
            (columns, run.limit)
            for (columns, _), run in zip(self.columns, self.runs, strict=True)
            if run.limit is not None
        ]
        return Hidden(self.item.group, parts) if parts else None

    @property
    def bias(self) -> np.ndarray | None:
        """(heads, group, rows, keys)."""
        bias = self.item.work.bias
        if bias is None:
            return None
        parts = [bias[self.item.index][:, :, self.rows, run.keys] for run in self.runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each b, h, i and j: the tile's scores, (heads, group * rows, keys), are their grid."""
        work = self.item.work
        h = np.arange(work.problem.heads_q).reshape(-1, work.group)
        h = h[self.item.heads, self.item.members].reshape(-1)
        b = np.array([self.item.batch])
        if work.sequences is not None:  # all heads of each, in one tile where there are several
            b = work.sequences
            h = h[: h.size // b.size]
        i = np.arange(self.rows.start, self.rows.stop)
        j = np.concatenate([np.arange(run.keys.start, run.keys.stop) for run in self.runs])
        return b, h, i, j


class Item(NamedTuple):
    """Some key heads of one batch entry, and query heads that read them."""

    work: Work
    batch: int
    heads: slice
    members: slice  # of each key head's group

    @property
    def start(self) -> tuple[int, int, int]:
        """The batch entry, the first key head and query head: no two items have the same."""
        return (self.batch, self.heads.start, self.members.start)

    @property
    def index(self) -> tuple[int, slice, slice]:
        """Into arrays (B, Hk, group, ...)."""
        return (self.batch, self.heads, self.members)

    @property
    def key_index(self) -> tuple[int, slice, int]:
        """Into arrays (B, Hk, 1, ...)."""
        return (self.batch, self.heads, 0)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.members.stop - self.members.start

    @property
    def sinks(self) -> np.ndarray | None:
        """(heads, group, 1)."""
        return None if self.work.sinks is None else self.work.sinks[self.heads, self.members]

    @property
    def band(self) -> Band:
        return self.work.bands[self.batch]

    def row_tiles(self) -> list[slice]:
        """The rows of each tile."""
        work, rows = self.work, self.band.rows
        if work.mask is None:
            return list(blocks(slice(0, rows), work.tile_rows))
        return work.mask.row_tiles(*self.start, rows, work.most_rows)

    def pairs(self, row_tiles: list[slice]) -> list[int]:
        """About how many pairs of rows and keys each of these tiles of rows computes."""
        heads = (self.heads.stop - self.heads.start) * self.group
        if self.work.mask is None:
            keys = map(self.band.keys_of, row_tiles)
            seen = [max(0, some.stop - some.start) for some in keys]
        else:
            seen = self.work.mask.keys_seen(*self.start, row_tiles)
        sizes = (rows.stop - rows.start for rows in row_tiles)
        return [heads * rows * keys for rows, keys in zip(sizes, seen, strict=True)]

    def span_of_keys(self, row_tiles: list[slice]) -> slice:
        """From the first key to the last that some tiles of rows see through the mask."""
        if not row_tiles:
            return slice(0, 0)
        rows = slice(row_tiles[0].start, row_tiles[-1].stop)
        start, stop = self.work.mask.span_of_keys(*self.start, rows)
        return slice(min(start, self.band.keys), min(stop, self.band.keys))

    def query(
        self,
        rows: slice,
        columns: int = 0,
        room: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    ) -> np.ndarray:
        """(heads, group * rows, D + columns), scaled, in the item's unit; room as of `packed`."""
        work = self.work
        factor = work.problem.scale * self.unit
        return packed(work.q[(*self.index, rows)], work.dtype, columns, factor, room)

    @property
    def unit(self) -> float:
        """What scores are multiplied by: log2(e) where all are known to be small, else 1."""
        place = self.start[:2]
        if place not in self.work.units:
            self.work.units[place] = LOG2_E if self._has_small_scores() else 1.0
        return self.work.units[place]

    def _has_small_scores(self) -> bool:
        """Whether no score can be large, by the norms of the heads' queries and keys."""
        work, problem, band = self.work, self.work.problem, self.band
        heads = (self.heads.stop - self.heads.start) * work.group
        added = (problem.bias, problem.alibi_slopes, problem.score_mod)
        if (
            any(x is not None for x in added)
            or heads * band.rows * band.keys < LEAST_SCORES_BOUNDED
        ):
            return False
        bound, rows = abs(problem.scale), slice(0, band.rows)
        for x, some in ((work.q, rows), (work.k, band.keys_of(rows))):
            some = x[self.batch, self.heads, :, some, : problem.head_dim]
            bound *= math.sqrt(_largest_square(some, work.dtype))
        if problem.softcap:
            bound = min(bound, problem.softcap)
        return bound <= small_scores(work.dtype)

    def keys_and_values(self, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """(heads, keys, D) and (heads, keys, Dv)."""
        work = self.work
        key, value = (x[(*self.key_index, keys)] for x in (work.k, work.v))
        return key.astype(work.dtype, copy=False), value.astype(work.dtype, copy=False)

    def tiles(self, rows: slice, keys: slice, key: np.ndarray, value: np.ndarray) -> Iterator[Tile]:
        """What some rows see of some keys, without a mask; key and value: of these keys."""
        for tile_rows, seen in visible_tiles(self.band, rows, keys, self.work.tile_rows):
            limit = self.band.limit(tile_rows, seen, self.work.dtype, not self.work.by_row)
            run = Run(seen, limit)
            part = slice(seen.start - keys.start, seen.stop - keys.start)
            yield Tile(self, tile_rows, (run,), key[:, part], value[:, part])

    def masked_tiles(self, rows: slice) -> Iterator[Tile]:
        """What a tile's rows see of all keys; the next tile may overwrite it."""
        work = self.work
        states = work.mask.states_of(*self.start, rows)[: -(-self.band.keys // MASK_BLOCK[1])]
        seen = int(np.count_nonzero(states))
        tiles = max(1, -(-seen // work.most_keys))
        size = -(-seen // tiles) * MASK_BLOCK[1]
        for runs in _filled(self._visible_runs(rows, states), size):
            key, value = (
                _gathered(x[self.key_index], runs, partial(work.scratch.array, name))
                for name, x in (("key", work.k), ("value", work.v))
            )
            yield Tile(self, rows, runs, key, value)

    def _visible_runs(self, rows: slice, states: np.ndarray) -> Iterator[Run]:
        """The blocks of keys that a tile's rows see some of; states: of all blocks."""
        for state, keys in _stretches(states, self.band.keys):
            if state == ALL:
                yield Run(keys, None)
            elif state != NOTHING:
                for some in blocks(keys, TILE[1]):
                    yield from self._evaluated(rows, some)

    def _evaluated(self, rows: slice, keys: slice) -> Iterator[Run]:
        """Of these keys the blocks that some row sees some of; kept for a while for others."""
        kept, mask = self.work.kept_runs, self.work.mask
        # What depends on the distance alone is the same all along a band.
        origin = keys.start if mask.by_distance else 0
        place = mask.place(*self.start)
        place += tuple(x - origin for x in (rows.start, rows.stop, keys.start, keys.stop))
        runs = kept.get(place)
        if runs is None:
            if len(kept) >= KEPT_RUNS:
                kept.clear()
            runs = kept[place] = [
                Run(slice(some.start - origin, some.stop - origin), limit)
                for some, limit in self._evaluate(rows, keys)
            ]
        for some, limit in runs:
            yield Run(slice(some.start + origin, some.stop + origin), limit)

    def _evaluate(self, rows: slice, keys: slice) -> Iterator[Run]:
        mask, size, width = self.work.mask, MASK_BLOCK[1], keys.stop - keys.start
        visible = mask.visible(Area(mask.grid, *self.index, rows, keys))
        stretches = [slice(0, width)] if visible.any() else []
        if width > size:
            seen_by_some = visible.any(axis=(0, 1, 2))
            blocks_seen = np.logical_or.reduceat(seen_by_some, range(0, width, size))
            stretches = [columns for seen, columns in _stretches(blocks_seen, width) if seen]
        for columns in stretches:
            hidden = ~visible[..., columns]
            some = slice(keys.start + columns.start, keys.start + columns.stop)
            limit = (
                limit_of(hidden, self.work.dtype, not self.work.by_row) if hidden.any() else None
            )
            yield Run(some, limit)


def _largest_square(x: np.ndarray, dtype: np.dtype) -> float:
    """The largest sum of squares of the rows of (heads, group, rows, size), NaN if one is."""
    heads, group, rows, size = x.shape
    ones, some = np.ones(size, dtype), TILE[0] * TILE[1] // (heads * group * size) or 1
    # By products, which are faster than sums of short rows; of parts, which take little memory.
    if rows <= some:
        return (np.square(x, dtype=dtype) @ ones).max(initial=0)
    parts = (x[:, :, first : first + some] for first in range(0, rows, some))
    return np.max([(np.square(part, dtype=dtype) @ ones).max() for part in parts])


def split_rows(items: list[Item], count: int) -> list[list[list[slice]]]:
    """Of each item the tiles of rows in `count` spans that compute about the same number of pairs.

    A span has the same rows of every item: what the items share by row, no two spans share.
    """
    tiles = [item.row_tiles() for item in items]
    starts = [np.array([rows.start for rows in some], np.int64) for some in tiles]
    common = _common_starts(tiles)
    pairs = np.zeros(len(common) + 1, np.int64)
    for item, some, first_rows in zip(items, tiles, starts, strict=True):
        computed = 1 + np.array(item.pairs(some), np.int64)
        np.add.at(pairs, np.searchsorted(common, first_rows, side="right"), computed)
    pairs = np.cumsum(pairs)
    edges = np.searchsorted(pairs, pairs[-1] * np.arange(count + 1) // count)
    edge_rows = np.append(common, np.iinfo(np.int64).max)[edges]
    return [
        [some[start:stop] for start, stop in pairwise(np.searchsorted(first, edge_rows).tolist())]
        for some, first in zip(tiles, starts, strict=True)
    ]


def _common_starts(tiles: list[list[slice]]) -> np.ndarray:
    """The rows at which a tile starts in each of some lists, or that lie behind its last tile."""
    starts = {rows.start for some in tiles for rows in some}
    for some in tiles:
        own, stop = {rows.start for rows in some}, some[-1].stop if some else 0
        starts = {start for start in starts if start in own or start >= stop}
    return np.array(sorted(starts), np.int64)


def _stretches(states: np.ndarray, stop: int) -> Iterator[tuple[int, slice]]:
    """Blocks of one state side by side: it, and their elements, the last of which is `stop - 1`."""
    size = MASK_BLOCK[1]
    (edges,) = (states[1:] != states[:-1]).nonzero()
    for first, last in pairwise([0, *(edges + 1).tolist(), len(states)]):
        if first < last:
            yield states[first], slice(first * size, min(last * size, stop))


def _filled(runs: Iterator[Run], size: int) -> Iterator[tuple[Run, ...]]:
    """The same runs, cut and put together to `size` keys; the last may have fewer."""
    tile, room = [], size
    for run in runs:
        while run.keys.start < run.keys.stop:
            first, run = run.cut(room)
            tile.append(first)
            room -= first.keys.stop - first.keys.start
            if not room:
                yield tuple(tile)
                tile, room = [], size
    if tile:
        yield tuple(tile)


def _gathered(
    x: np.ndarray, runs: tuple[Run, ...], room: Callable[[tuple[int, ...]], np.ndarray]
) -> np.ndarray:
    """The keys of some runs, of (heads, Sk, D): a view, or copied where they lie apart."""
    spans: list[slice] = []
    for keys, _ in runs:
        if spans and spans[-1].stop == keys.start:
            keys = slice(spans.pop().start, keys.stop)
        spans.append(keys)
    if len(spans) == 1:
        return x[:, spans[0]]
    heads, _, size = x.shape
    count = sum(span.stop - span.start for span in spans)
    if x.strides[0] > x.strides[1]:
        gathered = room((heads, count, size))
    else:  # heads lie side by side in memory, where they are copied as one
        gathered = room((count, heads, size)).swapaxes(0, 1)
    start = 0
    for span in spans:
        stop = start + span.stop - span.start
        gathered[:, start:stop] = x[:, span]
        start = stop
    return gathered


def _with_ones(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(B, Hk, 1, Sk, size) to (B, Hk, 1, Sk, size + 1), a column of 1: keys side by side."""
    size = x.shape[-1]
    wider = np.empty((*x.shape[:-1], size + 1), dtype)

    def copy(head: tuple[int, int]) -> None:
        wider[head][..., :size] = x[head]
        wider[head][..., size:] = 1

    for_each(copy, np.ndindex(x.shape[:2]))
    return wider
