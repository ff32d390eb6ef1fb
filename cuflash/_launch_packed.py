"""Packed sequences on a GPU: one launch for all, as a batch whose rows lie in one array."""

from __future__ import annotations

from cuflash import _launch
from cuflash._gpu import Gpu
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Gradients, Packing, Problem, Result
from cuflash._traits import ForwardPlan


def forward(problem: PackedProblem, on: Gpu | None = None, wants_stats: bool = False) -> Result:
    """Out (Tq, Hq, Dv), lse (Hq, Tq), stats (2, Hq, Tq); `on` defaults to the GPU that q is on."""
    out, lse, stats = _launch.forward(_as_batch(problem), on, wants_stats)
    return Result(out[0], lse[0], None if stats is None else stats[:, 0])


def backward(gradient: PackedGradientProblem, on: Gpu | None = None) -> Gradients:
    """The gradients of q, k, v and the sinks."""
    dlse, stats = gradient.dlse, gradient.stats
    grads = _launch.backward(
        GradientProblem(
            forward=_as_batch(gradient.forward),
            dout=gradient.dout[None],
            out=gradient.out[None],
            lse=gradient.lse[None],
            dlse=None if dlse is None else dlse[None],
            deterministic=gradient.deterministic,
            stats=None if stats is None else stats[:, None],
        ),
        on,
    )
    return grads._replace(dq=grads.dq[0], dk=grads.dk[0], dv=grads.dv[0])


def explain(problem: PackedProblem, on: Gpu | None = None) -> tuple[ForwardPlan, str, str]:
    """As of a batch."""
    return _launch.explain(_as_batch(problem), on)


def _as_batch(problem: PackedProblem) -> Problem:
    """Arrays of batch size 1, and where its sequences begin."""
    return Problem(
        device=problem.device,
        sizes=problem.sizes,
        q=problem.q[None],
        k=problem.k[None],
        v=problem.v[None],
        scale=problem.scale,
        softcap=problem.softcap,
        window=problem.window,
        offset=problem.offset,
        q_lens=None,
        kv_lens=None,
        mask=None,
        bias=None,
        alibi_slopes=problem.alibi_slopes,
        sinks=problem.sinks,
        dropout=problem.dropout,
        seed=problem.seed,
        score_mod=problem.score_mod,
        out=None if problem.out is None else problem.out[None],
        packing=Packing(problem.cu_seqlens_q, problem.cu_seqlens_k),
    )
