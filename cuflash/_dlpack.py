"""DLPack between NumPy and others, bfloat16 too: NumPy's own DLPack does not know that type.

The capsule that an exporter makes says what its elements are; where one side calls them bfloat16,
the other is told that they are 16-bit unsigned integers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from cuflash._checks import BFLOAT16

# The numbers of dlpack.h.
CPU = 1
CUDA = (2, 13)  # device memory, managed memory
UINT = 1
BFLOAT = 4
IS_COPIED = 2


def to_numpy(x: Any, to_write: bool = False) -> np.ndarray:
    """The same memory as a NumPy array, of an `x` on the CPU; no copy if it is to be written."""
    bits = _Recoded(x, BFLOAT, UINT)
    array = np.from_dlpack(bits)
    if to_write and bits.copied:
        raise BufferError("__dlpack__ exports a copy; expected the array's own memory")
    return array.view(BFLOAT16) if bits.recoded else array


def exporter(array: np.ndarray) -> Any:
    """What another library's from_dlpack takes for this array."""
    return _Recoded(array.view(np.uint16), UINT, BFLOAT) if array.dtype == BFLOAT16 else array


class _Recoded:
    """An exporter whose elements of type code `old` are called `new`."""

    def __init__(self, owner: Any, old: int, new: int) -> None:
        self.owner, self.old, self.new = owner, old, new
        self.recoded = self.copied = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.owner.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.owner.__dlpack__(**options)
        tensor, flags = _tensor_in(capsule)
        self.copied = bool(flags & IS_COPIED)
        if tensor.type_code == self.old:
            tensor.type_code = self.new
            self.recoded = True
        return capsule


class _DLTensor(ctypes.Structure):
    """dlpack.h's DLTensor as far as the type of its elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
    )


class _Version(ctypes.Structure):
    """What DLManagedTensorVersioned has before its DLTensor; DLManagedTensor begins with it."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_DLTENSOR_OFFSETS = {b"dltensor": 0, b"dltensor_versioned": ctypes.sizeof(_Version)}
_capsule_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor_in(capsule: Any) -> tuple[_DLTensor, int]:
    """A capsule's tensor and flags."""
    name = next((name for name in _DLTENSOR_OFFSETS if _capsule_is(capsule, name)), None)
    if name is None:
        raise TypeError(f"__dlpack__ returned {capsule!r}; expected an unused DLPack capsule")
    start, offset = _capsule_pointer(capsule, name), _DLTENSOR_OFFSETS[name]
    flags = _Version.from_address(start).flags if offset else 0
    return _DLTensor.from_address(start + offset), flags
