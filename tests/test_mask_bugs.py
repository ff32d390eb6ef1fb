"""Bugs put into what masks and terms add to the kernels: every one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mask_cases
import numpy as np
import pytest
from conftest import emulated
from injection import assert_noticed, changed, put_in
from test_attention import bits, run
from test_mask_kernels import BACKWARD, EDGES, FORWARD, GROUPED, check_lists, problem_of
from test_term_kernels import CASE, CODE, named_arrays, together, value

from cuflash import masks
from cuflash._traits import Tiling
from cuflash.cli import oracle
from cuflash.cli.cases import Case

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

WRONG = "wrong result"
DIFFERENT_BITS = "different bits"
RIGHT = "right result"
SCHEDULES = [("lazy", 0), ("random", 0), ("random", 1)]


# ------------------------------------------------------------------------- in the lists of tiles


def lists_of(kind: str) -> Callable[[], None]:
    def check() -> None:
        rng = np.random.default_rng(0)
        make = {**mask_cases.LEAVES, "every-leaf": mask_cases.every_leaf}[kind]
        for case in (GROUPED, EDGES):
            for _ in range(4):
                problem = problem_of(case, mask=make(rng, case))
                check_lists(problem, Tiling(16, 16, True), FORWARD)
                check_lists(problem, Tiling(32, 16, False), BACKWARD)

    return check


def check_named_arrays() -> None:
    mask = masks.expression(
        f"{CODE} > 1.45f",
        lambda *place, **arrays: value(*place, **arrays) > 1.45,
        **named_arrays(np.random.default_rng(0)),
    )
    check_lists(problem_of(CASE, mask=mask), Tiling(4, 2, False), FORWARD)


OUTSIDE = "out of bounds|memory fault"
# name: (file, what stands there, what takes its place, what it has to end with, what is checked)
LIST_BUGS = {
    "last-tile-left-out": (
        "mask_lists.cu",
        "make_int2(count, 0)",
        "make_int2(count - 1, 0)",
        WRONG,
        lists_of("blocks"),
    ),
    "partly-lost": (
        "mask_lists.cu",
        "2 * step + (sees == kSome)",
        "2 * step",
        WRONG,
        lists_of("blocks"),
    ),
    "turn-of-another-matrix": (
        "mask_lists.cu",
        "p.turns[tile] : 0",
        "p.turns[index % p.lines * p.line_stride + step * p.step_stride] : 0",
        WRONG,
        lists_of("blocks"),
    ),
    "keys-past-the-length-visible": (
        "mask_tiles.cu",
        "all = key + kBlockKV <= mask.kv_len;",
        "all = true;",
        WRONG,
        lists_of("prefix"),
    ),
    "rows-past-the-length-visible": (
        "mask_tiles.cu",
        "if (kWholeRows) all &=",
        "if (false) all &=",
        WRONG,
        lists_of("prefix"),
    ),
    "one-head-for-all-of-the-rows": (
        "mask_tiles.cu",
        "rows.head_q(head) + h;",
        "rows.head_q(head);",
        WRONG,
        lists_of("blocks"),
    ),
    "one-pair-stands-for-all": (
        "mask_tiles.cu",
        "all &= __all_sync(0xffffffff, visible);",
        "all &= __any_sync(0xffffffff, visible);",
        WRONG,
        lists_of("expression"),
    ),
    "band-ends-early": (
        "leaves.cuh",
        "of.j > last + right;",
        "of.j >= last + right;",
        WRONG,
        lists_of("causal"),
    ),
    "touching-documents-apart": (
        "leaves.cuh",
        "low_k <= high_q, low_q == high_k",
        "low_k < high_q, low_q == high_k",
        WRONG,
        lists_of("documents"),
    ),
    "intervals-of-another-head": (
        "leaves.cuh",
        "h / group * head_stride",
        "h * head_stride",
        f"{WRONG}|{OUTSIDE}",
        lists_of("intervals"),
    ),
    "last-bit-not-looked-at": (
        "leaves.cuh",
        "wanted &= 0xffffffffu >> (31 - last % 32);",
        "wanted &= 0x7fffffffu >> (31 - last % 32);",
        WRONG,
        lists_of("dense"),
    ),
    "and-is-or": (
        "leaves.cuh",
        "Sight both(Sight a, Sight b) { return smaller(a, b); }",
        "Sight both(Sight a, Sight b) { return larger(a, b); }",
        WRONG,
        lists_of("every-leaf"),
    ),
    "index-not-clipped": (
        "leaves.cuh",
        "smaller(larger(index[axis], 0ll), (i64)extent[axis] - 1)",
        "larger(index[axis], 0ll)",
        OUTSIDE,
        check_named_arrays,
    ),
}


# ------------------------------------------------------------------------- in results

LONG = Case(batch=2, seqlen_q=200, seqlen_k=400, heads_q=2, heads_k=2, head_dim=32)
RAGGED = replace(CASE, kv_lens=(150, 70), q_lens=(77, 70))


def checkered(case: Case) -> np.ndarray:
    """Tiles of 64 x 128 by turns, other ones in each batch entry and head; each partly visible."""
    b, h, i, j = np.ix_(*map(np.arange, (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)))
    return ((i // 64 + j // 128 + b + h) % 3 > 0) & ((i + j) % 7 > 0)


def terms(*names: str) -> dict[str, Any]:
    every = together(CASE)
    return {name: every[name] for name in names}


DROPOUT = terms("dropout", "seed")
# name: (file, old, new, what it has to end with, architecture, case, options)
BUGS = {
    "the-turn-of-a-neighbour-ends": (
        "flash_bwd_sm80.cu",
        "workspace + tiles.previous() - tiles.current",
        "workspace + 1",
        "deadlock:|race in global memory",
        80,
        LONG,
        {"mask": checkered(LONG)},
    ),
    "work-by-the-block": (
        "flash_bwd_sm80.cu",
        "*index = atomic_add(p.turns, 1);",
        "*index = blockIdx.x;",
        "deadlock:",
        80,
        replace(LONG, batch=1, heads_q=1, heads_k=1),
        {},
    ),
    "bits-of-the-other-rows": (
        "places.cuh",
        "bits >> ((n * kM + m) * 4 + e) & 1",
        "bits >> ((n * kM + m) * 4 + (e ^ 2)) & 1",
        WRONG,
        80,
        LONG,
        {"mask": checkered(LONG)},
    ),
    "bits-of-the-other-rows-transposed": (
        "places.cuh",
        "(kTransposed ? acc_col(n, e) : acc_row(m, e))",
        "(kTransposed ? acc_col(n, e ^ 1) : acc_row(m, e))",
        WRONG,
        90,
        LONG,
        {"mask": checkered(LONG)},
    ),
    "lists-of-the-first-head": (
        "schedule.cuh",
        "if (++head < end) tiles.restart(head);",
        "if (++head < end) tiles.restart(head - 1);",
        f"{WRONG}|deadlock:",
        90,
        replace(LONG, heads_k=1),
        {"mask": checkered(LONG)},
    ),
    "philox-words-not-transposed": (
        "dropout.cuh",
        "keeps(four, kTransposed ? column_half : row_half,",
        "keeps(four, row_half,",
        WRONG,
        90,
        LONG,
        DROPOUT,
    ),
    "dropped-in-the-forward-alone": (
        "flash_bwd_sm80.cu",
        "!kDropout || keep ? prob : 0.f",
        "prob",
        WRONG,
        80,
        CASE,
        DROPOUT,
    ),
    "sink-not-in-the-sum": (
        "softmax.cuh",
        "sum = sum * kept + exp2_approx(difference_log2(extra, shift));",
        "sum = sum * kept;",
        WRONG,
        80,
        CASE,
        terms("sinks"),
    ),
    "sink-of-the-first-head": (
        "flash_fwd_sm80.cu",
        "sink_of(p.problem, head_q + rows.head_in_group(row))",
        "sink_of(p.problem, head_q)",
        WRONG,
        80,
        CASE,
        terms("sinks"),
    ),
    "bias-transposed": (
        "scores.cuh",
        "at.i * x.query_stride + at.j * x.key_stride",
        "at.j * x.query_stride + at.i * x.key_stride",
        f"{WRONG}|{OUTSIDE}",
        80,
        CASE,
        terms("bias"),
    ),
    "part-of-the-bias-left-out": (
        "flash_bwd_bias_sum.cu",
        "split < p.splits",
        "split < p.splits - 1",
        WRONG,
        80,
        CASE,
        {"bias": np.zeros((4, 1, 1), np.float32)},
    ),
    "bias-behind-the-mask": (
        "flash_bwd_bias.cu",
        "for_each_hidden(dp, places, [](float& ds, int, int, int) { ds = 0.f; });",
        "",
        WRONG,
        80,
        RAGGED,
        {"bias": np.zeros((4, 1, 150), np.float32), "causal": True},
    ),
    "slopes-without-offset": (
        "scores.cuh",
        "at.i + at.offset - at.j",
        "at.i - at.j",
        WRONG,
        80,
        CASE,
        terms("alibi_slopes"),
    ),
    "no-derivative-of-the-score-function": (
        "scores.cuh",
        "derivative *= score_mod_derivative(problem, score, at);",
        "",
        WRONG,
        80,
        CASE,
        terms("score_mod"),
    ),
}

# One of each kind in every run; the others compile kernels as well.
QUICK = ("partly-lost", "the-turn-of-a-neighbour-ends")


def parameters(bugs: dict[str, Any]) -> list[Any]:
    return [pytest.param(x, marks=() if x in QUICK else pytest.mark.full) for x in bugs]


def test_every_bug_has_its_place() -> None:
    for source, old, new, *_ in (*LIST_BUGS.values(), *BUGS.values()):
        assert changed(source, old, new)


@pytest.mark.parametrize("name", parameters(LIST_BUGS))
def test_bug_in_lists_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new, wanted, check = LIST_BUGS[name]
    put_in(source, old, new, tmp_path, monkeypatch)
    assert_noticed(name, wanted, [ending_of(check)])


@pytest.mark.parametrize("name", parameters(BUGS))
def test_bug_in_results_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new, wanted, capability, case, options = BUGS[name]
    put_in(source, old, new, tmp_path, monkeypatch)
    endings = (ending(capability, schedule, case, options) for schedule in SCHEDULES)
    assert_noticed(name, wanted, endings)


def ending_of(check: Callable[[], None]) -> str:
    """The emulator's message, or how the lists are."""
    from emulator import EmulatorError

    try:
        check()
    except EmulatorError as error:
        return str(error)
    except AssertionError:
        return WRONG
    return RIGHT


def ending(capability: int, schedule: tuple[str, int], case: Case, options: dict[str, Any]) -> str:
    """The emulator's message, or how the results are."""
    from emulator import EmulatorError

    name, seed = schedule
    arrays = case.arrays()._replace(dlse=None)
    try:
        first, second = (
            run(emulated(capability=capability, schedule=x, seed=y), case, arrays, **options)
            for x, y in ((name, seed), ("random", seed + 7))
        )
    except EmulatorError as error:
        return str(error)
    for key, bound in oracle.expect(arrays, {**case.options, **options}).items():
        if not bound.error(first[key]) <= bound.allowed:
            return WRONG
        if not np.array_equal(bits(first[key]), bits(second[key])):
            return DIFFERENT_BITS
    return RIGHT
