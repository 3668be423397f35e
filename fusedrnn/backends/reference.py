"""The reference backend: plain torch, any dtype and device. The oracle of the tests.

Math is done in float32 (float64 for float64); only what a kernel stores is rounded to the dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrnn.backends.common import (
    Gradients,
    Inputs,
    Saved,
    is_multiplied,
    previous,
    rows_of,
    step_rows,
    weight_gradients,
)
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


def rounded_rows(x: Tensor) -> Tensor:
    """Rows [..., K] rounded to 8 bits: each to multiples of 1/127 of its largest |x|, half to even (csrc/cpu/digits.h);
    one that is not finite as it is.
    """
    if x.shape[-1] == 0:
        return x
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.full_like(largest, 127) / largest  # 127 / largest is 127 times the reciprocal in torch
    return torch.where(largest.isfinite(), (x * scale).round() * (largest / 127), x)


def input_gates(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, rounds: bool = False) -> Tensor:
    """The input projection of all rows at once, [N, G*H]; ``rounds``: of rows rounded to 8 bits."""
    x = rounded_rows(x) if rounds else x
    gates = x if is_multiplied(x, w_ih) else product(x, w_ih.t())
    return gates if b_ih is None else gates + b_ih


def recurrent(h: Tensor, w_hh: Tensor, heads: int, backward: bool = False) -> Tensor:
    """h [rows, P] W_hh^T, [rows, G*H]; ``backward``: the gates' gradients [rows, G*H] W_hh. Heads are apart."""
    if heads == 1:
        return product(h, w_hh if backward else w_hh.t())
    rows, units = h.shape[0], w_hh.shape[1]
    # [heads, G * units, units]
    w = w_hh.view(-1, heads, units, units).transpose(0, 1).flatten(1, 2)
    if backward:
        d = h.view(rows, -1, heads, units).permute(2, 0, 1, 3).flatten(2)
        return product(d, w).transpose(0, 1).reshape(rows, heads * units)
    gates = product(h.view(rows, heads, units).transpose(0, 1), w.transpose(1, 2))
    return gates.view(heads, rows, -1, units).permute(1, 2, 0, 3).reshape(rows, -1)


def advance(
    cell: Cell,
    states: Sequence[Tensor],
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    parameters: tuple[Tensor, ...],
    given: tuple[Tensor, ...],
    heads: int,
    rounds: bool = False,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """One step: the states after it, h in the dtype it came in, and what is saved; all else in the accumulation dtype.

    No size of the batch is asked for, so that a traced step is good for every batch.
    """
    hidden = w_hh.shape[0] // len(cell.gates)
    h = states[0].to(w_hh.dtype)
    gx = gates_x.split(hidden, 1)
    gh = recurrent(rounded_rows(h) if rounds else h, w_hh, heads)
    gh = (gh if b_hh is None else gh + b_hh).split(hidden, 1)
    acc: list = [None] * len(cell.accumulators)
    for part, slots in ((gx, cell.x_acc), (gh, cell.h_acc)):
        for gate, slot in zip(part, slots, strict=True):
            acc[slot] = gate if acc[slot] is None else acc[slot] + gate
    (h, *others), saved = cell.forward(acc, (h, *states[1:]), parameters, given)
    return [(h if w_hr is None else product(h, w_hr.t())).to(states[0].dtype), *others], saved


def recurrence(
    cell: Cell, inputs: Inputs, rounds: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    """One direction of one layer, differentiable to any order; ``rounds``: rows of x and h are rounded to 8 bits.

    Returns y, h_n, the other final states, saved gates [N, S*H] (empty without) and every other state, [N, H] each.
    """
    x, h0, _, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse = inputs.plain
    dtype, acc_dtype = x.dtype, accumulation_dtype(x.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if t is None else t.to(acc_dtype) for t in (w_ih, w_hh, b_ih, b_hh, w_hr))
    starts = (h0, *(t.to(acc_dtype) for t in inputs.states0))
    parameters = tuple(t.to(acc_dtype) for t in inputs.parameters)
    given = [rows_of(t).to(acc_dtype) for t in inputs.inputs]
    gates_x = input_gates(rows_of(x).to(acc_dtype), w_ih, b_ih, rounds)

    rows = step_rows(x, batch_sizes)
    cut = None if resets is None else resets.reshape(-1, 1)
    order = range(len(rows) - 1, -1, -1) if reverse else range(len(rows))
    first = rows[order[0]][1]
    states = [start[:first] for start in starts]
    ended: list[list[Tensor]] = [[] for _ in starts]
    every: list[list] = [[None] * len(rows) for _ in starts]
    saves: list = [None] * len(rows)
    for t in order:
        offset, size = rows[t]
        at = slice(offset, offset + size)
        states = [_fit(*of_state, size) for of_state in zip(states, starts, ended)]
        if cut is not None:
            states = [state.masked_fill(cut[at], 0) for state in states]
        given_here = tuple(i[at] for i in given)
        states, saved = advance(
            cell, states, gates_x[at], w_hh, b_hh, w_hr, parameters, given_here, inputs.heads, rounds
        )
        for all_steps, state in zip(every, states):
            all_steps[t] = state
        saves[t] = torch.cat(saved, 1).to(dtype) if saved else None
    y, *every_other = (torch.cat(all_steps) for all_steps in every)
    h_n, *finals = (_join(*of_state) for of_state in zip(states, ended))
    return (
        y.view(*x.shape[:-1], h0.shape[1]),
        h_n,
        tuple(t.to(dtype) for t in finals),
        torch.cat(saves) if cell.saved else x.new_empty(0),
        tuple(every_other),
    )


def forward(cell: Cell, inputs: Inputs, algorithm: str, keep_gates: bool, keep_cells: bool) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence``."""
    y, h_n, finals, gates, every = recurrence(cell, inputs, algorithm == "int8")
    x = inputs.x
    steps = x.shape[:-1]
    keep_gates, keep_cells = keep_gates and bool(cell.saved), keep_cells and cell.has_cell_state
    # The op's outputs may not alias each other or its inputs.
    finals = [t.clone() for t in finals]
    every = [t.view(*steps, t.shape[1]) for t in every] if keep_cells else []
    return (
        y,
        h_n.clone(),
        finals[0] if finals else x.new_empty(0),
        gates.view(*steps, gates.shape[1]) if keep_gates else x.new_empty(0),
        every[0] if every else x.new_empty(0, dtype=accumulation_dtype(x.dtype)),
        *finals[1:],
        *every[1:],
    )


def backward(
    cell: Cell, grads: Gradients, inputs: Inputs, saved: Saved, algorithm: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence_backward``."""
    x, h0, _, _, w_hh, _, _, w_hr, batch_sizes, resets, reverse = inputs.plain
    dtype, acc_dtype = x.dtype, accumulation_dtype(x.dtype)
    hidden = w_hh.shape[0] // len(cell.gates)
    rows = step_rows(x, batch_sizes)
    y_rows = rows_of(saved.y)
    gates = [s.to(acc_dtype) for s in rows_of(saved.gates).split(hidden, 1)] if cell.saved else []
    cut = None if resets is None else resets.reshape(-1, 1)
    parameters = tuple(t.to(acc_dtype) for t in inputs.parameters)
    given = [rows_of(t).to(acc_dtype) for t in inputs.inputs]
    every = [rows_of(t) for t in ((saved.cells, *saved.others) if cell.has_cell_state else ())]
    prev = [
        previous(start, states, batch_sizes, reverse, resets).to(acc_dtype)
        for start, states in zip((h0, *inputs.states0), (y_rows, *every), strict=True)
    ]
    # Only the LSTM has a projection.
    h = y_rows.to(acc_dtype) if w_hr is None else gates[-1] * every[0].tanh()
    after = [h, *every]

    def zeros_or(t: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=acc_dtype) if t is None else t.to(acc_dtype)

    starts = [
        zeros_or(t, like)
        for t, like in zip((grads.dh_n, grads.dc_n, *grads.dothers_n)[: len(after)], (h0, *inputs.states0), strict=True)
    ]
    more = [
        None if t is None else rows_of(t).to(acc_dtype) for t in (grads.dy, grads.dcells, *grads.dothers)[: len(after)]
    ]
    w_hh_acc = w_hh.to(acc_dtype)
    w_hr_acc = None if w_hr is None else w_hr.to(acc_dtype)

    order = range(len(rows)) if reverse else range(len(rows) - 1, -1, -1)
    first = rows[order[0]][1]
    d = [start[:first] for start in starts]
    ended: list[list[Tensor]] = [[] for _ in starts]
    dgates: list = [None] * len(rows)
    dy_total: list = [None] * len(rows)
    dgiven: list = [None] * len(rows)
    for t in order:
        offset, size = rows[t]
        at = slice(offset, offset + size)
        d = [_fit(*of_state, size) for of_state in zip(d, starts, ended)]
        d = [one if add is None else one + add[at] for one, add in zip(d, more, strict=True)]
        dy_total[t] = d[0]
        if w_hr_acc is not None:
            d[0] = product(d[0], w_hr_acc)
        dacc, dprev, dparameters, dinputs = cell.backward(
            tuple(d),
            [s[at] for s in gates],
            tuple(state[at] for state in after),
            tuple(state[at] for state in prev),
            parameters,
            tuple(i[at] for i in given),
        )
        dgates[t] = torch.cat(dacc, 1).to(dtype)
        dgiven[t] = [one.to(dtype) for one in (*dparameters, *dinputs)]
        through = torch.cat([dacc[a] for a in cell.h_acc], 1).to(dtype).to(acc_dtype)
        through = recurrent(through, w_hh_acc, inputs.heads, backward=True)
        d = [through if w_hr_acc is not None else dprev[0] + through, *dprev[1:]]
        if cut is not None:
            d = [one.masked_fill(cut[at], 0) for one in d]
    dh0, *dothers = (_join(*of_state).to(dtype) for of_state in zip(d, ended))
    dgiven = [torch.cat(steps) for steps in zip(*dgiven)]
    return weight_gradients(
        cell,
        inputs,
        saved.y,
        torch.cat(dgates),
        None if w_hr is None else h.to(dtype),
        None if w_hr is None else torch.cat(dy_total).to(dtype),
        needs,
        dh0,
        dothers[0] if dothers else dh0.new_empty(0),
        dothers[1:],
        dgiven[: len(parameters)],
        dgiven[len(parameters) :],
    )
