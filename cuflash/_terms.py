"""What acts on a tile of the CPU backend besides the products: ALiBi, bias, score_mod, dropout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuflash import _random
from cuflash._arrays import LN_2, in_units_of_log2
from cuflash._work import Tile


def added(tile: Tile) -> Iterator[np.ndarray]:
    """What is added to the scores, in units of log 2: (heads, group, rows, keys) each."""
    work, item = tile.item.work, tile.item
    if work.slopes is not None:
        _, _, i, j = tile.places()
        distance = np.abs(i + item.band.offset - j).astype(work.dtype)
        yield -work.slopes[item.index] * distance
    if tile.bias is not None:
        yield in_units_of_log2(tile.bias, work.dtype)


def modify(tile: Tile, scores: np.ndarray, slope: np.ndarray | None) -> None:
    """Apply the user's function to the scores, and its derivative to the slope, in place.

    Scores are in units of log 2 before and after, and in natural units to the user.
    """
    work, score_mod = tile.item.work, tile.item.work.problem.score_mod
    b, h, i, j = tile.places()
    place = (np.full((1, 1, 1, 1), b), h.reshape(1, -1, 1, 1), i, j)
    shape = (1, h.size, i.size, j.size)
    scores *= LN_2
    natural = scores.reshape(shape)
    if slope is not None:
        by_head = slope.reshape(shape)
        by_head *= score_mod.differentiate(natural, *place)
    natural[...] = in_units_of_log2(score_mod.evaluate(natural, *place), work.dtype)


def dropped(tile: Tile) -> np.ndarray | None:
    """(heads, group * rows, keys), True where dropout takes a probability away."""
    problem = tile.item.work.problem
    if not problem.dropout:
        return None
    b, h, i, j = tile.places()
    elements = (np.array([b]), h.reshape(-1), i.reshape(-1), j)
    grid = _random.dropped(problem.dropout, problem.seed, *elements)
    return grid.reshape(h.shape[0], -1, j.size)
