"""Exact attention, forward and backward, for every array library.

attention, attention_backward, attention_vjp
    Of (batch, length, heads, head size) arrays: the result, its gradients, or both.
attention_varlen, attention_varlen_backward, attention_varlen_vjp
    Of sequences of any lengths, one behind the other in (tokens, heads, head size) arrays.
masks, ScoreMod
    What is hidden from a query, and functions of the scores.
merge
    Results over disjoint sets of keys into one.
explain, validate
    How a call would be served, and the values that a call on a GPU leaves unread.
"""

from cuflash import masks
from cuflash._problem import Gradients
from cuflash.attention import attention, attention_backward, attention_vjp
from cuflash.explain import Explanation, explain
from cuflash.merge import merge
from cuflash.score_mod import ScoreMod
from cuflash.validate import validate
from cuflash.varlen import attention_varlen, attention_varlen_backward, attention_varlen_vjp

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Gradients",
    "ScoreMod",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_vjp",
    "attention_vjp",
    "explain",
    "masks",
    "merge",
    "validate",
]
