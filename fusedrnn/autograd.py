"""Autograd over the ops: the gradient is fused too, and its own gradient goes through the reference.

``RecurrenceFunction.backward`` applies ``RecurrenceBackwardFunction``, so a second derivative is asked of the
fused gradient's own backward, which differentiates the reference recurrence (to any order). Whether
anybody asks is not guessed from the grad mode, which is on inside every torch.func.grad.
"""

import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.backends import reference


class RecurrenceFunction(torch.autograd.Function):
    """One layer-direction sequence with its gates and cell states kept for the gradient."""

    @staticmethod
    def forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, cell, reverse, backend, algorithm):
        return ops.sequence(
            cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, backend, algorithm, True
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.cell, ctx.reverse, ctx.backend, ctx.algorithm = inputs
        y, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, cells)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _dgates, _dcells):
        *inputs, batch_sizes, y, gates, cells = ctx.saved_tensors
        if inputs[2] is None:
            dc_n = None
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 13
        needs = [t is not None and ctx.needs_input_grad[k] for k, t in enumerate(inputs)]
        grads = RecurrenceBackwardFunction.apply(
            dy, dh_n, dc_n, *inputs, batch_sizes, y, gates, cells, ctx.cell, ctx.reverse, ctx.backend,
            ctx.algorithm, needs,
        )  # fmt: skip
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None)


class RecurrenceBackwardFunction(torch.autograd.Function):
    """The fused gradient. Differentiable in the output gradients and in the inputs of the forward."""

    @staticmethod
    def forward(
        dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, y, gates, cells, cell, reverse,
        backend, algorithm, needs,
    ):  # fmt: skip
        return ops.sequence_backward(
            cell, dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, gates, cells, batch_sizes,
            reverse, backend, algorithm, needs,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _y, _gates, _cells, ctx.cell, ctx.reverse, _, _, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        *given, batch_sizes = ctx.saved_tensors
        outputs_grads, inputs = given[:3], given[3:]
        present = [k for k, t in enumerate(inputs) if t is not None]
        wanted = [k for k in present if ctx.needs[k]]
        arrived = [k for k, g in enumerate(outputs_grads) if g is not None]
        if all(grads[k] is None for k in wanted):
            return (None,) * 20

        def recurrence(*tensors: Tensor):
            args: list[Tensor | None] = [None] * 8
            for k, t in zip(present, tensors, strict=True):
                args[k] = t
            y, h_n, c_n, _, _ = reference.recurrence(ctx.cell, *args, batch_sizes, ctx.reverse)
            outputs = (y, h_n, c_n)
            return tuple(outputs[k] for k in arrived)

        def gradient(*tensors: Tensor):
            _, pullback = torch.func.vjp(recurrence, *tensors[len(arrived) :])
            found = dict(zip(present, pullback(tensors[: len(arrived)]), strict=True))
            return tuple(found[k] for k in wanted)

        primals = (*(outputs_grads[k] for k in arrived), *(inputs[k] for k in present))
        _, pullback = torch.func.vjp(gradient, *primals)
        cotangents = tuple(torch.zeros_like(inputs[k]) if grads[k] is None else grads[k] for k in wanted)
        second = pullback(cotangents)
        result: list[Tensor | None] = [None] * 20
        for place, g in zip([*arrived, *(3 + k for k in present)], second, strict=True):
            result[place] = g if ctx.needs_input_grad[place] else None
        return tuple(result)
