"""Sequences one after the other in one array: arrays and options in, one frozen problem out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash._checks import Array, Check, accumulator_dtype, check_layouts
from cuflash._problem import GradientProblem, Problem
from cuflash._sizes import Sizes
from cuflash.score_mod import ScoreMod, check_score_mod


@dataclass(frozen=True, slots=True, eq=False)
class PackedProblem:
    """Attention within each of B sequences, checked. Tq and Tk: tokens of all sequences."""

    device: str  # "cpu" or "cuda"
    sizes: Sizes  # of all tokens as a batch of one
    q: Array  # (Tq, Hq, D)
    k: Array  # (Tk, Hk, D)
    v: Array  # (Tk, Hk, Dv)
    cu_seqlens_q: Array  # (B + 1,) integers: sequence b has the tokens [b] to [b + 1]
    cu_seqlens_k: Array  # (B + 1,) integers; NumPy's are int64
    scale: float  # multiplies q kᵀ
    softcap: float  # 0: none
    window: tuple[int | None, int | None]  # keys left and right of i + offset; causal is right = 0
    offset: int | Array | None  # int, (B,) integers, or None: the sequence's keys - its queries
    alibi_slopes: Array | None  # (Hq,) or (B, Hq), floating
    sinks: Array | None  # (Hq,), floating
    dropout: float  # in [0, 1)
    seed: int  # of dropout, in [0, 2^64)
    score_mod: ScoreMod | None
    out: Array | None  # (Tq, Hq, Dv): where the caller wants the result

    @classmethod
    def create(
        cls,
        function: str,
        device: str,
        q: Array,
        k: Array,
        v: Array,
        cu_seqlens_q: Array,
        cu_seqlens_k: Array,
        *,
        causal: bool = False,
        offset: int | Array | None = None,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        score_mod: ScoreMod | None = None,
        out: Array | None = None,
    ) -> PackedProblem:
        """Check everything; `function` is the public name that messages start with."""
        check = Check(function, device)
        layouts = []
        for name, x in (("q", q), ("k", k), ("v", v)):
            check.axes(name, x, "(tokens, heads, head size)")
            layouts.append(((1, *x.shape), (0, *x.strides), x.dtype))
        sizes = check_layouts(function, device, *layouts)
        if device == "cuda":
            for name, x in (("q", q), ("k", k), ("v", v)):
                check.address(name, x, q.dtype.itemsize)
            check.elements({"out": out})
        (tokens_q, heads_q, head_dim), tokens_k = q.shape, k.shape[0]
        cu_seqlens_q = check.cu_seqlens("cu_seqlens_q", cu_seqlens_q, tokens_q)
        cu_seqlens_k = check.cu_seqlens("cu_seqlens_k", cu_seqlens_k, tokens_k)
        check.same_batch(cu_seqlens_q, cu_seqlens_k)
        batch = cu_seqlens_q.shape[0] - 1
        if device == "cuda":
            check.packed_blocks(sizes, batch)
        check_score_mod(check, score_mod)
        check.attachments(0 if score_mod is None else score_mod.attachments)
        if out is not None:
            inputs = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
            inputs |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
            inputs |= {"offset": offset}
            inputs |= {} if score_mod is None else score_mod.arrays()
            check.out(out, (tokens_q, heads_q, v.shape[2]), q.dtype, inputs)
        return cls(
            device=device,
            sizes=sizes,
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=check.scale(scale, head_dim, q.dtype),
            softcap=check.softcap(softcap, q.dtype),
            window=check.window(window, causal),
            offset=check.offset(offset, batch),
            alibi_slopes=check.alibi_slopes(alibi_slopes, batch, heads_q),
            sinks=check.sinks(sinks, heads_q),
            dropout=(rate := check.dropout(dropout)),
            seed=check.seed(seed, rate),
            score_mod=score_mod,
            out=out,
        )

    def check_values(self, function: str) -> None:
        """Check the values of cu_seqlens and offsets also where they are on a GPU: waits."""
        check = Check(function, self.device, reads_device=True)
        check.cu_seqlens("cu_seqlens_q", self.cu_seqlens_q, self.q.shape[0])
        check.cu_seqlens("cu_seqlens_k", self.cu_seqlens_k, self.k.shape[0])
        check.offset(self.offset, self.batch)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of q, k, v and of the result."""
        return self.q.dtype

    @property
    def lse_dtype(self) -> np.dtype:
        """The accumulator's dtype: float64 for float64 input, else float32."""
        return accumulator_dtype(self.q.dtype)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (*self.q.shape[:2], self.v.shape[2])

    @property
    def lse_shape(self) -> tuple[int, int]:
        return (self.q.shape[1], self.q.shape[0])

    def rows(self, sequence: int) -> slice:
        """A sequence's tokens of q, where cu_seqlens_q is NumPy's."""
        start, stop = self.cu_seqlens_q[sequence : sequence + 2].tolist()
        return slice(start, stop)

    def keys(self, sequence: int) -> slice:
        """A sequence's tokens of k and v, where cu_seqlens_k is NumPy's."""
        start, stop = self.cu_seqlens_k[sequence : sequence + 2].tolist()
        return slice(start, stop)

    def sequence(self, sequence: int) -> Problem:
        """One sequence as a batch of one; its arrays are views."""
        rows, keys = self.rows(sequence), self.keys(sequence)
        offset, slopes = self.offset, self.alibi_slopes
        if offset is not None and not isinstance(offset, int):
            offset = int(offset[sequence])
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        q, k, v = self.q[None, rows], self.k[None, keys], self.v[None, keys]
        return Problem(
            device=self.device,
            sizes=Sizes(q.shape, k.shape, v.shape),
            q=q,
            k=k,
            v=v,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            offset=offset,
            q_lens=None,
            kv_lens=None,
            mask=None,
            bias=None,
            alibi_slopes=slopes,
            sinks=self.sinks,
            dropout=self.dropout,
            seed=self.seed,
            score_mod=self.score_mod,
            out=None if self.out is None else self.out[None, rows],
        )


def dense_or_packed(
    function: str, device: str, arguments: dict[str, Any]
) -> Problem | PackedProblem:
    """The problem of a call of `attention` or, where it has cu_seqlens, of `attention_varlen`."""
    arguments = dict(arguments)
    if arguments["cu_seqlens_q"] is None and arguments["cu_seqlens_k"] is None:
        del arguments["cu_seqlens_q"], arguments["cu_seqlens_k"]
        return Problem.create(function, device, **arguments)
    for name in ("q_lens", "kv_lens", "mask", "bias"):
        if arguments.pop(name) is not None:
            message = f"{name} is given beside cu_seqlens; expected none with packed sequences"
            Check(function, device).fail(ValueError, message)
    return PackedProblem.create(function, device, **arguments)


@dataclass(frozen=True, slots=True, eq=False)
class PackedGradientProblem:
    """A forward problem with what came out of it and the gradient that comes back."""

    forward: PackedProblem
    dout: Array  # (Tq, Hq, Dv)
    out: Array  # (Tq, Hq, Dv)
    lse: Array  # (Hq, Tq)
    dlse: Array | None  # (Hq, Tq)
    deterministic: bool
    stats: Array | None = None  # (2, Hq, Tq); None: lse is all that is known of the rows

    @classmethod
    def create(
        cls,
        function: str,
        forward: PackedProblem,
        dout: Array,
        out: Array,
        lse: Array,
        dlse: Array | None = None,
        deterministic: bool = True,
        stats: Array | None = None,
    ) -> PackedGradientProblem:
        """Check that dout, out, lse, dlse and stats belong to `forward`."""
        check = Check(function, forward.device)
        check.results(forward, dout, out, lse, dlse, stats)
        if forward.score_mod is not None:
            forward.score_mod.check_backward(check)
        deterministic = check.flag("deterministic", deterministic)
        return cls(forward, dout, out, lse, dlse, deterministic, stats)

    def sequence(self, sequence: int) -> GradientProblem:
        """One sequence as a batch of one; its arrays are views."""
        rows = self.forward.rows(sequence)
        return GradientProblem(
            forward=self.forward.sequence(sequence),
            dout=self.dout[None, rows],
            out=self.out[None, rows],
            lse=self.lse[None, :, rows],
            dlse=None if self.dlse is None else self.dlse[None, :, rows],
            deterministic=self.deterministic,
            stats=None if self.stats is None else self.stats[:, None, :, rows],
        )
