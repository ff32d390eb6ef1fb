"""The Hopper backward: what the compiler makes of it, and sizes that other tests leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import emulated
from test_attention import NON_FINITE, bits, check, check_non_finite, run

from cuflash import _jit, _plan, _traits
from cuflash.cli.cases import Case

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

ENTRY_REGISTERS = 168  # of 384 threads, before setmaxnreg

ROWS = [(64, 64), (64, 128), (128, 64), (128, 128)]
COLUMNS = [(192, 192), (192, 128), (256, 256), (64, 256)]

CASE = Case(batch=1, seqlen_q=260, seqlen_k=400, head_dim=64)
CASES = {
    "gqa": replace(CASE, heads_q=4, heads_k=2, causal=True),
    "lengths": replace(CASE, batch=2, causal=True, q_lens=(200, 77), kv_lens=(333, 100)),
    "window": replace(CASE, window=(90, 20)),
    "head-dim-128": replace(CASE, head_dim=128, causal=True),
    "head-dims-64-128": replace(CASE, head_dim=64, head_dim_v=128, causal=True),
    "head-dims-128-64": replace(CASE, head_dim=128, head_dim_v=64, heads_q=2, heads_k=1),
    "head-dims-192-128": replace(CASE, head_dim=192, head_dim_v=128, causal=True),
    "head-dims-64-192": replace(CASE, seqlen_k=300, head_dim_v=192, window=(90, 20)),
    "head-dim-160": replace(CASE, head_dim=160, heads_q=2, heads_k=1, seqlen_k=200),
    "head-dim-256": replace(CASE, seqlen_q=200, seqlen_k=300, head_dim=256, causal=True),
}


def traits(head_dim: int, head_dim_v: int, *, softcap: bool = False) -> _traits.Traits:
    return _traits.Traits(
        dtype="bfloat16",
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        vec_bytes=16,
        pack_group=False,
        softcap=softcap,
        scale_first=False,
        few_rows=False,
        tma=True,
    )


@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["unordered", "deterministic"])
@pytest.mark.parametrize("head_dims", ROWS + COLUMNS, ids=str)
def test_products_stay_asynchronous(
    head_dims: tuple[int, int], deterministic: bool, softcap: bool
) -> None:
    plan = _plan.backward_plan(traits(*head_dims, softcap=softcap), 90, deterministic)
    assert plan.backend == "sm90"
    cubin = _jit.cached_cubin(plan.main)
    assert not cubin.resources.notes, cubin.log
    assert cubin.resources.registers == ENTRY_REGISTERS
    assert cubin.resources.spill_bytes == 0


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("schedule", [("lazy", 0), ("random", 0)], ids=str)
def test_matches_float64(case: Case, schedule: tuple[str, int]) -> None:
    check(emulated(capability=90, schedule=schedule[0], seed=schedule[1]), case)


@pytest.mark.parametrize("where", NON_FINITE.values(), ids=NON_FINITE)
def test_non_finite_reaches_only_what_sees_it(where: tuple[str, tuple[int, ...], float]) -> None:
    case = Case(batch=1, seqlen_q=77, seqlen_k=150, head_dim=40, head_dim_v=136, causal=True)
    check_non_finite(emulated(capability=90), case, where)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bit_equal_under_any_schedule(head_dim: int) -> None:
    case = replace(
        CASE,
        seqlen_k=500 if head_dim <= 128 else 250,
        head_dim=head_dim,
        heads_q=2,
        heads_k=1,
        causal=True,
    )
    runs = [run(emulated(capability=90, schedule="random", seed=seed), case) for seed in range(3)]
    for other in runs[1:]:
        for name in ("dq", "dk", "dv"):
            np.testing.assert_array_equal(bits(runs[0][name]), bits(other[name]), err_msg=name)
