"""dk and dv of a backward pass on the CPU whose tasks are rows: what each task adds to them."""

from __future__ import annotations

import numpy as np

from cuflash._arrays import LN_2
from cuflash._work import Item, Work


class KeyGradients:
    """Splits of the rows, and what each adds to dk and dv of the keys that it sees.

    All are in one array: memory of many MiB comes in large pages, which cost the least.
    """

    def __init__(self, work: Work, splits: int) -> None:
        self.work = work
        items = work.items()
        self.rows = {item.start: item.split_rows(splits) for item in items}
        sizes = (work.k.shape[-1], work.v.shape[-1])
        parts = {
            (item.start, split): (item.heads.stop - item.heads.start, item.span_of_keys(rows))
            for item in items
            for split, rows in enumerate(self.rows[item.start])
        }
        counts = [heads * (span.stop - span.start) for heads, span in parts.values()]
        room = np.zeros(sum(counts) * sum(sizes), work.dtype)
        self.parts: dict[tuple[tuple[int, int, int], int], tuple[slice, list[np.ndarray]]] = {}
        start = 0
        for (place, (heads, span)), count in zip(parts.items(), counts, strict=True):
            arrays = []
            for size in sizes:
                some = room[start : start + count * size]
                arrays.append(some.reshape(heads, span.stop - span.start, size))
                start += count * size
            self.parts[place] = (span, arrays)

    def add(
        self, item: Item, split: int, keys: slice, dkey: np.ndarray, dvalue: np.ndarray
    ) -> None:
        """Add to dk / ln 2 and dv of some keys: (heads, keys, D) and (heads, keys, Dv)."""
        span, arrays = self.parts[item.start, split]
        part = slice(keys.start - span.start, keys.stop - span.start)
        for array, some in zip(arrays, (dkey, dvalue), strict=True):
            array[:, part] += some

    def write(self, item: Item, dk: np.ndarray, dv: np.ndarray) -> None:
        """Write dk and dv (heads, keys, D or Dv) of an item's heads: sums in order of the rows."""
        parts = [part for (start, _), part in self.parts.items() if start[:2] == item.start[:2]]
        for number, (target, factor) in enumerate(((dk, LN_2), (dv, 1))):
            total = target
            if target.dtype != self.work.dtype:
                total = np.empty(target.shape, self.work.dtype)
            written = 0  # the keys before this one
            for span, arrays in parts:
                some = np.multiply(arrays[number], factor, out=arrays[number])
                total[:, written : span.start] = 0
                both = max(0, min(written, span.stop) - span.start)
                total[:, span.start : span.start + both] += some[:, :both]
                total[:, span.start + both : span.stop] = some[:, both:]
                written = max(written, span.stop)
            total[:, written:] = 0
            if total is not target:
                target[...] = total
