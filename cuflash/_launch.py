"""Allocate, pack parameters, launch: what happens on a GPU in one forward or backward."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from cuflash import _jit, _params, _plan
from cuflash._problem import Array, GradientProblem, Gradients, Problem


class Gpu:
    """A CUDA device, on CuPy's current stream."""

    def __init__(self, device_id: int) -> None:
        properties = runtime.getDeviceProperties(device_id)
        self.device = _plan.Device(
            capability=10 * properties["major"] + properties["minor"],
            l2_bytes=properties["l2CacheSize"],
        )
        self._device_id = device_id

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Memory in order with the current stream, not cleared."""
        return cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Cleared memory, in order with the current stream."""
        return cupy.zeros(shape, dtype)

    def as_contiguous(self, array: Array, dtype: np.dtype) -> Array:
        """The array itself, or a copy in that dtype."""
        return cupy.ascontiguousarray(array, dtype=dtype)

    def run(self, kernel: _plan.Kernel, blocks: int, params: bytes) -> None:
        """Launch on the current stream. The driver copies the parameters before it returns."""
        function = _jit.load(kernel, self._device_id).function_pointer
        block = ctypes.create_string_buffer(params, len(params))
        pointers = ctypes.c_void_p(ctypes.addressof(block))
        stream = cupy.cuda.get_current_stream().ptr
        driver.launchKernel(
            function,
            blocks,
            1,
            1,
            kernel.threads,
            1,
            1,
            kernel.smem_bytes,
            stream,
            ctypes.addressof(pointers),
            0,
        )


@cache
def gpu(device_id: int) -> Gpu:
    """The GPU of this number."""
    return Gpu(device_id)


def forward(problem: Problem, on: Gpu | None = None) -> tuple[Array, Array]:
    """Out and lse of a checked problem; `on` defaults to the GPU that q is on."""
    on = on or gpu(problem.q.device.id)
    out = problem.out if problem.out is not None else on.empty(problem.out_shape, problem.dtype)
    lse = on.empty(problem.lse_shape, problem.lse_dtype)
    if not lse.size:
        return out, lse
    problem = _with_device_lengths(problem, on)

    alignment = _params.alignment(problem.q, problem.k, problem.v, out)
    traits = _plan.Traits.of(problem, alignment)
    plan = _plan.forward_plan(traits, on.device.capability)
    heads_per_section = _plan.heads_per_section(problem, on.device)
    params = _params.pack_forward(problem, out, lse, heads_per_section)
    on.run(plan.kernel, _query_tiles(problem, plan.block_q), params)
    return out, lse


def backward(gradient: GradientProblem, on: Gpu | None = None) -> Gradients:
    """The gradients of a checked problem; `on` defaults to the GPU that q is on."""
    problem = gradient.forward
    on = on or gpu(problem.q.device.id)
    q, k, v = problem.q, problem.k, problem.v
    if not q.size or not k.size:
        return Gradients(*(on.zeros(x.shape, x.dtype) for x in (q, k, v)))
    grads = tuple(on.empty(x.shape, x.dtype) for x in (q, k, v))
    problem = _with_device_lengths(problem, on)
    gradient = _with_contiguous_stats(gradient, problem, on)

    alignment = _params.alignment(q, k, v, gradient.out, gradient.dout, *grads)
    traits = _plan.Traits.of(problem, alignment)
    plan = _plan.backward_plan(traits, on.device.capability, gradient.deterministic)
    query_tiles = _query_tiles(problem, plan.block_q)
    rows = query_tiles * plan.block_q
    workspace = (
        on.empty((rows,), np.float32),
        on.empty((rows,), np.float32),
        on.empty((rows * traits.head_dim,), np.float32),
        on.empty((1 + query_tiles,), np.uint32),
    )
    params = _params.pack_backward(gradient, grads, workspace)
    key_tiles = problem.batch * problem.heads_k * -(-problem.seqlen_k // plan.block_kv)
    on.run(plan.prep, query_tiles, params)
    on.run(plan.main, key_tiles, params)
    on.run(plan.post, query_tiles, params)
    return Gradients(*grads)


def _query_tiles(problem: Problem, block_q: int) -> int:
    rows = problem.seqlen_q * problem.group
    return problem.batch * problem.heads_k * -(-rows // block_q)


def _with_device_lengths(problem: Problem, on: Gpu) -> Problem:
    """The kernels read lengths and offsets as contiguous int64."""
    names = ("q_lens", "kv_lens", "offset")
    arrays = {name: getattr(problem, name) for name in names}
    given = {name: x for name, x in arrays.items() if x is not None and not isinstance(x, int)}
    if not given:
        return problem
    int64 = np.dtype(np.int64)
    return replace(problem, **{name: on.as_contiguous(x, int64) for name, x in given.items()})


def _with_contiguous_stats(gradient: GradientProblem, problem: Problem, on: Gpu) -> GradientProblem:
    """The kernels read lse and dlse as contiguous float32."""
    float32 = np.dtype(np.float32)
    dlse = None if gradient.dlse is None else on.as_contiguous(gradient.dlse, float32)
    lse = on.as_contiguous(gradient.lse, float32)
    return replace(gradient, forward=problem, lse=lse, dlse=dlse)
