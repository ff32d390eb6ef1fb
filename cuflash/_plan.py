"""(problem, device) → plan: tile sizes and constants. Needs neither CuPy nor a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from cuflash import _plan_sm80, _plan_sm90
from cuflash._problem import Problem
from cuflash._traits import (
    TMA_BYTES,
    BackwardPlan,
    Device,
    ForwardPlan,
    Kernel,
    Traits,
    backend_of,
    padded,
    vec_bytes,
)


@lru_cache(maxsize=1024)
def forward_plan(traits: Traits, capability: int) -> ForwardPlan:
    """Of the kernel that serves these traits on this GPU."""
    if backend_of(capability, traits.tma) == "sm90":
        return _plan_sm90.forward_plan(traits)
    return _plan_sm80.forward_plan(traits, capability)


@lru_cache(maxsize=1024)
def backward_plan(traits: Traits, capability: int, deterministic: bool) -> BackwardPlan:
    """As `forward_plan`."""
    if backend_of(capability, traits.tma) == "sm90":
        return _plan_sm90.backward_plan(traits, deterministic)
    return _plan_sm80.backward_plan(traits, capability, deterministic)


def heads_per_section(problem: Problem, device: Device) -> int:
    """(batch, key head) pairs whose keys and values together fill half of the L2 cache."""
    bytes_per_head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * 2
    heads = problem.batch * problem.heads_k
    return max(1, min(heads, device.l2_bytes // 2 // max(1, bytes_per_head)))


def kernels_for(
    arch: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    *,
    group: int = 1,
    softcap: bool = False,
    backward: bool = True,
    deterministic: bool = True,
) -> list[Kernel]:
    """Every kernel that calls of these sizes launch on contiguous arrays of any length."""
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    widest = vec_bytes((2 * head_dim | 2 * head_dim_v | 16) & 30)
    long = Traits(
        dtype=dtype,
        head_dim=padded(head_dim),
        head_dim_v=padded(head_dim_v),
        vec_bytes=widest,
        pack_group=group > 1,
        softcap=softcap,
        scale_first=False,
        few_rows=False,
    )
    kernels = [forward_plan(replace(long, few_rows=True), capability).kernel]
    for tma in (False, True)[: 1 + (backend_of(capability, widest == TMA_BYTES) == "sm90")]:
        traits = replace(long, tma=tma)
        kernels.append(forward_plan(traits, capability).kernel)
        if backward:
            plan = backward_plan(traits, capability, deterministic)
            kernels += [plan.prep, plan.main, plan.post]
    return list(dict.fromkeys(kernels))
