"""cuflash's attention as a function that torch differentiates, beside torch's own.

    python examples/torch_attention.py

This runs on the CPU; on a GPU the same class takes float16 and bfloat16 tensors.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

import cuflash

SHAPE = (2, 300, 4, 64)  # batch, length, heads, head size


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, options):
        terms = {"bias": bias, "sinks": sinks, "return_lse": True}
        out, lse = cuflash.attention(q, k, v, **terms, **options)
        ctx.save_for_backward(q, k, v, out, lse, bias, sinks)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *arrays, bias, sinks = ctx.saved_tensors
        dout = dout.contiguous()  # torch hands over any strides
        terms = {"bias": bias, "bias_gradient": ctx.needs_input_grad[3], "sinks": sinks}
        grads = cuflash.attention_backward(dout, *arrays, **terms, **ctx.options)
        return *grads, None  # dq, dk, dv, dbias, dsinks


def attention(q, k, v, bias=None, sinks=None, **options):
    return Attention.apply(q, k, v, bias, sinks, options)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Torch's own, causal; it takes (batch, heads, length, head size).

    A sink is to it one more key, of zeros, with the sink for a bias and no value.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
    heads, length, _ = bias.shape
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    bias = bias.masked_fill(hidden, -torch.inf)
    bias = torch.cat([bias, sinks[:, None, None].expand(heads, length, 1)], dim=2)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    _, length, heads, _ = SHAPE
    shapes = (SHAPE, SHAPE, SHAPE, (heads, length, length), (heads,))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(SHAPE, generator=generator)
    ours = attention(*inputs, causal=True)
    theirs = torch_attention(*inputs)
    gradients, expected = (
        torch.autograd.grad((weights * out).sum(), inputs) for out in (ours, theirs)
    )
    print("largest difference from torch's own")
    print(f"  out    {(ours - theirs).abs().max():.1e}")
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    for name, x, y in zip(names, gradients, expected, strict=True):
        print(f"  {name:<6} {(x - y).abs().max():.1e}")


if __name__ == "__main__":
    main()
