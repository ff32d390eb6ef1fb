"""The calls of the library that `check` makes of a problem, and their results in one form."""

from __future__ import annotations

from typing import Any

import numpy as np

import cuflash
from cuflash import ScoreMod
from cuflash.cli.cases import Arrays, Case
from cuflash.masks import Mask

Array = Any  # of NumPy or CuPy


def results(case: Case, arrays: Arrays, xp: Any) -> dict[str, Array]:
    """Forward and backward on xp's device, as arrays of it; `xp`: cupy, or numpy."""
    options = {name: _on_device(value, xp) for name, value in case.options.items()}
    call = _packed if case.call == "packed" else _dense
    return {n: x for n, x in call(case, arrays, options, xp).items() if x is not None}


def _dense(case: Case, arrays: Arrays, options: dict[str, Any], xp: Any) -> dict[str, Array]:
    q, k, v, dout = (case.place(array, xp) for array in arrays[:4])
    if case.call == "compiled":
        options["mask"] = options["mask"].compile(q, k)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    flags = {"dlse": xp.asarray(arrays.dlse), "deterministic": case.deterministic}
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **flags, **options)
    return {"out": out, "lse": lse, **gradients._asdict()}


def _packed(case: Case, arrays: Arrays, options: dict[str, Any], xp: Any) -> dict[str, Array]:
    """The batch entries' valid rows one behind the other, and the results as of a batch again."""
    del options["q_lens"], options["kv_lens"]
    valid_rows, valid_keys = (_valid(lens) for lens in (case.q_lens, case.kv_lens))
    q, dout = (xp.asarray(x[valid_rows]) for x in (arrays.q, arrays.dout))
    k, v = (xp.asarray(x[valid_keys]) for x in (arrays.k, arrays.v))
    edges = [xp.asarray(np.cumsum((0, *lens))) for lens in (case.q_lens, case.kv_lens)]
    out, lse = cuflash.attention_varlen(q, k, v, *edges, return_lse=True, **options)
    dlse = xp.asarray(arrays.dlse.swapaxes(1, 2)[valid_rows].T)
    flags = {"dlse": dlse, "deterministic": case.deterministic}
    gradients = cuflash.attention_varlen_backward(
        dout, q, k, v, *edges, out, lse, **flags, **options
    )
    rows, keys = ((case.batch, n) for n in (case.seqlen_q, case.seqlen_k))
    return {
        "out": _as_batch(out, rows, valid_rows, 0, xp),
        "lse": _as_batch(lse.T, rows, valid_rows, -np.inf, xp).swapaxes(1, 2),
        "dq": _as_batch(gradients.dq, rows, valid_rows, 0, xp),
        "dk": _as_batch(gradients.dk, keys, valid_keys, 0, xp),
        "dv": _as_batch(gradients.dv, keys, valid_keys, 0, xp),
        "dsinks": gradients.dsinks,
    }


def _valid(lens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The batch entry and the place of each token."""
    entries = np.repeat(np.arange(len(lens)), lens)
    return entries, np.concatenate([np.arange(n) for n in lens])


def _as_batch(
    x: Array, shape: tuple[int, int], valid: tuple[np.ndarray, np.ndarray], fill: float, xp: Any
) -> Array:
    """(T, ...) to (B, S, ...), with `fill` past the lengths."""
    batch = xp.zeros((*shape, *x.shape[1:]), x.dtype)
    if fill:
        batch[...] = fill
    # As integers: not every CuPy indexes arrays of bfloat16.
    bits(batch)[tuple(map(xp.asarray, valid))] = bits(x)
    return batch


def bits(array: Array) -> Array:
    """A view as integers, in which NaN equals itself, and 0 is not -0."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def _on_device(value: Any, xp: Any) -> Any:
    """An option with its arrays, or those within it, on xp's device."""
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, (Mask, ScoreMod)):
        return value.with_arrays({name: xp.asarray(x) for name, x in value.arrays().items()})
    return value
