"""The op in operations of torch alone, for runtimes that have no fusedrnn: ``ep.run_decompositions(decompositions())``.

A length that the program fixes is unrolled, as torch does with its own layers; one that is dynamic becomes a
``torch.ops.higher_order.scan`` of one step. The math of a step is the reference backend's.
"""

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
    inputs, _, _, keep_gates, keep_states = ops._of_sequence(arguments)
    cell = CELLS[arguments[0]]
    if inputs.batch_sizes is not None:
        raise RuntimeError("a packed sequence has no steps of one size: export the padded batch with lengths=")
    ops.check_sequence(cell.name, inputs, "reference", "auto")
    if isinstance(inputs.x.shape[0], int):
        outputs = reference.forward(cell, inputs, "auto", keep_gates, keep_states)
    else:
        outputs = _scanned(cell, inputs, keep_gates, keep_states)
    return ops._outputs(inputs, keep_states, *outputs)


def _scanned(cell: Cell, inputs: Inputs, keep_gates: bool, keep_cells: bool) -> tuple[Tensor, ...]:
    """What the reference backend's forward returns, of any number of steps."""
    x, h0, c0, *weights, _, resets, reverse = inputs
    has_c = c0 is not None
    present = [w for w in weights if w is not None]

    def combine(*tensors):
        tensors = list(tensors)
        h, c = tensors.pop(0), tensors.pop(0) if has_c else None
        step, cut = tensors.pop(0), tensors.pop(0) if resets is not None else None
        given = iter(tensors)
        own = [None if w is None else next(given) for w in weights]
        cut = None if cut is None else cut.unsqueeze(0)
        y, h, _, gates, cells = reference.recurrence(cell, Inputs(step.unsqueeze(0), h, c, *own, None, cut, False))
        # c is carried unrounded. No output may be another one's memory.
        found = [h.clone(), *([cells.clone()] if has_c else []), y.squeeze(0).clone()]
        return [*found, *([gates] if keep_gates and cell.saved else []), *([cells.clone()] if has_c else [])]

    steps = [t.flip(0) if reverse else t for t in (x, *(() if resets is None else (resets,)))]
    start = [h0, *([c0.to(accumulation_dtype(x.dtype))] if has_c else [])]
    found = list(torch.ops.higher_order.scan(combine, start, steps, tuple(present)))
    h_n, c_n = found.pop(0), found.pop(0).to(x.dtype) if has_c else x.new_empty(0)
    y, *kept = (t.flip(0) if reverse else t for t in found)
    gates = kept.pop(0) if keep_gates and cell.saved else x.new_empty(0)
    cells = kept.pop(0) if has_c and keep_cells else x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    return y, h_n, c_n, gates, cells
