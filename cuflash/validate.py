"""Whether the values of a call's arrays are possible, also those that lie on a GPU."""

from __future__ import annotations

from typing import Any

from cuflash._mask_tree import Mask
from cuflash._packed import dense_or_packed
from cuflash.attention import Array, Integers, Window
from cuflash.interop import receive
from cuflash.score_mod import ScoreMod


def validate(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Integers | None = None,
    cu_seqlens_k: Integers | None = None,
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
    out: Array | None = None,
) -> None:
    """Check arguments of `attention` or `attention_varlen`, and the values that they do not see.

    These check what they can know at once. To check lengths, offsets and masks' integers that lie
    on a GPU would be to wait for them: the kernels clip them to what is possible instead. This
    function reads them, and so waits for the GPU. What it lets pass, the kernels do not clip.

    Parameters
    ----------
    q, k, v : arrays
        As in `attention`, or, with `cu_seqlens_q` and `cu_seqlens_k`, as in `attention_varlen`;
        their elements are not read.
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integers
        As in `attention_varlen`. Without them it is a call of `attention`.
    causal, offset, window, scale, softcap, q_lens, kv_lens, mask, bias, out
        As in `attention`. The values of `offset`, `q_lens`, `kv_lens`, `cu_seqlens_q`,
        `cu_seqlens_k` and the integers of `mask` are read on whatever device they are.
    alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention`.

    Returns
    -------
    None
        All is possible.

    Raises
    ------
    ValueError
        A length, an offset, a prefix or the end of an interval is out of range, cu_seqlens do not
        rise from 0 to at most T, or `attention` would raise it.
    TypeError, NotImplementedError
        As `attention`.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = v = np.ones((2, 3, 1, 4), np.float32)
    >>> cuflash.validate(q, k, v, kv_lens=np.array([3, 0]))
    >>> cuflash.validate(q, k, v, kv_lens=np.array([3, 4]))
    Traceback (most recent call last):
    ...
    ValueError: cuflash.validate: kv_lens holds 4; expected 0 to 3
    """
    _validate("validate", locals())


def _validate(function: str, arguments: dict[str, Any]) -> None:
    with receive(function, ("q", "k", "v"), arguments) as call:
        dense_or_packed(function, call.device, call.arguments).check_values(function)
