"""PTX text → entry points, parameters, variables and statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UnsupportedPtx

TYPE_BYTES = {
    **{"pred": 1, "b8": 1, "u8": 1, "s8": 1},
    **{"b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2},
    **{"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4},
    **{"b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8, "b128": 16},
}


@dataclass(frozen=True)
class Variable:
    """A parameter or a variable in memory; `size` is None for `extern .shared name[]`."""

    name: str
    type: str
    align: int
    size: int | None
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statement:
    """One of: block "{", block "}", label "name:", directive ".reg ..." or an instruction."""

    text: str
    line: int

    @property
    def is_label(self) -> bool:
        return self.text.endswith(":")


@dataclass
class Entry:
    """One kernel of a PTX module."""

    name: str
    params: list[Variable]
    directives: dict[str, list[int]]
    statements: list[Statement]
    shared: list[Variable]
    constants: list[Variable] = field(default_factory=list)


def parse(ptx: str, name: str | None = None) -> Entry:
    """The entry point called `name`, or the only one."""
    text = _without_comments(ptx.replace("\0", ""))
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*(\([^)]*\))?([^{]*)\{", text))
    found = [m for m in entries if name in (None, m.group(1))]
    names = ", ".join(m.group(1) for m in entries) or "none"
    if len(found) != 1:
        raise ValueError(f"load: entry={name!r} does not name one entry point; the PTX has {names}")
    header = found[0]
    body_end = _closing_brace(text, header.end() - 1)
    statements = _statements(text, header.end(), body_end)
    module = text[: entries[0].start()]
    return Entry(
        name=header.group(1),
        params=[_variable(p, ".param") for p in _split(header.group(2) or "()")],
        directives={
            d: [int(n, 0) for n in re.findall(r"\w+", values)]
            for d, values in re.findall(r"\.(\w+)((?:\s+\d+\s*,?)*)", header.group(3))
        },
        statements=statements,
        shared=_module_variables(module, ".shared")
        + [_variable(s.text, ".shared") for s in statements if s.text.startswith(".shared")],
        constants=_module_variables(module, ".global") + _module_variables(module, ".const"),
    )


def _without_comments(text: str) -> str:
    """Blanks comments and debug lines, keeping line numbers."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"(?m)^[ \t]*\.(loc|file)\b[^\n]*$", "", text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("load: the PTX ends inside a function")


def _statements(text: str, begin: int, end: int) -> list[Statement]:
    token = re.compile(r"\s*(?:([{}])|([\w$%]+)\s*:(?!:)|((?:[^{};]|\{[^}]*\})+);)")
    result, position, line = [], begin, 1 + text.count("\n", 0, begin)
    end = begin + len(text[begin:end].rstrip())
    while position < end:
        match = token.match(text, position, end)
        if match is None:
            raise UnsupportedPtx(
                f"cannot read the PTX at line {line}: {text[position : position + 80]!r}"
            )
        start = match.start(match.lastindex)
        line += text.count("\n", position, start)
        brace, label, statement = match.groups()
        result.append(
            Statement(brace or (label and label + ":") or " ".join(statement.split()), line)
        )
        line += text.count("\n", start, match.end())
        position = match.end()
    return result


def _module_variables(module: str, space: str) -> list[Variable]:
    declaration = re.compile(re.escape(space) + r"\s+[^;{=]*(?:=\s*(?:\{[^}]*\}|[^;]*))?;")
    return [_variable(m.group()[:-1], space) for m in declaration.finditer(module)]


def _variable(declaration: str, space: str) -> Variable:
    """`.space .align 16 .b8 name[4][2] = {...}`; parameters also `.u64 .ptr .align 1 name`."""
    left, _, right = declaration.partition("=")
    name = re.search(r"([\w$%]+)\s*((?:\[\d*\])*)\s*$", left)
    words = left[: name.start()].split()
    kind = next(w[1:] for w in words if w[1:] in TYPE_BYTES)
    align = TYPE_BYTES[kind]
    if ".align" in words and ".ptr" not in words:
        align = max(align, int(words[words.index(".align") + 1]))
    size: int | None = TYPE_BYTES[kind]
    for extent in re.findall(r"\[(\d*)\]", name.group(2)):
        size = size * int(extent) if extent and size is not None else None
    values = tuple(_split(right.strip())) if right else ()
    if size is None and space != ".shared":
        raise UnsupportedPtx(f"array without a size: {declaration}")
    return Variable(name.group(1), kind, align, size, values)


def _split(text: str) -> list[str]:
    """The parts of `(a, b)`, `{a, b}` or `a`."""
    if text[:1] in "({":
        text = text[1:-1]
    return [part.strip() for part in text.split(",") if part.strip()]
