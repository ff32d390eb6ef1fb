"""Packed sequences on the CPU: the dense backend on views, with the tasks of all in one queue.

Each sequence is cut by its part of all the work: a long one into many tasks. Many short ones are
a batch, which is one task.
"""

from __future__ import annotations

import numpy as np

from cuflash._arrays import Scratch, empty_like
from cuflash._cpu_backward import GradientSums, differentiate, differentiate_item
from cuflash._cpu_forward import attend, attend_to, empty_result, tasks_of
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import Gradients, Problem, Result
from cuflash._short_sequences import Batch, by_token, divide
from cuflash._threads import for_each
from cuflash._work import Work


def forward(problem: PackedProblem, wants_stats: bool = False) -> Result:
    """Attention's out, lse and, if wanted, stats."""
    out = problem.out
    if out is None:
        out = empty_like(problem.q[None], problem.v.shape[2])[0]
    result = empty_result(out, problem.lse_shape, problem.lse_dtype, wants_stats)
    if not result.lse.size:
        return result
    out[int(problem.cu_seqlens_q[-1]) :] = 0
    alone, batches = divide(problem)
    parts = []
    for sequence, work in _works(problem, alone, splits_rows=True).items():
        parts.append((work, _of_rows(result, problem.rows(sequence))))
    attend(parts)

    def run(batch: Batch) -> None:
        with np.errstate(all="ignore"):
            _attend_to_batch(problem, batch, result)

    for_each(run, sorted(batches, key=lambda batch: -batch.scores))
    return result


def _of_rows(result: Result, rows: slice) -> Result:
    """Those of one sequence, as of a batch of one; views."""
    out, lse, stats = result
    of_rows = None if stats is None else stats[:, None, :, rows]
    return Result(out[None, rows], lse[None, :, rows], of_rows)


def _attend_to_batch(problem: PackedProblem, batch: Batch, result: Result) -> None:
    work = batch.work(problem, splits_rows=True)
    dense, wants_stats = work.problem, result.stats is not None
    out = empty_like(dense.q, dense.head_dim_v)
    some = empty_result(out, dense.lse_shape, work.dtype, wants_stats)
    for task in tasks_of(work, some):
        attend_to(*task)
    batch.queries.scatter(some.out[0], result.out)
    batch.queries.scatter(by_token(some.lse[0]), by_token(result.lse))
    if wants_stats:
        for x, into in zip(some.stats, result.stats, strict=True):
            batch.queries.scatter(by_token(x[0]), by_token(into))


def backward(gradient: PackedGradientProblem) -> Gradients:
    """The gradients of q, k, v and the sinks."""
    problem = gradient.forward
    grads = tuple(empty_like(x[None])[0] for x in (problem.q, problem.k, problem.v))
    with_queries = np.diff(problem.cu_seqlens_q) > 0
    dq, dk, dv = grads
    for x, cu_seqlens in (
        (dq, problem.cu_seqlens_q),
        (dk, problem.cu_seqlens_k),
        (dv, problem.cu_seqlens_k),
    ):
        # What is left when each sequence that has queries has written its own.
        x[int(cu_seqlens[-1]) if with_queries.all() else 0 :] = 0
    dsinks = None if problem.sinks is None else np.zeros(problem.sinks.shape, problem.sinks.dtype)
    if not problem.q.size:
        return Gradients(*grads, None, dsinks)
    by_sequence = np.zeros((problem.batch, problem.q.shape[1]), problem.lse_dtype)
    alone, batches = divide(problem)
    parts = {}
    for sequence, work in _works(problem, alone, splits_rows=False).items():
        rows, keys = problem.rows(sequence), problem.keys(sequence)
        into = (dq[None, rows], dk[None, keys], dv[None, keys])
        parts[sequence] = GradientSums(work, gradient.sequence(sequence), into)
    differentiate(list(parts.values()))

    def run(batch: Batch) -> None:
        with np.errstate(all="ignore"):
            _differentiate_batch(gradient, batch, grads, by_sequence)

    for_each(run, sorted(batches, key=lambda batch: -batch.scores))
    with np.errstate(all="ignore"):
        for sequence, sums in parts.items():
            sums.gradients()
            if dsinks is not None:
                by_sequence[sequence] = sums.dsinks_by_batch[0].reshape(-1)
        if dsinks is not None:
            dsinks[...] = by_sequence.sum(axis=0)
    return Gradients(*grads, None, dsinks)


def _differentiate_batch(
    gradient: PackedGradientProblem,
    batch: Batch,
    grads: tuple[np.ndarray, np.ndarray, np.ndarray],
    dsinks: np.ndarray,
) -> None:
    """Write the gradients of a batch's sequences, dsinks by sequence."""
    work = batch.work(gradient.forward, splits_rows=False)
    sums = GradientSums(work, batch.gradient(gradient, work.problem))
    (item,) = work.items()
    differentiate_item(item, sums, split=0)
    found = sums.gradients()
    for tokens, some, x in zip((batch.queries, batch.keys, batch.keys), found, grads, strict=False):
        tokens.scatter(some[0], x)
    if gradient.forward.sinks is not None:
        dsinks[batch.sequences] = sums.dsinks_by_batch.reshape(batch.sequences.size, -1)


def explain(problem: PackedProblem) -> tuple[tuple[int, int], None]:
    """The queries and keys of the largest tile; a packed call has no mask."""
    alone, batches = divide(problem) if all(problem.lse_shape) else ([], [])
    works = _works(problem, alone, splits_rows=True).values()
    tiles = [(work.tile_rows, work.tile_keys) for work in works]
    tiles += [(batch.queries.longest, max(1, batch.keys.longest)) for batch in batches]
    rows, keys = zip(*tiles, strict=True) if tiles else ((0,), (0,))
    return (max(rows), max(keys)), None


def _works(problem: PackedProblem, sequences: list[int], splits_rows: bool) -> dict[int, Work]:
    """Some sequences, each as a problem of its own."""
    problems = {b: problem.sequence(b) for b in sequences}
    lengths = (np.diff(x) for x in (problem.cu_seqlens_q, problem.cu_seqlens_k))
    pairs = int(np.multiply(*lengths).clip(1).sum())
    works = {
        b: Work(one, splits_rows, share=_pairs(one) / pairs, sequences=np.array([b]))
        for b, one in problems.items()
    }
    # The threads' room for a tile is as large as the largest tile, and there only once.
    size = max((work.scratch.size for work in works.values()), default=0)
    scratch = Scratch(size, problem.lse_dtype)
    for work in works.values():
        work.scratch = scratch
    return works


def _pairs(problem: Problem) -> int:
    """A measure of the work: queries times keys, at least 1."""
    return max(1, problem.seqlen_q * problem.seqlen_k)
