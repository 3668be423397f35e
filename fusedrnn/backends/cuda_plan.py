"""Which CUDA algorithm runs, on what grid, and why: pure functions of frozen data, testable without a GPU."""

from dataclasses import dataclass, replace

from fusedrnn.backends.common import MANY_ROWS
from fusedrnn.cells import CELLS

FORWARD_UNITS, BACKWARD_UNITS, BACKWARD_ROWS = 8, 16, 32
WIDE_UNITS = 16  # of a persistent forward block that holds twice the weights
MOST_ROWS = {(False, FORWARD_UNITS): 64, (False, WIDE_UNITS): 32, (True, BACKWARD_UNITS): BACKWARD_ROWS}
WARPS = 8
# Chunks of 64 bytes of every weight row that fit in a warp's registers beside the rest, by (backward, arithmetic);
# backward, no kernel was made for more than 4 a gate, or 8.
MOST_CHUNKS = {
    (False, "16-bit"): 4,
    (False, "tf32"): 8,
    (False, "float32"): 8,
    (True, "16-bit"): 16,
    (True, "tf32"): 16,
    (True, "float32"): 12,
}
MOST_CHUNKS_WIDE = {"16-bit": 4, "tf32": 4, "float32": 0}
# Persistent fills a mailbox and multiplies x by W_ih before its own launch.
FEW_STEPS = 2
# What a step takes beside its rows, in the time of a row: by the simulator's clock 1.42, 1.87 and 2.98 us for 8, 16 and
# 32 rows a block (LSTM, bfloat16, H = 1024), and more where H is smaller.
LATENCY_ROWS = 11
# Slices that a group of blocks takes one after another before step is the better plan.
MOST_ROUNDS = 4
# Shared memory of the backward kernel: two buffers of partial sums, then the staged packets of an accumulator.
BACKWARD_SUMS, STAGED_ELEMENTS = 2 * WARPS * BACKWARD_ROWS * (BACKWARD_UNITS + 4) * 4, WARPS * 4 * BACKWARD_UNITS
OFFSETS = WARPS * 16  # bytes of a step's offsets, copied ahead by every warp
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Chip:
    """What planning knows of a GPU."""

    name: str
    multiprocessors: int
    shared_per_block: int
    cooperative: bool = True


# Multiprocessors, and the shared memory that a block may ask for; tests/ptxsim/src/chips.cpp names the sources.
CHIP_LIMITS = {
    "a100": Chip("a100", 108, 166_912),
    "h100-sxm": Chip("h100-sxm", 132, 232_448),
    "h100-pcie": Chip("h100-pcie", 114, 232_448),
    "h200": Chip("h200", 132, 232_448),
    "b200": Chip("b200", 148, 232_448),
    "rtx-4090": Chip("rtx-4090", 128, 101_376),
}


@dataclass(frozen=True)
class Problem:
    """A layer. dtype is its name without "torch."; tf32 whether float32 may be rounded to it; steps where they are
    known; directions that one launch could take."""

    cell: str
    dtype: str
    batch: int
    hidden: int
    projected: bool
    backward: bool
    tf32: bool = False
    steps: int | None = None
    heads: int = 1
    directions: int = 1

    @property
    def depth(self) -> int:
        """Units of a head: of as many a row of W_hh has."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Plan:
    """grid is (blocks along units, groups of batch slices) of a direction.

    Group i takes slices i, i + groups, ... of slice_rows rows. units: of a block. products: the products of the one
    step are torch's, before the launch. directions: of a launch.
    """

    algorithm: str
    grid: tuple[int, int]
    slice_rows: int
    groups: int
    shared_bytes: int
    units: int
    why: str
    products: bool = False
    directions: int = 1


def _one_gap(h_acc: tuple[int, ...]) -> bool:
    """Whether h feeds the accumulators in the order of the gates, with at most one gap."""
    apart = [acc - gate for gate, acc in enumerate(h_acc)]
    return apart == sorted(apart) and len({0, *apart}) <= 2


def _persistent(problem: Problem, chip: Chip) -> Plan | str:
    """The persistent plan, or why there is none.

    Forward, h crosses L2 once for each block along the units, half as often with 16 units a block; they are taken where
    they keep as much of the chip at work, and where 8 units would be more blocks than it holds.
    """
    if problem.backward:
        return _with_units(problem, chip, BACKWARD_UNITS)
    narrow, wide = (_with_units(problem, chip, units) for units in (FORWARD_UNITS, WIDE_UNITS))
    if isinstance(wide, str) and (isinstance(narrow, Plan) or "registers" in wide):
        return narrow
    if isinstance(narrow, str):
        return wide
    return wide if wide.grid[0] * wide.grid[1] >= narrow.grid[0] * narrow.grid[1] else narrow


def _with_units(problem: Problem, chip: Chip, units: int) -> Plan | str:
    size = BYTES[problem.dtype]
    if problem.projected:
        return "with a projection a step needs h of all units before W_hr, two exchanges a step"
    if size == 8:
        return "float64 is for checking gradients, and a packet of 16 bytes holds only 2 of it"
    if not chip.cooperative:
        return f"{chip.name} has no cooperative launch"
    cell = CELLS[problem.cell]
    accumulators = len(cell.accumulators)
    if problem.backward and not _one_gap(cell.h_acc):
        return f"what W_hh multiplies of the gradients of {problem.cell} is in more than two pieces"
    # A row of W_hh, or of W_hh^T: its gates side by side, each a number of whole packets.
    gates = len(cell.gates) if problem.backward else 1
    chunks = -(-(-(-problem.depth * size // 16) * 16 * gates) // (64 * WARPS))
    arithmetic = "16-bit" if size == 2 else "tf32" if problem.tf32 else "float32"
    most = MOST_CHUNKS[problem.backward, arithmetic]
    if problem.backward:
        most = min(most, max(8, 4 * gates))
    elif units == WIDE_UNITS:
        most = MOST_CHUNKS_WIDE[arithmetic]
    if chunks > most:
        limit = most * 64 * WARPS // size // gates
        of = "H" if problem.heads == 1 else "units of a head"
        return f"a block's slice of W_hh does not fit in registers: {arithmetic} fits up to {of} = {limit}"
    blocks = problem.heads * -(-problem.depth // units)
    most_groups = chip.multiprocessors // (blocks * problem.directions)
    if most_groups == 0:
        needed = f"{blocks} blocks" if problem.directions == 1 else f"{problem.directions} x {blocks} blocks"
        return f"{needed} must be resident at once, {chip.name} has {chip.multiprocessors} multiprocessors"
    most_rows = MOST_ROWS[problem.backward, units]
    # Two buffers of a row's partial sums; accumulators are kept in pairs.
    sums = 2 * WARPS * units * (accumulators + accumulators % 2) * 4
    # Of a row, copied ahead: the gates of its units and a reset.
    row = sums + 2 * (len(cell.gates) * units * size + 4)
    if not problem.backward:
        most_rows = min(most_rows, (chip.shared_per_block - 2 * OFFSETS) // row // 8 * 8)
    groups = min(most_groups, -(-problem.batch // 8))
    # Thinner slices keep more of the chip at work once H is large.
    most_groups = min(most_groups, problem.batch)
    while blocks * groups * problem.directions < 48 and problem.hidden >= 512 and groups < most_groups:
        groups += 1
    slice_rows = -(-problem.batch // groups)
    if slice_rows > most_rows:
        rounds = -(-slice_rows // most_rows)
        if rounds > MOST_ROUNDS:
            slices = f"{rounds} rounds of {groups} slices of {most_rows} rows"
            return f"a batch of {problem.batch} takes {slices}, more than {MOST_ROUNDS}"
        slice_rows = -(-problem.batch // (groups * rounds))
    groups = min(groups, -(-problem.batch // slice_rows))
    shared = row * (-(-slice_rows // 8) * 8) + 2 * OFFSETS
    if problem.backward:
        # Copied ahead: of two units a thread what is saved, dy, h, h', every dcells and c'; resets.
        others = max(len(cell.states) - 1, 1)
        ahead = 32 * WARPS * 2 * ((len(cell.saved) + 3) * size + 8 * others) + BACKWARD_ROWS * 4 + OFFSETS
        shared = BACKWARD_SUMS + STAGED_ELEMENTS * accumulators * size + 2 * ahead
    if shared > chip.shared_per_block:
        return f"a block needs {shared} bytes of shared memory, {chip.name} has {chip.shared_per_block}"
    slices = -(-problem.batch // slice_rows)
    times = "" if problem.directions == 1 else f" x {problem.directions} directions in one launch"
    why = (
        f"W_hh stays in registers: {blocks} x {groups} blocks{times} on {chip.multiprocessors} multiprocessors, "
        f"{slices} slices of {slice_rows} rows"
    )
    grid = blocks, groups
    return Plan("persistent", grid, slice_rows, groups, shared, units, why, directions=problem.directions)


def _time(chosen: Plan, batch: int) -> int:
    """Of a step of all slices, in the time that a row takes: a step has a part that does not depend on its rows."""
    rounds = -(-batch // (chosen.slice_rows * chosen.groups))
    return rounds * (LATENCY_ROWS + -(-chosen.slice_rows // 8) * 8)


def _both(problem: Problem, chip: Chip, one: Plan) -> Plan:
    """The plan of both directions of a layer: in one launch, or as ``one`` has it one after the other."""
    found = _persistent(problem, chip)
    if isinstance(found, Plan):
        if _time(found, problem.batch) <= 2 * _time(one, problem.batch):
            return found
        rounds = -(-problem.batch // (found.slice_rows * found.groups))
        words = f"{rounds} rounds of {found.slice_rows}" if rounds > 1 else found.slice_rows
        found = f"one launch with {words} rows a block takes longer, by a model"
    return replace(one, why=f"{one.why}; one direction after the other: {found}")


def plan(problem: Problem, chip: Chip, algorithm: str = "auto") -> Plan:
    """The algorithm and its grid. Raises RuntimeError if the algorithm asked for cannot run here."""
    if algorithm not in ("auto", "step", "persistent"):
        raise RuntimeError(f"backend 'cuda' has the algorithms step and persistent, got {algorithm!r}")
    units = BACKWARD_UNITS if problem.backward else FORWARD_UNITS
    blocks = problem.heads * -(-problem.depth // units)
    if algorithm == "step":
        why = "step was asked for"
    elif algorithm == "auto" and problem.steps is not None and problem.steps <= FEW_STEPS:
        why = f"one launch a step: for T = {problem.steps} persistent takes as many with what comes before it"
    else:
        found = _persistent(replace(problem, directions=1), chip)
        if isinstance(found, Plan):
            return found if problem.directions == 1 else _both(problem, chip, found)
        if algorithm == "persistent":
            raise RuntimeError(f"algorithm 'persistent' was asked for but cannot run: {found}")
        why = f"one launch a step: {found}"
    if not problem.backward and problem.steps == 1 and problem.batch >= MANY_ROWS:
        why = f"one step of {problem.batch} rows: two products by torch and a launch for the cell"
        return Plan("step", (-(-problem.hidden // 32), -(-problem.batch // WARPS)), WARPS, 1, 0, 32, why, True)
    return Plan("step", (blocks, -(-problem.batch // 32)), 32, 1, 0, units, why)
