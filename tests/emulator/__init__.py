"""Runs PTX on the CPU, to test kernels without a GPU.

`load` parses the PTX (`parse`), turns each instruction into one C++ statement (`translate`,
`arithmetic`, `instructions`) and compiles the result with g++ (`build`). The runtime
(`runtime/*.cpp`) gives each CUDA thread a fiber and each block an OS thread, and is an adversary:
asynchronous work is done as late as the schedule allows, memory in flight holds NaN, and
happens-before detectors report every pair of accesses to shared memory that no barrier orders, and
to global memory that nothing orders, of warps and of blocks, even if this run met them in a good
order. `Kernel` describes the checks.

    kernel = load(ptx)
    kernel.launch((blocks,), (128,), smem_bytes, [x, y, np.int32(n)], buffers=[x, y])

What it cannot show: speed, spills, races between the lanes of a warp, stale values that hardware
may read where nothing orders accesses (those are reported, but what is read is the newest), missing
proxy fences for global memory, the exact rounding inside tensor cores and of the approximate
functions. Clusters are not supported.
"""

from .errors import EmulatorError, UnsupportedPtx
from .launch import Kernel, Stats, load
from .memory import encode_tensor_map, guarded, tensor_map

__all__ = [
    "EmulatorError",
    "Kernel",
    "Stats",
    "UnsupportedPtx",
    "encode_tensor_map",
    "guarded",
    "load",
    "tensor_map",
]
