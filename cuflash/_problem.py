"""Arrays and options in, one frozen Problem out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cuflash._checks import Array, Check, accumulator_dtype, check_layouts
from cuflash._mask_tree import Dense, Mask, ScoresShape
from cuflash._sizes import Sizes
from cuflash.score_mod import ScoreMod, check_score_mod


class Packing(NamedTuple):
    """Where the sequences begin and end that lie after each other in arrays of batch size 1."""

    cu_seqlens_q: Array  # (sequences + 1,) integers
    cu_seqlens_k: Array


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One attention problem, checked. Letters as everywhere: B, Sq, Sk, Hq, Hk, D, Dv."""

    device: str  # "cpu" or "cuda"
    sizes: Sizes
    q: Array  # (B, Sq, Hq, D)
    k: Array  # (B, Sk, Hk, D)
    v: Array  # (B, Sk, Hk, Dv)
    scale: float  # multiplies q kᵀ
    softcap: float  # 0: none
    window: tuple[int | None, int | None]  # keys left and right of i + offset; causal is right = 0
    offset: int | Array | None  # int, (B,) integers, or None: kv_len - q_len
    q_lens: Array | None  # (B,) integers; NumPy's are int64
    kv_lens: Array | None  # (B,) integers; NumPy's are int64
    mask: Mask | None
    bias: Array | None  # q's dtype or float32, broadcast to (B, Hq, Sq, Sk)
    alibi_slopes: Array | None  # (Hq,) or (B, Hq), floating
    sinks: Array | None  # (Hq,), floating
    dropout: float  # in [0, 1)
    seed: int  # of dropout, in [0, 2^64)
    score_mod: ScoreMod | None
    out: Array | None  # (B, Sq, Hq, Dv): where the caller wants the result
    packing: Packing | None = None  # on a GPU: B is 1, and its rows are many sequences

    @classmethod
    def create(
        cls,
        function: str,
        device: str,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        offset: int | Array | None = None,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        q_lens: Array | None = None,
        kv_lens: Array | None = None,
        mask: Mask | Array | None = None,
        bias: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        score_mod: ScoreMod | None = None,
        out: Array | None = None,
    ) -> Problem:
        """Check everything; `function` is the public name that messages start with."""
        check = Check(function, device)
        q_layout = (q.shape, q.strides, q.dtype)
        k_layout = (k.shape, k.strides, k.dtype)
        v_layout = (v.shape, v.strides, v.dtype)
        sizes = check_layouts(function, device, q_layout, k_layout, v_layout)
        batch, heads_q, dtype = sizes.batch, sizes.heads_q, q.dtype
        if device == "cuda":
            for name, x in (("q", q), ("k", k), ("v", v)):
                check.address(name, x, dtype.itemsize)
            check.elements({"bias": bias, "out": out})
        if mask is not None:
            if not isinstance(mask, Mask):
                mask = Dense(check.mask(mask, sizes.scores_shape))
            mask.check(check, ScoresShape.of(sizes))
        check_score_mod(check, score_mod)
        structures = [x for x in (mask, score_mod) if x is not None]
        check.attachments(sum(x.attachments for x in structures))
        if out is not None:
            inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
            inputs |= {"offset": offset, "q_lens": q_lens, "kv_lens": kv_lens}
            inputs |= {"alibi_slopes": alibi_slopes}
            for structure in structures:
                inputs |= structure.arrays()
            check.out(out, sizes.out_shape, dtype, inputs)
        return cls(
            device=device,
            sizes=sizes,
            q=q,
            k=k,
            v=v,
            scale=check.scale(scale, sizes.head_dim, dtype),
            softcap=check.softcap(softcap, dtype),
            window=check.window(window, causal),
            offset=check.offset(offset, batch),
            q_lens=check.lengths("q_lens", q_lens, batch, sizes.seqlen_q),
            kv_lens=check.lengths("kv_lens", kv_lens, batch, sizes.seqlen_k),
            mask=mask,
            bias=check.bias(bias, sizes.scores_shape, dtype),
            alibi_slopes=check.alibi_slopes(alibi_slopes, batch, heads_q),
            sinks=check.sinks(sinks, heads_q),
            dropout=(rate := check.dropout(dropout)),
            seed=check.seed(seed, rate),
            score_mod=score_mod,
            out=out,
        )

    def check_values(self, function: str) -> None:
        """Check the values of lengths, offsets and masks also where they are on a GPU: waits."""
        check = Check(function, self.device, reads_device=True)
        check.offset(self.offset, self.batch)
        check.lengths("q_lens", self.q_lens, self.batch, self.seqlen_q)
        check.lengths("kv_lens", self.kv_lens, self.batch, self.seqlen_k)
        if self.mask is not None:
            self.mask.check(check, self.scores_shape)

    @property
    def scores_shape(self) -> ScoresShape:
        """What a mask is for."""
        return ScoresShape.of(self.sizes)

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
        return self.sizes.batch

    @property
    def sequences(self) -> int:
        """Batch entries, or what is packed into the one there is."""
        return self.batch if self.packing is None else self.packing.cu_seqlens_q.shape[0] - 1

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing beside a band of keys, a scale and a softcap."""
        terms = self.bias is self.alibi_slopes is self.sinks is self.score_mod is None
        return terms and self.mask is self.packing is None and not self.dropout

    @property
    def has_lengths(self) -> bool:
        """Whether rows or keys may end before the arrays do."""
        lengths = self.q_lens is not None or self.kv_lens is not None
        return lengths or self.packing is not None

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key, and nothing is added to scores or taken away."""
        return self.is_plain and not self.has_lengths and self.window == (None, None)

    @property
    def reads_no_more(self) -> bool:
        """Whether a kernel reads nothing but q, k and v, and what the host knows."""
        alone = self.is_plain and not self.has_lengths
        return alone and (self.offset is None or isinstance(self.offset, int))

    @property
    def seqlen_q(self) -> int:
        return self.sizes.seqlen_q

    @property
    def seqlen_k(self) -> int:
        return self.sizes.seqlen_k

    @property
    def heads_q(self) -> int:
        return self.sizes.heads_q

    @property
    def heads_k(self) -> int:
        return self.sizes.heads_k

    @property
    def group(self) -> int:
        """Query heads that read the same key head."""
        return self.sizes.group

    @property
    def head_dim(self) -> int:
        return self.sizes.head_dim

    @property
    def head_dim_v(self) -> int:
        return self.sizes.head_dim_v

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.sizes.out_shape

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.sizes.lse_shape


class Result(NamedTuple):
    """What a forward returns."""

    out: Array  # (B, Sq, Hq, Dv)
    lse: Array  # (B, Hq, Sq)
    stats: Array | None = None  # (2, B, Hq, Sq), where it is wanted: as `attention` describes it


class Gradients(NamedTuple):
    """What a backward returns: each gradient has its input's shape and dtype."""

    dq: Array
    dk: Array
    dv: Array
    dbias: Array | None = None
    dsinks: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GradientProblem:
    """A forward problem with what came out of it and the gradient that comes back."""

    forward: Problem
    dout: Array  # (B, Sq, Hq, Dv)
    out: Array  # (B, Sq, Hq, Dv)
    lse: Array  # (B, Hq, Sq)
    dlse: Array | None  # (B, Hq, Sq)
    deterministic: bool
    bias_gradient: bool = False  # whether there is to be one
    stats: Array | None = None  # (2, B, Hq, Sq); None: lse is all that is known of the rows

    @classmethod
    def create(
        cls,
        function: str,
        forward: Problem,
        dout: Array,
        out: Array,
        lse: Array,
        dlse: Array | None = None,
        deterministic: bool = True,
        bias_gradient: bool = True,
        stats: Array | None = None,
    ) -> GradientProblem:
        """Check that dout, out, lse, dlse and stats belong to `forward`."""
        check = Check(function, forward.device)
        check.results(forward, dout, out, lse, dlse, stats)
        if forward.score_mod is not None:
            forward.score_mod.check_backward(check)
        deterministic = check.flag("deterministic", deterministic)
        wanted = check.flag("bias_gradient", bias_gradient) and forward.bias is not None
        return cls(forward, dout, out, lse, dlse, deterministic, wanted, stats)

    def zeros(self, zeros: Callable[[tuple[int, ...], np.dtype], Array]) -> Gradients:
        """Where nothing depends on the inputs; `zeros` makes an array."""
        problem = self.forward
        bias = problem.bias if self.bias_gradient else None
        inputs = (problem.q, problem.k, problem.v, bias, problem.sinks)
        return Gradients(*(None if x is None else zeros(x.shape, x.dtype) for x in inputs))
