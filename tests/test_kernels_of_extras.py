"""What the compiler makes of kernels with a mask or terms: registers, serialised products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from test_kernels import check_register_limits

from cuflash import _jit, _plan
from cuflash._problem import Problem
from cuflash._traits import NO_EXTRAS, TMA_BYTES, Kernel, Traits
from cuflash.cli.cases import Case
from cuflash.cli.extras import MASKS, TERMS

pytest.importorskip("cupy", reason="compiling needs CuPy")

HEAD_DIMS = (64, 128, 256)
ALL_TERMS = ("documents", "alibi", "bias", "sinks", "dropout", "score_mod")
# Bytes, by capability: with one mask or term or packed, with a mask and every term.
SPILLS = {80: (8, 0), 90: (72, 192)}


def kernels(case: Case, capability: int) -> tuple[Kernel, Kernel]:
    """Of the forward and the backward pass."""
    q, k, v, _, _ = case.arrays()
    problem = Problem.create("attention", "cuda", q, k, v, **case.options)
    return kernels_of(Traits.of(problem, TMA_BYTES, tma=True), capability)


def kernels_of(traits: Traits, capability: int) -> tuple[Kernel, Kernel]:
    forward = _plan.forward_plan(traits, capability).kernel
    return forward, _plan.backward_plan(traits, capability, deterministic=True).main


def check(case: Case, capability: int, most_spilled: int) -> None:
    check_kernels(kernels(case, capability), capability, most_spilled)


def check_kernels(compiled: Iterable[Kernel], capability: int, most_spilled: int) -> None:
    for kernel in compiled:
        cubin = _jit.cached_cubin(kernel)
        assert not cubin.resources.notes, cubin.log
        assert cubin.resources.spill_bytes <= most_spilled, kernel
        assert cubin.resources.registers * kernel.threads <= 65536, kernel
        if capability == 90:
            check_register_limits(kernel)


def test_one_configuration() -> None:
    check(Case(heads_q=2, head_dim=128, extras=("bias", "documents")), 90, SPILLS[90][1])


def test_rules_beside_many_accumulators_do_not_spill() -> None:
    check(Case(heads_q=2, head_dim=256, extras=("documents",)), 80, 0)


@pytest.mark.full
@pytest.mark.parametrize("name", [*MASKS, *TERMS])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", SPILLS)
def test_a_mask_or_a_term(capability: int, head_dim: int, name: str) -> None:
    case = Case(heads_q=2, head_dim=head_dim, extras=(name,))
    check(case, capability, SPILLS[capability][0])


@pytest.mark.full
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", SPILLS)
def test_a_mask_and_all_terms(capability: int, head_dim: int) -> None:
    case = Case(heads_q=2, head_dim=head_dim, softcap=5.0, extras=ALL_TERMS)
    check(case, capability, SPILLS[capability][1])


@pytest.mark.parametrize(
    "head_dim", [pytest.param(d, marks=() if d == 128 else pytest.mark.full) for d in HEAD_DIMS]
)
def test_packed_sequences(head_dim: int) -> None:
    traits = Traits("bfloat16", head_dim, head_dim, TMA_BYTES, False, False, False, False, tma=True)
    packed = replace(traits, extras=replace(NO_EXTRAS, packed=True))
    check_kernels(kernels_of(packed, 90), 90, SPILLS[90][0])
