"""The cell table: one entry per cell, read by every layer above the kernels.

A cell adds its input and recurrent matmuls into ``accumulators`` (pre-activation sums) and then applies a
pointwise function. Gate order is torch's, so a state_dict needs no conversion. The cells that the package brings along
are printed from their definitions (fusedrnn/zoo.py): in torch (fusedrnn/printed.py), C++ (csrc/printed.h) and Triton
(kernels/printed.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusedrnn import printed


@dataclass(frozen=True)
class Cell:
    """What a recurrent cell is made of.

    ``x_acc[g]`` and ``h_acc[g]`` name the accumulator that gate g's input and hidden part are added to;
    they differ only where a cell needs the two parts apart. ``states`` are h and others of H units each, ``parameters``
    per-unit vectors [H], ``inputs`` per-step tensors. All of these are tuples of tensors in

    - ``forward(acc, prev, parameters, inputs)``, which returns (next, saved): the states after the step, and what is
      kept for backward;
    - ``backward(d, saved, next, prev, parameters, inputs)``, which returns (dacc, dprev, dparameters, dinputs). d are
      the whole gradients of the new states, dprev[0] is only what reaches h past the matmul, and dparameters is for
      each row.

    Tensors are [rows, H], parameters [H]. ``has_direct`` tells whether dprev[0] is ever more than zeros.
    """

    name: str
    mode: str
    gates: tuple[str, ...]
    accumulators: tuple[str, ...]
    x_acc: tuple[int, ...]
    h_acc: tuple[int, ...]
    saved: tuple[str, ...]
    forward: Callable
    backward: Callable
    states: tuple[str, ...] = ("h",)
    parameters: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    has_direct: bool = False

    @property
    def has_cell_state(self) -> bool:
        """Whether there is a state beside h."""
        return len(self.states) > 1


CELLS: dict[str, Cell] = {
    name: Cell(name=name, mode=name.upper(), **found)  # type: ignore[arg-type]
    for name, found in printed.CELLS.items()
}

# Those that torch has too, and that every backend has compiled ahead. What the package brings along beside them is
# compiled ahead for the CPU, and for CUDA at its first use, as cells are that are added while the process runs.
BUILT_IN = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_kernels: dict[str, frozenset[str]] = dict.fromkeys(CELLS, frozenset(("reference", "cpu", "triton", "cuda")))

CELL_OF_MODE: dict[str, Cell] = {CELLS[name].mode: CELLS[name] for name in BUILT_IN}


def register(cell: Cell, *backends: str) -> None:
    """Adds a cell to the table, or kernels to it: ``backends`` beside the reference have it now.

    A cell takes the place of one of its name, whose kernels are forgotten, unless it is the same.

    Raises:
        ValueError: a built-in cell has that name.
    """
    if cell.name in printed.CELLS:
        raise ValueError(f"a cell's name must not be a built-in one's, got {cell.name!r}")
    before = _kernels[cell.name] if CELLS.get(cell.name) == cell else frozenset(("reference",))
    CELLS[cell.name], _kernels[cell.name] = cell, before | {*backends}


def kernels_of(cell: str) -> frozenset[str]:
    """The backends that have a cell."""
    return _kernels.get(cell, frozenset())


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gate math, carried state and saved c: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
