"""Tensors of torch whose memory is not that of a plain array: what they are, and the remedy."""

from __future__ import annotations

import sys
from typing import Any

Tensor = Any  # torch.Tensor


def hides_something(x: Tensor) -> bool:
    """Whether a tensor can be shared, but is more than its memory, as a lazy negative is."""
    torch = sys.modules["torch"]
    return x.is_neg() or torch._is_functional_tensor(x) or _has_tangent(torch, x)


def _has_tangent(torch: Any, x: Tensor) -> bool:
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:  # as unpack_dual asks, in a tenth of its time
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def fault_of(x: Any) -> str:
    """Why this tensor can't be shared, and what to pass; empty for a plain one or no tensor."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return ""
    return _transformed(torch, x) or _laid_out(torch, x) or _numbers(torch, x) or _wrapped(torch, x)


def _transformed(torch: Any, x: Tensor) -> str:
    functorch = torch._C._functorch  # torch.func has no public name for its tensors
    if functorch.is_batchedtensor(x):
        return (
            "torch.vmap maps it; expected a plain tensor (an axis to map over can be part of the "
            "batch: x.flatten(0, 1))"
        )
    if torch._is_functional_tensor(x):
        return "torch.func.functionalize wraps it; expected a call outside of it"
    if functorch.peek_interpreter_stack() is not None:
        return (
            "torch.func differentiates the call; expected it in a torch.autograd.Function, as the "
            "README wraps attention for torch.func.grad and vjp (there is no jvp)"
        )
    if _has_tangent(torch, x):
        return (
            "it has a tangent of forward mode, which there is none of; expected reverse mode, for "
            "which the README wraps attention, or fwAD.unpack_dual(x).primal"
        )
    return ""


def _laid_out(torch: Any, x: Tensor) -> str:
    if x.layout == torch.jagged:
        return (
            "it is nested; expected x.values() by attention_varlen, which takes x.offsets() as "
            "cu_seqlens"
        )
    if x.is_nested:
        return (
            "it is nested; expected torch.cat(x.unbind()) by attention_varlen, with the running "
            "sums of the lengths as cu_seqlens"
        )
    if x.layout != torch.strided:
        return (
            f"its layout is {x.layout}, that of a sparse tensor or the like; expected x.to_dense()"
        )
    return ""


def _numbers(torch: Any, x: Tensor) -> str:
    if x.is_quantized:
        return f"it is quantized ({x.dtype}); expected x.dequantize()"
    if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
        return (
            f"it is {x.dtype}; expected numbers of 16 bits or more, as x.to(torch.bfloat16), "
            "times their scale"
        )
    if x.is_conj():
        return "it is a conjugate that was not computed; expected real numbers"
    return "it is a negative that was not computed; expected x.resolve_neg()" if x.is_neg() else ""


def _wrapped(torch: Any, x: Tensor) -> str:
    if type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return ""
    hint = ", as x.to_local()" if hasattr(x, "to_local") else ""
    return f"it is a {type(x).__name__}, which stands for other tensors; expected a plain one{hint}"
