"""The cell table: one entry per cell, read by every layer above the kernels.

A cell adds its input and recurrent matmuls into ``accumulators`` (pre-activation sums) and then applies a
pointwise function. Gate order is torch's, so a state_dict needs no conversion. The same table exists in
C++ (csrc/cells.h) and in Triton (kernels/cells.py).

Equations: torch.nn.LSTM's documentation; Hochreiter & Schmidhuber, "Long short-term memory", 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


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


def _lstm_forward(acc, prev, parameters, inputs):
    i, f, g, o = acc[0].sigmoid(), acc[1].sigmoid(), acc[2].tanh(), acc[3].sigmoid()
    c = f * prev[1] + i * g
    return (o * c.tanh(), c), (i, f, g, o)


def _lstm_backward(d, saved, next, prev, parameters, inputs):
    i, f, g, o = saved
    tanh_c = next[1].tanh()
    dc = d[1] + d[0] * o * (1 - tanh_c * tanh_c)
    dacc = (
        dc * g * i * (1 - i),
        dc * prev[1] * f * (1 - f),
        dc * i * (1 - g * g),
        d[0] * tanh_c * o * (1 - o),
    )
    return dacc, (torch.zeros_like(dc), dc * f), (), ()


def _gru_forward(acc, prev, parameters, inputs):
    r, z = acc[0].sigmoid(), acc[1].sigmoid()
    n = (acc[2] + r * acc[3]).tanh()
    return (n + z * (prev[0] - n),), (r, z, n, acc[3])


def _gru_backward(d, saved, next, prev, parameters, inputs):
    r, z, n, nh = saved
    dn = d[0] * (1 - z) * (1 - n * n)
    dz = d[0] * (prev[0] - n) * z * (1 - z)
    dr = dn * nh * r * (1 - r)
    return (dr, dz, dn, dn * r), (d[0] * z,), (), ()


def _rnn_forward(activation):
    return lambda acc, prev, parameters, inputs: ((activation(acc[0]),), ())


def _rnn_tanh_backward(d, saved, next, prev, parameters, inputs):
    return (d[0] * (1 - next[0] * next[0]),), (torch.zeros_like(d[0]),), (), ()


def _rnn_relu_backward(d, saved, next, prev, parameters, inputs):
    return (torch.where(next[0] <= 0, 0, d[0]),), (torch.zeros_like(d[0]),), (), ()


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell(
            name="lstm",
            mode="LSTM",
            gates=("i", "f", "g", "o"),
            accumulators=("i", "f", "g", "o"),
            x_acc=(0, 1, 2, 3),
            h_acc=(0, 1, 2, 3),
            saved=("i", "f", "g", "o"),
            forward=_lstm_forward,
            backward=_lstm_backward,
            states=("h", "c"),
        ),
        Cell(
            name="gru",
            mode="GRU",
            gates=("r", "z", "n"),
            accumulators=("r", "z", "nx", "nh"),
            x_acc=(0, 1, 2),
            h_acc=(0, 1, 3),
            saved=("r", "z", "n", "nh"),
            forward=_gru_forward,
            backward=_gru_backward,
            has_direct=True,
        ),
        *(
            Cell(
                name=name,
                mode=name.upper(),
                gates=("h",),
                accumulators=("h",),
                x_acc=(0,),
                h_acc=(0,),
                saved=(),
                forward=_rnn_forward(activation),
                backward=backward,
            )
            for name, activation, backward in (
                ("rnn_tanh", torch.tanh, _rnn_tanh_backward),
                ("rnn_relu", torch.relu, _rnn_relu_backward),
            )
        ),
    )
}

CELL_OF_MODE: dict[str, Cell] = {cell.mode: cell for cell in CELLS.values()}

# Those that every backend has. Others are added while the process runs.
BUILT_IN = tuple(CELLS)
_kernels: dict[str, frozenset[str]] = {name: frozenset(("reference", "cpu", "triton", "cuda")) for name in BUILT_IN}


def register(cell: Cell, *backends: str) -> None:
    """Adds a cell to the table, or kernels to it: ``backends`` beside the reference have it now.

    A cell takes the place of one of its name, whose kernels are forgotten, unless it is the same.

    Raises:
        ValueError: a built-in cell has that name.
    """
    if cell.name in BUILT_IN:
        raise ValueError(f"a cell's name must not be a built-in one's, got {cell.name!r}")
    before = _kernels[cell.name] if CELLS.get(cell.name) == cell else frozenset(("reference",))
    CELLS[cell.name], _kernels[cell.name] = cell, before | {*backends}


def kernels_of(cell: str) -> frozenset[str]:
    """The backends that have a cell."""
    return _kernels.get(cell, frozenset())


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gate math, carried state and saved c: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
