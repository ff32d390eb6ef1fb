"""What `bench` times: cuflash and the peers that are installed beside it, on the same arrays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.timing import Clock, Contender, HostClock, StreamClock, measure
from cuflash.masks import Mask

OURS = "cuflash"
COMPILED = "cuflash compiled"  # its mask is classified before the timing
DENSE = "cuflash dense"  # all pairs visible, no bias
DOCUMENTS = "cuflash documents"  # packed sequences as a mask over all tokens
OWN = (OURS, COMPILED, DENSE, DOCUMENTS)
SPINNING_SECONDS = 0.01  # OpenMP's threads wait so long for more work, on cores of others
JAX_QUEUE = 10  # calls in flight, so that JAX's dispatch hides behind the kernels
HOST_QUEUE = 200  # small calls, so many that the wait at their end is none


CPU_CLOCK = HostClock(idle=partial(time.sleep, SPINNING_SECONDS))
Factory = Callable[[Cell, Inputs], Contender]


def gpu_contenders(cupy: Any) -> dict[str, Factory]:
    """By name; a factory fails where its library is absent or cannot do the cell."""
    return _gpu_contenders(cupy, StreamClock(cupy))


def gpu_host_contenders(cupy: Any) -> dict[str, Factory]:
    """The same by the host's clock, for calls on which the GPU spends less time than the host."""
    wait = cupy.cuda.runtime.deviceSynchronize
    return _gpu_contenders(cupy, HostClock(HOST_QUEUE, idle=wait, wait=lambda result: wait()))


def _gpu_contenders(cupy: Any, clock: Clock) -> dict[str, Factory]:
    return {
        OURS: partial(_cuflash, clock),
        "torch cudnn": partial(_torch_sdpa, clock, "CUDNN_ATTENTION"),
        "torch flash": partial(_torch_sdpa, clock, "FLASH_ATTENTION"),
        "torch efficient": partial(_torch_sdpa, clock, "EFFICIENT_ATTENTION"),
        "torch flex": partial(_torch_flex, clock),
        "jax cudnn": partial(_jax, "cudnn", cupy.cuda.runtime.deviceSynchronize),
        "triton": partial(_triton, clock),
    }


def gpu_mask_contenders(cupy: Any) -> dict[str, Factory]:
    """Ours, and those of them that take masks and a bias."""
    every = gpu_contenders(cupy)
    names = ("torch flex", "torch efficient", "torch cudnn", "jax cudnn")
    return _own(StreamClock(cupy)) | {name: every[name] for name in names}


def gpu_packed_contenders(cupy: Any) -> dict[str, Factory]:
    """Ours, and torch's two ways with sequences of several lengths."""
    clock = StreamClock(cupy)
    return _own_packed(clock, cupy.asarray) | {
        "torch varlen": partial(_torch_varlen, clock),
        "torch padded": partial(_torch_padded, clock),
    }


def cpu_contenders() -> dict[str, Factory]:
    """By name, for NumPy arrays."""
    return {OURS: partial(_cuflash, CPU_CLOCK), "torch": partial(_torch_cpu, CPU_CLOCK)}


def cpu_mask_contenders() -> dict[str, Factory]:
    """Likewise, for masks."""
    return _own(CPU_CLOCK) | {"torch": partial(_torch_cpu, CPU_CLOCK)}


def cpu_packed_contenders() -> dict[str, Factory]:
    """Likewise, for packed sequences."""
    own = _own_packed(CPU_CLOCK, np.asarray)
    return own | {"torch by sequence": partial(_torch_by_sequence, CPU_CLOCK)}


def _own(clock: Any) -> dict[str, Factory]:
    return {
        OURS: partial(_cuflash, clock),
        COMPILED: partial(_cuflash_compiled, clock),
        DENSE: lambda cell, inputs: _cuflash(clock, cell.dense, inputs),
    }


def _own_packed(clock: Any, asarray: Callable[[np.ndarray], Any]) -> dict[str, Factory]:
    return {OURS: partial(_cuflash_packed, clock, asarray), DOCUMENTS: partial(_cuflash, clock)}


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
    return _tflops(Contender(lambda: a @ b, CPU_CLOCK), size), "numpy float32"


def _tflops(contender: Contender, size: int) -> float:
    timing = measure({"gemm": contender}, seconds=1.0)["gemm"]
    return 2 * size**3 / timing.median_ms / 1e9


def _cuflash(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    mask = cell.rule.mask(**inputs.of_rule) if cell.rule else None
    return _cuflash_with(mask, clock, cell, inputs)


def _cuflash_compiled(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    if cell.rule is None:
        raise ValueError("the cell has no mask to compile")
    mask = cell.rule.mask(**inputs.of_rule).compile(inputs.q, inputs.k)
    return _cuflash_with(mask, clock, cell, inputs)


def _cuflash_with(mask: Mask | None, clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    options = {"causal": cell.causal, "mask": mask}
    options |= {"bias": inputs.bias} if cell.bias else {}
    learned = cell.bias == "learned"
    functions = (
        partial(cuflash.attention, **options),
        partial(cuflash.attention_backward, bias_gradient=learned, **options),
        partial(cuflash.attention_vjp, bias_gradient=learned, **options),
    )
    arrays = (inputs.q, inputs.k, inputs.v)
    return _directed(clock, cell.direction, functions, arrays, inputs.dout)


def _cuflash_packed(
    clock: Any, asarray: Callable[[np.ndarray], Any], cell: Cell, inputs: Inputs
) -> Contender:
    functions = (
        partial(cuflash.attention_varlen, causal=cell.causal),
        partial(cuflash.attention_varlen_backward, causal=cell.causal),
        partial(cuflash.attention_varlen_vjp, causal=cell.causal),
    )
    cu_seqlens = asarray(cell.rule.cu_seqlens)
    arrays = (inputs.q[0], inputs.k[0], inputs.v[0], cu_seqlens, cu_seqlens)
    return _directed(clock, cell.direction, functions, arrays, inputs.dout[0])


def _directed(
    clock: Any,
    direction: str,
    functions: tuple[Callable[..., Any], ...],  # forward, backward, vjp
    arrays: tuple[Any, ...],
    dout: Any,
) -> Contender:
    forward, backward, vjp = functions
    if direction == "forward":
        return Contender(partial(forward, *arrays), clock)
    if direction == "backward":
        out, lse = forward(*arrays, return_lse=True)
        return Contender(partial(backward, dout, *arrays, out, lse), clock)

    def both() -> Any:
        _, pullback = vjp(*arrays)
        return pullback(dout)

    return Contender(both, clock)


def _torch_sdpa(clock: Any, backend: str, cell: Cell, inputs: Inputs) -> Contender:
    term = _torch_term(cell, inputs)
    attention = _sdpa(backend, attn_mask=term, is_causal=cell.causal and term is None)
    return _torch(clock, attention, cell, inputs, term)


def _sdpa(backend: str, **options: Any) -> Callable[..., Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, **options)

    return attention


def _torch_varlen(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    import torch
    from torch.nn.attention.varlen import varlen_attn  # absent from older torch

    arrays = [torch.from_dlpack(x)[0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    cu_seqlens = torch.from_numpy(cell.rule.cu_seqlens).to(arrays[0].device)
    options = {"cu_seq_q": cu_seqlens, "cu_seq_k": cu_seqlens}
    options |= dict.fromkeys(("max_q", "max_k"), max(cell.rule.lengths))
    # Only where it is needed: the first torch with varlen_attn has is_causal in its place.
    options |= {"window_size": (-1, 0)} if cell.causal else {}
    return _torch_directed(clock, partial(varlen_attn, **options), cell.direction, arrays)


def _torch_padded(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    """Flash attention over sequences made equally long by zeros behind them.

    It takes no lengths: where nothing is causal, a shorter sequence sees its zeros, which changes
    its numbers and not the time.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(x: Any) -> Any:
        sequences = torch.from_dlpack(x)[0].split(list(cell.rule.lengths))
        return pad_sequence(sequences, batch_first=True).transpose(1, 2)

    arrays = [padded(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    attention = _sdpa("FLASH_ATTENTION", is_causal=cell.causal)
    return _torch_directed(clock, attention, cell.direction, arrays)


def _torch_by_sequence(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    lengths = list(cell.rule.lengths)

    def attention(*arrays: Any) -> Any:
        sequences = zip(*(x.split(lengths, dim=2) for x in arrays), strict=True)
        outs = [scaled_dot_product_attention(*x, is_causal=cell.causal) for x in sequences]
        return torch.cat(outs, dim=2)

    return _torch(clock, attention, cell, inputs)


def _torch_cpu(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    from torch.nn.functional import scaled_dot_product_attention

    term = _torch_term(cell, inputs)
    causal = cell.causal and term is None
    attention = partial(scaled_dot_product_attention, attn_mask=term, is_causal=causal)
    return _torch(clock, attention, cell, inputs, term)


def _torch_term(cell: Cell, inputs: Inputs) -> Any:
    """What stands for mask and bias, in q's dtype: made beforehand, as no call has to."""
    import torch

    if cell.bias:
        bias = torch.from_dlpack(inputs.bias)[None]
        return bias.requires_grad_(cell.bias == "learned")
    if cell.rule is None:
        return None
    q = torch.from_dlpack(inputs.q)
    i = torch.arange(cell.seqlen, device=q.device)[:, None]
    visible = _torch_rule(cell, inputs)(None, None, i, i.T).expand(cell.seqlen, cell.seqlen)
    return torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)


def _torch_rule(cell: Cell, inputs: Inputs) -> Callable[..., Any]:
    """The visible pairs as FlexAttention's mask_mod."""
    import torch

    arrays = {name: torch.from_dlpack(x) for name, x in inputs.of_rule.items()}

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        if cell.rule is None:
            return i >= j
        visible = cell.rule.sees(i, j, **arrays)
        return visible & (i >= j) if cell.causal else visible

    return sees


def _torch_flex(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else a limit on recompiles turns later cells to eager execution
    options, preparation_ms, bias = {}, None, None
    if cell.causal or cell.rule:
        create = partial(
            torch.compile(create_block_mask),
            *(_torch_rule(cell, inputs), None, None, cell.seqlen, cell.seqlen),
            device=str(torch.from_dlpack(inputs.q).device),
        )
        options["block_mask"] = create()
        preparation_ms = clock.time(create)()
    if cell.bias:
        bias = _torch_term(cell, inputs)
        options["score_mod"] = lambda score, b, h, i, j: score + bias[0, h, i, j]
    attention = partial(torch.compile(flex_attention, dynamic=False), **options)
    contender = _torch(clock, attention, cell, inputs, bias)
    return replace(contender, preparation_ms=preparation_ms)


def _torch(
    clock: Any, attention: Callable[..., Any], cell: Cell, inputs: Inputs, term: Any = None
) -> Contender:
    """Torch's functions take (B, H, S, D): views of the same memory."""
    import torch

    arrays = (inputs.q, inputs.k, inputs.v, inputs.dout)
    views = [torch.from_dlpack(x).transpose(1, 2) for x in arrays]
    return _torch_directed(clock, attention, cell.direction, views, term)


def _torch_directed(
    clock: Any,
    attention: Callable[..., Any],
    direction: str,
    arrays: list[Any],  # q, k, v, dout
    term: Any = None,
) -> Contender:
    """`term`: what attention adds to the scores; its gradient is taken too if it wants one."""
    import torch

    q, k, v, dout = arrays
    if direction == "forward":
        return Contender(torch.no_grad()(partial(attention, q, k, v)), clock)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wanted = leaves if term is None or not term.requires_grad else [*leaves, term]
    if direction == "backward":
        out = attention(*leaves)
        gradients = partial(torch.autograd.grad, out, wanted, dout, retain_graph=True)
        return Contender(gradients, clock)
    return Contender(lambda: torch.autograd.grad(attention(*leaves), wanted, dout), clock)


def _jax(
    implementation: str, wait_for_all: Callable[[], None], cell: Cell, inputs: Inputs
) -> Contender:
    """JAX runs on streams of its own, so its calls are timed by the host's clock."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    term = _jax_term(cell, inputs)
    arrays = [jax.dlpack.from_dlpack(x) for x in (inputs.q, inputs.k, inputs.v)]
    arrays += [] if term is None else [term]
    wanted = len(arrays) if cell.bias == "learned" else 3
    dout = jax.dlpack.from_dlpack(inputs.dout)
    clock = HostClock(JAX_QUEUE, idle=wait_for_all, wait=jax.block_until_ready)

    def attention(q: Any, k: Any, v: Any, term: Any = None) -> Any:
        causal = cell.causal and term is None
        return jax.nn.dot_product_attention(
            q, k, v, bias=term, is_causal=causal, implementation=implementation
        )

    def pull_back(*arrays: Any) -> Any:
        inputs, others = arrays[:wanted], arrays[wanted:]
        return jax.vjp(lambda *inputs: attention(*inputs, *others), *inputs)[1]

    if cell.direction == "forward":
        return Contender(partial(jax.jit(attention), *arrays), clock)
    if cell.direction == "backward":
        backward = jax.jit(lambda pullback, dout: pullback(dout))
        return Contender(partial(backward, pull_back(*arrays), dout), clock)
    both = jax.jit(lambda dout, *arrays: pull_back(*arrays)(dout))
    return Contender(partial(both, dout, *arrays), clock)


def _jax_term(cell: Cell, inputs: Inputs) -> Any:
    """As torch's."""
    import jax

    if cell.bias:
        return jax.dlpack.from_dlpack(inputs.bias)[None]
    if cell.rule is None:
        return None
    arrays = {name: jax.dlpack.from_dlpack(x) for name, x in inputs.of_rule.items()}
    i = jax.numpy.arange(cell.seqlen)[:, None]
    visible = cell.rule.sees(i, i.T, **arrays)
    visible = visible & (i >= i.T) if cell.causal else visible
    return jax.numpy.where(visible, 0, -jax.numpy.inf).astype(cell.dtype)[None, None]


def _triton(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    from cuflash.cli import triton_peer  # needs Triton and torch

    return triton_peer.contender(clock, cell, inputs)
