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
    """cuflash.attention with these options, which JAX differentiates by its arguments."""
    # kv_lens, mask and others may be arrays of JAX, which it traces: to it they are arguments.
    arrays = {
        name: options.pop(name) for name in [*options] if isinstance(options[name], jax.Array)
    }
    message = f"{', '.join(arrays)}: a gradient was asked for; expected stop_gradient of them"
    arrays = refuse_to_differentiate(lambda x: x, message)(arrays)

    def attention(q, k, v, bias=None, sinks=None):
        return differentiable(q, k, v, bias, sinks, arrays)

    @jax.custom_vjp
    def differentiable(*arguments):
        return forward(*arguments)[0]

    def forward(q, k, v, bias, sinks, arrays):
        batch, length, heads, _ = q.shape
        out = jax.ShapeDtypeStruct((batch, length, heads, v.shape[3]), q.dtype)
        lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.promote_types(q.dtype, "float32"))
        stats = jax.ShapeDtypeStruct((2, *lse.shape), lse.dtype)
        function = partial(cuflash.attention, return_stats=True, **options)
        results = call(function, (out, lse, stats), q, k, v, bias=bias, sinks=sinks, **arrays)
        return results[0], (q, k, v, *results, bias, sinks, arrays)

    def backward(saved, dout):
        q, k, v, out, lse, stats, bias, sinks, arrays = saved
        like = cuflash.Gradients(q, k, v, bias, sinks)
        function = partial(cuflash.attention_backward, **options)
        terms = {"stats": stats, "bias": bias, "sinks": sinks, **arrays}
        return *call(function, like, dout, q, k, v, out, lse, **terms), None

    differentiable.defvjp(forward, backward)
    return attention


def call(function, like, *arrays, **terms):
    """At once; within jit and vmap, where no arrays are yet, on the host when they have come."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, terms))):
        return function(*arrays, **terms)

    def on_host(arrays, terms):
        # To NumPy's: JAX must not be called from a callback.
        arrays, terms = jax.tree.map(np.asarray, (arrays, terms))
        return function(*arrays, **terms)

    callback = partial(jax.pure_callback, on_host, like, vmap_method="sequential")
    message = "a second derivative was asked for, which is not available; expected first ones"
    return refuse_to_differentiate(callback, message)(arrays, terms)


def refuse_to_differentiate(function, message):
    """The function, with an error where JAX asks for its derivative."""
    function = jax.custom_jvp(function)

    @function.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"cuflash.attention: {message}")

    return function


def jax_attention(q, k, v, bias, sinks):
    """JAX's own, causal; a sink is to it one more key, with the sink for a bias and no value."""
    k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
    heads, length, _ = bias.shape
    bias = jnp.where(jnp.tri(length, dtype=bool), bias, -jnp.inf)
    sinks = jnp.broadcast_to(sinks[:, None, None], (heads, length, 1))
    return jax.nn.dot_product_attention(q, k, v, jnp.concatenate([bias, sinks], axis=2)[None])


def main() -> None:
    _, length, heads, _ = SHAPE
    shapes = (SHAPE, SHAPE, SHAPE, (heads, length, length), (heads,), SHAPE)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    *inputs, weights = map(jax.random.normal, keys, shapes)
    ours = attention_of(causal=True)

    def gradients_of(attention):
        return jax.grad(lambda *inputs: (weights * attention(*inputs)).sum(), argnums=range(5))

    expected = gradients_of(jax_attention)(*inputs)
    print("largest difference from JAX's own")
    print(f"  out    {jnp.abs(ours(*inputs) - jax_attention(*inputs)).max():.1e}")
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    for how, differentiate in (("", gradients_of(ours)), (" in jit", jax.jit(gradients_of(ours)))):
        for name, x, y in zip(names, differentiate(*inputs), expected, strict=True):
            print(f"  {name:<6} {jnp.abs(x - y).max():.1e}{how}")


if __name__ == "__main__":
    main()
