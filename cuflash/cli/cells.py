"""What `bench` compares on: one problem of a grid, and its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem of a grid: self-attention with as many key heads as query heads."""

    direction: str  # "forward", "backward" or "forward+backward"
    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        causal = " causal" if self.causal else ""
        return f"{self.direction} {self.dtype} S{self.seqlen} D{self.head_dim}{causal}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.seqlen, self.heads, self.head_dim)

    @property
    def flops(self) -> int:
        """Of the matrix products, over the visible (query, key) pairs alone."""
        visible = self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[self.direction]
        return 2 * products * self.batch * self.heads * visible * self.head_dim


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arrays of cell.shape, of CuPy or NumPy."""

    q: Any
    k: Any
    v: Any
    dout: Any
