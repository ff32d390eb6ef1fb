"""Exact attention and its gradient, without ever forming the matrix of scores.

    out = softmax(scale q kᵀ) v        lse = log(sum(exp(scale q kᵀ)))

over the keys that a query sees. The method is FlashAttention's: tiles of keys pass by while a
running maximum and sum keep the softmax exact, and backward computes the scores again from q, k
and lse [1]_; the work is split among blocks as in [2]_.

Letters, everywhere in cuflash: B batch, Sq and Sk lengths of q and of k and v, Hq and Hk their
heads, D head size of q and k, Dv head size of v. Query head h reads key head h // (Hq // Hk).

.. [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention: Fast and Memory-Efficient Exact
   Attention with IO-Awareness", NeurIPS 2022, arXiv:2205.14135.
.. [2] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
   ICLR 2024, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from cuflash import _calls
from cuflash._calls import Kind
from cuflash._mask_tree import Mask
from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash.score_mod import ScoreMod

Array = Any  # of NumPy, CuPy, torch, JAX, or anything with __dlpack__
Integers = Any  # such an array of integers, or a sequence of int
Window = tuple[int | None, int | None]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    out: Array | None = None,
) -> Array | tuple[Array, ...]:
    """Attend: each query takes the mean of the values, weighted by the softmax of its scores.

    All arrays are of one kind (NumPy, CuPy, torch, JAX, or anything with ``__dlpack__``) and on one
    device, and so is the result, which is computed in order with the caller's current stream.
    Strides are free as long as the last axis is contiguous: a (B, H, S, D) array is passed as
    ``x.swapaxes(1, 2)`` and is not copied.

    Parameters
    ----------
    q : array (B, Sq, Hq, D)
        Queries: float16 or bfloat16, on the CPU also float32 or float64. D is at least 1, and at
        most 256 on a GPU.
    k : array (B, Sk, Hk, D)
        Keys, of q's dtype. Hq is a multiple of Hk.
    v : array (B, Sk, Hk, Dv)
        Values, of q's dtype. Dv need not be D; the same limits hold.
    causal : bool
        Query i sees key j only where j <= i + offset.
    offset : int, or (B,) integers
        Where a query stands among the keys, in keys. By default the batch entry's key length less
        its query length, so that the last query sees the last key; 0 lets the first query see the
        first key.
    window : (left, right)
        Query i sees key j only where i + offset - left <= j <= i + offset + right. Each is an int,
        at least 0, or None for unbounded; with `causal`, right is 0.
    scale : float
        Multiplies the products of q and k; by default 1 / sqrt(D).
    softcap : float
        c: a scaled score s becomes c * tanh(s / c). None or 0: none.
    q_lens, kv_lens : (B,) integers
        How many queries and keys of each batch entry are valid. What lies past them is never used:
        past q_lens out is 0 and lse is -inf. Values on the host are checked; values on a GPU are
        read there, and clipped to the arrays' lengths.
    mask : bool array that broadcasts to (B, Hq, Sq, Sk), or an object of `cuflash.masks`
        True where the query sees the key, if all else lets it.
    bias : array that broadcasts to (B, Hq, Sq, Sk)
        Added to the scaled and capped scores; of q's dtype or float32.
    alibi_slopes : array (Hq,) or (B, Hq), floating
        Adds -slope * abs(i + offset - j).
    sinks : array (Hq,), floating
        One more score per query head, which takes probability and has no value; lse counts it, also
        where a query sees no key.
    dropout : float
        The share of probabilities that become 0, at least 0 and less than 1; the others grow by
        1 / (1 - dropout). lse is without it.
    seed : int
        From 0 to 2^64 - 1, needed with dropout. What is dropped depends on it and on (batch entry,
        query head, query, key) alone.
    score_mod : ScoreMod
        Replaces the scaled and capped scores by a function of them.
    return_lse : bool
        Also return lse.
    return_stats : bool
        Also return lse and stats.
    out : array (B, Sq, Hq, Dv)
        Write the result here. Of q's dtype, and overlaps no input.

    Returns
    -------
    out : array (B, Sq, Hq, Dv), of q's dtype
        Accumulated in float32 (float64 for float64). A query that sees no key gets 0. In memory
        without gaps: in the order (B, Hq, Sq, Dv) on the CPU if q's heads lie further apart than
        its queries, as in a ``x.swapaxes(1, 2)``, else and on a GPU in the order (B, Sq, Hq, Dv).
    lse : array (B, Hq, Sq), float32 (float64 for float64), if `return_lse` or `return_stats`
        Natural logarithm of the sum of the exponentials of the row's scores, -inf for a query that
        sees no key: what `attention_backward` and `merge` need.
    stats : array (2, B, Hq, Sq), of lse's dtype, if `return_stats`
        The row's largest score, and the sum of the exponentials of its scores less that one; -inf
        and 0 for a query that sees no key. They keep apart what lse = largest + log(sum) rounds
        together, and make `attention_backward` exact for scores of any size.

    Raises
    ------
    TypeError
        An argument is no array, or arrays differ in kind or dtype, or a dtype is not supported.
    ValueError
        Arrays lie on different devices, or a shape, a stride or a value is not possible.
    NotImplementedError
        The GPU kernels do not have it: a head size over 256, or more than 32 rules of a
        mask and named arrays. The CPU has no function for a user's expression.
    ImportError, RuntimeError
        The arrays are on a GPU; CuPy is not installed, or cannot use that GPU.

    Warns
    -----
    UserWarning
        A torch tensor requires grad while torch records: the result carries no gradient.

    Notes
    -----
    While a CUDA graph is captured, lengths, offsets per batch entry and arrays of masks have to be
    on the GPU, and CuPy's memory has to come from a pool of the graph's own: docs/gpu.md.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = np.zeros((1, 2, 1, 8), np.float32)  # two queries, equal scores for all keys
    >>> k = np.ones((1, 3, 1, 8), np.float32)
    >>> v = np.array([1, 2, 6], np.float32).reshape(1, 3, 1, 1)
    >>> cuflash.attention(q, k, v).ravel().round(3)
    array([3., 3.], dtype=float32)
    >>> cuflash.attention(q, k, v, causal=True).ravel().round(3)  # query 0 does not see key 2
    array([1.5, 3. ], dtype=float32)
    """
    return _calls.forward(DENSE, "attention", locals())


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
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
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    deterministic: bool = True,
    bias_gradient: bool = True,
) -> Gradients:
    """The gradients of `attention`'s inputs, from the gradient of its result.

    Parameters
    ----------
    dout : array (B, Sq, Hq, Dv)
        Gradient of the loss with respect to out, of q's dtype, contiguous along the last axis.
    q, k, v : arrays
        What `attention` was given, and so for the options that both have.
    out, lse : arrays (B, Sq, Hq, Dv) and (B, Hq, Sq)
        What ``attention(..., return_lse=True)`` returned.
    stats : array (2, B, Hq, Sq), of lse's dtype
        What ``attention(..., return_stats=True)`` returned. Without it the probabilities come from
        lse alone, whose rounding changes them by a factor of up to exp(2^-24 lse): in float32 by
        6e-5 at 1000, by 6 % at 1e6, and beyond recognition from 1e7 on, where a row's scores share
        one large number, as under a bias of -1e9. In float64 that is 2^-53, so 1e-6 at 1e10.
    dlse : array (B, Hq, Sq), of lse's dtype
        Gradient of the loss with respect to lse; by default none.
    causal, offset, window, scale, softcap, q_lens, kv_lens, mask, bias
        As in `attention`.
    alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention`.
    deterministic : bool
        The same bits from every run, also on a GPU. False may be faster there.
    bias_gradient : bool
        Whether dbias is computed, which on a GPU takes two matrix products more; else it is None.

    Returns
    -------
    Gradients
        A named tuple: `dq`, `dk`, `dv`, each of its input's shape and dtype, and so `dbias` and
        `dsinks`, or None without a bias, its gradient or sinks. What lies past the valid lengths
        gets 0. dq, dk and dv lie in memory in the order of q, k and v, as `attention`'s out in that
        of q.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`, and where dout, out, lse, stats or dlse do not fit q, k and v.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = np.zeros((1, 1, 1, 4), np.float32)
    >>> k = np.ones((1, 2, 1, 4), np.float32)
    >>> v = np.array([1, 5], np.float32).reshape(1, 2, 1, 1)
    >>> out, lse = cuflash.attention(q, k, v, return_lse=True)
    >>> grads = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse)
    >>> grads.dv.ravel().round(3)  # both keys have the probability 1 / 2
    array([0.5, 0.5], dtype=float32)
    """
    return _calls.backward(DENSE, "attention_backward", locals())


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    bias_gradient: bool = True,
) -> tuple[Array | tuple[Array, Array], Callable[..., Gradients]]:
    """`attention`, and the function that pulls a gradient of its result back to its inputs.

    Parameters
    ----------
    q, k, v : arrays
        As in `attention`. They, out, lse and stats are kept until the pullback is let go,
        uncopied: leave their contents alone until then. No scores are kept.
    causal, offset, window, scale, softcap, q_lens, kv_lens, mask, bias, return_lse
        As in `attention`.
    alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention`.
    deterministic, bias_gradient : bool
        As in `attention_backward`.

    Returns
    -------
    out : array, or the pair (out, lse) if `return_lse`
        As from `attention`.
    pullback : callable
        ``pullback(dout, dlse=None)`` returns the `Gradients` as `attention_backward` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention` and, from the pullback, as `attention_backward`.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> out, pullback = cuflash.attention_vjp(q, k, v, causal=True)
    >>> grads = pullback(np.ones_like(out))
    >>> round(float(grads.dv.sum()), 3), out.size  # the probabilities of a query sum to 1
    (24.0, 24)
    """
    return _calls.vjp(DENSE, "attention_vjp", locals())


@cache
def _backend(device: str) -> ModuleType:
    # Imported by the first call that needs it: `import cuflash` pays for neither, nor needs CuPy.
    if device == "cpu":
        from cuflash import cpu as backend
    else:
        from cuflash import _launch as backend
    return backend


# The functions hand on locals(), every argument under its name, so that none is forgotten; they
# call nothing before that: torch.compile would take them apart, and their locals() with them.
DENSE = Kind(Problem, GradientProblem, _backend)
