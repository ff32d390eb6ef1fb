"""What a careless or hostile caller may hand over, beyond the rules that test_problem.py lists."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from unreal_gpu import Maker

import cuflash
from cuflash import _jit, _params, _traits, reference
from cuflash.__main__ import main

B, SQ, SK, H, D = 2, 5, 7, 2, 8
SHAPES = {"q": (B, SQ, H, D), "k": (B, SK, H, D), "v": (B, SK, H, D)}
REFUSALS = (TypeError, ValueError, NotImplementedError)


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def refused(message: str):
    return pytest.raises(REFUSALS, match=f"^cuflash.{message}")


# Values


class Column:
    """A data frame's column: a dtype and a shape, but no array."""

    def __init__(self, values: list[int]) -> None:
        self.values = np.array(values)
        self.dtype, self.shape = self.values.dtype, self.values.shape

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


@pytest.mark.parametrize("lengths", [[1, 2], [-3, 2], [1, 2000]])
@pytest.mark.parametrize("name", ["q_lens", "kv_lens"])
def test_lengths_that_are_no_array_are_not_trusted(name: str, lengths: list[int]) -> None:
    with refused(f"attention: {name} is .*Column; expected one integer per batch entry"):
        cuflash.attention(**tensors(), **{name: Column(lengths)})


@pytest.mark.parametrize("value", [1, None, "yes", np.array([True, False])])
@pytest.mark.parametrize("name", ["return_lse", "deterministic"])
def test_flags_are_checked_at_once(name: str, value: Any) -> None:
    with refused(f"attention_vjp: {name} is .*; expected True or False"):
        cuflash.attention_vjp(**tensors(), **{name: value})


def test_no_query_heads_for_some_key_heads() -> None:
    inputs = tensors()
    inputs["q"] = inputs["q"][:, :, :0]
    out, pullback = cuflash.attention_vjp(**inputs)
    assert out.shape == (B, SQ, 0, D)
    assert not any(gradient.any() for gradient in pullback(out)[:3])


def test_a_bias_of_the_lowest_number_is_no_mask() -> None:
    bias = np.zeros((SQ, SK), np.float32)
    bias[2] = np.finfo(np.float32).min
    inputs = tensors()
    out, lse = cuflash.attention(**inputs, bias=bias, return_lse=True)
    mean = inputs["v"].mean(axis=1)
    assert np.allclose(out[:, 2], mean, atol=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_key_of_nan_spoils_only_the_rows_that_see_it(softcap: float | None) -> None:
    inputs = tensors()
    inputs["k"][:, -1] = np.nan
    options = {"causal": True, "softcap": softcap}
    out, pullback = cuflash.attention_vjp(**inputs, **options)
    dout = np.ones_like(out)
    expected = reference.attention_backward(dout, **inputs, **options)
    for found, right in zip(pullback(dout)[:3], expected[:3], strict=True):
        assert (np.isnan(found) == np.isnan(right)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_callers_error_state_is_not_asked(dtype: Any) -> None:
    inputs = tensors(dtype)
    inputs["v"] *= 1000
    bias = np.zeros((SQ, SK), dtype)
    with np.errstate(all="raise"):
        out, pullback = cuflash.attention_vjp(**inputs, bias=bias)
        pullback(np.full_like(out, 6e4))


# Arrays of others


class Exporter:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def _raises(error: BaseException) -> Any:
    def method(self: Any, **options: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("__dlpack__", lambda self, **options: None),
        ("__dlpack__", _raises(AttributeError("broken"))),
        ("__dlpack__", _raises(StopIteration("broken"))),
        ("__dlpack_device__", _raises(RuntimeError("broken"))),
        ("__dlpack_device__", lambda self: None),
        ("__dlpack_device__", lambda self: ("cpu", 0)),
    ],
)
def test_a_broken_exporter_is_named(method: str, broken: Any) -> None:
    kind = type("Broken", (Exporter,), {method: broken})
    with refused("attention: q is a .*Broken"):
        cuflash.attention(*map(kind, tensors().values()))
    with refused("attention: kv_lens is a .*Broken"):
        cuflash.attention(**tensors(), kv_lens=kind(np.array([1, 2])))


def test_a_deleted_array_of_jax_is_named() -> None:
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = (jnp.array(x) for x in tensors().values())
    k.delete()
    with refused("attention: k is a jax.Array .*deleted"):
        cuflash.attention(q, k, v)


def test_out_that_is_exported_as_a_copy_is_refused() -> None:
    class Copies(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**{**options, "copy": True})

    out = Copies(np.zeros(SHAPES["q"], np.float32))
    with refused("attention: out is a .*Copies"):
        cuflash.attention(*map(Copies, tensors().values()), out=out)


# GPU


@pytest.mark.parametrize("name", ["q", "out"])
def test_elements_at_odd_addresses(name: str) -> None:
    make = Maker("cuda")
    array = make((B * SQ * H * D * 2 + 2,), np.uint8)[1:-1].view(np.float16).reshape(SHAPES["q"])
    arrays = {**{name: make(shape) for name, shape in SHAPES.items()}, name: array}
    with refused(f"attention: {name} "):
        problem = make.problem(**arrays)
        _traits.Traits.of(problem, _params.alignment(arrays["q"], arrays[name]))


# Threads and processes


@pytest.mark.parametrize("how", ["threading.Thread(target=late).start()", "atexit.register(late)"])
def test_a_call_after_the_end_of_the_main_thread(how: str) -> None:
    script = f"""
import atexit, threading
import numpy as np
import cuflash
x = np.ones((1, 600, 8, 16), np.float32)
def late():
    if threading.current_thread() is not threading.main_thread():
        threading.main_thread().join()
    assert np.allclose(cuflash.attention(x, x, x), 1)
    print("done")
{how}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "done" in done.stdout, done.stderr


# Command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--arch", "banana"],
        ["--arch", "sm_"],
        ["--arch", "sm_80", "--head-dim", "0"],
        ["--arch", "sm_80", "--head-dim", "300"],
        ["--arch", "sm_80", "--head-dim-v", "-1"],
        ["--arch", "sm_80", "--group", "0"],
        ["--arch", "sm_80", "--jobs", "0"],
    ],
)
def test_compile_refuses_nonsense(
    arguments: list[str], tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_jit, "cached_cubin", None)  # nothing is to be compiled
    try:
        status = main(["compile", "--jobs", "1", *arguments])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_record_nested_too_deep_is_damaged(tmp_path: Any) -> None:
    path = tmp_path / "entry.cubin"
    path.write_bytes(b"image")
    path.with_suffix(".json").write_text("[" * 200_000)
    assert _jit._read_entry(path) is None
