"""A GPU: its memory, its tensor maps, its launches."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from cuflash import _jit, _params, _traits
from cuflash._capture import is_captured
from cuflash._problem import Array

# Of cuda.h's enumerations of tensor maps: ..._UINT16, ..._INTERLEAVE_NONE,
# ..._L2_PROMOTION_L2_128B, ..._FLOAT_OOB_FILL_NONE, ..._SWIZZLE_64B and 128B.
_UINT16, _NO_INTERLEAVE, _L2_128_BYTES, _ZEROS_OUTSIDE = 1, 0, 2, 0
_SWIZZLES = {64: 2, 128: 3}
_MAX_BLOCKS = 2**31 - 1  # of a grid's first axis

# Of the dry run that this thread is in, or None.
noted: ContextVar[list[_traits.Kernel] | None] = ContextVar("noted", default=None)


class Gpu:
    """A CUDA device, on CuPy's current stream."""

    def __init__(self, device_id: int) -> None:
        properties = runtime.getDeviceProperties(device_id)
        self.device = _traits.Device(
            capability=10 * properties["major"] + properties["minor"],
            l2_bytes=properties["l2CacheSize"],
            sms=properties["multiProcessorCount"],
        )
        self._device_id = device_id

    @property
    def stream(self) -> tuple[int, int]:
        """The device's number and the address of CuPy's current stream."""
        return self._device_id, cupy.cuda.get_current_stream().ptr

    @property
    def is_captured(self) -> bool:
        """Whether what runs goes into a CUDA graph."""
        return is_captured(cupy)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Memory in order with the current stream, not cleared."""
        return cupy.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Cleared memory, in order with the current stream."""
        return cupy.zeros(shape, dtype)

    def encode(self, tensor_map: _params.TensorMap) -> bytes:
        """A CUtensorMap."""
        return _encode(tensor_map)

    def run(self, kernel: _traits.Kernel, blocks: int, params: bytes) -> None:
        """Launch on the current stream. The driver copies the parameters before it returns."""
        kernels = noted.get()
        if kernels is not None:
            kernels.append(kernel)
            return
        if blocks > _MAX_BLOCKS:
            raise NotImplementedError(
                f"cuflash: {kernel.source} would take {blocks} blocks; expected at most "
                f"{_MAX_BLOCKS}, as a GPU launches: split the call by batch entries or heads"
            )
        function = _jit.load(kernel, self._device_id).function_pointer
        block = ctypes.create_string_buffer(params, len(params))
        pointers = ctypes.c_void_p(ctypes.addressof(block))
        stream = cupy.cuda.get_current_stream().ptr
        driver.launchKernel(
            function,
            blocks,
            1,
            1,
            kernel.threads,
            1,
            1,
            kernel.smem_bytes,
            stream,
            ctypes.addressof(pointers),
            0,
        )


@contextmanager
def dry_run() -> Iterator[list[_traits.Kernel]]:
    """This thread's launches, on any GPU, are noted and not done: what they would write is not.

    That goes for the tables of a compiled mask too, which is not to be used afterwards.
    """
    kernels: list[_traits.Kernel] = []
    outer = noted.set(kernels)
    try:
        yield kernels
    finally:
        noted.reset(outer)


@cache
def gpu(device_id: int) -> Gpu:
    """The GPU of this number."""
    return Gpu(device_id)


@lru_cache(maxsize=4096)
def _encode(tensor_map: _params.TensorMap) -> bytes:
    """A CUtensorMap, by the driver, which wants it aligned: no Python object's memory is."""
    memory = ctypes.create_string_buffer(2 * _params.TENSOR_MAP_BYTES)
    first = ctypes.addressof(memory)
    encoded = first + -first % _params.TENSOR_MAP_BYTES
    rank = len(tensor_map.extents)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded),
        _UINT16,
        rank,
        ctypes.c_void_p(tensor_map.address),
        (ctypes.c_uint64 * rank)(*tensor_map.extents),
        (ctypes.c_uint64 * (rank - 1))(*tensor_map.strides),
        (ctypes.c_uint32 * rank)(*tensor_map.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLES[tensor_map.swizzle_bytes],
        _L2_128_BYTES,
        _ZEROS_OUTSIDE,
    )
    if status:
        raise RuntimeError(f"cuflash: the driver refuses {tensor_map}: CUDA error {status}")
    return ctypes.string_at(encoded, _params.TENSOR_MAP_BYTES)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
