"""Instructions from registers to registers: a table of the regular ones, functions for the rest."""

from __future__ import annotations

import re

from .parse import TYPE_BYTES
from .translate import Instruction, Translator, bits_type, elements, value_type

_PAIRED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
_FLOATS = ("f16", "bf16", "f32", "f64")
_ROUNDING = {"rz": "_MM_ROUND_TOWARD_ZERO", "rm": "_MM_ROUND_DOWN", "rp": "_MM_ROUND_UP"}
_TO_INTEGRAL = {
    "rni": "std::nearbyint",
    "rzi": "std::trunc",
    "rmi": "std::floor",
    "rpi": "std::ceil",
}

# Opcode → what it computes from a, b, c, d; the types of result and operands; other modifiers.
# Types: t the instruction's, b its bits, w twice as wide, u u32, p predicate.
_REGULAR: dict[str, tuple[str, str, str]] = {
    "add": ("a + b", "ttt", "rn ftz sat"),
    "sub": ("a - b", "ttt", "rn ftz sat"),
    "mul": ("a * b", "ttt", "lo rn ftz sat"),
    "mul.hi": ("high_product(a, b)", "ttt", "hi"),
    "mul.wide": ("(W)a * (W)b", "wtt", "wide"),
    "mad": ("a * b + c", "tttt", "lo"),
    "mad.hi": ("high_product(a, b) + c", "tttt", "hi"),
    "mad.wide": ("(W)a * (W)b + c", "wttw", "wide"),
    "fma": ("fused(a, b, c)", "tttt", "rn ftz sat"),
    "div": ("quotient(a, b)", "ttt", "rn ftz approx full"),
    "rem": ("remainder(a, b)", "ttt", ""),
    "neg": ("-a", "tt", "ftz"),
    "abs": ("absolute(a)", "tt", "ftz"),
    "rcp": ("1 / a", "tt", "rn ftz approx"),
    "sqrt": ("std::sqrt(a)", "tt", "rn ftz approx"),
    "rsqrt": ("1 / std::sqrt(a)", "tt", "ftz approx"),
    "ex2": ("std::exp2(a)", "tt", "ftz approx"),
    "lg2": ("std::log2(a)", "tt", "ftz approx"),
    "sin": ("std::sin(a)", "tt", "ftz approx"),
    "cos": ("std::cos(a)", "tt", "ftz approx"),
    "tanh": ("std::tanh(a)", "tt", "approx"),
    "copysign": ("std::copysign(b, a)", "ttt", ""),
    "and": ("a & b", "ttt", ""),
    "or": ("a | b", "ttt", ""),
    "xor": ("a ^ b", "ttt", ""),
    "not": ("~a", "tt", ""),
    "cnot": ("a == 0", "tt", ""),
    "shl": ("shift_left(a, b)", "ttu", ""),
    "shr": ("shift_right(a, b)", "ttu", ""),
    "shf.l.wrap": ("funnel_left(a, b, c & 31)", "uuuu", "l wrap"),
    "shf.r.wrap": ("funnel_right(a, b, c & 31)", "uuuu", "r wrap"),
    "shf.l.clamp": ("funnel_left(a, b, minimum(c, 32u))", "uuuu", "l clamp"),
    "shf.r.clamp": ("funnel_right(a, b, minimum(c, 32u))", "uuuu", "r clamp"),
    "bfe": ("extract_bits(a, b, c)", "ttuu", ""),
    "bfi": ("insert_bits(a, b, c, d)", "tttuu", ""),
    "brev": ("reverse_bits(a)", "tt", ""),
    "popc": ("std::popcount(a)", "ut", ""),
    "clz": ("std::countl_zero(a)", "ut", ""),
    "bfind": ("find_top(a)", "ut", ""),
    "prmt": ("permute_bytes(a, b, c)", "uuuu", ""),
    "lop3": ("lop3(a, b, c, d)", "uuuuu", ""),
    "sad": ("maximum(a, b) - minimum(a, b) + c", "tttt", ""),
    "selp": ("c ? a : b", "bbbp", ""),
    "testp.finite": ("std::isfinite(a)", "pt", "finite"),
    "testp.infinite": ("std::isinf(a)", "pt", "infinite"),
    "testp.notanumber": ("std::isnan(a)", "pt", "notanumber"),
    "testp.number": ("!std::isnan(a)", "pt", "number"),
    "testp.normal": ("std::isnormal(a)", "pt", "normal"),
}


def regular(t: Translator, i: Instruction) -> str:
    """An instruction of the table."""
    parts = (i.base, *i.modifiers)
    key = next(k for n in (3, 2, 1) if (k := ".".join(parts[:n])) in _REGULAR)
    expression, letters, allowed = _REGULAR[key]
    rounding = next((r for r in i.modifiers if r in _ROUNDING and i.type in ("f32", "f64")), None)
    i.allow(f"{allowed} {rounding}" if rounding and "rn" in allowed else allowed)
    if i.type == "pred" and i.base == "not":
        expression = "!a"
    if i.type in _PAIRED:
        return _paired(t, i, expression)
    types = [_letter_type(letter, i) for letter in letters]
    return _compute(t, i, expression, types, rounding)


def _letter_type(letter: str, i: Instruction) -> str:
    if letter == "w":
        return f"{i.type[0]}{16 * TYPE_BYTES[i.type]}"
    return {"t": i.type, "b": bits_type(i.type), "u": "u32", "p": "pred"}[letter]


def _compute(
    t: Translator, i: Instruction, expression: str, types: list[str], rounding: str | None
) -> str:
    """`destination = expression;` with the operands in place of a, b, c, d."""
    if len(i.operands) != len(types):
        raise i.unsupported(f"{len(i.operands)} operands instead of {len(types)}")
    flushes = "ftz" in i and i.type == "f32"
    operands = {}
    for name, operand, kind in zip("abcd", i.operands[1:], types[1:], strict=False):
        value = _read(t, operand, kind)
        operands[name] = f"flush({value})" if flushes and kind == "f32" else value
    before = ""
    if rounding:
        cpp = value_type(i.type)
        before = "".join(f"volatile {cpp} {n} = {value}; " for n, value in operands.items())
        exact = expression.replace("fused", "std::fma")
        expression = f"rounded<{_ROUNDING[rounding]}>([&] {{ return {exact}; }})"
    else:
        expression = _substitute(expression, operands)
    expression = expression.replace("(W)", f"({value_type(types[0])})")
    if "sat" in i:
        if i.type not in _FLOATS:
            raise i.unsupported("integer .sat")
        expression = f"saturate({expression})"
    if flushes:
        expression = f"flush({expression})"
    return f"{{ {before}{t.assign(i.operands[0], expression, types[0])} }}"


def _read(t: Translator, operand: str, kind: str) -> str:
    """Halves are computed in float, so that a result is rounded once."""
    value = t.value(operand, kind)
    return f"(float){value}" if kind in ("f16", "bf16") else value


def _substitute(expression: str, operands: dict[str, str]) -> str:
    return re.sub(r"\b[abcd]\b", lambda match: f"({operands[match.group()]})", expression)


def _paired(t: Translator, i: Instruction, expression: str) -> str:
    names = ["a", "b", "c"][: len(i.operands) - 1]
    raws = [t.raw(operand, i.type) for operand in i.operands[1:]]
    if "sat" in i:
        expression = f"saturate({expression})"
    lanes = ", ".join(f"float {n}" for n in names)
    function = f"[]({lanes}) -> float {{ return {expression}; }}"
    packed = f"pairs<{value_type(_PAIRED[i.type])}>({function}, {', '.join(raws)})"
    return t.assign(i.operands[0], packed, bits_type(i.type))


def minimum_maximum(t: Translator, i: Instruction) -> str:
    """min and max of two or three operands."""
    i.allow("ftz NaN")
    function = {"min": "minimum", "max": "maximum"}[i.base] + ("_nan" if "NaN" in i else "")
    expression = f"{function}(a, b)"
    if len(i.operands) == 4:
        expression = f"{function}({expression}, c)"
    if i.type in _PAIRED:
        return _paired(t, i, expression)
    return _compute(t, i, expression, [i.type] * len(i.operands), None)


def move(t: Translator, i: Instruction) -> str:
    """mov, also to and from vectors of parts."""
    i.allow("")
    target, source = i.operands
    kind = bits_type(i.type)
    if not target.startswith("{") and not source.startswith("{"):
        return t.assign(target, t.value(source, kind), kind)
    width = 8 * TYPE_BYTES[i.type]
    if target.startswith("{"):
        parts = elements(target)
        step = width // len(parts)
        stores = (
            t.assign(part, f"whole >> {step * n}", f"b{step}")
            for n, part in enumerate(parts)
            if part != "_"
        )
        return f"{{ const {value_type(kind)} whole = {t.value(source, kind)}; {' '.join(stores)} }}"
    parts = elements(source)
    step = width // len(parts)
    whole = " | ".join(
        f"({value_type(kind)}){t.value(part, f'b{step}')} << {step * n}"
        for n, part in enumerate(parts)
    )
    return t.assign(target, whole, kind)


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def _comparison(i: Instruction, floating: bool) -> str:
    operator = i.modifiers[0]
    if operator == "num":
        return "(a == a && b == b)"
    if operator == "nan":
        return "(a != a || b != b)"
    if operator.endswith("u") and operator[:2] in _COMPARISONS:  # unordered: true with NaN
        return f"(a {_COMPARISONS[operator[:2]]} b || a != a || b != b)"
    if operator == "ne" and floating:
        return "(a < b || a > b)"
    if operator not in _COMPARISONS:
        raise i.unsupported("comparison")
    return f"(a {_COMPARISONS[operator]} b)"


def compare(t: Translator, i: Instruction) -> str:
    """setp and set, combined with a third predicate or not."""
    combine = next((m for m in i.modifiers[1:] if m in ("and", "or", "xor")), None)
    i.allow(f"{i.modifiers[0]} {combine} ftz")
    if i.type in _PAIRED:
        raise i.unsupported("comparison of pairs")
    operands = [_read(t, operand, i.type) for operand in i.operands[1:3]]
    if "ftz" in i and i.type == "f32":
        operands = [f"flush({o})" for o in operands]
    comparison = _comparison(i, i.type in _FLOATS)
    held = _substitute(comparison, dict(zip("ab", operands, strict=True)))
    result, opposite = "held", "!held"
    if combine:
        operator = {"and": "&&", "or": "||", "xor": "!="}[combine]
        third = t.value(i.operands[3], "pred")
        result, opposite = f"held {operator} {third}", f"!held {operator} {third}"
    if i.base == "set":
        yes = "1.f" if i.types[0] == "f32" else "~0u"
        stores = t.assign(i.operands[0], f"({result}) ? {yes} : 0", i.types[0])
    else:
        first, _, second = i.operands[0].partition("|")
        if not second:
            return t.assign(first, result.replace("held", held), "pred")
        stores = f"const bool then = {result}, other = {opposite}; "
        stores += t.assign(first, "then", "pred") + t.assign(second, "other", "pred")
    return f"{{ const bool held = {held}; {stores} }}"


def convert(t: Translator, i: Instruction) -> str:
    """cvt between integers, floats and packed small floats."""
    kinds = [m for m in i.modifiers if m in TYPE_BYTES or m in ("e4m3x2", "e5m2x2")]
    if len(kinds) != 2:
        raise i.unsupported("types")
    to, source = kinds
    rounding = next(
        (m for m in i.modifiers if m in ("rn", "rz", "rm", "rp", "rna", *_TO_INTEGRAL)), None
    )
    i.allow(f"{to} {source} {rounding} ftz sat satfinite relu")
    if to.endswith("x2") or source.endswith("x2"):
        return _convert_packed(t, i, to, source, rounding)
    if rounding in ("rm", "rp"):
        raise i.unsupported("rounding")
    x = _read(t, i.operands[1], source)
    from_float, to_float = source in _FLOATS, to in (*_FLOATS, "tf32")
    if "ftz" in i and source == "f32":
        x = f"flush({x})"
    if rounding in _TO_INTEGRAL and from_float:
        x = f"{_TO_INTEGRAL[rounding]}({x})"
    if from_float and not to_float:
        x = f"to_integer<{value_type(to)}>({x})"
    elif not from_float and not to_float and "sat" in i:
        x = f"clamp_integer<{value_type(to)}>({x})"
    elif to_float:
        x = _to_float(i, x, to, source, rounding)
    return t.assign(i.operands[0], x, to)


def _to_float(i: Instruction, x: str, to: str, source: str, rounding: str | None) -> str:
    if "relu" in i:
        x = f"maximum<float>({x}, 0)"
    if "sat" in i:
        x = f"saturate({x})"
    if rounding == "rz" and to in ("f16", "bf16"):
        return f"{value_type(to)}::truncated({x})"
    if rounding == "rz" and TYPE_BYTES[to] < TYPE_BYTES[source]:
        raise i.unsupported("rounding")
    if "ftz" in i and to == "f32":
        x = f"flush({x})"
    return f"({'double' if to == 'f64' else 'float'})({x})"


def _convert_packed(
    t: Translator, i: Instruction, to: str, source: str, rounding: str | None
) -> str:
    """Two f32, or a packed pair, to a packed pair; the first operand becomes the upper half."""
    formats = {"f16x2": "F16", "bf16x2": "BF16", "e4m3x2": "E4M3", "e5m2x2": "E5M2"}
    if to not in formats or (source != "f32" and source not in formats):
        raise i.unsupported("types")
    if source == "f32":
        halves = [t.value(operand, "f32") for operand in i.operands[1:]]
    else:
        step = 8 if source[0] == "e" else 16
        raw = t.raw(i.operands[1], "b32")
        halves = [f"as<{formats[source]}>({raw} >> {step})", f"as<{formats[source]}>({raw})"]
    if "relu" in i:
        halves = [f"maximum<float>({h}, 0)" for h in halves]
    small = formats[to]
    if rounding == "rz":
        packed = [f"{small}::truncated({h}).raw" for h in halves]
    else:
        packed = [f"bits<{small}>((float){h})" for h in halves]
    width = 8 if to[0] == "e" else 16
    return t.assign(i.operands[0], f"(u32){packed[0]} << {width} | {packed[1]}", f"b{2 * width}")


HANDLERS = dict.fromkeys(_REGULAR, regular) | {
    "min": minimum_maximum,
    "max": minimum_maximum,
    "mov": move,
    "setp": compare,
    "set": compare,
    "cvt": convert,
}
