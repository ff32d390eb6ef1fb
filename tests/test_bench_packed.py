"""What bench compares of packed sequences; none of these tests needs a GPU."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.__main__ import main
from cuflash.cli import bench, contenders, reports, suites, tables
from cuflash.cli.cells import Cell
from cuflash.cli.inputs import cpu_inputs
from cuflash.cli.rules import Documents
from cuflash.cli.timing import HostClock

EQUAL, UNEQUAL = Documents((30, 30, 30)), Documents((40, 1, 49))
CELLS = list(product((EQUAL, UNEQUAL), (False, True), ("forward", "backward", "forward+backward")))
every_cell = pytest.mark.parametrize(("documents", "causal", "direction"), CELLS, ids=str)


def cell_of(documents: Documents, causal: bool, direction: Any = "forward") -> Cell:
    return Cell(direction, "float32", 1, sum(documents.lengths), 3, 8, causal, documents)


def results(found: Any, as_ours: Callable[[Any], Any]) -> list[np.ndarray]:
    """out, or dq, dk and dv, as arrays (T, H, D)."""
    found = [found] if hasattr(found, "shape") else [x for x in found if x is not None]
    return [np.asarray(as_ours(x.detach() if hasattr(x, "detach") else x)) for x in found]


def assert_computes_what_we_compute(
    factory: Callable[..., Any], cell: Cell, as_ours: Callable[[Any], Any]
) -> None:
    inputs = cpu_inputs(cell)
    packed = contenders._cuflash_packed(HostClock(), np.asarray, cell, inputs)
    ours = results(packed.call(), lambda x: x)
    theirs = results(factory(HostClock(), cell, inputs).call(), as_ours)
    assert len(ours) == (1 if cell.direction == "forward" else 3)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@every_cell
def test_documents_give_the_numbers_of_packed_sequences(
    documents: Documents, causal: bool, direction: Any
) -> None:
    cell = cell_of(documents, causal, direction)
    assert_computes_what_we_compute(contenders._cuflash, cell, lambda x: x[0])


@every_cell
def test_torch_by_sequence_computes_what_we_compute(
    documents: Documents, causal: bool, direction: Any
) -> None:
    pytest.importorskip("torch")
    cell = cell_of(documents, causal, direction)
    by_sequence = contenders._torch_by_sequence
    assert_computes_what_we_compute(by_sequence, cell, lambda x: x[0].transpose(0, 1))


@every_cell
def test_torch_varlen_computes_what_we_compute(
    monkeypatch: pytest.MonkeyPatch, documents: Documents, causal: bool, direction: Any
) -> None:
    torch = pytest.importorskip("torch")
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arrays: Any, **options: Any) -> Any:
        """Of torch's signature, which has no kernel for the CPU."""
        given = signature.bind(*arrays, **options).arguments
        assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == max(documents.lengths)
        lengths = given["cu_seq_q"].diff().tolist()
        assert lengths == given["cu_seq_k"].diff().tolist() == list(documents.lengths)
        each = [given[name].split(lengths) for name in ("query", "key", "value")]
        options = {"is_causal": given.get("window_size") == (-1, 0)}
        sdpa = partial(torch.nn.functional.scaled_dot_product_attention, **options)
        outs = [
            sdpa(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)
            for qkv in zip(*each, strict=True)
        ]
        return torch.cat(outs)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    cell = cell_of(documents, causal, direction)
    assert_computes_what_we_compute(contenders._torch_varlen, cell, lambda x: x)


@every_cell
def test_torch_padded_computes_what_we_compute_and_more(
    documents: Documents, causal: bool, direction: Any
) -> None:
    torch = pytest.importorskip("torch")
    cell, lengths = cell_of(documents, causal, direction), documents.lengths

    def without_padding(x: Any) -> Any:
        assert x.shape == (len(lengths), 3, max(lengths), 8)
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])

    compare = partial(
        assert_computes_what_we_compute, contenders._torch_padded, cell, without_padding
    )
    if causal or documents is EQUAL:
        compare()
    else:  # the rows see the zeros behind them
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            compare()


# ------------------------------------------------------------------------- the suites


def test_the_suite_of_packed_sequences() -> None:
    cells = list(suites.cells("packed", quick=False))
    assert len(cells) == len(set(map(str, cells))) == 16
    assert {c.direction for c in cells} == {"forward", "forward+backward"}
    assert {(c.dtype, c.batch, c.head_dim) for c in cells} == {("bfloat16", 1, 128)}
    assert {(str(c.rule), c.seqlen, c.heads) for c in cells} == {
        ("8 documents of 2048", 16384, 16),
        ("5 documents of 1000, 3 x 2520, 1440", 10000, 64),
        ("256 documents of 64", 16384, 16),
        ("65 documents of 8192, 64 x 128", 16384, 16),
    }
    quick = list(suites.cells("packed", quick=True))
    assert len(quick) == 4 and set(quick) < set(cells)


def test_the_suite_of_packed_sequences_on_the_cpu() -> None:
    cells = list(suites.cells("cpu-packed", quick=False))
    assert len(cells) == len(set(map(str, cells))) == 16
    assert {(str(c.rule), *c.shape, c.dtype) for c in cells} == {
        ("8 documents of 512", 1, 4096, 4, 64, "float32"),
        ("17 documents of 2048, 16 x 128", 1, 4096, 4, 64, "float32"),
        ("2000 documents of 4", 1, 8000, 4, 64, "float32"),
        ("1024 documents of 1 to 64", 1, 33280, 4, 64, "float32"),
    }
    quick = list(suites.cells("cpu-packed", quick=True))
    assert len(quick) == 4 and set(quick) < set(cells)


@pytest.mark.parametrize("suite", ["packed", "cpu-packed"])
def test_flops_are_those_of_each_sequence(suite: str) -> None:
    for cell in suites.cells(suite, quick=True):
        each = [
            Cell(*(cell.direction, cell.dtype, 1, n), *cell.shape[2:], cell.causal)
            for n in cell.rule.lengths
        ]
        assert cell.flops == sum(alone.flops for alone in each)


# ------------------------------------------------------------------------- the command


@pytest.fixture
def no_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "gemm_tflops_cpu", lambda: (0.5, "numpy float32"))
    monkeypatch.setattr(contenders, "gemm_tflops_gpu", lambda cupy: (0.5, "numpy float32"))


def test_packed_sequences_on_the_cpu_leave_a_table_and_a_file(
    no_gemm: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(suites, "CPU_PACKED", (UNEQUAL,))
    monkeypatch.setattr(suites, "CPU_PACKED_SIZES", (2, 8))
    output = tmp_path / "packed.json"
    command = ["bench", "--suite", "cpu-packed", "--seconds", "0.01", "--output", str(output)]
    assert main([*command, "--peers"]) == 0
    cells = json.loads(output.read_text())["cells"]
    assert [cell["direction"] for cell in cells] == ["forward"] * 2 + ["forward+backward"] * 2
    pairs = sum(n * n for n in UNEQUAL.lengths)
    assert cells[0]["flops"] == 2 * 2 * 2 * 8 * pairs
    assert all(set(cell["results"]) == {"cuflash", "cuflash documents"} for cell in cells)
    for found in cells[0]["results"].values():
        tflops = cells[0]["flops"] / found["median_ms"] / 1e9
        assert found["tflops"] == pytest.approx(tflops, rel=1e-3)
    table = capsys.readouterr().out
    assert "| forward+backward | 3 documents of 40, 1, 49 | 90 | 2 | yes | " in table


def test_what_is_ours_is_compiled_ahead_and_measured(
    no_gemm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    device = SimpleNamespace(compute_capability="90")
    cuda = SimpleNamespace(Device=lambda: device)
    in_cupys_place = SimpleNamespace(asarray=np.asarray, cuda=cuda)
    called = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(cuflash, name)

        def call(*arrays: Any, **options: Any) -> Any:
            called.append((name, options.get("mask") is not None))
            return function(*arrays, **options)

        return call

    for name in ("attention", "attention_vjp", "attention_varlen", "attention_varlen_vjp"):
        monkeypatch.setattr(cuflash, name, noted(name))

    ahead = []

    def compile_ahead(calls: Any) -> None:
        for call in calls:
            call()
        ahead.extend(called)

    monkeypatch.setattr(suites, "PACKED", ((UNEQUAL, 2),))
    monkeypatch.setattr(bench, "require_gpu", lambda *_: in_cupys_place)
    monkeypatch.setattr(reports, "machine_of_gpu", lambda cupy: {"device": "GPU"})
    monkeypatch.setattr(contenders, "StreamClock", lambda cupy: HostClock())
    monkeypatch.setattr(bench, "compile_ahead", compile_ahead)
    output = tmp_path / "packed.json"
    command = ["bench", "--suite", "packed", "--seconds", "0.01", "--output", str(output)]
    assert main([*command, "--peers"]) == 0
    ours = [("attention_varlen", False), ("attention", True)]
    both = [("attention_varlen_vjp", False), ("attention_vjp", True)]
    assert ahead == [*ours * 2, *both * 2]  # causal and not
    cells = json.loads(output.read_text())["cells"]
    assert all(set(cell["results"]) == {"cuflash", "cuflash documents"} for cell in cells)
    assert not any("error" in result for cell in cells for result in cell["results"].values())


def test_the_table_of_packed_sequences() -> None:
    cell = {"direction": "forward", "rule": "2 documents of 9", "seqlen": 18, "heads": 4}
    found = {
        "cuflash": {"tflops": 300.0},
        "cuflash documents": {"tflops": 250.0},
        "torch varlen": {"error": "ModuleNotFoundError: No module named 'torch'"},
        "torch padded": {"tflops": 200.0},
    }
    row = {**cell, "causal": True, "results": found}
    gemm = {"tflops": 600.0, "by": "torch bfloat16"}
    report = {
        "device": "GPU",
        "suite": "packed",
        "date": "2026-01-01",
        "gemm": gemm,
        "cells": [row],
    }
    table = tables.table(report)
    heads = "| cuflash | of GEMM | cuflash documents | torch varlen | torch padded | to best peer |"
    assert f"|  | sequences | tokens | H | causal {heads}\n" in table
    figures = "| 300 | 50 % | 250 | – | 200 | 1.50 |"
    assert f"| forward | 2 documents of 9 | 18 | 4 | yes {figures}\n" in table
    assert table.endswith("torch varlen: ModuleNotFoundError: No module named 'torch'")
