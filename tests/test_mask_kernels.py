"""Masks on the GPU kernels, emulated: the tiles that are found, listed, loaded and left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mask_cases
import numpy as np
import pytest
from backends import Backend, EmulatedBackend, EmulatedGpu, Launch, _arrays_of
from conftest import emulated, on_every_backend
from test_attention import check, check_non_finite, run
from test_masks import HIDING

from cuflash import _classify, _launch, _traits, masks
from cuflash._checks import Check
from cuflash._problem import GradientProblem, Problem
from cuflash._reference_masks import visibility
from cuflash._traits import Tiling
from cuflash.cli import oracle
from cuflash.cli.cases import Case
from cuflash.masks import Mask

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

NONE, SOME, ALL = range(3)
FORWARD, BACKWARD = False, True


def problem_of(case: Case, **options: Any) -> Problem:
    q, k, v, *_ = case.arrays()
    return Problem.create("attention", "cuda", q, k, v, **{**case.options, **options})


def gpu_of(problem: Problem | GradientProblem, capability: int = 80) -> EmulatedGpu:
    emulated()  # or skip
    return EmulatedGpu(capability, "lazy", 0, _arrays_of(problem))


# ------------------------------------------------------------------------- which tiles are visible


def visible_pairs(problem: Problem) -> np.ndarray:
    """(B, Hq, Sq, Sk)"""
    left, right = problem.window
    window = None if left is None and right is None else problem.window
    lengths = (problem.q_lens, problem.kv_lens)
    return visibility(problem.q, problem.k, False, problem.offset, window, *lengths, problem.mask)


def brute_force(problem: Problem, tiling: Tiling, whole_rows: bool) -> np.ndarray:
    """(B, heads of rows, query tiles, key tiles): NONE, SOME or ALL of their pairs are visible.

    Positions of which a tile of packed rows has one head count with all heads. What lies past the
    key length is hidden, past the query length only if `whole_rows`.
    """
    visible = visible_pairs(problem)
    batch, heads_q, seqlen_q, seqlen_k = visible.shape
    packed = problem.group if tiling.pack_group else 1
    visible = visible.reshape(batch, -1, packed, seqlen_q, seqlen_k)
    query_tiles = -(-seqlen_q * packed // tiling.block_q)
    found = np.zeros((batch, visible.shape[1], query_tiles, -(-seqlen_k // tiling.block_kv)), int)
    for b in range(batch):
        q_len = seqlen_q if problem.q_lens is None else problem.q_lens[b]
        kv_len = seqlen_k if problem.kv_lens is None else problem.kv_lens[b]
        for _, tile_q, tile_k in np.ndindex(1, *found.shape[2:]):
            row, row_end = tile_q * tiling.block_q, (tile_q + 1) * tiling.block_q
            key, key_end = tile_k * tiling.block_kv, (tile_k + 1) * tiling.block_kv
            positions = slice(row // packed, min(-(-row_end // packed), q_len))
            pairs = visible[b, :, :, positions, key : min(key_end, kv_len)]
            whole = key_end <= kv_len and (row_end <= q_len * packed or not whole_rows)
            any_, all_ = (f(axis=(1, 2, 3)) for f in (pairs.any, pairs.all))
            found[b, :, tile_q, tile_k] = np.where(any_, np.where(all_ & whole, ALL, SOME), NONE)
    return found


def expected_lists(sights: np.ndarray, of_keys: bool) -> list[np.ndarray]:
    """Of each tile, in order, the entries: 2 tile + (partly visible), turn."""
    turns = np.cumsum(sights != NONE, axis=-1) - 1  # of a key tile among those of its query tile
    if of_keys:
        sights, turns = sights.swapaxes(-1, -2), turns.swapaxes(-1, -2)
    lists = []
    steps = sights.shape[-1]
    for line, turn in zip(sights.reshape(-1, steps), turns.reshape(-1, steps), strict=True):
        tiles = np.flatnonzero(line != NONE)
        lists.append(np.stack([2 * tiles + (line[tiles] == SOME), turn[tiles]], axis=1))
    return lists


def check_lists(problem: Problem, tiling: Tiling, of_keys: bool) -> None:
    """The lists that a kernel of this tiling gets are those of the brute force."""
    on = gpu_of(problem)
    on_device = _launch._with_device_arrays(problem, on)
    traits = _traits.Traits.of(problem, alignment=16)
    entries = _classify.tables(on_device, traits, tiling, on, of_keys).owners[-1]
    on.synchronize()
    sights = brute_force(problem, tiling, whole_rows=of_keys)
    # Batch entries and heads that share lists must all be right about them.
    every = np.broadcast_to(entries, (*sights.shape[:2], *entries.shape[2:]))
    for found, right in zip(
        every.reshape(-1, *every.shape[3:]), expected_lists(sights, of_keys), strict=True
    ):
        assert found[0, 0] == len(right)
        np.testing.assert_array_equal(found[1 : 1 + len(right)], right)


GROUPED = Case(batch=3, seqlen_q=65, seqlen_k=95, heads_q=4, heads_k=2, head_dim=8)
EDGES = replace(GROUPED, q_lens=(0, 1, 63), kv_lens=(95, 32, 33))
# Groups of three do not divide the tiles: some positions lie in two.
CASES = (GROUPED, EDGES, replace(EDGES, heads_q=6), replace(GROUPED, seqlen_q=64, seqlen_k=96))
# Small tiles: a small problem has many, and each edge that larger ones have.
TILINGS = {
    "forward": (Tiling(32, 16, False), FORWARD),
    "backward-packed": (Tiling(16, 32, True), BACKWARD),
    "forward-packed": (Tiling(32, 16, True), FORWARD),
    "backward": (Tiling(16, 32, False), BACKWARD),
}
TREES = {
    "prefix-lm": lambda rng, case: masks.causal() | mask_cases.prefix(rng, case),
    "every-leaf": mask_cases.every_leaf,
}
KINDS = {**mask_cases.LEAVES, "expression": lambda rng, case: mask_cases.SCATTERED, **TREES}


BY_TILINGS = [
    pytest.param(
        kind,
        name,
        id=f"{kind}-{name}",
        # Each compiles a kernel: two tilings of every kind do in every run, and all of one.
        marks=() if number % 2 == place // 2 or kind == "every-leaf" else pytest.mark.full,
    )
    for number, kind in enumerate(KINDS)
    for place, name in enumerate(TILINGS)
]


@pytest.mark.parametrize("kind, tiling", BY_TILINGS)
def test_lists_of_every_kind(rng: np.random.Generator, kind: str, tiling: str) -> None:
    for case in CASES:
        for options in ({}, {"causal": True, "offset": np.array([0, -20, 31])}):
            problem = problem_of(case, mask=KINDS[kind](rng, case), **options)
            check_lists(problem, *TILINGS[tiling])


def test_bits_of_arrays_of_any_strides(rng: np.random.Generator) -> None:
    array = rng.random((2, 95, 4, 65)) < 0.5
    for view in (
        array.transpose(0, 2, 3, 1),
        array.transpose(0, 2, 3, 1)[:, ::-1, ::-1, ::-1],
        np.broadcast_to(array[:1, :, 0, :1].swapaxes(0, 2), (1, 95, 1)).swapaxes(1, 2),
    ):
        problem = problem_of(replace(GROUPED, batch=2), mask=view)
        on = gpu_of(problem)
        (bits,) = _classify._pack_bits(problem.mask, on).values()
        on.synchronize()
        found = np.unpackbits(bits.words.view(np.uint8), axis=-1, bitorder="little")
        keys = view.shape[-1]
        np.testing.assert_array_equal(
            found[..., :keys], view.reshape(bits.words.shape[:3] + (keys,))
        )
        assert not found[..., keys:].any()


DOCUMENTS = masks.documents(np.zeros((3, 65), int), np.zeros((3, 95), int))
SHARED = {  # (batches, heads of packed rows) that have lists of their own
    "no-array": (masks.causal() & ~masks.window(1, 1), {}, (1, 1)),
    "offset-of-the-call": (masks.causal(), {"offset": np.arange(3)}, (3, 1)),
    "lengths-of-the-call": (masks.causal(), {"kv_lens": np.arange(3)}, (3, 1)),
    "offset-of-the-mask": (masks.causal(offset=[1, 2, 3]), {}, (3, 1)),
    "documents": (masks.causal() & DOCUMENTS, {}, (3, 1)),
    "intervals": (masks.intervals(*np.zeros((2, 3, 1, 95, 1), int)), {}, (3, 1)),
    "intervals-of-heads": (masks.intervals(*np.zeros((2, 3, 2, 95, 1), int)), {}, (3, 2)),
    "dense": (masks.dense(np.ones((65, 95), bool)), {}, (1, 1)),
    "dense-of-heads": (masks.dense(np.ones((4, 1, 1), bool)), {}, (1, 2)),
    "dense-of-batch": (masks.dense(np.ones((3, 1, 65, 1), bool)), {}, (3, 1)),
    "blocks-of-heads": (masks.blocks(np.ones((1, 4, 1, 1), bool), 95, 95), {}, (1, 2)),
    "expression": (masks.expression("i > j", lambda b, h, i, j: i > j), {}, (1, 1)),
    "expression-of-both": (masks.expression("h > b", lambda b, h, i, j: h > b), {}, (3, 2)),
}


@pytest.mark.parametrize("mask, options, shape", SHARED.values(), ids=SHARED)
def test_batch_entries_and_heads_share_lists(
    mask: Mask, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    problem = problem_of(GROUPED, mask=mask, **options)
    on, traits = gpu_of(problem), _traits.Traits.of(problem, alignment=16)
    for of_keys in (FORWARD, BACKWARD):
        tables = _classify.tables(problem, traits, Tiling(16, 16, True), on, of_keys)
        assert tables.owners[-1].shape[:2] == shape
        strides = (tables.lists.batch_stride, tables.lists.head_stride)
        assert [stride > 0 for stride in strides] == [n > 1 for n in shape]


def test_memory_is_a_few_bytes_per_tile() -> None:
    """Of 64k tokens; nothing waits for the device, as here nothing has run."""
    case = Case(batch=1, seqlen_q=1 << 16, seqlen_k=1 << 16, heads_q=1, heads_k=1, head_dim=1)
    ids = np.zeros((1, 1 << 16), np.int64)
    problem = problem_of(case, mask=masks.causal() & masks.documents(ids))
    traits = _traits.Traits.of(problem, alignment=16)
    for of_keys in (FORWARD, BACKWARD):
        on = gpu_of(problem)
        inputs = len(on.buffers)
        _classify.tables(problem, traits, Tiling(128, 64, False), on, of_keys)
        tiles = 512 * 1024
        assert sum(x.nbytes for x in on.buffers[inputs:]) < (10, 22)[of_keys] * tiles


# ------------------------------------------------------------------------- what is loaded

# A structure that can hide anything: one pair of kernels per architecture serves what follows.
CASE = Case(batch=1, seqlen_q=200, seqlen_k=420, heads_q=2, heads_k=1, head_dim=40, head_dim_v=24)
ARCHITECTURES = (80, 90)


def cells(rng: np.random.Generator, heads: int = 2) -> np.ndarray:
    """(1, heads, Sq, Sk): cells of 32 x 64 that are hidden, partly visible or visible."""
    states = rng.choice([0.0, 0.6, 1.0], (1, heads, 7, 7), p=[0.5, 0.2, 0.3])
    share = states.repeat(32, axis=2).repeat(64, axis=3)[:, :, :200, :420]
    visible = rng.random(share.shape) < share
    visible[:, :, 90:110] = False  # rows that see nothing
    return visible


def only(rows: slice, keys: slice) -> np.ndarray:
    visible = np.zeros((1, 2, 200, 420), bool)
    visible[:, 1, rows, keys] = True
    return visible


SEEN = {
    "cells": cells(np.random.default_rng(0)),
    "cells-of-all-heads": cells(np.random.default_rng(1), heads=1),
    "one-pair": only(slice(130, 131), slice(300, 301)),
    "nothing": only(slice(0), slice(0)),
    "everything": np.ones((1, 1, 200, 420), bool),
}


WIDE = replace(CASE, head_dim=192, head_dim_v=128)  # Hopper's backward has a kernel for these
SEEN_BY = [
    *(pytest.param(CASE, visible, id=name) for name, visible in SEEN.items()),
    # All tiles are whole, in both directions.
    pytest.param(replace(CASE, seqlen_q=256, seqlen_k=384), np.ones((1, 1), bool), id="whole"),
    *(
        pytest.param(WIDE, SEEN[name], id=f"wide-{name}", marks=pytest.mark.full)
        for name in ("cells", "everything")
    ),
]


@pytest.mark.parametrize("case, visible", SEEN_BY)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_visible_tiles_are_loaded_and_no_others(
    capability: int, case: Case, visible: np.ndarray
) -> None:
    """And of the mask what partly visible ones need; and the results are right."""
    backend = emulated(capability=capability)
    mask = masks.dense(visible)
    q, k, v, dout, _ = arrays = case.arrays()
    check(backend, case, arrays[:4], mask=mask)
    forward, backward = (the_launch(backend, name) for name in ("flash_fwd", "flash_bwd"))

    problem = problem_of(case, mask=mask)
    sights = brute_force(problem, forward.tiling, whole_rows=False)
    rows, keys = sizes(problem, forward.tiling, sights)
    loaded = ((sights != NONE) * keys).sum()
    assert forward.bytes_read(k) == loaded * k[0, 0, 0].nbytes
    assert forward.bytes_read(v) == loaded * v[0, 0, 0].nbytes
    # Each of them takes as long as it takes: the hardware spreads them, one block to each.
    assert forward.blocks == sights[..., 0].size
    check_bits_read(forward, mask, (sights == SOME) * rows * keys)

    sights = brute_force(problem, backward.tiling, whole_rows=True)
    visited = sights != NONE
    rows, keys = sizes(problem, backward.tiling, sights)
    loaded = (visited * rows).sum()
    assert backward.bytes_read(q) == loaded * q[0, 0, 0].nbytes
    assert backward.bytes_read(dout) == loaded * dout[0, 0, 0].nbytes
    loaded = (visited.any(axis=(1, 2)) * keys).sum()  # once for all rows of a key head
    assert backward.bytes_read(k) == loaded * k[0, 0, 0].nbytes
    assert backward.bytes_read(v) == loaded * v[0, 0, 0].nbytes
    check_bits_read(backward, mask, (sights == SOME) * rows * keys)


def the_launch(backend: EmulatedBackend, entry: str) -> Launch:
    return next(x for x in backend.launches if x.kernel.entry == entry)


def check_bits_read(launch: Launch, mask: Mask, pairs: np.ndarray) -> None:
    """A word for each of these pairs, and none where there are none."""
    (leaf,) = mask.leaves()
    shape = (1,) * (4 - leaf.array.ndim) + leaf.array.shape
    shape = (*shape[:3], -(-shape[3] // _classify.WORD_KEYS))
    words = [x for x in launch.buffers if x.dtype == np.uint32 and x.shape == shape]
    assert words
    read = sum(map(launch.bytes_read, words))
    assert read == pairs.sum() * words[0].itemsize


def sizes(problem: Problem, tiling: Tiling, sights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each tile the rows, (query tiles, 1), and the keys."""
    packed = problem.group if tiling.pack_group else 1
    rows = heights(sights.shape[2], tiling.block_q, problem.seqlen_q * packed)
    return rows[:, None], heights(sights.shape[3], tiling.block_kv, problem.seqlen_k)


def heights(tiles: int, block: int, length: int) -> np.ndarray:
    """Rows or keys of each tile."""
    return np.minimum(block, length - block * np.arange(tiles))


@pytest.mark.parametrize("schedule", [("eager", 0), ("random", 0), ("random", 1)], ids=str)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_lists_under_other_schedules(capability: int, schedule: tuple[str, int]) -> None:
    name, seed = schedule
    check(emulated(capability=capability, schedule=name, seed=seed), CASE, mask=SEEN["cells"])


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_a_mask_that_hides_everything_gives_zeros(capability: int) -> None:
    found = run(emulated(capability=capability), CASE, mask=SEEN["nothing"])
    assert (found.pop("lse") == -np.inf).all()
    assert not any(x.any() for x in found.values())


NON_FINITE = {
    "v": ("v", (0, 70, 0, 3), np.nan),
    "k": ("k", (0, 100, 0, 0), np.nan),
    "q": ("q", (0, 60, 1, 9), np.inf),
    "dout": ("dout", (0, 33, 0, 1), np.nan),
}


@pytest.mark.parametrize("where", NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_non_finite_reaches_only_what_sees_it(
    capability: int, where: tuple[str, tuple[int, ...], float]
) -> None:
    check_scattered_non_finite(capability, replace(CASE, seqlen_q=77, seqlen_k=150), where)


@pytest.mark.full
@pytest.mark.parametrize("where", NON_FINITE.values(), ids=NON_FINITE)
@pytest.mark.parametrize("head_dims", [(40, 136), (128, 64), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_non_finite_at_other_head_sizes(
    capability: int, head_dims: tuple[int, int], where: tuple[str, tuple[int, ...], float]
) -> None:
    head_dim, head_dim_v = head_dims
    case = replace(CASE, seqlen_q=77, seqlen_k=150, head_dim=head_dim, head_dim_v=head_dim_v)
    check_scattered_non_finite(capability, case, where)


def check_scattered_non_finite(
    capability: int, case: Case, where: tuple[str, tuple[int, ...], float]
) -> None:
    mask = masks.dense(np.random.default_rng(2).random((1, 2, 77, 150)) < 0.3)
    check_non_finite(emulated(capability=capability), case, where, mask=mask)


# ------------------------------------------------------------------------- what is hidden


BIASED = replace(CASE, seqlen_q=150, seqlen_k=200)
SEEN_OF_BIASED = SEEN["cells"][:, :, :150, :200]


def test_hidden_biases_may_be_nan(backend: Backend) -> None:
    bias = np.random.default_rng(0).standard_normal(SEEN_OF_BIASED.shape, np.float32)
    bias[~SEEN_OF_BIASED] = np.nan
    check(backend, BIASED, bias=bias, mask=masks.dense(SEEN_OF_BIASED))


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_gradient_of_a_bias_loads_visible_tiles_and_no_others(capability: int) -> None:
    backend, mask = emulated(capability=capability), masks.dense(SEEN_OF_BIASED)
    q, k, v, dout, _ = arrays = BIASED.arrays()
    run(backend, BIASED, arrays, mask=mask, bias=np.zeros(SEEN_OF_BIASED.shape, np.float32))
    launch, problem = the_launch(backend, "flash_bwd_bias"), problem_of(BIASED, mask=mask)
    seen = brute_force(problem, launch.tiling, whole_rows=False) != NONE
    assert not seen.all()
    rows, keys = sizes(problem, launch.tiling, seen)
    for of_rows, of_keys in ((q, k), (dout, v)):
        assert launch.bytes_read(of_rows) == (seen * rows).sum() * of_rows[0, 0, 0].nbytes
        assert launch.bytes_read(of_keys) == (seen * keys).sum() * of_keys[0, 0, 0].nbytes


HIDING_CASE = replace(CASE, batch=2, seqlen_q=70, seqlen_k=90, heads_q=4, heads_k=2)
TREE_CASE = replace(HIDING_CASE, head_dim=32, head_dim_v=64)
# Their kernels are those of other tests: of each other leaf they are its own.
HIDING_ALWAYS = [f"emulated-{x}-{name}" for x in ARCHITECTURES for name in ("dense", "every-leaf")]


def hiding() -> dict[str, tuple[Case, Mask]]:
    """Masks with rows that see no key or keys that no row sees, beside others."""
    dense = ~np.logical_or.outer(np.arange(70) % 5 > 1, np.arange(90) % 7 > 3)
    cases = {name: (HIDING_CASE, mask) for name, mask in HIDING.items()}
    cases["dense"] = (HIDING_CASE, masks.dense(dense))
    return {**cases, "every-leaf": (TREE_CASE, hiding_tree())}


def hiding_tree() -> Mask:
    """Rows below 20 see no key, and no row sees the keys from 70 on."""
    batch, rows, keys = 2, np.arange(70), np.arange(90)
    blind, unseen = rows < 20, keys >= 70
    q_ids = np.where(blind, -1, rows // 25)
    kv_ids = np.where(unseen, -2, keys // 25)
    end = np.where(unseen, 70, 20).reshape(1, 1, 90, 1).repeat(batch, axis=0)
    return mask_cases.joined(
        masks.documents(q_ids[None].repeat(batch, axis=0), kv_ids[None].repeat(batch, axis=0)),
        masks.intervals(np.zeros_like(end), end),
        masks.lengths([40, 0]),
        masks.dense(np.logical_or.outer(blind, unseen)),
        masks.blocks(np.diag([True, False, True]), 30, 30),
        masks.window(20, 3, 15),
        masks.prefix([90, 50]),
    )


@pytest.mark.parametrize(
    "backend, case, mask", on_every_backend(hiding(), HIDING_ALWAYS), indirect=["backend"]
)
def test_what_a_mask_hides_may_be_nan(backend: Backend, case: Case, mask: Mask) -> None:
    """Everywhere that nobody sees, in k and v, and where nothing is seen, in q, dout and dlse."""
    clean = case.arrays()
    q, k, v, dout, dlse = (x.copy() for x in clean)
    visible = visible_pairs(problem_of(case, mask=mask))
    blind = ~visible.any(axis=3)  # (B, Hq, Sq)
    unseen = ~visible.reshape(2, 2, 2, 70, 90).any(axis=(2, 3)).swapaxes(1, 2)  # (B, Sk, Hk)
    assert visible.any() and (blind.any() or unseen.any())
    q[blind.swapaxes(1, 2)] = dout[blind.swapaxes(1, 2)] = k[unseen] = v[unseen] = np.nan
    dlse[blind] = np.nan
    found = run(backend, case, (q, k, v, dout, None), dlse, mask=mask)
    check_bounds(found, oracle.expect(clean, {**case.options, "mask": mask}))


def check_bounds(found: dict[str, np.ndarray], bounds: dict[str, oracle.Bound]) -> None:
    for name, bound in bounds.items():
        error = bound.error(found[name])
        assert error <= bound.allowed, f"{name}: error {error:.2e}, allowed {bound.allowed:.2e}"


# ------------------------------------------------------------------------- any data

FAR = 2**63 - 1
WILD = np.array([-FAR - 1, -FAR, -(2**61), -5, 0, 3, 90, 10**6, 2**31, 2**33, 2**61, FAR])
WILD_CASE = replace(TREE_CASE, batch=3)
WILD_OPTIONS = {
    "q_lens": np.array([2**40, -7, 65]),
    "kv_lens": np.array([91, 2**33, -(2**50)]),
    "offset": np.array([FAR, -FAR, 20]),
}


def wild_mask(offset: np.ndarray) -> Mask:
    """`offset`: of its window. All others are any integers."""
    rng = np.random.default_rng(0)
    case = WILD_CASE

    def wild(*shape: int) -> np.ndarray:
        return rng.choice(WILD, (case.batch, *shape))

    return mask_cases.joined(
        masks.documents(wild(case.seqlen_q), wild(case.seqlen_k)),
        masks.intervals(*(wild(case.heads_k, case.seqlen_k, 2) for _ in range(2))),
        masks.lengths(wild(), wild()),
        mask_cases.dense(rng, case),
        mask_cases.blocks(rng, case),
        masks.window(None, 7, offset),
        masks.prefix(wild()),
    )


@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "masks"])
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_integers_of_any_data_stay_inside(
    capability: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host reads no values: kernels clip lengths, and offsets to what does not wrap.

    The emulator reports whatever reads or writes outside the arrays.
    """
    monkeypatch.setattr(Check, "values_within", lambda self, name, array, low, high: None)
    case = WILD_CASE if masked else replace(WILD_CASE, head_dim_v=32)
    offset = WILD_OPTIONS["offset"]
    options = {**WILD_OPTIONS, "causal": True, "mask": wild_mask(offset) if masked else None}
    found = run(emulated(capability=capability), case, dlse=case.arrays().dlse, **options)

    offset = np.clip(offset, -(2**60), 2**60)
    options |= {
        "q_lens": np.clip(options["q_lens"], 0, case.seqlen_q),
        "kv_lens": np.clip(options["kv_lens"], 0, case.seqlen_k),
        "offset": offset,
        "mask": wild_mask(offset) if masked else None,
    }
    check_bounds(found, oracle.expect(case.arrays(), options))


# ------------------------------------------------------------------------- what is launched

IN_FORWARD = ["mask_bits", "mask_tiles", "mask_lists", "flash_fwd"]
IN_BACKWARD = ["mask_bits", "mask_tiles", "mask_lists", "mask_lists"]
OF_BACKWARD = ["flash_bwd_prep", "flash_bwd", "flash_bwd_post"]


def launched(backend: EmulatedBackend, mask: Any) -> list[_traits.Kernel]:
    """By a forward and a backward pass."""
    before = len(backend.launches)
    run(backend, CASE, mask=mask)
    return [launch.kernel for launch in backend.launches[before:]]


def entries_of(kernels: list[_traits.Kernel]) -> list[str]:
    return [kernel.entry for kernel in kernels]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiled_masks_keep_what_calls_find(capability: int) -> None:
    backend = emulated(capability=capability)
    q, k, *_ = CASE.arrays()
    mask = masks.dense(SEEN["cells-of-all-heads"])
    assert entries_of(launched(backend, mask)) == IN_FORWARD + IN_BACKWARD + OF_BACKWARD
    compiled = mask.compile(q, k)
    # The backward pass finds the bits that the forward pass left.
    assert entries_of(launched(backend, compiled)) == IN_FORWARD + IN_BACKWARD[1:] + OF_BACKWARD
    before = len(backend.launches)
    check(backend, CASE, mask=compiled)
    again = [launch.kernel for launch in backend.launches[before:]]
    assert entries_of(again) == ["flash_fwd", *OF_BACKWARD]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiled_masks_keep_what_the_gradient_of_a_bias_finds(capability: int) -> None:
    backend = emulated(capability=capability)
    q, k, v, dout, _ = BIASED.arrays()
    mask = masks.dense(SEEN_OF_BIASED).compile(q, k)
    bias = np.zeros(SEEN_OF_BIASED.shape, np.float32)
    out, lse = backend.forward(q, k, v, mask=mask, bias=bias)
    found = []
    for _ in range(2):
        before = len(backend.launches)
        grads = backend.backward(dout, q, k, v, out, lse, mask=mask, bias=bias)
        entries = [launch.kernel.entry for launch in backend.launches[before:]]
        found.append((entries, grads.dbias))
    (first, right), (second, again) = found
    assert first.count("mask_tiles") == 2  # of the main kernel's tiles and of the bias's
    assert second == [*OF_BACKWARD, "flash_bwd_bias", "flash_bwd_bias_sum"]
    np.testing.assert_array_equal(again, right)


def test_compiled_masks_hold_what_kernels_read() -> None:
    ids = np.zeros((3, 130), np.int32)[:, ::2]
    q, k, *_ = GROUPED.arrays()
    for x in masks.documents(ids, np.zeros((3, 95), np.int16)).compile(q, k).arrays().values():
        assert x.dtype == np.int64 and x.flags.c_contiguous


def test_new_data_compile_nothing() -> None:
    """A kernel is known by the structure of a mask, not by its data, shapes, strides or numbers."""
    rng = np.random.default_rng(3)
    sources = set()
    for case in (GROUPED, replace(GROUPED, seqlen_q=70, batch=1)):
        for heads in (1, case.heads_k):
            shape = (case.batch, heads, case.seqlen_k, 2)
            start, end = rng.integers(0, case.seqlen_q + 1, (2, *shape))
            ids = rng.integers(0, 9, (case.batch, case.seqlen_q))
            offset = rng.integers(0, 9, case.batch) if heads == 1 else heads
            tree = masks.intervals(start, end) & ~masks.window(heads, None, offset=offset)
            tree |= masks.documents(ids, ids[:, :1].repeat(case.seqlen_k, axis=1))
            sources.add(_traits.Traits.of(problem_of(case, mask=tree), alignment=16).extras)
    assert len(sources) == 1
    backend = emulated()
    first, second = (launched(backend, SEEN[name]) for name in ("one-pair", "nothing"))
    assert first == second
