"""What a problem of `check` has besides its sizes: masks and terms, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import Any, Protocol

import numpy as np

from cuflash import masks
from cuflash.masks import Mask
from cuflash.score_mod import ScoreMod


class Sizes(Protocol):
    """What masks and terms read of a problem."""

    batch: int
    dtype: np.dtype
    extras: tuple[str, ...]
    heads_k: int
    heads_q: int
    seqlen_k: int
    seqlen_q: int


def options(case: Sizes) -> dict[str, Any]:
    """Keywords for `attention`: the masks that the case names, joined by &, and its terms."""
    found: dict[str, Any] = {}
    named = [name for name in case.extras if name in MASKS]
    if named:
        found["mask"] = reduce(and_, (MASKS[name](_numbers(), case) for name in named))
    for name in case.extras:
        if name not in MASKS:
            found |= TERMS[name](_numbers(), case)
    return found


def _numbers() -> np.random.Generator:
    return np.random.default_rng(1)


def _documents(rng: np.random.Generator, case: Sizes) -> Mask:
    """A few, each of queries and keys side by side, of unequal lengths."""
    ids = (rng.integers(0, 4, (case.batch, n)) for n in (case.seqlen_q, case.seqlen_k))
    return masks.documents(*(np.sort(x) for x in ids))


def _scattered_documents(rng: np.random.Generator, case: Sizes) -> Mask:
    ids = (rng.integers(-1, 2, (case.batch, n)) for n in (case.seqlen_q, case.seqlen_k))
    return masks.documents(*ids)


def _intervals(rng: np.random.Generator, case: Sizes) -> Mask:
    """Two for each key, some of no rows, other ones for every key head."""
    shape = (case.batch, case.heads_k, case.seqlen_k, 2)
    return masks.intervals(*rng.integers(0, case.seqlen_q + 1, (2, *shape)))


def _blocks(rng: np.random.Generator, case: Sizes) -> Mask:
    """Blocks that are no tile of any kernel, other ones for every query head."""
    grid = (-(-case.seqlen_q // 48), -(-case.seqlen_k // 80))
    return masks.blocks(rng.random((1, case.heads_q, *grid)) < 0.5, 48, 80)


def _dense(rng: np.random.Generator, case: Sizes) -> Mask:
    return masks.dense(rng.random((case.batch, 1, case.seqlen_q, case.seqlen_k)) < 0.5)


def _hidden_rows(rng: np.random.Generator, case: Sizes) -> Mask:
    """Half of the rows see nothing, and then half of those that are left."""
    is_late = np.arange(case.seqlen_q) >= case.seqlen_q // 2
    return masks.dense((is_late & (rng.random(case.seqlen_q) < 0.5))[:, None])


def _expression(rng: np.random.Generator, case: Sizes) -> Mask:
    steps = rng.integers(1, 4, case.heads_q).astype(np.int32)
    return masks.expression(
        "(i + j) % steps(h) == 0", lambda b, h, i, j, steps: (i + j) % steps[h] == 0, steps=steps
    )


MASKS: dict[str, Callable[[np.random.Generator, Sizes], Mask]] = {
    "causal": lambda rng, case: masks.causal(),
    "window": lambda rng, case: masks.window(70, 20, rng.integers(-50, 200, case.batch)),
    "lengths": lambda rng, case: masks.lengths(
        rng.integers(0, case.seqlen_k + 1, case.batch), [case.seqlen_q] * case.batch
    ),
    "documents": _documents,
    "scattered-documents": _scattered_documents,
    "prefix": lambda rng, case: masks.prefix(rng.integers(0, case.seqlen_k + 1, case.batch)),
    "prefix-lm": lambda rng, case: masks.causal() | MASKS["prefix"](rng, case),
    "intervals": _intervals,
    "blocks": _blocks,
    "not-blocks": lambda rng, case: ~_blocks(rng, case),
    "dense": _dense,
    "hidden-rows": _hidden_rows,
    "nothing": lambda rng, case: masks.causal(0) & ~masks.causal(0),
    "expression": _expression,
}


def _bias(*axes: int) -> Callable[[np.random.Generator, Sizes], dict[str, Any]]:
    """Of q's dtype; `axes` of (B, Hq, Sq, Sk) are one element long."""

    def make(rng: np.random.Generator, case: Sizes) -> dict[str, Any]:
        shape = [case.batch, case.heads_q, case.seqlen_q, case.seqlen_k]
        for axis in axes:
            shape[axis] = 1
        return {"bias": rng.standard_normal(shape, np.float32).astype(case.dtype)}

    return make


def _bias_float32(rng: np.random.Generator, case: Sizes) -> dict[str, Any]:
    return {"bias": rng.standard_normal((case.heads_q, 1, case.seqlen_k), np.float32)}


def _score_mod(rng: np.random.Generator, case: Sizes) -> dict[str, Any]:
    """Depends on the score, its place and an array, and so does its derivative."""
    gain = rng.standard_normal((case.heads_q, case.seqlen_k), np.float32)
    return {
        "score_mod": ScoreMod(
            "score * gain(h, j) + 0.1f * score * score - 0.02f * (float)(i - j) * (float)b",
            "gain(h, j) + 0.2f * score",
            numpy_forward=lambda score, b, h, i, j, gain: (
                score * gain[h, j] + 0.1 * score**2 - 0.02 * (i - j) * b
            ),
            numpy_backward=lambda score, b, h, i, j, gain: gain[h, j] + 0.2 * score,
            named={"gain": gain},
        )
    }


TERMS: dict[str, Callable[[np.random.Generator, Sizes], dict[str, Any]]] = {
    "alibi": lambda rng, case: {
        "alibi_slopes": 2.0 ** -np.arange(1, case.heads_q + 1).astype(np.float32)
    },
    "alibi-per-batch": lambda rng, case: {
        "alibi_slopes": rng.random((case.batch, case.heads_q), np.float32)
    },
    "bias": _bias(),
    "bias-of-keys": _bias(1, 2),
    "bias-of-heads": _bias(0, 2, 3),
    "bias-float32": _bias_float32,
    "sinks": lambda rng, case: {"sinks": rng.standard_normal(case.heads_q, np.float32) + 2},
    "dropout": lambda rng, case: {"dropout": 0.3, "seed": 2**40 + 7},
    "score_mod": _score_mod,
}
