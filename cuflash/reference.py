"""Attention as a textbook writes it: float64, one matrix of scores. The oracle of every backend.

Shape letters, used everywhere: B batch, Sq/Sk lengths, Hq/Hk heads of q and of k/v, D head size of
q and k, Dv head size of v. Query head h reads key head h // (Hq // Hk).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash._mask_tree import Mask
from cuflash._problem import Gradients
from cuflash._random import dropped
from cuflash._reference_masks import centers_of, group_of, per_batch, visibility
from cuflash.score_mod import ScoreMod


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    offset: int | np.ndarray | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_lens: np.ndarray | None = None,
    kv_lens: np.ndarray | None = None,
    mask: Mask | np.ndarray | None = None,
    bias: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend, and keep the logarithm of each row's sum of exponentials.

    Parameters
    ----------
    q, k, v : arrays (B, Sq, Hq, D), (B, Sk, Hk, D) and (B, Sk, Hk, Dv) of any floating dtype
    causal : whether query i sees key j only where j <= i + offset
    offset : int or (B,) integers; by default the key length less the query length
    window : (left, right): query i sees keys i + offset - left to i + offset + right, both
        included; None is unbounded
    scale : multiplies q·k; by default 1 / sqrt(D)
    softcap : c: scores become c * tanh(scores / c)
    q_lens, kv_lens : (B,) integers, the valid rows and keys; what lies past them is never read
    mask : boolean, True where attended, broadcast to (B, Hq, Sq, Sk), or one of `cuflash.masks`
    bias : added to the scores after softcap, broadcast to (B, Hq, Sq, Sk)
    alibi_slopes : (Hq,) or (B, Hq); -slope * abs(i + offset - j) is added likewise
    sinks : (Hq,), each the score of one more key, which all rows see and which has the value 0
    dropout, seed : the share of probabilities that are dropped, and what decides which
    score_mod : its NumPy functions change the scores after softcap, before what is added

    Returns
    -------
    out, lse : float64 arrays (B, Sq, Hq, Dv) and (B, Hq, Sq); a row that sees no key has 0 and
        -inf, or with a sink 0 and the sink

    Examples
    --------
    Two equal keys share the attention; a causal first row sees only the first of them.

    >>> q = k = np.ones((1, 2, 1, 1))
    >>> v = np.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    >>> out, lse = attention(q, k, v, causal=True)
    >>> out.ravel().tolist()
    [10.0, 15.0]
    >>> (lse - 1).round(6).ravel().tolist()
    [0.0, 0.693147]
    """
    visible = visibility(q, k, causal, offset, window, q_lens, kv_lens, mask)
    added = _added(centers_of(q, k, offset, q_lens, kv_lens), k, alibi_slopes, bias)
    group = group_of(q, k)
    q = _heads_first(q, q_lens)
    k, v = (_heads_first(x, kv_lens, group) for x in (k, v))
    scores, _ = _scores(q, k, _scale(scale, q), softcap, score_mod, added)
    probs, lse, _ = _softmax(scores, visible, _sink_scores(sinks, q, q_lens))
    probs = probs * _kept(probs.shape, dropout, seed)
    return _sum_over_visible(probs, v, visible).swapaxes(1, 2), lse


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    causal: bool = False,
    offset: int | np.ndarray | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_lens: np.ndarray | None = None,
    kv_lens: np.ndarray | None = None,
    mask: Mask | np.ndarray | None = None,
    bias: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
) -> Gradients:
    """Pull a gradient of (out, lse) back to the inputs.

    Parameters
    ----------
    dout : array (B, Sq, Hq, Dv), the gradient of out
    dlse : array (B, Hq, Sq), the gradient of lse; none by default
    q, k, v and the options : as given to `attention`

    Returns
    -------
    Gradients : dq, dk, dv and, where there is a bias or are sinks, dbias and dsinks: float64, each
        of its input's shape

    Examples
    --------
    The value of a key that takes half of the attention gets half of the gradient.

    >>> q = k = v = np.ones((1, 2, 1, 1))
    >>> attention_backward(np.ones((1, 2, 1, 1)), q, k, v).dv.ravel().tolist()
    [1.0, 1.0]
    >>> attention_backward(np.ones((1, 2, 1, 1)), q, k, v, causal=True).dv.ravel().tolist()
    [1.5, 0.5]
    """
    visible = visibility(q, k, causal, offset, window, q_lens, kv_lens, mask)
    visible_t = visible.swapaxes(2, 3)
    added = _added(centers_of(q, k, offset, q_lens, kv_lens), k, alibi_slopes, bias)
    group = group_of(q, k)
    scale = _scale(scale, q)
    q, dout = _heads_first(q, q_lens), _heads_first(dout, q_lens)
    k, v = (_heads_first(x, kv_lens, group) for x in (k, v))
    scores, slope = _scores(q, k, scale, softcap, score_mod, added, differentiate=True)
    probs, _, sink_probs = _softmax(scores, visible, _sink_scores(sinks, q, q_lens))
    kept = _kept(probs.shape, dropout, seed)

    with np.errstate(invalid="ignore", over="ignore"):
        # out = (kept P) V
        dprobs = np.where(visible, kept * (dout @ v.swapaxes(2, 3)), 0)
        dv = _sum_over_visible((kept * probs).swapaxes(2, 3), dout, visible_t)
        # P = softmax(S); the derivative of lse by S is P
        means = (probs * dprobs).sum(axis=3, keepdims=True)
        if dlse is not None:
            means = means - np.asarray(dlse, np.float64)[..., None]
        dscores = np.where(visible, probs * (dprobs - means), 0)
        # S = score_mod(softcap(scale q kᵀ)) + what is added
        dproducts = np.where(visible, scale * slope * dscores, 0)
        dq = _sum_over_visible(dproducts, k, visible)
        dk = _sum_over_visible(dproducts.swapaxes(2, 3), q, visible_t)
        return Gradients(
            dq=dq.swapaxes(1, 2),
            dk=_sum_groups(dk, group).swapaxes(1, 2),
            dv=_sum_groups(dv, group).swapaxes(1, 2),
            dbias=None if bias is None else _sum_to_shape(dscores, bias.shape),
            dsinks=None if sinks is None else _dsinks(sink_probs, means).sum(axis=(0, 1, 2)),
        )


def attention_varlen(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend within each of several sequences: as `attention` on a batch padded to one length.

    Parameters
    ----------
    q, k, v : arrays (T, Hq, D), (T, Hk, D) and (T, Hk, Dv), the tokens of all sequences
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integers, where each sequence starts and the last one ends
    options : as of `attention`, but for q_lens, kv_lens, mask and bias

    Returns
    -------
    out, lse : float64 arrays (T, Hq, Dv) and (Hq, T); behind the last sequence 0 and -inf

    Examples
    --------
    >>> q = k = np.ones((3, 1, 1))
    >>> v = np.array([10.0, 20.0, 60.0]).reshape(3, 1, 1)
    >>> out, lse = attention_varlen(q, k, v, np.array([0, 2, 3]), np.array([0, 2, 3]))
    >>> out.ravel().tolist()
    [15.0, 15.0, 60.0]
    """
    lens = {"q_lens": np.diff(cu_seqlens_q), "kv_lens": np.diff(cu_seqlens_k)}
    k, v = (_padded(x, cu_seqlens_k) for x in (k, v))
    out, lse = attention(_padded(q, cu_seqlens_q), k, v, **lens, **options)
    lse = _unpadded(lse.swapaxes(1, 2), cu_seqlens_q, len(q), fill=-np.inf)
    return _unpadded(out, cu_seqlens_q, len(q)), lse.T


def attention_varlen_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    **options: Any,
) -> Gradients:
    """Pull a gradient of (out, lse) back to the inputs.

    Parameters
    ----------
    dout, dlse : arrays (T, Hq, Dv) and (Hq, T), the gradients of out and, if there is one, of lse
    q, k, v, cu_seqlens_q, cu_seqlens_k and the options : as given to `attention_varlen`

    Returns
    -------
    Gradients : as from `attention_backward`, of the inputs' shapes
    """
    lens = {"q_lens": np.diff(cu_seqlens_q), "kv_lens": np.diff(cu_seqlens_k)}
    rows = [_padded(x, cu_seqlens_q) for x in (dout, q)]
    keys = [_padded(x, cu_seqlens_k) for x in (k, v)]
    if dlse is not None:
        dlse = _padded(dlse.T, cu_seqlens_q).swapaxes(1, 2)
    dq, dk, dv, _, dsinks = attention_backward(*rows, *keys, dlse=dlse, **lens, **options)
    return Gradients(
        dq=_unpadded(dq, cu_seqlens_q, len(q)),
        dk=_unpadded(dk, cu_seqlens_k, len(k)),
        dv=_unpadded(dv, cu_seqlens_k, len(v)),
        dsinks=dsinks,
    )


def _padded(x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """(T, ...) to (B, S, ...): each sequence from 0 on, and zeros behind it."""
    lengths = np.diff(cu_seqlens)
    batch = np.zeros((len(lengths), lengths.max(initial=0), *x.shape[1:]), x.dtype)
    for one, start, length in zip(batch, cu_seqlens, lengths, strict=False):
        one[:length] = x[start : start + length]
    return batch


def _unpadded(
    batch: np.ndarray, cu_seqlens: np.ndarray, tokens: int, fill: float = 0
) -> np.ndarray:
    """(B, S, ...) to (T, ...): the reverse, with `fill` behind the last sequence."""
    x = np.full((tokens, *batch.shape[2:]), fill, np.float64)
    for one, start, length in zip(batch, cu_seqlens, np.diff(cu_seqlens), strict=False):
        x[start : start + length] = one[:length]
    return x


def _scale(scale: float | None, q: np.ndarray) -> float:
    return 1 / np.sqrt(q.shape[3]) if scale is None else scale


def _heads_first(x: np.ndarray, lens: np.ndarray | None, repeat: int = 1) -> np.ndarray:
    """(B, S, H, D) of any dtype to (B, H * repeat, S, D) of float64, zeros past the lengths."""
    x = np.asarray(x).astype(np.float64)
    if lens is not None:
        past = np.arange(x.shape[1]) >= np.asarray(lens)[:, None]
        x[past] = 0
    return x.swapaxes(1, 2).repeat(repeat, axis=1)


def _scores(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    softcap: float | None,
    score_mod: ScoreMod | None,
    added: np.ndarray | float,
    differentiate: bool = False,
    matmul: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul,
) -> tuple[np.ndarray, np.ndarray | float]:
    """(B, Hq, Sq, Sk), and, if asked for, their derivative by scale q kᵀ."""
    slope = 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * matmul(q, k.swapaxes(2, 3))
        if softcap:
            tanh = np.tanh(scores / softcap)
            scores, slope = softcap * tanh, 1 - tanh**2
        if score_mod is not None:
            place = np.ix_(*map(np.arange, scores.shape))  # b, h, i, j
            if differentiate:
                slope = slope * score_mod.differentiate(scores, *place)
            scores = score_mod.evaluate(scores, *place)
        return scores + added, slope


def _added(
    centers: np.ndarray, k: np.ndarray, slopes: np.ndarray | None, bias: np.ndarray | None
) -> np.ndarray | float:
    """ALiBi and bias: what is added to the scores, and broadcasts to them."""
    added = 0.0
    with np.errstate(invalid="ignore"):
        if slopes is not None:
            slopes = np.asarray(slopes).astype(np.float64)[..., None, None]
            added = -slopes * np.abs(centers - np.arange(k.shape[1]))
        return added if bias is None else added + np.asarray(bias).astype(np.float64)


def _sink_scores(sinks: np.ndarray | None, q: np.ndarray, q_lens: np.ndarray | None) -> np.ndarray:
    """Each row's score of its sink, (B, Hq, Sq, 1); -inf where it has none. q is heads first."""
    if sinks is None:
        return np.full((1, 1, 1, 1), -np.inf)
    q_len = per_batch(q.shape[2] if q_lens is None else q_lens)
    is_row = np.arange(q.shape[2])[:, None] < q_len
    return np.where(is_row, np.asarray(sinks).astype(np.float64)[:, None, None], -np.inf)


def _softmax(
    scores: np.ndarray, visible: np.ndarray, sinks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of the visible keys, lse, which counts the sink, and the sink's probability.

    A row that sees no key has probabilities of 0; without a sink its lse is -inf.
    """
    scores = np.where(visible, scores, -np.inf)
    top = np.maximum(scores.max(axis=3, keepdims=True, initial=-np.inf), sinks)
    top[top == -np.inf] = 0  # nothing to see, or only scores of -inf
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights = np.where(visible, np.exp(scores - top), 0)
        sink_weights = np.exp(sinks - top)
        total = weights.sum(axis=3, keepdims=True) + sink_weights
        lse = top + np.log(total)
        probs, sink_probs = (np.where(total != 0, x / total, 0) for x in (weights, sink_weights))
        return np.where(visible, probs, 0), lse[..., 0], sink_probs


def _kept(shape: tuple[int, ...], dropout: float, seed: int | None) -> np.ndarray | float:
    """What dropout multiplies probabilities by: 0, or 1 / (1 - dropout)."""
    if not dropout:
        return 1.0
    return np.where(dropped(dropout, seed, *map(np.arange, shape)), 0, 1 / (1 - dropout))


def _dsinks(sink_probs: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Of each row, (B, 1, Sq, Hq): a sink is one more column of the scores, whose dprobs are 0."""
    with np.errstate(invalid="ignore"):
        return np.where(sink_probs != 0, -sink_probs * means, 0).swapaxes(1, 3)


def _sum_over_visible(weights: np.ndarray, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """weights @ values without what is not visible: there the weight is 0, but 0 * NaN is NaN."""
    if np.isfinite(values).all():
        return weights @ values
    out = np.empty((*weights.shape[:-1], values.shape[-1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(out.shape[2]):
            terms = weights[:, :, i, :, None] * values
            out[:, :, i] = np.where(visible[:, :, i, :, None], terms, 0).sum(axis=2)
    return out


def _sum_groups(x: np.ndarray, group: int) -> np.ndarray:
    """(B, Hq, S, D) to (B, Hk, S, D): a key head collects from every query head that reads it."""
    return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:]).sum(axis=2)


def _sum_to_shape(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of broadcasting `shape` to x's shape."""
    full = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(axis for axis, n in enumerate(full) if n == 1)
    return x.sum(axis=axes, keepdims=True).reshape(shape)
