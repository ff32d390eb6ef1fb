"""Triton kernels whose PTX exercises the emulator, and their compilation without GPU or driver.

Shapes: matrices are row-major; attention tensors are (B, S, H, D), statistics are (B, H, S).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LOG2_E = 1.4426950408889634


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


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32, natural logarithm
    scale_log2,
    seqlen,
    heads,
    row_stride,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Attention by online softmax, one block of queries per program."""
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    base = batch * seqlen * row_stride + (batch_head % heads) * HEAD_DIM
    q_rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, HEAD_DIM)
    q_offsets = base + q_rows[:, None] * row_stride + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_rows[:, None] < seqlen, other=0.0)

    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    kv_end = tl.minimum((tl.program_id(0) + 1) * BLOCK_Q, seqlen) if CAUSAL else seqlen
    for kv_start in range(0, kv_end, BLOCK_KV):
        kv_rows = kv_start + tl.arange(0, BLOCK_KV)
        kv_offsets = base + kv_rows[:, None] * row_stride + channels[None, :]
        k = tl.load(k_ptr + kv_offsets, mask=kv_rows[:, None] < seqlen, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        visible = kv_rows[None, :] < seqlen
        if CAUSAL:
            visible = visible & (q_rows[:, None] >= kv_rows[None, :])
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        row_max = new_max
        v = tl.load(v_ptr + kv_offsets, mask=kv_rows[:, None] < seqlen, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_offsets, out, mask=q_rows[:, None] < seqlen)
    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453  # ln 2
    tl.store(lse_ptr + batch_head * seqlen + q_rows, lse, mask=q_rows < seqlen)


@triton.jit
def attention_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,  # log-sum-exp of the scores to the base 2
    delta_ptr,  # rowsum(out * dout)
    dq_ptr,  # float32, zeroed by the caller
    dk_ptr,
    dv_ptr,
    scale,
    scale_log2,
    seqlen,
    heads,
    row_stride,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Gradients of attention, one block of keys per program; dq is summed by atomics."""
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    base = batch * seqlen * row_stride + (batch_head % heads) * HEAD_DIM
    kv_rows = tl.program_id(0) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    channels = tl.arange(0, HEAD_DIM)
    kv_offsets = base + kv_rows[:, None] * row_stride + channels[None, :]
    kv_valid = kv_rows[:, None] < seqlen
    k = tl.load(k_ptr + kv_offsets, mask=kv_valid, other=0.0)
    v = tl.load(v_ptr + kv_offsets, mask=kv_valid, other=0.0)

    dk = tl.zeros((BLOCK_KV, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_KV, HEAD_DIM), tl.float32)
    q_start = (tl.program_id(0) * BLOCK_KV // BLOCK_Q) * BLOCK_Q if CAUSAL else 0
    for q_block in range(q_start, seqlen, BLOCK_Q):
        q_rows = q_block + tl.arange(0, BLOCK_Q)
        q_valid = q_rows < seqlen
        q_offsets = base + q_rows[:, None] * row_stride + channels[None, :]
        q = tl.load(q_ptr + q_offsets, mask=q_valid[:, None], other=0.0)
        dout = tl.load(dout_ptr + q_offsets, mask=q_valid[:, None], other=0.0)
        lse_log2 = tl.load(lse_log2_ptr + batch_head * seqlen + q_rows, mask=q_valid, other=0.0)
        delta = tl.load(delta_ptr + batch_head * seqlen + q_rows, mask=q_valid, other=0.0)

        visible = (kv_rows[None, :] < seqlen) & q_valid[:, None]
        if CAUSAL:
            visible = visible & (q_rows[:, None] >= kv_rows[None, :])
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        probs = tl.where(visible, tl.exp2(scores - lse_log2[:, None]), 0.0)
        dv = tl.dot(tl.trans(probs.to(dout.dtype)), dout, dv)
        dprobs = tl.dot(dout, tl.trans(v))
        dscores = (probs * (dprobs - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, dk)
        tl.atomic_add(dq_ptr + q_offsets, tl.dot(dscores, k) * scale, mask=q_valid[:, None])

    tl.store(dk_ptr + kv_offsets, dk * scale, mask=kv_valid)
    tl.store(dv_ptr + kv_offsets, dv, mask=kv_valid)
