"""What bench counts and compares of masks and biases; none of these tests needs a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import _traits, _work
from cuflash.__main__ import main
from cuflash._mask_blocks import NOTHING, Grid, classify
from cuflash._mask_tree import ScoresShape
from cuflash._reference_masks import visibility
from cuflash.cli import bench, contenders, rules, suites, tables
from cuflash.cli.cells import Cell
from cuflash.cli.inputs import cpu_inputs, gpu_inputs
from cuflash.cli.rules import Documents, PrefixLm, RandomBlocks, RandomPairs, Rule, Tile, Window
from cuflash.cli.timing import HostClock

LENGTH = 90
RULES = (
    *(Documents((40, 1, 49)), Window(25), PrefixLm(0.25)),
    *(RandomBlocks(16, 0.6), RandomPairs(0.5)),
)
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
either_way = pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])


def visible(rule: Rule | None, causal: bool) -> np.ndarray:
    """(S, S), by the reference and our mask."""
    q = np.zeros((1, LENGTH, 1, 1))
    mask = rule.mask(**rule.arrays(LENGTH)) if rule else None
    return visibility(q, q, causal, None, None, None, None, mask)[0, 0]


@either_way
@every_rule
def test_a_rule_is_our_mask(rule: Rule, causal: bool) -> None:
    seen = rules._visible(rule, causal, LENGTH, rule.arrays(LENGTH), 0, LENGTH)
    np.testing.assert_array_equal(seen, visible(rule, causal))
    some = rules._visible(rule, causal, LENGTH, rule.arrays(LENGTH), 70, 40)
    np.testing.assert_array_equal(some, seen[70:])


@either_way
@pytest.mark.parametrize("rule", [None, *RULES], ids=str)
def test_pairs_and_tiles_are_counted(
    monkeypatch: pytest.MonkeyPatch, rule: Rule | None, causal: bool
) -> None:
    monkeypatch.setattr(rules, "CHUNK_ROWS", 37)
    rules.visible_pairs.cache_clear()
    seen = visible(rule, causal)
    assert rules.visible_pairs(rule, causal, LENGTH) == seen.sum()
    tile = Tile(32, 16)
    corners = [(i, j) for i in range(0, LENGTH, 32) for j in range(0, LENGTH, 16)]
    tiles = [seen[i : i + 32, j : j + 16].any() for i, j in corners]
    assert rules.visible_share(rule, causal, LENGTH, tile) == np.mean(tiles)
    cell = Cell("forward", "bfloat16", 2, LENGTH, 3, 16, causal, rule)
    assert cell.flops == 2 * 2 * 2 * 3 * 16 * seen.sum()
    assert cell.dense.flops == 2 * 2 * 2 * 3 * 16 * LENGTH**2


@every_rule
def test_the_counted_tiles_are_those_of_the_classification(rule: Rule) -> None:
    shape = ScoresShape(1, 1, 1, LENGTH, LENGTH)
    grid = Grid(shape, np.zeros(1, np.int64), (32, 16))
    states = classify(rule.mask(**rule.arrays(LENGTH)), grid)
    assert rules.visible_share(rule, False, LENGTH, Tile(32, 16)) == np.mean(states != NOTHING)


def test_directions_share_by_their_products() -> None:
    cell = Cell("forward", "bfloat16", 1, LENGTH, 1, 8, False, Window(1))
    tiles = {"forward": Tile(LENGTH, LENGTH), "backward": Tile(1, 1)}
    assert cell.share(tiles) == 1
    assert replace(cell, direction="backward").share(tiles) == 1 / LENGTH
    both = replace(cell, direction="forward+backward")
    assert both.share(tiles) == pytest.approx((2 + 5 / LENGTH) / 7)
    assert both.flops == cell.flops + replace(cell, direction="backward").flops


def test_the_suite_of_masks() -> None:
    cells = list(suites.cells("masks", quick=False))
    assert len(cells) == len(set(map(str, cells)))
    assert {c.direction for c in cells} == {"forward", "forward+backward"}
    assert {c.dtype for c in cells} == {"bfloat16"}
    assert {(str(c.rule), *c.shape, c.causal) for c in cells if c.rule} == {
        ("8 documents of 2048", 1, 16384, 16, 128, False),
        ("8 documents of 2048", 1, 16384, 16, 128, True),
        ("5 documents of 1000, 3 x 2520, 1440", 1, 10000, 64, 128, False),
        ("5 documents of 1000, 3 x 2520, 1440", 1, 10000, 64, 128, True),
        ("window of 1024", 1, 32768, 8, 128, False),
        ("causal or prefix of 25%", 1, 16384, 16, 128, False),
        ("blocks of 128, 50% empty", 1, 16384, 16, 128, False),
        ("blocks of 128, 90% empty", 1, 16384, 16, 128, False),
        ("dense, 50% empty", 1, 8192, 16, 128, False),
    }
    assert [(c.bias, *c.shape, c.causal) for c in cells if c.bias] == [
        ("fixed", 1, 4096, 16, 128, False),
        ("fixed", 1, 4096, 16, 128, False),
        ("learned", 1, 4096, 16, 128, False),
    ]
    assert 3 <= len(list(suites.cells("masks", quick=True))) <= 5


@pytest.mark.parametrize(("capability", "forward_tile"), [(80, (128, 64)), (90, (128, 128))])
def test_tiles_are_those_of_the_kernels(capability: int, forward_tile: tuple[int, int]) -> None:
    cell = Cell("forward", "bfloat16", 1, 200, 2, 128, True, Window(25))
    inputs = gpu_inputs(np, [cell])(cell)
    tiles = bench._gpu_tiles(capability, cell, inputs)
    assert tiles["forward"] == forward_tile
    block_q, block_kv = tiles["backward"]
    assert block_q in (64, 128) and block_kv in (64, 128)
    plain = bench._gpu_tiles(capability, cell.dense, inputs)
    assert plain["forward"] == {80: (128, 64), 90: (128, 128)}[capability]
    assert _traits.backend_of(capability, tma=True) == f"sm{capability}"


def test_inputs_of_a_gpu_travel_once() -> None:
    sizes = ("bfloat16", 1, LENGTH, 2, 8, False)
    cells = [Cell("forward", *sizes, rule) for rule in RULES]
    cells += [Cell("forward", *sizes, bias="fixed"), Cell("forward", "bfloat16", 1, 7, 2, 8, False)]
    make = gpu_inputs(np, cells)
    inputs = [make(cell) for cell in cells]
    assert all(np.shares_memory(inputs[0].q, other.q) for other in inputs)
    assert [x.q.shape for x in inputs] == [cell.shape for cell in cells]
    assert [set(x.of_rule) for x in inputs[:5]] == [{"ids"}, set(), {"n"}, {"visible"}, {"visible"}]
    assert inputs[5].bias.shape == (2, LENGTH, LENGTH) and inputs[5].bias.dtype == "bfloat16"
    assert inputs[6].bias is None


# ------------------------------------------------------------------------- the contenders


def results(found: Any, heads_first: bool) -> list[np.ndarray]:
    """out, or dq, dk, dv and perhaps dbias, as our own: (B, S, H, D) and (H, S, S)."""
    found = [found] if hasattr(found, "shape") else [x for x in found if x is not None]
    arrays = [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in found]
    arrays[:3] = [x.swapaxes(1, 2) if heads_first else x for x in arrays[:3]]
    return [*arrays[:3], *(x.reshape(x.shape[-3:]) for x in arrays[3:])]


PEERS = {
    "torch": partial(contenders._torch_cpu, HostClock()),
    "torch sdpa": partial(contenders._torch_sdpa, HostClock(), "MATH"),
    "jax": partial(contenders._jax, "xla", lambda: None),
}
# Where every row sees something: else peers give NaN.
PROBLEMS = [
    (rule, causal, "")
    for rule in RULES
    for causal in (False, True)
    if visible(rule, causal).any(axis=1).all()
]
PROBLEMS += [(None, True, ""), (None, False, "fixed"), (None, False, "learned")]
DIRECTED = [(*problem, "forward+backward") for problem in PROBLEMS]
DIRECTED += [(*problem, way) for problem in PROBLEMS[-4:] for way in ("forward", "backward")]


@pytest.mark.parametrize(("rule", "causal", "bias", "direction"), DIRECTED, ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_what_we_compute(
    name: str, rule: Rule | None, causal: bool, bias: Any, direction: Any
) -> None:
    library = name.partition(" ")[0]
    pytest.importorskip(library)
    cell = Cell(direction, "float32", 1, LENGTH, 3, 8, causal, rule, bias)
    inputs = cpu_inputs(cell)
    ours = results(contenders._cuflash(HostClock(), cell, inputs).call(), heads_first=False)
    theirs = results(PEERS[name](cell, inputs).call(), heads_first=library == "torch")
    learned = bias == "learned" and direction != "forward"
    assert len(theirs) == (1 if direction == "forward" else 4 if learned else 3)
    for mine, peer in zip(ours, theirs, strict=bias != "fixed"):
        np.testing.assert_allclose(mine, peer, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("rule", "causal", "bias"), PROBLEMS, ids=str)
def test_flex_attention_computes_what_we_compute(
    monkeypatch: pytest.MonkeyPatch, rule: Rule | None, causal: bool, bias: Any
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cell = Cell("forward", "float32", 1, LENGTH, 2, 16, causal, rule, bias)
    inputs = cpu_inputs(cell)
    (ours,) = results(contenders._cuflash(HostClock(), cell, inputs).call(), heads_first=False)
    contender = contenders._torch_flex(HostClock(), cell, inputs)
    (theirs,) = results(contender.call(), heads_first=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (contender.preparation_ms is not None) == (causal or rule is not None)


@every_rule
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_compiled_mask_is_classified_before_the_timing(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, direction: Any
) -> None:
    cell = Cell(direction, "float32", 1, LENGTH, 2, 8, True, rule)
    inputs = cpu_inputs(cell)
    contender = contenders._cuflash_compiled(HostClock(), cell, inputs)
    first = results(contender.call(), heads_first=False)
    monkeypatch.setattr("cuflash._mask_blocks.classify", None)  # nothing calls it
    for mine, again in zip(first, results(contender.call(), heads_first=False), strict=True):
        np.testing.assert_array_equal(mine, again)


# ------------------------------------------------------------------------- the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's suite of masks, in no time."""
    monkeypatch.setattr(suites, "CPU_MASKS", (Documents((64,) * 4), Window(30)))
    monkeypatch.setattr(suites, "CPU_MASK_SIZES", (1, 256, 2, 8))
    monkeypatch.setattr(bench, "MASK_BLOCK", (32, 32))
    monkeypatch.setattr(_work, "MASK_BLOCK", (32, 32))
    monkeypatch.setattr(contenders, "gemm_tflops_cpu", lambda: (0.5, "numpy float32"))


def test_masks_on_the_cpu_leave_a_table_and_a_file(
    small: None, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "masks.json"
    command = ["bench", "--suite", "cpu-masks", "--seconds", "0.01", "--output", str(output)]
    assert main([*command, "--peers"]) == 0
    report = json.loads(output.read_text())
    assert [cell["rule"] for cell in report["cells"]] == ["4 documents of 64", "window of 30"] * 2
    first = report["cells"][0]
    assert first["share"] == 1 / 4 and first["flops"] == 2 * 2 * 2 * 8 * 256 * 64
    assert first["tiles"] == {"forward": [32, 32], "backward": [32, 32]}
    assert set(first["results"]) == {"cuflash", "cuflash compiled", "cuflash dense"}
    for name in ("cuflash", "cuflash compiled"):
        result = first["results"][name]
        assert result["over_share"] == pytest.approx(4 * result["over_dense"], rel=1e-3)
    assert not {"over_share", "over_dense"} & first["results"]["cuflash dense"].keys()
    table = capsys.readouterr().out
    assert "| forward | 4 documents of 64 | 256 | 2 | no | 25 % | " in table


def test_times_are_held_against_the_dense_one_of_their_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that slows down in the middle changes no ratio."""
    times = {"cuflash": [1.0, 1.0, 1.0, 9.0, 9.0], "cuflash dense": [2.0, 2.0, 2.0, 18.0, 36.0]}
    monkeypatch.setattr(bench, "rounds", lambda ready, seconds: times)
    monkeypatch.setattr(bench, "warm_up", lambda contender: None)
    cell = Cell("forward", "float32", 1, 256, 2, 8, False, Documents((64,) * 4))
    ready = SimpleNamespace(preparation_ms=None)
    factories = dict.fromkeys(times, lambda cell, inputs: ready)
    row = bench._run_cell(cell, factories, None, seconds=1)
    bench._add_shares(row, cell, {"forward": Tile(64, 64)})
    assert row["results"]["cuflash"]["median_ms"] == 1.0
    assert row["results"]["cuflash"]["over_dense"] == 0.5
    assert row["results"]["cuflash"]["over_share"] == 2.0


def test_the_table_of_masks() -> None:
    cell = {"direction": "forward", "rule": "window of 9", "bias": "", "seqlen": 64, "heads": 2}
    found = {
        "cuflash": {"median_ms": 2.0, "tflops": 300.0, "over_share": 1.125},
        "cuflash compiled": {"error": "ValueError: the cell has no mask to compile"},
        "cuflash dense": {"median_ms": 10.0, "tflops": 400.0},
        "torch flex": {"median_ms": 3.0, "tflops": 200.0, "preparation_ms": 1.5},
        "torch cudnn": {"error": "RuntimeError: No available kernel."},
    }
    row = {**cell, "causal": True, "share": 0.1875, "results": found}
    biased = {**row, "rule": "", "bias": "learned", "share": 1.0}
    gemm = {"tflops": 600.0, "by": "torch bfloat16"}
    report = {
        "device": "GPU",
        "suite": "masks",
        "date": "2026-01-01",
        "gemm": gemm,
        "cells": [row, biased],
    }
    table = tables.table(report)
    times = "| 10 | 2 | 300 | 1.125 | – | – | – | 3 | – | 1.50 |"
    assert f"| forward | window of 9 | 64 | 2 | yes | 18.8 % {times}" in table
    assert f"| forward | learned bias | 64 | 2 | yes | 100 % {times}" in table
    assert table.endswith("torch cudnn: RuntimeError: No available kernel.")
