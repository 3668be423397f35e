"""What the backends written in Python share: row bookkeeping and the GEMMs after the loop."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn.cells import Cell


class Inputs(NamedTuple):
    """What an op computes from, in the order of its schema; see fusedrnn.ops."""

    x: Tensor  # [T, B, I] or [N, I]
    h0: Tensor  # [B, P]
    c0: Tensor | None  # [B, H]
    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]
    batch_sizes: Tensor | None  # int64 [T], on the CPU
    resets: Tensor | None  # bool [T, B] or [N]
    reverse: bool


class Gradients(NamedTuple):
    """The gradients of the outputs, None where one is zero."""

    dy: Tensor | None  # [T, B, P] or [N, P]
    dh_n: Tensor | None  # [B, P]
    dc_n: Tensor | None  # [B, H]
    dcells: Tensor | None  # [T, B, H] or [N, H], in the accumulation dtype


class Saved(NamedTuple):
    """What forward kept for backward."""

    y: Tensor  # [T, B, P] or [N, P]
    gates: Tensor  # [T, B, S*H] or [N, S*H]
    cells: Tensor  # [T, B, H] or [N, H], in the accumulation dtype


def simulator_folder() -> Path | None:
    """Where FUSEDRNN_SIMULATE says the simulator is: 1 in a checkout, or the path of tests/ptxsim; unset or 0: nowhere.

    Raises:
        RuntimeError: there is no simulator at that place.
    """
    setting = os.environ.get("FUSEDRNN_SIMULATE", "")
    if setting in ("", "0"):
        return None
    folder = Path(__file__).resolve().parents[2] / "tests" / "ptxsim" if setting == "1" else Path(setting).resolve()
    if not (folder / "__init__.py").exists():
        raise RuntimeError(f"FUSEDRNN_SIMULATE must be 1 in a checkout, or the path of tests/ptxsim; got {setting!r}")
    return folder


def simulator(name: str = ""):
    """The package ptxsim, or a module of it; None without FUSEDRNN_SIMULATE."""
    folder = simulator_folder()
    if folder is None:
        return None
    if "ptxsim" not in sys.modules:
        sys.path.insert(0, str(folder.parent))
        try:
            importlib.import_module("ptxsim")
        finally:
            sys.path.remove(str(folder.parent))
    return importlib.import_module(f"ptxsim{name}")


def step_rows(x: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int]]:
    """(first row, number of rows) of every time step, in x seen as [N, I]."""
    if batch_sizes is None:
        steps, batch = x.shape[0], x.shape[1]
        return [(t * batch, batch) for t in range(steps)]
    rows, offset = [], 0
    for size in batch_sizes.tolist():
        rows.append((offset, size))
        offset += size
    return rows


def rows_of(t: Tensor) -> Tensor:
    """[T, B, K] or [N, K] as [N, K]."""
    return t.flatten(0, -2)


def neighbours(batch_sizes: Tensor, rows: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every row of packed data the row of the same sequence ``offset`` (1 or -1) steps on, whether there is one,
    and the row's place in its step's batch; on the CPU.
    """
    steps = batch_sizes.shape[0]
    first = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(torch.arange(steps), batch_sizes, output_size=rows)
    place = torch.arange(rows) - first[step]
    other = step + offset
    inside = (other >= 0) & (other < steps)
    other = other.clamp(0, steps - 1)
    return first[other] + place, inside & (place < batch_sizes[other]), place


def previous(
    state0: Tensor, states: Tensor, batch_sizes: Tensor | None, reverse: bool, resets: Tensor | None = None
) -> Tensor:
    """For every row of ``states`` [N, K] what its step started from: another row of it, one of ``state0``, or zeros."""
    batch = state0.shape[0]
    state0 = state0.to(states.dtype)
    if batch_sizes is None:
        inner = (states[batch:], state0) if reverse else (state0, states[: states.shape[0] - batch])
        found = torch.cat(inner)
    else:
        rows = states.shape[0]
        row, inside, place = neighbours(batch_sizes, rows, 1 if reverse else -1)
        found = torch.cat([states, state0])[torch.where(inside, row, rows + place).to(states.device)]
    return found if resets is None else found.masked_fill(resets.reshape(-1, 1), 0)


def product(a: Tensor, b: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b (+ add) of matrices, sums in float32 at least, rounded once; into ``out``, which may be ``add``.

    Every product of these backends outside of their kernels. On the CPU 16 bits are widened: what torch's own product
    makes there of infinities, NaN and odd sizes depends on the processor.
    """
    if a.device.type != "cpu" or a.element_size() > 2:
        return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, out=out)
    wide = a.float() @ b.float() if add is None else torch.addmm(add.float(), a.float(), b.float())
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def started_from(inputs: Inputs, y: Tensor) -> Tensor:
    """The h that every row's step started from, [N, P]."""
    return previous(inputs.h0, rows_of(y), inputs.batch_sizes, inputs.reverse, inputs.resets)


def weight_gradients(
    cell: Cell,
    inputs: Inputs,
    y: Tensor,  # [T, B, P] or [N, P]
    dgates: Tensor,  # [N, A*H]
    h: Tensor | None,  # [N, H] before projection; only with w_hr
    dy_total: Tensor | None,  # [N, P] gradient of y with the recurrent part; only with w_hr
    needs: Sequence[bool],
    dh0: Tensor,
    dc0: Tensor,
) -> tuple[Tensor, ...]:
    """The eight gradients, in the order of the op, from the gate gradients of the whole sequence.

    One GEMM each over all rows; an output that is not needed is an empty tensor.
    """
    hidden = dgates.shape[-1] // len(cell.accumulators)
    dgates = rows_of(dgates)
    x = inputs.x

    def gate_columns(acc: tuple[int, ...]) -> Tensor:
        first, last = acc[0], acc[-1]
        if acc == tuple(range(first, last + 1)):
            return dgates[:, first * hidden : (last + 1) * hidden]
        return torch.cat([dgates[:, a * hidden : (a + 1) * hidden] for a in acc], dim=1)

    def wanted(k: int, make: Callable[[], Tensor]) -> Tensor:
        return make() if needs[k] else dgates.new_empty(0)

    dgates_x = gate_columns(cell.x_acc)
    dgates_h = dgates_x if cell.h_acc == cell.x_acc else gate_columns(cell.h_acc)
    return (
        wanted(0, lambda: product(dgates_x, inputs.w_ih).view(x.shape)),
        wanted(1, lambda: dh0),
        wanted(2, lambda: dc0),
        wanted(3, lambda: product(dgates_x.t(), rows_of(x))),
        wanted(4, lambda: product(dgates_h.t(), started_from(inputs, y))),
        wanted(5, lambda: dgates_x.sum(0)),
        wanted(6, lambda: dgates_h.sum(0)),
        wanted(7, lambda: product(rows_of(dy_total).t(), h)),
    )
