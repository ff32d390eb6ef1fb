"""Exact attention, forward and backward, for every array library."""

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
