"""The cell table: one entry per cell, read by every layer above the kernels.

A cell adds its input and recurrent matmuls into ``accumulators`` (pre-activation sums) and then applies a
pointwise function. Gate order is torch's, so a state_dict needs no conversion. The same table exists in
C++ (csrc/cells.h) and in Triton (kernels/cells.py).

Equations: torch.nn.LSTM's documentation; Hochreiter & Schmidhuber, "Long short-term memory", 1997.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """What a recurrent cell is made of.

    ``x_acc[g]`` and ``h_acc[g]`` name the accumulator that gate g's input and hidden part are added to;
    they differ only where a cell needs the two parts apart. ``forward(acc, h_prev, c_prev)`` returns
    (h, c, saved); ``backward(dh, dc, saved, h, h_prev, c_prev, c)`` returns (dacc, dh_prev, dc_prev), where
    dh_prev is only what reaches h_prev past the matmul. All tensors are [rows, H]; c is None for a cell
    without a cell state. ``has_direct`` tells whether dh_prev is ever more than zeros.
    """

    name: str
    mode: str
    gates: tuple[str, ...]
    accumulators: tuple[str, ...]
    x_acc: tuple[int, ...]
    h_acc: tuple[int, ...]
    saved: tuple[str, ...]
    has_cell_state: bool
    forward: Callable
    backward: Callable
    has_direct: bool = False


def _lstm_forward(acc: list[Tensor], h_prev: Tensor, c_prev: Tensor):
    i, f, g, o = acc[0].sigmoid(), acc[1].sigmoid(), acc[2].tanh(), acc[3].sigmoid()
    c = f * c_prev + i * g
    return o * c.tanh(), c, (i, f, g, o)


def _lstm_backward(dh, dc, saved, h, h_prev, c_prev, c):
    i, f, g, o = saved
    tanh_c = c.tanh()
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dacc = (
        dc * g * i * (1 - i),
        dc * c_prev * f * (1 - f),
        dc * i * (1 - g * g),
        dh * tanh_c * o * (1 - o),
    )
    return dacc, torch.zeros_like(dh), dc * f


def _gru_forward(acc, h_prev, c_prev):
    r, z = acc[0].sigmoid(), acc[1].sigmoid()
    n = (acc[2] + r * acc[3]).tanh()
    return n + z * (h_prev - n), None, (r, z, n, acc[3])


def _gru_backward(dh, dc, saved, h, h_prev, c_prev, c):
    r, z, n, nh = saved
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dr = dn * nh * r * (1 - r)
    return (dr, dz, dn, dn * r), dh * z, None


def _rnn_forward(activation):
    return lambda acc, h_prev, c_prev: (activation(acc[0]), None, ())


def _rnn_tanh_backward(dh, dc, saved, h, h_prev, c_prev, c):
    return (dh * (1 - h * h),), torch.zeros_like(dh), None


def _rnn_relu_backward(dh, dc, saved, h, h_prev, c_prev, c):
    return (torch.where(h <= 0, 0, dh),), torch.zeros_like(dh), None


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
            has_cell_state=True,
            forward=_lstm_forward,
            backward=_lstm_backward,
        ),
        Cell(
            name="gru",
            mode="GRU",
            gates=("r", "z", "n"),
            accumulators=("r", "z", "nx", "nh"),
            x_acc=(0, 1, 2),
            h_acc=(0, 1, 3),
            saved=("r", "z", "n", "nh"),
            has_cell_state=False,
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
                has_cell_state=False,
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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gate math, carried state and saved c: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
