"""Every framework's arrays come in uncopied and go out as the same kind, or a message says why."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from unreal_gpu import DV, HK, HQ, LSE, OUT, SHAPES, SK, SQ, B, D

import cuflash
from cuflash import ScoreMod, interop, masks, reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}


class Vendor:
    """An array of a library that cuflash has never heard of, on the CPU; torch holds the memory."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __array_namespace__(self) -> SimpleNamespace:
        from_dlpack = sys.modules["torch"].from_dlpack
        return SimpleNamespace(from_dlpack=lambda x: type(self)(from_dlpack(x)))


class OldVendor(Vendor):
    """One of the time before DLPack had versions."""

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__()


@dataclass
class Kind:
    """How the tests make and read one kind of array."""

    make: Callable[[np.ndarray], Any]
    read: Callable[[Any], np.ndarray]
    array_class: type
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")


def numpy_kind() -> Kind:
    return Kind(np.array, np.asarray, np.ndarray)


def torch_kind() -> Kind:
    torch = pytest.importorskip("torch")

    def make(array: np.ndarray) -> Any:
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    def read(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()

    return Kind(make, read, torch.Tensor)


def jax_kind() -> Kind:
    jax = pytest.importorskip("jax")
    return Kind(jax.numpy.asarray, np.asarray, jax.Array, ("float16", "bfloat16", "float32"))


def vendor_kind(vendor: type[Vendor] = Vendor) -> Kind:
    torch = torch_kind()
    return Kind(lambda x: vendor(torch.make(x)), lambda x: torch.read(x.tensor), vendor)


KINDS = {
    "numpy": numpy_kind,
    "torch": torch_kind,
    "jax": jax_kind,
    "vendor": vendor_kind,
    "old vendor": lambda: vendor_kind(OldVendor),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def check_close(array: Any, expected: np.ndarray, dtype: Any) -> None:
    error = np.max(np.abs(np.asarray(array, np.float64) - expected), initial=0)
    assert error <= TOLERANCE[str(np.dtype(dtype))]


# In and out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_result_is_of_the_callers_kind(kind: Kind, dtype: str) -> None:
    if dtype not in kind.dtypes:
        pytest.skip(f"this kind has no {dtype} by default")
    inputs = tensors(dtype)
    out, lse = cuflash.attention(*map(kind.make, inputs.values()), return_lse=True, causal=True)
    assert isinstance(out, kind.array_class)
    assert isinstance(lse, kind.array_class)
    assert kind.read(out).dtype == dtype
    assert kind.read(lse).dtype == ("float64" if dtype == "float64" else "float32")
    expected, expected_lse = reference.attention(**inputs, causal=True)
    check_close(kind.read(out), expected, dtype)
    check_close(kind.read(lse), expected_lse, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_of_the_callers_kind(kind: Kind, dtype: str) -> None:
    inputs = tensors(dtype)
    rng = np.random.default_rng(1)
    dout = rng.standard_normal(OUT).astype(dtype)
    dlse = rng.standard_normal(LSE).astype(np.float32)
    bias = rng.standard_normal((HQ, 1, SK)).astype(dtype)
    mask = rng.random((SQ, SK)) < 0.8
    q, k, v = map(kind.make, inputs.values())
    out, pullback = cuflash.attention_vjp(q, k, v, bias=kind.make(bias), mask=kind.make(mask))
    gradients = pullback(kind.make(dout), kind.make(dlse))
    expected = reference.attention_backward(dout, **inputs, dlse=dlse, bias=bias, mask=mask)
    for gradient, expected_gradient in zip(gradients[:4], expected[:4], strict=True):
        assert isinstance(gradient, kind.array_class)
        assert kind.read(gradient).dtype == dtype
        scale = np.abs(expected_gradient).max()
        check_close(kind.read(gradient) / scale, expected_gradient / scale, dtype)


def test_no_bias_no_gradient(kind: Kind) -> None:
    q, k, v = map(kind.make, tensors().values())
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert cuflash.attention_backward(out, q, k, v, out, lse).dbias is None


def test_arrays_come_in_uncopied(kind: Kind) -> None:
    for dtype in ("bfloat16", "float32"):
        x = kind.make(tensors(dtype)["q"])
        with interop.receive("attention", ("q",), {"q": x}) as call:
            array = call.arguments["q"]
            assert type(array) is np.ndarray
            assert array.dtype == dtype
            assert np.shares_memory(array, kind.read(x))


def test_views_come_in_uncopied() -> None:
    torch = torch_kind()
    x = torch.make(tensors()["q"]).transpose(1, 2)[:, ::2]
    with interop.receive("attention", ("q",), {"q": x}) as call:
        assert np.shares_memory(call.arguments["q"], x.numpy())
        assert call.arguments["q"].strides == x.numpy().strides


def test_empty_arrays(kind: Kind) -> None:
    q = kind.make(np.zeros((B, 0, HQ, D), np.float16))
    k, v = (kind.make(tensors(np.float16)[name]) for name in "kv")
    out, pullback = cuflash.attention_vjp(q, k, v)
    assert kind.read(out).shape == (B, 0, HQ, DV)
    gradients = pullback(out)
    assert kind.read(gradients.dq).shape == (B, 0, HQ, D)
    assert not kind.read(gradients.dv).any()


def test_a_library_without_from_dlpack_gets_numpy_arrays() -> None:
    class Lonely(Vendor):
        __array_namespace__ = property()  # hides the parent's

    make = torch_kind().make
    out = cuflash.attention(*(Lonely(make(x)) for x in tensors(BFLOAT16).values()))
    assert type(out) is np.ndarray
    assert out.dtype == BFLOAT16


# out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["numpy", "torch", "vendor"])
def test_out_is_written_in_place(name: str, dtype: str) -> None:
    kind = KINDS[name]()
    inputs = tensors(dtype)
    out = kind.make(np.full(OUT, np.nan, dtype))
    result, lse = cuflash.attention(
        *map(kind.make, inputs.values()), out=out, return_lse=True, q_lens=[SQ, 0]
    )
    assert result is out
    assert isinstance(lse, kind.array_class)
    check_close(kind.read(out), reference.attention(**inputs, q_lens=np.array([SQ, 0]))[0], dtype)


def test_an_empty_out() -> None:
    k = np.zeros((B, SK, HK, D))
    out = np.zeros((B, 0, HQ, D))
    assert cuflash.attention(np.zeros((B, 0, HQ, D)), k, k, out=out) is out


def test_out_of_jax_cannot_be_written() -> None:
    make = jax_kind().make
    message = "cuflash.attention: out is a jax.Array, which cannot be written; expected no out"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(*map(make, tensors().values()), out=make(np.zeros(OUT, np.float32)))


def test_out_of_an_old_vendor_is_read_only() -> None:
    make = vendor_kind(OldVendor).make
    with pytest.raises(ValueError, match="cuflash.attention: out is read-only; expected"):
        cuflash.attention(*map(make, tensors().values()), out=make(np.zeros(OUT, np.float32)))


# torch


NO_GRADIENT = "requires grad, which the result does not carry on; .* the README wraps attention$"


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_a_gradient_that_torch_would_lose_is_warned_of(name: str) -> None:
    torch = torch_kind()
    terms = {"bias": np.zeros((SQ, SK), np.float32), "sinks": np.zeros(HQ, np.float32)}
    arrays = {n: torch.make(x) for n, x in {**tensors(), **terms}.items()}
    arrays[name].requires_grad_()
    with pytest.warns(UserWarning, match=f"^cuflash.attention: {name} {NO_GRADIENT}") as caught:
        assert not cuflash.attention(**arrays).requires_grad
    assert [warning.filename for warning in caught] == [__file__]


def test_a_gradient_of_a_named_array_that_torch_would_lose_is_warned_of() -> None:
    torch = torch_kind()
    weights = torch.make(np.ones(SK, np.float32)).requires_grad_()
    function = ScoreMod(
        "score * w(j)",
        numpy_forward=lambda score, b, h, i, j, w: score * w[j],
        named={"w": weights},
    )
    with pytest.warns(UserWarning, match=f"^cuflash.attention: score_mod w {NO_GRADIENT}"):
        cuflash.attention(*map(torch.make, tensors().values()), score_mod=function)


@pytest.mark.parametrize("name", ["dout", "dlse"])
def test_a_second_derivative_that_torch_would_lose_is_warned_of(name: str) -> None:
    torch = torch_kind()
    q, k, v = (torch.make(x) for x in tensors().values())
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True)
    incoming = {"dout": torch.make(np.ones(OUT)).float(), "dlse": torch.make(np.ones(LSE)).float()}
    incoming[name].requires_grad_()
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for function, ask in (
        ("attention_backward", lambda: cuflash.attention_backward(**given, **incoming)),
        ("attention_vjp's pullback", lambda: pullback(**incoming)),
    ):
        with pytest.warns(
            UserWarning, match=f"^cuflash.{function}: {name} {NO_GRADIENT}"
        ) as caught:
            assert not ask().dq.requires_grad
        assert [warning.filename for warning in caught] == [__file__]


def test_merge_warns_of_a_gradient_that_torch_would_lose() -> None:
    torch = torch_kind()
    out, lse = torch.make(np.zeros(OUT)), torch.make(np.zeros(LSE)).requires_grad_()
    with pytest.warns(UserWarning, match=rf"^cuflash.merge: lses\[0\] {NO_GRADIENT}") as caught:
        cuflash.merge([out], [lse])
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.filterwarnings("error")
def test_no_gradient_is_lost_where_none_is_asked_for() -> None:
    torch = pytest.importorskip("torch")
    arrays = [torch_kind().make(x) for x in tensors().values()]
    cuflash.attention(*arrays)
    q, k, v = (x.requires_grad_() for x in arrays)
    with torch.no_grad():
        out, lse = cuflash.attention(q, k, v, return_lse=True)
        cuflash.merge([out], [lse])
    with torch.inference_mode():
        cuflash.attention(q, k, v)
    _, pullback = cuflash.attention_vjp(q, k, v)
    pullback(out)
    cuflash.attention_backward(out, q, k, v, out, lse)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_compile_leaves_the_call_alone(requires_grad: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch_kind().make(x).requires_grad_(requires_grad) for x in tensors().values())
    twice = torch.compile(lambda q, k, v: 2 * cuflash.attention(2 * q, k, v), backend="eager")
    expected = 2 * cuflash.attention(2 * q, k, v)
    assert torch.equal(twice(q, k, v), expected)


def test_a_parameter_is_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.nn.Parameter(torch_kind().make(x)) for x in tensors().values())
    with torch.no_grad():
        assert type(cuflash.attention(q, k, v)) is torch.Tensor


def test_an_unknown_device() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.empty(shape, device="meta") for shape in SHAPES.values())
    message = "cuflash.attention: q is a torch.Tensor on meta; expected cpu or cuda"
    with pytest.raises(ValueError, match=message):
        cuflash.attention(q, k, v)


def test_a_tensor_that_cannot_be_shared() -> None:
    q, k, v = map(torch_kind().make, tensors().values())
    message = "cuflash.attention: q is a torch.Tensor that cannot be shared: .*[Ss]parse"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(q.to_sparse(), k, v)


def nested(layout: str) -> Any:
    torch = pytest.importorskip("torch")
    parts = [torch.randn(n, HQ, D) for n in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=getattr(torch, layout))


def ones(dtype: str = "float32") -> Any:
    torch = pytest.importorskip("torch")
    return torch.ones(SHAPES["q"]).to(getattr(torch, dtype))


def quantized() -> Any:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():  # torch is about to do without them
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(ones(), 0.1, 0, torch.quint8)


def fake() -> Any:
    torch = pytest.importorskip("torch")
    with torch._subclasses.fake_tensor.FakeTensorMode():
        return torch.ones(SHAPES["q"])


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "jagged": (
        lambda: nested("jagged"),
        r"it is nested; expected x.values\(\) by attention_varlen, which takes x.offsets\(\) as",
    ),
    "nested": (
        lambda: nested("strided"),
        r"it is nested; expected torch.cat\(x.unbind\(\)\) by attention_varlen, with the running",
    ),
    "sparse": (
        lambda: ones().to_sparse(),
        r"its layout is torch.sparse_coo, .*; expected x.to_dense\(\)",
    ),
    "quantized": (quantized, r"it is quantized \(torch.quint8\); expected x.dequantize\(\)"),
    "float8_e4m3fn": (
        lambda: ones("float8_e4m3fn"),
        r"it is torch.float8_e4m3fn; expected numbers of 16 bits or more, as x.to\(torch.bfloat16",
    ),
    "float8_e5m2": (
        lambda: ones("float8_e5m2"),
        r"it is torch.float8_e5m2; expected numbers of 16 bits or more, as x.to\(torch.bfloat16",
    ),
    "conjugate": (
        lambda: ones("cfloat").conj(),
        "it is a conjugate that was not computed; expected real numbers",
    ),
    "negative": (
        lambda: ones("cfloat").conj().imag,
        r"it is a negative that was not computed; expected x.resolve_neg\(\)",
    ),
    "fake": (
        fake,
        "it is a FakeTensor, which stands for other tensors; expected a plain one",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_their_memory(fault: str) -> None:
    make, message = FAULTS[fault]
    x = make()
    with pytest.raises(TypeError, match=f"^cuflash.attention: q is a .* be shared: {message}"):
        cuflash.attention(x, x, x)
    q = torch_kind().make(tensors()["q"])
    with pytest.raises(TypeError, match=f"^cuflash.merge: .* be shared: {message}"):
        cuflash.merge([q, x], [q, q])


def test_a_jagged_tensor_goes_to_varlen() -> None:
    x = nested("jagged")
    offsets = x.offsets()
    out = cuflash.attention_varlen(*[x.values()] * 3, offsets, offsets, causal=True)
    for part, start, end in zip(x.unbind(), offsets[:-1], offsets[1:], strict=True):
        expected = cuflash.attention(*[part[None]] * 3, causal=True)[0]
        np.testing.assert_allclose(out[start:end], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:cuflash.* requires grad:UserWarning")
def test_torch_func_is_told_of_the_wrapper() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = map(torch_kind().make, tensors().values())
    mapped = r"torch.vmap maps it; expected a plain tensor .*: x.flatten\(0, 1\)\)$"
    differentiated = "torch.func differentiates the call; expected it in a torch.autograd.Function"
    for ask, name, message in (
        (lambda: torch.vmap(cuflash.attention, (0, None, None))(q[None], k, v), "q", mapped),
        (lambda: torch.vmap(cuflash.attention, (None, 0, None))(q, k[None], v), "k", mapped),
        (
            lambda: torch.func.grad(lambda q: cuflash.attention(q, k, v).sum())(q),
            "q",
            differentiated,
        ),
        (lambda: torch.func.vjp(lambda k: cuflash.attention(q, k, v), k), "q", differentiated),
        (lambda: torch.func.jacrev(lambda q: cuflash.attention(q, k, v))(q), "q", differentiated),
        (
            lambda: torch.func.jvp(lambda q: cuflash.attention(q, k, v), (q,), (q,)),
            "q",
            differentiated,
        ),
        (
            lambda: torch.func.functionalize(lambda q: cuflash.attention(q, k, v))(q),
            "q",
            "torch.func.functionalize wraps it; expected a call outside of it",
        ),
    ):
        message = f"^cuflash.attention: {name} is a torch.Tensor that cannot be shared: {message}"
        with pytest.raises(TypeError, match=message):
            ask()
    by_entry = torch.vmap(lambda weight: weight * cuflash.attention(q, k, v))(torch.arange(2.0))
    assert torch.equal(by_entry[1], cuflash.attention(q, k, v))  # what is not mapped may be in it


def test_a_tangent_is_not_lost() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = map(torch_kind().make, tensors().values())
    forward_ad = torch.autograd.forward_ad
    message = "^cuflash.attention: k is a .* shared: it has a tangent of forward mode, which there"
    with forward_ad.dual_level():
        assert torch.equal(cuflash.attention(q, k, v), cuflash.attention(q, k, v))
        with pytest.raises(TypeError, match=message):
            cuflash.attention(q, forward_ad.make_dual(k, k), v)
        with torch.no_grad(), pytest.raises(TypeError, match=message):
            cuflash.attention(q, forward_ad.make_dual(k, k), v)


def test_autograd_notices_what_is_written_to_out() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = map(torch_kind().make, tensors().values())
    out, weight = torch.ones(OUT), torch.ones(OUT, requires_grad=True)
    loss = (weight * out).sum()
    cuflash.attention(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        cuflash.attention(q, k, v, out=torch.ones(OUT))


def test_a_backward_writes_to_no_out() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = map(torch_kind().make, tensors().values())
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    weight = torch.ones(OUT, requires_grad=True)
    loss = (weight * out).sum()
    cuflash.attention_backward(torch.ones(OUT), q, k, v, out, lse)
    loss.backward()
    old = vendor_kind(OldVendor).make  # whose memory is never to be written
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": torch.ones(OUT)}
    cuflash.attention_backward(**{name: old(np.asarray(x)) for name, x in arrays.items()})


# JAX


def lengths(kv_lens: Any, as_mask: bool) -> dict[str, Any]:
    return {"mask": masks.lengths(kv_lens)} if as_mask else {"kv_lens": kv_lens}


def test_a_tracer_is_refused() -> None:
    jax = pytest.importorskip("jax")
    q, k, v = map(jax_kind().make, tensors().values())
    message = (
        "q is a jax.*Tracer; expected a concrete array; jax.custom_vjp lets JAX differentiate the "
        "call, and jax.pure_callback brings arrays out of a jit, as the README has it"
    )
    with pytest.raises(TypeError, match=message):
        jax.jit(cuflash.attention)(q, k, v)
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda q: cuflash.attention(q, k, v).sum())(q)
    message = f"kv_lens {message.removeprefix('q ')}, options among them"
    for mask in (False, True):
        with pytest.raises(TypeError, match=message):
            jax.jit(lambda x, mask=mask: cuflash.attention(**tensors(), **lengths(x, mask)))(
                jax.numpy.array([1, 2])
            )


def test_float64_of_jax_stays_float64() -> None:
    jax = pytest.importorskip("jax")
    inputs = tensors(np.float64)
    with interop._x64(jax):
        q, k, v = map(jax.numpy.asarray, inputs.values())
    assert not jax.config.jax_enable_x64
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True)
    assert {x.dtype for x in (out, lse, *pullback(out)[:3])} == {np.dtype(np.float64)}
    check_close(out, reference.attention(**inputs)[0], np.float64)
    assert jax.numpy.asarray(1.0).dtype == np.float32  # elsewhere JAX is as it was


def test_pure_callback_reaches_cuflash_from_inside_jit() -> None:
    jax = pytest.importorskip("jax")
    inputs = tensors()

    @jax.jit
    def attend(q: Any, k: Any, v: Any) -> Any:
        result = jax.ShapeDtypeStruct(OUT, q.dtype)
        return jax.pure_callback(cuflash.attention, result, q, k, v)

    out = attend(*map(jax_kind().make, inputs.values()))
    check_close(out, reference.attention(**inputs)[0], "float32")


# NumPy


def test_subclasses_become_plain_arrays(tmp_path: Any) -> None:
    inputs = tensors()
    q = np.memmap(tmp_path / "q", np.float32, "w+", shape=SHAPES["q"])
    q[:] = inputs["q"]
    out = cuflash.attention(q, inputs["k"], inputs["v"])
    assert type(out) is np.ndarray
    check_close(out, reference.attention(**inputs)[0], "float32")


def test_masked_arrays_are_refused() -> None:
    inputs = tensors()
    inputs["k"] = np.ma.masked_invalid(inputs["k"])
    message = "cuflash.attention: k is a numpy.MaskedArray; expected a plain array; mask= and"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**inputs)
    with pytest.raises(TypeError, match="q_lens is a numpy.MaskedArray; expected a plain"):
        cuflash.attention(**tensors(), q_lens=np.ma.array([1, 2]))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_matrix_has_two_axes() -> None:
    with pytest.raises(ValueError, match="cuflash.attention: q has 2 axes"):
        cuflash.attention(**{**tensors(), "q": np.matrix([[1.0]])})


def test_unaligned_arrays() -> None:
    inputs = tensors()
    memory = np.zeros(inputs["q"].nbytes + 1, np.uint8)[1:]
    q = memory.view(np.float32).reshape(SHAPES["q"])
    q[...] = inputs["q"]
    assert not q.flags.aligned
    out, pullback = cuflash.attention_vjp(q, inputs["k"], inputs["v"])
    check_close(out, reference.attention(**inputs)[0], "float32")
    expected = reference.attention_backward(out, **inputs)
    check_close(pullback(out).dq, expected.dq, "float32")


def test_foreign_byte_order() -> None:
    with pytest.raises(TypeError, match="cuflash.attention: q is >f4; expected one of float16"):
        cuflash.attention(**{**tensors(), "q": tensors()["q"].astype(">f4")})


def test_read_only_inputs() -> None:
    inputs = tensors()
    for array in inputs.values():
        array.flags.writeable = False
    assert cuflash.attention(**inputs).flags.writeable


# Lengths and offsets


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda x: range(x[0], x[1] + 1, x[1] - x[0]),
        np.array,
        lambda x: np.array(x, np.uint8),
        lambda x: np.array(x, ">i4"),
        lambda x: torch_kind().make(np.array(x)),
        lambda x: jax_kind().make(np.array(x)),
    ],
    ids=["list", "tuple", "range", "numpy", "uint8", "big-endian", "torch", "jax"],
)
def test_lengths_of_any_kind(kind: Kind, make: Callable[[list[int]], Any]) -> None:
    inputs = tensors()
    lengths = {"q_lens": [2, 4], "kv_lens": [3, 7], "offset": [1, 2]}
    given = {name: make(values) for name, values in lengths.items()}
    out = cuflash.attention(*map(kind.make, inputs.values()), causal=True, **given)
    expected, _ = reference.attention(
        **inputs, causal=True, **{name: np.array(values) for name, values in lengths.items()}
    )
    check_close(kind.read(out), expected, "float32")


def test_no_lengths_for_an_empty_batch() -> None:
    x = np.zeros((0, 3, 2, 8))
    assert cuflash.attention(x, x, x, q_lens=[], kv_lens=(), offset=[]).shape == x.shape


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (
            [[1], [2, 3]],
            TypeError,
            r"q_lens is \[\[1\], \[2, 3\]\]; expected one integer per batch",
        ),
        ([1.0, 2.0], TypeError, "q_lens is float64; expected one integer per batch entry"),
        (["1", "2"], TypeError, "q_lens is <U1; expected one integer per batch entry"),
        ([2**70, 1], TypeError, "q_lens is object; expected one integer per batch entry"),
        ([1, 2, 3], ValueError, r"q_lens has shape \(3,\); expected \(2,\), one per batch entry"),
        ([1, 99], ValueError, "q_lens holds 99; expected 0 to 5"),
        (4, TypeError, "q_lens is int; expected one integer per batch entry"),
    ],
)
def test_bad_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^cuflash.attention: " + message):
        cuflash.attention(**tensors(), q_lens=lengths)


# Slopes, sinks and the arrays of score functions


def test_terms_of_any_kind(kind: Kind) -> None:
    inputs, rng = tensors(), np.random.default_rng(1)
    slopes, sinks = rng.standard_normal((2, HQ)).astype(np.float32)
    given = {"alibi_slopes": slopes, "sinks": sinks}
    (out, lse), pullback = cuflash.attention_vjp(
        *map(kind.make, inputs.values()),
        **{name: kind.make(x) for name, x in given.items()},
        return_lse=True,
    )
    dout = rng.standard_normal(OUT).astype(np.float32)
    dsinks = pullback(kind.make(dout)).dsinks
    assert isinstance(dsinks, kind.array_class)
    expected_out, expected_lse = reference.attention(**inputs, **given)
    expected = reference.attention_backward(dout, **inputs, **given)
    for found, right in ((out, expected_out), (lse, expected_lse), (dsinks, expected.dsinks)):
        check_close(kind.read(found), right, "float32")


@pytest.mark.parametrize(
    "make",
    [
        np.ndarray.tolist,
        np.array,
        lambda x: torch_kind().make(x),
        lambda x: jax_kind().make(x),
    ],
    ids=["list", "numpy", "torch", "jax"],
)
def test_named_arrays_of_any_kind(kind: Kind, make: Callable[[np.ndarray], Any]) -> None:
    inputs, shift = tensors(), np.arange(SK, dtype=np.int32)
    function = ScoreMod(
        "score + shift(j)",
        numpy_forward=lambda score, b, h, i, j, shift: score + shift[j],
        named={"shift": make(shift)},
    )
    out = cuflash.attention(*map(kind.make, inputs.values()), score_mod=function)
    expected, _ = reference.attention(**inputs, bias=shift)
    check_close(kind.read(out), expected, "float32")


@pytest.mark.parametrize("x", [1.5, "x", {}])
def test_a_named_array_that_is_none(x: Any) -> None:
    function = ScoreMod("score", numpy_forward=lambda score, *place, x: score, named={"x": x})
    message = f"^cuflash.attention: score_mod x is a {type(x).__name__}; expected an array of NumPy"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**tensors(), score_mod=function)


# What is refused


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (None, "None"),
        ([[1.0]], "a list"),
        ("q", "a str"),
        (1.5, "a float"),
        (np.float32(1), "a numpy.float32"),
        (SimpleNamespace(shape=()), "a types.SimpleNamespace"),
    ],
)
def test_what_is_no_array(x: Any, found: str) -> None:
    expected = "expected an array of NumPy, CuPy, torch, JAX, or anything with __dlpack__"
    for name in SHAPES:
        with pytest.raises(TypeError, match=f"^cuflash.attention: {name} is {found}; {expected}$"):
            cuflash.attention(**{**tensors(), name: x})


@pytest.mark.parametrize("name", ["mask", "bias", "alibi_slopes", "sinks", "out"])
def test_options_that_are_no_arrays(name: str) -> None:
    expected = "a boolean array, or a mask such as" if name == "mask" else "an array of NumPy"
    message = f"^cuflash.attention: {name} is a list; expected {expected}"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**tensors(), **{name: [[True]]})


@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_backward_needs_its_arrays(name: str) -> None:
    arrays = {name: np.zeros(OUT, np.float32) for name in ("dout", "out", "lse")}
    message = f"^cuflash.attention_backward: {name} is None; expected an array"
    with pytest.raises(TypeError, match=message):
        cuflash.attention_backward(**tensors(), **{**arrays, name: None})


def test_an_unknown_dlpack_device() -> None:
    class Elsewhere(Vendor):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (10, 0)

    message = "q is a test_interop.*Elsewhere on a device of DLPack's type 10; expected cpu or cuda"
    with pytest.raises(ValueError, match=message):
        cuflash.attention(**{**tensors(), "q": Elsewhere(None)})


@pytest.mark.parametrize("name", ["k", "v", "mask", "bias", "alibi_slopes", "sinks", "out"])
def test_mixed_kinds(name: str) -> None:
    make = torch_kind().make
    arguments = {**tensors(), name: make(np.zeros((1, 1), np.float32))}
    message = (
        f"^cuflash.attention: q is a numpy.ndarray on cpu, {name} is a torch.Tensor on cpu; "
        "expected one kind on one device$"
    )
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**arguments)


def test_mixed_kinds_in_the_pullback() -> None:
    out, pullback = cuflash.attention_vjp(**tensors())
    message = "cuflash.attention_vjp's pullback: q is a numpy.ndarray on cpu, dout is a torch.Ten"
    with pytest.raises(TypeError, match=message):
        pullback(torch_kind().make(out))
