"""What `bench` compares on: one problem of a grid, and its arrays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cuflash.cli.rules import Rule, Tile, visible_pairs, visible_share

PRODUCTS = {"forward": 2, "backward": 5}  # of matrices, for each pair of a query and a key


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem of a grid: self-attention with as many key heads as query heads."""

    direction: Literal["forward", "backward", "forward+backward"]
    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool
    rule: Rule | None = None  # which pairs are visible, besides causal
    bias: Literal["", "fixed", "learned"] = ""  # (H, S, S); learned: with a gradient

    def __str__(self) -> str:
        extras = ["causal"] if self.causal else []
        extras += [str(self.rule)] if self.rule else []
        extras += [f"{self.bias} bias"] if self.bias else []
        sizes = f"{self.direction} {self.dtype} S{self.seqlen} D{self.head_dim}"
        return " ".join([sizes, ", ".join(extras)]).rstrip()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.seqlen, self.heads, self.head_dim)

    @property
    def flops(self) -> int:
        """Of the matrix products, over the visible (query, key) pairs alone."""
        visible = visible_pairs(self.rule, self.causal, self.seqlen)
        products = sum(PRODUCTS[direction] for direction in self.direction.split("+"))
        return 2 * products * self.batch * self.heads * visible * self.head_dim

    @property
    def dense(self) -> Cell:
        """The same sizes, with all pairs visible and nothing added to the scores."""
        return replace(self, causal=False, rule=None, bias="")

    def share(self, tiles: dict[str, Tile]) -> float:
        """The visible tiles, of all; `tiles`: their sizes by direction.

        Tiles of both directions count by the products that are computed in them.
        """
        directions = self.direction.split("+")
        visible = {
            direction: visible_share(self.rule, self.causal, self.seqlen, tiles[direction])
            for direction in directions
        }
        products = sum(PRODUCTS[direction] for direction in directions)
        return sum(PRODUCTS[direction] * visible[direction] for direction in directions) / products


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arrays of cell.shape, of CuPy or NumPy, and those of the cell's rule and bias."""

    q: Any
    k: Any
    v: Any
    dout: Any
    of_rule: dict[str, Any] = field(default_factory=dict)
    bias: Any = None  # (H, S, S)
