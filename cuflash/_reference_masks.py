"""Which query sees which key, straight from the definitions. True means attend."""

from __future__ import annotations

import numpy as np

from cuflash._mask_tree import (
    And,
    Band,
    Blocks,
    Compiled,
    Dense,
    Documents,
    Expression,
    Intervals,
    Lengths,
    Mask,
    Not,
    Or,
    Prefix,
)


def visibility(
    q: np.ndarray,
    k: np.ndarray,
    causal: bool,
    offset: int | np.ndarray | None,
    window: tuple[int | None, int | None] | None,
    q_lens: np.ndarray | None,
    kv_lens: np.ndarray | None,
    mask: Mask | np.ndarray | None,
) -> np.ndarray:
    """(B, Hq, Sq, Sk), True where a query sees a key."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]

    i = np.arange(seqlen_q).reshape(-1, 1)
    j = np.arange(seqlen_k)
    q_len = per_batch(seqlen_q if q_lens is None else q_lens)
    kv_len = per_batch(seqlen_k if kv_lens is None else kv_lens)
    center = centers_of(q, k, offset, q_lens, kv_lens)
    left, right = window or (None, None)

    visible = np.ones((batch, heads, seqlen_q, seqlen_k), dtype=bool)
    visible &= (i < q_len) & (j < kv_len)
    if causal:
        visible &= j <= center
    if left is not None:
        visible &= j >= center - left
    if right is not None:
        visible &= j <= center + right
    if isinstance(mask, Mask):
        b, h, i, j = np.ix_(*map(np.arange, visible.shape))
        return visible & _sees(mask, b, h, i, j, center - i, group_of(q, k))
    return visible if mask is None else visible & mask


def _sees(
    mask: Mask,
    b: np.ndarray,
    h: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    offset: np.ndarray,
    group: int,
) -> np.ndarray:
    """What a mask makes visible, of indices and the call's offset that broadcast to the scores."""

    def sees(part: Mask) -> np.ndarray:
        return _sees(part, b, h, i, j, offset, group)

    shape = (b.size, h.size, i.size, j.size)
    match mask:
        case And(left, right):
            return sees(left) & sees(right)
        case Or(left, right):
            return sees(left) | sees(right)
        case Not(inner):
            return ~sees(inner)
        case Compiled(inner, _):
            return sees(inner)
        case Band(left, right, own):
            center = i + (offset if own is None else per_batch(own))
            visible = np.ones(shape, dtype=bool)
            visible &= True if left is None else j >= center - left
            visible &= True if right is None else j <= center + right
            return visible
        case Lengths(kv_lens, q_lens):
            visible = np.ones(shape, dtype=bool)
            visible &= True if kv_lens is None else j < kv_lens[b]
            visible &= True if q_lens is None else i < q_lens[b]
            return visible
        case Documents(q_ids, kv_ids):
            return q_ids[b, i] == (q_ids if kv_ids is None else kv_ids)[b, j]
        case Prefix(n):
            return j < n[b]
        case Intervals(start, end):
            key_head = h // group if start.shape[1] != 1 else 0
            row = i[..., None]
            inside = (start[b, key_head, j] <= row) & (row < end[b, key_head, j])
            return ~inside.any(axis=-1)
        case Blocks(array, block_q, block_k):
            array = np.broadcast_to(array, (b.size, h.size, *array.shape[-2:]))
            return array[b, h, i // block_q, j // block_k]
        case Dense(array):
            return np.broadcast_to(array, shape)
        case Expression(_, named, function):
            return np.broadcast_to(np.asarray(function(b, h, i, j, **named), dtype=bool), shape)
    raise TypeError(f"{mask!r} is no mask")


def centers_of(
    q: np.ndarray,
    k: np.ndarray,
    offset: int | np.ndarray | None,
    q_lens: np.ndarray | None,
    kv_lens: np.ndarray | None,
) -> np.ndarray:
    """(B or 1, 1, Sq, 1): i + offset, where each query stands among the keys."""
    if offset is None:
        q_len = per_batch(q.shape[1] if q_lens is None else q_lens)
        offset = per_batch(k.shape[1] if kv_lens is None else kv_lens) - q_len
    return np.arange(q.shape[1]).reshape(-1, 1) + per_batch(offset)


def per_batch(value: int | np.ndarray) -> np.ndarray:
    """(B or 1, 1, 1, 1); float64 holds every index exactly, and no offset wraps around."""
    return np.asarray(value, dtype=np.float64).reshape(-1, 1, 1, 1)


def group_of(q: np.ndarray, k: np.ndarray) -> int:
    """Query heads that read the same key head."""
    return q.shape[2] // k.shape[2] if k.shape[2] else 1
