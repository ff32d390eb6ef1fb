"""Biases, sinks, dropout and users' expressions on the GPU kernels, emulated."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import emulated
from test_attention import bits, check, run
from test_mask_kernels import FORWARD, Tiling, check_lists, problem_of
from unreal_gpu import Maker

from cuflash import ScoreMod, _jit, _plan, _plan_small, _program, _traits, masks
from cuflash.cli.cases import Case
from cuflash.masks import Mask

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CASE = Case(batch=2, seqlen_q=77, seqlen_k=150, heads_q=4, heads_k=2, head_dim=32, head_dim_v=24)
# Of several tiles, and of one in either direction.
BIASED = replace(CASE, seqlen_q=70, seqlen_k=90, heads_q=2, heads_k=1, head_dim_v=32)
FULL_SHAPE = (2, 2, 70, 90)
SHAPES = [
    tuple(1 if shared else n for n, shared in zip(FULL_SHAPE, axes, strict=True))
    for axes in itertools.product((False, True), repeat=4)
]
ARCHITECTURES = (80, 90)
HEAD_DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (40, 136), (192, 128), (256, 256)]


# ------------------------------------------------------------------------- gradients of terms


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_of_every_shape(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    backend = emulated()
    bias = rng.standard_normal(shape, np.float32)
    check(backend, BIASED, bias=bias)
    (kernel,) = (x for x in backend.launches if x.kernel.entry == "flash_bwd_bias")
    block = dict(kernel.kernel.constants)["BLOCK_Q"]
    tiles = np.prod([-(-n // block) if axis > 1 else n for axis, n in enumerate(shape)])
    # Few tiles to write and many to sum: several blocks share the sums of one.
    assert kernel.blocks > tiles or tiles > 6


@pytest.mark.parametrize("shape", [(1, 1, 70, 90), (2, 2, 1, 1), (1, 1, 1, 1)], ids=str)
def test_gradients_of_terms_are_bit_equal_under_any_schedule(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    options = {"bias": rng.standard_normal(shape, np.float32)}
    runs = [run(emulated(schedule="random", seed=seed), BIASED, **options) for seed in range(2)]
    np.testing.assert_array_equal(bits(runs[0]["dbias"]), bits(runs[1]["dbias"]))


def test_bias_of_any_strides(rng: np.random.Generator) -> None:
    wide = rng.standard_normal((90, 4, 140, 2), np.float32)
    bias = wide.transpose(3, 1, 2, 0)[::-1, ::2, ::-2, ::-1]
    assert bias.shape == FULL_SHAPE
    check(emulated(), BIASED, bias=bias)


def together(case: Case) -> dict[str, Any]:
    """Every term, under a mask with rows that see nothing and whole tiles that are hidden."""
    rng = np.random.default_rng(5)
    visible = rng.random((case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)) < 0.6
    visible[:, 1, 16:40] = False
    visible[0, :, :, 64:] = False
    gain = rng.standard_normal((case.heads_q, case.seqlen_k), np.float32)
    return {
        "mask": masks.dense(visible) & masks.window(100, 30),
        "bias": rng.standard_normal((case.heads_q, 1, case.seqlen_k)).astype(case.dtype),
        "alibi_slopes": rng.standard_normal((case.batch, case.heads_q), np.float32) / 8,
        "sinks": rng.standard_normal(case.heads_q).astype(np.float16) + 2,
        "dropout": 0.3,
        "seed": 2**40 + 7,
        "softcap": 2.0,
        "score_mod": ScoreMod(
            "score * gain(h, j) - 0.02f * (float)(i - j) * (float)b",
            "gain(h, j)",
            numpy_forward=lambda score, b, h, i, j, gain: score * gain[h, j] - 0.02 * (i - j) * b,
            numpy_backward=lambda score, b, h, i, j, gain: gain[h, j],
            named={"gain": gain},
        ),
    }


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.full)])
def test_everything_together(capability: int) -> None:
    check(emulated(capability=capability), CASE, **together(CASE))


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(
    "head_dims",
    [(32, 32), (64, 64), (96, 96), (128, 128), (40, 136), (192, 128), (256, 256)],
    ids=str,
)
def test_everything_together_at_every_head_size(
    capability: int, head_dims: tuple[int, int]
) -> None:
    """With groups of three, which do not divide the tiles, and in any order."""
    sizes = dict(zip(("head_dim", "head_dim_v"), head_dims, strict=True))
    case = replace(CASE, heads_q=6, deterministic=head_dims != (64, 64), **sizes)
    check(emulated(capability=capability, schedule="random"), case, **together(case))


def test_all_but_what_multiplies_the_code_together() -> None:
    """On Hopper, of which a test of score functions and softcap emulates the rest."""
    options = {n: x for n, x in together(CASE).items() if n not in ("score_mod", "softcap")}
    check(emulated(capability=90), CASE, **options)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_dropout_and_sinks(capability: int) -> None:
    """Without terms of the scores; some batch entries have no queries or no keys."""
    case = replace(CASE, batch=3, q_lens=(77, 0, 70), kv_lens=(150, 100, 0), causal=True)
    terms = together(case)
    options = {name: terms[name] for name in ("dropout", "seed", "sinks")}
    check(emulated(capability=capability, schedule="random"), case, **options)


def test_without_keys_there_is_nothing_to_share() -> None:
    case = replace(CASE, seqlen_k=0)
    sinks = np.ones(4, np.float32)
    for bias in (np.ones((4, 77, 0), np.float32), np.ones((4, 1, 1), np.float32)):
        check(emulated(), case, sinks=sinks, bias=bias, mask=np.ones((77, 1), bool))


# ------------------------------------------------------------------------- users' expressions

DTYPES = (np.bool_, np.int32, np.int64, np.float16, BFLOAT16, np.float32)


def at(array: np.ndarray, *indices: np.ndarray) -> np.ndarray:
    """As a kernel reads it: each index is clipped to its axis."""
    clipped = (np.clip(x, 0, n - 1) for x, n in zip(indices, array.shape, strict=True))
    return array[tuple(clipped)].astype(np.float64)


def named_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of every dtype, with one to four axes and strides of any sign."""
    u, v, w, x, y, z = (rng.integers(-3, 4, (3, 5, 7, 90)).astype(dtype) for dtype in DTYPES)
    v, w, x, y = v[0, 0, 0, ::-1], w[..., ::2].T, x[1, :, 2:4], y[0, 2]
    return {"u": u, "v": v, "w": w, "x": x, "y": y, "z": z}


# Indices beyond every end.
CODE = """0.1f * u(b, h, 3, j) + 0.2f * v(i - 9) - 0.3f * w(j - 7, i, h, b) + 0.1f * x(h, i, j)
    - 0.2f * y(h - 1, 1000 * i) + 0.3f * z(-7, -1, 100, j)"""


def value(b, h, i, j, u, v, w, x, y, z):
    """Of CODE."""
    three, first, last = (np.array(n) for n in (3, -7, 100))
    return (
        0.1 * at(u, b, h, three, j)
        + 0.2 * at(v, i - 9)
        - 0.3 * at(w, j - 7, i, h, b)
        + 0.1 * at(x, h, i, j)
        - 0.2 * at(y, h - 1, 1000 * i)
        + 0.3 * at(z, first, first, last, j)
    )


def test_named_arrays(rng: np.random.Generator) -> None:
    """In the kernel that asks every pair for tiles."""
    mask = masks.expression(
        f"{CODE} > 1.45f",
        lambda *place, **arrays: value(*place, **arrays) > 1.45,
        **named_arrays(rng),
    )
    check_lists(problem_of(CASE, mask=mask), Tiling(4, 2, False), FORWARD)


@pytest.mark.full
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_named_arrays_in_scores(rng: np.random.Generator, capability: int) -> None:
    function = ScoreMod(
        f"score + {CODE}",
        "1.f",
        numpy_forward=lambda score, *place, **arrays: score + value(*place, **arrays),
        numpy_backward=lambda score, *place, **arrays: np.ones(1),
        named=named_arrays(rng),
    )
    check(emulated(capability=capability), CASE, score_mod=function)


def complaint(mask: Mask | None = None, score_mod: ScoreMod | None = None) -> str:
    """Of the compiler, about a kernel that has this mask or score function."""
    extras = _traits.Extras(_program.program(mask, score_mod))
    traits = _traits.Traits("bfloat16", 32, 32, 16, False, False, False, False, extras=extras)
    kernel = _plan_small.mask_tiles_kernel(traits, _traits.Tiling(16, 16, False), 80, False)
    if mask is None:
        kernel = _plan.forward_plan(traits, 80).kernel
    with pytest.raises(_jit.CompileError) as caught:
        _jit.compile_ptx(kernel)
    return str(caught.value)


TABLE = np.zeros((3, 3), np.float32)
WRONG = {  # expression: (where the compiler sees what)
    "i + nothing > j": (1, 'identifier "nothing" is undefined'),
    "i > j &&\n  j > nothing": (2, 'identifier "nothing" is undefined'),
    "i > j &&": (2, "expected an expression"),
    "table(i) > 0": (1, "cannot be called with the given argument list"),
    "table(i, j, b, h, 0) > 0": (1, "cannot be called with the given argument list"),
}


@pytest.mark.parametrize("code", WRONG)
def test_compile_errors_show_the_line_of_the_user(code: str) -> None:
    line, error = WRONG[code]
    right = masks.expression("i > j")
    text = complaint(right & masks.expression(code, table=TABLE))
    assert f"masks.expression: {code}\n" in text
    assert re.search(rf"^masks\.expression\({line}\): error: .*{re.escape(error)}", text, re.M)
    assert (code.split("\n")[-1] if line == 2 and "\n" in code else code) in text
    for ours in ("generated.cuh", "mask_tiles.cu", "attached", "at.b", "ATTACHMENTS"):
        assert ours not in text


@pytest.mark.parametrize(
    "name, code",
    [
        ("forward", {"forward": "scores + 1"}),
        ("backward", {"forward": "score", "backward": "scores"}),
    ],
)
def test_compile_errors_of_score_functions(name: str, code: dict[str, str]) -> None:
    text = complaint(score_mod=ScoreMod(**code))
    assert text.startswith(
        f"cuflash: the expression does not compile\n  ScoreMod.{name}: {code[name]}\n"
    )
    assert f'ScoreMod.{name}(1): error: identifier "scores" is undefined' in text


def test_more_rules_than_a_kernel_takes() -> None:
    mask: Mask = masks.causal()
    for _ in range(30):
        mask = mask & masks.causal()
    tables = {name: np.zeros(3, np.float32) for name in "xy"}
    function = ScoreMod("x(i) + y(j)", "0.f", named=tables)
    message = (
        "cuflash.attention: mask and score_mod have 33 rules and named arrays; expected at most 32 "
        "on a GPU (the cpu backend takes any)"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        Maker("cuda").problem(mask=mask, score_mod=function)
    Maker("cuda").problem(mask=mask, score_mod=replace(function, named={"x": tables["x"]}))
