"""Masks for tests: one of each kind that fits a case, and trees of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuflash import masks
from cuflash.cli.cases import Case
from cuflash.masks import Mask

Make = Callable[[np.random.Generator, Case], Mask]


def causal(rng: np.random.Generator, case: Case) -> Mask:
    """Bottom-right, top-left, or an offset per batch entry."""
    offsets = (None, 0, -20, rng.integers(-case.seqlen_q, case.seqlen_k, case.batch))
    return masks.causal(offsets[rng.integers(len(offsets))])


def window(rng: np.random.Generator, case: Case) -> Mask:
    sides = [None if rng.random() < 0.2 else int(rng.integers(0, 40)) for _ in range(2)]
    offsets = (None, 7, rng.integers(-case.seqlen_q, case.seqlen_k, case.batch))
    return masks.window(*sides, offsets[rng.integers(len(offsets))])


def lengths(rng: np.random.Generator, case: Case) -> Mask:
    kv_lens = rng.integers(0, case.seqlen_k + 1, case.batch)
    q_lens = rng.integers(0, case.seqlen_q + 1, case.batch).tolist()
    return masks.lengths(kv_lens, None if rng.random() < 0.5 else q_lens)


def documents(rng: np.random.Generator, case: Case) -> Mask:
    """Sorted, or in any order, of queries and keys alike or each of their own."""
    q_ids = rng.integers(-3, 4, (case.batch, case.seqlen_q))
    kv_ids = rng.integers(-3, 4, (case.batch, case.seqlen_k))
    if rng.random() < 0.7:
        q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
    same = case.seqlen_q == case.seqlen_k and rng.random() < 0.5
    return masks.documents(q_ids, None if same else kv_ids.astype(np.int32))


def prefix(rng: np.random.Generator, case: Case) -> Mask:
    return masks.prefix(rng.integers(0, case.seqlen_k + 1, case.batch))


def intervals(rng: np.random.Generator, case: Case) -> Mask:
    """Of every kind: long and short, without rows, the wrong way round, many columns alike."""
    heads = 1 if rng.random() < 0.5 else case.heads_k
    shape = (case.batch, heads, case.seqlen_k, int(rng.integers(1, 3)))
    start, end = rng.integers(0, case.seqlen_q + 1, (2, *shape))
    if rng.random() < 0.5:  # as documents have them
        start, end = np.sort(start, axis=2), np.full_like(end, case.seqlen_q)
        start[..., 1:] = end[..., 1:]
    start[:, :, ::5], end[:, :, ::5] = 0, case.seqlen_q
    return masks.intervals(start, end)


def blocks(rng: np.random.Generator, case: Case) -> Mask:
    block_q, block_k = (int(x) for x in rng.choice([1, 7, 16, 30, 64, 200], 2))
    grid = (-(-case.seqlen_q // block_q), -(-case.seqlen_k // block_k))
    lead = rng.integers(0, 4)
    axes = ((), (1, 1), (1, case.heads_q), (case.batch, 1))[lead]
    return masks.blocks(rng.random((*axes, *grid)) < 0.4, block_q, block_k)


def dense(rng: np.random.Generator, case: Case) -> Mask:
    """Of any shape that broadcasts, with whole rows and columns that are hidden."""
    full = (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
    shape = [n if rng.random() < 0.7 else 1 for n in full][rng.integers(0, 3) :]
    array = rng.random(shape) < 0.6
    array[..., : shape[-2] // 3, :] = False
    array[..., -(shape[-1] // 3) :] = False
    return masks.dense(array)


def expression(rng: np.random.Generator, case: Case) -> Mask:
    """Shared by all heads, or of each head or batch entry its own."""
    steps = rng.integers(1, 5, (case.heads_q, case.batch)).astype(np.int32)
    choice = rng.integers(0, 3)
    if choice == 0:
        return masks.expression("(i + j) % 3 != 0", lambda b, h, i, j: (i + j) % 3 != 0)
    if choice == 1:
        return masks.expression("j > 2 * b", lambda b, h, i, j: j > 2 * b)
    return masks.expression(
        "(i / 5 + j) % steps(h, b) == 0",
        lambda b, h, i, j, steps: (i // 5 + j) % steps[h, b] == 0,
        steps=steps,
    )


def _scattered(b: np.ndarray, h: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return ((i // 5 + j) % 4 > h) & (b >= 0)


SCATTERED = masks.expression("(i / 5 + j) % 4 > h && b >= 0", _scattered)

LEAVES: dict[str, Make] = {
    make.__name__: make
    for make in (
        *(causal, window, lengths, documents, prefix),
        *(intervals, blocks, dense, expression),
    )
}


def every_leaf(rng: np.random.Generator, case: Case) -> Mask:
    """One tree of all of them."""
    makes = (documents, intervals, lengths, dense, blocks, window, prefix)
    return joined(*(make(rng, case) for make in makes))


def joined(
    documents: Mask,
    intervals: Mask,
    lengths: Mask,
    dense: Mask,
    blocks: Mask,
    window: Mask,
    prefix: Mask,
) -> Mask:
    """Always the same tree, which the same kernels serve."""
    return (
        (documents & masks.causal(3))
        | (intervals & ~lengths)
        | ~(dense | blocks) & (window | prefix & SCATTERED)
    )


def tree(rng: np.random.Generator, case: Case, depth: int) -> Mask:
    """A random tree, at most so deep."""
    kind = rng.integers(0, 5) if depth else 0
    if kind == 0:
        return LEAVES[rng.choice(list(LEAVES))](rng, case)
    if kind == 1:
        return ~tree(rng, case, depth - 1)
    left, right = tree(rng, case, depth - 1), tree(rng, case, depth - 1)
    return left & right if kind < 4 else left | right
