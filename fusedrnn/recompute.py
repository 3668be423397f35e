"""The gradient of a sequence whose forward kept no gates: they are computed again, from h.

A long sequence goes piece by piece, against the order of its steps, so that the gates and the gate gradients of one
piece exist at a time. The idea of trading them for time is that of Chen et al., "Training deep nets with sublinear
memory cost", arXiv 1604.06174, 2016; here no step runs twice, since with every h kept all gates are one product.
"""

import dataclasses

import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.backends.common import Gradients, Inputs, previous, rows_of, started_from
from fusedrnn.cells import CELLS, accumulation_dtype

# In so many pieces goes a sequence of at least so many steps and bytes of gates.
PIECES, LEAST_STEPS, LEAST_BYTES = 8, 64, 16 << 20


def gates_of(cell: str, inputs: Inputs, y: Tensor, backend: str, algorithm: str) -> Tensor:
    """The gates that forward did not keep, from its output: one step whose batch is every row of the sequence."""
    rows, hidden = rows_of(inputs.x).shape[0], inputs.w_hh.shape[0] // len(CELLS[cell].gates)
    # No gate depends on c.
    c_prev = inputs.x.new_zeros(rows, hidden) if CELLS[cell].has_cell_state else None
    if algorithm not in ("auto", "step"):
        algorithm = "step" if "step" in ops.BACKEND_ALGORITHMS[backend] else "auto"
    one = inputs._replace(
        x=rows_of(inputs.x).unsqueeze(0),
        h0=started_from(inputs, y),
        c0=c_prev,
        batch_sizes=None,
        resets=None,
        reverse=False,
    )
    gates = ops.sequence(cell, *one.plain, backend, algorithm, True, False)[3]
    return gates.view(*inputs.x.shape[:-1], gates.shape[-1])


def gates_of_cell(call: ops.Call, inputs: Inputs, y: Tensor, every: list[Tensor]) -> Tensor:
    """The same for any cell, of which a gate may depend on other states than h: every one of them is given."""
    algorithm = call.algorithm
    if algorithm not in ("auto", "step"):
        algorithm = "step" if "step" in ops.BACKEND_ALGORITHMS[call.backend] else "auto"
    starts = [
        previous(start, rows_of(states), inputs.batch_sizes, inputs.reverse, inputs.resets).to(y.dtype)
        for start, states in zip(inputs.states0, every)
    ]
    one = inputs._replace(
        x=rows_of(inputs.x).unsqueeze(0),
        h0=started_from(inputs, y),
        c0=starts[0] if starts else None,
        others=tuple(starts[1:]),
        inputs=tuple(rows_of(t).unsqueeze(0) for t in inputs.inputs),
        batch_sizes=None,
        resets=None,
        reverse=False,
    )
    again = dataclasses.replace(call, algorithm=algorithm, reverse=False, keep_gates=True, keep_states=False)
    gates = ops.run(again, *ops.packed(one))[3]
    return gates.view(*inputs.x.shape[:-1], gates.shape[-1])


def gradient(
    cell: str,
    grads: Gradients,
    inputs: Inputs,
    y: Tensor,
    cells: Tensor,
    backend: str,
    algorithm: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """What ``ops.sequence_backward`` returns, without the gates that it takes."""
    steps = (inputs.x if inputs.batch_sizes is None else inputs.batch_sizes).shape[0]
    width = len(CELLS[cell].saved) * inputs.w_hh.shape[0] // len(CELLS[cell].gates)
    size = rows_of(inputs.x).shape[0] * width * inputs.x.element_size()
    # A compiled graph would hold every piece, and guards on their sizes.
    if torch.compiler.is_compiling() or steps < LEAST_STEPS or size < LEAST_BYTES:
        gates = gates_of(cell, inputs, y, backend, algorithm)
        return ops.sequence_backward(cell, *grads[:4], *inputs.plain, y, gates, cells, backend, algorithm, needs)
    return _in_pieces(cell, grads, inputs, y, cells, backend, algorithm, needs, steps)


def _in_pieces(cell, grads, inputs, y, cells, backend, algorithm, needs, steps):
    has_c, reverse = CELLS[cell].has_cell_state, inputs.reverse
    packed = inputs.batch_sizes is not None
    sizes = inputs.batch_sizes.tolist() if packed else None
    offsets = [0, *inputs.batch_sizes.cumsum(0).tolist()] if packed else None
    bounds = [steps * k // PIECES for k in range(PIECES + 1)]

    def batch_at(step: int) -> int:
        return sizes[step] if packed else inputs.h0.shape[0]

    def state(all_rows: Tensor, step: int, first: Tensor, count: int) -> Tensor:
        """A state of the first ``count`` sequences after ``step``; where others start from."""
        at = all_rows[offsets[step] : offsets[step + 1]] if packed else all_rows[step]
        at = at[:count].to(first.dtype)
        return at if at.shape[0] == count else torch.cat([at, first[at.shape[0] : count]])

    def joined(carried: Tensor | None, last: Tensor | None, count: int) -> Tensor | None:
        """The gradient of a piece's last states: carried from the next piece, for sequences that end here ``last``."""
        if carried is None:
            return last if last is None else last[:count]
        if carried.shape[0] == count:
            return carried
        rest = slice(carried.shape[0], count)
        ended = carried.new_zeros(count - carried.shape[0], *carried.shape[1:]) if last is None else last[rest]
        return torch.cat([carried, ended])

    dx, started, totals = [None] * PIECES, [], [None] * 8
    dh, dc = None, None
    order = range(PIECES) if reverse else range(PIECES - 1, -1, -1)
    for k in order:
        begin, end = bounds[k], bounds[k + 1]
        rows, count = slice(offsets[begin], offsets[end]) if packed else slice(begin, end), batch_at(begin)
        is_first, after = (k == PIECES - 1, end) if reverse else (k == 0, begin - 1)
        part = inputs._replace(
            x=inputs.x[rows],
            h0=inputs.h0[:count] if is_first else state(y, after, inputs.h0, count),
            batch_sizes=inputs.batch_sizes[begin:end] if packed else None,
            resets=None if inputs.resets is None else inputs.resets[rows],
        )
        if has_c:
            part = part._replace(c0=inputs.c0[:count] if is_first else state(cells, after, inputs.c0, count))
        part_grads = Gradients(
            None if grads.dy is None else grads.dy[rows],
            joined(dh if dh is None else dh[:count], grads.dh_n, count),
            joined(dc if dc is None else dc[:count], grads.dc_n, count) if has_c else None,
            None if grads.dcells is None else grads.dcells[rows],
        )
        gates = gates_of(cell, part, y[rows], backend, algorithm)
        part_needs = needs if is_first and not reverse else [needs[0], True, has_c, *needs[3:]]
        kept = y[rows], gates, cells[rows] if has_c else cells
        dx[k], dh, dc, *of_weights = ops.sequence_backward(
            cell, *part_grads[:4], *part.plain, *kept, backend, algorithm, part_needs
        )
        if reverse:  # sequences that end in this piece start in it
            alive = 0 if is_first else batch_at(end)
            started.append((dh[alive:], dc[alive:] if has_c else dc))
        for i, d in enumerate(of_weights, 3):
            if needs[i]:
                d = d.to(accumulation_dtype(d.dtype))
                totals[i] = d if totals[i] is None else totals[i] + d
    if reverse:
        dh, dc = (torch.cat(d) if d[0].dim() > 1 else d[0] for d in zip(*reversed(started)))
    totals[:3] = [torch.cat(dx) if needs[0] else None, dh if needs[1] else None, dc if needs[2] else None]
    return tuple(inputs.x.new_empty(0) if t is None else t.to(inputs.x.dtype) for t in totals)
