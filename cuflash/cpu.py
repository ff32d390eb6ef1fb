"""Attention on NumPy arrays: FlashAttention's tiles in O(S) memory, on every core."""

from __future__ import annotations

import math

import numpy as np

from cuflash import _cpu_short
from cuflash._arrays import empty_like
from cuflash._cpu_backward import GradientSums, differentiate
from cuflash._cpu_forward import attend, empty_result
from cuflash._mask_blocks import BlockMask, TileCounts
from cuflash._problem import GradientProblem, Gradients, Problem, Result
from cuflash._tiles import Band
from cuflash._work import MASK_BLOCK, Work


def forward(problem: Problem, wants_stats: bool = False) -> Result:
    """Attention's out, lse and, if wanted, stats."""
    out = problem.out
    out = empty_like(problem.q, problem.head_dim_v) if out is None else out
    if _cpu_short.has_short_entries(problem):
        return _cpu_short.forward(problem, out, wants_stats)
    result = empty_result(out, problem.lse_shape, problem.lse_dtype, wants_stats)
    if result.lse.size:
        attend([(Work(problem, splits_rows=True), result)])
    return result


def backward(gradient: GradientProblem) -> Gradients:
    """The gradients of q, k, v, the bias and the sinks."""
    problem = gradient.forward
    if not problem.q.size:
        return gradient.zeros(np.zeros)
    if _cpu_short.has_short_entries(problem):
        return _cpu_short.backward(gradient)
    sums = GradientSums(Work(problem, splits_rows=False), gradient)
    differentiate([sums])
    with np.errstate(all="ignore"):
        return sums.gradients()


def explain(problem: Problem) -> tuple[tuple[int, int], TileCounts | None]:
    """The queries and keys of a forward's tile, and with a mask how many tiles it hides."""
    if _cpu_short.has_short_entries(problem):
        return _cpu_short.explain(problem)
    if problem.mask is None or not problem.seqlen_k:
        work = Work(problem, splits_rows=True)
        return (work.tile_rows, work.tile_keys), None
    if not math.prod(problem.lse_shape):
        return MASK_BLOCK, None
    bands = [Band.of(problem, batch) for batch in range(problem.batch)]
    return MASK_BLOCK, BlockMask.of(problem, MASK_BLOCK).count(bands)
