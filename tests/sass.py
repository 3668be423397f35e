"""Reads SASS: the instructions of a kernel in order, and what each of them waits for.

An instruction is two 64-bit words (nvdisasm -hex shows them, from sm_70 on). Bits 41.. of the second hold the schedule
that ptxas made: the number of the scoreboard that a load sets when it is done (7: none), and the mask of the
scoreboards that an instruction waits for before it is issued.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,]+),")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_FIRST = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
_SECOND = re.compile(r"\s*/\*\s*0x([0-9a-f]{16})\s*\*/")


@dataclass
class Instruction:
    """``sets``: the scoreboard that it releases with its result, or None; ``waits``: those that it waits for."""

    address: int
    text: str
    sets: int | None = None
    waits: tuple[int, ...] = ()
    target: int | None = None  # of a branch

    @property
    def is_strong_load(self) -> bool:
        return "LDG" in self.text and ".STRONG" in self.text

    @property
    def is_plain_load(self) -> bool:
        """From global memory into registers; LDGSTS goes to shared memory and has no scoreboard for its data."""
        return re.search(r"\b(LDG|LD)\.", self.text) is not None and ".STRONG" not in self.text


def read(cubin: Path, nvdisasm: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel."""
    text = subprocess.run([nvdisasm, "-c", "-hex", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels, labels, current, pending = {}, {}, None, None
    for line in text.splitlines():
        if found := _SECTION.match(line):
            current = kernels.setdefault(found.group(1), [])
        elif found := _LABEL.match(line):
            labels[found.group(1)] = len(current) * 16
        elif found := _FIRST.match(line):
            pending = Instruction(int(found.group(1), 16), found.group(2))
        elif pending is not None and (found := _SECOND.match(line)):
            schedule = int(found.group(1), 16) >> 41
            sets, mask = schedule >> 5 & 7, schedule >> 11 & 63
            pending.sets = None if sets == 7 else sets
            pending.waits = tuple(k for k in range(6) if mask >> k & 1)
            current.append(pending)
            pending = None
    for instructions in kernels.values():
        for one in instructions:
            if found := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", one.text):
                one.target = labels[found.group(1)]
    return {name: instructions for name, instructions in kernels.items() if instructions}


def before_the_product(kernel: list[Instruction]) -> list[Instruction]:
    """From the top of the loop over steps to its first matrix instruction, in the order of the code. That loop is the
    innermost one that holds the end of a group of copies and a product."""
    product = next(one.address for one in kernel if "HMMA" in one.text)
    group = max(one.address for one in kernel if "LDGDEPBAR" in one.text and one.address < product)
    tops = [one.target for one in kernel if one.target is not None and one.target <= group and one.address > product]
    return [one for one in kernel if max(tops) <= one.address < product]


def waits_for_plain_loads(code: list[Instruction]) -> list[str]:
    """The instructions that wait for a scoreboard which a plain load from global memory in ``code`` sets."""
    pending, found = {}, []
    for one in code:
        for board in one.waits:
            if board in pending:
                found.append(f"{one.address:05x} {one.text} waits for {pending[board]}")
        for board in one.waits:
            pending.pop(board, None)
        if one.is_plain_load and one.sets is not None:
            pending[one.sets] = f"{one.address:05x} {one.text}"
    return found


def flights(code: list[Instruction]) -> list[int]:
    """How many strong loads are issued one after another before anything waits for one of them."""
    sizes, boards = [], set()
    for one in code:
        if boards & set(one.waits):
            boards = set()
        if one.is_strong_load:
            if not boards:
                sizes.append(0)
            sizes[-1] += 1
            boards.add(one.sets)
    return sizes
