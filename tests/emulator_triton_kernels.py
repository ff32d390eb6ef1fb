"""Triton kernels whose PTX exercises the emulator, and their compilation without GPU or driver.

Matrices are row-major. Kernels of attention come from cuflash.cli.triton_kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a launch needs to know about one compiled Triton kernel."""

    ptx: str
    smem_bytes: int
    threads: int
    tensor_descriptors: list[dict[str, Any]]


def compile_ptx(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile `kernel` for sm_<capability>.

    `signature` types the runtime arguments in Triton's spelling. Pointers and the arguments called
    `*_stride` are promised to be multiples of 16: without that Triton emits no cp.async.
    """
    divisible = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("_stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(
        ptx=binary.asm["ptx"],
        smem_bytes=binary.metadata.shared,
        threads=32 * num_warps,
        tensor_descriptors=getattr(binary.metadata, "tensordesc_meta", None) or [],
    )


@triton.jit
def matmul(
    a_ptr,  # [m, k], or [k, m] if TRANSPOSE_A
    b_ptr,  # [k, n], or [n, k] if TRANSPOSE_B
    out_ptr,  # [m, n] float32
    k_size,
    a_stride,
    b_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    A_IN_REGISTERS: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """out = a @ b for sizes that the blocks divide (out = 2 a @ b if A_IN_REGISTERS)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    if TRANSPOSE_A:
        a_ptrs = a_ptr + rows[:, None] + depth[None, :] * a_stride
    else:
        a_ptrs = a_ptr + rows[:, None] * a_stride + depth[None, :]
    if TRANSPOSE_B:
        b_ptrs = b_ptr + depth[:, None] + columns[None, :] * b_stride
    else:
        b_ptrs = b_ptr + depth[:, None] * b_stride + columns[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, k_size, BLOCK_K):
        a = tl.load(a_ptrs)
        b = tl.load(b_ptrs)
        if A_IN_REGISTERS:
            # Arithmetic on A keeps it in registers, so that wgmma takes its register form.
            a = (a.to(tl.float32) * 2).to(a.dtype)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * a_stride if TRANSPOSE_A else BLOCK_K
        b_ptrs += BLOCK_K if TRANSPOSE_B else BLOCK_K * b_stride

    out_ptrs = out_ptr + rows[:, None] * out_stride + columns[None, :]
    if ATOMIC:
        tl.atomic_add(out_ptrs, acc)
    else:
        tl.store(out_ptrs, acc)


@triton.jit
def matmul_tma(
    a_map,  # [m, k]
    b_map,  # [k, n], or [n, k] if TRANSPOSE_B
    out_map,  # [m, n]
    k_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """out = a @ b, or out += a @ b if REDUCE; the blocks may overhang every edge."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, k_size, BLOCK_K):
        a = a_map.load([row, k])
        b = b_map.load([column, k]).T if TRANSPOSE_B else b_map.load([k, column])
        acc = tl.dot(a, b, acc)
    if REDUCE:
        out_map.atomic_add([row, column], acc.to(out_map.dtype))
    else:
        out_map.store([row, column], acc.to(out_map.dtype))
