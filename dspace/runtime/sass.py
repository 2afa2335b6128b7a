"""Find one miscompilation in NVIDIA machine code: matrix operands addressed through registers that were never set.

A Hopper matrix instruction takes its shared-memory operand through a 64-bit descriptor: the address in the low half,
stride and swizzle, a constant, in the high one. The descriptor of each further slice is the zero-extended address plus
a constant. The assembler shipped with Triton 3.6 (ptxas 12.8) sometimes forgets the zero: it adds the constant's high
half to a register that nothing has written, to the low half, or to the stack pointer. The kernel then reads other
shared memory, or faults, and whether it does changes with tile sizes, warps and argument alignment, so that a check of
results at one shape says little about another. The disassembly shows it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_LINE = re.compile(r"\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)\s+(.*?);")
_HIGH_HALF = re.compile(r"U?R\d+, (U?R\w+), (?:0x40000040|-0x7fffffe0|-0x3ffffff0), ")
"""The sum of a register and the constant half of a descriptor: swizzles over 128, 64 and 32 bytes."""


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout


def faults(text: str) -> tuple[str, ...]:
    """Instructions of a disassembled kernel that add half a descriptor to a register that does not hold zero."""
    zero: set[str] = {"RZ", "URZ"}
    found: list[str] = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        opcode, operands = match[1], match[2].strip()
        high = _HIGH_HALF.match(operands) if opcode in ("IADD3.X", "UIADD3.X") else None
        if high is not None and high[1] not in zero:
            found.append(" ".join(line.split()))
        target = re.match(r"(U?R)(\d+)", operands)
        if target is None:
            continue
        count = 4 if ".128" in opcode else 2 if re.search(r"64|WIDE|CS2R", opcode) else 1
        written = {f"{target[1]}{int(target[2]) + i}" for i in range(count)}
        cleared = "@" not in line and set(operands.split(", ")[1:]) <= {"RZ", "URZ", "SRZ"} and "," in operands
        zero = zero | written if cleared else zero - written
    return tuple(found)
