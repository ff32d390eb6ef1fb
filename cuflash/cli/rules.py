"""Which pairs the cells of `bench` see: each rule as arrays, as a mask of ours, and as anyone's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from cuflash import masks
from cuflash.masks import Mask

CHUNK_ROWS = 512


MOST_RUNS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Documents:
    """Of these lengths, side by side; each sees itself."""

    lengths: tuple[int, ...]

    def __str__(self) -> str:
        count = len(self.lengths)
        runs = [(len(list(run)), length) for length, run in groupby(self.lengths)]
        if len(runs) > MOST_RUNS_SHOWN:
            return f"{count} documents of {min(self.lengths)} to {max(self.lengths)}"
        of = (f"{n} x {length}" if 1 < n < count else f"{length}" for n, length in runs)
        return f"{count} documents of {', '.join(of)}"

    @property
    def cu_seqlens(self) -> np.ndarray:
        """Where each starts, and the last one ends."""
        return np.cumsum((0, *self.lengths), dtype=np.int32)

    def arrays(self, seqlen: int) -> dict[str, np.ndarray]:
        return {"ids": np.repeat(np.arange(len(self.lengths)), self.lengths)}

    def sees(self, i: Any, j: Any, ids: Any) -> Any:
        return ids[i] == ids[j]

    def mask(self, ids: Any) -> Mask:
        return masks.documents(ids[None])


@dataclass(frozen=True, slots=True)
class Window:
    """So many keys, of which the query's own is the last."""

    keys: int

    def __str__(self) -> str:
        return f"window of {self.keys}"

    def arrays(self, seqlen: int) -> dict[str, np.ndarray]:
        return {}

    def sees(self, i: Any, j: Any) -> Any:
        return (j <= i) & (j > i - self.keys)

    def mask(self) -> Mask:
        return masks.window(self.keys - 1, 0)


@dataclass(frozen=True, slots=True)
class PrefixLm:
    """Causal but for a prefix, which all see."""

    share: float  # of the keys

    def __str__(self) -> str:
        return f"causal or prefix of {self.share:.0%}"

    def arrays(self, seqlen: int) -> dict[str, np.ndarray]:
        return {"n": np.array([round(self.share * seqlen)])}

    def sees(self, i: Any, j: Any, n: Any) -> Any:
        return (j <= i) | (j < n[0])

    def mask(self, n: Any) -> Mask:
        return masks.causal() | masks.prefix(n)


@dataclass(frozen=True, slots=True)
class RandomBlocks:
    """Of so many rows and keys, some of them empty."""

    size: int
    empty: float  # how likely a block is

    def __str__(self) -> str:
        return f"blocks of {self.size}, {self.empty:.0%} empty"

    def arrays(self, seqlen: int) -> dict[str, np.ndarray]:
        blocks = -(-seqlen // self.size)
        return {"visible": np.random.default_rng(0).random((blocks, blocks)) >= self.empty}

    def sees(self, i: Any, j: Any, visible: Any) -> Any:
        return visible[i // self.size, j // self.size]

    def mask(self, visible: Any) -> Mask:
        return masks.blocks(visible, self.size, self.size)


@dataclass(frozen=True, slots=True)
class RandomPairs:
    """A boolean array of which nothing is known before it is read."""

    empty: float  # how likely a pair is hidden

    def __str__(self) -> str:
        return f"dense, {self.empty:.0%} empty"

    def arrays(self, seqlen: int) -> dict[str, np.ndarray]:
        numbers = np.random.default_rng(0).random((seqlen, seqlen), np.float32)
        return {"visible": numbers >= self.empty}

    def sees(self, i: Any, j: Any, visible: Any) -> Any:
        return visible[i, j]

    def mask(self, visible: Any) -> Mask:
        return masks.dense(visible)


Rule = Documents | Window | PrefixLm | RandomBlocks | RandomPairs


class Tile(NamedTuple):
    """Queries and keys of a tile."""

    block_q: int
    block_kv: int


@lru_cache(maxsize=1024)
def visible_pairs(rule: Rule | None, causal: bool, seqlen: int) -> int:
    """Pairs of one head that a rule leaves visible: counted, a few rows at a time."""
    if rule is None:
        return seqlen * (seqlen + 1) // 2 if causal else seqlen**2
    arrays = rule.arrays(seqlen)
    starts = range(0, seqlen, CHUNK_ROWS)
    return sum(
        int(_visible(rule, causal, seqlen, arrays, start, CHUNK_ROWS).sum()) for start in starts
    )


@lru_cache(maxsize=1024)
def visible_share(rule: Rule | None, causal: bool, seqlen: int, tile: Tile) -> float:
    """The share of tiles of which anything is visible, by looking at every pair."""
    rows, keys = range(0, seqlen, tile.block_q), range(0, seqlen, tile.block_kv)
    arrays = {} if rule is None else rule.arrays(seqlen)
    tiles = 0
    for start in rows:
        seen = _visible(rule, causal, seqlen, arrays, start, tile.block_q).any(axis=0)
        tiles += int(np.logical_or.reduceat(seen, keys).sum())
    return tiles / (len(rows) * len(keys))


def _visible(
    rule: Rule | None,
    causal: bool,
    seqlen: int,
    arrays: dict[str, np.ndarray],
    start: int,
    rows: int,
) -> np.ndarray:
    """(rows, seqlen), fewer rows at the end."""
    i, j = np.arange(start, min(start + rows, seqlen))[:, None], np.arange(seqlen)
    visible = np.broadcast_to(True if rule is None else rule.sees(i, j, **arrays), (i.size, seqlen))
    return visible & (j <= i) if causal else visible
