"""Autograd over the ops: the gradient is fused too, and its own gradient goes through the reference.

``RecurrenceFunction.backward`` applies ``RecurrenceBackwardFunction``, so a second derivative is asked of the
fused gradient's own backward, which differentiates the reference recurrence (to any order). Whether
anybody asks is not guessed from the grad mode, which is on inside every torch.func.grad.
"""

import dataclasses
import inspect

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import _build, batching, ops
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
        if _changed(ctx):
            y = None
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


def _watch(ctx, y: Tensor) -> None:
    """Keeps what counts the changes of y, and does not hold its memory."""
    ctx.watch = y.detach()
    ctx.watch.data = ctx.watch.new_empty(0)
    ctx.version = y._version


def _changed(ctx) -> bool:
    """Whether y was changed in place since ``_watch``."""
    watch = getattr(ctx, "watch", None)
    return watch is not None and watch._version != ctx.version


class EagerRecurrenceFunction(torch.autograd.Function):
    """RecurrenceFunction where no transform of torch.func is on: without setup_context, for which torch binds the
    arguments by their signature at every call, and that takes longer than a small step's kernels.

    The y that is returned is another tensor in the memory of the one that is saved: changing it in place is no error,
    y is computed again then.
    """

    @staticmethod
    def forward(ctx, *arguments):
        outputs = RecurrenceFunction.forward(*arguments)
        RecurrenceFunction.setup_context(ctx, arguments, outputs)
        y, *others = outputs
        y = y.data
        _watch(ctx, y)
        return y, *others

    backward = RecurrenceFunction.backward


def recorded(*arguments):
    """The outputs of the op, for autograd; takes what RecurrenceFunction takes."""
    if torch.compiler.is_compiling():
        return RecurrenceFunction.apply(*arguments)
    if torch._C._functorch.peek_interpreter_stack() is None:
        return EagerRecurrenceFunction.apply(*arguments)
    y, *others = RecurrenceFunction.apply(*arguments)
    return y.clone(), *others  # so that it may be changed in place


class CallFunction(torch.autograd.Function):
    """A call of a Cell, or of one sequence of a layer, that ``_C`` has computed (csrc/module.cpp).

    Takes the cell, whether the batch comes first, reverse, heads, what ``_C`` answered, then the tensors of
    :func:`ops.differentiable` in the shapes of the module; no state is zeros.
    """

    @staticmethod
    def forward(ctx, cell, batch_first, reverse, heads, found, *tensors):
        kept = max(3, 1 + len(CELLS[cell].states))
        results = found[:-kept]
        ctx.cell, ctx.batch_first, ctx.reverse, ctx.heads, ctx.watch = cell, batch_first, reverse, heads, None
        if tensors[0].dim() == 3:
            _watch(ctx, results[0])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *found[-kept:])
        return tuple(results) if len(results) > 1 else results[0]

    @staticmethod
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[5:]
        if not torch.is_grad_enabled() and forward_ad._current_level < 0 and not _changed(ctx):
            options = ctx.cell, ctx.batch_first, ctx.reverse, ctx.heads
            found = _build._small_calls.backward(*options, grads, saved, needs)
            if found is not None:
                return *(None,) * 5, *found
        return *(None,) * 5, *_gradients_of_call(ctx, grads, saved, needs)


def _gradients_of_call(ctx, grads, saved, needs) -> list[Tensor | None]:
    """What CallFunction.backward returns, by the Function of the gradient."""
    cell, others = CELLS[ctx.cell], max(len(CELLS[ctx.cell].states) - 2, 0)
    tensors, (y, *kept) = saved[: len(needs)], saved[len(needs) :]
    dy, dh, dc, *dothers = (*([None] if tensors[0].dim() < 3 else []), *grads, None)[: 3 + others]
    x, y = _with_dims(tensors[0], 3), None if _changed(ctx) else y
    if ctx.batch_first:
        x, dy = x.transpose(0, 1), None if dy is None else dy.transpose(0, 1)
    hidden, out = tensors[4].shape[0] // len(cell.gates), tensors[4].shape[1] * ctx.heads
    states = [tensors[k] for k in (1, *((2,) if cell.has_cell_state else ()), *range(8, 8 + others))]
    sizes = out, *(hidden,) * len(states)
    states = [x.new_zeros(x.shape[1], n) if t is None else _with_dims(t, 2) for t, n in zip(states, sizes)]
    h0, c0, *others0 = (*states, None)[: 2 + others]
    dh, dc, *dothers = (None if d is None else _with_dims(d, 2) for d in (dh, dc, *dothers))
    own = tuple(tensors[8 + others :])
    own = own[: len(cell.parameters)], own[len(cell.parameters) :]
    inputs = Inputs(x, h0, c0, *tensors[3:8], None, None, ctx.reverse, tuple(others0), *own, ctx.heads)
    given = dy, dh, dc, None
    if inputs.special:
        call = ops.Call.of(ctx.cell, inputs, "cpu", "auto", True, True)
        if y is None:
            y = ops.run(call, *ops.packed(inputs))[0]
        given = *given, *dothers, *(None,) * others, *ops.packed(inputs), y, *kept
        gradient, options = CellBackwardFunction, (call, [*needs], *given)
    else:
        of_sequence = ctx.cell, "cpu", "auto", False, [*needs]
        gradient, options = RecurrenceBackwardFunction, (*given, *inputs.plain, y, *kept, *of_sequence)
    found = (gradient.apply if torch.is_grad_enabled() else gradient.forward)(*options)
    if needs[0] and ctx.batch_first:
        found = (found[0].transpose(0, 1), *found[1:])
    return [g.reshape(t.shape) if need else None for g, t, need in zip(found, tensors, needs)]


def _with_dims(t: Tensor, dims: int) -> Tensor:
    """``t`` with dimensions of one element put in front, or taken away there."""
    return t.view((1,) * (dims - t.dim()) + t.shape[max(t.dim() - dims, 0) :])


class RecurrenceBackwardFunction(torch.autograd.Function):
    """The fused gradient. Differentiable in the output gradients and in the inputs of the forward.

    Takes the fields of Gradients, Inputs and Saved, then cell, backend, algorithm, recompute, needs; y is None where
    it was changed since.
    """

    @staticmethod
    def forward(
        dy, dh_n, dc_n, dcells, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, y, gates, cells,
        cell, backend, algorithm, recompute, needs,
    ):  # fmt: skip
        inputs = Inputs(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse)
        if y is None:
            y = ops.sequence(cell, *inputs.plain, backend, algorithm, False, False)[0]
        if recompute and CELLS[cell].saved:
            grads = Gradients(dy, dh_n, dc_n, dcells)
            return recomputing.gradient(cell, grads, inputs, y, cells, backend, algorithm, needs)
        given = (dy, dh_n, dc_n, dcells, *inputs.plain, y, gates, cells)
        return ops.sequence_backward(cell, *given, backend, algorithm, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, _y, _gates, _cells, ctx.cell, _, _, _, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        *given, batch_sizes, resets = ctx.saved_tensors
        if all(grads[k] is None for k, need in enumerate(ctx.needs) if need):
            return (None,) * 23

        def inputs_of(args) -> Inputs:
            return Inputs(*args, batch_sizes, resets, ctx.reverse)

        second = _second(ctx.cell, inputs_of, given[:4], given[4:], ctx.needs, grads)
        return tuple(g if ctx.needs_input_grad[k] else None for k, g in enumerate((*second, *(None,) * 11)))

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.sequence_backward(RecurrenceBackwardFunction.apply, 0, info, in_dims, *args)


def _second(cell: str, inputs_of, outputs_grads, inputs, needs, grads) -> list[Tensor | None]:
    """The gradient of a gradient, of the outputs' gradients and of the inputs, by the reference recurrence.

    ``grads`` are the gradients of the gradients of ``inputs``, of which ``needs`` tells which were computed;
    ``inputs_of`` makes Inputs of a list like ``inputs``.
    """
    present = [k for k, t in enumerate(inputs) if t is not None]
    wanted = [k for k in present if needs[k]]
    arrived = [k for k, g in enumerate(outputs_grads) if g is not None]

    def recurrence(*tensors: Tensor):
        args: list[Tensor | None] = [None] * len(inputs)
        for k, t in zip(present, tensors, strict=True):
            args[k] = t
        y, h_n, finals, _, every = reference.recurrence(CELLS[cell], inputs_of(args))
        every = [t.view(*y.shape[:-1], -1) for t in every]
        outputs = (y, h_n, *(finals[:1] or [None]), *(every[:1] or [None]), *finals[1:], *every[1:])
        return tuple(outputs[k] for k in arrived)

    def gradient(*tensors: Tensor):
        _, pullback = torch.func.vjp(recurrence, *tensors[len(arrived) :])
        found = dict(zip(present, pullback(tensors[: len(arrived)]), strict=True))
        return tuple(found[k] for k in wanted)

    primals = (*(outputs_grads[k] for k in arrived), *(inputs[k] for k in present))
    _, pullback = torch.func.vjp(gradient, *primals)
    cotangents = tuple(torch.zeros_like(inputs[k]) if grads[k] is None else grads[k] for k in wanted)
    result: list[Tensor | None] = [None] * (len(outputs_grads) + len(inputs))
    places = [*arrived, *(len(outputs_grads) + k for k in present)]
    for place, g in zip(places, pullback(cotangents), strict=True):
        result[place] = g
    return result


class CellFunction(torch.autograd.Function):
    """RecurrenceFunction for a cell of any number of states, parameters and inputs: takes an ops.Call and its tensors.

    Dynamo understands no ``forward(*tensors)``: what is compiled calls the op, whose gradient this is.
    """

    @staticmethod
    def forward(call, *tensors):
        return ops.run(call, *tensors, keep_states=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        _, _, _, gates, cells, *more = output
        every = (cells, *more[ctx.call.others :])
        ctx.mark_non_differentiable(gates, *(() if ctx.call.keep_states else every))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0], gates, *every)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _dgates, dcells, *more):
        call, tensors = ctx.call, ctx.saved_tensors
        dothers_n, dothers = more[: call.others], more[call.others :]
        if not call.keep_states:
            dcells, dothers = None, (None,) * call.others
        if not CELLS[call.cell].has_cell_state:
            dc_n = dcells = None
        grads = (dy, dh_n, dc_n, dcells, *dothers_n, *dothers)
        if all(g is None for g in grads):
            return (None,) * (1 + call.given)
        needs = [t is not None and ctx.needs_input_grad[1 + k] for k, t in enumerate(tensors[: call.given - 2])]
        gradient = CellBackwardFunction
        found = (gradient.apply if torch.is_grad_enabled() else gradient.forward)(call, needs, *grads, *tensors)
        return None, *(g if need else None for g, need in zip(found, needs, strict=True)), None, None

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        # Every state is an output of forward, whatever was asked for.
        call = dataclasses.replace(call, keep_states=True)
        return batching.cell(CellFunction.apply, call, info, in_dims[1:], *tensors)


class EagerCellFunction(torch.autograd.Function):
    """CellFunction where no transform of torch.func is on, as EagerRecurrenceFunction is; y is saved as it is."""

    @staticmethod
    def forward(ctx, *arguments):
        outputs = CellFunction.forward(*arguments)
        CellFunction.setup_context(ctx, arguments, outputs)
        return outputs

    backward = CellFunction.backward


def recorded_cell(call: ops.Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What ops.run returns, for autograd; not to be compiled."""
    eager = torch._C._functorch.peek_interpreter_stack() is None
    return (EagerCellFunction if eager else CellFunction).apply(call, *tensors)


class CellBackwardFunction(torch.autograd.Function):
    """The fused gradient of CellFunction: takes its ops.Call, needs, and what ops.packed_backward gives."""

    @staticmethod
    def forward(call, needs, *tensors):
        if not call.keep_gates and CELLS[call.cell].saved:
            given = tensors[call.gradients : call.gradients + call.given]
            y, _, *every = tensors[call.gradients + call.given :]
            gates = recomputing.gates_of_cell(call, call.unpacked(given), y, every)
            tensors = (*tensors[: call.gradients], *given, y, gates, *every)
        return ops.run_backward(call, needs, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.needs, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: ctx.call.gradients + ctx.call.given])

    @staticmethod
    def backward(ctx, *grads):
        call, tensors = ctx.call, ctx.saved_tensors
        *inputs, batch_sizes, resets = tensors[call.gradients :]
        count = len(ctx.needs_input_grad)
        if all(grads[k] is None for k, need in enumerate(ctx.needs) if need):
            return (None,) * count

        def inputs_of(args) -> Inputs:
            return call.unpacked((*args, batch_sizes, resets))

        second = (None, None, *_second(call.cell, inputs_of, tensors[: call.gradients], inputs, ctx.needs, grads))
        second = (*second, *(None,) * (count - len(second)))
        return tuple(g if need else None for g, need in zip(second, ctx.needs_input_grad, strict=True))

    @staticmethod
    def vmap(info, in_dims, call, needs, *tensors):
        return batching.cell_backward(CellBackwardFunction.apply, call, needs, info, in_dims[2:], *tensors)


def apply_cell(cell: str, inputs: Inputs, backend: str, algorithm: str, recompute: bool, keep_states: bool) -> tuple:
    """What ops.run returns, recorded for autograd."""
    call = ops.Call.of(cell, inputs, backend, algorithm, not recompute, keep_states)
    return recorded_cell(call, *ops.packed(inputs))


def apply_cell_backward(cell: str, grads, inputs: Inputs, saved, backend: str, algorithm: str, needs) -> tuple:
    """What ops.run_backward returns, recorded for autograd."""
    call = ops.Call.of(cell, inputs, backend, algorithm, True, True)
    return CellBackwardFunction.apply(call, needs, *ops.packed_backward(grads, inputs, saved))


for _function in (RecurrenceFunction, RecurrenceBackwardFunction):
    # Function.apply asks for it at every call, and to work it out takes longer than a small step's kernels.
    _function.forward.__signature__ = inspect.signature(_function.forward)
