"""What the hot loop of a kernel issues, counted in nvdisasm's text of its machine code.

A warp scheduler issues one instruction of a warp at a time: beside the tensor cores' work, the
instructions of one turn of the loop are what a tile costs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)(.*?) ;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_ENDS = ("EXIT", "BRA", "BRX", "JMP", "RET")  # without a guard, nothing follows them


@dataclass(frozen=True)
class Loop:
    """One turn, past the slow sides of waits."""

    opcodes: Counter[str]  # without their suffixes
    flops: int  # of the warpgroup's products

    @property
    def slots(self) -> int:
        """Instructions that a warp issues."""
        return self.opcodes.total()


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    flops: int
    target: str | None
    ends: bool


def hot_loop(disassembly: str) -> Loop:
    """The innermost loop with most products to a slot; `nvdisasm -c` gave the text."""
    code, places = _read(disassembly)
    ranges = [
        (places[x.target], end)
        for end, x in enumerate(code)
        if x.target and places[x.target] <= end
    ]
    with_products = [(a, b) for a, b in ranges if any(x.flops for x in code[a : b + 1])]
    innermost = [
        (a, b)
        for a, b in with_products
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in with_products)
    ]
    paths = [_path(code, places, begin, end) for begin, end in innermost]
    loops = [
        Loop(Counter(x.opcode.split(".")[0] for x in path), sum(x.flops for x in path))
        for path in paths
        if path
    ]
    return max(loops, key=lambda loop: loop.flops / loop.slots)


def _read(disassembly: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and the index of the one that follows each label."""
    code: list[_Instruction] = []
    places: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            guard, opcode, operands = match.groups()
            branches = opcode.startswith("BRA")
            target = _TARGET.search(operands) if branches else None
            # `BRA P1, target` has its guard, or a second one, among the operands.
            always = guard is None and not re.match(r"\s*!?U?P\w", operands)
            product = _PRODUCT.match(opcode)
            rows, columns, depth = map(int, product.groups()) if product else (0, 0, 0)
            code.append(
                _Instruction(
                    opcode,
                    flops=2 * rows * columns * depth,
                    target=target[0] if target else None,
                    ends=always and opcode.split(".")[0] in _ENDS,
                )
            )
    return code, places


def _path(
    code: list[_Instruction], places: dict[str, int], begin: int, end: int
) -> list[_Instruction]:
    """From the loop's head to its branch back: most products, then fewest instructions."""
    best: dict[int, tuple[int, int, int]] = {end: (code[end].flops, -1, end)}  # last: what follows
    for index in range(end - 1, begin - 1, -1):
        instruction = code[index]
        follows = [] if instruction.ends else [index + 1]
        if instruction.target:
            follows.append(places[instruction.target])
        reached = [best[i][:2] + (i,) for i in follows if i > index and i in best]
        if reached:
            flops, slots, after = max(reached)
            best[index] = (flops + instruction.flops, slots - 1, after)
    if begin not in best:
        return []  # its turn leaves the range: no loop of a kernel's tiles does
    path, index = [], begin
    while index != end:
        path.append(code[index])
        index = best[index][2]
    return [*path, code[end]]
