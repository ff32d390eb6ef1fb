"""Attention on NumPy arrays: what each tile of rows gathers from its tiles of keys.

Scores stay in natural units, in which no finite one overflows and no two become one, until the
largest of their row has been subtracted. Where all of them are known to be small they are in units
of log 2 from the first product on: exp2 is twice as fast as exp, and needs no care then.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuflash import _terms
from cuflash._arrays import (
    Hidden,
    apply_by_row,
    drop,
    exponentials,
    hide_exponentials,
    lower,
    packed,
    product,
    row_maxima,
)
from cuflash._problem import Result
from cuflash._threads import for_each
from cuflash._tiles import blocks
from cuflash._work import Item, Tile, Work


def empty_result(out: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, stats: bool) -> Result:
    """A result in which no row has seen a key yet: lse, of this shape, and stats if wanted."""
    lse = np.full(shape, -np.inf, dtype)
    return Result(out, lse, np.stack([lse, np.zeros_like(lse)]) if stats else None)


def attend(parts: list[tuple[Work, Result]]) -> None:
    """Write the result of each work; the threads share the tasks of all."""
    tasks = [task for part in parts for task in tasks_of(*part)]

    def run(task: Task) -> None:
        with np.errstate(all="ignore"):
            attend_to(*task)

    if len(tasks) > 1:  # what takes longest comes first: in a causal problem the last rows
        tasks.sort(key=lambda task: (-sum(task[0].pairs(task[1])), -task[1][0].start))
    for_each(run, tasks, small=all(work.is_small for work, *_ in parts))


Task = tuple[Item, list[slice], list[np.ndarray]]  # the arguments of `attend_to`


def tasks_of(work: Work, result: Result) -> list[Task]:
    """The tasks that write the result of a work; their order does not matter."""
    tasks = []
    out, lse, stats = result
    for batch, band in enumerate(work.bands):
        out[batch, band.rows :] = 0
    by_row = [lse] if stats is None else [lse, *stats]
    arrays = [work.by_key_head(out), *map(work.rows_by_key_head, by_row)]
    for item in work.items():
        tiles = item.row_tiles()
        some = [x[item.index] for x in arrays]
        for first in range(0, len(tiles), work.tiles_of_task):
            tasks.append((item, tiles[first : first + work.tiles_of_task], some))
    return tasks


def attend_to(item: Item, row_tiles: list[slice], arrays: list[np.ndarray]) -> None:
    """Write some rows of out (heads, group, Sq, Dv), lse (heads, group, Sq) and the statistics."""
    wants_stats = len(arrays) > 2
    softmaxes = {rows.start: _OnlineSoftmax(item, rows, wants_stats) for rows in row_tiles}
    for tile in _tiles_of(item, row_tiles):
        softmaxes[tile.rows.start].step(tile)
    for rows in row_tiles:
        softmax = softmaxes[rows.start]
        if softmax.may_have_overflown():
            softmax = _OnlineSoftmax(item, rows, wants_stats, follows=True)
            for tile in _tiles_of(item, [rows]):
                softmax.step(tile)
        softmax.write(*(x[:, :, rows] for x in arrays))


def _tiles_of(item: Item, row_tiles: list[slice]) -> Iterator[Tile]:
    """All that some rows side by side see."""
    work, band = item.work, item.band
    if work.mask is None:
        span = slice(row_tiles[0].start, row_tiles[-1].stop)
        for keys in blocks(band.keys_of(span), work.tile_keys):
            key, value = item.keys_and_values(keys)
            yield from item.tiles(span, keys, packed(key[:, None], work.dtype, columns=1), value)
        return
    for rows in row_tiles:
        yield from item.masked_tiles(rows)


class _OnlineSoftmax:
    """What a tile of rows has gathered from the keys seen so far, relative to a score of each row.

    This reference is the largest score so far. Where all scores are small, and unless it `follows`,
    it is the logarithm of the first sum of exponentials that is not 0, and stays: later sums can
    then overflow only with values near the largest finite number.
    """

    def __init__(self, item: Item, rows: slice, wants_stats: bool, follows: bool = False) -> None:
        self.item, self.work, self.wants_stats = item, item.work, wants_stats
        self.query = item.query(rows, columns=1)  # (heads, group * rows, D + 1): scaled; -reference
        shape, dtype = self.query.shape[:2], item.work.dtype
        self.reference = np.full(shape, -np.inf, dtype)
        self.largest = self.reference  # as far as it is wanted
        self.denominator = np.zeros(shape, dtype)  # the sum of exp(score - reference)
        self.numerator: np.ndarray | None = None  # (heads, group * rows, Dv), after the first tile
        self.stays = not follows and item.unit != 1
        self.is_set = False  # whether each row has a reference that stays
        # Small scores get no -inf among them, for which exp2 is slow.
        self.lowest = -np.inf if item.unit == 1 else np.finfo(dtype).minexp / 2

    def step(self, tile: Tile) -> None:
        """Attend to one more tile of keys."""
        hidden = tile.hidden
        if self.stays and self.numerator is None:
            weights, total = self.first_weights(tile, hidden)
        else:
            scores = self.relative_scores(tile, hidden)
            weights = hide_exponentials(exponentials(scores, self.item.unit), hidden)
            total = weights @ self.work.ones[: weights.shape[-1]]
        drop(weights, _terms.dropped(tile), 0)
        weighted = product(weights, tile.value, hidden)
        if self.numerator is None:
            self.numerator = weighted
        else:
            self.numerator += weighted
        self.denominator += total
        self.is_set = self.stays and (self.is_set or bool((self.denominator > 0).all()))

    def first_weights(self, tile: Tile, hidden: Hidden | None) -> tuple[np.ndarray, np.ndarray]:
        """The exponentials of small scores over their sums, and the sums of these: 1, or 0.

        One pass fewer than by the largest score; and a row that sees one key has the weight 1.
        """
        scores = _terms.scores(tile, self.query[..., :-1], tile.key[..., :-1])
        if self.wants_stats:
            lower(scores, hidden, self.lowest)
            self.largest = row_maxima(scores)
        weights = hide_exponentials(np.exp2(scores, out=scores), hidden)
        total = weights @ self.work.ones[: weights.shape[-1]]
        seen = total > 0
        base = np.where(seen, total, 1)
        apply_by_row(np.divide, weights, base)
        base = np.log2(base)
        self.query[..., -1] = -base
        self.reference = np.where(seen, base, -np.inf)
        return weights, seen.astype(weights.dtype)

    def relative_scores(self, tile: Tile, hidden: Hidden | None) -> np.ndarray:
        """(heads, group * rows, keys), less the reference of each row."""
        if self.is_set and not self.work.problem.softcap:
            scores = _terms.scores(tile, self.query, tile.key)
        else:
            scores = _terms.scores(tile, self.query[..., :-1], tile.key[..., :-1])
            if not self.is_set:
                lower(scores, hidden, self.lowest)
                self.raise_reference(row_maxima(scores))
            apply_by_row(np.subtract, scores, -self.query[..., -1])
        if self.is_set and self.wants_stats:
            lower(scores, hidden, self.lowest)
            np.maximum(self.largest, self.reference + row_maxima(scores), out=self.largest)
        return scores

    def raise_reference(self, top: np.ndarray) -> None:
        """Make each row's reference its largest score so far, and all that is relative to it."""
        self.largest = np.maximum(self.largest, top)
        top = np.maximum(self.reference, top)
        base = np.where(top == -np.inf, 0, top)  # where a row has seen nothing yet
        if self.numerator is not None:
            factor = np.exp((self.reference - base) / self.item.unit)
            self.numerator *= factor[..., None]
            self.denominator *= factor
        self.query[..., -1] = -base
        self.reference = top

    def may_have_overflown(self) -> bool:
        """Whether a reference that stays may have been too low."""
        if not self.stays or self.numerator is None:
            return False
        return not (np.isfinite(self.denominator).all() and np.isfinite(self.numerator).all())

    def write(self, out: np.ndarray, lse: np.ndarray, *stats: np.ndarray) -> None:
        """Finish: out (heads, group, rows, Dv), lse and, if wanted, (heads, group, rows) each."""
        total = self.denominator.reshape(lse.shape)
        seen = total != 0
        reference, largest = (
            np.where(seen, x.reshape(lse.shape) / self.item.unit, -np.inf)
            for x in (self.reference, self.largest)
        )
        shares = None  # of the keys' sum in that of keys and sink, times total
        if self.item.sinks is not None:
            of_keys, reference = reference, np.maximum(reference, self.item.sinks)
            base = np.where(reference == -np.inf, 0, reference)
            shares = np.exp(of_keys - base)
            total = total * shares + np.exp(self.item.sinks - base)
            largest = np.maximum(largest, self.item.sinks)
        np.add(reference, np.log(total), out=lse)
        if stats:
            fall = np.where(largest == -np.inf, 0, reference - largest)
            stats[0][...], stats[1][...] = largest, total * np.exp(fall)
        if self.numerator is None:
            out[...] = 0
            return
        numerator = self.numerator.reshape(out.shape)
        if shares is not None:
            numerator *= shares[..., None]
        divisor = np.where(total == 0, 1, total)
        if self.work.problem.dropout:
            divisor *= 1 - self.work.problem.dropout
        np.divide(numerator, divisor[..., None], out=out, casting="same_kind")
