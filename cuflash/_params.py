"""The bytes of kernels_cu/params.cuh: a problem and its arrays, packed for one launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

from cuflash._overlap import address
from cuflash._problem import Array, GradientProblem, Problem

_PROBLEM = "3Q3q6iIi2i4f"
_TENSOR = "Q3q"
_FORWARD = Struct(_PROBLEM + 4 * _TENSOR + "Q2i")
_BACKWARD = Struct(_PROBLEM + 8 * _TENSOR + "6Q")
TENSOR_MAP_BYTES = 128  # of a CUtensorMap
FORWARD_BYTES = _FORWARD.size
BACKWARD_BYTES = _BACKWARD.size
FORWARD_SM90_BYTES = 4 * TENSOR_MAP_BYTES + -(-FORWARD_BYTES // 64) * 64
BACKWARD_SM90_BYTES = 6 * TENSOR_MAP_BYTES + -(-BACKWARD_BYTES // 64) * 64

# Beyond any offset and length, and far enough from the ends of 64 bits to be added to them.
_UNBOUNDED = 1 << 61
_TMA_STRIDE_LIMIT = 1 << 40
_WARPGROUP_ROWS = 64
_LOG2_E = math.log2(math.e)


class TensorMap(NamedTuple):
    """What cuTensorMapEncodeTiled is told of 16-bit elements; axes from the innermost outwards."""

    address: int
    extents: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes, of all axes but the first
    box: tuple[int, ...]  # elements that one copy moves

    @property
    def swizzle_bytes(self) -> int:
        """A panel of 64 or 32 columns is as wide as the swizzle."""
        return 2 * self.box[0]


Encoder = Callable[[TensorMap], bytes]


def pack_forward(problem: Problem, out: Array, lse: Array, heads_per_section: int) -> bytes:
    """ForwardParams."""
    return _FORWARD.pack(
        *_problem(problem),
        *_tensor(problem.q),
        *_tensor(problem.k),
        *_tensor(problem.v),
        *_tensor(out),
        address(lse),
        heads_per_section,
        0,
    )


def pack_forward_sm90(
    problem: Problem,
    out: Array,
    lse: Array,
    heads_per_section: int,
    panels: tuple[int, int],
    block_kv: int,
    encode: Encoder,
) -> bytes:
    """ForwardParamsSm90; `panels`: columns of a panel of q and k, of v and out."""
    maps = (
        row_map(problem.q, _WARPGROUP_ROWS, panels[0]),
        row_map(problem.k, block_kv, panels[0]),
        row_map(problem.v, block_kv, panels[1]),
        store_map(out, _WARPGROUP_ROWS, panels[1]),
    )
    params = b"".join(map(encode, maps)) + pack_forward(problem, out, lse, heads_per_section)
    return params.ljust(FORWARD_SM90_BYTES, b"\0")


def pack_backward(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    workspace: tuple[Array, Array, Array, Array],
) -> bytes:
    """BackwardParams; `workspace` is lse_log2, delta, dq_acc and turns."""
    problem = gradient.forward
    tensors = (problem.q, problem.k, problem.v, gradient.out, gradient.dout, *grads)
    return _BACKWARD.pack(
        *_problem(problem),
        *(field for tensor in tensors for field in _tensor(tensor)),
        address(gradient.lse),
        0 if gradient.dlse is None else address(gradient.dlse),
        *(address(array) for array in workspace),
    )


def layout(problem: Problem, out: Array) -> tuple[Any, ...]:
    """All that a forward plan depends on: equal layouts have equal plans."""
    q, k, v = problem.q, problem.k, problem.v
    low_bits = (address(q) | address(k) | address(v) | address(out)) % 16
    arrays = (q.shape, q.strides, k.shape, k.strides, v.shape, v.strides, out.strides)
    return (*arrays, low_bits, q.dtype, problem.scale > 0, problem.softcap > 0)


def alignment(*arrays: Array) -> int:
    """The largest power of two, at most 16, that divides the address of every row."""
    bits = 16
    for array in arrays:
        bits |= address(array)
        for stride, size in zip(array.strides[:3], array.shape[:3], strict=True):
            if size > 1:
                bits |= stride
    return bits & -bits


def pack_backward_sm90(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    call: bytes,
    tile: tuple[int, int],
    panels: tuple[int, int, int],
    encode: Encoder,
) -> bytes:
    """BackwardParamsSm90; `call`: pack_backward's, `tile`: its queries and keys.

    `panels`: columns of a panel of q and dk, of k, of v, dout and dv.
    """
    problem = gradient.forward
    block_q, block_kv = tile
    maps = (
        row_map(problem.q, block_q, panels[0]),
        row_map(problem.k, block_kv, panels[1]),
        row_map(problem.v, block_kv, panels[2]),
        row_map(gradient.dout, block_q, panels[2]),
        store_map(grads[1], _WARPGROUP_ROWS, panels[0]),
        store_map(grads[2], _WARPGROUP_ROWS, panels[2]),
    )
    return (b"".join(map(encode, maps)) + call).ljust(BACKWARD_SM90_BYTES, b"\0")


def tma_obstacle(arrays: dict[str, Array]) -> str:
    """Why TMA cannot move one of these arrays; empty where it can move all."""
    for name, array in arrays.items():
        if not array.size:
            return f"{name} is empty"
        if address(array) % 16:
            return f"{name} starts at an address that is no multiple of 16 bytes"
        for axis in range(3):
            stride, size = array.strides[axis], array.shape[axis]
            if size > 1 and (stride % 16 or not 0 < stride < _TMA_STRIDE_LIMIT):
                return f"{name} has stride {stride} bytes in axis {axis}, no multiple of 16 above 0"
        if address(array) < array.shape[1] * array.strides[1]:
            return f"{name} starts too low for a map that counts from before it"
    return ""


def row_map(array: Array, rows: int, panel: int) -> TensorMap:
    """A (B, S, H, D) array, of which the first `length` rows are read and zeros after them.

    Axes: column, S - length + row, length, head, batch. The second and the third advance by a row
    and count from S rows before the array, so the first row beyond the length is out of bounds.
    """
    return _row_map(address(array), array.shape, array.strides, rows, panel)


def store_map(array: Array, rows: int, panel: int) -> TensorMap:
    """A (B, S, H, D) array; axes: column, row, head, batch."""
    return _store_map(address(array), array.shape, array.strides, rows, panel)


# Kept for warm calls: allocators give the same addresses again and again.
_MAPS = 4096


@lru_cache(maxsize=_MAPS)
def _row_map(
    first: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, panel: int
) -> TensorMap:
    batch, seq, heads, cols = shape
    batch_stride, row_stride, head_stride = _tma_strides(shape, strides)
    return TensorMap(
        first - seq * row_stride,
        (cols, seq, seq + 1, heads, batch),
        (row_stride, row_stride, head_stride, batch_stride),
        (panel, rows, 1, 1, 1),
    )


@lru_cache(maxsize=_MAPS)
def _store_map(
    first: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, panel: int
) -> TensorMap:
    batch, seq, heads, cols = shape
    batch_stride, row_stride, head_stride = _tma_strides(shape, strides)
    return TensorMap(
        first,
        (cols, seq, heads, batch),
        (row_stride, head_stride, batch_stride),
        (panel, rows, 1, 1),
    )


def _tma_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Of the first three axes; those of one element get a stride that no row reaches across."""
    beyond = -(-2 * shape[3] // TENSOR_MAP_BYTES) * TENSOR_MAP_BYTES
    sizes = zip(strides[:3], shape[:3], strict=True)
    return [stride if size > 1 else beyond for stride, size in sizes]


def _tensor(array: Array) -> tuple[int, int, int, int]:
    itemsize = array.itemsize
    batch, seq, head, _ = array.strides
    return address(array), batch // itemsize, seq // itemsize, head // itemsize


def _problem(problem: Problem) -> tuple[Any, ...]:
    left, right = problem.window
    scale, softcap = problem.scale, problem.softcap
    offset = problem.offset
    offset_is_array = offset is not None and not isinstance(offset, int)
    scale_log2 = scale * _LOG2_E
    return (
        0 if problem.q_lens is None else address(problem.q_lens),
        0 if problem.kv_lens is None else address(problem.kv_lens),
        address(offset) if offset_is_array else 0,
        _bounded(offset) if isinstance(offset, int) else 0,
        _UNBOUNDED if left is None else _bounded(left),
        _UNBOUNDED if right is None else _bounded(right),
        int(isinstance(offset, int)),
        problem.batch,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.heads_k,
        problem.group,
        *_division(problem.group),
        problem.head_dim,
        problem.head_dim_v,
        scale,
        scale_log2,
        scale / softcap if softcap else 0.0,
        softcap * _LOG2_E,
    )


def _division(divisor: int) -> tuple[int, int]:
    """Magic and shift: n // divisor = n * magic >> 32 >> shift for 0 <= n < 2^31, 1 < divisor.

    T. Granlund, P. L. Montgomery, "Division by Invariant Integers using Multiplication", 1994.
    """
    if divisor == 1:
        return 0, 0
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift - 1


def _bounded(value: int) -> int:
    return max(-_UNBOUNDED, min(_UNBOUNDED, value))
