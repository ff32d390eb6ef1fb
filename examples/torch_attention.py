"""cuflash's attention as a function that torch differentiates, beside torch's own.

    python examples/torch_attention.py

This runs on the CPU; on a GPU the same class takes float16 and bfloat16 tensors.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

import cuflash

SHAPE = (2, 300, 4, 64)  # batch, length, heads, head size


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, bias, sinks, options):
        return cuflash.attention(q, k, v, bias=bias, sinks=sinks, return_stats=True, **options)

    @staticmethod
    def setup_context(ctx, inputs, results):
        *arrays, bias, sinks, ctx.options = inputs
        ctx.save_for_backward(*arrays, *results, bias, sinks)
        ctx.mark_non_differentiable(*results[1:])  # lse, stats

    @staticmethod
    def backward(ctx, dout, *_):
        options = {"bias_gradient": ctx.needs_input_grad[3], **ctx.options}
        dout = dout.contiguous()  # torch hands over any strides
        return *AttentionGradients.apply(dout, *ctx.saved_tensors, options), None


class AttentionGradients(torch.autograd.Function):
    """In torch's graph by itself, so that torch knows of all that the gradients depend on."""

    @staticmethod
    def forward(dout, q, k, v, out, lse, stats, bias, sinks, options):
        terms = {"stats": stats, "bias": bias, "sinks": sinks}
        return tuple(cuflash.attention_backward(dout, q, k, v, out, lse, **terms, **options))

    @staticmethod
    def setup_context(ctx, inputs, results):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "cuflash.attention: a second derivative was asked for, which is not available; "
            "expected first ones, or a gradient that was detached"
        )


def attention(q, k, v, bias=None, sinks=None, **options):
    for name, x in options.items():
        if torch.is_grad_enabled() and getattr(x, "requires_grad", False):
            raise NotImplementedError(
                f"cuflash.attention: {name} requires grad, and has none; expected {name}.detach()"
            )
    return Attention.apply(q, k, v, bias, sinks, options)[0]


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
