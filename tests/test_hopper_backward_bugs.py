"""Bugs put into the Hopper backward kernel as it ships: the emulator notices every one.

Each bug is a replacement in a copy of the kernels' folder. What it has to end with is a pattern for
the emulator's message, or a result that differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import emulated
from injection import assert_noticed, put_in

from cuflash.cli import oracle
from cuflash.cli.cases import Case

SOURCE = "flash_bwd_sm90.cu"
CASE = Case(batch=1, seqlen_q=450, seqlen_k=256, head_dim=64)
WIDE = replace(CASE, head_dim=128)
CAUSAL = replace(CASE, causal=True)
# The turns order more than sums: without them barriers that they cover count.
UNORDERED = replace(CASE, deterministic=False)
SCHEDULES = [("lazy", 0), ("eager", 0), ("random", 0), ("random", 1)]

WRONG = "wrong result"
DIFFERENT_BITS = "different bits"

Q_FULL = "mbarrier_wait(smem.q_full(stage.index), stage.parity);"
Q_EMPTY = "    mbarrier_wait(smem.q_empty(stage.index), stage.parity ^ 1);\n"
DK_WAIT = "    wgmma_wait<0>(dk, ds);\n"
FREE_Q = "    release(smem.q_empty(stage.index));\n"

# name: (what stands there, what takes its place, what it has to end with, in which case)
BUGS = {
    "ds-barrier": (
        "      named_barrier_sync(kDsBarrier, kThreads);\n    }",
        "    }",
        "race:",
        CASE,
    ),
    "ds-fence": ("    fence_proxy_async();\n\n    QueryAcc", "\n    QueryAcc", "proxy:", CASE),
    "ds-in-one-buffer": ("smem.ds(stage.index)", "smem.ds(0)", "race:", UNORDERED),
    "q-released-early": (DK_WAIT + FREE_Q, FREE_Q + DK_WAIT, "race:", WIDE),
    "q-never-released": (DK_WAIT + FREE_Q, DK_WAIT, "deadlock:", CASE),
    "full-parity": (Q_FULL, Q_FULL.replace("parity", "parity ^ 1"), "race:|deadlock:", CASE),
    "empty-not-awaited": (Q_EMPTY, "", "race:|more arrivals", CASE),
    "v-not-awaited": ("      mbarrier_wait(smem.v_full(), 0);\n", "", "race:", CASE),
    "too-few-bytes": ("QTile::kBytes + kStatBytes", "QTile::kBytes", "deadlock:|race:|bytes", CASE),
    "one-arrival": (
        "mbarrier_init(smem.q_empty(stage), kWarps)",
        "mbarrier_init(smem.q_empty(stage), 1)",
        "race:|deadlock:|arrivals",
        CASE,
    ),
    "dk-not-awaited": (DK_WAIT, "    wgmma_wait<1>(dk, ds);\n", "accumulators|race:|flight", CASE),
    "rows-of-the-other-warpgroup": (
        "RowOperand<VTile>{v, index * kWarpgroupRows}",
        "RowOperand<VTile>{v, (1 - index) * kWarpgroupRows}",
        WRONG,
        CASE,
    ),
    "half-of-dq": (
        "ColumnOperand<DsTile>{ds, dq_row()}",
        "ColumnOperand<DsTile>{ds, 0}",
        WRONG,
        CASE,
    ),
    "columns-of-the-other-warpgroup": (
        "ColumnOperand<KTile>{k, dq_col()}",
        "ColumnOperand<KTile>{k, 0}",
        WRONG,
        WIDE,
    ),
    "not-hidden": ("      hide(s, columns);\n", "", WRONG, CAUSAL),
    "staging-barrier": (
        "    named_barrier_sync(kDsBarrier, kThreads);  // every warp has finished with k and v\n",
        "",
        "race:",
        UNORDERED,
    ),
    "staging-fence": (
        "    fence_proxy_async();\n    named_barrier",
        "    named_barrier",
        "proxy:",
        CASE,
    ),
    "sums-not-announced": (
        "if (kDeterministic) named_barrier_arrive(kAddedBarrier, kTurnThreads);",
        "",
        "deadlock:",
        CASE,
    ),
}


WIDE_SOURCE = "flash_bwd_wide_sm90.cu"
COLUMNS = Case(batch=1, seqlen_q=300, seqlen_k=128, head_dim=192, head_dim_v=64)
WIDE_STORES = """    store_scores(smem.probs(stage.index), s);
    store_scores(smem.ds(stage.index), dp);
    fence_proxy_async();
"""
DV_WAIT = "    wgmma_wait<0>(dv);\n"
FREE_DOUT = "    if (dv_is_due) release(smem.dout_empty(stage.previous().index));\n"

# As BUGS, of the kernel in which the warpgroups divide the columns.
WIDE_BUGS = {
    "wide-scores-barrier": (
        "      named_barrier_sync(kScoresBarrier, kThreads);\n    }",
        "    }",
        "race:",
        COLUMNS,
    ),
    "wide-scores-fence": ("    fence_proxy_async();\n" + DV_WAIT, DV_WAIT, "proxy:", COLUMNS),
    "wide-probs-in-one-buffer": ("smem.probs(stage.index)", "smem.probs(0)", "race:", COLUMNS),
    "wide-ds-in-one-buffer": (
        "smem.ds(stage.index)",
        "smem.ds(0)",
        "race:",
        replace(COLUMNS, deterministic=False),
    ),
    "wide-dout-released-early": (
        WIDE_STORES + DV_WAIT + FREE_DOUT,
        FREE_DOUT + WIDE_STORES + DV_WAIT,
        "race:",
        COLUMNS,
    ),
    "wide-dout-never-released": (FREE_DOUT, "", "deadlock:", COLUMNS),
    "wide-dk-not-awaited": (
        "    wgmma_wait<0>(dk);\n",
        "",
        "accumulators|race:|flight",
        COLUMNS,
    ),
    "wide-last-dv-left-out": ("    if (dv_is_due) {", "    if (false) {", WRONG, COLUMNS),
    "wide-queries-of-the-other-warpgroup": (
        "RowOperand<DoutTile>{dout, first_query()}",
        "RowOperand<DoutTile>{dout, 0}",
        WRONG,
        COLUMNS,
    ),
    "wide-half-of-dk": (
        "ColumnOperand<QTile>{q, first_col()}",
        "ColumnOperand<QTile>{q, 0}",
        WRONG,
        COLUMNS,
    ),
    "wide-not-hidden": (
        "      hide(dp, columns);\n",
        "",
        WRONG,
        replace(COLUMNS, causal=True),
    ),
}


# One of each kind in every run; the others compile a kernel each as well.
QUICK = ("ds-barrier", "ds-fence", "full-parity", "half-of-dq", "wide-probs-in-one-buffer")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.full)
        for name in (*BUGS, *WIDE_BUGS)
    ],
)
def test_bug_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, wanted, case = (BUGS | WIDE_BUGS)[name]
    put_in(SOURCE if name in BUGS else WIDE_SOURCE, old, new, tmp_path, monkeypatch)
    assert_noticed(name, wanted, (ending(case, schedule) for schedule in SCHEDULES))


def ending(case: Case, schedule: tuple[str, int]) -> str:
    """The emulator's message, or how the gradients are."""
    from emulator import EmulatorError

    arrays = case.arrays()
    name, seed = schedule
    on = emulated(capability=90, schedule=name, seed=seed)
    q, k, v, dout, _ = arrays
    out, lse = on.forward(q, k, v, **case.options)
    options = {**case.options, "deterministic": case.deterministic}
    try:
        runs = [on.backward(dout, q, k, v, out, lse, **options)]
        on = emulated(capability=90, schedule="random", seed=seed + 7)
        runs.append(on.backward(dout, q, k, v, out, lse, **options))
    except EmulatorError as error:
        return str(error)
    for key, bound in oracle.expect(arrays._replace(dlse=None), case.options).items():
        if key in ("dq", "dk", "dv"):
            if not bound.error(getattr(runs[0], key)) <= bound.allowed:
                return WRONG
            first, second = (np.ascontiguousarray(getattr(run, key)) for run in runs)
            if not np.array_equal(first.view(np.uint16), second.view(np.uint16)):
                return DIFFERENT_BITS
    return "right result"
