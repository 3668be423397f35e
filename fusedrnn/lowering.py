"""The op in operations of torch alone, for runtimes that have no fusedrnn: ``ep.run_decompositions(decompositions())``.

A length that the program fixes is unrolled, as torch does with its own layers; one that is dynamic becomes a
``torch.ops.higher_order.scan`` of one step. The math of a step is the reference backend's.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.backends import reference
from fusedrnn.backends.common import Inputs
from fusedrnn.cells import CELLS, Cell, accumulation_dtype


def decompositions() -> dict[Callable, Callable]:
    """What ``torch.export.ExportedProgram.run_decompositions`` makes of the op ``fusedrnn::sequence``.

    ``torch.export.default_decompositions()`` lowers torch's own operations: its ``update`` takes this table.

    Raises, where it is used:
        RuntimeError: the program calls the op on packed data.
    """
    return {ops.sequence_op: _sequence}


def _sequence(*arguments):
    inputs, _, algorithm, keep_gates, keep_states = ops._of_sequence(arguments)
    rounds = algorithm == ops.INT8
    cell = CELLS[arguments[0]]
    if inputs.batch_sizes is not None:
        raise RuntimeError("a packed sequence has no steps of one size: export the padded batch with lengths=")
    algorithm = algorithm if rounds else "auto"
    ops.check_sequence(cell.name, inputs, "reference", algorithm)
    if isinstance(inputs.x.shape[0], int):
        outputs = reference.forward(cell, inputs, algorithm, keep_gates, keep_states)
    else:
        outputs = _scanned(cell, inputs, rounds, keep_gates, keep_states)
    return ops._outputs(inputs, keep_states, *outputs)


def _scanned(cell: Cell, inputs: Inputs, rounds: bool, keep_gates: bool, keep_states: bool) -> tuple[Tensor, ...]:
    """What the reference backend's forward returns, of any number of steps."""
    x, resets, keep_gates = inputs.x, inputs.resets, keep_gates and bool(cell.saved)
    wide = accumulation_dtype(x.dtype)
    # The states but h are carried unrounded.
    start = [inputs.h0, *(t.to(wide) for t in inputs.states0)]
    steps = [x, *inputs.inputs, *([] if resets is None else [resets])]
    if inputs.reverse:
        steps = [t.flip(0) for t in steps]
    weights = [inputs.w_ih, inputs.w_hh, inputs.b_ih, inputs.b_hh, inputs.w_hr]
    fixed = tuple(w for w in (*weights, *inputs.parameters) if w is not None)

    def one_step(*tensors):
        found = iter(tensors)
        states = list(itertools.islice(found, len(start)))
        x, *given = itertools.islice(found, len(steps))
        if resets is not None:
            cut = given.pop().unsqueeze(1)
            states = [state.masked_fill(cut, 0) for state in states]
        w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else next(found).to(wide) for w in weights)
        gates_x = reference.input_gates(x.to(wide), w_ih, b_ih, rounds)
        parameters, given = tuple(t.to(wide) for t in found), tuple(t.to(wide) for t in given)
        states, saved = reference.advance(
            cell, states, gates_x, w_hh, b_hh, w_hr, parameters, given, inputs.heads, rounds
        )
        gates = [torch.cat(saved, 1).to(x.dtype)] if keep_gates else []
        # No output may be in another one's memory.
        return [*(t.clone() for t in states), states[0].clone(), *gates, *(t.clone() for t in states[1:])]

    found = list(torch.ops.higher_order.scan(one_step, start, steps, fixed))
    h_n, *finals = found[: len(start)]
    y, *kept = (t.flip(0) if inputs.reverse else t for t in found[len(start) :])
    gates = kept.pop(0) if keep_gates else x.new_empty(0)
    finals = [t.to(x.dtype) for t in finals]
    every = kept if keep_states and kept else []
    nothing, no_cells = x.new_empty(0), x.new_empty(0, dtype=wide)
    return (
        y,
        h_n,
        finals[0] if finals else nothing,
        gates,
        every[0] if every else no_cells,
        *finals[1:],
        *every[1:],
    )
