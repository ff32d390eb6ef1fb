"""Attention on NumPy arrays: FlashAttention's tiles in O(S) memory, on every core.

Forward subtracts a reference from the scores of a row, which need not be their maximum: any number
will do for which exponentials neither overflow nor vanish. It is 0 until a sum of them says
otherwise, so that most tiles cost two matrix products, one exponential and little else.

Inside, scores are in units of log 2, because exp2 is twice as fast as exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cuflash import _terms
from cuflash._arrays import LN_2, Hidden, drop, empty_like, exp2, hide, hide_exponentials, product
from cuflash._cpu_backward import GradientSums, differentiate
from cuflash._mask_blocks import BlockMask, TileCounts
from cuflash._problem import GradientProblem, Gradients, Problem, Result
from cuflash._threads import for_each
from cuflash._tiles import Band, blocks
from cuflash._work import MASK_BLOCK, Item, Tile, Work

# A row's reference stays while its sum of exponentials is between 1 / LARGEST_SUM and LARGEST_SUM.
LARGEST_SUM = 2.0**24


def forward(problem: Problem, wants_stats: bool = False) -> Result:
    """Attention's out, lse and, if wanted, stats."""
    out = problem.out
    out = empty_like(problem.q, problem.head_dim_v) if out is None else out
    lse = np.full(problem.lse_shape, -np.inf, problem.lse_dtype)
    if lse.size:
        attend([(Work(problem, splits_rows=True), out, lse)])
    return Result(out, lse, stats_of(lse) if wants_stats else None)


def stats_of(lse: np.ndarray) -> np.ndarray:
    """Stats of which the largest score is lse, so that the sum is 1."""
    return np.stack([lse, (lse != -np.inf).astype(lse.dtype)])


def attend(parts: list[tuple[Work, np.ndarray, np.ndarray]]) -> None:
    """Write (out, lse) of each work; the threads share the tasks of all."""
    tasks = [task for part in parts for task in tasks_of(*part)]

    def run(task: Task) -> None:
        with np.errstate(all="ignore"):
            attend_to(*task)

    if len(tasks) > 1:  # what takes longest comes first: in a causal problem the last rows
        tasks.sort(key=lambda task: (-sum(task[0].pairs(task[1])), -task[1][0].start))
    for_each(run, tasks, small=all(work.is_small for work, *_ in parts))


Task = tuple[Item, list[slice], np.ndarray, np.ndarray]  # the arguments of `attend_to`


def tasks_of(work: Work, out: np.ndarray, lse: np.ndarray) -> list[Task]:
    """What writes (out, lse) of a work, in any order."""
    tasks = []
    for batch, band in enumerate(work.bands):
        out[batch, band.rows :] = 0
    out, lse = work.by_key_head(out), work.rows_by_key_head(lse)
    for item in work.items():
        tiles = item.row_tiles()
        for first in range(0, len(tiles), work.tiles_of_task):
            some = tiles[first : first + work.tiles_of_task]
            tasks.append((item, some, out[item.index], lse[item.index]))
    return tasks


def backward(gradient: GradientProblem) -> Gradients:
    """The gradients of q, k, v, the bias and the sinks."""
    problem = gradient.forward
    if not problem.q.size:
        return gradient.zeros(np.zeros)
    sums = GradientSums(Work(problem, splits_rows=False), gradient)
    differentiate([sums])
    with np.errstate(all="ignore"):
        return sums.gradients()


def explain(problem: Problem) -> tuple[tuple[int, int], TileCounts | None]:
    """The queries and keys of a forward's tile, and with a mask how many tiles it hides."""
    if problem.mask is None or not problem.seqlen_k:
        work = Work(problem, splits_rows=True)
        return (work.tile_rows, work.tile_keys), None
    if not math.prod(problem.lse_shape):
        return MASK_BLOCK, None
    bands = [Band.of(problem, batch) for batch in range(problem.batch)]
    return MASK_BLOCK, BlockMask.of(problem, MASK_BLOCK).count(bands)


def attend_to(item: Item, row_tiles: list[slice], out: np.ndarray, lse: np.ndarray) -> None:
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
    for rows in row_tiles:
        yield from item.masked_tiles(rows)


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
        drop(probs, _terms.dropped(tile), 0)
        weighted = product(probs, tile.value, hidden)
        if self.numerator is None:
            self.numerator = weighted
        else:
            self.numerator += weighted
        self.denominator += total

    def scores(self, tile: Tile) -> np.ndarray:
        """(heads, group * rows, keys), less the reference of each row."""
        scores = _terms.scores(tile, self.query, tile.key)
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
