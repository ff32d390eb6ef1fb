"""benchmarks/sweep_tiles.py; none of these tests needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import emulated

import cuflash
from cuflash import _jit, _plan, _plan_sm80, _plan_sm90, reference
from cuflash._traits import TMA_BYTES, Traits, smem_limit
from cuflash.cli import reports, suites
from cuflash.cli.compile import Outcome

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "sweep_tiles.py"
CLEAN = _jit.Resources(registers=168, stack_bytes=0, spill_bytes=0, static_smem_bytes=0)


@pytest.fixture(scope="module")
def sweep_tiles() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_tiles", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_tiles"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("backend", "capability"), [("sm90", 90), ("sm80", 80), ("sm80", 86)])
def test_candidates_fit_and_begin_with_todays(
    sweep_tiles: ModuleType, backend: str, capability: int, direction: str, head_dim: int
) -> None:
    todays, *others = sweep_tiles.Sweep(direction, backend, capability).candidates(head_dim)
    sizes = ("bfloat16", head_dim, head_dim, TMA_BYTES)
    traits = Traits(*sizes, False, False, False, False, tma=backend == "sm90")
    if direction == "forward":
        assert todays.plan == _plan.forward_plan(traits, capability)
    else:
        assert todays.plan == _plan.backward_plan(traits, capability, True)
    dense = replace(traits, dense_tiles=backend == "sm90" and head_dim == 128)
    todays_too = [x.plan for x in others if x.is_todays]
    assert todays.is_todays
    if direction == "forward" and dense.dense_tiles:
        assert todays_too == [_plan.forward_plan(dense, capability)]
    else:
        assert not todays_too
    assert len({str(x) for x in others} | {str(todays)}) == 1 + len(others)
    for candidate in (todays, *others):
        assert candidate.plan.backend == backend
        for kernel in candidate.kernels:
            assert kernel.smem_bytes <= smem_limit(capability)
            assert kernel.threads in (128, 256, 384, 512)


def test_what_hopper_may_have(sweep_tiles: ModuleType) -> None:
    forward = sweep_tiles.Sweep("forward", "sm90", 90)
    assert len(forward.candidates(64)) == 2 * 9 * 2 * 2
    three = [x for x in forward.candidates(128) if x.tiles.stages == 3]
    assert {x.tiles.block_kv for x in three if x.tiles.consumers == 2} == set(range(64, 129, 16))
    assert all(dict(x.plan.kernel.constants)["STAGES"] == 3 for x in three)
    backward = sweep_tiles.Sweep("backward", "sm90", 90)
    sources = [x.plan.main.source for x in backward.candidates(64)]
    assert sorted(sources) == ["flash_bwd_sm90.cu"] * 2 + ["flash_bwd_wide_sm90.cu"]


def test_gains_are_over_what_each_cell_has_today(sweep_tiles: ModuleType) -> None:
    sweep = sweep_tiles.Sweep("forward", "sm90", 90)
    cells = []
    for seqlen, causal in ((2048, False), (16384, False), (16384, True)):
        tiles = sweep.todays(128, seqlen, causal)
        results = {"slow": {"median_ms": 4.0}, sweep_tiles.name_of(tiles): {"median_ms": 1.0}}
        cells.append({"todays": sweep_tiles.name_of(tiles), "results": results})
    assert [f"block_kv={n}" in x["todays"] for n, x in zip((128, 176, 128), cells, strict=True)]
    assert len({x["todays"] for x in cells}) == 2
    assert sweep_tiles.gain(cells, "slow") == 0.25
    assert sweep_tiles.gain(cells[:1], cells[0]["todays"]) == 1


@pytest.fixture
def two_forward_tiles(sweep_tiles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sm80, 128 x 64, with four and with eight warps."""
    ranges = {"block_q": (128,), "block_kv": (64,), "warps": (4, 8)}
    monkeypatch.setitem(sweep_tiles.RANGES, ("sm80", "forward"), (_plan_sm80.ForwardTiles, ranges))


def test_compile_only(
    sweep_tiles: ModuleType, two_forward_tiles: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")
    arguments = "forward --arch sm_80 --compile-only --jobs 1 --head-dim 160"
    assert sweep_tiles.main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    eight, four = ([x.strip() for x in line.split("|")[1:-1]] for line in lines[-2:])
    # 224 accumulators, and what goes with them, in the registers of a thread.
    smem_bytes = str(2 * (128 + 2 * 64) * 160)
    assert eight[:4] == ["128", "64", "8", "today's"]
    assert eight[5:] == ["0", "0", smem_bytes, ""]
    assert four[:5] == ["128", "64", "4", "", "255"]
    assert int(four[5]) > 0 and int(four[6]) > 0 and four[7:] == [smem_bytes, ""]


def test_why_a_candidate_is_dropped(sweep_tiles: ModuleType) -> None:
    todays, other, *_ = sweep_tiles.Sweep("forward", "sm90", 90).candidates(64)

    def compiled(candidate: Any, **result: Any) -> Any:
        kernel = candidate.plan.kernel
        return sweep_tiles.Compiled.of(candidate, {kernel: Outcome(kernel, **result)})

    spilled = replace(CLEAN, spill_bytes=8, notes=("C7510",))
    assert compiled(other, resources=CLEAN).is_measured
    assert compiled(other, resources=spilled).fault == "8 bytes spilled, ptxas: C7510"
    assert not compiled(other, resources=spilled).is_measured
    assert compiled(todays, resources=spilled).is_measured
    log = "cuflash: NVRTC cannot compile\nplaces.cuh(40): error: too many\n  more"
    assert compiled(todays, error=log).fault == "does not compile: too many"
    assert not compiled(todays, error=log).is_measured
    log = "cuflash: NVRTC cannot compile\nptxas fatal   : (C7602) Insufficient registers\n"
    assert compiled(todays, error=log).error == "(C7602) Insufficient registers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("forward --arch sm_90", "--arch goes with --compile-only"),
        ("forward --head-dim 60", "'60' is no multiple of 8"),
        ("forward --seqlen 3000", "'3000' does not divide 16384 tokens"),
    ],
)
def test_arguments_that_are_refused(
    sweep_tiles: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep_tiles.main(arguments.split())
    assert message in capsys.readouterr().err


def test_hoppers_backend_is_for_hopper(
    sweep_tiles: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "forward --backend sm90 --arch sm_80 --compile-only"
    assert sweep_tiles.main(arguments.split()) == 2
    assert "is for sm_90 alone, not for sm_80" in capsys.readouterr().err


def test_a_difference_is_relative_and_shows_nan(sweep_tiles: ModuleType) -> None:
    ones = np.ones((2, 3), cuflash._checks.BFLOAT16)
    other = ones.copy()
    other[1, 2] = 0.875
    difference = sweep_tiles.largest_difference
    assert difference([ones, ones], [ones, ones]) == 0
    assert difference([ones, other], [ones, 4 * ones]) == 3.125 / 4
    other[0, 0] = np.nan
    assert np.isnan(difference([ones, other], [ones, ones]))


class StandInClock:
    """A tile of `block_kv` keys takes that many milliseconds."""

    def __init__(self, cupy: Any) -> None:
        pass

    def time(self, call: Any) -> Any:
        block_kv = _plan.forward_plan(None, 90).tiling.block_kv
        call()
        return lambda: float(block_kv)


def attention(q: Any, k: Any, v: Any, causal: bool, return_lse: bool) -> tuple[Any, Any]:
    """As if a GPU ran the kernel: 48 keys give another result, 80 NaN and 96 nothing."""
    block_kv = _plan.forward_plan(None, 90).tiling.block_kv
    if block_kv == 96:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    factor = {48: 1.02, 80: np.nan}.get(block_kv, 1.0)
    return (q.astype(np.float32) * factor).astype(q.dtype), np.ones(q.shape[:3], np.float32)


@pytest.fixture
def gpu(sweep_tiles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU, as far as the sweep can tell; 112 keys spill."""
    pytest.importorskip("cupy", reason="the plan takes its place among CuPy's launches")
    device = SimpleNamespace(compute_capability="90")
    cupy = SimpleNamespace(asarray=np.asarray, cuda=SimpleNamespace(Device=lambda: device))
    machine = {"device": "NVIDIA Pretend", "driver": "1", "nvrtc": "13.0"}
    ranges = {"consumers": (3,), "block_kv": (48, 64, 80, 96, 112)}

    def compile_all(kernels: list[Any], jobs: int) -> Any:
        for kernel in kernels:
            spills = 8 * (dict(kernel.constants)["BLOCK_KV"] == 112)
            yield Outcome(kernel, resources=replace(CLEAN, spill_bytes=spills))

    monkeypatch.setattr(sweep_tiles, "require_gpu", lambda command: cupy)
    monkeypatch.setattr(sweep_tiles, "StreamClock", StandInClock)
    monkeypatch.setattr(sweep_tiles, "compile_all", compile_all)
    monkeypatch.setattr(reports, "machine_of_gpu", lambda cupy: machine)
    monkeypatch.setattr(cuflash, "attention", attention)
    monkeypatch.setattr(suites, "TOKENS", 256)
    monkeypatch.setattr(suites, "WIDTH", 64)
    monkeypatch.setitem(sweep_tiles.RANGES, ("sm90", "forward"), (_plan_sm90.ForwardTiles, ranges))


def test_a_sweep(
    sweep_tiles: ModuleType, gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiles.json"
    arguments = f"forward --head-dim 64 --seqlen 64 128 --output {file} --commit abc"
    assert sweep_tiles.main(arguments.split()) == 1  # a kernel failed, results are wrong
    report = json.loads(file.read_text())
    assert (
        report
        | {
            **{"device": "NVIDIA Pretend", "driver": "1", "nvrtc": "13.0", "commit": "abc"},
            **{"backend": "sm90", "suite": "tiles forward", "dtype": "bfloat16"},
        }
        == report
    )
    assert {"date", "command", "inputs", "versions"} <= report.keys()

    names = {x["tiles"]["block_kv"]: x["name"] for x in report["candidates"]}
    assert [x["tiles"]["block_kv"] for x in report["candidates"] if x["todays"]] == [128]
    assert {x["tiles"]["block_kv"] for x in report["candidates"] if x["fault"]} == {112}
    assert [(x["seqlen"], x["causal"]) for x in report["cells"]] == [
        (64, False),
        (64, True),
        (128, False),
        (128, True),
    ]
    for cell in report["cells"]:
        results = cell["results"]
        assert list(results) == [names[x] for x in (128, 48, 64, 80, 96)]
        for block_kv in (128, 64):
            timing = results[names[block_kv]]
            assert timing["median_ms"] == timing["min_ms"] == block_kv
            tflops = cell["flops"] / block_kv / 1e9
            assert timing["tflops"] == pytest.approx(tflops, rel=1e-3)
        assert results[names[48]].keys() == results[names[80]].keys() == {"wrong"}
        assert results[names[80]]["wrong"] == "differs by nan of the largest"
        assert results[names[96]] == {"error": "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"}

    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| 3 |")]
    assert [row.split(" | ")[1] for row in rows] == ["64", "128"]
    assert [row.split(" | ")[-1] for row in rows] == ["2.000 |", "1.000 |"]
    assert f"{names[48]}: S64 causal: wrong: differs by" in printed
    assert f"{names[112]}: 8 bytes spilled" in printed


def test_the_plan_in_place_is_what_is_launched(
    sweep_tiles: ModuleType, rng: np.random.Generator
) -> None:
    q, k, v = rng.standard_normal((3, 1, 200, 1, 64), np.float32).astype("bfloat16")
    candidate = next(
        x
        for x in sweep_tiles.Sweep("forward", "sm90", 90).candidates(64)
        if str(x) == "consumers=2 block_kv=64 stages=3 ping_pong=0"
    )
    backend = emulated(capability=90)
    with sweep_tiles.Planned(candidate.plan, None).in_place():
        out, _ = backend.forward(q, k, v, causal=True)
    assert [launch.kernel for launch in backend.launches] == [candidate.plan.kernel]
    expected, _ = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True)
    assert sweep_tiles.largest_difference([out], [expected.astype(np.float32)]) < 2**-7
    backend.forward(q, k, v, causal=True)
    assert backend.launches[1].kernel != candidate.plan.kernel
