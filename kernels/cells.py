"""The cells: pointwise forward and backward on float32 (float64 for float64) blocks of any one shape."""

from typing import NamedTuple

from . import printed


class CellKernels(NamedTuple):
    """A cell's pointwise functions; its sizes are in fusedrnn.cells.

    forward: (accumulators, states before, parameters, inputs) -> states, saved.
    backward: (gradients of the states, saved, states, states before, parameters, inputs) -> gradients of the
    accumulators, of the states before (of h only what does not pass the matmul), of parameters and inputs.
    All of these are tuples of blocks; the states begin with h.
    """

    forward: object
    backward: object
    backward_uses_h: bool  # or h_prev
    has_direct: bool  # h_prev has a gradient past the matmul


KERNELS = {name: CellKernels(**found) for name, found in printed.KERNELS.items()}
