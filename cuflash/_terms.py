"""The scores of a tile: the product, softcap, score_mod, ALiBi and bias; and dropout."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cuflash import _random
from cuflash._arrays import transposed
from cuflash._work import Tile


def scores(
    tile: Tile, query: np.ndarray, key: np.ndarray, slope: np.ndarray | None = None
) -> np.ndarray:
    """(heads, group * rows, keys), in the item's unit; and their slope by scale q kᵀ."""
    work = tile.item.work
    softcap = work.problem.softcap * tile.item.unit
    result = work.scratch.scores("scores", (*query.shape[:2], key.shape[1]))
    np.matmul(query, transposed(key), out=result)
    if softcap:
        result /= softcap
        np.tanh(result, out=result)
        if slope is not None:
            np.multiply(result, result, out=slope)
            np.subtract(1, slope, out=slope)
        result *= softcap
    elif slope is not None:
        slope[...] = 1
    if work.problem.score_mod is not None:
        _modify(tile, result, slope)
    _add(tile, result)
    return result


def _add(tile: Tile, scores: np.ndarray) -> None:
    """Add ALiBi and bias to the scores, in place."""
    work, rows = tile.item.work, tile.rows.stop - tile.rows.start
    by_head = scores.reshape(scores.shape[0], tile.item.group, rows, -1)
    if work.slopes is not None:
        for columns, keys in tile.columns:
            by_head[..., columns] += _alibi(tile, keys)
    if work.bias is not None:
        by_head += tile.bias.astype(work.dtype, copy=False)


def _alibi(tile: Tile, keys: slice) -> np.ndarray:
    """-slope * abs(i + offset - j) of keys side by side: (heads, group, rows, keys), often a view.

    It depends on j - i alone: each row is the next one, a key later.
    """
    item = tile.item
    slopes = item.work.slopes[item.index]
    if isinstance(item.band.offset, np.ndarray):  # by head, as those of packed sequences
        i, j = np.arange(tile.rows.start, tile.rows.stop), np.arange(keys.start, keys.stop)
        distances = np.abs(i[:, None] + item.band.offset - j)
        return -slopes * distances.astype(item.work.dtype)
    first = keys.start - (tile.rows.stop - 1) - item.band.offset
    last = keys.stop - 1 - tile.rows.start - item.band.offset
    distances = np.abs(np.arange(first, last + 1)).astype(item.work.dtype)
    terms = -slopes * distances
    return sliding_window_view(terms[:, :, 0], keys.stop - keys.start, axis=-1)[:, :, ::-1]


def _modify(tile: Tile, scores: np.ndarray, slope: np.ndarray | None) -> None:
    """Apply the user's function to the scores, and its derivative to the slope, in place."""
    score_mod = tile.item.work.problem.score_mod
    b, h, i, j = tile.places()
    place = (b.reshape(-1, 1, 1, 1), h.reshape(1, -1, 1, 1), i[:, None], j)
    shape = (b.size, h.size, i.size, j.size)
    found = scores.reshape(shape)
    if slope is not None:
        slope *= score_mod.differentiate(found, *place).reshape(scores.shape)
    scores[...] = score_mod.evaluate(found, *place).reshape(scores.shape)


def dropped(tile: Tile) -> np.ndarray | None:
    """(heads, group * rows, keys), True where dropout takes a probability away."""
    problem = tile.item.work.problem
    if not problem.dropout:
        return None
    grid = _random.dropped(problem.dropout, problem.seed, *tile.places())
    heads = tile.key.shape[0]
    return grid.reshape(heads, -1, grid.shape[-1])
