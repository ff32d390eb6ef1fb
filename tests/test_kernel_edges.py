"""Corners of masks and terms on the kernels: empty keys, extreme numbers, several expressions."""

from __future__ import annotations

import mmap
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import emulated
from test_attention import SMALL, check

import cuflash
from cuflash import _jit, _params, _plan_small, _traits, masks

_launch = pytest.importorskip("cuflash._launch", reason="it needs CuPy", exc_type=ImportError)

HEAD_DIM = 32


def _arrays(seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return tuple(rng.standard_normal((1, n, 1, HEAD_DIM)).astype(np.float16) for n in lengths)


def test_expressions_without_arrays_are_functions_of_their_own() -> None:
    even_rows, even_keys = masks.expression("i % 2 == 0"), masks.expression("j % 2 == 0")
    visible = np.zeros((32, 32), bool)
    visible[::2, ::2] = True
    backend, arrays = emulated(capability=80), _arrays(32, 32)
    found = backend.forward(*arrays, mask=even_rows & even_keys)
    expected = backend.forward(*arrays, mask=visible)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_keys_under_a_dense_mask() -> None:
    out, lse = emulated(capability=80).forward(*_arrays(16, 0), mask=np.ones((16, 0), bool))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_no_keys_under_a_bias_and_sinks() -> None:
    q, k, v = _arrays(16, 0)
    options = {"bias": np.zeros((16, 0), np.float32), "sinks": np.ones(1, np.float32)}
    backend = emulated(capability=80)
    out, lse = backend.forward(q, k, v, **options)
    grads = backend.backward(out, q, k, v, out, lse, **options)
    assert grads.dbias.shape == (16, 0)
    assert not grads.dq.any()


def test_blocks_larger_than_any_array() -> None:
    backend, arrays = emulated(capability=80), _arrays(16, 32)
    found = backend.forward(*arrays, mask=masks.blocks(np.ones((1, 1), bool), 1 << 40, 1 << 40))
    expected = backend.forward(*arrays)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_documents_of_the_lowest_number() -> None:
    q_ids, kv_ids = np.full((1, 16), 5), np.full((1, 128), 5)
    q_ids[0, 0] = np.iinfo(np.int64).min
    _, lse = emulated(capability=80).forward(*_arrays(16, 128), mask=masks.documents(q_ids, kv_ids))
    assert np.isneginf(lse[0, 0, 0])
    assert np.isfinite(lse[0, 0, 1:]).all()


@pytest.mark.parametrize("term", ["bias", "score_mod", "sinks"])
def test_nan_passes_terms(term: str) -> None:
    q, k, v = _arrays(16, 32)
    options = {}
    if term == "bias":
        options["bias"] = np.zeros((16, 32), np.float32)
        options["bias"][3, 5] = np.nan
    elif term == "sinks":
        options["sinks"] = np.full(1, np.nan, np.float32)
    else:
        q[0, 3] = np.nan
        options["score_mod"] = cuflash.ScoreMod("score", "1.f")
    out, lse = emulated(capability=80).forward(q, k, v, **options)
    assert np.isnan(lse[0, 0, 3])
    assert np.isnan(out[0, 3].astype(np.float32)).all()


def test_the_largest_bias_stays_finite() -> None:
    q, k, v = _arrays(16, 32)
    bias = np.zeros((16, 32), np.float32)
    bias[3, 5] = np.finfo(np.float32).max
    out, _ = emulated(capability=80).forward(q, k, v, bias=bias)
    np.testing.assert_array_equal(out[0, 3], v[0, 5])


# ------------------------------------------------------------------------- far apart in memory

FAR = replace(
    SMALL, batch=2, seqlen_q=70, seqlen_k=90, heads_q=1, heads_k=1, head_dim=32, head_dim_v=32
)
# What the coordinates of a Hopper kernel's maps reach where rows end with lengths.
REACH = _params._PLACES * _params._PLACE_BYTES
MAP_NORESERVE = 0x4000  # memory that takes no room before it is written


def far_apart(array: np.ndarray, stride: int) -> Any:
    """The same values, batch entries `stride` bytes apart."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, (len(array) - 1) * stride + array[0].nbytes, flags=flags)
    strides = (stride, *array.strides[1:])
    view = np.ndarray(array.shape, array.dtype, memory, strides=strides)
    view[...] = array
    return view


@pytest.mark.parametrize("capability", [80, 90])
def test_masks_and_biases_beyond_two_to_the_32_elements(
    rng: np.random.Generator, capability: int
) -> None:
    shape = (2, 1, FAR.seqlen_q, FAR.seqlen_k)
    mask = far_apart(rng.random(shape) < 0.7, 1 << 33)
    bias = far_apart(rng.standard_normal(shape, np.float32), 1 << 35)
    far = [far_apart(x, 1 << 34) for x in FAR.arrays()[:4]]
    check(emulated(capability=capability), FAR, far, mask=mask, bias=bias)


WITH_LENGTHS = replace(FAR, q_lens=(70, 66), kv_lens=(90, 33), causal=True)


@pytest.mark.parametrize("beyond", [-(1 << 20), 1 << 20], ids=["within", "beyond"])
def test_lengths_at_the_end_of_what_maps_reach(beyond: int) -> None:
    backend = emulated(capability=90)
    check(backend, WITH_LENGTHS, [far_apart(x, REACH + beyond) for x in WITH_LENGTHS.arrays()[:4]])
    main = [
        x.kernel.source for x in backend.launches if x.kernel.entry in ("flash_fwd", "flash_bwd")
    ]
    served_by = "sm80" if beyond > 0 else "sm90"
    assert main == [f"flash_fwd_{served_by}.cu", f"flash_bwd_{served_by}.cu"]


def test_lengths_beyond_what_maps_reach_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were coordinates unsigned to the host, those of the kernel would be negative."""
    emulated()  # or skip
    monkeypatch.setattr(_params, "_PLACES", 1 << 32)
    monkeypatch.setattr(_launch, "_forward_choices", {})
    far = [far_apart(x, REACH + (1 << 20)) for x in WITH_LENGTHS.arrays()[:4]]
    with pytest.raises(AssertionError, match="out: error"):
        check(emulated(capability=90), WITH_LENGTHS, far)


# ------------------------------------------------------------------------- what is compiled

TANH = """
#include "scores.cuh"
extern "C" __global__ void tanh_of(float* x) {
  x += blockIdx.x * blockDim.x + threadIdx.x;
  *x = Scores::tanh(*x);
}
"""
CONTRACTED = ("__fadd_rn(__fmul_rn(__fmul_rn(x, square), series), x)", "x + x * square * series")


@pytest.mark.parametrize("contracted", [False, True])
def test_the_softcap_rounds_alike_however_it_is_compiled(
    contracted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which products and sums become one instruction is not the compiler's choice; of one it is."""
    emulated()  # or skip
    import emulator

    folder, options = tmp_path / "kernels_cu", _jit._options
    shutil.copytree(_jit.kernel_dir(), folder)
    (folder / "tanh_of.cu").write_text(TANH)
    if contracted:
        text = (folder / "scores.cuh").read_text()
        assert CONTRACTED[0] in text
        (folder / "scores.cuh").write_text(text.replace(*CONTRACTED))
    monkeypatch.setattr(_jit, "kernel_dir", lambda: folder)
    kernel = _traits.Kernel("tanh_of.cu", "tanh_of", "sm_80", (), 256, 0)
    xs = np.linspace(-1, 1, 1 << 16, dtype=np.float32)
    found = []
    for choice in ("true", "false"):
        monkeypatch.setattr(
            _jit, "_options", lambda *x, fmad=choice: (*options(*x), f"-fmad={fmad}")
        )
        x = xs.copy()
        emulator.load(_jit.compile_ptx(kernel), "tanh_of").launch(
            (x.size // 256,), (256,), 0, [x], buffers=[x]
        )
        np.testing.assert_allclose(x, np.tanh(xs.astype(np.float64)), rtol=1e-6)
        found.append(x)
    assert np.array_equal(*found) != contracted


PLAIN = _traits.Traits("bfloat16", 32, 32, 16, False, False, False, False)
WITH_A_BIAS = replace(PLAIN, extras=_traits.Extras(bias_bytes=4))
UNSOUND = {  # kernel, constants that do not go together, what the compiler says
    "sinks": (
        _plan_small.sink_gradient_kernel(PLAIN, 80),
        {"WARPS": 6},
        "halves of the threads add up to all of them",
    ),
    "warps": (
        _plan_small.bias_gradient_plan(WITH_A_BIAS, 80).kernel,
        {"WARPS": 5},
        "every warp has a part",
    ),
    "sums": (
        _plan_small.bias_gradient_plan(WITH_A_BIAS, 80).kernel,
        {"SUM_FLOATS": 2},
        "a float or the four of an accumulator",
    ),
}


@pytest.mark.parametrize("kernel, constants, message", UNSOUND.values(), ids=UNSOUND)
def test_constants_that_do_not_go_together(
    kernel: _traits.Kernel, constants: dict[str, int], message: str
) -> None:
    constants = {**dict(kernel.constants), **constants}
    with pytest.raises(_jit.CompileError, match=message):
        _jit.compile_ptx(replace(kernel, constants=tuple(sorted(constants.items()))))
