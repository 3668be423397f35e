"""The Triton backend: CUDA and ROCm tensors, and CPU tensors in Triton's interpreter or the simulator.

``plan`` chooses algorithm and tiles from plain numbers. Every launch goes through ``launch``, which counts.
"""

import collections
import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedrnn.backends.common import (
    MANY_ROWS,
    Gradients,
    Inputs,
    Saved,
    allow_tf32,
    apart,
    check_kernels,
    dense,
    empty_stack,
    gate_columns,
    last_rows,
    product,
    products_of_rows,
    recurrent_product,
    rows_of,
    simulator,
    sizes_on,
    stacked,
    step_rows,
    weight_gradients,
)
from fusedrnn.cells import BUILT_IN, Cell, accumulation_dtype

ALGORITHMS = ("step", "sequence")

# The widest H whose W_hh [G*H, H] one program keeps for a whole sequence, in registers.
SEQUENCE_MAX_HIDDEN = {"half": 128, "tf32": 64, "ieee": 64, "double": 32}

# Warps of a step's program, in place of those that few counted instructions speak for: 1, 2 or 4.
WARPS_VARIABLE = "FUSEDRNN_TRITON_WARPS"

# Columns of weights that a step kernel takes at a time.
_BLOCK_K = {"half": 128, "tf32": 64, "ieee": 32, "double": 16}


@dataclass(frozen=True)
class Chip:
    """What planning needs to know of a GPU."""

    name: str
    multiprocessors: int
    shared_bytes: int  # that one program may have
    min_columns: int  # of the narrowest matrix product worth compiling
    async_dot: bool = False  # products run while the next tile arrives, so that one tile more is held


SM80 = Chip("sm_80", 108, 166912, 8)


@dataclass(frozen=True)
class Plan:
    """How one sequence runs. BU units by BB batch rows a program, BK columns at a time (step only)."""

    algorithm: str
    grid: tuple[int, int]
    BU: int
    BB: int
    BK: int
    num_warps: int
    num_stages: int
    precision: str  # of float32 products
    shared_bytes: int  # an estimate, from the tiles in flight
    why: str
    products: bool = False  # those of the one step are torch's, before the launch


def _power_of_2(n: int, low: int, high: int) -> int:
    return min(max(1 << (n - 1).bit_length(), low), high)


def math_of(dtype: torch.dtype, tf32: bool) -> str:
    """How products are computed: in 16 bit, tf32, IEEE float32 or float64."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype == torch.float64:
        return "double"
    return "tf32" if tf32 else "ieee"


def plan(
    cell: Cell,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    dtype: torch.dtype,
    *,
    algorithm: str = "auto",
    backward: bool = False,
    tf32: bool = False,
    chip: Chip = SM80,
    heads: int = 1,
    num_warps: int | None = None,
    steps: int | None = None,
) -> Plan:
    """The plan for a problem; proj_size 0 is no projection; num_warps: of step, in place of the plan's own; steps where
    they are known.

    Raises:
        ValueError: the algorithm asked for cannot run this problem.
    """
    if algorithm not in ("auto", *ALGORITHMS):
        raise ValueError(f"backend 'triton' has the algorithms step and sequence, got {algorithm!r}")
    math = math_of(dtype, tf32)
    if algorithm != "sequence" and not backward and steps == 1 and batch >= MANY_ROWS:
        BU, BB = _power_of_2(hidden_size, 16, 32), 16
        grid = (-(-hidden_size // BU), -(-batch // BB))
        why = f"one step of {batch} rows: two products by torch and a launch for the cell"
        return Plan("step", grid, BU, BB, 16, 4, 1, _precision(math), 0, why, products=True)
    found, reason = _plan_sequence(cell, batch, hidden_size // heads, proj_size, dtype, math, chip, backward, heads)
    if algorithm == "sequence" and found is None:
        raise ValueError(f"algorithm 'sequence' of backend 'triton' cannot run: {reason}")
    if algorithm == "step":
        found, reason = None, "algorithm 'step' was asked for"
    if found is not None:
        return found
    how = _plan_step(cell, batch, input_size, hidden_size, proj_size, dtype, math, chip, backward, reason, heads)
    return how if num_warps is None else replace(how, num_warps=num_warps)


def _plan_sequence(cell, batch, hidden_size, proj_size, dtype, math, chip, backward, heads) -> tuple[Plan | None, str]:
    """The plan, or None and why there is none. hidden_size is that of a head, which a program owns."""
    if proj_size:
        return None, f"a projection (proj_size={proj_size}) needs h of all units before W_hr"
    if hidden_size > SEQUENCE_MAX_HIDDEN[math]:
        fits = SEQUENCE_MAX_HIDDEN[math]
        return None, f"W_hh fits one program up to hidden_size={fits} in {math} math, got {hidden_size}"
    BU = _power_of_2(hidden_size, 16, 1024)
    # Few rows a program keep a step short; more only when every multiprocessor has a program anyway.
    BB = max(8, chip.min_columns) if math in ("half", "tf32") else 16
    if batch * heads > BB * chip.multiprocessors:
        BB = 16
    num_warps = {"half": BU // 16, "tf32": BU // 16, "ieee": BU // 8, "double": 8 if backward else 4}[math]
    shared = len(cell.gates) * BU * BU * dtype.itemsize + BU * BB * 4
    if shared > chip.shared_bytes:
        return None, f"W_hh takes {shared} bytes of shared memory to load, {chip.name} has {chip.shared_bytes}"
    why = f"W_hh of hidden_size={hidden_size} fits one program"
    grid = (heads, -(-batch // BB))
    return Plan("sequence", grid, BU, BB, BU, num_warps, 1, _precision(math), shared, why), why


def _plan_step(cell, batch, input_size, hidden_size, proj_size, dtype, math, chip, backward, why, heads) -> Plan:
    wide = math == "half"
    BB = _power_of_2(batch, chip.min_columns, 64 if wide else 16)
    if backward:
        # The matmul's rows are units: 16 fill a matrix instruction.
        columns, operands = proj_size or len(cell.gates) * hidden_size // heads, 1
        BU = rows = 16 if BB <= 32 else 32
        num_warps = 2 if BB <= 16 else 4
    else:
        # The matmul's rows are the accumulators of BU units: with 32 of them there are programs enough to load W
        # on every multiprocessor at once; a larger batch has the work for 64.
        columns, operands = max(input_size, proj_size or hidden_size // heads), 2
        rows = 32 if BB <= 32 else 64
        BU = rows // _power_of_2(len(cell.accumulators), 1, rows)
        # A warp loads both its operands once for its whole tile: fewer warps, fewer instructions.
        num_warps = 1 if wide and rows == 32 else rows // 16
    if math in ("ieee", "double"):
        num_warps = 4
    BK = _power_of_2(columns, 16, _BLOCK_K[math])
    num_stages = 3
    tiles = num_stages if chip.async_dot else num_stages - 1
    while tiles * operands * (rows + BB) * BK * dtype.itemsize > chip.shared_bytes:
        BK //= 2
    shared = tiles * operands * (rows + BB) * BK * dtype.itemsize
    grid = (heads * -(-hidden_size // heads // BU), -(-batch // BB))
    return Plan("step", grid, BU, BB, BK, num_warps, num_stages, _precision(math), shared, why)


def _precision(math: str) -> str:
    return "tf32" if math == "tf32" else "ieee"


def chip_of(capability: tuple[int, int], multiprocessors: int, shared_bytes: int) -> Chip:
    """A GPU of NVIDIA by its compute capability."""
    major, minor = capability
    return Chip(f"sm_{major}{minor}", multiprocessors, shared_bytes, 8 if major < 10 else 16, major >= 9)


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return SM80
    p = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Chip(p.gcnArchName, p.multi_processor_count, p.shared_memory_per_block, 16)
    return chip_of((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def plan_for(
    cell: Cell,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    dtype: torch.dtype,
    device: torch.device,
    algorithm: str,
    backward: bool,
    steps: int | None = None,
    heads: int = 1,
) -> Plan:
    """The plan on a device of this machine, with the tf32 setting in force."""
    warps = os.environ.get(WARPS_VARIABLE, "")
    if warps not in ("", "1", "2", "4"):
        raise ValueError(f"{WARPS_VARIABLE} must be 1, 2 or 4, got {warps!r}")
    return plan(
        cell,
        batch,
        input_size,
        hidden_size,
        proj_size,
        dtype,
        algorithm=algorithm,
        backward=backward,
        tf32=dtype == torch.float32 and allow_tf32(),
        chip=_chip(device),
        heads=heads,
        num_warps=int(warps) if warps else None,
        steps=steps,
    )


def _plan_of(cell: Cell, inputs: Inputs, algorithm: str, backward: bool) -> Plan:
    x, h0, heads = inputs.x, inputs.h0, inputs.heads
    hidden, proj = inputs.w_hh.shape[0] // len(cell.gates), 0 if inputs.w_hr is None else h0.shape[1]
    steps = x.shape[0] if inputs.batch_sizes is None else inputs.batch_sizes.shape[0]
    return plan_for(cell, h0.shape[0], x.shape[-1], hidden, proj, x.dtype, x.device, algorithm, backward, steps, heads)


def _extras(cell: Cell, inputs: Inputs, rows: int) -> tuple[dict, dict]:
    """Arguments and constants of every kernel for what cells of one's own have."""
    hidden, others = inputs.w_hh.shape[0] // len(cell.gates), len(cell.states) - 1
    args = {
        "parameters": stacked(inputs.parameters),
        "inputs": stacked([rows_of(t) for t in inputs.inputs]),
        # Not where nobody looks: larger numbers have another type.
        "s_state": inputs.h0.shape[0] * hidden if others > 1 else 0,
        "s_rows": rows * hidden if max(others, len(cell.parameters), len(cell.inputs)) > 1 else 0,
        "H": hidden,
        "D": inputs.w_hh.shape[1],
    }
    constants = {
        "K": others, "PARAMETERS": len(cell.parameters), "INPUTS": len(cell.inputs), "HEADS": inputs.heads,
    }  # fmt: skip
    return args, constants


@functools.cache
def why_unavailable() -> str | None:
    """Why the kernels cannot be imported; None when they can."""
    try:
        importlib.import_module("fusedrnn.kernels.cells")
    except ImportError as error:
        return f"Triton's kernels cannot be imported: {error}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _simulator():
    """ptxsim's bridge to Triton, or None. With TRITON_INTERPRET=1 nothing is compiled, so nothing is simulated."""
    return None if _interpreted() else simulator(".triton")


launches: collections.Counter[str] = collections.Counter()


def launch(kernel, grid: tuple[int, int], args: dict, constants: dict, num_warps: int, num_stages: int):
    """Runs a kernel on a GPU, in the interpreter or in the simulator, and counts it in ``launches`` by name.

    Returns what Triton compiled, where that can be launched again.
    """
    launches[kernel.__name__] += 1
    if _simulator() is not None and not any(isinstance(a, Tensor) and a.is_cuda for a in args.values()):
        _simulator().launch(kernel, grid, args, constants, num_warps, num_stages, enable_fp_fusion=True)
        return None
    # Triton 3.10 changes the default of enable_fp_fusion: results would change with the version.
    return kernel[grid](**args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


class Steps:
    """Launches one kernel step after step. Triton looks at every argument of a launch before it knows which compiled
    kernel to take; here tensors and constants stay, so that from the second step on it is the same one.
    """

    def __init__(self, kernel, constants: dict, num_warps: int, num_stages: int):
        self.kernel, self.constants, self.options = kernel, constants, (num_warps, num_stages)
        self.compiled = None

    def __call__(self, grid: tuple[int, int], args: dict, numbers: dict) -> None:
        """args: those of every step; numbers: those of this one, which the kernel is not specialised on."""
        # From 2^31 on a number has another type.
        small = all(n < 1 << 31 for n in numbers.values())
        if self.compiled is not None and small:
            launches[self.kernel.__name__] += 1
            values = self.values
            for name, n in numbers.items():
                values[self.places[name]] = n
            self.compiled[(*grid, 1)](*values)
            return
        compiled = launch(self.kernel, grid, {**args, **numbers}, self.constants, *self.options)
        if small and compiled is not None:
            given = {**args, **numbers, **self.constants}
            self.places = {name: i for i, name in enumerate(self.kernel.arg_names)}
            self.values = [given[name] for name in self.kernel.arg_names]
            self.compiled = compiled


def _check(x: Tensor) -> None:
    reason = why_unavailable()
    if reason:
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    if x.is_cuda or _simulator() is not None:
        return
    if not _interpreted():
        raise RuntimeError(
            f"backend 'triton' takes CUDA tensors, got {x.device}; CPU tensors run with TRITON_INTERPRET=1 "
            "(float32) or FUSEDRNN_SIMULATE=1"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"Triton's interpreter computes float32 and float64 only, got {x.dtype}")


def _guard(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _flags(resets: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """resets as numbers of the products' dtype."""
    # A byte loaded on the way to an operand of a product makes Triton lay that operand out as bytes.
    return None if resets is None else dense(resets.to(dtype))


def _gate_of(accumulators: int, acc_of_gate: tuple[int, ...]) -> tuple[int, ...]:
    """For each accumulator its gate, -1 without one."""
    return tuple(acc_of_gate.index(a) if a in acc_of_gate else -1 for a in range(accumulators))


def _runs(acc_of_gate: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(accumulator, gate, count) where neighbouring gates have neighbouring accumulators."""
    runs: list[list[int]] = []
    for gate, acc in enumerate(acc_of_gate):
        if runs and acc == runs[-1][0] + runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([acc, gate, 1])
    return tuple(tuple(run) for run in runs)


def _neighbours(rows: list[tuple[int, int]], reverse: bool):
    """Steps in the order of forward: (t, row and size, of the step before, of the step after).

    The sizes of the neighbours are cut to this step's: rows that have that neighbour.
    """
    order = range(len(rows) - 1, -1, -1) if reverse else range(len(rows))
    for k, t in enumerate(order):
        row, n = rows[t]
        before = rows[order[k - 1]] if k else (0, 0)
        after = rows[order[k + 1]] if k + 1 < len(order) else (0, 0)
        yield row, n, before[0], min(n, before[1]), after[0], min(n, after[1])


def _device_steps(batch_sizes: Tensor | None, device: torch.device):
    """Sizes [T] and offsets [T] for a kernel; None, None when dense."""
    if batch_sizes is None:
        return None, None
    sizes = sizes_on(batch_sizes, device)
    return sizes, sizes.cumsum(0) - sizes


def _both_biases(b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    if b_hh is None and b_ih is not None:
        b_hh = torch.zeros_like(b_ih)
    return dense(b_ih), dense(b_hh)


def forward(cell: Cell, inputs: Inputs, algorithm: str, keep_gates: bool, keep_cells: bool) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence``."""
    _check(inputs.x)
    check_kernels("triton", cell)
    x, h0, _, w_ih, w_hh, b_ih, b_hh, w_hr, *_ = inputs
    batch, hidden, others = h0.shape[0], w_hh.shape[0] // len(cell.gates), len(cell.states) - 1
    how = _plan_of(cell, inputs, algorithm, backward=False)
    steps = x.shape[:-1]
    acc_dtype = accumulation_dtype(x.dtype)
    y = x.new_empty(*steps, h0.shape[1])
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    c_n = empty_stack(x, others, batch, hidden)
    gates = x.new_empty(*steps, len(cell.saved) * hidden) if keep_gates and cell.saved else x.new_empty(0)
    cells = empty_stack(x, others * keep_cells, *steps, hidden, dtype=acc_dtype)
    if batch:
        run = _step_forward if how.algorithm == "step" else _sequence_forward
        b_ih, b_hh = _both_biases(b_ih, b_hh)
        c0 = stacked(inputs.states0)
        given = Inputs(*map(dense, (x, h0)), c0, *map(dense, (w_ih, w_hh, b_ih, b_hh, w_hr)), *inputs[8:])
        with _guard(x):
            run(cell, how, given, y, h_n, c_n, gates, cells)
    finals, every = apart(c_n, max(others, 1)), apart(cells, max(others, 1)) if keep_cells else [cells]
    return y, h_n, finals[0], gates, every[0], *finals[1:], *every[1:]


def _step_forward(cell: Cell, how: Plan, inputs: Inputs, y, h_n, c_n, gates, cells) -> None:
    from fusedrnn.kernels.cells import KERNELS
    from fusedrnn.kernels.step import step_forward_kernel

    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse = inputs.plain
    # tl.split halves a block: a step sums for a power of 2 of accumulators, the last ones perhaps of nothing.
    accumulators = _power_of_2(len(cell.accumulators), 1, 4)
    I, (batch, P), H = x.shape[-1], h0.shape, w_hh.shape[0] // len(cell.gates)
    others = len(cell.states) - 1
    x_gate, h_gate = (_gate_of(accumulators, acc) for acc in (cell.x_acc, cell.h_acc))
    together = -1 not in x_gate + h_gate
    rows = step_rows(x, batch_sizes)
    y_rows = y.view(-1, P)
    saved = cells.numel() > 0
    if others and not saved and not how.products:
        cells = x.new_empty(others, 2 * batch, H, dtype=accumulation_dtype(x.dtype))
    extra_args, extra_constants = _extras(cell, inputs, y_rows.shape[0])
    projected = w_hr is not None
    h = x.new_empty(batch, H) if projected else y
    args = {
        "x": x,
        "x_product": None,
        "h_product": None,
        "h0": h0,
        "c0": c0,
        "w_ih": w_ih,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
        "zeros": None if together and resets is None else x.new_zeros(max(I, P)),
        "y": y,
        "h": h,
        "h_n": None if projected else h_n,
        "c_n": c_n if cell.has_cell_state else None,
        "gates": gates if gates.numel() else None,
        "cells": cells if cells.numel() else None,
        "resets": _flags(resets, x.dtype),
        "I": I,
        "P": P,
        "s_cells": cells.numel() // others if others > 1 else 0,
        **extra_args,
    }
    constants = {
        **extra_constants,
        "FORWARD": KERNELS[cell.name].forward,
        "X_GATE": x_gate,
        "H_GATE": h_gate,
        "TOGETHER": together,
        "BU": how.BU,
        "BB": how.BB,
        "BK": how.BK,
        "G": len(cell.gates),
        "SAME_K": w_hh.shape[1] == I,
        "EVEN_K": I % how.BK == 0 and w_hh.shape[1] % how.BK == 0,
        "PRECISION": how.precision,
    }
    if how.products:
        one_head = {**constants, "HEADS": 1}
        numbers = {"n_prev": 0, "n_next": 0, "i_prev": 0, "i_cell_prev": 0}
        for part, of_x, of_h in products_of_rows(inputs):
            n, first = part.stop - part.start, part.start
            of_part = {
                "x": None, "w_ih": None, "w_hh": None, "x_product": of_x, "h_product": of_h, "h0": h0[part], "D": H,
                **{name: None if args[name] is None else args[name][..., part, :] for name in ("c0", "h_n", "c_n")},
                **numbers, "n": n, **dict.fromkeys(("i_row", "i_h", "i_cell"), first),
            }  # fmt: skip
            grid = (how.grid[0], -(-n // how.BB))
            launch(step_forward_kernel, grid, args | of_part, one_head, how.num_warps, how.num_stages)
        if projected:
            product(h, w_hr.t(), out=y_rows)
            h_n.copy_(y_rows)
        return
    step = Steps(step_forward_kernel, constants, how.num_warps, how.num_stages)
    for k, (row, n, i_prev, n_prev, _, n_next) in enumerate(_neighbours(rows, reverse)):
        i_cell, i_cell_prev = (row, i_prev) if saved else (k % 2 * batch, (k + 1) % 2 * batch)
        numbers = {
            "n": n,
            "n_prev": n_prev,
            "n_next": n_next,
            "i_row": row,
            "i_prev": i_prev,
            "i_h": 0 if projected else row,
            "i_cell": i_cell,
            "i_cell_prev": i_cell_prev,
        }
        step((how.grid[0], -(-n // how.BB)), args, numbers)
        if projected:
            product(h[:n], w_hr.t(), out=y_rows[row : row + n])
    if projected:
        h_n.copy_(y_rows[:batch] if reverse else y_rows[last_rows(y_rows.shape[0], batch, batch_sizes, x.device)])


def _sequence_forward(cell: Cell, how: Plan, inputs: Inputs, y, h_n, c_n, gates, cells) -> None:
    from fusedrnn.kernels.cells import KERNELS
    from fusedrnn.kernels.sequence import sequence_forward_kernel

    x, h0, c0, w_ih, w_hh, b_ih, b_hh, _, batch_sizes, resets, reverse = inputs.plain
    accumulators = len(cell.accumulators)
    rows = step_rows(x, batch_sizes)
    sizes, offsets = _device_steps(batch_sizes, x.device)
    b_x = b_ih
    if b_ih is not None and cell.x_acc == cell.h_acc:
        b_x, b_hh = b_ih + b_hh, None
    x = rows_of(x)
    gates_x = product(x, w_ih.t(), b_x)
    extra_args, extra_constants = _extras(cell, inputs, x.shape[0])
    args = {
        "gates_x": gates_x,
        "h0": h0,
        "c0": c0,
        "w_hh": w_hh,
        "b_hh": b_hh,
        "y": y,
        "h_n": h_n,
        "c_n": c_n if cell.has_cell_state else None,
        "gates": gates if gates.numel() else None,
        "cells": cells if cells.numel() else None,
        "resets": _flags(resets, x.dtype),
        "sizes": sizes,
        "offsets": offsets,
        "T": len(rows),
        "B": h0.shape[0],
        **extra_args,
    }
    constants = {
        **extra_constants,
        "FORWARD": KERNELS[cell.name].forward,
        "X_GATE": _gate_of(accumulators, cell.x_acc),
        "H_GATE": _gate_of(accumulators, cell.h_acc),
        "G": len(cell.gates),
        "REVERSE": reverse,
        "BU": how.BU,
        "BB": how.BB,
        "PRECISION": how.precision,
    }
    launch(sequence_forward_kernel, how.grid[::-1], args, constants, how.num_warps, how.num_stages)


def backward(
    cell: Cell, grads: Gradients, inputs: Inputs, saved: Saved, algorithm: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence_backward``."""
    _check(inputs.x)
    check_kernels("triton", cell)
    x, h0, _, _, w_hh, _, _, w_hr, batch_sizes, _, reverse = inputs.plain
    batch, hidden, others = h0.shape[0], w_hh.shape[0] // len(cell.gates), len(cell.states) - 1
    how = _plan_of(cell, inputs, algorithm, backward=True)
    rows = step_rows(x, batch_sizes)
    n_rows = rows[-1][0] + rows[-1][1]
    dgates = x.new_empty(n_rows, len(cell.accumulators) * hidden)
    dh0 = torch.empty_like(h0, memory_format=torch.contiguous_format)
    dc0 = empty_stack(x, others, batch, hidden)
    dparameters = x.new_empty(len(cell.parameters), n_rows, hidden)
    dinputs = x.new_empty(len(cell.inputs), n_rows, hidden)
    dy_total = h = None
    given = inputs._replace(h0=dense(h0), c0=stacked(inputs.states0), w_hh=dense(w_hh), w_hr=dense(w_hr))
    dc_n, dcells = (stacked(t) for t in ((grads.dc_n, *grads.dothers_n), (grads.dcells, *grads.dothers)))
    grads = Gradients(dense(grads.dy), dense(grads.dh_n), dc_n, dcells)
    kept = Saved(dense(saved.y), dense(saved.gates), stacked((saved.cells, *saved.others)))
    if w_hr is not None:
        # Grows into the whole gradient of y: from outside, from h_n, and from the next step.
        shape = (n_rows, h0.shape[1])
        dy_total = x.new_zeros(shape) if grads.dy is None else grads.dy.reshape(shape).clone()
        if grads.dh_n is not None and batch:
            dy_total[slice(0, batch) if reverse else last_rows(n_rows, batch, batch_sizes, x.device)] += grads.dh_n
        h = (rows_of(kept.gates)[:, -hidden:] * rows_of(kept.cells).tanh()).to(x.dtype) if needs[7] else None
    if batch:
        run = _step_backward if how.algorithm == "step" else _sequence_backward
        with _guard(x):
            run(cell, how, grads, given, kept, rows, dgates, dparameters, dinputs, dh0, dc0, dy_total, needs)
    dc0, *dothers = apart(dc0, max(others, 1))
    more = dothers, [*dparameters], [t.clone() for t in dinputs]
    return weight_gradients(cell, inputs, saved.y, dgates, h, dy_total, needs, dh0, dc0, *more)


def _step_backward(
    cell: Cell, how: Plan, grads: Gradients, inputs: Inputs, saved: Saved, rows, dgates, dparameters, dinputs, dh0, dc0,
    dy_total, needs,
) -> None:  # fmt: skip
    from fusedrnn.kernels.cells import KERNELS
    from fusedrnn.kernels.step import step_backward_kernel

    dy, dh_n, dc_n, dcells = grads[:4]
    _, h0, c0, _, w_hh, _, _, w_hr, batch_sizes, resets, reverse = inputs.plain
    y, gates, cells = saved[:3]
    kernels = KERNELS[cell.name]
    (batch, P), H, others = h0.shape, w_hh.shape[0] // len(cell.gates), len(cell.states) - 1
    extra_args, extra_constants = _extras(cell, inputs, dgates.shape[0])
    acc_dtype = accumulation_dtype(y.dtype)
    projected = w_hr is not None
    cut, flags = None if resets is None else resets.reshape(-1, 1), _flags(resets, y.dtype)
    if projected:
        d, w_t, K, runs = dy_total, w_hr.t().contiguous(), P, ((0, 0, 1),)
        dy = dh_n = None
    elif inputs.heads > 1:
        # Of a unit the columns of its head, gate after gate.
        K = w_hh.shape[1]
        d, w_t = dgates, w_hh.view(-1, inputs.heads, K, K).permute(1, 3, 0, 2).reshape(H, -1)
        runs = tuple((a, g, 1) for g, a in enumerate(cell.h_acc))
    else:
        d, w_t, K, runs = dgates, w_hh.t().contiguous(), H, _runs(cell.h_acc)
    args = {
        "d": d,
        "w_t": w_t,
        "dy": dy,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "dcells": dcells,
        "h0": h0,
        "c0": c0,
        "y": y,
        "gates": gates if cell.saved else None,
        "cells": cells if cell.has_cell_state else None,
        "dgates": dgates,
        "dparameters": dparameters,
        "dinputs": dinputs,
        "dc": y.new_empty(others, 2, batch, H, dtype=acc_dtype) if others else None,
        "dh": y.new_empty(2, batch, H, dtype=acc_dtype) if kernels.has_direct else None,
        "dc0": dc0 if cell.has_cell_state else None,
        "dh0": dh0 if kernels.has_direct else None,
        "resets": flags,
        "resets_d": None if projected else flags,
        "LW": w_t.shape[1],
        "LD": d.shape[1],
        **extra_args,
        "D": K,
    }
    constants = {
        **extra_constants,
        "BACKWARD": kernels.backward,
        "RUNS": runs,
        "A": len(cell.accumulators),
        "S": len(cell.saved),
        "USE_H": kernels.backward_uses_h,
        "BU": how.BU,
        "BB": how.BB,
        "BK": how.BK,
        "EVEN_K": K * y.element_size() % 16 == 0 and all(count * K % how.BK == 0 for _, _, count in runs),
        "PRECISION": how.precision,
    }
    step = Steps(step_backward_kernel, constants, how.num_warps, how.num_stages)
    for k, (row, n, i_prev, n_prev, i_next, n_next) in enumerate(reversed(list(_neighbours(rows, reverse)))):
        if projected and n_next:
            after = slice(i_next, i_next + n_next)
            total = dy_total[row : row + n_next]
            if cut is None:
                product(dgates[after], w_hh, total, out=total)
            else:
                total += product(dgates[after], w_hh).masked_fill_(cut[after], 0)
        n_d, i_d = (n, row) if projected else (n_next, i_next)
        numbers = {
            "n": n,
            "n_prev": n_prev,
            "n_next": n_next,
            "n_d": n_d,
            "i_row": row,
            "i_prev": i_prev,
            "i_d": i_d,
            "i_dc": k % 2 * batch,
            "i_dc_next": (k + 1) % 2 * batch,
        }
        step((how.grid[0], -(-n // how.BB)), args, numbers)
    if needs[1]:
        first = slice(0, batch)
        if reverse:
            first = last_rows(dgates.shape[0], batch, batch_sizes, dgates.device)
        through = recurrent_product(gate_columns(dgates[first], cell.h_acc, H), w_hh, inputs.heads)
        if cut is not None:
            through.masked_fill_(cut[first], 0)
        dh0.copy_(through + dh0 if kernels.has_direct else through)


def _sequence_backward(
    cell: Cell, how: Plan, grads: Gradients, inputs: Inputs, saved: Saved, rows, dgates, dparameters, dinputs, dh0, dc0,
    dy_total, needs,
) -> None:  # fmt: skip
    from fusedrnn.kernels.cells import KERNELS
    from fusedrnn.kernels.sequence import sequence_backward_kernel

    dy, dh_n, dc_n, dcells = grads[:4]
    _, h0, c0, _, w_hh, _, _, _, batch_sizes, resets, reverse = inputs.plain
    y, gates, cells = saved[:3]
    kernels = KERNELS[cell.name]
    sizes, offsets = _device_steps(batch_sizes, y.device)
    extra_args, extra_constants = _extras(cell, inputs, dgates.shape[0])
    args = {
        "w_hh": w_hh,
        "dy": dy,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "dcells": dcells,
        "h0": h0,
        "c0": c0,
        "y": y,
        "gates": gates if cell.saved else None,
        "cells": cells if cell.has_cell_state else None,
        "dgates": dgates,
        "dparameters": dparameters,
        "dinputs": dinputs,
        "dh0": dh0,
        "dc0": dc0 if cell.has_cell_state else None,
        "resets": _flags(resets, y.dtype),
        "sizes": sizes,
        "offsets": offsets,
        "T": len(rows),
        "B": h0.shape[0],
        **extra_args,
    }
    constants = {
        **extra_constants,
        "CLEAR": cell.name not in BUILT_IN,
        "BACKWARD": kernels.backward,
        "H_GATE": _gate_of(len(cell.accumulators), cell.h_acc),
        "S": len(cell.saved),
        "USE_H": kernels.backward_uses_h,
        "HAS_DIRECT": kernels.has_direct,
        "REVERSE": reverse,
        "BU": how.BU,
        "BB": how.BB,
        "PRECISION": how.precision,
    }
    launch(sequence_backward_kernel, how.grid[::-1], args, constants, how.num_warps, how.num_stages)
