"""CUDA's part of a call, on a machine without it: contexts, streams, graphs and memory.

It stands in for what `cuflash._gpu`, `_jit` and `interop` ask of CuPy and of torch, and refuses
what a driver refuses: a launch from a thread without a context is error 201. Arrays have addresses
that nobody may read. Pools hand out again what was let go; a graph's launches name the addresses
that its replays read and write, so that a pool that hands one of them out is seen.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import _jit, interop
from cuflash._traits import Kernel

cupy = pytest.importorskip("cupy")

from cuflash import _gpu, _launch  # noqa: E402

ROUNDING = 512  # bytes, of what a pool gives
H100 = {"major": 9, "minor": 0, "l2CacheSize": 50 << 20, "multiProcessorCount": 132}


class CudaError(RuntimeError):
    """What the driver or the runtime returns, other than success."""


class Stream:
    """As cupy.cuda.Stream."""

    def __init__(self, cuda: StubCuda, ptr: int) -> None:
        self.ptr, self._cuda = ptr, cuda

    @property
    def cuda_stream(self) -> int:
        """As torch.cuda.Stream's."""
        return self.ptr

    def __enter__(self) -> Stream:
        self._cuda.thread.streams.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._cuda.thread.streams.pop()

    def is_capturing(self) -> bool:
        if not self.ptr:  # of the legacy stream nobody may ask while another is captured
            raise CudaError("cudaErrorStreamCaptureImplicit")
        return self.ptr in self._cuda.captures

    def synchronize(self) -> None:
        if self.ptr in self._cuda.captures:
            raise CudaError("cudaErrorStreamCaptureUnsupported")

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """On this stream, into a graph that is replayed from then on."""
        graph = self._cuda.captures[self.ptr] = Graph()
        try:
            with self:
                yield graph
        finally:
            del self._cuda.captures[self.ptr]
            self._cuda.graphs.append(graph)


@dataclass
class Graph:
    """What was captured: the parameters of its launches, which name addresses."""

    launches: list[bytes] = field(default_factory=list)
    copies: list[Any] = field(default_factory=list)  # from the host

    @property
    def words(self) -> set[int]:
        """Everything that may be an address."""
        return {word for params in self.launches for (word,) in struct.iter_unpack("Q", params)}

    def touches(self, first: int, size: int) -> bool:
        """Whether a launch names an address within."""
        return any(first <= word < first + size for word in self.words)


class Pool:
    """As cupy.cuda.MemoryPool: what is let go is handed out again, on the same stream."""

    def __init__(self, cuda: StubCuda) -> None:
        self.calls = 0
        self._cuda = cuda
        self._free: dict[tuple[int, int], list[int]] = {}

    def take(self, size: int) -> tuple[int, Any]:
        """An address, and what has to be let go for others to get it."""
        self.calls += 1
        size = -(-size // ROUNDING) * ROUNDING
        free = self._free.setdefault((self._cuda.current_stream().ptr, size), [])
        address = free.pop() if free else self._cuda.malloc(size)
        self._cuda.handed_out(address, size)
        weakref.finalize(owner := _Owner(), free.append, address)
        return address, owner

    def malloc(self, size: int) -> Any:
        """For cupy.cuda.using_allocator."""
        address, owner = self.take(size)
        memory = cupy.cuda.UnownedMemory(address, size, owner, self._cuda.thread.device)
        return cupy.cuda.MemoryPointer(memory, 0)


class _Owner:
    """Dies with the memory."""


class _Thread(threading.local):
    """What CUDA and CuPy keep for each thread of the host."""

    def __init__(self, cuda: StubCuda) -> None:
        self.device = 0  # of a new thread, which has no context for it
        self.context: int | None = None
        self.streams = [Stream(cuda, 0)]


class StubCuda:
    """In CuPy's place where `installed`."""

    def __init__(self) -> None:
        self.captures: dict[int, Graph] = {}
        self.graphs: list[Graph] = []
        self.launched: list[bytes] = []  # outside of a capture
        self.faults: list[str] = []
        self.thread = _Thread(self)
        self.pool = Pool(self)  # CuPy's default one
        self._next_address = 0x7F00_0000_0000
        self._next_stream = 64
        self._params_bytes: dict[int, int] = {}

    # Contexts, as CuPy binds them

    @contextmanager
    def device(self, number: int) -> Iterator[Any]:
        """`with` changes the device where it is another; else nothing asks CUDA for a context."""
        before = self.thread.device
        if number != before:
            self.set_device(number)
        try:
            yield SimpleNamespace(use=lambda: self.set_device(number))
        finally:
            self.set_device(before)

    def set_device(self, number: int) -> None:
        self.thread.device = self.thread.context = number

    def need_context(self, call: str) -> None:
        if self.thread.context is None:
            raise CudaError(f"{call}: CUDA_ERROR_INVALID_CONTEXT (201)")

    # Streams and memory

    def stream(self) -> Stream:
        self._next_stream += 1
        return Stream(self, self._next_stream)

    def current_stream(self) -> Stream:
        return self.thread.streams[-1]

    def malloc(self, size: int) -> int:
        """cudaMalloc, which binds a context where there is none."""
        self.set_device(self.thread.device)
        address, self._next_address = self._next_address, self._next_address + size + ROUNDING
        return address

    def handed_out(self, address: int, size: int) -> None:
        """A fault where replays of a graph read or write what somebody else now has."""
        if not self.captures and any(graph.touches(address, size) for graph in self.graphs):
            self.faults.append(f"{size} bytes of a graph are handed out")

    def from_host(self, array: Any) -> Any:
        """cupy.asarray."""
        if isinstance(array, cupy.ndarray):
            return array
        if self.current_stream().ptr in self.captures:
            self.captures[self.current_stream().ptr].copies.append(array)
        return cupy.empty(array.shape, array.dtype)

    # Modules, tensor maps and launches

    def cubin(self, kernel: Kernel) -> _jit.Cubin:
        """Not compiled: it says how many bytes a launch is given."""
        sizes = [n for name, n in kernel.constants if name.endswith("PARAMS_BYTES")]
        return _jit.Cubin(str(max(sizes)).encode(), "")

    def module(self) -> Any:
        """As cupy.cuda.function.Module."""
        image: list[bytes] = []

        def load(data: bytes) -> None:
            self.need_context("cuModuleLoadData")
            image.append(data)

        def get_function(name: str) -> Any:
            pointer = len(self._params_bytes) + 1
            self._params_bytes[pointer] = int(image[0])
            return SimpleNamespace(ptr=pointer)

        return SimpleNamespace(load=load, get_function=get_function)

    def encode(self, encoded: Any, *arguments: Any) -> int:
        """As cuTensorMapEncodeTiled: the map names the tensor's address."""
        self.need_context("cuTensorMapEncodeTiled")
        ctypes.memset(encoded, 0, 128)
        ctypes.memmove(encoded, struct.pack("Q", arguments[2].value), 8)
        return 0

    def launch(self, function: int, *rest: Any) -> None:
        """As cuLaunchKernel."""
        self.need_context("cuLaunchKernel")
        *_, stream, pointers, _ = rest
        (address,) = struct.unpack("Q", ctypes.string_at(pointers, 8))
        params = ctypes.string_at(address, self._params_bytes[function])
        graph = self.captures.get(stream)
        (self.launched if graph is None else graph.launches).append(params)


@contextmanager
def installed() -> Iterator[StubCuda]:
    """Within, GPU 0 is an H100 that computes nothing."""
    cuda = StubCuda()
    driver = SimpleNamespace(
        launchKernel=cuda.launch,
        funcSetAttribute=lambda *_: cuda.need_context("cuFuncSetAttribute"),
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        CUDADriverError=CudaError,
    )
    caches = (_gpu.gpu, _gpu._encode, _jit.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy.cuda, "Device", cuda.device)
        patch.setattr(cupy.cuda, "get_current_stream", cuda.current_stream)
        patch.setattr(
            cupy.cuda.Stream, "from_external", lambda x: Stream(cuda, x.__cuda_stream__()[1])
        )
        patch.setattr(cupy.cuda.function, "Module", cuda.module)
        patch.setattr(cupy.cuda, "driver", driver)
        patch.setattr(cupy, "get_default_memory_pool", lambda: cuda.pool)
        patch.setattr(cupy, "asarray", cuda.from_host)
        patch.setattr(cupy, "zeros", cupy.empty)
        patch.setattr(_gpu, "driver", driver)
        patch.setattr(_gpu, "runtime", SimpleNamespace(getDeviceProperties=lambda number: H100))
        patch.setattr(_gpu, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=cuda.encode))
        patch.setattr(_jit, "cached_cubin", cuda.cubin)
        patch.setattr(interop, "_driver_fault", lambda place: "")
        cupys = cupy.cuda.get_allocator()
        cupy.cuda.set_allocator(cuda.pool.malloc)
        for kept in caches:
            kept.cache_clear()
        try:
            yield cuda
        finally:
            cupy.cuda.set_allocator(cupys)
            for kept in caches:
                kept.cache_clear()
            for launches in (_launch._forward_launches, _launch._backward_launches):
                launches.clear()


@contextmanager
def torch_installed(cuda: StubCuda) -> Iterator[list[Any]]:
    """Within, torch's tensors count as on GPU 0; gives what torch.empty made, as long as it lives.

    Their memory is the host's, and real.
    """
    torch = pytest.importorskip("torch")
    empty, made = torch.empty, []

    def empty_on_gpu(*arguments: Any, device: str, **options: Any) -> Any:
        assert str(device) in ("cuda:0", "cpu")
        cuda.set_device(cuda.thread.device)
        tensor = empty(*arguments, **options)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def as_cupy(self: Any, x: Any, to_write: bool) -> Any:
        dtype = np.dtype(str(x.dtype).removeprefix("torch."))
        memory = cupy.cuda.UnownedMemory(x.data_ptr(), x.nbytes, x, 0)
        strides = [stride * dtype.itemsize for stride in x.stride()]
        return cupy.ndarray(x.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interop._Torch, "place", lambda self, x: "cuda:0")
        patch.setattr(interop._Torch, "receive", as_cupy)
        patch.setattr(torch.cuda, "current_stream", lambda ordinal: cuda.current_stream())
        patch.setattr(torch, "empty", empty_on_gpu)
        yield made
