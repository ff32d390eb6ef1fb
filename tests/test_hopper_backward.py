"""The Hopper backward: what the compiler makes of it, and sizes that other tests leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from backends import EmulatedGpu
from conftest import emulated
from test_attention import NON_FINITE, bits, check, check_non_finite, compare
from test_kernels import check_hopper_kernel

from cuflash import _jit, _launch, _params, _plan, _plan_sm90, _traits
from cuflash._problem import GradientProblem, Problem
from cuflash._reference_masks import visibility
from cuflash.cli import oracle
from cuflash.cli.cases import Case

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

ENTRY_REGISTERS = 168  # of 384 threads, before setmaxnreg

ROWS = [(64, 64), (64, 128), (128, 64), (128, 128)]
COLUMNS = [(192, 192), (192, 128), (256, 256), (64, 256)]
HEAD_DIMS = (64, 128, 192, 256)
FLAGS = ("plain", "softcap", "scale-first")

# Rings of two stages that turn four times and more: over the queries, or over a group's heads.
CASE = Case(batch=1, heads_q=1, heads_k=1, seqlen_q=1100, seqlen_k=250, head_dim=64)
WIDE = replace(CASE, seqlen_q=600, seqlen_k=150)
CASES = {
    "gqa": replace(CASE, seqlen_q=200, heads_q=8, heads_k=2, causal=True),
    "lengths": replace(
        CASE, batch=2, causal=True, offset=(30, 5), q_lens=(1090, 77), kv_lens=(250, 100)
    ),
    "window": replace(CASE, window=(1000, 20), offset=0),
    "head-dim-128": replace(CASE, seqlen_q=600, head_dim=128, causal=True, offset=0),
    "head-dims-64-128": replace(WIDE, head_dim=64, head_dim_v=128, causal=True, offset=-40),
    "head-dims-128-64": replace(WIDE, seqlen_q=300, head_dim=128, head_dim_v=64, heads_q=2),
    "head-dims-192-128": replace(WIDE, head_dim=192, head_dim_v=128, causal=True, offset=0),
    "head-dims-64-192": replace(WIDE, head_dim=64, head_dim_v=192, window=(500, 20), offset=0),
    "head-dim-160": replace(WIDE, seqlen_q=300, head_dim=160, heads_q=2),
    "head-dim-256": replace(WIDE, head_dim=256, causal=True, offset=0),
}

# Blocks that run at a time on the emulated GPU, and key tiles enough that they overtake others.
AT_ONCE = 4
SUMMED = {
    "64": replace(CASE, seqlen_q=300, seqlen_k=500, causal=True),
    "128": replace(CASE, seqlen_q=130, seqlen_k=500, head_dim=128, heads_q=2),
    "192": replace(CASE, seqlen_q=100, head_dim=192, head_dim_v=128, causal=True),
    "256": replace(CASE, seqlen_q=100, head_dim=256, causal=True),
}


def marked(names: Iterable[str], always: Collection[str]) -> list[Any]:
    """Parameters; those that are not run always are `full`."""
    return [pytest.param(x, marks=() if x in always else pytest.mark.full) for x in names]


def traits(head_dim: int, head_dim_v: int, flags: str, dtype: str = "bfloat16") -> _traits.Traits:
    return _traits.Traits(
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        vec_bytes=16,
        pack_group=False,
        softcap=flags == "softcap",
        scale_first=flags == "scale-first",
        few_rows=False,
        tma=True,
    )


@pytest.mark.parametrize("head_dims", ROWS + COLUMNS, ids=str)
def test_products_stay_asynchronous(head_dims: tuple[int, int]) -> None:
    check_compiled(traits(*head_dims, "plain"), deterministic=True)


@pytest.mark.parametrize(
    ("head_dims", "flags", "dtype", "deterministic"),
    [
        ((64, 64), "softcap", "bfloat16", True),
        ((256, 256), "softcap", "bfloat16", False),
        ((128, 128), "scale-first", "float16", True),
        ((192, 256), "scale-first", "bfloat16", True),
    ],
    ids=str,
)
def test_products_of_other_kernels(
    head_dims: tuple[int, int], flags: str, dtype: str, deterministic: bool
) -> None:
    check_compiled(traits(*head_dims, flags, dtype), deterministic)


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_wgmma_alone_multiplies(head_dims: tuple[int, int]) -> None:
    check_instructions(traits(*head_dims, "plain"), deterministic=True)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["unordered", "deterministic"])
@pytest.mark.parametrize("head_dims", [*product(HEAD_DIMS, HEAD_DIMS)], ids=str)
def test_instructions_of_every_kernel(
    head_dims: tuple[int, int], deterministic: bool, flags: str, dtype: str
) -> None:
    chosen = traits(*head_dims, flags, dtype)
    check_compiled(chosen, deterministic)
    check_instructions(chosen, deterministic)


def check_compiled(chosen: _traits.Traits, deterministic: bool) -> None:
    """What ptxas tells of it; the registers at entry are those that setmaxnreg counts on."""
    plan = _plan.backward_plan(chosen, 90, deterministic)
    assert plan.backend == "sm90"
    cubin = _jit.cached_cubin(plan.main)
    assert not cubin.resources.notes, cubin.log
    assert cubin.resources.registers == ENTRY_REGISTERS
    assert cubin.resources.spill_bytes == cubin.resources.stack_bytes == 0


def check_instructions(chosen: _traits.Traits, deterministic: bool) -> None:
    plan = _plan.backward_plan(chosen, 90, deterministic)
    check_hopper_kernel(plan.main, _params.mapped_bytes(6, _params.BACKWARD_BYTES))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rings_turn_four_times(case: Case) -> None:
    """In the block that walks over most query tiles."""
    chosen = traits(case.head_dim, case.head_dim_v or case.head_dim, "plain")
    tiling = _plan.backward_plan(chosen, 90, deterministic=True).tiling
    q, k, *_ = case.arrays()
    anything = dict.fromkeys(("offset", "window", "q_lens", "kv_lens", "mask"))
    visible = visibility(q, k, **{"causal": False, **anything, **case.options})
    for axis, rows in ((2, tiling.block_q), (3, tiling.block_kv)):
        visible = np.logical_or.reduceat(visible, range(0, visible.shape[axis], rows), axis)
    steps = visible.sum(axis=2).reshape(case.batch, case.heads_k, -1, visible.shape[3]).sum(axis=2)
    assert steps.max() >= 4 * _plan_sm90._STAGES


@pytest.mark.parametrize("schedule", [("lazy", 0), ("random", 0)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case: Case, schedule: tuple[str, int]) -> None:
    check(emulated(capability=90, schedule=schedule[0], seed=schedule[1]), case)


@pytest.mark.parametrize("name", marked(CASES, ("lengths", "head-dim-128", "head-dim-256")))
def test_matches_float64_if_copies_land_at_once(name: str) -> None:
    check(emulated(capability=90, schedule="eager"), CASES[name])


@pytest.mark.parametrize("where", NON_FINITE.values(), ids=NON_FINITE)
def test_non_finite_reaches_only_what_sees_it(where: tuple[str, tuple[int, ...], float]) -> None:
    case = Case(batch=1, seqlen_q=77, seqlen_k=150, head_dim=40, head_dim_v=136, causal=True)
    check_non_finite(emulated(capability=90), case, where)


@pytest.mark.parametrize("case", SUMMED.values(), ids=SUMMED)
def test_bit_equal_under_any_schedule(case: Case) -> None:
    first, *others = gradient_bits(case, deterministic=True)
    for other in others:
        for name, expected in first.items():
            np.testing.assert_array_equal(other[name], expected, err_msg=name)


@pytest.mark.parametrize("name", marked(SUMMED, ("64",)))
def test_unordered_sums_differ(name: str) -> None:
    """At the sizes at which those in order do not."""
    first, *others = gradient_bits(SUMMED[name], deterministic=False)
    assert any((other["sums of dq"] != first["sums of dq"]).any() for other in others)


def gradient_bits(case: Case, deterministic: bool) -> list[dict[str, np.ndarray]]:
    """The gradients by name, and dq before it is rounded, under three random schedules."""
    q, k, v, dout, _ = case.arrays()
    out, lse = emulated(capability=90).forward(q, k, v, **case.options)
    runs = []
    for seed in range(3):
        on = emulated(capability=90, schedule="random", seed=seed, threads=AT_ONCE)
        options = {**case.options, "deterministic": deterministic}
        dq, dk, dv, *_ = on.backward(dout, q, k, v, out, lse, **options)
        found = {"dq": dq, "dk": dk, "dv": dv, "sums of dq": on.launches[-1].dq_sums}
        runs.append({name: bits(x) for name, x in found.items()})
    return runs


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("seqlen", [1000, 16000])
def test_workspace_is_linear_in_the_length(seqlen: int, capability: int) -> None:
    """Per query lse, delta and a row of dq, in whole tiles, each with a counter."""
    heads_q, heads_k, head_dim = 4, 2, 128
    q, dout, out = (np.zeros((1, seqlen, heads_q, head_dim), np.float16) for _ in range(3))
    k, v = (np.zeros((1, seqlen, heads_k, head_dim), np.float16) for _ in range(2))
    lse = np.zeros((1, heads_q, seqlen), np.float32)
    gpu = EmulatedGpu(capability, "lazy", 0, [])
    problem = Problem.create("test", "cuda", q, k, v, causal=True)
    grads = _launch.backward(GradientProblem.create("test", problem, dout, out, lse), gpu)
    others = [id(x) for x in (*grads, lse)]
    workspace = sum(x.nbytes for x in gpu.buffers if id(x) not in others)
    assert workspace <= 4 * heads_q * (seqlen + 128) * (head_dim + 3)


def test_unaligned_dout_alone_goes_to_sm80() -> None:
    case = Case(batch=1, seqlen_q=77, seqlen_k=150, head_dim=32, causal=True)
    arrays = case.arrays()._replace(dlse=None)
    dout = replace(case, layout="unaligned").place(arrays.dout, np)
    on = emulated(capability=90)
    out, lse, grads = on.both(dout, arrays.q, arrays.k, arrays.v, **case.options)
    sources = [x.kernel.source for x in on.launches]
    assert {"flash_fwd_sm90.cu", "flash_bwd_sm80.cu"} < set(sources)
    found = {"out": out, "lse": lse, **grads._asdict()}
    compare(found, oracle.expect(arrays, case.options))
