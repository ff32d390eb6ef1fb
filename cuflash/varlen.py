"""Attention within each of several sequences that stand one after the other in one array.

Letters as in `attention`, and T: the tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

from cuflash import _calls
from cuflash._calls import Kind
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import Gradients
from cuflash.attention import Array, Integers, Window
from cuflash.score_mod import ScoreMod


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Integers,
    cu_seqlens_k: Integers,
    *,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, ...]:
    """`attention` within each sequence of a packed batch: no padding, and no work for any.

    Sequence b has the queries from ``cu_seqlens_q[b]`` up to ``cu_seqlens_q[b + 1]`` and the keys
    likewise. Options see it as batch entry b, and its queries and keys numbered from 0.

    Parameters
    ----------
    q : array (T, Hq, D)
        Queries of all sequences, of the dtypes and sizes that `attention` takes.
    k : array (T, Hk, D)
        Keys, of q's dtype; their number T may be another than that of the queries.
    v : array (T, Hk, Dv)
        Values, of q's dtype.
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integers
        Where each sequence starts, and the last one ends: from 0, never decreasing, to at most T.
        What lies behind the end belongs to no sequence: out is 0 there, and lse -inf. Values on the
        host are checked; values on a GPU are read there, and clipped to the arrays.
    causal, window, scale, softcap, dropout, seed, score_mod
        As in `attention`.
    offset : int, or (B,) integers
        As in `attention`: by default a sequence's keys less its queries.
    alibi_slopes : array (Hq,) or (B, Hq), floating
        As in `attention`.
    sinks : array (Hq,), floating
        As in `attention`.
    return_lse : bool
        Also return lse.
    return_stats : bool
        Also return lse and stats.
    out : array (T, Hq, Dv)
        Write the result here. Of q's dtype, and overlaps no input.

    Returns
    -------
    out : array (T, Hq, Dv), of q's dtype
        As from `attention`, for the queries' T.
    lse : array (Hq, T), float32 (float64 for float64), if `return_lse` or `return_stats`
        Natural logarithm of the sum of the exponentials of the row's scores.
    stats : array (2, Hq, T), of lse's dtype, if `return_stats`
        The row's largest score, and the sum of the exponentials of its scores less that one.

    Raises
    ------
    TypeError, ValueError
        As `attention`, and where cu_seqlens_q or cu_seqlens_k cannot be.
    NotImplementedError
        As `attention`.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((5, 1, 4), np.float32)  # two sequences, of two and of three tokens
    >>> v = np.array([1, 3, 10, 20, 60], np.float32).reshape(5, 1, 1)
    >>> cuflash.attention_varlen(q, k, v, [0, 2, 5], [0, 2, 5]).ravel().round(3)
    array([ 2.,  2., 30., 30., 30.], dtype=float32)
    >>> cuflash.attention_varlen(q, k, v, [0, 2, 5], [0, 2, 5], causal=True).ravel().round(3)
    array([ 1.,  2., 10., 15., 30.], dtype=float32)
    """
    return _calls.forward(PACKED, "attention_varlen", locals())


def attention_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Integers,
    cu_seqlens_k: Integers,
    out: Array,
    lse: Array,
    *,
    stats: Array | None = None,
    dlse: Array | None = None,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    deterministic: bool = True,
) -> Gradients:
    """The gradients of `attention_varlen`'s inputs, from the gradient of its result.

    Parameters
    ----------
    dout : array (T, Hq, Dv)
        Gradient of the loss with respect to out, of q's dtype, contiguous along the last axis.
    q, k, v, cu_seqlens_q, cu_seqlens_k : arrays
        What `attention_varlen` was given, and so for the options that both have.
    out, lse : arrays (T, Hq, Dv) and (Hq, T)
        What ``attention_varlen(..., return_lse=True)`` returned.
    stats : array (2, Hq, T), of lse's dtype
        What ``attention_varlen(..., return_stats=True)`` returned: as in `attention_backward`.
    dlse : array (Hq, T), of lse's dtype
        Gradient of the loss with respect to lse; by default none.
    causal, offset, window, scale, softcap, alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention_varlen`.
    deterministic : bool
        As in `attention_backward`.

    Returns
    -------
    Gradients
        As from `attention_backward`; dbias is None. What belongs to no sequence gets 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention_varlen`, and where dout, out, lse, stats or dlse do not fit q, k and v.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((3, 1, 4), np.float32)
    >>> v = np.array([1, 3, 10], np.float32).reshape(3, 1, 1)
    >>> cu_seqlens = np.array([0, 2, 3])
    >>> out, lse = cuflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, return_lse=True)
    >>> grads = cuflash.attention_varlen_backward(
    ...     np.ones_like(out), q, k, v, cu_seqlens, cu_seqlens, out, lse
    ... )
    >>> grads.dv.ravel().round(3)  # each key gets what its sequence's queries give it
    array([1., 1., 1.], dtype=float32)
    """
    return _calls.backward(PACKED, "attention_varlen_backward", locals())


def attention_varlen_vjp(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Integers,
    cu_seqlens_k: Integers,
    *,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> tuple[Array | tuple[Array, Array], Callable[..., Gradients]]:
    """`attention_varlen`, and the function that pulls a gradient of its result back.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k : arrays
        As in `attention_varlen`. They, out, lse and stats are kept until the pullback is let go,
        uncopied: leave their contents alone until then.
    causal, offset, window, scale, softcap, alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention_varlen`.
    return_lse : bool
        As in `attention_varlen`.
    deterministic : bool
        As in `attention_backward`.

    Returns
    -------
    out : array, or the pair (out, lse) if `return_lse`
        As from `attention_varlen`.
    pullback : callable
        ``pullback(dout, dlse=None)`` returns the `Gradients` as `attention_varlen_backward` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention_varlen` and, from the pullback, as `attention_varlen_backward`.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = v = np.ones((6, 2, 4), np.float32)
    >>> out, pullback = cuflash.attention_varlen_vjp(q, k, v, [0, 1, 6], [0, 1, 6], causal=True)
    >>> grads = pullback(np.ones_like(out))
    >>> round(float(grads.dv.sum()), 3), out.size  # the probabilities of a query sum to 1
    (48.0, 48)
    """
    return _calls.vjp(PACKED, "attention_varlen_vjp", locals())


@cache
def _backend(device: str) -> ModuleType:
    # As in attention.py: imported by the first call that needs it.
    if device == "cpu":
        from cuflash import _cpu_packed as backend
    else:
        from cuflash import _launch_packed as backend
    return backend


PACKED = Kind(PackedProblem, PackedGradientProblem, _backend)
