"""A PTX kernel → one C++ function: each instruction a statement, each register a variable of bits.

This file knows about names, operands and control flow; what each instruction means is in
`arithmetic.py` and `instructions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import UnsupportedPtx
from .parse import TYPE_BYTES, Entry, Statement, Variable

# PTX type → C++ type that holds its value, where that is not the name of an integer type.
_VALUE_TYPES = {
    "pred": "bool",
    "f32": "float",
    "f64": "double",
    "f16": "F16",
    "bf16": "BF16",
    "tf32": "TF32",
}
_PLACES = {"tid": "tid", "ntid": "ntid", "ctaid": "ctaid", "nctaid": "nctaid", "clusterid": "ctaid"}
_PLACES |= {"nclusterid": "nctaid"}
_SPECIAL_REGISTERS = {
    "%laneid": "(me.linear % 32)",
    "%warpid": "(me.linear / 32)",
    "%nwarpid": "(me.ntid.x * me.ntid.y * me.ntid.z / 32)",
    "%smid": "me.ctaid.x",
    "%nsmid": "132u",
    "%gridid": "0u",
    "%clock": "(u32)clock_cycles()",
    "%clock64": "clock_cycles()",
    "%globaltimer": "clock_cycles()",
    "%dynamic_smem_size": "me.dynamic_shared",
    "%total_smem_size": "me.total_shared",
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%is_explicit_cluster": "0u",
    "%lanemask_eq": "(1u << me.linear % 32)",
    "%lanemask_lt": "((1u << me.linear % 32) - 1)",
    "%lanemask_le": "((2u << me.linear % 32) - 1)",
    "%lanemask_gt": "~((2u << me.linear % 32) - 1)",
    "%lanemask_ge": "~((1u << me.linear % 32) - 1)",
    "WARP_SZ": "32u",
}
_SHARED_BASE = 1024
_SPACES = ("shared", "global", "local", "param", "const")
_CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")


def value_type(ptx_type: str) -> str:
    """The C++ type of a value of a PTX type."""
    if ptx_type in _VALUE_TYPES:
        return _VALUE_TYPES[ptx_type]
    return ("i" if ptx_type[0] == "s" else "u") + str(8 * TYPE_BYTES[ptx_type])


def bits_type(ptx_type: str) -> str:
    """The untyped PTX type of the same size."""
    return ptx_type if ptx_type == "pred" else f"b{8 * TYPE_BYTES[ptx_type]}"


def elements(operand: str) -> list[str]:
    """`{a, b}` → [a, b]; `a` → [a]."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def split_operands(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    return [*parts, text[begin:].strip()] if text.strip() else []


@dataclass(frozen=True)
class Instruction:
    """`@p base.mod.mod operand, operand`; the type is the last modifier that is one."""

    text: str
    base: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Instruction:
        opcode, _, rest = text.partition(" ")
        base, *modifiers = opcode.split(".")
        return cls(text, base, tuple(modifiers), tuple(split_operands(rest)))

    def __contains__(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @property
    def types(self) -> list[str]:
        return [m for m in self.modifiers if m in TYPE_BYTES]

    @property
    def type(self) -> str:
        if not self.types:
            raise self.unsupported("no operand type")
        return self.types[-1]

    @property
    def space(self) -> str:
        spaces = (m.partition("::")[0] for m in self.modifiers)
        return next((s for s in spaces if s in _SPACES), "generic")

    def allow(self, modifiers: str) -> None:
        """Refuses modifiers other than these, types, state spaces and cache hints."""
        for m in self.modifiers:
            prefix = m.partition("::")[0]
            known = (*modifiers.split(), *TYPE_BYTES, *_SPACES, *_CACHE_HINTS)
            if m not in known and prefix not in (*_SPACES, "L1", "L2"):
                raise self.unsupported(f"modifier .{m}")

    def unsupported(self, what: str) -> UnsupportedPtx:
        return UnsupportedPtx(f"{self.base}: {what}")


@dataclass
class Layout:
    """Where a kernel's variables lie."""

    param_offsets: dict[str, int] = field(default_factory=dict)
    param_bytes: int = 0
    shared_offsets: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    constant_offsets: dict[str, int] = field(default_factory=dict)
    constants: bytearray = field(default_factory=bytearray)


def layout(entry: Entry) -> Layout:
    """As on the GPU: dynamic shared memory follows the static one at its declared alignment."""
    result = Layout()
    for p in entry.params:
        result.param_offsets[p.name] = _place(p, result.param_bytes)
        result.param_bytes = result.param_offsets[p.name] + p.size
    for v in (v for v in entry.shared if v.size is not None):
        result.shared_offsets[v.name] = _place(v, result.static_shared)
        result.static_shared = result.shared_offsets[v.name] + v.size
    dynamic = [v for v in entry.shared if v.size is None]
    if dynamic and result.static_shared:
        align = max(16, *(v.align for v in dynamic))
        result.static_shared = -(-result.static_shared // align) * align
    result.shared_offsets |= {v.name: result.static_shared for v in dynamic}
    for v in entry.constants:
        offset = _place(v, len(result.constants))
        result.constant_offsets[v.name] = offset
        result.constants.extend(bytes(offset + v.size - len(result.constants)))
        width = TYPE_BYTES[v.type]
        for i, value in enumerate(v.values):
            bits = (
                int(value[2:], 16)
                if value[:2] in ("0f", "0d", "0F", "0D")
                else int(value.rstrip("U"), 0)
            )
            at = offset + i * width
            result.constants[at : at + width] = (bits % (1 << 8 * width)).to_bytes(width, "little")
    return result


def _place(variable: Variable, used: int) -> int:
    return -(-used // variable.align) * variable.align


Handler = Callable[["Translator", Instruction], str]  # → C++ statement
Handlers = dict[str, Handler]  # by opcode, or by a prefix of it up to a dot


class Translator:
    """The C++ of one entry point. Handlers of instructions call value, assign and address."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.layout = layout(entry)
        self._scopes: list[dict[str, tuple[str, str]]] = [{}]  # register → C++ name, type
        self._ranges: dict[str, str] = {}  # "%r" of `.reg .b32 %r<9>` → type
        self._declared: dict[str, str] = {}  # C++ name → PTX type
        self._frame: dict[str, int] = {}  # local arrays → offset
        self._frame_bytes = 0
        self._slots: dict[
            str, int
        ] = {}  # C++ name of a register of wgmma → index in `wgmma_registers`
        self._tuples: dict[tuple[int, ...], str] = {}
        self._branch_targets: dict[str, list[str]] = {}
        self._seen_labels: set[str] = set()
        self._last_label = ""
        self._labels = _label_names(entry.statements)
        self._label_scopes = [0]
        self._scope_count = 0
        self._arithmetic: Handlers = {}
        self._others: Handlers = {}

    def run(self, arithmetic: Handlers, others: Handlers) -> str:
        """The C++ source. Only the other instructions can fail, so only they note their line."""
        self._arithmetic, self._others = arithmetic, others
        body = []
        for statement in self.entry.statements:
            try:
                body.append(self._statement(statement))
            except UnsupportedPtx as error:
                where = f"kernel {self.entry.name}, PTX line {statement.line}"
                raise UnsupportedPtx(f"{where}: {error} in `{statement.text};`") from None
        return self._source("\n".join(line for line in body if line))

    # Operands.

    def register(self, name: str) -> tuple[str, str] | None:
        """C++ name and PTX type of a register."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        match = re.fullmatch(r"(%?[A-Za-z_$]+)(\d+)", name)
        if match and match.group(1) in self._ranges:
            self._scopes[0][name] = self._declare(name, self._ranges[match.group(1)], "")
            return self._scopes[0][name]
        return None

    def raw(self, operand: str, ptx_type: str) -> str:
        """C++ expression of the operand's bits."""
        if register := self.register(operand):
            return register[0]
        if operand in _SPECIAL_REGISTERS:
            return _SPECIAL_REGISTERS[operand]
        if match := re.fullmatch(r"%(\w+)\.([xyz])", operand):
            if match.group(1) in ("cluster_ctaid", "cluster_nctaid"):
                return "1u" if match.group(1)[8] == "n" else "0u"
            if match.group(1) in _PLACES:
                return f"me.{_PLACES[match.group(1)]}.{match.group(2)}"
        if (symbol := self._symbol(operand)) is not None:
            return symbol
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", operand):
            return f"0x{operand[2:]}{'u' if operand[1] in 'fF' else 'ull'}"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return f"{operand.rstrip('U')}{'ll' if operand[0] == '-' else 'ull'}"
        if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", operand):
            return f"bits(({value_type(ptx_type)}){operand})"
        if match := re.fullmatch(r"([\w$%]+)\s*([+-]\s*\w+)", operand):
            return f"({self.raw(match.group(1), ptx_type)} {match.group(2)})"
        raise UnsupportedPtx(f"operand {operand}")

    def value(self, operand: str, ptx_type: str) -> str:
        """C++ expression of the operand as a value of a PTX type."""
        if ptx_type == "pred":
            negated = operand.startswith("!")
            return f"{'!' * negated}({self.raw(operand.lstrip('!'), ptx_type)} != 0)"
        if operand.startswith("-") and self.register(operand[1:]):
            return f"-{self.value(operand[1:], ptx_type)}"
        raw, cpp = self.raw(operand, ptx_type), value_type(ptx_type)
        register = self.register(operand)
        source = register and value_type(bits_type(register[1]))
        integer = cpp if cpp[0] in "ui" else value_type(bits_type(ptx_type))
        raw = raw if source == integer else f"({integer})({raw})"
        return raw if cpp == integer else f"__builtin_bit_cast({cpp}, {raw})"

    def assign(self, operand: str, expression: str, ptx_type: str) -> str:
        """C++ statement that writes a value of a PTX type to a register."""
        if operand == "_":
            return f"(void)({expression});"
        register = self.register(operand)
        if register is None:
            raise UnsupportedPtx(f"destination {operand}")
        name, register_type = register
        if "pred" in (ptx_type, register_type):
            return f"{name} = {expression};"
        cpp = value_type(ptx_type)
        if cpp[0] not in "ui":
            integer = value_type(bits_type(ptx_type))
            return f"{name} = __builtin_bit_cast({integer}, ({cpp})({expression}));"
        return f"{name} = ({cpp})({expression});"  # signed: extends the sign into a wider register

    def address(self, operand: str, space: str) -> str:
        """C++ expression of the address `[register + offset]` or `[symbol]`."""
        match = re.fullmatch(r"\[\s*([\w$%]+)\s*([+-]\s*-?\w+)?\s*\]", operand)
        if match is None:
            raise UnsupportedPtx(f"address {operand}")
        base = self.raw(match.group(1), "b64")
        width = "u32" if space == "shared" else "u64"
        return (
            f"{width}({width}({base}) {match.group(2)})" if match.group(2) else f"{width}({base})"
        )

    def register_tuple(self, registers: list[str]) -> str:
        """C++ name of the table of a wgmma operand's registers, which then live in one array."""
        indices = []
        for operand in registers:
            register = self.register(operand)
            if register is None:
                raise UnsupportedPtx(f"wgmma operand {operand}")
            indices.append(self._slots.setdefault(register[0], len(self._slots)))
        return self._tuples.setdefault(tuple(indices), f"tuple{len(self._tuples)}")

    def branch(self, label: str) -> str:
        """Backward branches burn fuel, so that an endless loop lets others run and is found."""
        name = self._label(label)
        if name not in self._seen_labels:
            return f"goto {name};"
        return f"{{ if (--fuel == 0) fuel = endless_loop_check(); goto {name}; }}"

    def branch_targets(self, name: str) -> list[str]:
        return self._branch_targets[self._label(name)]

    # Statements.

    def _statement(self, statement: Statement) -> str:
        text = statement.text
        if text in "{}":
            return self._block(text)
        if statement.is_label:
            name = self._label(text[:-1])
            self._seen_labels.add(name)
            self._last_label = name
            return f"{name}:;"
        if text.startswith("."):
            return self._directive(text)
        guard = re.match(r"@(!?)\s*([\w$%]+)\s+", text)
        instruction = Instruction.read(text[guard.end() :] if guard else text)
        if handler := _longest_prefix(self._arithmetic, instruction):
            code = handler(self, instruction)
        elif handler := _longest_prefix(self._others, instruction):
            code = f"at = {statement.line}; {handler(self, instruction)}"
        else:
            raise UnsupportedPtx("unknown instruction")
        if guard:
            return f"if ({self.value(guard.group(1) + guard.group(2), 'pred')}) {{ {code} }}"
        return code

    def _block(self, brace: str) -> str:
        if brace == "{":
            self._scope_count += 1
            self._scopes.append({})
            self._label_scopes.append(self._scope_count)
        else:
            self._scopes.pop()
            self._label_scopes.pop()
        return ""

    def _directive(self, text: str) -> str:
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            for name in split_operands(names):
                if match := re.fullmatch(r"([\w$%]+)<\d+>", name):
                    self._ranges[match.group(1)] = kind
                else:
                    self._scopes[-1][name] = self._declare(name, kind, f"s{len(self._declared)}_")
        elif text.startswith(".local"):
            match = re.fullmatch(
                r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?", text
            )
            align, kind, name, count = match.groups()
            width = TYPE_BYTES[kind]
            offset = _place(Variable(name, kind, int(align or width), None), self._frame_bytes)
            self._frame[name] = offset
            self._frame_bytes = offset + width * int(count or 1)
        elif text.startswith(".branchtargets"):
            self._branch_targets[self._last_label] = split_operands(
                text.removeprefix(".branchtargets")
            )
        return ""

    def _declare(self, name: str, kind: str, prefix: str) -> tuple[str, str]:
        cpp = prefix + re.sub(r"\W", "_", name.lstrip("%"))
        self._declared[cpp] = kind
        return cpp, kind

    def _label(self, name: str) -> str:
        for scope in reversed(self._label_scopes):
            if (scope, name) in self._labels:
                return self._labels[scope, name]
        raise UnsupportedPtx(f"label {name}")

    def _symbol(self, name: str) -> str | None:
        where = self.layout
        if name in where.param_offsets:
            return f"(u64)(param + {where.param_offsets[name]})"
        if name in where.shared_offsets:
            return f"{_SHARED_BASE + where.shared_offsets[name]}u"
        if name in where.constant_offsets:
            return f"(u64)(module_memory + {where.constant_offsets[name]})"
        if name in self._frame:
            return f"(u64)(frame + {self._frame[name]})"
        return None

    def _source(self, body: str) -> str:
        constants = self.layout.constants
        declared = []
        for name, kind in self._declared.items():
            slot = self._slots.get(name)
            if slot is None:
                declared.append(
                    f"{'bool' if kind == 'pred' else value_type(bits_type(kind))} {name};"
                )
            else:
                declared.append(f"u32& {name} = wgmma_registers[{slot}];")
        tables = [
            f"static const u16 {t}[] = {{{', '.join(map(str, s))}}};"
            for s, t in self._tuples.items()
        ]
        return "\n".join(
            [
                '#include "kernel_api.h"',
                "using namespace emu;",
                f'extern "C" {{ alignas(128) u8 module_memory[{len(constants) + 1}] = '
                f"{{{', '.join(map(str, constants))}}}; }}",
                *tables,
                'extern "C" void kernel_entry(const u8* param) {',
                "const Place& me = place();",
                "u32& at = current_line();",
                "u32 fuel = kLoopFuel;",
                f"alignas(128) u8 frame[{max(self._frame_bytes, 1)}];",
                f"u32 wgmma_registers[{max(len(self._slots), 1)}];",
                *declared,
                body,
                "}\n",
            ]
        )


def _label_names(statements: list[Statement]) -> dict[tuple[int, str], str]:
    """(block, label) → C++ label; labels are local to their block, blocks are numbered in order."""
    names, stack, count = {}, [0], 0
    for statement in statements:
        if statement.text == "{":
            count += 1
            stack.append(count)
        elif statement.text == "}":
            stack.pop()
        elif statement.is_label:
            name = statement.text[:-1]
            names[stack[-1], name] = f"block{stack[-1]}_" + re.sub(r"\W", "_", name)
    return names


def _longest_prefix(handlers: Handlers, instruction: Instruction) -> Handler | None:
    """The handler of the longest prefix of the opcode that has one."""
    parts = [instruction.base, *instruction.modifiers]
    keys = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((handlers[key] for key in keys if key in handlers), None)
