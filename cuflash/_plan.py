"""(problem, device) → plan: tile sizes and constants. Needs neither CuPy nor a GPU."""

from __future__ import annotations

from functools import lru_cache

from cuflash import _plan_sm80, _plan_sm90
from cuflash._problem import Problem
from cuflash._traits import (
    BackwardPlan,
    Device,
    ForwardPlan,
    Traits,
    backend_of,
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
