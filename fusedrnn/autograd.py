"""Autograd over the ops: the gradient is fused too, and its own gradient goes through the reference.

``RecurrenceFunction.backward`` applies ``RecurrenceBackwardFunction``, so a second derivative is asked of the
fused gradient's own backward, which differentiates the reference recurrence (to any order). Whether
anybody asks is not guessed from the grad mode, which is on inside every torch.func.grad.
"""

import inspect

import torch
from torch import Tensor

from fusedrnn import batching, ops
from fusedrnn import recompute as recomputing
from fusedrnn.backends import reference
from fusedrnn.backends.common import Gradients, Inputs
from fusedrnn.cells import CELLS

# Of Inputs, the first so many are differentiable.
_DIFFERENTIABLE = 8


class RecurrenceFunction(torch.autograd.Function):
    """One layer-direction sequence with its cell states and, without ``recompute``, its gates kept for the gradient.

    Takes the fields of Inputs, then cell, backend, algorithm, recompute, and ``states``: whether every c is an output
    that somebody may differentiate. Returns what the op returns.
    """

    @staticmethod
    def forward(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, cell, backend, algorithm,
        recompute, states,
    ):  # fmt: skip
        # Dynamo understands no forward(*arguments).
        inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse)
        return ops.sequence(cell, *inputs, backend, algorithm, not recompute, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, ctx.cell, ctx.backend, ctx.algorithm, ctx.recompute, states = inputs
        y, _, _, gates, cells = output
        ctx.states = states and CELLS[ctx.cell].has_cell_state
        ctx.mark_non_differentiable(gates, *(() if ctx.states else (cells,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _dgates, dcells):
        *tensors, y, gates, cells = ctx.saved_tensors
        if not CELLS[ctx.cell].has_cell_state:
            dc_n = None
        grads = (dy, dh_n, dc_n, dcells if ctx.states else None)
        if all(g is None for g in grads):
            return (None,) * 16
        needs = [t is not None and ctx.needs_input_grad[k] for k, t in enumerate(tensors[:_DIFFERENTIABLE])]
        # Nobody differentiates this without create_graph, and a Function takes longer than a small step's kernels.
        gradient = RecurrenceBackwardFunction
        found = (gradient.apply if torch.is_grad_enabled() else gradient.forward)(
            *grads, *tensors, ctx.reverse, y, gates, cells, ctx.cell, ctx.backend, ctx.algorithm, ctx.recompute, needs
        )
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 8)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.sequence(RecurrenceFunction.apply, 0, info, in_dims, *args)


class EagerRecurrenceFunction(torch.autograd.Function):
    """RecurrenceFunction where no transform of torch.func is on: without setup_context, for which torch binds the
    arguments by their signature at every call, and that takes longer than a small step's kernels.
    """

    @staticmethod
    def forward(ctx, *arguments):
        outputs = RecurrenceFunction.forward(*arguments)
        RecurrenceFunction.setup_context(ctx, arguments, outputs)
        return outputs

    backward = RecurrenceFunction.backward


class RecurrenceBackwardFunction(torch.autograd.Function):
    """The fused gradient. Differentiable in the output gradients and in the inputs of the forward.

    Takes the fields of Gradients, Inputs and Saved, then cell, backend, algorithm, recompute, needs.
    """

    @staticmethod
    def forward(
        dy, dh_n, dc_n, dcells, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, y, gates, cells,
        cell, backend, algorithm, recompute, needs,
    ):  # fmt: skip
        inputs = Inputs(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse)
        if recompute and CELLS[cell].saved:
            grads = Gradients(dy, dh_n, dc_n, dcells)
            return recomputing.gradient(cell, grads, inputs, y, cells, backend, algorithm, needs)
        return ops.sequence_backward(cell, dy, dh_n, dc_n, dcells, *inputs, y, gates, cells, backend, algorithm, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, _y, _gates, _cells, ctx.cell, _, _, _, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        *given, batch_sizes, resets = ctx.saved_tensors
        outputs_grads, inputs = given[:4], given[4:]
        present = [k for k, t in enumerate(inputs) if t is not None]
        wanted = [k for k in present if ctx.needs[k]]
        arrived = [k for k, g in enumerate(outputs_grads) if g is not None]
        if all(grads[k] is None for k in wanted):
            return (None,) * 23

        def recurrence(*tensors: Tensor):
            args: list[Tensor | None] = [None] * _DIFFERENTIABLE
            for k, t in zip(present, tensors, strict=True):
                args[k] = t
            y, h_n, c_n, _, cells = reference.recurrence(
                CELLS[ctx.cell], Inputs(*args, batch_sizes, resets, ctx.reverse)
            )
            outputs = (y, h_n, c_n, None if cells is None else cells.view(*y.shape[:-1], -1))
            return tuple(outputs[k] for k in arrived)

        def gradient(*tensors: Tensor):
            _, pullback = torch.func.vjp(recurrence, *tensors[len(arrived) :])
            found = dict(zip(present, pullback(tensors[: len(arrived)]), strict=True))
            return tuple(found[k] for k in wanted)

        primals = (*(outputs_grads[k] for k in arrived), *(inputs[k] for k in present))
        _, pullback = torch.func.vjp(gradient, *primals)
        cotangents = tuple(torch.zeros_like(inputs[k]) if grads[k] is None else grads[k] for k in wanted)
        second = pullback(cotangents)
        result: list[Tensor | None] = [None] * 23
        for place, g in zip([*arrived, *(4 + k for k in present)], second, strict=True):
            result[place] = g if ctx.needs_input_grad[place] else None
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.sequence_backward(RecurrenceBackwardFunction.apply, 0, info, in_dims, *args)


for _function in (RecurrenceFunction, RecurrenceBackwardFunction):
    # Function.apply asks for it at every call, and to work it out takes longer than a small step's kernels.
    _function.forward.__signature__ = inspect.signature(_function.forward)
