"""One face for every backend, for one suite: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _params, _traits, _work
from cuflash._mask_tree import Mask
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash._program import Bits
from cuflash.score_mod import ScoreMod

Both = tuple[np.ndarray, np.ndarray, Gradients]


def shrink_cpu_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    """Tiles and tasks so small that small problems have many of them."""
    monkeypatch.setattr(_work, "TILE", (rows, keys))
    monkeypatch.setattr(_work, "TILE_OF_BAND", (rows, keys))
    monkeypatch.setattr(_work, "MASK_BLOCK", (rows, rows))
    monkeypatch.setattr(_work, "LEAST_SCORES", 1)


class _Backend:
    def both(self, dout, q, k, v, dlse=None, deterministic=True, **options: Any) -> Both:
        """Out, lse and the gradients."""
        out, lse, stats = self.forward_with_stats(q, k, v, **options)
        dlse = None if dlse is None else dlse.astype(lse.dtype)
        options = {**options, "stats": stats, "dlse": dlse, "deterministic": deterministic}
        return out, lse, self.backward(dout, q, k, v, out, lse, **options)


class CpuBackend(_Backend):
    """The NumPy backend, through the public functions."""

    name = "cpu"
    dtypes = ("float16", "bfloat16", "float32", "float64")

    def forward(self, q, k, v, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        return cuflash.attention(q, k, v, return_lse=True, **options)

    def forward_with_stats(self, q, k, v, **options: Any) -> tuple[np.ndarray, ...]:
        return cuflash.attention(q, k, v, return_stats=True, **options)

    def backward(self, dout, q, k, v, out, lse, **options: Any) -> Gradients:
        return cuflash.attention_backward(dout, q, k, v, out, lse, **options)

    def forward_varlen(self, q, k, v, cu_seqlens_q, cu_seqlens_k, **options: Any) -> Any:
        arrays = (q, k, v, cu_seqlens_q, cu_seqlens_k)
        return cuflash.attention_varlen(*arrays, return_lse=True, **options)

    def backward_varlen(self, *arrays: np.ndarray, **options: Any) -> Gradients:
        return cuflash.attention_varlen_backward(*arrays, **options)


class GpuBackend(_Backend):
    """The kernels on the GPU at hand, through the public functions."""

    name = "gpu"
    dtypes = ("float16", "bfloat16")

    def forward(self, q, k, v, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.forward_with_stats(q, k, v, **options)[:2]

    def forward_with_stats(self, q, k, v, **options: Any) -> tuple[np.ndarray, ...]:
        q, k, v = map(_to_gpu, (q, k, v))
        results = cuflash.attention(q, k, v, return_stats=True, **_options_to_gpu(options))
        return tuple(x.get() for x in results)

    def backward(self, dout, q, k, v, out, lse, **options: Any) -> Gradients:
        arrays = map(_to_gpu, (dout, q, k, v, out, lse))
        grads = cuflash.attention_backward(*arrays, **_options_to_gpu(options))
        return Gradients(*(None if x is None else x.get() for x in grads))

    def forward_varlen(self, *arrays: np.ndarray, **options: Any) -> Any:
        options = {"return_lse": True, **_options_to_gpu(options)}
        out, lse = cuflash.attention_varlen(*map(_to_gpu, arrays), **options)
        return out.get(), lse.get()

    def backward_varlen(self, *arrays: np.ndarray, **options: Any) -> Gradients:
        arrays = map(_to_gpu, arrays)
        grads = cuflash.attention_varlen_backward(*arrays, **_options_to_gpu(options))
        return Gradients(*(None if x is None else x.get() for x in grads))


class EmulatedBackend(_Backend):
    """The kernels' PTX on the CPU, launched as on a GPU: Problem → Plan → parameters."""

    dtypes = ("float16", "bfloat16")

    def __init__(
        self,
        capability: int = 80,
        schedule: str = "lazy",
        seed: int = 0,
        threads: int = 2,
        order: Sequence[int] | None = None,
    ) -> None:
        self.name = f"emulated-{capability}"
        self.launches: list[Launch] = []  # of all calls
        self._make_gpu = lambda inputs: EmulatedGpu(
            capability, schedule, seed, inputs, threads, order
        )

    def forward(self, q, k, v, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        from cuflash import _launch

        problem = Problem.create("attention", "cuda", q, k, v, **_as_arrays(options))
        return self._run(_launch.forward, problem)[:2]

    def backward(self, dout, q, k, v, out, lse, **options: Any) -> Gradients:
        from cuflash import _launch

        names = ("dlse", "deterministic", "bias_gradient", "stats")
        own = {n: options.pop(n) for n in names if n in options}
        forward = Problem.create("attention_backward", "cuda", q, k, v, **_as_arrays(options))
        gradient = GradientProblem.create("attention_backward", forward, dout, out, lse, **own)
        return self._run(_launch.backward, gradient)

    def both(self, dout, q, k, v, dlse=None, deterministic=True, **options: Any) -> Both:
        """As the others' in one stream, for which all kernels are compiled side by side."""
        from cuflash import _launch

        def launch(problem: Problem, gpu: EmulatedGpu) -> Both:
            out, lse, stats = _launch.forward(problem, gpu, wants_stats=True)
            arrays = (dout, out, lse, dlse, deterministic)
            gradient = GradientProblem.create("both", problem, *arrays, stats=stats)
            return out, lse, _launch.backward(gradient, gpu)

        problem = Problem.create("both", "cuda", q, k, v, **_as_arrays(options))
        return self._run(launch, problem, [x for x in (dout, dlse) if x is not None])

    def _run(self, launch: Callable[..., Any], problem: Any, others: Sequence[Any] = ()) -> Any:
        gpu = self._make_gpu([*_arrays_of(problem), *others])
        results = launch(problem, gpu)
        gpu.synchronize()
        self.launches += gpu.launches
        return results

    def forward_varlen(self, *arrays: np.ndarray, **options: Any) -> Any:
        from cuflash import _launch_packed

        problem = PackedProblem.create("attention_varlen", "cuda", *arrays, **_as_arrays(options))
        return self._run(_launch_packed.forward, problem)[:2]

    def backward_varlen(self, *arrays: np.ndarray, **options: Any) -> Gradients:
        from cuflash import _launch_packed

        dout, *inputs, out, lse = arrays
        function = "attention_varlen_backward"
        own = {n: options.pop(n) for n in ("dlse", "deterministic", "stats") if n in options}
        forward = PackedProblem.create(function, "cuda", *inputs, **_as_arrays(options))
        gradient = PackedGradientProblem.create(function, forward, dout, out, lse, **own)
        return self._run(_launch_packed.backward, gradient)


Backend = CpuBackend | GpuBackend | EmulatedBackend


@dataclass(frozen=True)
class Launch:
    """What an emulated GPU has run."""

    kernel: _traits.Kernel
    blocks: int
    stats: Any  # emulator.Stats
    buffers: Sequence[np.ndarray]

    def bytes_read(self, array: np.ndarray) -> int:
        """Of this array, by its address."""
        addresses = [buffer.ctypes.data for buffer in self.buffers]
        return self.stats.bytes_read[addresses.index(array.ctypes.data)]

    @property
    def dq_sums(self) -> np.ndarray:
        """A backward's, in float32: rounded to 16 bits, sums in another order are mostly equal."""
        return max((x for x in self.buffers if x.dtype == np.float32), key=np.size)

    @property
    def tiling(self) -> _traits.Tiling:
        """How a main kernel cuts the matrix of scores."""
        constants = dict(self.kernel.constants)
        block_q = constants.get("BLOCK_Q", 64 * constants.get("CONSUMERS", 0))
        hoppers = 64 if "wide" in self.kernel.source else 128  # of its backward
        block_kv = constants.get("BLOCK_KV", hoppers)
        return _traits.Tiling(block_q, block_kv, bool(constants.get("PACK_GROUP", 0)))


class EmulatedGpu:
    """Takes the place of `_gpu.Gpu`: memory is NumPy's, a launch runs the kernel's PTX.

    Work waits in a stream for `synchronize`, so that whoever reads results before reads NaN, and
    kernels are compiled side by side.
    """

    def __init__(
        self,
        capability: int,
        schedule: str,
        seed: int,
        inputs: Sequence[np.ndarray],
        threads: int = 2,
        order: Sequence[int] | None = None,
    ) -> None:
        self.device = _traits.Device(capability, l2_bytes=1 << 20, sms=3)
        self.launches: list[Launch] = []
        self._schedule, self._seed = schedule, seed
        self._threads = threads  # of the host, each with a block at a time
        self._order = order  # in which the blocks start whose sums have one
        self.buffers = list(inputs)
        self._stream: list[tuple[_traits.Kernel, int, bytes]] = []

    stream = (0, 0)
    is_captured = False

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        import emulator

        return self._keep(emulator.guarded(shape, np.dtype(dtype), fill=_poison(dtype)))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self._keep(np.zeros(shape, dtype))

    def encode(self, tensor_map: _params.TensorMap) -> bytes:
        import emulator

        address, extents, strides, box = tensor_map
        itemsize = 2
        return emulator.encode_tensor_map(
            address, extents, strides, box, tensor_map.swizzle_bytes, itemsize
        )

    def run(self, kernel: _traits.Kernel, blocks: int, params: bytes) -> None:
        if blocks < 1:
            raise ValueError(f"{kernel.entry} is launched with {blocks} blocks: the driver refuses")
        self._stream.append((kernel, blocks, params))

    def synchronize(self) -> None:
        """Do all that waits."""
        stream, self._stream = self._stream, []
        kernels = list(dict.fromkeys(kernel for kernel, _, _ in stream))
        with ThreadPoolExecutor(2) as threads:
            compiled = dict(zip(kernels, threads.map(_emulated_kernel, kernels), strict=True))
        for kernel, blocks, params in stream:
            deterministic = bool(dict(kernel.constants).get("DETERMINISTIC", 0))
            stats = compiled[kernel].launch(
                (blocks,),
                (kernel.threads,),
                kernel.smem_bytes,
                [params],
                schedule=self._schedule,
                seed=self._seed,
                threads=self._threads,
                buffers=self.buffers,
                deterministic=deterministic,
                order=self._order if deterministic else None,
            )
            assert not stats.bytes_past_extents, f"{kernel.source} stores past the end of rows"
            self.launches.append(Launch(kernel, blocks, stats, tuple(self.buffers)))

    def _keep(self, array: np.ndarray) -> np.ndarray:
        self.buffers.append(array)
        return array


@cache
def _emulated_kernel(kernel: _traits.Kernel) -> Any:
    import emulator

    from cuflash import _jit

    return emulator.load(_jit.cached_ptx(kernel), kernel.entry)


def _poison(dtype: Any) -> Any:
    return np.nan if np.dtype(dtype).kind not in "iu" else np.iinfo(dtype).max


def _arrays_of(problem: Problem | GradientProblem) -> list[np.ndarray]:
    """What a call is given: to read, but for the place that a forward writes its result to."""
    arrays = []
    writes_out = isinstance(problem, (Problem, PackedProblem))
    for name in problem.__slots__:
        value = getattr(problem, name)
        if isinstance(value, (Problem, PackedProblem)):
            arrays += _arrays_of(value)
        elif isinstance(value, (Mask, ScoreMod)):
            arrays += value.arrays().values()
            arrays += _arrays_in(getattr(value, "tables", {}))
        elif isinstance(value, np.ndarray):
            arrays.append(value if name == "out" and writes_out else _read_only(value))
    return arrays


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _arrays_in(kept: Any) -> list[np.ndarray]:
    """In the tables of a compiled mask."""
    if isinstance(kept, np.ndarray):
        return [kept]
    if isinstance(kept, Bits):
        return [kept.words]
    parts = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, tuple) else ()
    return [x for part in parts for x in _arrays_in(part)]


def _as_arrays(options: dict[str, Any]) -> dict[str, Any]:
    """Lengths as the arrays that the public functions hand on."""
    return {n: np.asarray(x) if isinstance(x, list) else x for n, x in options.items()}


def _to_gpu(array: np.ndarray) -> Any:
    """Onto the GPU with the same strides, so that strided inputs stay strided."""
    import cupy

    memory = array
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    if memory is array or not memory.flags.c_contiguous:
        return cupy.asarray(array)
    pointer = cupy.asarray(memory).data + (array.ctypes.data - memory.ctypes.data)
    return cupy.ndarray(array.shape, array.dtype, pointer, strides=array.strides)


def _options_to_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {n: _to_gpu(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
