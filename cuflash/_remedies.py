"""What to pass instead of an array whose shape does not fit: the ends of messages, or nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]
View = Callable[[np.ndarray], np.ndarray]

SWAP = "; pass x.swapaxes(-3, -2) of arrays with the axes (heads, length, head size)"
OF_SCORES: dict[str, View] = {
    "[:, None, None, :]": lambda x: x[:, None, None, :],  # of (B, Sk)
    "[:, None]": lambda x: x[:, None],  # of (B, Sq, Sk)
    ".swapaxes(1, 2)": lambda x: x.swapaxes(1, 2),  # of (B, Sq, Hq, Sk)
    ".swapaxes(-2, -1)": lambda x: x.swapaxes(-2, -1),
}
OF_RESULTS: dict[str, View] = {
    "[None]": lambda x: x[None],
    ".swapaxes(-3, -2)": lambda x: x.swapaxes(-3, -2),
    ".swapaxes(-2, -1)": lambda x: x.swapaxes(-2, -1),
}
ORDER = {  # of a function whose arguments are easily confused
    "attention_varlen_backward": (
        "; the order is dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse"
    ),
}
OF_AXES = {
    (3, 4): "; x[None] is a batch of one, and attention_varlen takes packed sequences",
    (4, 3): "; attention takes batches",
}


def view(
    name: str, shape: Shape, fits: Callable[[Shape], bool], views: dict[str, View], does: str
) -> str:
    """The first view of an array of this shape that fits; `does` ends the sentence."""
    array = np.broadcast_to(np.False_, shape)  # of one byte
    for text, function in views.items():
        try:
            if fits(function(array).shape):
                return f", as {name.split()[-1]}{text} {does}"
        except (IndexError, ValueError):  # no such axis
            continue
    return ""


def batch_of_one(name: str, shape: Shape, shape_q: Shape) -> str:
    """Where k's or v's batch, or q's, is 1 and the other is not: a view with a stride of 0."""
    if shape_q[0] == 1:
        name, shape, batch = "q", shape_q, shape[0]
    elif shape[0] == 1:
        batch = shape_q[0]
    else:
        return ""
    broadcast = (batch, *shape[1:])
    return f", as broadcast_to({name}, {broadcast}) has, or {name}.expand{broadcast} in torch"


def swapped_heads(shape_q: Shape, shape_k: Shape) -> str:
    """Where q and k, or k alone, seem to have the axes of length and heads swapped."""
    (length_q, heads_q), (length_k, heads_k) = shape_q[1:3], shape_k[1:3]
    if not length_k:
        return ""
    of_both = length_q % length_k == 0 and length_k < heads_k
    return SWAP if of_both or heads_q % length_k == 0 else ""


def swapped_lengths(shape_k: Shape, shape_v: Shape) -> str:
    """Where v has k's length and heads, but swapped."""
    return SWAP if shape_v[1:3] == (shape_k[2], shape_k[1]) else ""
