"""cuflash's attention as a function that torch differentiates, beside torch's own.

    python examples/torch_attention.py

This runs on the CPU; on a GPU the same class takes float16 and bfloat16 tensors.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

import cuflash

SHAPE = (2, 300, 4, 64)  # batch, length, heads, head size


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dout = dout.contiguous()  # torch hands over any strides
        grads = cuflash.attention_backward(dout, *ctx.saved_tensors, **ctx.options)
        return grads.dq, grads.dk, grads.dv, None


def attention(q, k, v, **options):
    return Attention.apply(q, k, v, options)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Torch's own, with causal=True; it takes (batch, heads, length, head size)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator, requires_grad=True) for _ in range(3))
    weights = torch.randn(SHAPE, generator=generator)
    ours = attention(q, k, v, causal=True)
    theirs = torch_attention(q, k, v)
    gradients, expected = (
        torch.autograd.grad((weights * out).sum(), (q, k, v)) for out in (ours, theirs)
    )
    print("largest difference from torch's own")
    print(f"  out {(ours - theirs).abs().max():.1e}")
    for name, x, y in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        print(f"  {name}  {(x - y).abs().max():.1e}")


if __name__ == "__main__":
    main()
