"""Partial attention states over disjoint sets of keys, merged into the state over all of them.

Attention over some of the keys gives (out, lse). Over the union of disjoint sets the sums of
exponentials add up, so lse is the log of the sum of exp(lse_i), and out is the mean of the out_i
weighted by exp(lse_i - lse). Ring attention and split-key decoding end with this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from types import ModuleType
from typing import Any

import numpy as np

from cuflash._checks import check_partials
from cuflash.interop import receive, warn_of_lost_gradients

Array = Any  # of NumPy, CuPy, torch, JAX, or anything with __dlpack__


def merge(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Merge what `attention` gave for the same queries and disjoint sets of keys.

    Parameters
    ----------
    outs : sequence of arrays (B, Sq, Hq, Dv), or one array with these along its first axis
        The partial results: float16, bfloat16, float32 or float64, all of one dtype.
    lses : sequence of arrays (B, Hq, Sq), or one array with these along its first axis
        Their natural logarithms of sums of exponentials, one for each of `outs`: float32, or
        float64 where outs are float64. Where lse is -inf, no key was seen, and out is not read.

    Returns
    -------
    out : array (B, Sq, Hq, Dv), of the outs' dtype
        0 where no part has seen a key.
    lse : array (B, Hq, Sq), of the lses' dtype
        -inf where no part has seen a key.

    Raises
    ------
    TypeError
        An argument is no sequence of arrays, or kinds or dtypes differ or are not supported.
    ValueError
        Counts, shapes or devices differ, or there is nothing to merge.

    Notes
    -----
    A part counts keys from its own first one: with `causal` or a window give it ``offset = Sk - Sq
    - start``, where Sk counts the keys of all parts and `start` those before this one. Sinks are
    for one part alone, or they would count twice. For the gradients go back through each part with
    the merged out and lse, ``attention_backward(dout, q, k_part, v_part, out, lse, offset=...)``:
    dk and dv are its keys' own, and the dq add up. Pass no stats, for a part's are not those of the
    merged rows. Packed results are a batch of one, ``out[None]``
    and ``lse[None]``.

    The weights are of lse, whose rounding changes them by a factor of up to exp(2^-24 lse) in
    float32: 6e-5 where lse is 1000 in size. Up to about 100 that is less than float32's sums lose.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 8))
    >>> halves = [slice(0, 2), slice(2, 6)]
    >>> parts = [cuflash.attention(q, k[:, s], v[:, s], return_lse=True) for s in halves]
    >>> out, lse = cuflash.merge(*zip(*parts))
    >>> np.allclose(out, cuflash.attention(q, k, v))
    True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"cuflash.merge: outs has {len(outs)} arrays, lses has {len(lses)}; "
            "expected the same number, at least 1"
        )
    names = (*(f"outs[{i}]" for i in range(len(outs))), *(f"lses[{i}]" for i in range(len(lses))))
    arguments = dict(zip(names, outs + lses, strict=True))
    warn_of_lost_gradients("merge", arguments, stacklevel=3)
    with receive("merge", names, arguments) as call:
        arrays = [call.arguments[name] for name in names]
        outs, lses = arrays[: len(outs)], arrays[len(outs) :]
        check_partials("merge", call.device, outs, lses)
        with np.errstate(all="ignore"):  # log(0) is -inf, as meant; NaN and inf are the caller's
            out, lse = _merge(call.xp, outs, lses)
        return call.give(out), call.give(lse)


def _parts(name: str, arrays: Any) -> list[Array]:
    try:
        return list(arrays)
    except Exception as error:  # a foreign object may raise anything
        raise TypeError(
            f"cuflash.merge: {name} is a {type(arrays).__name__}; expected a sequence of arrays"
        ) from error


def _merge(xp: ModuleType, outs: list[Any], lses: list[Any]) -> tuple[Any, Any]:
    largest = reduce(xp.maximum, lses)
    largest = xp.where(largest == -xp.inf, 0, largest)  # so that -inf less this is no NaN
    weights = [xp.exp(lse - largest) for lse in lses]  # (B, Hq, Sq), the largest is 1
    total = sum(weights)
    weighted = xp.zeros(outs[0].shape, total.dtype)
    for weight, out in zip(weights, outs, strict=True):
        weight = _as_out(weight)
        weighted += xp.where(weight == 0, 0, weight * out.astype(total.dtype))
    weighted /= _as_out(xp.where(total == 0, 1, total))
    return weighted.astype(outs[0].dtype), largest + xp.log(total)


def _as_out(lse: Any) -> Any:
    """(B, Hq, Sq) as (B, Sq, Hq, 1), which broadcasts with out."""
    return lse.swapaxes(1, 2)[..., None]
