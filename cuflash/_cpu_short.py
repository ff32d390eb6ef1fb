"""Many short batch entries on the CPU: as packed sequences, of which many are a task at once."""

from __future__ import annotations

import math

import numpy as np

from cuflash import _cpu_packed, _work
from cuflash._arrays import empty_like
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Gradients, Problem, Result
from cuflash._sizes import Sizes

# Entries are short if at least this many fit into a batch of sequences.
FEWEST_ENTRIES = 16


def has_short_entries(problem: Problem) -> bool:
    """Whether its batch entries are many, short and alike."""
    if problem.batch < FEWEST_ENTRIES:
        return False
    most_rows, most_keys = _work.largest_tile(problem.window)
    rows, keys = problem.group * problem.seqlen_q, problem.seqlen_k
    if not problem.reads_no_more or rows > most_rows or not 0 < keys <= most_keys:
        return False
    widest = max(problem.head_dim, problem.head_dim_v)
    of_rows = problem.heads_q * problem.seqlen_q * max(keys, widest)
    elements = max(of_rows, problem.heads_k * keys * widest)  # of the largest array of an entry
    most = math.prod(_work.TILE) // 2
    return FEWEST_ENTRIES * elements <= most


def forward(problem: Problem, out: np.ndarray, wants_stats: bool) -> Result:
    """Attention's out, lse and, if wanted, stats; out is written."""
    tokens = _by_token(out)
    found = _cpu_packed.forward(_as_packed(problem, tokens), wants_stats)
    if not np.may_share_memory(tokens, out):
        out[...] = tokens.reshape(out.shape)
    stats = None if found.stats is None else np.stack([_by_entry(problem, x) for x in found.stats])
    return Result(out, _by_entry(problem, found.lse), stats)


def backward(gradient: GradientProblem) -> Gradients:
    """The gradients of q, k and v."""
    problem, stats, dlse = gradient.forward, gradient.stats, gradient.dlse
    found = _cpu_packed.backward(
        PackedGradientProblem(
            forward=_as_packed(problem),
            dout=_by_token(gradient.dout),
            out=_by_token(gradient.out),
            lse=_by_head(gradient.lse),
            dlse=None if dlse is None else _by_head(dlse),
            deterministic=gradient.deterministic,
            stats=None if stats is None else np.stack([_by_head(x) for x in stats]),
        )
    )
    return Gradients(*map(_in_order_of, (problem.q, problem.k, problem.v), found))


def explain(problem: Problem) -> tuple[tuple[int, int], None]:
    """The queries and keys of an entry, which is a tile of its own in a batch of many."""
    return _cpu_packed.explain(_as_packed(problem))


def _as_packed(problem: Problem, out: np.ndarray | None = None) -> PackedProblem:
    q, k, v = map(_by_token, (problem.q, problem.k, problem.v))
    starts = np.arange(problem.batch + 1)
    return PackedProblem(
        device=problem.device,
        sizes=Sizes(q[None].shape, k[None].shape, v[None].shape),
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=starts * problem.seqlen_q,
        cu_seqlens_k=starts * problem.seqlen_k,
        scale=problem.scale,
        softcap=problem.softcap,
        window=problem.window,
        offset=problem.offset,
        alibi_slopes=None,
        sinks=None,
        dropout=0.0,
        seed=0,
        score_mod=None,
        out=out,
    )


def _in_order_of(x: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(B * S, H, size) to (B, S, H, size), in memory as x."""
    result, found = empty_like(x), found.reshape(x.shape)
    if result.strides == found.strides:
        return found
    result[...] = found
    return result


def _by_token(x: np.ndarray) -> np.ndarray:
    """(B, S, H, size) to (B * S, H, size); a view unless heads lie apart."""
    return x.reshape(-1, *x.shape[2:])


def _by_head(x: np.ndarray) -> np.ndarray:
    """(B, H, S) to (H, B * S)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _by_entry(problem: Problem, x: np.ndarray) -> np.ndarray:
    """(H, B * S) to (B, H, S)."""
    by_head = x.reshape(x.shape[0], problem.batch, -1)
    return np.ascontiguousarray(by_head.swapaxes(0, 1))
