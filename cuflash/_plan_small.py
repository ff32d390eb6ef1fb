"""The kernels around the main ones: masks, packed sequences, gradients of bias and sinks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from cuflash import _params
from cuflash._traits import Kernel, Tiling, Traits, arch_of, kernel_of, smem_limit

_MASK_WARPS = 4
_PACKED_WARPS = 8
_REST_WARPS = 4
_CONVERT_WARPS = 4
_BIAS_WARPS = 4
_SINK_WARPS = 8


@lru_cache(maxsize=1024)
def mask_tiles_kernel(traits: Traits, tiling: Tiling, capability: int, whole_rows: bool) -> Kernel:
    """Finds the visible tiles; `whole_rows`: those with rows past the end are not fully visible."""
    constants = {
        **traits.parameter_constants(),
        "BLOCK_Q": tiling.block_q,
        "BLOCK_KV": tiling.block_kv,
        "PACK_GROUP": int(tiling.pack_group),
        "WHOLE_ROWS": int(whole_rows),
        "WARPS": _MASK_WARPS,
        "PARAMS_BYTES": traits.params_bytes(_params.MASK_TILES_BYTES),
    }
    arch = arch_of(capability)
    return kernel_of("mask_tiles.cu", "mask_tiles", arch, constants, _MASK_WARPS, 0, traits)


@cache
def mask_lists_kernel(capability: int) -> Kernel:
    """Lists the visible tiles."""
    constants = {"WARPS": _MASK_WARPS, "PARAMS_BYTES": _params.MASK_LISTS_BYTES}
    return kernel_of("mask_lists.cu", "mask_lists", arch_of(capability), constants, _MASK_WARPS, 0)


@cache
def mask_bits_kernel(capability: int) -> Kernel:
    """Packs a boolean array."""
    constants = {"WARPS": _MASK_WARPS, "PARAMS_BYTES": _params.MASK_BITS_BYTES}
    return kernel_of("mask_bits.cu", "mask_bits", arch_of(capability), constants, _MASK_WARPS, 0)


@cache
def packed_tiles_kernel(capability: int) -> Kernel:
    """Tells which sequence each tile is of."""
    constants = {"WARPS": _PACKED_WARPS, "PARAMS_BYTES": _params.PACKED_TILES_BYTES}
    name = "packed_tiles"
    return kernel_of(f"{name}.cu", name, arch_of(capability), constants, _PACKED_WARPS, 0)


@cache
def packed_rest_kernel(capability: int) -> Kernel:
    """Fills the rows of tokens that belong to no sequence."""
    constants = {"WARPS": _REST_WARPS, "PARAMS_BYTES": _params.PACKED_REST_BYTES}
    name = "packed_rest"
    return kernel_of(f"{name}.cu", name, arch_of(capability), constants, _REST_WARPS, 0)


@cache
def convert_kernel(source: int, target: int, capability: int) -> Kernel:
    """Copies from one type to another, by their numbers in convert.cu."""
    constants = {
        "FROM": source,
        "TO": target,
        "WARPS": _CONVERT_WARPS,
        "PARAMS_BYTES": _params.CONVERT_BYTES,
    }
    return kernel_of("convert.cu", "convert", arch_of(capability), constants, _CONVERT_WARPS, 0)


@dataclass(frozen=True, slots=True)
class BiasGradientPlan:
    """Two kernels in a row: parts of the sums, and these in one."""

    kernel: Kernel
    sum: Kernel
    tiling: Tiling


@lru_cache(maxsize=1024)
def bias_gradient_plan(traits: Traits, capability: int) -> BiasGradientPlan:
    """Tiles of 64 x 64 where shared memory holds them, else of 32 x 32."""
    both = traits.head_dim + traits.head_dim_v
    block = 64 if 2 * 2 * 64 * both <= smem_limit(capability) else 32
    smem_bytes = max(2 * 2 * block * both, 4 * block * block)
    constants = {
        **traits.constants(),
        "PACK_GROUP": 0,
        "BLOCK_Q": block,
        "BLOCK_KV": block,
        "WARPS": _BIAS_WARPS,
        "QUERY_WARPS": 2,
        "SCORE_WARPS": 2,
        "BIAS_PARAMS_BYTES": traits.params_bytes(_params.BIAS_GRADIENT_BYTES),
        "SMEM_BYTES": smem_bytes,
    }
    sum_constants = {
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "BIAS_BYTES": traits.extras.bias_bytes,
        "WARPS": _BIAS_WARPS,
        "PARAMS_BYTES": _params.BIAS_SUM_BYTES,
    }
    arch, warps = arch_of(capability), _BIAS_WARPS
    name, sum_name = "flash_bwd_bias", "flash_bwd_bias_sum"
    return BiasGradientPlan(
        kernel_of(f"{name}.cu", name, arch, constants, warps, smem_bytes, traits),
        kernel_of(f"{sum_name}.cu", sum_name, arch, sum_constants, warps, 0),
        Tiling(block, block, pack_group=False),
    )


@lru_cache(maxsize=1024)
def sink_gradient_kernel(traits: Traits, capability: int) -> Kernel:
    """Sums over the rows of each head."""
    constants = {
        **traits.parameter_constants(),
        "SINKS": 1,
        "WARPS": _SINK_WARPS,
        "SINK_PARAMS_BYTES": traits.params_bytes(_params.SINK_GRADIENT_BYTES),
    }
    name = "flash_bwd_sinks"
    return kernel_of(f"{name}.cu", name, arch_of(capability), constants, _SINK_WARPS, 0)
