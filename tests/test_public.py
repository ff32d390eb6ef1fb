"""What a user meets first: the names, the signatures, the docstrings, the import."""

from __future__ import annotations

import doctest
import gc
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash._packed import PackedProblem
from cuflash._problem import Problem

ROOT = Path(cuflash.__file__).parent.parent
VARLEN = ("attention_varlen", "attention_varlen_backward", "attention_varlen_vjp")
FUNCTIONS = (
    *("attention", "attention_backward", "attention_vjp", *VARLEN),
    *("explain", "merge", "validate"),
)
IMPORT_SECONDS = 0.3


def python(code: str) -> str:
    """What this code prints in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


# Names


def test_public_names() -> None:
    assert sorted(cuflash.__all__) == sorted(
        [*FUNCTIONS, "Explanation", "Gradients", "ScoreMod", "masks"]
    )
    assert all(hasattr(cuflash, name) for name in cuflash.__all__)
    assert cuflash.__version__.count(".") == 2


def test_type_hints_are_announced() -> None:
    assert (Path(cuflash.__file__).parent / "py.typed").is_file()


# Import


def test_import_is_quick() -> None:
    code = """
import time
start = time.process_time()
import numpy
between = time.process_time()
import cuflash
print(between - start, time.process_time() - start)
"""
    times = [tuple(map(float, python(code).split())) for _ in range(5)]
    # A busy machine slows NumPy's import, most of it, as much as the rest.
    assert any(total < max(IMPORT_SECONDS, 2 * of_numpy) for of_numpy, total in times)


def test_import_brings_no_framework() -> None:
    modules = python("import cuflash, sys; print(*sys.modules)").split()
    assert {"cuflash", "numpy"} <= set(modules)
    assert not {"cupy", "torch", "jax", "cuda"} & set(modules)


def test_the_cpu_works_without_cupy() -> None:
    code = """
import sys
sys.modules["cupy"] = None
import numpy as np, cuflash
x = np.ones((1, 2, 1, 4), np.float32)
out, pullback = cuflash.attention_vjp(x, x, x)
merged, _ = cuflash.merge([out], [x[..., 0].swapaxes(1, 2)])
print(*(round(float(array.sum()), 3) for array in (out, pullback(out).dv, merged)))
"""
    assert python(code).split() == ["8.0"] * 3


# Signatures


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(cuflash, name)).parameters)


def options(name: str) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in parameters(name).items() if p.kind is p.KEYWORD_ONLY}


PACKED = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"]


def test_arrays_are_positional_and_options_are_keywords() -> None:
    arrays = {name: list(parameters(name))[: -len(options(name)) or None] for name in FUNCTIONS}
    assert arrays == {
        "attention": ["q", "k", "v"],
        "attention_backward": ["dout", "q", "k", "v", "out", "lse"],
        "attention_vjp": ["q", "k", "v"],
        "explain": PACKED,
        "merge": ["outs", "lses"],
        "validate": PACKED,
        "attention_varlen": PACKED,
        "attention_varlen_backward": ["dout", *PACKED, "out", "lse"],
        "attention_varlen_vjp": PACKED,
    }
    assert all(p.default is not p.empty for name in FUNCTIONS for p in options(name).values())


def test_the_functions_have_the_same_options() -> None:
    own = {
        "attention": {"return_lse", "return_stats", "out"},
        "attention_backward": {"stats", "dlse", "deterministic", "bias_gradient"},
        "attention_vjp": {"return_lse", "deterministic", "bias_gradient"},
        "explain": {"out"},
        "validate": {"out"},
    }
    shared = {
        name: [repr(p) for n, p in options(name).items() if n not in names]
        for name, names in own.items()
    }
    assert all(found == shared["attention"] for found in shared.values())
    for name, names in own.items():
        assert names <= options(name).keys()


def test_packed_sequences_have_the_options_that_make_sense_for_them() -> None:
    not_there = {"q_lens", "kv_lens", "mask", "bias", "bias_gradient"}
    for name in VARLEN:
        dense = options(name.replace("_varlen", ""))
        expected = [repr(p) for n, p in dense.items() if n not in not_there]
        assert [repr(p) for p in options(name).values()] == expected


@pytest.mark.parametrize(
    ("problem", "function"), [(Problem, "attention"), (PackedProblem, "attention_varlen")]
)
def test_every_option_of_a_problem_is_public(problem: Any, function: str) -> None:
    found = inspect.signature(problem.create).parameters
    expected = {n: p.default for n, p in found.items() if p.kind is p.KEYWORD_ONLY}
    results = {"return_lse", "return_stats"}
    public = {n: p.default for n, p in options(function).items() if n not in results}
    assert public == expected


HALVED = cuflash.ScoreMod(
    "0.5f * score",
    numpy_forward=lambda score, b, h, i, j: score / 2,
    numpy_backward=lambda score, b, h, i, j: 0.5,
)
NEEDS = {"offset": {"causal": True}, "dropout": {"seed": 3}}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("causal", True),
        ("offset", 1),
        ("window", (1, 2)),
        ("scale", 0.3),
        ("softcap", 1.5),
        ("q_lens", [3]),
        ("kv_lens", [5]),
        ("mask", np.arange(6) % 2 == 0),
        ("bias", np.arange(6, dtype=np.float64)),
        ("alibi_slopes", np.array([0.5, 0.25])),
        ("sinks", np.array([0.5, 0.25])),
        ("dropout", 0.4),
        ("score_mod", HALVED),
    ],
)
def test_every_option_counts_in_every_function(option: str, value: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 6, 2, 4))
    given = {option: value, **NEEDS.get(option, {})}
    plain, plain_pullback = cuflash.attention_vjp(q, k, v)
    out, lse, stats = cuflash.attention(q, k, v, return_stats=True, **given)
    assert not np.allclose(out, plain)
    vjp_out, pullback = cuflash.attention_vjp(q, k, v, **given)
    assert np.array_equal(vjp_out, out)
    dout = np.ones_like(out)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, stats=stats, **given)
    for x, y in zip(pullback(dout)[:3], gradients[:3], strict=True):
        assert np.array_equal(x, y)
    assert not np.allclose(gradients.dv, plain_pullback(dout).dv)


# Docstrings


@pytest.mark.parametrize(
    "module", ["attention", "merge", "reference", "interop", "validate", "varlen"]
)
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"cuflash.{module}"))
    assert result.failed == 0
    assert result.attempted > 0 or module == "interop"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_name_every_parameter(name: str) -> None:
    documentation = inspect.getdoc(getattr(cuflash, name))
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in documentation
    start, end = documentation.index("Parameters\n"), documentation.index("Returns\n")
    heads = [line for line in documentation[start:end].splitlines() if line[:1].isalpha()]
    documented = {n.strip() for head in heads for n in head.partition(" : ")[0].split(",")}
    assert parameters(name).keys() <= documented


# The vjp


def test_vjp_returns_lse_on_demand() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 4))
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True)
    expected, expected_lse, stats = cuflash.attention(q, k, v, return_stats=True)
    assert np.array_equal(out, expected)
    assert np.array_equal(lse, expected_lse)
    dlse = np.ones_like(lse)
    gradients = cuflash.attention_backward(out, q, k, v, out, lse, stats=stats, dlse=dlse)
    for pulled in (pullback(out, dlse), pullback(out, dlse=dlse)):
        assert all(np.array_equal(x, y) for x, y in zip(pulled[:3], gradients[:3], strict=True))
    assert not np.allclose(pullback(out).dk, gradients.dk)


def test_errors_name_the_function_that_was_called() -> None:
    x = np.zeros((1, 6, 2, 4))
    with pytest.raises(TypeError, match="^cuflash.attention_vjp: scale is 'x'"):
        cuflash.attention_vjp(x, x, x, scale="x")
    _, pullback = cuflash.attention_vjp(x, x, x)
    with pytest.raises(ValueError, match="^cuflash.attention_vjp's pullback: dout has shape"):
        pullback(x[:, 1:])
    with pytest.raises(ValueError, match="^cuflash.attention_backward: dout has shape"):
        cuflash.attention_backward(x[:, 1:], x, x, x, x, np.zeros((1, 2, 6)))


def test_the_pullback_keeps_no_scores() -> None:
    seqlen = 700
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, seqlen, 1, 4)).astype(np.float32)
    _, pullback = cuflash.attention_vjp(q, k, v, causal=True, softcap=2.0)
    kept = arrays_reachable_from(pullback)
    assert any(array is q for array in kept)
    rows = 3 * seqlen  # lse, and the two statistics of each row
    assert sum(array.size for array in kept) == q.size + k.size + v.size + q.size + rows


def arrays_reachable_from(root: Any) -> list[np.ndarray]:
    """Every array that an object holds on to, through whatever it refers to but modules."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        x = waiting.pop()
        if id(x) in seen or inspect.ismodule(x) or isinstance(x, type):
            continue
        seen.add(id(x))
        if isinstance(x, np.ndarray):
            found.append(x)
        if inspect.isfunction(x):
            waiting += [cell.cell_contents for cell in x.__closure__ or ()]
        else:
            waiting += gc.get_referents(x)
    return found
