"""Attention on NumPy arrays: FlashAttention's tiles in O(S) memory, on every core.

Forward subtracts a reference from the scores of a row, which need not be their maximum: any number
will do for which exponentials neither overflow nor vanish. It is 0 until a sum of them says
otherwise, so that most tiles cost two matrix products, one exponential and little else.

Backward, the reference is lse. A column that rides along with each operand spares two passes:

    [q * scale, -lse] @ [k, 1]ᵀ = scores - lse       the probabilities' logarithm
    [dout, -delta] @ [v, 1]ᵀ    = dprobs - delta     the gradient of the scores / probabilities

Inside, scores are in units of log 2, because exp2 is twice as fast as exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cuflash._arrays import (
    LN_2,
    Hidden,
    drop,
    empty_like,
    exp2,
    hide,
    hide_exponentials,
    in_units_of_log2,
    packed,
    product,
    transposed,
)
from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash._terms import add, dropped, modify
from cuflash._threads import for_each
from cuflash._tiles import blocks
from cuflash._work import Item, Tile, Work

# A row's reference stays while its sum of exponentials is between 1 / LARGEST_SUM and LARGEST_SUM.
LARGEST_SUM = 2.0**24


def forward(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Attention's (out, lse)."""
    out = problem.out
    out = empty_like(problem.q, problem.head_dim_v) if out is None else out
    lse = np.full(problem.lse_shape, -np.inf, problem.lse_dtype)
    if lse.size:
        attend([(Work(problem, splits_rows=True), out, lse)])
    return out, lse


def attend(parts: list[tuple[Work, np.ndarray, np.ndarray]]) -> None:
    """Write (out, lse) of each work; the threads share the tasks of all."""
    tasks = []
    for work, out, lse in parts:
        for batch, band in enumerate(work.bands):
            out[batch, band.rows :] = 0
        out, lse = work.by_key_head(out), work.rows_by_key_head(lse)
        for item in work.items():
            tiles = item.row_tiles()
            for first in range(0, len(tiles), work.tiles_of_task):
                some = tiles[first : first + work.tiles_of_task]
                tasks.append((item, some, out[item.index], lse[item.index]))

    def run(task: tuple[Item, list[slice], np.ndarray, np.ndarray]) -> None:
        with np.errstate(all="ignore"):
            _attend(*task)

    # What takes longest comes first: in a causal problem the last rows.
    for_each(run, sorted(tasks, key=lambda task: (-task[0].pairs(task[1]), -task[1][0].start)))


def backward(gradient: GradientProblem) -> Gradients:
    """The gradients of q, k, v, the bias and the sinks."""
    problem = gradient.forward
    if not problem.q.size:
        inputs = (problem.q, problem.k, problem.v, problem.bias, problem.sinks)
        return Gradients(*(None if x is None else np.zeros(x.shape, x.dtype) for x in inputs))
    sums = GradientSums(Work(problem, splits_rows=False), gradient)
    differentiate([sums])
    with np.errstate(all="ignore"):
        return sums.gradients()


def differentiate(parts: list[GradientSums]) -> None:
    """Add up the gradients of each part; the threads share the tasks of all."""
    # Splits read the same rows, or with a mask the same keys.
    loads = [(sums, item) for sums in parts if sums.splits > 1 for item in sums.work.items()]
    tasks = [
        (sums, family, split)
        for sums in parts
        for split in range(sums.splits)
        for family in sums.work.families()
    ]
    ends = [(sums, item) for sums in parts for item in sums.items_with_kept()]

    def load(sums: GradientSums, item: Item) -> None:
        sums.loaded[item.start] = sums.load(item)

    def add(sums: GradientSums, family: list[Item], split: int) -> None:
        add_item = _differentiate if sums.work.mask is None else _differentiate_masked
        for item in family:
            operands = sums.loaded[item.start] if sums.loaded else sums.load(item)
            add_item(item, operands, sums, split)

    def cost(task: tuple[GradientSums, list[Item], int]) -> int:
        sums, family, _ = task
        return sum(item.pairs(item.row_tiles()) for item in family) // sums.splits

    for function, some in (
        (load, loads),
        (add, sorted(tasks, key=cost, reverse=True)),
        (GradientSums.add_kept, ends),
    ):
        for_each(partial(_quietly, function), some)


def _quietly(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with np.errstate(all="ignore"):
        function(*arguments)


def _attend(item: Item, row_tiles: list[slice], out: np.ndarray, lse: np.ndarray) -> None:
    """Write some rows of out (heads, group, Sq, Dv) and lse (heads, group, Sq)."""
    softmaxes = {rows.start: _OnlineSoftmax(item.work, item.query(rows)) for rows in row_tiles}
    for tile in _tiles_of(item, row_tiles):
        softmaxes[tile.rows.start].step(tile)
    for rows in row_tiles:
        softmaxes[rows.start].write(out[:, :, rows], lse[:, :, rows], item.sinks)


def _tiles_of(item: Item, row_tiles: list[slice]) -> Iterator[Tile]:
    """All that some rows side by side see."""
    work, band = item.work, item.band
    if work.mask is None:
        span = slice(row_tiles[0].start, row_tiles[-1].stop)
        for keys in blocks(band.keys_of(span), work.tile_keys):
            yield from item.tiles(span, keys, *item.keys_and_values(keys))
        return
    key, value = item.keys_and_values(slice(0, band.keys))
    for rows in row_tiles:
        yield from item.masked_tiles(rows, key, value)


class _OnlineSoftmax:
    """What a tile of rows has gathered from the keys seen so far."""

    def __init__(self, work: Work, query: np.ndarray) -> None:
        self.work = work
        self.query = query  # (heads, group * rows, D), scaled
        self.numerator: np.ndarray | None = None  # (heads, group * rows, Dv), after the first tile
        self.denominator = np.zeros(query.shape[:2], work.dtype)
        self.reference: np.ndarray | None = None  # 0 for every row

    def step(self, tile: Tile) -> None:
        """Attend to one more tile of keys."""
        hidden = tile.hidden
        probs = hide_exponentials(exp2(self.scores(tile)), hidden)
        total = probs @ self.work.ones[: probs.shape[-1]]
        if not self.in_range(total, probs.shape, hidden):
            scores = hide(self.scores(tile), hidden, -np.inf)
            self.raise_reference(scores)
            probs = exp2(scores)
            total = probs @ self.work.ones[: probs.shape[-1]]
        drop(probs, dropped(tile), 0)
        weighted = product(probs, tile.value, hidden)
        if self.numerator is None:
            self.numerator = weighted
        else:
            self.numerator += weighted
        self.denominator += total

    def scores(self, tile: Tile) -> np.ndarray:
        """(heads, group * rows, keys), less the reference of each row."""
        scores = _scores(tile, self.query, tile.key)
        if self.reference is not None:
            scores -= self.reference[..., None]
        return scores

    def in_range(
        self, total: np.ndarray, shape: tuple[int, int, int], hidden: Hidden | None
    ) -> bool:
        """Whether no row's exponentials overflowed or vanished; NaN is out of range."""
        if not total.max() <= LARGEST_SUM:
            return False
        if total.min() >= 1 / LARGEST_SUM:
            return True
        fits = self.denominator + total >= 1 / LARGEST_SUM
        return bool(fits.all() or (hidden is not None and (fits | hidden.whole_rows(shape)).all()))

    def raise_reference(self, scores: np.ndarray) -> None:
        """Make each row's reference its largest score so far, and all that is relative to it."""
        top = scores.max(axis=-1)
        seen = self.denominator > 0
        rise = np.where(seen, np.maximum(top, 0), top)
        rise[rise == -np.inf] = 0  # a row that has seen nothing yet
        scores -= rise[..., None]
        self.reference = rise if self.reference is None else self.reference + rise
        factor = np.where(seen, np.exp2(-rise), 0)
        if self.numerator is not None:
            self.numerator *= factor[..., None]
        self.denominator *= factor

    def write(self, out: np.ndarray, lse: np.ndarray, sinks: np.ndarray | None) -> None:
        """Finish: out (heads, group, rows, Dv) and lse (heads, group, rows)."""
        if self.numerator is None:
            out[...] = 0
            if sinks is not None:  # else lse is -inf
                lse[...] = sinks * LN_2
            return
        log_sum = np.log2(self.denominator).reshape(lse.shape)
        if self.reference is not None:
            log_sum += self.reference.reshape(lse.shape)
        divisor = np.maximum(self.denominator, 1 / LARGEST_SUM).reshape(lse.shape)
        if sinks is not None:
            of_keys, log_sum = log_sum, np.logaddexp2(log_sum, sinks)
            divisor *= np.where(of_keys == -np.inf, 1, np.exp2(log_sum - of_keys))
        if self.work.problem.dropout:
            divisor *= 1 - self.work.problem.dropout
        np.multiply(log_sum, LN_2, out=lse)
        numerator = self.numerator.reshape(out.shape)
        np.divide(numerator, divisor[..., None], out=out, casting="same_kind")


def _differentiate(item: Item, operands: _Operands, sums: GradientSums, split: int) -> None:
    """Add what every `splits`-th block of keys contributes to the gradients of some heads."""
    work, band, row_blocks = item.work, item.band, operands.row_blocks
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
        np.multiply(dkey, LN_2, out=sums.dk[item.key_index][:, keys], casting="same_kind")
        sums.dv[item.key_index][:, keys] = dvalue
    for block, dquery in zip(row_blocks, dqueries, strict=True):
        sums.write_dq(item, block.rows, split, dquery)


def _differentiate_masked(item: Item, operands: _Operands, sums: GradientSums, split: int) -> None:
    """Add what one split of the tiles of rows contributes to the gradients of some heads."""
    work, (key, value) = item.work, operands.keys
    row_blocks = operands.row_blocks[item.split(split, sums.splits)]
    if not row_blocks:
        return
    rows = slice(row_blocks[0].rows.start, row_blocks[-1].rows.stop)
    span = work.mask.span_of_keys(*item.start, rows)
    dkey, dvalue = (np.zeros_like(x[:, span, :-1]) for x in (key, value))
    for block in row_blocks:
        dquery = np.zeros(block.query[..., :-1].shape, work.dtype)
        for tile in item.masked_tiles(block.rows, key, value):
            of_query, of_key, of_value = _gradients_of(tile, block, sums, split)
            dquery += of_query
            for columns, keys in tile.columns:
                part = (slice(None), slice(keys.start - span.start, keys.stop - span.start))
                dkey[part] += of_key[:, columns]
                dvalue[part] += of_value[:, columns]
        sums.write_dq(item, block.rows, 0, dquery)
    sums.keep(item, split, span, dkey, dvalue)


def _gradients_of(
    tile: Tile, block: _RowBlock, sums: GradientSums, split: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a tile adds to dq / scale, dk / ln 2 and dv; it adds to dbias itself."""
    hidden = tile.hidden
    probs, dscores, slope = block.differentiate_softmax(tile.item.work, tile)
    sums.add_bias(tile, split, dscores)
    if slope is not None:
        dscores *= slope
    dvalue = product(probs, block.dout[..., :-1], hidden, by_key=True)
    dkey = product(dscores, block.query[..., :-1], hidden, by_key=True)
    return product(dscores, tile.key[..., :-1], hidden), dkey, dvalue


@dataclass(frozen=True, slots=True)
class _Operands:
    """What the splits of an item share."""

    row_blocks: list[_RowBlock]
    keys: tuple[np.ndarray, np.ndarray] | None  # with a mask: (heads, Sk, D + 1) and Dv + 1

    @classmethod
    def load(cls, item: Item, gradient: GradientProblem) -> _Operands:
        work, keys = item.work, None
        if work.mask is not None:
            key, value = item.keys_and_values(slice(0, item.band.keys))
            keys = tuple(packed(x[:, None], work.dtype, columns=1) for x in (key, value))
        return cls([_RowBlock.load(item, gradient, rows) for rows in item.row_tiles()], keys)


@dataclass(frozen=True, slots=True)
class _RowBlock:
    """A tile of rows in the backward pass."""

    rows: slice
    query: np.ndarray  # (heads, group * rows, D + 1), scaled, the last column -lse
    dout: np.ndarray  # (heads, group * rows, Dv + 1), the last column -delta, without dropout

    @classmethod
    def load(cls, item: Item, gradient: GradientProblem, rows: slice) -> _RowBlock:
        work = item.work

        def some(x: np.ndarray) -> np.ndarray:
            return x[item.index][:, :, rows]

        lse = some(work.rows_by_key_head(gradient.lse))
        # A row that has seen nothing gets the probability exp(score - inf) = 0 everywhere.
        reference = np.where(lse == -np.inf, np.inf, in_units_of_log2(lse, work.dtype))
        query = item.query(rows, columns=1)
        query[..., -1] = -reference.reshape(query.shape[:2])
        out, dout = (
            some(work.by_key_head(x)).astype(work.dtype, copy=False)
            for x in (gradient.out, gradient.dout)
        )
        delta = np.vecdot(out, dout)
        if gradient.dlse is not None:
            delta -= some(work.rows_by_key_head(gradient.dlse))
        # Dropout multiplies what it keeps: dprobs and dvalue get that from here.
        rate = work.problem.dropout
        dout = packed(dout, work.dtype, columns=1, factor=1 / (1 - rate) if rate else None)
        dout[..., -1] = -delta.reshape(dout.shape[:2])
        return cls(rows, query, dout)

    def differentiate_softmax(
        self, work: Work, tile: Tile
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Kept probabilities, the gradient of the scores, and their slope by scale q kᵀ."""
        shape = (*self.query.shape[:2], tile.key.shape[1])
        slope = None
        if work.softcap or work.problem.score_mod is not None:
            slope = work.scratch.array(2, shape)
            scores = _scores(tile, self.query[..., :-1], tile.key[..., :-1], slope)
            scores += self.query[..., -1:]
        else:
            scores = _scores(tile, self.query, tile.key)
        probs, taken = hide_exponentials(exp2(scores), tile.hidden), dropped(tile)
        dscores = work.scratch.array(1, shape)
        np.matmul(self.dout, transposed(tile.value), out=dscores)
        drop(dscores, taken, self.dout[..., -1:])
        dscores *= probs  # 0 where hidden, or not finite, which `product` sees to
        drop(probs, taken, 0)
        if work.bias is not None:
            hide(dscores, tile.hidden, 0)  # dbias is no product
        return probs, dscores, slope


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
        self.loaded: dict[tuple[int, int, int], _Operands] = {}  # by item, where there are splits
        inputs = (problem.q, problem.k, problem.v)
        self.all_dq, self.all_dk, self.all_dv = into or map(empty_like, inputs)
        masked = work.mask is not None
        if masked:
            tiles = max((len(item.row_tiles()) for item in work.items()), default=1)
        else:
            tiles = math.ceil(problem.seqlen_k / work.tile_keys)
        self.splits = max(1, min(tiles, work.many_tasks // max(1, len(work.families()))))
        # Splits of the keys share the rows of dq: each has a copy, and these are summed in order.
        # With a mask splits of the rows share dk and dv: each keeps its part until the end.
        copies = 1 if masked else self.splits
        self.dq_copies = [self.all_dq]
        if copies > 1:
            self.dq_copies = [empty_like(problem.q, dtype=work.dtype) for _ in range(copies)]
        self.kept: dict[tuple[int, int, int, int], tuple[slice, np.ndarray, np.ndarray]] = {}
        self.dq = [work.by_key_head(copy) for copy in self.dq_copies]
        for batch, band in enumerate(work.bands):
            for x in self.dq_copies:
                x[batch, band.rows :] = 0
            for x in (self.all_dk, self.all_dv):
                x[batch, band.keys :] = 0
        self.dk, self.dv = work.by_key_head(self.all_dk, 1), work.by_key_head(self.all_dv, 1)
        if problem.bias is not None:
            # Splits have keys or rows of their own, and share dbias only where these share a bias.
            copies = self.splits if work.bias_shape[2 if masked else 3] == 1 else 1
            self.dbias_copies = [np.zeros(work.bias_shape, work.dtype) for _ in range(copies)]
        if problem.sinks is not None:
            by_batch = (problem.batch, problem.heads_k, problem.group)
            self.dsinks_by_batch = np.zeros(by_batch, work.dtype)

    def load(self, item: Item) -> _Operands:
        """An item's operands; this is done once, and adds what its rows give to the sinks."""
        operands = _Operands.load(item, self.gradient)
        self.add_sinks(item, operands.row_blocks)
        return operands

    def add_sinks(self, item: Item, row_blocks: list[_RowBlock]) -> None:
        """Add what the rows of an item give to the sinks of its heads."""
        if item.sinks is None:
            return
        shape = (*item.sinks.shape[:2], -1)
        for block in row_blocks:
            probs = exp2(block.query[..., -1].reshape(shape) + item.sinks)
            dsinks = probs * block.dout[..., -1].reshape(shape)
            self.dsinks_by_batch[item.index] += dsinks.sum(axis=-1)

    def add_bias(self, tile: Tile, split: int, dscores: np.ndarray) -> None:
        """Add a tile's part of dbias, summed along the axes that share a bias."""
        if self.work.problem.bias is None:
            return
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

    def write_dq(self, item: Item, rows: slice, copy: int, dquery: np.ndarray) -> None:
        """Write dq of some rows, of (heads, group * rows, D) that lacks the scale."""
        target = self.dq[copy][item.index][:, :, rows]
        dquery = dquery.reshape(target.shape)
        np.multiply(dquery, self.work.problem.scale, out=target, casting="same_kind")

    def keep(
        self, item: Item, split: int, keys: slice, dkey: np.ndarray, dvalue: np.ndarray
    ) -> None:
        """Hold on to what a split of the rows adds to dk / ln 2 and dv of some keys."""
        self.kept[(*item.start, split)] = (keys, dkey, dvalue)

    def items_with_kept(self) -> list[Item]:
        """One item for each of the key heads of which something is kept."""
        masked = self.work.mask is not None
        return [item for item in self.work.items() if masked and not item.members.start]

    def add_kept(self, item: Item) -> None:
        """Write dk and dv of an item's key heads: what is kept of them, summed in order."""
        parts = [self.kept[place] for place in sorted(self.kept) if place[:2] == item.start[:2]]
        for number, target in ((1, self.dk), (2, self.dv)):
            target = target[item.key_index][:, : item.band.keys]
            total = np.zeros(target.shape, self.work.dtype)
            for part in parts:
                total[:, part[0]] += part[number]
            np.multiply(total, LN_2 if number == 1 else 1, out=target, casting="same_kind")

    def gradients(self) -> Gradients:
        """The finished gradients in the dtypes of their inputs."""
        problem, dbias, dsinks = self.work.problem, None, None
        if problem.bias is not None:
            dbias = sum_of(self.dbias_copies, problem.bias.dtype).reshape(problem.bias.shape)
        if problem.sinks is not None:
            dsinks = sum_of(list(self.dsinks_by_batch), problem.sinks.dtype)
            dsinks = dsinks.reshape(problem.sinks.shape)
        if len(self.dq_copies) > 1:
            self.all_dq[...] = sum_of(self.dq_copies, problem.dtype)
        return Gradients(self.all_dq, self.all_dk, self.all_dv, dbias, dsinks)


def _scores(
    tile: Tile, query: np.ndarray, key: np.ndarray, slope: np.ndarray | None = None
) -> np.ndarray:
    """(heads, group * rows, keys): the scores, and their slope by scale q kᵀ."""
    work = tile.item.work
    scores = work.scratch.array(0, (*query.shape[:2], key.shape[1]))
    np.matmul(query, transposed(key), out=scores)
    if work.softcap:
        scores /= work.softcap
        np.tanh(scores, out=scores)
        if slope is not None:
            np.multiply(scores, scores, out=slope)
            np.subtract(1, slope, out=slope)
        scores *= work.softcap
    elif slope is not None:
        slope[...] = 1
    if work.problem.score_mod is not None:
        modify(tile, scores, slope)
    add(tile, scores)
    return scores


def sum_of(copies: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The sum of the copies, in order."""
    total = copies[0]
    for copy in copies[1:]:
        total += copy
    return total.astype(dtype, copy=False)
