"""The registers that each role of a warp-specialised kernel uses, against what it may hold.

`setmaxnreg` says how many registers a warp has from there on. Nothing stops a warp from using more:
on a GPU they belong to others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# `nvdisasm -c -plr`: an address, the instruction, a column for each register that is alive.
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*(\S+)(.*?) ;\s*// \|(.*)")
_LABEL = re.compile(r"(\S+):\s+// [|+]")
_NAMED = re.compile(r"`\(([^)]+)\)")
_TARGETS = re.compile(r"\.L_x_\d+")
_HEADER = re.compile(r"// \|   #((?: \d+)+)")
_ENDS = ("EXIT", "BRA", "BRX", "JMP", "JMX", "RET", "KILL")  # nothing follows them


@dataclass(frozen=True)
class Role:
    """What can be reached from one setmaxnreg without meeting another."""

    limit: int  # registers that the warp holds
    used: int  # the highest that is alive there, and one
    where: str  # the instruction that needs the highest


@dataclass(frozen=True)
class _Instruction:
    text: str
    opcode: str
    ends: bool
    labels: tuple[str, ...]
    used: int


def roles(disassembly: str) -> list[Role]:
    """One for each setmaxnreg of a kernel, of the text that `nvdisasm -c -plr` gives."""
    code, places = _read(disassembly)
    found = []
    for start, instruction in enumerate(code):
        if instruction.opcode.startswith("USETMAXREG"):
            reached = _reachable(code, places, start)
            highest = max((code[i] for i in reached), key=lambda x: x.used)
            limit = int(re.search(r"\b0x[0-9a-f]+", instruction.text)[0], 16)
            found.append(Role(limit, highest.used, highest.text))
    return found


def _read(disassembly: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and the index of the one that follows each label."""
    code: list[_Instruction] = []
    places: dict[str, int] = {}
    columns: list[slice] = []  # where the mark of each register stands
    for line in disassembly.splitlines():
        if header := _HEADER.search(line):
            columns = [slice(*m.span()) for m in re.finditer(r"\d+", header[1])]
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands, marks = match.groups()
            alive = marks[4:]
            used = max((n for n, at in enumerate(columns, 1) if alive[at].strip()), default=0)
            named = _NAMED.findall(operands) + _TARGETS.findall(operands)
            base = opcode.split(".")[0]
            ends = guard is None and base in _ENDS
            labels = () if base == "RET" else tuple(named)  # it returns behind the call
            code.append(_Instruction(f"{address}: {opcode}{operands}", opcode, ends, labels, used))
        elif label := _LABEL.match(line):
            places[label[1]] = len(code)
    return code, places


def _reachable(code: list[_Instruction], places: dict[str, int], start: int) -> set[int]:
    reached: set[int] = set()
    waiting = [start + 1]
    while waiting:
        index = waiting.pop()
        if index in reached or code[index].opcode.startswith("USETMAXREG"):
            continue
        reached.add(index)
        waiting += [places[label] for label in code[index].labels]
        if not code[index].ends:
            waiting.append(index + 1)
    return reached
