"""What the backends written in Python share: row bookkeeping and the GEMMs after the loop."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusedrnn.cells import Cell


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
    return t.reshape(-1, t.shape[-1])


def previous(state0: Tensor, states: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """For every row of ``states`` [N, K] the state its step started from: another row of it, or ``state0``."""
    batch = state0.shape[0]
    if batch_sizes is None:
        inner = (states[batch:], state0) if reverse else (state0, states[: states.shape[0] - batch])
        return torch.cat([t.to(states.dtype) for t in inner])
    rows = step_rows(states, batch_sizes)
    pieces = []
    for t, (_, size) in enumerate(rows):
        before = t + 1 if reverse else t - 1
        offset, have = rows[before] if 0 <= before < len(rows) else (0, 0)
        have = min(have, size)
        pieces += [states[offset : offset + have], state0[have:size].to(states.dtype)]
    return torch.cat(pieces)


def weight_gradients(
    cell: Cell,
    dgates: Tensor,  # [N, A*H]
    x: Tensor,  # [T, B, I] or [N, I]
    h0: Tensor,  # [B, P]
    w_ih: Tensor,  # [G*H, I]
    y: Tensor,  # [T, B, P] or [N, P]
    h: Tensor | None,  # [N, H] before projection; only with w_hr
    dy_total: Tensor | None,  # [N, P] gradient of y with the recurrent part; only with w_hr
    batch_sizes: Tensor | None,
    reverse: bool,
    needs: Sequence[bool],
    dh0: Tensor,
    dc0: Tensor,
) -> tuple[Tensor, ...]:
    """The eight gradients, in the order of the op, from the gate gradients of the whole sequence.

    One GEMM each over all rows; an output that is not needed is an empty tensor.
    """
    hidden = dgates.shape[-1] // len(cell.accumulators)
    dgates = rows_of(dgates)

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
        wanted(0, lambda: (dgates_x @ w_ih).view(x.shape)),
        wanted(1, lambda: dh0),
        wanted(2, lambda: dc0),
        wanted(3, lambda: dgates_x.t() @ rows_of(x)),
        wanted(4, lambda: dgates_h.t() @ previous(h0, rows_of(y), batch_sizes, reverse)),
        wanted(5, lambda: dgates_x.sum(0)),
        wanted(6, lambda: dgates_h.sum(0)),
        wanted(7, lambda: rows_of(dy_total).t() @ h),
    )
