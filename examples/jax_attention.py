"""cuflash's attention as a function that JAX differentiates, compiles and maps, beside JAX's own.

    python examples/jax_attention.py

This runs on the CPU; on a GPU it takes float16 and bfloat16 arrays, outside jit and vmap.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import cuflash

SHAPE = (2, 300, 4, 64)  # batch, length, heads, head size


def attention_of(**options):
    """cuflash.attention with these options, as a function of q, k and v that JAX differentiates."""

    @jax.custom_vjp
    def attention(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        batch, length, heads, _ = q.shape
        out = jax.ShapeDtypeStruct((batch, length, heads, v.shape[3]), q.dtype)
        lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.promote_types(q.dtype, "float32"))
        function = partial(cuflash.attention, return_lse=True, **options)
        out, lse = call(function, (out, lse), q, k, v)
        return out, (q, k, v, out, lse)

    def backward(saved, dout):
        function = partial(cuflash.attention_backward, **options)
        dq, dk, dv, *_ = call(function, cuflash.Gradients(*saved[:3]), dout, *saved)
        return dq, dk, dv

    attention.defvjp(forward, backward)
    return attention


def call(function, like, *arrays):
    """At once; within jit and vmap, where no arrays are yet, on the host when they have come."""
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        return function(*arrays)

    def on_host(*arrays):
        return function(*map(np.asarray, arrays))  # JAX must not be called from a callback

    return jax.pure_callback(on_host, like, *arrays, vmap_method="sequential")


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, SHAPE) for key in keys)
    ours = attention_of(causal=True)
    theirs = partial(jax.nn.dot_product_attention, is_causal=True)

    def gradients_of(attention):
        return jax.grad(lambda q, k, v: (weights * attention(q, k, v)).sum(), argnums=(0, 1, 2))

    expected = gradients_of(theirs)(q, k, v)
    print("largest difference from JAX's own")
    print(f"  out {jnp.abs(ours(q, k, v) - theirs(q, k, v)).max():.1e}")
    for how, differentiate in (("", gradients_of(ours)), (" in jit", jax.jit(gradients_of(ours)))):
        for name, x, y in zip(("dq", "dk", "dv"), differentiate(q, k, v), expected, strict=True):
            print(f"  {name}  {jnp.abs(x - y).max():.1e}{how}")


if __name__ == "__main__":
    main()
