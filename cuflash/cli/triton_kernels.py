"""Attention in Triton, by the loops of its tutorial: a peer for `bench`, and work for the emulator.

Tensors are (B, S, H, D), contiguous; lse (to the base 2) and delta are (B, H, S) in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,  # log2(e) times the scale
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
    q_start = tl.program_id(0) * BLOCK_Q
    q_rows = q_start + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, HEAD_DIM)
    q_offsets = base + q_rows[:, None] * row_stride + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_rows[:, None] < seqlen, other=0.0)

    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    # Blocks of keys that every query sees need no mask; the others come last.
    seen_by_all = (tl.minimum(q_start, seqlen) if CAUSAL else seqlen) // BLOCK_KV * BLOCK_KV
    kv_end = tl.minimum(q_start + BLOCK_Q, seqlen) if CAUSAL else seqlen
    for masked in tl.static_range(2):
        start = seen_by_all if masked else 0
        end = kv_end if masked else seen_by_all
        for kv_start in range(start, end, BLOCK_KV):
            kv_rows = kv_start + tl.arange(0, BLOCK_KV)
            kv_offsets = base + kv_rows[:, None] * row_stride + channels[None, :]
            if masked:
                k = tl.load(k_ptr + kv_offsets, mask=kv_rows[:, None] < seqlen, other=0.0)
                v = tl.load(v_ptr + kv_offsets, mask=kv_rows[:, None] < seqlen, other=0.0)
                scores = tl.dot(q, tl.trans(k))
                visible = kv_rows[None, :] < seqlen
                if CAUSAL:
                    visible = visible & (q_rows[:, None] >= kv_rows[None, :])
                scores = tl.where(visible, scores, float("-inf"))
            else:
                k = tl.load(k_ptr + kv_offsets)
                v = tl.load(v_ptr + kv_offsets)
                scores = tl.dot(q, tl.trans(k))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            probs = tl.exp2(scores * scale_log2 - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(probs, 1)
            row_max = new_max
            acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_offsets, out, mask=q_rows[:, None] < seqlen)
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + batch_head * seqlen + q_rows, lse, mask=q_rows < seqlen)


@triton.jit
def attention_delta(
    out_ptr,
    dout_ptr,
    delta_ptr,
    seqlen,
    heads,
    row_stride,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """delta = rowsum(out * dout), what backward subtracts from the gradient of probabilities."""
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    base = batch * seqlen * row_stride + (batch_head % heads) * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offsets = base + rows[:, None] * row_stride + tl.arange(0, HEAD_DIM)[None, :]
    out = tl.load(out_ptr + offsets, mask=rows[:, None] < seqlen, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=rows[:, None] < seqlen, other=0.0).to(tl.float32)
    tl.store(delta_ptr + batch_head * seqlen + rows, tl.sum(out * dout, 1), mask=rows < seqlen)


@triton.jit
def attention_backward(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,  # float32, zeroed by the caller
    dk_ptr,
    dv_ptr,
    scale,
    scale_log2,  # log2(e) times the scale
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
        lse = tl.load(lse_ptr + batch_head * seqlen + q_rows, mask=q_valid, other=0.0)
        delta = tl.load(delta_ptr + batch_head * seqlen + q_rows, mask=q_valid, other=0.0)

        visible = (kv_rows[None, :] < seqlen) & q_valid[:, None]
        if CAUSAL:
            visible = visible & (q_rows[:, None] >= kv_rows[None, :])
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        probs = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(probs.to(dout.dtype)), dout, dv)
        dprobs = tl.dot(dout, tl.trans(v))
        dscores = (probs * (dprobs - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, dk)
        tl.atomic_add(dq_ptr + q_offsets, tl.dot(dscores, k) * scale, mask=q_valid[:, None])

    tl.store(dk_ptr + kv_offsets, dk * scale, mask=kv_valid)
    tl.store(dv_ptr + kv_offsets, dv, mask=kv_valid)
