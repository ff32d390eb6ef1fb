"""python -m cuflash check: its problems, its oracle and what it reports; on the CPU."""

import threading
import types
from dataclasses import replace

import numpy as np
import pytest

import cuflash
from cuflash import _plan_sm90, reference
from cuflash.__main__ import main
from cuflash._checks import BFLOAT16, FLOAT32, FLOAT64
from cuflash._problem import Problem
from cuflash.cli import (
    calls,
    check,
    extras,
    oracle,
)
from cuflash.cli.cases import Case, crowds, spread
from cuflash.cli.cases import races as races_of_check

SMS = 132  # of an H100
SMALL = Case(batch=1, seqlen_q=9, seqlen_k=20, head_dim=8, causal=True)


@pytest.fixture
def check_on_cpu(monkeypatch):
    """Run `check` on small problems, with NumPy and the cpu backend in the GPU's place."""
    cases = [SMALL, Case(batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, kv_lens=(0, 3), layout="BHSD")]
    monkeypatch.setattr(check, "require_gpu", lambda command: np)
    monkeypatch.setattr(check, "compile_ahead", lambda calls: None)
    monkeypatch.setattr(check, "_every", lambda quick: iter(cases))


def test_check_passes_what_is_right(check_on_cpu, capsys):
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert out.count("pass  bfloat16 ") == 2
    assert "pass  bfloat16 B2 S5x7 H4/2 D64/64 BHSD kv_lens=(0,3)  out " in out
    assert "2 passed, 0 failed" in out


def test_check_fails_what_is_wrong(check_on_cpu, monkeypatch, capsys):
    sound = cuflash.attention

    def wrong(*arrays, **options):
        out, lse = sound(*arrays, **options)
        out[0, -1, 0, 0] += 1
        return out, lse

    monkeypatch.setattr(cuflash, "attention", wrong)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "out is off by 1" in out or "out is off by 0.99" in out
    assert "0 passed, 2 failed" in out


def test_check_fails_what_differs_from_run_to_run(check_on_cpu, monkeypatch, capsys):
    sound, noise = cuflash.attention_backward, iter(np.float32([0, 1e-8, 0, 0]))

    def drifting(*arrays, **options):
        gradients = sound(*arrays, **options)
        return gradients._replace(dv=gradients.dv.astype(np.float32) + next(noise))

    monkeypatch.setattr(cuflash, "attention_backward", drifting)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("dv differs from run to run") == out.count("differs") == 1
    assert "1 passed, 1 failed" in out


def test_check_runs_as_often_as_asked(check_on_cpu, monkeypatch, capsys):
    sound, noise = cuflash.attention_backward, iter(np.float32([0] * 9 + [1e-8]))

    def late(*arrays, **options):
        gradients = sound(*arrays, **options)
        return gradients._replace(dv=gradients.dv.astype(np.float32) + next(noise))

    monkeypatch.setattr(cuflash, "attention_backward", late)
    assert main(["check", "--runs", "5"]) == 1
    assert "dv differs from run to run" in capsys.readouterr().out
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            main(["check", "--runs", wrong])
        assert "is no number of runs; expected 1 or more" in capsys.readouterr().err


def test_check_tells_zero_from_minus_zero(check_on_cpu, monkeypatch, capsys):
    sound, signs = cuflash.attention_backward, iter([1, 1, 1, -1])

    def turning(*arrays, **options):
        gradients = sound(*arrays, **options)
        return gradients._replace(dk=np.copysign(gradients.dk * 0, next(signs)))

    monkeypatch.setattr(cuflash, "attention_backward", turning)
    assert main(["check"]) == 1
    assert capsys.readouterr().out.count("dk differs from run to run") == 1


def test_check_is_quick_and_looks_for_races(check_on_cpu, monkeypatch, capsys):
    monkeypatch.undo()
    checked = []
    monkeypatch.setattr(check, "require_gpu", lambda command: np)
    monkeypatch.setattr(check, "compile_ahead", lambda calls: None)
    monkeypatch.setattr(check, "check", lambda *given: checked.append(given) or ([], ""))
    assert main(["check"]) == main(["check", "--quick"]) == main(["check", "--races"]) == 0
    cases = [case for case, *_ in checked]
    every, races = [*spread(), *crowds()], list(races_of_check())
    quick = cases[len(every) : -len(races)]
    assert cases == [*every, *quick, *races] and len(races) == len(set(map(str, races))) == 20
    assert len(every) // 7 <= len(quick) <= len(every) // 5 and set(quick) < set(every)
    runs = [given[-1] for given in checked]
    assert runs == [2] * (len(cases) - 20) + [1000] * 20
    with pytest.raises(SystemExit):
        main(["check", "--races", "--quick"])


def test_crowds_and_races_fill_a_gpu():
    few = {str(case) for case in spread() if work_items(case) > SMS}
    assert not few  # of crowds alone a block takes several items
    assert all(work_items(case) > SMS for case in crowds())
    plain = [case for case in crowds() if case.call == "attention" and not case.extras]
    assert {case.head_dim for case in plain} == {64, 128, 256}
    assert all(work_items(case) > 2 * SMS for case in plain)  # whose blocks are persistent
    assert all(work_items(case) > SMS for case in races_of_check())
    shapes = {(case.head_dim, case.head_dim_v or case.head_dim) for case in races_of_check()}
    assert shapes == {(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)}


def work_items(case):
    """Of Hopper's forward."""
    block_q = 192 if case.head_dim <= 64 else 128
    rows = case.q_lens or [case.seqlen_q] * case.batch
    return case.heads_q * sum(-(-n // block_q) for n in rows)


@pytest.mark.parametrize("call", ["packed", "compiled"])
def test_check_passes_other_calls(call, monkeypatch):
    case = next(case for case in spread() if case.call == call)
    case = replace(case, head_dim=8, seqlen_q=300, seqlen_k=517)
    assert not check.check(case, np)[0]
    name = {"packed": "attention_varlen_backward", "compiled": "attention_backward"}[call]
    sound = getattr(cuflash, name)

    def wrong(*arrays, **options):
        gradients = sound(*arrays, **options)
        gradients.dk[..., -1] += 1
        return gradients

    monkeypatch.setattr(cuflash, name, wrong)
    faults, _ = check.check(case, np)
    assert faults[0].startswith("dk is off by ")


def test_check_compiles_a_mask_that_is_to_be_compiled(monkeypatch):
    case = Case(seqlen_q=50, seqlen_k=70, head_dim=8, extras=("documents",), call="compiled")
    seen = []
    sound = cuflash.attention
    monkeypatch.setattr(
        cuflash, "attention", lambda *x, **y: seen.append(type(y["mask"])) or sound(*x, **y)
    )
    check.check(case, np, runs=1)
    assert [kind.__name__ for kind in seen] == ["Compiled"]


def test_check_ends_where_the_gpu_hangs(check_on_cpu, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(check, "LIMIT_SECONDS", 0.05)
    monkeypatch.setattr(check.os, "_exit", lambda status: status == 1 and ended.set())
    monkeypatch.setattr(cuflash, "attention", lambda *x, **y: ended.wait(20) and None)
    main(["check"])
    assert ended.is_set()
    assert f"FAIL  {SMALL}  no result after 0.05 s: the GPU hangs" in capsys.readouterr().out


def test_check_goes_on_after_an_exception(check_on_cpu, monkeypatch, capsys):
    def absent(*arrays, **options):
        raise NotImplementedError("no such kernel\nand more")

    monkeypatch.setattr(cuflash, "attention", absent)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert out.count("NotImplementedError: no such kernel") == 2
    assert "0 passed, 2 failed" in out


def test_the_spread_is_wide():
    cases = list(spread())
    assert len(cases) == len(set(map(str, cases))) >= 60
    assert {case.call for case in cases} == {"attention", "compiled", "packed"}
    for option in ("causal", "offset", "window", "scale", "softcap", "q_lens", "kv_lens"):
        assert any(option in case.options for case in cases), option
    assert {case.layout for case in cases} == {"BSHD", "BHSD", "unaligned"}
    assert {case.dtype.name for case in cases} == {"bfloat16", "float16"}
    named = {name for case in cases for name in case.extras}
    assert named == {*extras.MASKS, *extras.TERMS}
    assert any(len(case.extras) > 1 for case in cases)


@pytest.mark.parametrize("some", [spread, races_of_check], ids=["spread", "races"])
def test_check_has_hoppers_dense_tiles(some):
    """Beside the others of the same head size."""
    pay = set()
    for case in some():
        if case.head_dim == 128 and case.call == "attention" and not case.extras:
            problem = Problem.create("check", "cuda", *case.arrays()[:3], **case.options)
            pay.add(_plan_sm90.dense_tiles_pay(problem))
    assert pay == {False, True}


@pytest.mark.parametrize("name", [*extras.MASKS, *extras.TERMS])
def test_check_passes_every_mask_and_term(name):
    case = Case(seqlen_q=50, seqlen_k=70, heads_q=4, head_dim=8, extras=(name,))
    faults, figures = check.check(case, np)
    assert not faults and "dv " in figures
    gradients = {"bias": "dbias", "sinks": "dsinks"}
    expected = gradients.get(name.partition("-")[0])
    assert not expected or f" {expected} " in figures


@pytest.mark.parametrize("name", [*extras.MASKS, *extras.TERMS])
def test_check_hands_over_arrays_of_the_device(name):
    class OnDevice(np.ndarray):
        pass

    xp = types.SimpleNamespace(asarray=lambda x: x.view(OnDevice))
    for value in Case(extras=(name,)).options.values():
        moved = calls._on_device(value, xp)
        arrays = moved.arrays().values() if hasattr(moved, "arrays") else [moved]
        assert all(isinstance(x, (OnDevice, float, int)) for x in arrays)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "unaligned"])
def test_a_layout_changes_the_strides_alone(layout):
    case = Case(layout=layout, head_dim=8)
    array = case.arrays().q
    placed = case.place(array, np)
    assert (placed == array).all() and placed.strides[-1] == 2
    assert (placed.strides == array.strides) == (layout == "BSHD")
    assert (placed.ctypes.data % 4 == 2) == (layout == "unaligned")


def test_what_lies_past_the_lengths_is_nan():
    arrays = Case(seqlen_q=9, seqlen_k=9, q_lens=(9, 4), kv_lens=(0, 9)).arrays()
    assert np.isnan(arrays.q[1, 4:].astype(np.float32)).all()
    assert np.isnan(arrays.dout[1, 4:].astype(np.float32)).all()
    assert np.isnan(arrays.k[0].astype(np.float32)).all()
    finite = (arrays.q[0], arrays.q[1, :4], arrays.k[1], arrays.v[1])
    assert all(np.isfinite(x.astype(np.float32)).all() for x in finite)


DOUBLE = Case(
    FLOAT64, seqlen_q=9, seqlen_k=12, heads_q=4, softcap=3.0, causal=True, kv_lens=(12, 5)
)


def test_the_textbook_in_float64_is_the_reference():
    arrays = DOUBLE.arrays()
    out, gradients = oracle.textbook(arrays, DOUBLE.options)
    q, k, v, dout, dlse = arrays
    exact_out, _ = reference.attention(q, k, v, **DOUBLE.options)
    exact = reference.attention_backward(dout, q, k, v, dlse=dlse, **DOUBLE.options)
    assert not np.abs(out - exact_out).max() > 1e-12
    for name in ("dq", "dk", "dv"):
        difference = np.abs(getattr(gradients, name) - getattr(exact, name)).max()
        assert difference <= 1e-12, name


def test_a_bound_takes_one_rounding_and_no_more_than_twice_the_textbooks_error():
    arrays = SMALL.arrays()
    bounds = oracle.expect(arrays, SMALL.options)
    textbook, _ = oracle.textbook(arrays, SMALL.options)
    bound = bounds["out"]
    assert bound.error(bound.exact.astype(BFLOAT16)) == 0
    assert 0 < bound.error(textbook) <= bound.allowed
    wrong = bound.exact.copy()
    wrong[0, 3, 1, 2] += 2 * bound.allowed + 0.05
    assert bound.error(wrong) > bound.allowed
    wrong[0, 3, 1, 2] = np.nan
    assert np.isnan(bound.error(wrong))
    assert np.isnan(bound.error(bound.exact[:, 1:]))


def test_a_bound_knows_infinities():
    bound = oracle.Bound(np.array([-np.inf, 1.0]), 0.0, 1e-5)
    assert bound.error(np.float32([-np.inf, 1])) == 0
    for wrong in ([-1e30, 1], [-np.inf, np.inf], [np.inf, 1]):
        assert not bound.error(np.float32(wrong)) <= bound.allowed


@pytest.mark.parametrize("head_dim, scale", [(32, 3.0), (128, 1.0), (256, 3.0)])
def test_large_scores_in_float32_are_as_right_as_sums_in_float32(
    head_dim: int, scale: float
) -> None:
    """Scores of std 11 to 48; a q that is off by 2^-15 is noticed."""
    sizes = {"batch": 17, "seqlen_q": 16, "seqlen_k": 23, "heads_q": 8, "causal": True}
    case = Case(FLOAT32, **sizes, head_dim=head_dim, scale=scale)
    q, k, v, dout, dlse = arrays = case.arrays()
    bounds = oracle.expect(arrays, case.options)
    for factor, is_right in ((1, True), (1 + 2.0**-15, False)):
        (out, lse), pullback = cuflash.attention_vjp(
            q * np.float32(factor), k, v, return_lse=True, **case.options
        )
        found = {"out": out, "lse": lse, **pullback(dout, dlse)._asdict()}
        within = [bound.error(found[name]) <= bound.allowed for name, bound in bounds.items()]
        assert all(within) == is_right
