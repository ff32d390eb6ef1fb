"""Masks: which queries see which keys. True means attend.

A mask is joined with others by ``&``, ``|`` and ``~``, up to 1024 rules, 128 deep, and given to
`cuflash.attention` as ``mask=``. It costs what its visible tiles cost. b, h, i and j stand for the
batch entry, the query head, the query and the key; B, Hq, Hk, Sq and Sk for their numbers, Hk for
the number of key heads. The arrays of a mask may be of any framework; while a GPU reads q they may
also be on the host, and are copied by every call, or once by `compile`.

>>> import cuflash
>>> mask = cuflash.masks.causal() & ~cuflash.masks.window(1, 1)  # the past, but for the last key
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuflash._checks import MAX_INDEX, Array, Check, is_array
from cuflash._mask_tree import (
    Band,
    Blocks,
    Dense,
    Documents,
    Expression,
    Intervals,
    Lengths,
    Mask,
    Prefix,
)
from cuflash.score_mod import check_expression, check_function, check_names

__all__ = [
    "Mask",
    "blocks",
    "causal",
    "dense",
    "documents",
    "expression",
    "intervals",
    "lengths",
    "prefix",
    "window",
]

Integers = Any  # an array of integers, or a sequence of int


def causal(offset: int | Integers | None = None) -> Mask:
    """Key j is visible to query i where j <= i + offset.

    Parameters
    ----------
    offset : int, or (B,) integers
        Where query 0 stands among the keys. By default that of the call: its option `offset`, else
        the key length less the query length, so that the last query sees the last key.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        The offset is no integer, or beyond 2^60 in size.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> (cuflash.attention(q, k, v, mask=cuflash.masks.causal())[0, :, 0] > 0).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])
    """
    return Band(None, 0, _offset("causal", offset))


def window(left: int | None, right: int | None, offset: int | Integers | None = None) -> Mask:
    """Key j is visible to query i where i + offset - left <= j <= i + offset + right.

    Parameters
    ----------
    left, right : int
        Keys to each side, at least 0; both ends are visible. None: unbounded.
    offset : int, or (B,) integers
        As of `causal`.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        A side is no integer or negative, or the offset is no integer or beyond 2^60 in size.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> (cuflash.attention(q, k, v, mask=cuflash.masks.window(1, 0))[0, :, 0] > 0).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    check = _check("window")
    left, right = check.window_side("left", left), check.window_side("right", right)
    return Band(left, right, _offset("window", offset))


def lengths(kv_lens: Integers | None = None, q_lens: Integers | None = None) -> Mask:
    """Key j is visible to query i where j < kv_lens[b] and i < q_lens[b].

    Unlike the options of the same names it leaves the default offset alone.

    Parameters
    ----------
    kv_lens, q_lens : (B,) integers
        0 to Sk, and 0 to Sq. None: all of them; one of the two must be given.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Neither is given, or one is no array and no sequence of int.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> mask = cuflash.masks.lengths([3], [2])
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0],
           [0, 0, 0, 0]])
    """
    if kv_lens is None and q_lens is None:
        _check("lengths").fail(ValueError, "kv_lens and q_lens are None; expected at least one")
    return Lengths(
        None if kv_lens is None else _integers("lengths", "kv_lens", kv_lens),
        None if q_lens is None else _integers("lengths", "q_lens", q_lens),
    )


def documents(q_ids: Array, kv_ids: Array | None = None) -> Mask:
    """Key j is visible to query i where q_ids[b, i] == kv_ids[b, j].

    Parameters
    ----------
    q_ids : array (B, Sq) of integers
        Any numbers, in any order; where equal ones stand together, less is computed.
    kv_ids : array (B, Sk) of integers
        By default q_ids.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        One of them is no array.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> mask = cuflash.masks.documents(np.array([[7, 7, 7, 3]]))
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 1]])
    """
    q_ids = _array("documents", "q_ids", q_ids)
    return Documents(q_ids, None if kv_ids is None else _array("documents", "kv_ids", kv_ids))


def prefix(n: Integers) -> Mask:
    """Key j is visible to every query where j < n[b].

    A prefix language model is ``causal() | prefix(n)``.

    Parameters
    ----------
    n : (B,) integers
        0 to Sk.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        n is no array and no sequence of int.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> mask = cuflash.masks.causal() | cuflash.masks.prefix([3])
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])
    """
    return Prefix(_integers("prefix", "n", n))


def intervals(start: Array, end: Array) -> Mask:
    """Key j is visible to query i where i lies in no [start[b, h, j, c], end[b, h, j, c]).

    h is the key head that the query's head reads, and c one of at most two intervals. An interval
    whose end is not above its start hides nothing. Memory grows with Sk alone.

    Parameters
    ----------
    start, end : arrays (B, Hk or 1, Sk, 1 or 2) of integers
        0 to Sq, the same shape for both.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        One of them is no array, or their shapes differ.

    Notes
    -----
    Method: FlashMask's column-wise representation (Wang et al. 2024, arXiv:2410.01359).

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> start = np.array([2, 2, 0, 4]).reshape(1, 1, 4, 1)
    >>> end = np.array([4, 4, 2, 4]).reshape(1, 1, 4, 1)
    >>> mask = cuflash.masks.intervals(start, end)
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 1, 0, 1],
           [1, 1, 0, 1],
           [0, 0, 1, 1],
           [0, 0, 1, 1]])
    """
    start, end = _array("intervals", "start", start), _array("intervals", "end", end)
    if hasattr(start, "shape") and hasattr(end, "shape"):  # else a call finds out
        _check("intervals").same_shape("", start, end)
    return Intervals(start, end)


def blocks(array: Array, block_q: int, block_k: int) -> Mask:
    """Key j is visible to query i where array[..., i // block_q, j // block_k].

    Parameters
    ----------
    array : bool array (nq, nk) or (B or 1, Hq or 1, nq, nk)
        nq is Sq / block_q, rounded up, and nk likewise.
    block_q, block_k : int
        Queries and keys of a block, at least 1.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        `array` is no array, or a size is no integer or less than 1.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> mask = cuflash.masks.blocks(np.array([[True, False], [False, True]]), 2, 2)
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 1],
           [0, 0, 1, 1]])
    """
    check, array = _check("blocks"), _array("blocks", "array", array)
    sizes = {"block_q": block_q, "block_k": block_k}
    for name, size in sizes.items():
        sizes[name] = check.integer(name, size)
        if sizes[name] < 1:
            check.fail(ValueError, f"{name} is {sizes[name]}; expected at least 1")
        sizes[name] = min(sizes[name], MAX_INDEX)  # holds any length, and fits 32 bits
    return Blocks(array, **sizes)


def dense(array: Array) -> Mask:
    """Key j is visible to query i where the array is True: what a bool array given as mask= means.

    Parameters
    ----------
    array : bool array that broadcasts to (B, Hq, Sq, Sk)

    Returns
    -------
    Mask

    Raises
    ------
    TypeError
        It is no array.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> mask = cuflash.masks.dense(np.array([True, False, True, False])) & cuflash.masks.causal()
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 0, 0, 0],
           [1, 0, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 1, 0]])
    """
    return Dense(_array("dense", "array", array))


def expression(code: str, function: Callable[..., Any] | None = None, **arrays: Array) -> Mask:
    """Key j is visible to query i where an expression is true.

    No tile is known to be hidden or visible before it is evaluated: join it by & with a mask that
    knows, where there is one.

    Parameters
    ----------
    code : str
        A CUDA C++ expression over `b`, `h`, `i`, `j` (int) and the named arrays, which it reads as
        ``name(index, ...)``, one index per axis, each of which is clipped to the axis. On a GPU it
        is compiled into the kernels.
    function : callable
        The same as a function of NumPy arrays, ``f(b, h, i, j, **arrays)``: the indices are integer
        arrays that broadcast to some tile (batch entries, query heads, queries, keys), and so must
        the result. Needed on the CPU, where threads call it side by side.
    **arrays : arrays
        bool, int32, int64, float16, bfloat16 or float32, of one to four axes.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        The code is no string or empty, the function cannot be called, a named array is no array,
        or its name is no identifier or taken.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = np.zeros((1, 4, 1, 1))  # equal scores: out is the mean of the visible values
    >>> v = np.eye(4).reshape(1, 4, 1, 4)
    >>> every_other = lambda b, h, i, j: (i - j) % 2 == 0
    >>> mask = cuflash.masks.expression("(i - j) % 2 == 0", every_other)
    >>> (cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0).astype(int)
    array([[1, 0, 1, 0],
           [0, 1, 0, 1],
           [1, 0, 1, 0],
           [0, 1, 0, 1]])
    """
    check_expression("masks.expression", "code", code)
    check_names("masks.expression", arrays)
    check_function("masks.expression", "function", function)
    named = {name: _array("expression", name, x) for name, x in arrays.items()}
    return Expression(code, named, function)


def _check(function: str) -> Check:
    return Check(f"masks.{function}", "")


def _array(function: str, name: str, x: Any) -> Array:
    if not is_array(x):
        _check(function).fail(TypeError, f"{name} is a {type(x).__name__}; expected an array")
    return x


def _integers(function: str, name: str, x: Integers) -> Array:
    """An array as it is, a sequence as an array."""
    if _is_sequence(x):
        x = _check(function).sequence(name, x)
    if not is_array(x):
        _check(function).fail(
            TypeError, f"{name} is a {type(x).__name__}; expected one integer per batch entry"
        )
    return x


def _offset(function: str, offset: int | Integers | None) -> int | Array | None:
    if isinstance(offset, np.ndarray) and not offset.shape:
        offset = offset.item()
    if is_array(offset) or _is_sequence(offset):
        return _integers(function, "offset", offset)
    return _check(function).offset(offset, batch=0)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes))
