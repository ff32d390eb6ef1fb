"""The gradients of bias and sinks on a GPU, from what a backward pass leaves in its workspace."""

from __future__ import annotations

import math

import numpy as np

from cuflash import _classify, _params, _plan_small, _traits
from cuflash._convert import as_contiguous
from cuflash._gpu import Gpu
from cuflash._problem import Array, GradientProblem

# Blocks that keep every SM busy, and parts that their sum is worth reading.
_BLOCKS_PER_SM = 4
_MAX_SPLITS = 64


def bias_gradient(
    gradient: GradientProblem,
    traits: _traits.Traits,
    deltas: _params.RowDeltas,
    tables: _params.Tables,
    on: Gpu,
) -> Array:
    """Of the bias's shape and dtype."""
    problem = gradient.forward
    bias = problem.bias
    if not problem.k.size:
        return on.zeros(bias.shape, bias.dtype)
    plan = _plan_small.bias_gradient_plan(traits, on.device.capability)
    sights = None
    if problem.mask is not None:
        sights = _classify.sights(problem, tables, traits, plan.tiling, on)

    extent = (1,) * (4 - bias.ndim) + bias.shape
    axes = (
        problem.batch,
        problem.heads_q,
        -(-problem.seqlen_q // plan.tiling.block_q),
        -(-problem.seqlen_k // plan.tiling.block_kv),
    )
    own = [1 if n == 1 else count for n, count in zip(extent, axes, strict=True)]
    tiles, steps = math.prod(own), math.prod(axes) // math.prod(own)
    wanted = _BLOCKS_PER_SM * on.device.sms // tiles
    splits = max(1, min(wanted, steps, _MAX_SPLITS))
    sums = on.empty((splits, *bias.shape), np.float32)
    params = _params.pack_bias_gradient(gradient, tables, deltas, sights, sums, extent, splits)
    on.run(plan.kernel, tiles * splits, params)
    dbias = on.empty(bias.shape, bias.dtype)
    on.run(plan.sum, -(-bias.size // plan.sum.threads), _params.pack_bias_sum(sums, dbias, splits))
    return dbias


def sink_gradient(
    gradient: GradientProblem,
    traits: _traits.Traits,
    deltas: _params.RowDeltas,
    tables: _params.Tables,
    dtype: np.dtype,
    on: Gpu,
) -> Array:
    """Of the sinks' shape, in this dtype."""
    problem = gradient.forward
    dsinks = on.empty((problem.heads_q,), np.float32)
    kernel = _plan_small.sink_gradient_kernel(traits, on.device.capability)
    on.run(kernel, problem.heads_q, _params.pack_sink_gradient(gradient, tables, deltas, dsinks))
    return as_contiguous(dsinks, dtype, on)
