"""Torch's caching allocator in the place of CuPy's pool, for calls on tensors.

So their memory is of torch's current stream, of a graph's own pool while torch captures one, and
what is returned are tensors as torch makes them: `record_stream` works, and no second pool grows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


def allocator(torch: ModuleType, cupy: ModuleType, ordinal: int) -> Callable[[int], Any]:
    """For cupy.cuda.using_allocator: bytes of this GPU, by torch.empty."""
    memory_class = _memory_class(cupy)

    def allocate(size: int) -> Any:
        tensor = torch.empty(size, dtype=torch.uint8, device=f"cuda:{ordinal}")
        memory = memory_class(tensor.data_ptr(), size, tensor, ordinal)
        memory.tensor = tensor
        return cupy.cuda.MemoryPointer(memory, 0)

    return allocate


def as_tensor(torch: ModuleType, array: Any) -> Any:
    """A tensor of an array's memory, which `allocator` gave; to torch it is no view of another."""
    owner, itemsize = array.data.mem.tensor, array.itemsize
    first = (array.data.ptr - owner.data_ptr()) // itemsize
    strides = [stride // itemsize for stride in array.strides]
    empty = torch.empty(0, dtype=getattr(torch, array.dtype.name), device=owner.device)
    return empty.set_(owner.untyped_storage(), first, array.shape, strides)


@cache
def _memory_class(cupy: ModuleType) -> type:
    class TensorMemory(cupy.cuda.UnownedMemory):
        """Memory of a tensor, as CuPy sees it."""

        tensor: Any

    return TensorMemory
