"""Arrays on a GPU: what can be seen of their way without one, and with one what comes back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import unreal_gpu
from unreal_gpu import OUT, SHAPES, SK, SQ, B

import cuflash
from cuflash import _torch_memory, interop, masks, reference
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
        stream = SimpleNamespace(ptr=0, synchronize=lambda: self.log.append("synchronize"))
        self.cuda = SimpleNamespace(
            Device=self.device,
            Stream=SimpleNamespace(
                from_external=lambda stream: self.current("stream", *stream.__cuda_stream__())
            ),
            get_current_stream=lambda: stream,
            UnownedMemory=object,
            using_allocator=lambda allocate: self.current("memory", allocate.__module__),
        )

    @contextmanager
    def current(self, *what: Any) -> Iterator[None]:
        self.log.append(("enter", *what))
        yield
        self.log.append(("exit", *what))

    @contextmanager
    def device(self, number: int) -> Iterator[Any]:
        """Current only once `use` has bound its context to the thread."""
        yield SimpleNamespace(use=lambda: self.log.append(("enter", "device", number)))
        self.log.append(("exit", "device", number))

    def asarray(self, array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        self.log.append(("upload", array.dtype, array.tolist()))
        return unreal_gpu.array(array.shape, array.dtype)

    def from_dlpack(self, x: Any) -> Any:
        self.log.append("import")
        return x.array

    def forward(self, problem: Problem, wants_stats: bool) -> tuple[Any, ...]:
        self.log.append("run")
        self.problem = problem
        return "out", "lse", "stats" if wants_stats else None


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


IDS = np.array([[0, 0, 1, 1, 1], [4, 4, 4, 2, 2]])
KEY_IDS = np.array([[0, 0, 1, 1, 1, 2, 2], [2, 4, 4, 4, 2, 2, 4]])


def uploads(*arrays: np.ndarray) -> list[Any]:
    """The log of them."""
    return [("upload", x.dtype, x.tolist()) for x in arrays]


def test_host_arrays_of_a_mask_are_uploaded(gpu: FakeGpu) -> None:
    """In the machine's own byte order; those on the GPU stay as they are."""
    seen, n = np.eye(SQ, SK, dtype=bool), unreal_gpu.array((B,), np.int32)
    key_ids = pytest.importorskip("torch").from_numpy(KEY_IDS)
    mask = masks.documents(IDS.astype(">i8"), key_ids) & masks.dense(seen) | masks.prefix(n)
    cuflash.attention(**unreal_tensors(), mask=mask & masks.lengths([3, 7]))
    enter, leave = ("enter", "device", 0), ("exit", "device", 0)
    sent = uploads(IDS, KEY_IDS, seen, np.array([3, 7]))
    assert gpu.log == [enter, *sent, "run", leave]
    arrays = list(gpu.problem.mask.arrays().values())
    assert len(arrays) == 5 and arrays[3] is n
    assert not any(isinstance(x, np.ndarray) for x in arrays)


def test_host_arrays_of_a_score_function_are_uploaded(gpu: FakeGpu) -> None:
    gain, slope = np.ones((4, 7), np.float32), unreal_gpu.array((4,), np.float32)
    function = cuflash.ScoreMod("gain(h, j) + slope(h)", named={"gain": gain, "slope": slope})
    cuflash.attention(**unreal_tensors(), score_mod=function)
    enter, leave = ("enter", "device", 0), ("exit", "device", 0)
    assert gpu.log == [enter, *uploads(gain), "run", leave]
    arrays = gpu.problem.score_mod.arrays()
    assert not any(isinstance(x, np.ndarray) for x in arrays.values())
    assert any(x is slope for x in arrays.values())


def test_a_compiled_mask_is_uploaded_once(gpu: FakeGpu) -> None:
    """And calls on any stream find its arrays there: compile waits for them."""
    arrays = unreal_tensors()
    mask = masks.documents(IDS, KEY_IDS) | masks.prefix([3, 7])
    compiled = mask.compile(arrays["q"], arrays["k"])
    enter, leave = ("enter", "device", 0), ("exit", "device", 0)
    sent = uploads(IDS, KEY_IDS, np.array([3, 7]))
    assert gpu.log == [enter, *sent, "synchronize", leave]
    gpu.log.clear()
    for _ in range(2):
        cuflash.attention(**arrays, mask=compiled)
        found = gpu.problem.mask.arrays()
        assert all(found[name] is x for name, x in compiled.arrays().items())
    assert gpu.log == [enter, "run", leave] * 2


def test_a_mask_on_another_gpu(gpu: FakeGpu) -> None:
    mask = masks.causal() & masks.prefix(unreal_gpu.array((B,), np.int64, device=1))
    message = r"mask leaf 1 \(prefix\) n is a cupy.ndarray on cuda:1; expected one kind on one"
    tensors = unreal_tensors()
    with pytest.raises(ValueError, match=message):
        cuflash.attention(**tensors, mask=mask)
    with pytest.raises(ValueError, match=message):
        mask.compile(tensors["q"], tensors["k"])
    assert gpu.log == []


class Tensor:
    """A torch tensor on the second GPU, as far as cuflash looks at it."""

    __module__ = "torch"
    device = type("device", (), {"type": "cuda", "__str__": lambda self: "cuda:1"})()
    requires_grad = False

    def __init__(self, array: Any) -> None:
        self.array = array

    def is_neg(self) -> bool:
        return False


def test_torch_runs_on_its_current_stream(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(
        cuda=SimpleNamespace(
            current_stream=lambda number: SimpleNamespace(cuda_stream=64 + number)
        ),
        is_grad_enabled=lambda: False,
        _is_functional_tensor=lambda tensor: False,
        autograd=SimpleNamespace(forward_ad=SimpleNamespace(_current_level=-1)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_torch_memory, "as_tensor", lambda torch, array: f"torch {array}")
    assert cuflash.attention(*map(Tensor, unreal_tensors().values())) == "torch out"
    memory = ("memory", "cuflash._torch_memory")
    enter = [("enter", "device", 1), ("enter", "stream", 0, 65), ("enter", *memory)]
    leave = [("exit", *memory), ("exit", "stream", 0, 65), ("exit", "device", 1)]
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
    assert interop._driver_fault("cuda:1") == fault
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


def torch_with_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


def to_torch(array: np.ndarray) -> Any:
    """On the GPU; torch does not know NumPy's bfloat16."""
    torch = torch_with_cuda()
    return torch.from_numpy(array.astype(np.float32)).cuda().to(getattr(torch, array.dtype.name))


def torch_to_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch(dtype: str) -> None:
    torch = torch_with_cuda()
    arrays = {name: to_torch(x) for name, x in host_tensors(dtype).items()}
    check_attention(arrays, torch_to_numpy, dtype, **LENGTHS)
    on_device = {name: torch.tensor(values).cuda() for name, values in LENGTHS.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        late = {}
        for name, x in arrays.items():  # made on this stream after a wait: only order brings them
            torch.cuda._sleep(20_000_000)
            late[name] = x.clone()
        check_attention(late, torch_to_numpy, dtype, **on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_and_cupy_get_the_same_bits(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = masked(np.random.default_rng(0))
    inputs = [arrays[name].astype(dtype) for name in ("q", "k", "v", "dout")]

    def results(to_gpu: Any, to_numpy: Any) -> list[bytes]:
        *tensors, dout = map(to_gpu, inputs)
        (out, lse), pullback = cuflash.attention_vjp(*tensors, return_lse=True, causal=True)
        found = (out, lse, *pullback(dout)[:3])
        return [to_numpy(x).astype(np.float32).tobytes() for x in found]

    assert results(to_torch, torch_to_numpy) == results(cupy.asarray, cupy.asnumpy)


@pytest.mark.gpu
def test_torch_out_is_written_in_place() -> None:
    torch = torch_with_cuda()
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


# CUDA graphs


def masked(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What `attention` and a mask of several kinds are given."""
    return {
        "q": rng.standard_normal((2, 150, 4, 64), np.float32).astype(np.float16),
        "k": rng.standard_normal((2, 200, 2, 64), np.float32).astype(np.float16),
        "v": rng.standard_normal((2, 200, 2, 64), np.float32).astype(np.float16),
        "dout": rng.standard_normal((2, 150, 4, 64), np.float32).astype(np.float16),
        "kv_lens": rng.integers(50, 201, 2).astype(np.int32),
        "q_ids": np.sort(rng.integers(0, 4, (2, 150)).astype(np.int32)),
        "kv_ids": np.sort(rng.integers(0, 4, (2, 200)).astype(np.int32)),
        "seen": rng.random((2, 1, 150, 200)) < 0.7,
        "n": rng.integers(0, 201, 2),
    }


def run_masked(q: Any, k: Any, v: Any, dout: Any, kv_lens: Any, **of_mask: Any) -> list[Any]:
    """Out, lse and the gradients."""
    mask = masks.documents(of_mask["q_ids"], of_mask["kv_ids"]) & masks.dense(of_mask["seen"])
    options = {"mask": mask | masks.prefix(of_mask["n"]), "kv_lens": kv_lens, "causal": True}
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True, **options)
    return [out, lse, *pullback(dout)[:3]]


def packed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What `attention_varlen` is given: three sequences, and tokens of none."""
    return {
        "q": rng.standard_normal((300, 4, 64), np.float32).astype(np.float16),
        "k": rng.standard_normal((400, 2, 64), np.float32).astype(np.float16),
        "v": rng.standard_normal((400, 2, 64), np.float32).astype(np.float16),
        "dout": rng.standard_normal((300, 4, 64), np.float32).astype(np.float16),
        "cu_seqlens_q": np.array([0, *np.sort(rng.integers(0, 301, 3))], np.int32),
        "cu_seqlens_k": np.array([0, *np.sort(rng.integers(0, 401, 3))], np.int32),
    }


def run_packed(dout: Any, **inputs: Any) -> list[Any]:
    """Likewise."""
    (out, lse), pullback = cuflash.attention_varlen_vjp(**inputs, return_lse=True, causal=True)
    return [out, lse, *pullback(dout)[:3]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("values", "run"), [(masked, run_masked), (packed, run_packed)], ids=["masked", "packed"]
)
def test_a_captured_graph_reads_new_values(values: Any, run: Any) -> None:
    """No call waits for the GPU, which would end the capture with an error.

    And a replay leaves the memory alone that others have got since.
    """
    cupy = pytest.importorskip("cupy")
    first, second = (values(np.random.default_rng(seed)) for seed in range(2))
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream:
        arrays = {name: cupy.asarray(x) for name, x in first.items()}
        run(**arrays)  # what is compiled and loaded at first use is so before the capture
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                results = run(**arrays)
            finally:
                graph = stream.end_capture()
        others = [cupy.full(1 << size, 7, np.uint8) for size in range(9, 22) for _ in range(9)]
        for x in results:
            x.fill(np.nan)
        for name, x in second.items():
            arrays[name][...] = cupy.asarray(x)
        graph.launch()
        found = [cupy.asnumpy(x).tobytes() for x in results]
        assert all((x == 7).all() for x in others)
        expected = run(**arrays)
        assert found == [cupy.asnumpy(x).tobytes() for x in expected]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("values", "run"), [(masked, run_masked), (packed, run_packed)], ids=["masked", "packed"]
)
def test_a_graph_that_torch_captured_reads_new_values(values: Any, run: Any) -> None:
    """Likewise, with torch's own pool of the graph."""
    torch = torch_with_cuda()
    first, second = (values(np.random.default_rng(seed)) for seed in range(2))
    arrays = {name: torch.from_numpy(x).cuda() for name, x in first.items()}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(**arrays)
    with torch.cuda.graph(graph, stream=stream):
        results = run(**arrays)
    sizes = [1 << size for size in range(9, 22) for _ in range(9)]
    others = [torch.full((size,), 7, dtype=torch.uint8, device="cuda") for size in sizes]
    for x in results:
        x.fill_(torch.nan)
    for name, x in second.items():
        arrays[name].copy_(torch.from_numpy(x))
    graph.replay()
    found = [x.cpu().numpy().tobytes() for x in results]
    assert all((x == 7).all() for x in others)
    assert found == [x.cpu().numpy().tobytes() for x in run(**arrays)]


@pytest.mark.gpu
def test_torch_may_use_results_on_another_stream() -> None:
    """`record_stream` keeps their memory until that stream is done with it."""
    torch = torch_with_cuda()
    arrays = {name: torch.from_numpy(x).cuda() for name, x in host_tensors().items()}
    expected = cuflash.attention(**arrays).cpu()
    other = torch.cuda.Stream()
    out = cuflash.attention(**arrays)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(50_000_000)
        late = out.clone()
    out.record_stream(other)
    del out
    others = [torch.full_like(late, torch.nan) for _ in range(100)]
    other.synchronize()
    assert torch.equal(late.cpu(), expected) and len(others) == 100


@pytest.mark.gpu
def test_a_new_thread_of_the_host() -> None:
    cupy = pytest.importorskip("cupy")
    arrays = {name: cupy.asarray(x) for name, x in host_tensors().items()}
    cuflash.attention(**arrays)
    with ThreadPoolExecutor(1) as threads:
        out = threads.submit(lambda: cuflash.attention(**arrays)).result()
    assert (out == cuflash.attention(**arrays)).all()
