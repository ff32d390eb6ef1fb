"""The rules that arguments keep: every check of a call's arguments, and every message, is here."""

from __future__ import annotations

import math
import numbers
import reprlib
from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from cuflash import _remedies
from cuflash._overlap import address, overlap, overlaps_itself
from cuflash._sizes import Sizes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
DTYPES = {"cpu": (FLOAT16, BFLOAT16, FLOAT32, FLOAT64), "cuda": (FLOAT16, BFLOAT16)}
# Of the arrays that a user's expression reads.
NAMED_DTYPES = (
    *(np.dtype(x) for x in (np.bool_, np.int32, np.int64)),
    FLOAT16,
    BFLOAT16,
    FLOAT32,
)
MAX_HEAD_DIM = 256
MAX_ATTACHMENTS = 32  # they leave a kernel half of its 4 KiB of parameters
MAX_FACTOR = 1e30  # with 1 / MAX_FACTOR the range of scale and softcap in float32
MAX_INDEX = 2**31 - 1024  # the kernels count rows, keys and blocks in 32 bits, rounded up to tiles
SMALLEST_TILE = 32  # rows of a query tile, keys of a key tile
MAX_OFFSET = 2**60  # offset + position + window stays inside 64 bits
MAX_SEQUENCE = 2**24  # integers that come as a list: more than any batch has
MAX_RULES = 1024  # of a mask, where one that stands twice counts twice
MAX_DEPTH = 128  # of a mask's tree, which is walked by recursion

_BOOLS = (bool, np.bool_)

Array = Any  # numpy.ndarray, or cupy.ndarray where device is "cuda"


def is_array(x: Any) -> bool:
    """Whether x's class is one of arrays. The instance is not asked: it may raise anything."""
    return hasattr(type(x), "__dlpack__")


def check_flag(function: str, name: str, value: Any) -> bool:
    """The value as a bool, if it is one."""
    if value is True or value is False:
        return value
    return Check(function, "").flag(name, value)


def check_partials(function: str, device: str, outs: list[Array], lses: list[Array]) -> None:
    """Check that partial results belong to the same queries: (B, Sq, Hq, Dv) and (B, Hq, Sq)."""
    check = Check(function, device)
    check.axes("outs[0]", outs[0], "(batch, length, heads, head size)")
    check.dtype("outs[0]", outs[0], DTYPES["cpu"])
    batch, seqlen_q, heads_q, _ = outs[0].shape
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check.like(f"outs[{i}]", out, outs[0].shape, outs[0].dtype)
        lse_dtype = accumulator_dtype(outs[0].dtype)
        check.like(f"lses[{i}]", lse, (batch, heads_q, seqlen_q), lse_dtype)


def accumulator_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that scores, sums and lse are kept in."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


class _Layout(NamedTuple):
    """What the checks of q, k and v read of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: np.dtype


@lru_cache(maxsize=1024)
def check_layouts(function: str, device: str, q: tuple, k: tuple, v: tuple) -> Sizes:
    """Check q, k and v against each other, once for all calls of these layouts.

    Equal layouts have the same sizes, the same object, for as long as anybody keeps it.
    """
    Check(function, device).tensors(_Layout(*q), _Layout(*k), _Layout(*v))
    return Sizes(q[0], k[0], v[0])


class Check(NamedTuple):
    """The rules, one method per argument: messages name function, argument, found, expected."""

    function: str
    device: str
    reads_device: bool = False  # also values on a GPU, which means to wait for it

    def fail(self, error: type[Exception], message: str) -> NoReturn:
        raise error(f"cuflash.{self.function}: {message}")

    def tensors(self, q: _Layout, k: _Layout, v: _Layout) -> None:
        for name, array in (("q", q), ("k", k), ("v", v)):
            self.axes(name, array, "(batch, length, heads, head size)")
            self.dtype(name, array, DTYPES[self.device])
            self.contiguous_last_axis(name, array)
        for name, array in (("k", k), ("v", v)):
            if array.dtype != q.dtype:
                self.fail(TypeError, f"{name} is {array.dtype}, q is {q.dtype}; expected one dtype")
            if array.shape[0] != q.shape[0]:
                self.fail(
                    ValueError,
                    f"{name} has batch {array.shape[0]}, q has {q.shape[0]}; expected the same"
                    + _remedies.batch_of_one(name, array.shape, q.shape),
                )
        if k.shape[3] != q.shape[3]:
            hint = " along the last axis" if q.shape[3] in k.shape[1:3] else ""
            self.fail(
                ValueError,
                f"k has head size {k.shape[3]}, q has {q.shape[3]}; expected the same{hint}",
            )
        if v.shape[1:3] != k.shape[1:3]:
            self.fail(
                ValueError,
                f"v has (length, heads) {v.shape[1:3]}, k has {k.shape[1:3]}; expected the same"
                + _remedies.swapped_lengths(k.shape, v.shape),
            )
        self.heads(q, k)
        self.head_dim("q", q.shape[3])
        self.head_dim("v", v.shape[3])
        if self.device == "cuda":
            for name, array in (("q", q), ("k", k), ("v", v)):
                self.strides(name, array)
            if k.shape[2]:
                self.indices(q.shape, k.shape)

    def axes(self, name: str, array: Array | _Layout, axes: str) -> None:
        expected = axes.count(",") + 1
        if len(array.shape) != expected:
            self.fail(
                ValueError,
                f"{name} has {len(array.shape)} axes, shape {array.shape}; "
                f"expected {expected} axes {axes}"
                + _remedies.OF_AXES.get((len(array.shape), expected), ""),
            )

    def dtype(self, name: str, array: Array | _Layout, supported: tuple[np.dtype, ...]) -> None:
        if array.dtype not in supported:
            where = "on a GPU" if self.device == "cuda" else "on the CPU"
            names = ", ".join(map(str, supported))
            self.fail(TypeError, f"{name} is {array.dtype}; expected one of {names} {where}")

    def contiguous_last_axis(
        self, name: str, array: Array | _Layout, to_write: bool = False
    ) -> None:
        itemsize = array.dtype.itemsize
        if array.strides[-1] != itemsize and array.shape[-1] > 1 and 0 not in array.shape:
            # A copy is no remedy where the array is written: the caller would not see the result.
            copy = f", as {name}.copy() has, or {name}.contiguous() in torch"
            self.fail(
                ValueError,
                f"{name} has a last axis with a stride of {array.strides[-1]} bytes; "
                f"expected a contiguous last axis ({itemsize} bytes){'' if to_write else copy}",
            )

    def heads(self, q: _Layout, k: _Layout) -> None:
        heads_q, heads_k = q.shape[2], k.shape[2]
        if heads_q == heads_k == 0:
            return
        if heads_k == 0 or heads_q % heads_k:
            self.fail(
                ValueError,
                f"q has {heads_q} heads, k has {heads_k}; "
                "expected a number of q heads that is a multiple of k's"
                + _remedies.swapped_heads(q.shape, k.shape),
            )

    def strides(self, name: str, array: Array | _Layout) -> None:
        """Of whole elements, as the kernels count them."""
        itemsize = array.dtype.itemsize
        for stride in array.strides:
            if stride % itemsize:
                self.fail(
                    ValueError,
                    f"{name} has a stride of {stride} bytes; "
                    f"expected a multiple of {itemsize}, an element",
                )

    def address(self, name: str, array: Array, itemsize: int) -> None:
        if address(array) % itemsize:
            self.fail(
                ValueError,
                f"{name} has its first element at {address(array):#x}; "
                f"expected a multiple of {itemsize} bytes, an element",
            )

    def on_gpu(self, name: str, array: Array) -> None:
        """Likewise, of an array that may also be on the host, from where it is copied."""
        if self.device == "cuda" and not isinstance(array, np.ndarray):
            self.elements({name: array})

    def elements(self, arrays: dict[str, Array | None]) -> None:
        """Strides and addresses where a kernel reads elements."""
        for name, array in arrays.items():
            if array is None:
                continue
            itemsize = array.dtype.itemsize
            # An itemsize is a power of 2: of the steps, or of their bits, none may have lower ones.
            if reduce(or_, array.strides, address(array)) % itemsize:
                self.strides(name, array)
                self.address(name, array, itemsize)

    def indices(self, q: tuple[int, ...], k: tuple[int, ...]) -> None:
        batch, seqlen_q, heads_q, _ = q
        seqlen_k, heads_k = k[1:3]
        rows = seqlen_q * (heads_q // heads_k)
        blocks = batch * heads_k * (max(rows, seqlen_k) // SMALLEST_TILE + 1)
        for what, found in (
            ("Sq * (Hq // Hk)", rows),
            ("Sq + Sk", seqlen_q + seqlen_k),
            (f"B * Hk * (Sq * (Hq // Hk) or Sk) / {SMALLEST_TILE}", blocks),
        ):
            if found > MAX_INDEX:
                self.fail(
                    NotImplementedError,
                    f"q and k have {what} = {found}; expected at most {MAX_INDEX} on a GPU",
                )

    def packed_blocks(self, sizes: Sizes, sequences: int) -> None:
        """A launch has a block for each tile of tokens and one more for each sequence."""
        tokens = max(sizes.seqlen_q, sizes.seqlen_k)
        blocks = sizes.heads_q * (tokens // SMALLEST_TILE + 1 + sequences)
        if blocks > MAX_INDEX:
            self.fail(
                NotImplementedError,
                f"cu_seqlens_q has {sequences} sequences, which makes Hq * (T / {SMALLEST_TILE} + "
                f"sequences) = {blocks}; expected at most {MAX_INDEX} on a GPU: split the call",
            )

    def head_dim(self, name: str, size: int) -> None:
        if size < 1:
            self.fail(ValueError, f"{name} has head size 0; expected at least 1")
        if self.device == "cuda" and size > MAX_HEAD_DIM:
            self.fail(
                NotImplementedError,
                f"{name} has head size {size}; expected at most {MAX_HEAD_DIM} on a GPU "
                "(the cpu backend takes any)",
            )

    def like(self, name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if array.shape != shape:
            hint = _remedies.view(name, array.shape, shape.__eq__, _remedies.OF_RESULTS, "has")
            self.fail(ValueError, f"{name} has shape {array.shape}; expected {shape}{hint}")
        if array.dtype != dtype:
            self.fail(TypeError, f"{name} is {array.dtype}; expected {dtype}")

    def results(
        self,
        forward: Any,
        dout: Array,
        out: Array,
        lse: Array,
        dlse: Array | None,
        stats: Array | None,
    ) -> None:
        """What came out of a forward problem, dense or packed, and the gradient of it."""
        for name, array in (("dout", dout), ("out", out)):
            self.like(name, array, forward.out_shape, forward.dtype)
        for name, array in (("dout", dout), ("out", out)):
            self.contiguous_last_axis(name, array)
        if self.device == "cuda":
            self.elements({"dout": dout, "out": out})
        self.like("lse", lse, forward.lse_shape, forward.lse_dtype)
        if dlse is not None:
            self.like("dlse", dlse, forward.lse_shape, forward.lse_dtype)
        if stats is not None:
            self.like("stats", stats, (2, *forward.lse_shape), forward.lse_dtype)
        if self.device == "cuda":
            self.elements({"lse": lse, "dlse": dlse, "stats": stats})

    def out(
        self,
        out: Array,
        shape: tuple[int, ...],
        dtype: np.dtype,
        inputs: dict[str, Any],
    ) -> None:
        self.like("out", out, shape, dtype)
        self.contiguous_last_axis("out", out, to_write=True)
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            self.fail(ValueError, "out is read-only; expected an array that can be written")
        if overlaps_itself(out):
            self.fail(
                ValueError,
                f"out overlaps itself (strides {out.strides}); expected distinct elements",
            )
        for name, value in inputs.items():
            # Host lengths of a GPU's problem are copied there, and numbers have no memory.
            if isinstance(value, type(out)) and overlap(out, value):
                self.fail(ValueError, f"out overlaps {name}; expected memory of its own")

    def number(self, name: str, value: Any) -> float:
        if type(value) is not float and (
            isinstance(value, _BOOLS) or not isinstance(value, numbers.Real)
        ):
            self.fail(TypeError, f"{name} is {_shown(value)}; expected a real number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except Exception:  # a foreign object may raise anything
            self.fail(TypeError, f"{name} is a {type(value).__name__}; expected a real number")
        if not math.isfinite(number):
            self.fail(ValueError, f"{name} is {number}; expected a finite number")
        return number

    def factor(self, name: str, value: Any, dtype: np.dtype) -> float:
        number = self.number(name, value)
        fits = number == 0 or 1 / MAX_FACTOR <= abs(number) <= MAX_FACTOR
        if not fits and accumulator_dtype(dtype) == FLOAT32:
            self.fail(
                ValueError,
                f"{name} is {number}; expected 0, or a size from {1 / MAX_FACTOR:.0e} to "
                f"{MAX_FACTOR:.0e} where sums are float32",
            )
        return number

    def scale(self, scale: float | None, head_dim: int, dtype: np.dtype) -> float:
        return 1.0 / math.sqrt(head_dim) if scale is None else self.factor("scale", scale, dtype)

    def softcap(self, softcap: float | None, dtype: np.dtype) -> float:
        if softcap is None:
            return 0.0
        value = self.factor("softcap", softcap, dtype)
        if value < 0:
            self.fail(ValueError, f"softcap is {value}; expected a positive number, or 0 for none")
        return value

    def flag(self, name: str, value: Any) -> bool:
        if not isinstance(value, _BOOLS):
            self.fail(TypeError, f"{name} is {_shown(value)}; expected True or False")
        return bool(value)

    def integer(self, name: str, value: Any) -> int:
        if isinstance(value, _BOOLS) or not isinstance(value, numbers.Integral):
            self.fail(TypeError, f"{name} is {_shown(value)}; expected an integer")
        return int(value)

    def window(self, window: Any, causal: Any) -> tuple[int | None, int | None]:
        causal = self.flag("causal", causal)
        if window is None:
            return (None, 0 if causal else None)
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            self.fail(TypeError, f"window is {_shown(window)}; expected a pair (left, right)")
        left = self.window_side("window left", window[0])
        right = self.window_side("window right", window[1])
        return (left, 0 if causal else right)

    def window_side(self, name: str, side: Any) -> int | None:
        if side is None:
            return None
        keys = self.integer(name, side)
        if keys < 0:
            self.fail(ValueError, f"{name} is {keys}; expected 0 or more, or None for unbounded")
        return min(keys, 2 * MAX_OFFSET)  # reaches every key from every offset

    def offset(self, offset: Any, batch: int, name: str = "offset") -> int | Array | None:
        if offset is None:
            return None
        if isinstance(offset, np.ndarray) and offset.shape == ():
            offset = offset.item()
        if is_array(offset):
            return self.per_batch(name, offset, batch, -MAX_OFFSET, MAX_OFFSET)
        value = self.integer(name, offset)
        if abs(value) > MAX_OFFSET:
            self.fail(ValueError, f"{name} is {value}; expected at most 2^60 in size")
        return value

    def sequence(self, name: str, values: Any) -> np.ndarray:
        """A list, tuple or range of integers as an array; what they are is checked later."""
        try:
            if len(values) <= MAX_SEQUENCE:
                return np.asarray(values, dtype=None if len(values) else np.int64)
        except Exception:  # whatever the elements raise
            pass
        found = "range" if isinstance(values, range) else reprlib.repr(values)
        self.fail(TypeError, f"{name} is {found}; expected one integer per batch entry")

    def lengths(self, name: str, lengths: Any, batch: int, longest: int) -> Array | None:
        return None if lengths is None else self.per_batch(name, lengths, batch, 0, longest)

    def cu_seqlens(self, name: str, array: Any, tokens: int) -> Array:
        """Where each sequence starts and the last one ends: (B + 1,) integers."""
        if not is_array(array) or array.dtype.kind not in "iu":
            found = array.dtype if is_array(array) else type(array).__name__
            hint = _remedies.ORDER.get(self.function, "") if is_array(array) else ""
            self.fail(TypeError, f"{name} is {found}; expected an array of integers{hint}")
        if len(array.shape) != 1 or not array.shape[0]:
            self.fail(ValueError, f"{name} has shape {array.shape}; expected (sequences + 1,)")
        self.on_gpu(name, array)
        if isinstance(array, np.ndarray) or self.reads_device:
            self.never_decreasing(name, array, tokens)
        return array.astype(np.int64, copy=False) if isinstance(array, np.ndarray) else array

    def never_decreasing(self, name: str, array: Array, highest: int) -> None:
        """From 0 to at most `highest`; reads the values."""
        if int(array[0]):
            self.fail(
                ValueError,
                f"{name} starts at {int(array[0])}; expected 0, and then the running sums of the "
                "lengths",
            )
        falls = array[1:] < array[:-1]
        if falls.any():
            start = int(falls.argmax())
            before, after = int(array[start]), int(array[start + 1])
            self.fail(
                ValueError,
                f"{name} falls from {before} to {after} at sequence {start}; "
                "expected values that never decrease",
            )
        if int(array[-1]) > highest:
            self.fail(
                ValueError,
                f"{name} ends at {int(array[-1])}; expected at most {highest}, the tokens",
            )

    def same_batch(self, cu_seqlens_q: Array, cu_seqlens_k: Array) -> None:
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            self.fail(
                ValueError,
                f"cu_seqlens_k has shape {cu_seqlens_k.shape}, "
                f"cu_seqlens_q has {cu_seqlens_q.shape}; expected the same",
            )

    def per_batch(self, name: str, array: Any, batch: int, low: int, high: int) -> Array:
        if not is_array(array) or array.dtype.kind not in "iu":
            found = array.dtype if is_array(array) else type(array).__name__
            self.fail(TypeError, f"{name} is {found}; expected one integer per batch entry")
        if array.shape != (batch,):
            sums = array.shape == (batch + 1,) and isinstance(array, np.ndarray) and not array[0]
            hint = (
                " (sums of lengths go to attention_varlen)"
                if sums and name.endswith("lens")
                else ""
            )
            self.fail(
                ValueError,
                f"{name} has shape {array.shape}; expected ({batch},), one per batch entry{hint}",
            )
        self.on_gpu(name, array)
        self.values_within(name, array, low, high)
        return array.astype(np.int64, copy=False) if isinstance(array, np.ndarray) else array

    def mask(self, mask: Array, scores_shape: tuple[int, ...], name: str = "mask") -> Array:
        if not hasattr(mask, "dtype"):
            found = type(mask).__name__
            self.fail(TypeError, f"{name} is a {found}; expected a mask or a boolean array")
        if name == "mask" and mask.dtype.kind in "fV":  # bfloat16 among them
            self.fail(
                TypeError,
                f"mask is {mask.dtype}; expected bool (True: attend); numbers to add to the "
                "scores go to bias=",
            )
        self.booleans(name, mask)
        self.broadcastable(name, mask, scores_shape)
        return mask

    def booleans(self, name: str, array: Array) -> None:
        if array.dtype != np.bool_:
            hint = f", as {name.split()[-1]} != 0 is" if array.dtype.kind in "iu" else ""
            self.fail(TypeError, f"{name} is {array.dtype}; expected bool (True: attend){hint}")

    def integers(self, name: str, array: Array, shape: tuple[int, ...]) -> None:
        """An array of integers, of this shape and any values."""
        if array.dtype.kind not in "iu":
            self.fail(TypeError, f"{name} is {array.dtype}; expected integers")
        if array.shape != shape:
            self.fail(ValueError, f"{name} has shape {array.shape}; expected {shape}")
        self.on_gpu(name, array)
        if array.dtype == np.uint64:  # read as int64
            self.values_within(name, array, 0, 2**63 - 1)

    def intervals(
        self, name: str, array: Array, batch: int, heads: int, seqlen_q: int, seqlen_k: int
    ) -> None:
        """Row intervals per key column: (B, Hk or 1, Sk, 1 or 2), each end from 0 to Sq."""
        if array.dtype.kind not in "iu":
            self.fail(TypeError, f"{name} is {array.dtype}; expected integers")
        shape = array.shape
        fits = len(shape) == 4 and (shape[0], shape[2]) == (batch, seqlen_k)
        if not fits or shape[1] not in (1, heads) or shape[3] not in (1, 2):
            self.fail(
                ValueError,
                f"{name} has shape {shape}; expected ({batch}, {heads} or 1, {seqlen_k}, 1 or 2), "
                "(batch, k heads or 1, Sk, intervals)",
            )
        self.on_gpu(name, array)
        self.values_within(name, array, 0, seqlen_q)

    def same_shape(self, name: str, start: Array, end: Array) -> None:
        """The two arrays of `intervals`; `name` begins the message."""
        if start.shape != end.shape:
            self.fail(
                ValueError,
                f"{name}start has shape {tuple(start.shape)}, end has {tuple(end.shape)}; "
                "expected the same",
            )

    def blocks(self, name: str, array: Array, shape: tuple[int, int, int, int]) -> None:
        """A block mask: (nq, nk) or (B or 1, Hq or 1, nq, nk)."""
        self.booleans(name, array)
        batch, heads, rows, columns = shape
        found = array.shape
        fits = found[-2:] == (rows, columns) and (
            len(found) == 2
            or (len(found) == 4 and found[0] in (1, batch) and found[1] in (1, heads))
        )
        if not fits:
            self.fail(
                ValueError,
                f"{name} has shape {found}; expected ({rows}, {columns}) or "
                f"({batch} or 1, {heads} or 1, {rows}, {columns})",
            )

    def named_array(self, name: str, array: Array) -> None:
        """An array that a user's expression reads."""
        if array.dtype not in NAMED_DTYPES:
            names = ", ".join(map(str, NAMED_DTYPES))
            self.fail(TypeError, f"{name} is {array.dtype}; expected one of {names}")
        if not 1 <= array.ndim <= 4:
            self.fail(ValueError, f"{name} has {array.ndim} axes; expected 1 to 4")
        if not array.size:
            self.fail(ValueError, f"{name} has shape {array.shape}; expected no axis of length 0")
        if self.device == "cuda":
            self.elements({name: array})
            if max(array.shape) > MAX_INDEX:
                self.fail(
                    NotImplementedError,
                    f"{name} has shape {array.shape}; expected axes of at most {MAX_INDEX} "
                    "on a GPU",
                )

    def values_within(self, name: str, array: Array, low: int, high: int) -> None:
        # Device values cannot be read without waiting for the device: the kernels clamp them.
        if not (isinstance(array, np.ndarray) or self.reads_device) or not array.size:
            return
        for value in (int(array.min()), int(array.max())):
            if not low <= value <= high:
                self.fail(ValueError, f"{name} holds {value}; expected {low} to {high}")

    def alibi_slopes(self, slopes: Array | None, batch: int, heads: int) -> Array | None:
        if slopes is None:
            return None
        self.per_head("alibi_slopes", slopes, ((heads,), (batch, heads)))
        return slopes

    def sinks(self, sinks: Array | None, heads: int) -> Array | None:
        if sinks is None:
            return None
        self.per_head("sinks", sinks, ((heads,),))
        return sinks

    def per_head(self, name: str, array: Array, shapes: tuple[tuple[int, ...], ...]) -> None:
        """One floating number per query head."""
        if array.dtype not in DTYPES["cpu"]:
            names = ", ".join(map(str, DTYPES["cpu"]))
            self.fail(TypeError, f"{name} is {array.dtype}; expected one of {names}")
        if array.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            self.fail(
                ValueError, f"{name} has shape {array.shape}; expected {expected}, per query head"
            )
        self.on_gpu(name, array)

    def dropout(self, dropout: Any) -> float:
        rate = self.number("dropout", dropout)
        if not 0 <= rate < 1:
            self.fail(ValueError, f"dropout is {rate}; expected at least 0 and less than 1")
        return rate

    def seed(self, seed: Any, dropout: float) -> int:
        if seed is None:
            if dropout:
                self.fail(ValueError, "seed is None; expected an integer, with dropout")
            return 0
        value = self.integer("seed", seed)
        if not 0 <= value < 2**64:
            self.fail(ValueError, f"seed is {value}; expected 0 to 2^64 - 1")
        return value

    def bias(
        self, bias: Array | None, scores_shape: tuple[int, ...], dtype: np.dtype
    ) -> Array | None:
        if bias is None:
            return None
        allowed = (dtype, FLOAT32)
        if bias.dtype not in allowed:
            names = " or ".join(dict.fromkeys(map(str, allowed)))
            hint = "; True and False go to mask=" if bias.dtype == np.bool_ else ""
            self.fail(TypeError, f"bias is {bias.dtype}; expected {names}{hint}")
        self.broadcastable("bias", bias, scores_shape)
        return bias

    def tree(self, rules: int, depth: int) -> None:
        """How much is joined in one mask."""
        if rules > MAX_RULES or depth > MAX_DEPTH:
            self.fail(
                ValueError,
                f"the mask joins {rules} rules, {depth} deep; expected at most {MAX_RULES} rules, "
                f"{MAX_DEPTH} deep (rules of one kind may be one array: dense, blocks, documents)",
            )

    def attachments(self, count: int) -> None:
        """What a mask and a score function hand to a kernel: rules and named arrays."""
        if self.device == "cuda" and count > MAX_ATTACHMENTS:
            self.fail(
                NotImplementedError,
                f"mask and score_mod have {count} rules and named arrays; expected at most "
                f"{MAX_ATTACHMENTS} on a GPU (the cpu backend takes any)",
            )

    def broadcastable(self, name: str, array: Array, scores_shape: tuple[int, ...]) -> None:
        def fits(shape: tuple[int, ...]) -> bool:
            pairs = zip(shape[::-1], scores_shape[::-1], strict=False)
            return len(shape) <= 4 and all(n in (1, full) for n, full in pairs)

        if not fits(array.shape):
            hint = _remedies.view(name, array.shape, fits, _remedies.OF_SCORES, "does")
            self.fail(
                ValueError,
                f"{name} has shape {array.shape}; "
                f"expected one that broadcasts to (batch, q heads, Sq, Sk) = {scores_shape}{hint}",
            )


def _shown(value: Any) -> str:
    """A wrong value for a message: short, and without reading what lies on a device."""
    name = type(value).__name__
    return name if is_array(value) else f"{reprlib.repr(value)} ({name})"
