"""A public function's arguments → arrays, problem, backend → results of the caller's kind."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from cuflash._checks import Check, check_flag
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash.interop import receive, warn_of_lost_gradients

Array = Any  # of the caller's kind
Arguments = dict[str, Any]  # a public function's locals()

BACKWARD_FLAGS = ("deterministic", "bias_gradient")  # packed sequences have no bias


class Kind(NamedTuple):
    """What is particular to calls on dense or on packed arrays."""

    problem: type[Problem] | type[PackedProblem]
    gradient: type[GradientProblem] | type[PackedGradientProblem]
    backend: Callable[[str], ModuleType]  # that of "cpu" or "cuda"


def forward(
    kind: Kind, function: str, arguments: Arguments, has_pullback: bool = False
) -> Array | tuple[Array, ...]:
    """Out, or (out, lse), or (out, lse, stats)."""
    if not has_pullback:
        warn_of_lost_gradients(function, arguments, stacklevel=4)
    return_lse = check_flag(function, "return_lse", arguments["return_lse"])
    return_stats = check_flag(function, "return_stats", arguments["return_stats"])
    with receive(function, ("q", "k", "v"), arguments) as call:
        del call.arguments["return_lse"], call.arguments["return_stats"]
        problem = call.upload(kind.problem.create(function, call.device, **call.arguments))
        if has_pullback and problem.score_mod is not None:
            problem.score_mod.check_backward(Check(function, call.device))
        out, lse, stats = kind.backend(call.device).forward(problem, wants_stats=return_stats)
        out = call.give(out) if problem.out is None else arguments["out"]
        if return_stats:
            return out, call.give(lse), call.give(stats)
        return (out, call.give(lse)) if return_lse else out


def backward(kind: Kind, function: str, arguments: Arguments) -> Gradients:
    """The gradients, from the arguments of `attention_backward` or its packed counterpart."""
    # q, k and v may require grad without a warning: their gradients may be wanted as plain values.
    incoming = {name: arguments[name] for name in ("dout", "dlse")}
    warn_of_lost_gradients(function, incoming, stacklevel=4)
    own = {"dout", "out", "lse", "stats", "dlse", *BACKWARD_FLAGS} & arguments.keys()
    with receive(function, ("q", "k", "v", "dout", "out", "lse"), arguments) as call:
        results = {name: call.arguments.pop(name) for name in own}
        problem = call.upload(kind.problem.create(function, call.device, **call.arguments))
        gradient = kind.gradient.create(function, problem, **results)
        return Gradients(*map(call.give, kind.backend(call.device).backward(gradient)))


def vjp(
    kind: Kind, function: str, arguments: Arguments
) -> tuple[Array | tuple[Array, Array], Callable[..., Gradients]]:
    """Out, or (out, lse), and the pullback."""
    options = dict(arguments)
    return_lse = check_flag(function, "return_lse", options.pop("return_lse"))
    flags = {
        name: check_flag(function, name, options.pop(name))
        for name in BACKWARD_FLAGS
        if name in options
    }
    wanted = {"return_lse": True, "return_stats": True}
    out, lse, stats = forward(kind, function, {**options, **wanted}, has_pullback=True)

    def pullback(dout: Array, dlse: Array | None = None) -> Gradients:
        results = {"dout": dout, "out": out, "lse": lse, "stats": stats, "dlse": dlse}
        arguments = {**options, **results, **flags}
        return backward(kind, f"{function}'s pullback", arguments)

    return ((out, lse) if return_lse else out), pullback
