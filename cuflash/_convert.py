"""Arrays on a GPU in the types and without the gaps that the kernels read and callers get.

By a kernel of our own: CuPy compiles its own with CUDA's headers, which need not be there.
"""

from __future__ import annotations

import numpy as np

from cuflash import _params, _plan_small
from cuflash._checks import BFLOAT16
from cuflash._gpu import Gpu, gpu
from cuflash._problem import Array

# By their numbers in convert.cu.
TYPES = (
    *(np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)),
    *(np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)),
    np.dtype(np.float16),
    BFLOAT16,
    np.dtype(np.float32),
    np.dtype(np.float64),
)


def as_contiguous(array: Array, dtype: np.dtype, on: Gpu | None = None) -> Array:
    """The array itself, or a copy in that dtype; `on` defaults to the GPU that it is on."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    on = on or gpu(array.data.device_id)
    copy = on.empty(array.shape, dtype)
    if copy.size:
        kernel = _plan_small.convert_kernel(
            TYPES.index(array.dtype), TYPES.index(dtype), on.device.capability
        )
        on.run(kernel, -(-copy.size // kernel.threads), _params.pack_convert(array, copy))
    return copy
