"""The gradients of attention on NumPy arrays.

The exponentials are computed again, relative to the row's largest score; its sum of exponentials
divides dout and delta beforehand. A column that rides along with each operand spares two passes:

    [q * scale, -largest] @ [k, 1]ᵀ = scores - largest   the exponentials' logarithm
    [dout, -delta] @ [v, 1]ᵀ        = dprobs - delta     the gradient of the scores / exponentials

The first does so only where all these numbers are small. Else largest is subtracted from scores
that are the forward's to the bit: nothing is left of what all scores of a row have in common.

Without a mask a task has some of the keys of an item, to all of whose rows it adds; with one it has
some of the rows, each of which reads keys of its own choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cuflash import _terms
from cuflash._arrays import (
    apply_by_row,
    drop,
    empty_like,
    exponentials,
    hide,
    hide_exponentials,
    packed,
    product,
    small_scores,
    transposed,
)
from cuflash._key_gradients import KeyGradients
from cuflash._problem import GradientProblem, Gradients
from cuflash._threads import for_each
from cuflash._tiles import blocks
from cuflash._work import Item, Tile, Work


def differentiate(parts: list[GradientSums]) -> None:
    """Add up the gradients of each part; the threads share the tasks of all."""
    loads = [(sums, item) for sums in parts if sums.shares_rows for item in sums.work.items()]
    tasks = [
        (sums, family, split)
        for sums in parts
        for split in range(sums.splits)
        for family in sums.families
    ]
    ends = [
        (sums, item)
        for sums in parts
        for item in sums.work.items()
        if sums.work.mask is not None and not item.members.start
    ]

    def load(sums: GradientSums, item: Item) -> None:
        sums.loaded[item.start] = sums.load(item)

    def add(sums: GradientSums, family: list[Item], split: int) -> None:
        for item in family:
            differentiate_item(item, sums, split)

    def cost(task: tuple[GradientSums, list[Item], int]) -> int:
        sums, family, _ = task
        return sum(sum(item.pairs(item.row_tiles())) for item in family) // sums.splits

    if len(tasks) > 1:
        tasks.sort(key=cost, reverse=True)
    small = all(sums.work.is_small for sums in parts)
    for function, some in ((load, loads), (add, tasks), (GradientSums.write_keys, ends)):
        for_each(partial(_quietly, function), some, small)


Room = Callable[[str, tuple[int, ...]], np.ndarray]  # memory of a name and a shape


def _quietly(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with np.errstate(all="ignore"):
        function(*arguments)


def differentiate_item(item: Item, sums: GradientSums, split: int) -> None:
    """Add what one split of its keys, or with a mask of its rows, contributes to the gradients."""
    add = _differentiate if sums.work.mask is None else _differentiate_masked
    add(item, sums, split)


def _differentiate(item: Item, sums: GradientSums, split: int) -> None:
    """Add what every `splits`-th block of keys contributes to the gradients of some heads."""
    work, band = item.work, item.band
    row_blocks = sums.loaded[item.start] if sums.loaded else sums.load(item)
    dqueries = [np.zeros(block.query[..., :-1].shape, work.dtype) for block in row_blocks]
    for keys in list(blocks(slice(0, band.keys), work.tile_keys))[split :: sums.splits]:
        key, value = item.keys_and_values(keys)
        dkey, dvalue = np.zeros_like(key), np.zeros_like(value)
        key, value = (packed(x[:, None], work.dtype, columns=1) for x in (key, value))
        for tile in item.tiles(slice(0, band.rows), keys, key, value):
            index = tile.rows.start // work.tile_rows
            of_query, of_key, of_value = _gradients_of(tile, row_blocks[index], sums, split)
            (run,) = tile.runs
            part = (slice(None), slice(run.keys.start - keys.start, run.keys.stop - keys.start))
            dqueries[index] += of_query
            dkey[part] += of_key
            dvalue[part] += of_value
        np.multiply(dkey, 1 / item.unit, out=sums.dk[item.key_index][:, keys], casting="same_kind")
        sums.dv[item.key_index][:, keys] = dvalue
    for block, dquery in zip(row_blocks, dqueries, strict=True):
        sums.write_dq(item, block.rows, split, dquery)


def _differentiate_masked(item: Item, sums: GradientSums, split: int) -> None:
    """Add what one split of the tiles of rows contributes to the gradients of some heads."""
    for rows in sums.of_keys.rows[item.start][split]:
        block = _RowBlock.load(item, sums, rows, item.work.scratch.array)
        sums.add_sinks(item, block, split)
        dquery: np.ndarray | float = 0.0
        for tile in item.masked_tiles(rows):
            of_query, dkey, dvalue = _gradients_of(tile, block, sums, split)
            dquery = of_query if isinstance(dquery, float) else np.add(dquery, of_query, out=dquery)
            for columns, keys in tile.columns:
                sums.of_keys.add(item, split, keys, dkey[:, columns], dvalue[:, columns])
        sums.write_dq(item, rows, 0, dquery)


def _gradients_of(
    tile: Tile, block: _RowBlock, sums: GradientSums, split: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a tile adds to dq / scale, dk times its unit, and dv; it adds to dbias itself."""
    hidden = tile.hidden
    weights, dscores, slope = block.differentiate_softmax(tile.item.work, tile)
    sums.add_bias(tile, split, dscores)
    if slope is not None:
        dscores *= slope
    dvalue = product(weights, block.dout[..., :-1], hidden, by_key=True)
    dkey = product(dscores, block.query[..., :-1], hidden, by_key=True)
    return product(dscores, block.without_ones(tile.key), hidden), dkey, dvalue


@dataclass(frozen=True, slots=True)
class _RowBlock:
    """A tile of rows in the backward pass."""

    rows: slice
    query: np.ndarray  # (heads, group * rows, D + 1), scaled, in the item's unit; then -largest
    dout: np.ndarray  # (heads, group * rows, Dv + 1), without dropout; then -delta; both over sum
    rides: bool  # whether scores - largest is one product

    @classmethod
    def load(
        cls, item: Item, sums: GradientSums, rows: slice, room: Room | None = None
    ) -> _RowBlock:
        """Some rows of an item, in memory by `room`; by default it is new."""
        work, gradient = item.work, sums.gradient
        query_room, dout_room = (
            None if room is None else partial(room, name) for name in ("query", "dout")
        )

        def some(x: np.ndarray) -> np.ndarray:
            return x[item.index][:, :, rows]

        largest, total = (some(work.rows_by_key_head(x)) for x in sums.stats)
        seen = total != 0
        largest = np.where(seen, largest, 0)
        share = np.where(seen, 1 / total, 0)[..., None]  # a row that has seen nothing gives nothing
        query = item.query(rows, columns=1, room=query_room)
        query[..., -1] = (-item.unit * largest).reshape(query.shape[:2])
        rides = item.unit != 1 and bool(np.abs(largest).max() <= small_scores(work.dtype))
        out, dout = (
            some(work.by_key_head(x)).astype(work.dtype, copy=False)
            for x in (gradient.out, gradient.dout)
        )
        delta = np.vecdot(out, dout)
        if gradient.dlse is not None:
            delta -= some(work.rows_by_key_head(gradient.dlse))
        # Dropout multiplies what it keeps: dprobs and dvalue get that from here.
        factor = share / (1 - work.problem.dropout)
        dout = packed(dout, work.dtype, columns=1, factor=factor, room=dout_room)
        dout[..., -1] = -(delta * share[..., 0]).reshape(dout.shape[:2])
        return cls(rows, query, dout, rides)

    def differentiate_softmax(
        self, work: Work, tile: Tile
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Kept exponentials, the gradient of the scores, and their slope by scale q kᵀ."""
        shape = (*self.query.shape[:2], tile.key.shape[1])
        slope = None
        if work.problem.softcap or work.problem.score_mod is not None:
            slope = work.scratch.scores("slope", shape)
        if self.rides and slope is None:
            scores = _terms.scores(tile, self.query, tile.key)
        else:
            key = self.without_ones(tile.key)
            scores = _terms.scores(tile, self.query[..., :-1], key, slope)
            apply_by_row(np.subtract, scores, -self.query[..., -1])
        unit = tile.item.unit
        if not self.rides and unit != 1:
            scores /= unit
            unit = 1.0
        # Scores may be a rounding larger than the forward's, and so than the largest.
        weights = exponentials(scores, unit, clips=not self.rides)
        hide_exponentials(weights, tile.hidden)
        taken = _terms.dropped(tile)
        dscores = work.scratch.scores("dscores", shape)
        np.matmul(self.dout, transposed(tile.value), out=dscores)
        drop(dscores, taken, self.dout[..., -1:])
        dscores *= weights  # 0 where hidden, or not finite, which `product` sees to
        drop(weights, taken, 0)
        return weights, dscores, slope

    def without_ones(self, key: np.ndarray) -> np.ndarray:
        """A tile's key less its column of 1."""
        return key[..., :-1]


class GradientSums:
    """Where the gradients are added up; no two tasks add to the same elements.

    `into`: arrays for dq, dk and dv; by default new ones.
    """

    def __init__(
        self,
        work: Work,
        gradient: GradientProblem,
        into: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        problem = work.problem
        self.work, self.gradient = work, gradient
        self.loaded: dict[tuple[int, int, int], list[_RowBlock]] = {}  # where splits share rows
        self.stats = gradient.stats
        if self.stats is None:
            self.stats = (gradient.lse, (gradient.lse != -np.inf).astype(work.dtype))
        inputs = (problem.q, problem.k, problem.v)
        self.all_dq, self.all_dk, self.all_dv = into or map(empty_like, inputs)
        masked = work.mask is not None
        if masked:
            tiles = max((len(item.row_tiles()) for item in work.items()), default=1)
        else:
            tiles = math.ceil(problem.seqlen_k / work.tile_keys)
        self.families = work.families(gradient.bias_gradient)
        self.splits = max(1, min(tiles, work.many_tasks // max(1, len(self.families))))
        # Splits of the keys share the rows of dq: each has a copy, and these are summed in order.
        # With a mask splits of the rows share dk and dv.
        copies = 1 if masked else self.splits
        self.of_keys = KeyGradients(work, self.families, self.splits) if masked else None
        self.dq_copies = [self.all_dq]
        if copies > 1:
            self.dq_copies = [empty_like(problem.q, dtype=work.dtype) for _ in range(copies)]
        self.dq = [work.by_key_head(copy) for copy in self.dq_copies]
        for batch, band in enumerate(work.bands):
            for x in self.dq_copies:
                x[batch, band.rows :] = 0
            for x in (self.all_dk, self.all_dv):
                x[batch, band.keys :] = 0
        self.dk, self.dv = work.by_key_head(self.all_dk, 1), work.by_key_head(self.all_dv, 1)
        if gradient.bias_gradient:
            # Splits have keys or rows of their own, and share dbias only where these share a bias.
            copies = self.splits if work.bias_shape[2 if masked else 3] == 1 else 1
            self.dbias_copies = [np.zeros(work.bias_shape, work.dtype) for _ in range(copies)]
        if problem.sinks is not None:
            by_split = (self.splits, problem.batch, problem.heads_k, problem.group)
            self.dsinks_by_split = np.zeros(by_split, work.dtype)

    @property
    def shares_rows(self) -> bool:
        """Whether several tasks read the same rows."""
        return self.work.mask is None and self.splits > 1

    @property
    def dsinks_by_batch(self) -> np.ndarray:
        """(B, Hk, group)."""
        return sum_of(list(self.dsinks_by_split), self.work.dtype)

    def load(self, item: Item) -> list[_RowBlock]:
        """An item's rows; this is done once, and adds what they give to the sinks."""
        row_blocks = [_RowBlock.load(item, self, rows) for rows in item.row_tiles()]
        for block in row_blocks:
            self.add_sinks(item, block, split=0)
        return row_blocks

    def add_sinks(self, item: Item, block: _RowBlock, split: int) -> None:
        """Add what some rows of an item give to the sinks of its heads."""
        if item.sinks is None:
            return
        shape = (*item.sinks.shape[:2], -1)
        fall = block.query[..., -1].reshape(shape) / item.unit + item.sinks
        dsinks = np.exp(np.minimum(fall, 0)) * block.dout[..., -1].reshape(shape)
        self.dsinks_by_split[split][item.index] += dsinks.sum(axis=-1)

    def add_bias(self, tile: Tile, split: int, dscores: np.ndarray) -> None:
        """Add a tile's part of dbias, summed along the axes that share a bias."""
        if not self.gradient.bias_gradient:
            return
        hide(dscores, tile.hidden, 0)  # dbias is no product
        dbias = self.work.scores_by_key_head(self.dbias_copies[split % len(self.dbias_copies)])
        batch = slice(tile.item.batch, tile.item.batch + 1)
        shared = [n == 1 for n in dbias.shape]
        axes = tuple(axis for axis, one in enumerate(shared) if one)
        by_head = dscores.reshape(1, dscores.shape[0], tile.item.group, -1, dscores.shape[-1])
        for columns, keys in tile.columns:
            index = (batch, *tile.item.index[1:], tile.rows, keys)
            target = dbias[
                tuple(slice(None) if one else i for one, i in zip(shared, index, strict=True))
            ]
            target += by_head[..., columns].sum(axis=axes, keepdims=True)

    def write_dq(self, item: Item, rows: slice, copy: int, dquery: np.ndarray | float) -> None:
        """Write dq of some rows, of (heads, group * rows, D) that lacks the scale."""
        target = self.dq[copy][item.index][:, :, rows]
        if isinstance(dquery, np.ndarray):
            dquery = dquery.reshape(target.shape)
        np.multiply(dquery, self.work.problem.scale, out=target, casting="same_kind")

    def write_keys(self, item: Item) -> None:
        """Write dk and dv of an item's heads, with a mask."""
        keys = slice(0, item.band.keys)
        self.of_keys.write(item, *(x[item.key_index][:, keys] for x in (self.dk, self.dv)))

    def gradients(self) -> Gradients:
        """The finished gradients in the dtypes of their inputs."""
        problem, dbias, dsinks = self.work.problem, None, None
        if self.gradient.bias_gradient:
            dbias = sum_of(self.dbias_copies, problem.bias.dtype).reshape(problem.bias.shape)
        if problem.sinks is not None:
            dsinks = sum_of(list(self.dsinks_by_batch), problem.sinks.dtype)
            dsinks = dsinks.reshape(problem.sinks.shape)
        if len(self.dq_copies) > 1:
            self.all_dq[...] = sum_of(self.dq_copies, problem.dtype)
        return Gradients(self.all_dq, self.all_dk, self.all_dv, dbias, dsinks)


def sum_of(copies: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The sum of the copies, in order."""
    total = copies[0]
    for copy in copies[1:]:
        total += copy
    return total.astype(dtype, copy=False)
