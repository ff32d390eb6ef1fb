"""Masks: which queries see which keys. True means attend.

A mask is joined with others by ``&``, ``|`` and ``~``, to any depth, and given to
`cuflash.attention` as ``mask=``. It costs what its visible tiles cost.
"""

from __future__ import annotations

from cuflash._mask_tree import Band, Mask


def causal(offset: int | None = None) -> Mask:
    """Key j is visible to query i where j <= i + offset."""
    return Band(None, 0, offset)
