"""What `bench` times: cuflash and the peers that are installed beside it, on the same arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.timing import Contender, HostClock, StreamClock, measure

OURS = "cuflash"
JAX_QUEUE = 10  # calls in flight, so that JAX's dispatch hides behind the kernels


Factory = Callable[[Cell, Inputs], Contender]


def gpu_contenders(cupy: Any) -> dict[str, Factory]:
    """By name; a factory fails where its library is absent or cannot do the cell."""
    clock = StreamClock(cupy)
    wait_for_all = cupy.cuda.runtime.deviceSynchronize
    return {
        OURS: partial(_cuflash, clock),
        "torch cudnn": partial(_torch_sdpa, clock, "CUDNN_ATTENTION"),
        "torch flash": partial(_torch_sdpa, clock, "FLASH_ATTENTION"),
        "torch efficient": partial(_torch_sdpa, clock, "EFFICIENT_ATTENTION"),
        "torch flex": partial(_torch_flex, clock),
        "jax cudnn": partial(_jax_cudnn, wait_for_all),
        "triton": partial(_triton, clock),
    }


def cpu_contenders() -> dict[str, Factory]:
    """By name, for NumPy arrays."""
    return {OURS: partial(_cuflash, HostClock()), "torch": partial(_torch_cpu, HostClock())}


def gemm_tflops_gpu(cupy: Any, size: int = 8192) -> tuple[float, str]:
    """Rate of a square bfloat16 matrix product of normal numbers, and whose product it is."""
    try:
        import torch

        normal = partial(torch.randn, size, size, device="cuda", dtype=torch.bfloat16)
        product, whose = partial(torch.matmul, normal(), normal()), "torch bfloat16"
    except (ImportError, AssertionError):  # no torch, or one without CUDA
        rng = cupy.random.default_rng(0)
        a, b = (rng.standard_normal((size, size), np.float32).astype(np.float16) for _ in range(2))
        product, whose = partial(cupy.matmul, a, b), "cupy float16"
    return _tflops(Contender(product, StreamClock(cupy)), size), whose


def gemm_tflops_cpu(size: int = 2048) -> tuple[float, str]:
    """Rate of NumPy's square float32 matrix product."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    return _tflops(Contender(lambda: a @ b, HostClock()), size), "numpy float32"


def _tflops(contender: Contender, size: int) -> float:
    timing = measure({"gemm": contender}, seconds=1.0)["gemm"]
    return 2 * size**3 / timing.median_ms / 1e9


def _cuflash(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    if cell.direction == "forward":
        return Contender(partial(cuflash.attention, q, k, v, causal=cell.causal), clock)
    if cell.direction == "backward":
        out, lse = cuflash.attention(q, k, v, causal=cell.causal, return_lse=True)
        backward = partial(cuflash.attention_backward, dout, q, k, v, out, lse, causal=cell.causal)
        return Contender(backward, clock)

    def both() -> Any:
        _, pullback = cuflash.attention_vjp(q, k, v, causal=cell.causal)
        return pullback(dout)

    return Contender(both, clock)


def _torch_sdpa(clock: Any, backend: str, cell: Cell, inputs: Inputs) -> Contender:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=cell.causal)

    return _torch(clock, attention, cell, inputs)


def _torch_flex(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else a limit on recompiles turns later cells to eager execution
    mask = None
    if cell.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, cell.seqlen, cell.seqlen)
    attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    return _torch(clock, attention, cell, inputs)


def _torch_cpu(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    from torch.nn.functional import scaled_dot_product_attention

    return _torch(clock, partial(scaled_dot_product_attention, is_causal=cell.causal), cell, inputs)


def _torch(clock: Any, attention: Callable[..., Any], cell: Cell, inputs: Inputs) -> Contender:
    """Torch's functions take (B, H, S, D): views of the same memory."""
    import torch

    q, k, v, dout = (
        torch.from_dlpack(x).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    if cell.direction == "forward":
        return Contender(torch.no_grad()(partial(attention, q, k, v)), clock)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if cell.direction == "backward":
        out = attention(*leaves)
        gradients = partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
        return Contender(gradients, clock)
    return Contender(lambda: torch.autograd.grad(attention(*leaves), leaves, dout), clock)


def _jax_cudnn(wait_for_all: Callable[[], None], cell: Cell, inputs: Inputs) -> Contender:
    """JAX runs on streams of its own, so its calls are timed by the host's clock."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    attention = partial(jax.nn.dot_product_attention, is_causal=cell.causal, implementation="cudnn")
    q, k, v, dout = map(jax.dlpack.from_dlpack, (inputs.q, inputs.k, inputs.v, inputs.dout))
    clock = HostClock(JAX_QUEUE, idle=wait_for_all, wait=jax.block_until_ready)
    if cell.direction == "forward":
        return Contender(partial(jax.jit(attention), q, k, v), clock)
    _, pullback = jax.vjp(attention, q, k, v)
    return Contender(partial(jax.jit(lambda pull, g: pull(g)), pullback, dout), clock)


def _triton(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    from cuflash.cli import triton_peer  # needs Triton and torch

    return triton_peer.contender(clock, cell, inputs)
