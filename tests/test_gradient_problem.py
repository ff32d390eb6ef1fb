"""What backward is given must belong to its problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from unreal_gpu import DV, HQ, LSE, OUT, SHAPES, SQ, B, Maker, refused

from cuflash._problem import GradientProblem


@pytest.fixture(params=["cpu", "cuda"])
def make(request: pytest.FixtureRequest) -> Maker:
    if request.param == "cuda":
        pytest.importorskip("cupy")
    return Maker(request.param)


def gradient_problem(make: Maker, dtype: Any = np.float16, **changes: Any) -> GradientProblem:
    tensors = {name: make(shape, dtype) for name, shape in SHAPES.items()}
    forward = make.problem("attention_backward", **tensors)
    arguments = {
        "dout": make(OUT, dtype),
        "out": make(OUT, dtype),
        "lse": make(LSE, forward.lse_dtype),
    }
    return GradientProblem.create("attention", forward, **{**arguments, **changes})


def test_gradient_problem(make: Maker) -> None:
    dlse = make(LSE, np.float32)
    gradient = gradient_problem(make, dlse=dlse, deterministic=np.False_)
    assert gradient.dlse is dlse
    assert gradient.deterministic is False
    assert gradient_problem(make).deterministic is True
    assert gradient_problem(make, bias_gradient=True).bias_gradient is False  # there is no bias


def test_lse_of_float64_is_float64() -> None:
    assert gradient_problem(Maker("cpu"), np.float64).lse.dtype == np.float64


SWAPPED = {-3: ".swapaxes(-3, -2) has", -2: ".swapaxes(-2, -1) has"}


@pytest.mark.parametrize("name", ["dout", "out"])
def test_dout_and_out_of_another_problem(make: Maker, name: str) -> None:
    with refused(ValueError, f"{name} has shape {SHAPES['q']}; expected {OUT}"):
        gradient_problem(make, **{name: make(SHAPES["q"])})
    shape = (B, HQ, SQ, DV)
    with refused(ValueError, f"{name} has shape {shape}; expected {OUT}, as {name}{SWAPPED[-3]}"):
        gradient_problem(make, **{name: make(shape)})
    with refused(TypeError, f"{name} is float32; expected float16"):
        gradient_problem(make, **{name: make(OUT, np.float32)})
    message = "has a last axis with a stride of 4 bytes; expected a contiguous last axis (2 bytes)"
    message += f", as {name}.copy() has, or {name}.contiguous() in torch"
    with refused(ValueError, f"{name} {message}"):
        gradient_problem(make, **{name: make((B, SQ, HQ, 2 * DV))[..., ::2]})


@pytest.mark.parametrize("name", ["lse", "dlse"])
def test_lse_and_dlse_of_another_problem(make: Maker, name: str) -> None:
    shape = (B, SQ, HQ)
    with refused(ValueError, f"{name} has shape {shape}; expected {LSE}, as {name}{SWAPPED[-2]}"):
        gradient_problem(make, **{name: make(shape, np.float32)})
    with refused(ValueError, f"{name} has shape {LSE[1:]}; expected {LSE}"):
        gradient_problem(make, **{name: make(LSE[1:], np.float32)})
    with refused(TypeError, f"{name} is float16; expected float32"):
        gradient_problem(make, **{name: make(LSE, np.float16)})


@pytest.mark.parametrize("name", ["deterministic", "bias_gradient"])
def test_no_flag(make: Maker, name: str) -> None:
    with refused(TypeError, f"{name} is 1 (int); expected True or False"):
        gradient_problem(make, **{name: 1})
