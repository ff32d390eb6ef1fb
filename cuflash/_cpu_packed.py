"""Packed sequences on the CPU: the dense backend on views, with the tasks of all in one queue.

Each sequence is cut by its part of all the work: a long one into many tasks, a short one into few.
"""

from __future__ import annotations

import numpy as np

from cuflash._arrays import Scratch, empty_like
from cuflash._cpu_backward import GradientSums, differentiate, sum_of
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import Gradients, Problem
from cuflash._work import Work
from cuflash.cpu import attend


def forward(problem: PackedProblem) -> tuple[np.ndarray, np.ndarray]:
    """Attention's (out, lse)."""
    out = problem.out
    if out is None:
        out = empty_like(problem.q[None], problem.v.shape[2])[0]
    lse = np.full(problem.lse_shape, -np.inf, problem.lse_dtype)
    if not lse.size:
        return out, lse
    out[int(problem.cu_seqlens_q[-1]) :] = 0
    parts = []
    for work in _works(problem, splits_rows=True):
        rows = problem.rows(work.first_batch)
        parts.append((work, out[None, rows], lse[None, :, rows]))
    attend(parts)
    return out, lse


def backward(gradient: PackedGradientProblem) -> Gradients:
    """The gradients of q, k, v and the sinks."""
    problem = gradient.forward
    dq, dk, dv = (empty_like(x[None])[0] for x in (problem.q, problem.k, problem.v))
    for x in (dq, dk, dv):
        x[...] = 0  # also of what no sequence has, or of keys without queries
    dsinks = None if problem.sinks is None else np.zeros(problem.sinks.shape, problem.sinks.dtype)
    if not problem.q.size:
        return Gradients(dq, dk, dv, None, dsinks)
    parts = []
    for work in _works(problem, splits_rows=False):
        rows, keys = problem.rows(work.first_batch), problem.keys(work.first_batch)
        into = (dq[None, rows], dk[None, keys], dv[None, keys])
        parts.append(GradientSums(work, gradient.sequence(work.first_batch), into))
    differentiate(parts)
    with np.errstate(all="ignore"):
        for sums in parts:
            sums.gradients()
        if dsinks is not None and parts:
            by_sequence = [sums.dsinks_by_batch[0] for sums in parts]
            dsinks[...] = sum_of(by_sequence, dsinks.dtype).reshape(dsinks.shape)
    return Gradients(dq, dk, dv, None, dsinks)


def explain(problem: PackedProblem) -> tuple[tuple[int, int], None]:
    """The queries and keys of the largest tile; a packed call has no mask."""
    works = _works(problem, splits_rows=True) if all(problem.lse_shape) else []
    rows = max((work.tile_rows for work in works), default=0)
    return (rows, max((work.tile_keys for work in works), default=0)), None


def _works(problem: PackedProblem, splits_rows: bool) -> list[Work]:
    """The sequences that have queries, each as a problem of its own."""
    sequences = {b: problem.sequence(b) for b in range(problem.batch)}
    sequences = {b: one for b, one in sequences.items() if one.seqlen_q}
    pairs = sum(map(_pairs, sequences.values()))
    works = [
        Work(one, splits_rows, share=_pairs(one) / pairs, first_batch=b)
        for b, one in sequences.items()
    ]
    # The threads' room for a tile is as large as the largest tile, and there only once.
    size = max((work.scratch.size for work in works), default=0)
    scratch = Scratch(size, problem.lse_dtype)
    for work in works:
        work.scratch = scratch
    return works


def _pairs(problem: Problem) -> int:
    """A measure of the work: queries times keys, at least 1."""
    return max(1, problem.seqlen_q * problem.seqlen_k)
