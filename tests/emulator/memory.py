"""Arrays with guard pages, and tensor maps as cuTensorMapEncodeTiled would fill them."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import numpy as np

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 16  # of the first byte
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(
    shape: int | Sequence[int], dtype: np.typing.DTypeLike, fill: float | None = None
) -> np.ndarray:
    """An array between two pages without access; it ends at most 15 bytes before the second one.

    `fill` None fills with bytes 0xFF, which is NaN in every float format.
    """
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    data_bytes = -(-max(nbytes, 1) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, data_bytes + 2 * _PAGE)
    whole = np.frombuffer(memory, np.uint8)
    for guard in (0, _PAGE + data_bytes):
        if _libc.mprotect(ctypes.c_void_p(whole.ctypes.data + guard), ctypes.c_size_t(_PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = _PAGE + (data_bytes - nbytes) // _ALIGNMENT * _ALIGNMENT
    whole[_PAGE : _PAGE + data_bytes] = 0xFF
    array = whole[begin : begin + nbytes].view(dtype).reshape(shape)
    if fill is not None:
        array[...] = fill
    return array


class _TensorMap(ctypes.Structure):
    """As TensorMap in runtime/state.h."""

    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("element_bytes", ctypes.c_uint32),
        ("swizzle_bytes", ctypes.c_uint32),
        ("element", ctypes.c_uint32),
        ("extent", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint32 * 5),
        ("stride", ctypes.c_uint64 * 5),
    ]


_MAGIC = 0x70616D726F736E74
_ELEMENTS = {"float32": 1, "float16": 2, "bfloat16": 3, "int32": 4, "uint32": 4}


def tensor_map(array: np.ndarray, box: Sequence[int], *, swizzle: int = 128) -> np.ndarray:
    """The tensor map of `array`, to be passed by value: one element of 128 bytes.

    Args:
        array: 1 to 5 axes, the last one contiguous; it must outlive the launches that use the map.
        box: elements that one copy moves, one per axis, in the order of `array.shape`.
        swizzle: 0, 32, 64 or 128 bytes.

    Raises:
        ValueError: where cuTensorMapEncodeTiled would refuse.
    """
    rank, size = array.ndim, array.itemsize
    if not 1 <= rank <= 5 or len(box) != rank:
        raise ValueError(
            f"tensor_map: box has {len(box)} entries, array has {rank} axes; both 1 to 5, equal"
        )
    if swizzle not in (0, 32, 64, 128):
        raise ValueError(f"tensor_map: swizzle is {swizzle}, must be 0, 32, 64 or 128")
    if array.shape[-1] > 1 and array.strides[-1] != size:
        raise ValueError(
            f"tensor_map: the last axis of array has stride {array.strides[-1]}, must be {size}"
        )
    if array.ctypes.data % 16 or any(stride % 16 or stride < 0 for stride in array.strides[:-1]):
        raise ValueError(
            f"tensor_map: the address {array.ctypes.data:#x} of array and its strides "
            f"{array.strides[:-1]} must be multiples of 16"
        )
    if any(not 1 <= extent <= 256 for extent in box):
        raise ValueError(f"tensor_map: box is {tuple(box)}, each entry must be 1 to 256")
    inner = box[-1] * size
    if inner % 16 or (swizzle and inner > swizzle):
        raise ValueError(
            f"tensor_map: the box is {inner} bytes wide, must be a multiple of 16 "
            f"and at most the swizzle, {swizzle}"
        )
    raw = encode_tensor_map(
        array.ctypes.data,
        array.shape[::-1],
        array.strides[-2::-1] if rank > 1 else (),
        list(box)[::-1],
        swizzle,
        size,
        array.dtype.name,
    )
    return np.frombuffer(raw, np.dtype([("opaque", np.uint64, (16,))])).copy()


def encode_tensor_map(
    address: int,
    extents: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
    itemsize: int,
    dtype: str = "",
) -> bytes:
    """128 bytes; axes from the innermost outwards, strides in bytes of all but the first.

    Raises:
        ValueError: where cuTensorMapEncodeTiled would refuse.
    """
    if address % 16 or any(stride % 16 or not 0 <= stride < 1 << 40 for stride in strides):
        raise ValueError(f"tensor map: address {address:#x}, strides {strides}: multiples of 16")
    if any(not 1 <= extent <= 1 << 32 for extent in extents):
        raise ValueError(f"tensor map: extents are {extents}, each must be 1 to 2^32")
    if any(not 1 <= extent <= 256 for extent in box):
        raise ValueError(f"tensor map: box is {box}, each entry must be 1 to 256")
    if box[0] * itemsize % 16 or (swizzle and box[0] * itemsize > swizzle):
        raise ValueError(f"tensor map: a box of {box[0]} elements does not fit the swizzle")
    pad = 5 - len(extents)
    encoded = _TensorMap(_MAGIC, address, len(extents), itemsize, swizzle, _ELEMENTS.get(dtype, 0))
    encoded.extent[:] = [*extents, *[1] * pad]
    encoded.box[:] = [*box, *[1] * pad]
    encoded.stride[:] = [itemsize, *strides, *[0] * pad]
    return bytes(encoded).ljust(128, b"\0")
