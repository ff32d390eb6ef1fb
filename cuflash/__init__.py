"""Exact attention, forward and backward, for every array library."""

from cuflash._problem import Gradients
from cuflash.attention import attention, attention_backward, attention_vjp
from cuflash.explain import Explanation, explain
from cuflash.merge import merge

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Gradients",
    "attention",
    "attention_backward",
    "attention_vjp",
    "explain",
    "merge",
]
