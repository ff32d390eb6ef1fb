"""dk and dv of a backward pass on the CPU whose tasks are rows: what each task adds to them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cuflash._work import Item, Work, split_rows


class KeyGradients:
    """Splits of the rows, and what each adds to dk and dv of the keys that it sees.

    All are in one array: memory of many MiB comes in large pages, which cost the least.
    """

    def __init__(self, work: Work, families: list[list[Item]], splits: int) -> None:
        self.work = work
        self.rows = {
            item.start: rows
            for family in families
            for item, rows in zip(family, split_rows(family, splits), strict=True)
        }
        # By batch entry, first key head and split: the key heads, and the keys that some row sees.
        spans: dict[tuple[int, int, int], tuple[int, slice]] = {}
        for item in work.items():
            for split, rows in enumerate(self.rows[item.start]):
                place, span = (*item.start[:2], split), item.span_of_keys(rows)
                if span.start < span.stop:
                    _, other = spans.get(place, (0, span))
                    both = slice(min(span.start, other.start), max(span.stop, other.stop))
                    spans[place] = (item.heads.stop - item.heads.start, both)
        sizes = (work.problem.head_dim, work.problem.head_dim_v)
        keys = sum(heads * (span.stop - span.start) for heads, span in spans.values())
        room = np.empty(keys * sum(sizes), work.dtype)
        self.parts: dict[tuple[int, int], dict[int, _Part]] = {}
        for (batch, head, split), (heads, span) in spans.items():
            arrays = []
            for size in sizes:
                shape = (heads, span.stop - span.start, size)
                arrays.append(room[: math.prod(shape)].reshape(shape))
                room = room[math.prod(shape) :]
            self.parts.setdefault((batch, head), {})[split] = _Part(span, *arrays)
        # Cleared by the thread that first adds to them, and left out of the sums before.
        self.untouched = set(spans)

    def add(
        self, item: Item, split: int, keys: slice, dkey: np.ndarray, dvalue: np.ndarray
    ) -> None:
        """Add to dk, times the item's unit, and dv of some keys: (heads, keys, D or Dv)."""
        part, place = self.parts[item.start[:2]][split], (*item.start[:2], split)
        if place in self.untouched:
            self.untouched.remove(place)
            part.dkey.fill(0)
            part.dvalue.fill(0)
        index = (slice(None), slice(keys.start - part.keys.start, keys.stop - part.keys.start))
        part.dkey[index] += dkey
        part.dvalue[index] += dvalue

    def write(self, item: Item, dk: np.ndarray, dv: np.ndarray) -> None:
        """Write dk and dv (heads, keys, D or Dv) of an item's heads: sums in order of the rows."""
        by_split = self.parts.get(item.start[:2], {})
        touched = [x for x in sorted(by_split) if (*item.start[:2], x) not in self.untouched]
        parts = [by_split[split] for split in touched]
        for target, name, factor in ((dk, "dkey", 1 / item.unit), (dv, "dvalue", 1)):
            total = target
            if target.dtype != self.work.dtype:
                total = np.empty(target.shape, self.work.dtype)
            _write_sum(total, [(part.keys, getattr(part, name)) for part in parts])
            if factor != 1 or total is not target:
                np.multiply(total, factor, out=target, casting="same_kind")


class _Part(NamedTuple):
    """What one split adds to some heads."""

    keys: slice
    dkey: np.ndarray  # (heads, keys, D), dk times the item's unit
    dvalue: np.ndarray  # (heads, keys, Dv)


def _write_sum(total: np.ndarray, parts: list[tuple[slice, np.ndarray]]) -> None:
    """Write the sum of arrays (heads, keys, size) to one of all keys, each to keys of its own."""
    written = 0  # the keys before this one
    for span, some in parts:
        total[:, written : span.start] = 0
        both = max(0, min(written, span.stop) - span.start)
        total[:, span.start : span.start + both] += some[:, :both]
        total[:, span.start + both : span.stop] = some[:, both:]
        written = max(written, span.stop)
    total[:, written:] = 0
