"""The reference backend: plain torch, any dtype and device. The oracle of the tests.

Math is done in float32 (float64 for float64); only what a kernel stores is rounded to the dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrnn.backends.common import Gradients, Inputs, Saved, previous, rows_of, step_rows, weight_gradients
from fusedrnn.cells import Cell, accumulation_dtype


def _fit(state: Tensor, start: Tensor, ended: list[Tensor], rows: int) -> Tensor:
    """``state`` cut or grown to ``rows``: rows that end go to ``ended``, rows that join come from ``start``."""
    have = state.shape[0]
    if have > rows:
        ended.append(state[rows:])
        return state[:rows]
    if have < rows:
        return torch.cat([state, start[have:rows]])
    return state


def _join(state: Tensor, ended: list[Tensor]) -> Tensor:
    return torch.cat([state, *reversed(ended)]) if ended else state


# The tests put rounded operands (tf32) and a rounded result (a GEMM beforehand) in place of these two.
product = torch.matmul


def input_gates(x: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
    """The input projection of all rows at once, [N, G*H]."""
    gates = product(x, w_ih.t())
    return gates if b_ih is None else gates + b_ih


def recurrence(cell: Cell, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """One direction of one layer, differentiable to any order.

    Returns y, h_n, c_n, saved gates [N, S*H] and cells [N, H] (the last two in rows, None without a c).
    """
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse = inputs
    dtype, acc_dtype = x.dtype, accumulation_dtype(x.dtype)
    up = [None if t is None else t.to(acc_dtype) for t in (c0, w_ih, w_hh, b_ih, b_hh, w_hr)]
    c_start, w_ih, w_hh, b_ih, b_hh, w_hr = up
    hidden = w_hh.shape[0] // len(cell.gates)
    gates_x = input_gates(rows_of(x).to(acc_dtype), w_ih, b_ih)

    rows = step_rows(x, batch_sizes)
    cut = None if resets is None else resets.reshape(-1, 1)
    order = range(len(rows) - 1, -1, -1) if reverse else range(len(rows))
    first = rows[order[0]][1]
    h, c = h0[:first], None if c_start is None else c_start[:first]
    h_ended: list[Tensor] = []
    c_ended: list[Tensor] = []
    ys: list = [None] * len(rows)
    cs: list = [None] * len(rows)
    saves: list = [None] * len(rows)
    for t in order:
        offset, size = rows[t]
        h = _fit(h, h0, h_ended, size)
        c = None if c is None else _fit(c, c_start, c_ended, size)
        if cut is not None:
            h = h.masked_fill(cut[offset : offset + size], 0)
            c = None if c is None else c.masked_fill(cut[offset : offset + size], 0)
        gx = gates_x[offset : offset + size].split(hidden, 1)
        gh = product(h.to(acc_dtype), w_hh.t())
        gh = (gh if b_hh is None else gh + b_hh).split(hidden, 1)
        acc: list = [None] * len(cell.accumulators)
        for part, slots in ((gx, cell.x_acc), (gh, cell.h_acc)):
            for gate, slot in zip(part, slots, strict=True):
                acc[slot] = gate if acc[slot] is None else acc[slot] + gate
        (h, *others), saved = cell.forward(acc, (h.to(acc_dtype), *(() if c is None else (c,))), (), ())
        c = others[0] if others else None
        h = (h if w_hr is None else product(h, w_hr.t())).to(dtype)
        ys[t], cs[t], saves[t] = h, c, torch.cat(saved, 1).to(dtype) if saved else None
    y = torch.cat(ys).view(*x.shape[:-1], h0.shape[1])
    return (
        y,
        _join(h, h_ended),
        None if c is None else _join(c, c_ended).to(dtype),
        torch.cat(saves) if cell.saved else x.new_empty(0),
        None if c is None else torch.cat(cs),
    )


def forward(
    cell: Cell, inputs: Inputs, algorithm: str, keep_gates: bool, keep_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the op ``fusedrnn::sequence``."""
    y, h_n, c_n, gates, cells = recurrence(cell, inputs)
    x = inputs.x
    steps = x.shape[:-1]
    keep_gates, keep_cells = keep_gates and bool(cell.saved), keep_cells and cell.has_cell_state
    # The op's outputs may not alias each other or its inputs.
    return (
        y,
        h_n.clone(),
        x.new_empty(0) if c_n is None else c_n.clone(),
        gates.view(*steps, gates.shape[1]) if keep_gates else x.new_empty(0),
        cells.view(*steps, cells.shape[1]) if keep_cells else x.new_empty(0, dtype=accumulation_dtype(x.dtype)),
    )


def backward(
    cell: Cell, grads: Gradients, inputs: Inputs, saved: Saved, algorithm: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence_backward``."""
    x, h0, c0, _, w_hh, _, _, w_hr, batch_sizes, resets, reverse = inputs
    dy, dh_n, dc_n, dcells = grads
    dtype, acc_dtype = x.dtype, accumulation_dtype(x.dtype)
    hidden = w_hh.shape[0] // len(cell.gates)
    rows = step_rows(x, batch_sizes)
    y_rows = rows_of(saved.y)
    gates = [s.to(acc_dtype) for s in rows_of(saved.gates).split(hidden, 1)] if cell.saved else []
    h_prev = previous(h0, y_rows, batch_sizes, reverse, resets).to(acc_dtype)
    cut = None if resets is None else resets.reshape(-1, 1)
    c = c_prev = h = None
    if cell.has_cell_state:
        c = rows_of(saved.cells)
        c_prev = previous(c0, c, batch_sizes, reverse, resets)
    if w_hr is not None:
        h = gates[-1] * c.tanh()  # only the LSTM has a projection
    else:
        h = y_rows.to(acc_dtype)

    def zeros_or(t: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=acc_dtype) if t is None else t.to(acc_dtype)

    dy_rows = zeros_or(None if dy is None else rows_of(dy), y_rows)
    dh_start = zeros_or(dh_n, h0)
    dc_start = zeros_or(dc_n, c0) if cell.has_cell_state else None
    dc_rows = None if dcells is None else rows_of(dcells)
    w_hh_acc = w_hh.to(acc_dtype)
    w_hr_acc = None if w_hr is None else w_hr.to(acc_dtype)

    order = range(len(rows)) if reverse else range(len(rows) - 1, -1, -1)
    first = rows[order[0]][1]
    dh, dc = dh_start[:first], None if dc_start is None else dc_start[:first]
    dh_ended: list[Tensor] = []
    dc_ended: list[Tensor] = []
    dgates: list = [None] * len(rows)
    dy_total: list = [None] * len(rows)
    for t in order:
        offset, size = rows[t]
        at = slice(offset, offset + size)
        dh = _fit(dh, dh_start, dh_ended, size) + dy_rows[at]
        dc = None if dc is None else _fit(dc, dc_start, dc_ended, size)
        if dc_rows is not None:
            dc = dc + dc_rows[at]
        dy_total[t] = dh
        if w_hr_acc is not None:
            dh = product(dh, w_hr_acc)
        has_c = dc is not None
        dacc, (dh, *others), _, _ = cell.backward(
            (dh, dc) if has_c else (dh,),
            [s[at] for s in gates],
            (h[at], c[at]) if has_c else (h[at],),
            (h_prev[at], c_prev[at]) if has_c else (h_prev[at],),
            (),
            (),
        )
        dc = others[0] if has_c else None
        dgates[t] = torch.cat(dacc, 1).to(dtype)
        through = product(torch.cat([dacc[a] for a in cell.h_acc], 1).to(dtype).to(acc_dtype), w_hh_acc)
        dh = through if w_hr_acc is not None else dh + through
        if cut is not None:
            dh = dh.masked_fill(cut[at], 0)
            dc = None if dc is None else dc.masked_fill(cut[at], 0)
    return weight_gradients(
        cell,
        inputs,
        saved.y,
        torch.cat(dgates),
        None if w_hr is None else h.to(dtype),
        None if w_hr is None else torch.cat(dy_total).to(dtype),
        needs,
        _join(dh, dh_ended).to(dtype),
        dh.new_empty(0) if dc is None else _join(dc, dc_ended).to(dtype),
    )
