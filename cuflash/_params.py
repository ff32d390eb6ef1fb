"""The bytes of kernels_cu/params.cuh: a problem and its arrays, packed for one launch."""

from __future__ import annotations

import math
from struct import Struct
from typing import Any

from cuflash._overlap import address
from cuflash._problem import Array, GradientProblem, Problem

_PROBLEM = "3Q3q6iIi2i4f"
_TENSOR = "Q3q"
_FORWARD = Struct(_PROBLEM + 4 * _TENSOR + "Q2i")
_BACKWARD = Struct(_PROBLEM + 8 * _TENSOR + "6Q")
FORWARD_BYTES = _FORWARD.size
BACKWARD_BYTES = _BACKWARD.size

# Beyond any offset and length, and far enough from the ends of 64 bits to be added to them.
_UNBOUNDED = 1 << 61
_LOG2_E = math.log2(math.e)


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


def alignment(*arrays: Array) -> int:
    """The largest power of two, at most 16, that divides the address of every row."""
    bits = 16
    for array in arrays:
        bits |= address(array)
        for stride, size in zip(array.strides[:3], array.shape[:3], strict=True):
            if size > 1:
                bits |= stride
    return bits & -bits


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
