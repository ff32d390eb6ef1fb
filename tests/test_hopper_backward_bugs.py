"""Bugs put into the Hopper backward kernels as they ship: the emulator notices every one.

Each bug is a replacement in a copy of the kernels' folder. What it has to end with is a pattern for
the emulator's message, or a result that differs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import emulated
from injection import assert_noticed, changed, put_in

from cuflash.cli import oracle
from cuflash.cli.cases import Case

CASE = Case(batch=1, seqlen_q=450, seqlen_k=256, head_dim=64)
WIDE = replace(CASE, head_dim=128)
CAUSAL = replace(CASE, causal=True)
# The turns order more than sums: without them barriers that they cover count.
UNORDERED = replace(CASE, deterministic=False)
# Each query tile has five key tiles to sum, of one head.
SUMMED = Case(batch=1, heads_q=1, heads_k=1, seqlen_q=300, seqlen_k=600, head_dim=64)
SCHEDULES = [("lazy", 0), ("eager", 0), ("random", 0), ("random", 1)]

WRONG = "wrong result"
DIFFERENT_BITS = "different bits"
UNORDERED_SUMS = "race in global memory"

DK_WAIT = "    wgmma_wait<0>(dk, ds);\n"
FREE_Q = "    release_read(smem.q_empty(stage.index));\n"

# Of the kernel in which the warpgroups divide the keys; name: (what stands there, what takes its
# place, what it has to end with, in which case).
BUGS = {
    "ds-barrier": (
        "      named_barrier_sync(kScoresBarrier, kThreads);\n    }",
        "    }",
        "race:",
        CASE,
    ),
    "ds-fence": ("    fence_proxy_async();\n\n    QueryAcc", "\n    QueryAcc", "proxy:", CASE),
    "ds-in-one-buffer": ("smem.ds(stage.index)", "smem.ds(0)", "race:", UNORDERED),
    "q-released-early": (DK_WAIT + FREE_Q, FREE_Q + DK_WAIT, "race:", WIDE),
    "q-never-released": (DK_WAIT + FREE_Q, DK_WAIT, "deadlock:", CASE),
    "dk-not-awaited": (DK_WAIT, "    wgmma_wait<1>(dk, ds);\n", "accumulators|race:|flight", CASE),
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
    "staging-barrier": (
        "named_barrier_sync(kScoresBarrier, kThreads);  // every warp has finished with k and v",
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
}


COLUMNS = Case(batch=1, seqlen_q=300, seqlen_k=128, head_dim=192, head_dim_v=64)
WIDE_STORES = """    store_part(smem.probs(stage.index), s);
    store_part(smem.ds(stage.index), dp);
    fence_proxy_async();
"""
DV_WAIT = "    wgmma_wait<0>(dv);\n"
FREE_DOUT = "    if (dv_is_due) release_read(smem.dout_empty(stage.previous().index));\n"

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
    "wide-half-of-dk": (
        "ColumnOperand<QTile>{q, first_col()}",
        "ColumnOperand<QTile>{q, 0}",
        WRONG,
        COLUMNS,
    ),
}

Q_FULL = "mbarrier_wait(smem.q_full(stage.index), stage.parity);"
Q_EMPTY = "    mbarrier_wait(smem.q_empty(stage.index), stage.parity ^ 1);\n"
AWAIT_TURN = "    if (lane_id() == 0) await(counter, walk.tiles.turn());\n"
SUMS_ADDED = "    named_barrier_sync(kAddedBarrier, kTurnThreads);\n"
PASS_TURN = "    if (lane_id() == 0) red_release_add(counter, 1);\n"

# Of what both share, in either.
SHARED_BUGS = {
    "full-parity": (Q_FULL, Q_FULL.replace("parity", "parity ^ 1"), "race:|deadlock:", CASE),
    "empty-not-awaited": (Q_EMPTY, "", "race:|more arrivals", CASE),
    "v-not-awaited": ("      mbarrier_wait(smem.v_full(), 0);\n", "", "race:", CASE),
    "too-few-bytes": (" + kRowStats * kStatBytes);", ");", "deadlock:|race:|bytes", CASE),
    "one-arrival": (
        "mbarrier_init(smem.q_empty(stage), kWarps)",
        "mbarrier_init(smem.q_empty(stage), 1)",
        "race:|deadlock:|arrivals",
        CASE,
    ),
    "rows-of-the-other-warpgroup": (
        "RowOperand<VTile>{v, first_key()}",
        "RowOperand<VTile>{v, kWarpgroupRows - first_key()}",
        WRONG,
        CASE,
    ),
    "not-hidden": ("      hide(s, visible);\n", "", WRONG, CAUSAL),
    "sums-not-announced": (
        "if (kDeterministic) named_barrier_arrive(kAddedBarrier, kTurnThreads);",
        "",
        "deadlock:",
        CASE,
    ),
    "work-by-the-block": (
        "kDeterministic ? warp_uniform(ld_shared_u32(smem.ticket())) : blockIdx.x",
        "blockIdx.x",
        "deadlock:",
        SUMMED,
    ),
    "turn-not-awaited": (AWAIT_TURN, "", UNORDERED_SUMS, SUMMED),
    "turn-passed-early": (SUMS_ADDED + PASS_TURN, PASS_TURN + SUMS_ADDED, UNORDERED_SUMS, SUMMED),
    "turn-not-awaited-128": (AWAIT_TURN, "", UNORDERED_SUMS, replace(SUMMED, head_dim=128)),
    "wide-turn-not-awaited": (
        AWAIT_TURN,
        "",
        UNORDERED_SUMS,
        replace(SUMMED, seqlen_q=100, seqlen_k=300, head_dim=192),
    ),
    "wide-queries-of-the-other-warpgroup": (
        "RowOperand<DoutTile>{dout, first_query()}",
        "RowOperand<DoutTile>{dout, 0}",
        WRONG,
        COLUMNS,
    ),
    "wide-not-hidden": (
        "      hide(dp, visible);\n",
        "",
        WRONG,
        replace(COLUMNS, causal=True),
    ),
}

SOURCES = {
    "flash_bwd_sm90.cu": BUGS,
    "flash_bwd_wide_sm90.cu": WIDE_BUGS,
    "backward_sm90.cuh": SHARED_BUGS,
}


# One of each kind in every run; the others compile a kernel each as well.
QUICK = ("ds-barrier", "ds-fence", "full-parity", "half-of-dq", "wide-probs-in-one-buffer")
QUICK += ("turn-not-awaited",)


def test_every_bug_has_its_place() -> None:
    for source, bugs in SOURCES.items():
        for old, new, *_ in bugs.values():
            assert changed(source, old, new)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        pytest.param(source, name, id=name, marks=() if name in QUICK else pytest.mark.full)
        for source, bugs in SOURCES.items()
        for name in bugs
    ],
)
def test_bug_is_noticed(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, wanted, case = SOURCES[source][name]
    put_in(source, old, new, tmp_path, monkeypatch)
    assert_noticed(name, wanted, (ending(case, schedule) for schedule in SCHEDULES))


def ending(case: Case, schedule: tuple[str, int]) -> str:
    """The emulator's message, or how the gradients are."""
    from emulator import EmulatorError

    arrays = case.arrays()
    q, k, v, dout, _ = arrays
    out, lse = emulated(capability=90).forward(q, k, v, **case.options)
    options = {**case.options, "deterministic": case.deterministic}
    runs, sums = [], []
    try:
        for name, seed in (schedule, ("random", schedule[1] + 7)):
            on = emulated(capability=90, schedule=name, seed=seed)
            runs.append(on.backward(dout, q, k, v, out, lse, **options))
            sums.append(on.launches[-1].dq_sums)
    except EmulatorError as error:
        return str(error)
    for key, bound in oracle.expect(arrays._replace(dlse=None), case.options).items():
        if key in ("dq", "dk", "dv"):
            if not bound.error(getattr(runs[0], key)) <= bound.allowed:
                return WRONG
            first, second = (np.ascontiguousarray(getattr(run, key)) for run in runs)
            if not np.array_equal(first.view(np.uint16), second.view(np.uint16)):
                return DIFFERENT_BITS
    if case.deterministic and not np.array_equal(*(x.view(np.uint32) for x in sums)):
        return DIFFERENT_BITS
    return "right result"
