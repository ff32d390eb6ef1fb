"""Arrays on a GPU: what can be seen of their way without one, and with one what comes back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import unreal_gpu
from unreal_gpu import OUT, SHAPES, B

import cuflash
from cuflash import interop, reference
from cuflash._problem import Problem

LENGTHS = {"q_lens": [2, 4], "kv_lens": [3, 7], "offset": [5, 6]}
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2}


def host_tensors(dtype: Any = np.float16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def unreal_tensors(device: int = 0) -> dict[str, Any]:
    return {
        name: unreal_gpu.array(shape, address=i << 20, device=device)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


# Without a GPU


class FakeGpu:
    """Takes the place of CuPy and of the kernels, and notes in order what they are asked."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.problem: Problem | None = None
        stream = SimpleNamespace(synchronize=lambda: self.log.append("synchronize"))
        self.cuda = SimpleNamespace(
            Device=lambda number: self.current("device", number),
            Stream=SimpleNamespace(
                from_external=lambda stream: self.current("stream", *stream.__cuda_stream__())
            ),
            get_current_stream=lambda: stream,
        )

    @contextmanager
    def current(self, *what: Any) -> Iterator[None]:
        self.log.append(("enter", *what))
        yield
        self.log.append(("exit", *what))

    def asarray(self, array: np.ndarray) -> Any:
        self.log.append(("upload", array.dtype, array.tolist()))
        return unreal_gpu.array(array.shape, array.dtype)

    def from_dlpack(self, x: Any) -> Any:
        self.log.append("import")
        return x.array

    def forward(self, problem: Problem) -> tuple[Any, Any]:
        self.log.append("run")
        self.problem = problem
        return "out", "lse"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    pytest.importorskip("cupy")
    fake = FakeGpu()
    monkeypatch.setattr(interop, "_cupy", lambda: fake)
    monkeypatch.setattr(interop, "_driver_fault", lambda ordinal: "")
    attention = importlib.import_module("cuflash.attention")
    kind = attention.DENSE._replace(backend=lambda device: {"cuda": fake}[device])
    monkeypatch.setattr(attention, "DENSE", kind)
    return fake


def test_cupy_arrays_reach_the_kernels_as_they_are(gpu: FakeGpu) -> None:
    arrays = unreal_tensors(device=1)
    lengths = unreal_gpu.array((B,), np.int32, device=1)
    out, lse = cuflash.attention(**arrays, kv_lens=lengths, return_lse=True)
    assert (out, lse) == ("out", "lse")
    assert gpu.log == [("enter", "device", 1), "run", ("exit", "device", 1)]
    assert gpu.problem.device == "cuda"
    assert all(getattr(gpu.problem, name) is array for name, array in arrays.items())
    assert gpu.problem.kv_lens is lengths


def test_host_lengths_are_checked_and_then_uploaded(gpu: FakeGpu) -> None:
    kv_lens, offset = np.array([3, 7], np.uint8), pytest.importorskip("torch").tensor([5, 6])
    cuflash.attention(**unreal_tensors(), q_lens=[2, 4], kv_lens=kv_lens, offset=offset)
    assert gpu.log[0] == ("enter", "device", 0)
    assert {entry[0] for entry in gpu.log[1:4]} == {"upload"}
    assert {entry[1] for entry in gpu.log[1:4]} == {np.dtype(np.int64)}
    assert sorted(entry[2] for entry in gpu.log[1:4]) == sorted(LENGTHS.values())
    assert gpu.log[4:] == ["run", ("exit", "device", 0)]
    assert not any(isinstance(getattr(gpu.problem, name), np.ndarray) for name in LENGTHS)


def test_bad_host_lengths_reach_no_kernel(gpu: FakeGpu) -> None:
    with pytest.raises(ValueError, match="kv_lens holds 8; expected 0 to 7"):
        cuflash.attention(**unreal_tensors(), kv_lens=[3, 8])
    assert gpu.problem is None


def test_a_host_offset_is_a_number(gpu: FakeGpu) -> None:
    cuflash.attention(**unreal_tensors(), offset=np.array(3))
    assert gpu.problem.offset == 3


class Tensor:
    """A torch tensor on the second GPU, as far as cuflash looks at it."""

    __module__ = "torch"
    device = type("device", (), {"type": "cuda", "__str__": lambda self: "cuda:1"})()

    def __init__(self, array: Any) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self


def test_torch_runs_on_its_current_stream(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(
        cuda=SimpleNamespace(
            current_stream=lambda number: SimpleNamespace(cuda_stream=64 + number)
        ),
        from_dlpack=lambda array: f"torch {array}",
        is_grad_enabled=lambda: False,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert cuflash.attention(*map(Tensor, unreal_tensors().values())) == "torch out"
    enter = [("enter", "device", 1), ("enter", "stream", 0, 65)]
    leave = [("exit", "stream", 0, 65), ("exit", "device", 1)]
    assert gpu.log == [*enter, *["import"] * 3, "run", *leave]


def test_cupy_takes_torchs_stream() -> None:
    cupy = pytest.importorskip("cupy")
    assert cupy.cuda.Stream.from_external(interop._Stream(65)).ptr == 65


class ArrayImpl:
    """A JAX array on the second GPU, as far as cuflash looks at it."""

    __module__ = "jaxlib"

    def __init__(self, array: Any, platforms: tuple[str, ...] = ("gpu",)) -> None:
        self.array = array
        self.platforms = platforms

    def devices(self) -> list[Any]:
        names = {"__str__": lambda device: device.platform}
        return [type("device", (), {**names, "platform": p})() for p in self.platforms]

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 1)


def test_jax_gets_its_inputs_back_when_the_kernels_are_done(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax = SimpleNamespace(dlpack=SimpleNamespace(from_dlpack=lambda array: f"jax {array}"))
    monkeypatch.setitem(sys.modules, "jax", jax)
    assert cuflash.attention(*map(ArrayImpl, unreal_tensors().values())) == "jax out"
    enter, leave = ("enter", "device", 1), ("exit", "device", 1)
    assert gpu.log == [enter, *["import"] * 3, "run", "synchronize", leave]


@pytest.mark.parametrize(("platforms", "found"), [(("gpu", "gpu"), "2 devices"), (("tpu",), "tpu")])
def test_jax_elsewhere(platforms: tuple[str, ...], found: str) -> None:
    x = ArrayImpl(None, platforms)
    message = f"^cuflash.attention: q is a jax.Array on {found}; expected cpu or cuda$"
    with pytest.raises(ValueError, match=message):
        cuflash.attention(x, x, x)


class Vendor:
    """An array on the fourth GPU, of a library that cuflash has never heard of."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 3)

    def __dlpack__(self, **options: Any) -> None: ...

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: f"vendor {array}")


def test_a_vendors_arrays(gpu: FakeGpu) -> None:
    assert cuflash.attention(*map(Vendor, unreal_tensors().values())) == "vendor out"
    enter, leave = ("enter", "device", 3), ("exit", "device", 3)
    assert gpu.log == [enter, *["import"] * 3, "run", "synchronize", leave]


def test_gpu_arrays_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    interop._cupy.cache_clear()
    x = Vendor(None)
    with pytest.raises(ImportError, match="cuflash needs CuPy for arrays on a GPU: pip install"):
        cuflash.attention(x, x, x)
    interop._cupy.cache_clear()


class BrokenCupy:
    """CuPy where the driver serves no GPU, or another number of them."""

    __version__ = "14.0"

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.cuda = SimpleNamespace(runtime=self)

    def getDeviceCount(self) -> int:
        if not self.gpus:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version")
        return self.gpus

    def runtimeGetVersion(self) -> int:
        return 13020


@pytest.mark.parametrize(
    ("gpus", "fault"),
    [
        (
            0,
            "cudaErrorInsufficientDriver: CUDA driver version; "
            "expected an NVIDIA driver of CUDA 13 or newer",
        ),
        (1, "it sees 1 GPUs; expected at least 2"),
        (2, ""),
    ],
)
def test_a_gpu_that_cupy_cannot_use(monkeypatch: Any, gpus: int, fault: str) -> None:
    monkeypatch.setattr(interop, "_cupy", lambda: BrokenCupy(gpus))
    interop._driver_fault.cache_clear()
    assert interop._driver_fault(1) == fault
    if fault:
        found = "q is a cupy.ndarray on cuda:1, which CuPy 14.0 cannot use"
        with pytest.raises(RuntimeError, match=f"^cuflash.attention: {found}: {fault}$"):
            cuflash.attention(**unreal_tensors(device=1))
    interop._driver_fault.cache_clear()


def test_arrays_on_two_gpus(gpu: FakeGpu) -> None:
    arrays = {**unreal_tensors(), "k": unreal_tensors(device=1)["k"]}
    message = (
        "^cuflash.attention: q is a cupy.ndarray on cuda:0, k is a cupy.ndarray on cuda:1; "
        "expected one kind on one device$"
    )
    with pytest.raises(ValueError, match=message):
        cuflash.attention(**arrays)
    out = unreal_gpu.array(OUT, device=1)
    with pytest.raises(ValueError, match="out is a cupy.ndarray on cuda:1"):
        cuflash.attention(**unreal_tensors(), out=out)
    assert gpu.log == []


def test_arrays_on_gpu_and_cpu(gpu: FakeGpu) -> None:
    message = "q is a cupy.ndarray on cuda:0, v is a numpy.ndarray on cpu; expected one kind on"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**{**unreal_tensors(), "v": host_tensors()["v"]})
    lengths = unreal_gpu.array((B,), np.int32)
    message = "q is a numpy.ndarray on cpu, q_lens is a cupy.ndarray on cuda:0; expected one kind"
    with pytest.raises(TypeError, match=message):
        cuflash.attention(**host_tensors(), q_lens=lengths)


def test_lengths_on_another_gpu(gpu: FakeGpu) -> None:
    lengths = unreal_gpu.array((B,), np.int32, device=1)
    with pytest.raises(ValueError, match="kv_lens is a cupy.ndarray on cuda:1"):
        cuflash.attention(**unreal_tensors(), kv_lens=lengths)


# With a GPU


def check_attention(arrays: dict[str, Any], to_numpy: Any, dtype: str, **options: Any) -> None:
    """Forward and backward of these arrays, which hold host_tensors(dtype), against float64."""
    inputs = host_tensors(dtype)
    expected_options = {name: np.array(values) for name, values in LENGTHS.items()}
    out, pullback = cuflash.attention_vjp(**arrays, **options)
    gradients = pullback(out)
    assert {type(x) for x in (out, *gradients[:3])} == {type(arrays["q"])}
    expected, _ = reference.attention(**inputs, **expected_options)
    gradients_expected = reference.attention_backward(to_numpy(out), **inputs, **expected_options)
    for x, y in zip((out, *gradients[:3]), (expected, *gradients_expected[:3]), strict=True):
        error = np.abs(to_numpy(x).astype(np.float64) - y).max()
        assert error <= 4 * TOLERANCE[dtype] * max(1, np.abs(y).max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cupy(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = {name: cupy.asarray(x) for name, x in host_tensors(dtype).items()}
    check_attention(arrays, cupy.asnumpy, dtype, **LENGTHS)
    on_device = {name: cupy.asarray(values) for name, values in LENGTHS.items()}
    with cupy.cuda.Stream(non_blocking=True):
        check_attention(arrays, cupy.asnumpy, dtype, **on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")

    def to_gpu(array: np.ndarray) -> Any:
        return torch.from_numpy(array.astype(np.float32)).cuda().to(getattr(torch, dtype))

    def to_numpy(tensor: Any) -> np.ndarray:
        return tensor.float().cpu().numpy()

    arrays = {name: to_gpu(x) for name, x in host_tensors(dtype).items()}
    check_attention(arrays, to_numpy, dtype, **LENGTHS)
    on_device = {name: torch.tensor(values).cuda() for name, values in LENGTHS.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        late = {}
        for name, x in arrays.items():  # made on this stream after a wait: only order brings them
            torch.cuda._sleep(20_000_000)
            late[name] = x.clone()
        check_attention(late, to_numpy, dtype, **on_device)


@pytest.mark.gpu
def test_torch_out_is_written_in_place() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    inputs = host_tensors()
    arrays = {name: torch.from_numpy(x).cuda() for name, x in inputs.items()}
    out = torch.full(OUT, torch.nan, dtype=torch.float16, device="cuda")
    assert cuflash.attention(**arrays, out=out) is out
    error = np.abs(out.cpu().numpy() - reference.attention(**inputs)[0]).max()
    assert error <= TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() not in ("gpu", "cuda"):
        pytest.skip("this JAX has no CUDA")
    arrays = {name: jax.numpy.asarray(x) for name, x in host_tensors(dtype).items()}
    check_attention(arrays, np.asarray, dtype, **LENGTHS)
