"""The numbers that a cell of a benchmark is measured on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash._checks import BFLOAT16
from cuflash.cli.cells import Cell, Inputs


def gpu_inputs(cupy: Any, cells: list[Cell]) -> Callable[[Cell], Inputs]:
    """The largest cell's numbers travel to the GPU once, and serve all cells."""
    rng = np.random.default_rng(0)
    size = max(math.prod(cell.shape) for cell in cells)
    flat = [cupy.asarray(rng.standard_normal(size, np.float32).astype(BFLOAT16)) for _ in range(4)]

    def inputs(cell: Cell) -> Inputs:
        arrays = (x[: math.prod(cell.shape)].reshape(cell.shape) for x in flat)
        of_rule = {name: cupy.asarray(x) for name, x in _arrays_of_rule(cell).items()}
        bias = _bias(cell)
        return Inputs(*arrays, of_rule, None if bias is None else cupy.asarray(bias))

    return inputs


def cpu_inputs(cell: Cell) -> Inputs:
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(cell.shape, np.float32) for _ in range(4))
    return Inputs(*arrays, _arrays_of_rule(cell), _bias(cell))


def _arrays_of_rule(cell: Cell) -> dict[str, np.ndarray]:
    return cell.rule.arrays(cell.seqlen) if cell.rule else {}


def _bias(cell: Cell) -> np.ndarray | None:
    if not cell.bias:
        return None
    shape = (cell.heads, cell.seqlen, cell.seqlen)
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(cell.dtype)
