"""The sizes of a problem, found once for all calls of one layout."""

from __future__ import annotations


class Sizes:
    """The letters of the shapes, and what follows from them."""

    def __init__(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
        self.batch, self.seqlen_q, self.heads_q, self.head_dim = q
        _, self.seqlen_k, self.heads_k, self.head_dim_v = v
        self.group = max(1, self.heads_q // max(1, self.heads_k))  # query heads per key head
        self.out_shape = (*q[:3], self.head_dim_v)
        self.lse_shape = (self.batch, self.heads_q, self.seqlen_q)
        self.scores_shape = (*self.lse_shape, self.seqlen_k)
