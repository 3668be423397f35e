"""Both directions of a layer as one op, so that a backend may launch them together.

``fusedrnn::sequence_pair`` and its gradient ``fusedrnn::sequence_pair_backward`` run on the backend cuda, for cells of
one or two states without a projection. They take the tensors of both directions in one list, of each what
``ops.packed`` gives (``ops.packed_backward``), and return in one list y, h_n, c_n, gates and cells of both, or eight
gradients of each. Whether it is one launch is the backend's to say, which sees T and B.

Autograd runs one node for the pair. Who asks for more than a first derivative, and the transforms of torch.func, get
the two directions one after the other, by the ops and Functions of one direction.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import batching, ops
from fusedrnn.autograd import RecurrenceBackwardFunction, recorded
from fusedrnn.backends import cuda
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.cells import CELLS, accumulation_dtype

# Tensors of a direction: of forward, and of the gradient.
_FORWARD, _BACKWARD = 10, 17

_lib = torch.library.Library("fusedrnn", "FRAGMENT")
_lib.define(
    "sequence_pair(str cell, Tensor?[] tensors, bool[] reverse, str algorithm, bool keep_gates, bool keep_states)"
    " -> Tensor[]",
    tags=ops._TAGS,
)
_lib.define(
    "sequence_pair_backward(str cell, Tensor?[] tensors, bool[] reverse, str algorithm, bool[] needs) -> Tensor[]",
    tags=ops._TAGS,
)


def _split(given: Sequence, each: int) -> list[Sequence]:
    if len(given) != 2 * each:
        raise RuntimeError(f"fusedrnn::sequence_pair: two directions are {2 * each} of them, got {len(given)}")
    return [given[:each], given[each:]]


def _inputs(tensors: Sequence[Tensor | None], reverse: Sequence[bool]) -> list[Inputs]:
    return [Inputs(*given, r) for given, r in zip(_split(tensors, _FORWARD), reverse, strict=True)]


def _check(cell: str, both: Sequence[Inputs], algorithm: str) -> None:
    for inputs in both:
        ops.check_sequence(cell, inputs, "cuda", algorithm)
        if inputs.w_hr is not None:
            raise RuntimeError("fusedrnn::sequence_pair: w_hr (projection) goes with one direction")
    sizes = [[None if t is None else tuple(t.shape) for t in inputs[:9]] for inputs in both]
    if sizes[0] != sizes[1]:
        raise RuntimeError(f"fusedrnn::sequence_pair: both directions must have the same shapes, got {sizes}")


def _check_values(both: Sequence[Inputs]) -> None:
    for inputs in both:
        if inputs.batch_sizes is not None:
            ops.check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])


def _forward(cell, tensors, reverse, algorithm, keep_gates, keep_states) -> list[Tensor]:
    both = _inputs(tensors, reverse)
    _check(cell, both, algorithm)
    _check_values(both)
    with ops.without_autocast(both[0].x):
        found = cuda.forward_both(CELLS[cell], both, algorithm, keep_gates, keep_states)
    return [t for outputs in found for t in outputs]


def _forward_fake(cell, tensors, reverse, algorithm, keep_gates, keep_states) -> list[Tensor]:
    both, made = _inputs(tensors, reverse), []
    _check(cell, both, algorithm)
    for inputs in both:
        dtype = inputs.x.dtype
        for k, shape in enumerate(ops._output_shapes(cell, inputs, keep_gates, keep_states)):
            made.append(inputs.x.new_empty(shape, dtype=accumulation_dtype(dtype) if k == 4 else dtype))
    return made


def _of_backward(cell, tensors, reverse, algorithm, needs) -> list[tuple[Gradients, Inputs, Saved, list[bool]]]:
    """What the gradient is computed from, of each direction."""
    given = _split(tensors, _BACKWARD)
    both = _inputs([t for each in given for t in each[4:14]], reverse)
    _check(cell, both, algorithm)
    found = []
    for each, inputs, wanted in zip(given, both, _split(needs, 8)):
        grads, saved = Gradients(*each[:4]), Saved(*each[14:])
        ops._check_backward(cell, grads, inputs, saved, "cuda", algorithm)
        # An input that is absent has no gradient to compute, whatever was asked.
        wanted = [need and t is not None for need, t in zip(wanted, inputs[:8], strict=True)]
        found.append((grads, inputs, saved, wanted))
    return found


def _backward(cell, tensors, reverse, algorithm, needs) -> list[Tensor]:
    both = _of_backward(cell, tensors, reverse, algorithm, needs)
    _check_values([inputs for _, inputs, _, _ in both])
    with ops.without_autocast(both[0][1].x):
        found = cuda.backward_both(CELLS[cell], both, algorithm)
    return [d for gradients in found for d in gradients]


def _backward_fake(cell, tensors, reverse, algorithm, needs) -> list[Tensor]:
    return [
        inputs.x.new_empty(t.shape if need else (0,))
        for _, inputs, _, wanted in _of_backward(cell, tensors, reverse, algorithm, needs)
        for t, need in zip(inputs[:8], wanted, strict=True)
    ]


def _under_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _apply(cell, tensors, reverse, algorithm, keep_gates, keep_states) -> list[Tensor]:
    if _under_transform():
        both = _inputs(tensors, reverse)
        found = [t for i in both for t in recorded(*i.plain, cell, "cuda", algorithm, False, keep_states)]
    else:
        found = PairFunction.apply(cell, reverse, algorithm, keep_states, *tensors)
    kept = (True, True, True, keep_gates, keep_states)
    return [t if keep else t.new_empty(0) for t, keep in zip(found, 2 * kept, strict=True)]


def _apply_backward(cell, tensors, reverse, algorithm, needs) -> list[Tensor]:
    both = _of_backward(cell, tensors, reverse, algorithm, needs)
    return [d for given in both for d in _of_one(cell, *given, algorithm, True)]


def _of_one(cell: str, grads, inputs: Inputs, saved: Saved, needs, algorithm: str, differentiable: bool):
    """The gradient of one direction."""
    gradient = RecurrenceBackwardFunction.apply if differentiable else RecurrenceBackwardFunction.forward
    return gradient(*grads[:4], *inputs.plain, *saved[:3], cell, "cuda", algorithm, False, needs)


def _vmap(info, in_dims, cell, tensors, reverse, *options):
    dims = _split(ops._same_structure([tensors], [in_dims[1]])[0], _FORWARD)
    outputs, out_dims = [], []
    for inputs, each in zip(_inputs(tensors, reverse), dims):
        given = (cell, *inputs.plain, "cuda", *options)
        found = batching.sequence(ops.sequence, 1, info, (None, *each, *(None,) * 5), *given)
        outputs, out_dims = [*outputs, *found[0]], [*out_dims, *found[1]]
    return outputs, out_dims


def _vmap_backward(info, in_dims, cell, tensors, reverse, algorithm, needs):
    dims = _split(ops._same_structure([tensors], [in_dims[1]])[0], _BACKWARD)
    outputs, out_dims = [], []
    for given, each, r, wanted in zip(_split(tensors, _BACKWARD), dims, reverse, _split(needs, 8)):
        flat = (cell, *given[:14], r, *given[14:], "cuda", algorithm, wanted)
        mapped = (None, *each[:14], None, *each[14:], None, None, None)
        found = batching.sequence_backward(ops.sequence_backward, 1, info, mapped, *flat)
        outputs, out_dims = [*outputs, *found[0]], [*out_dims, *found[1]]
    return outputs, out_dims


_op, _backward_op = torch.ops.fusedrnn.sequence_pair.default, torch.ops.fusedrnn.sequence_pair_backward.default
for _name, _one, _kernel, _fake, _autograd, _rule in (
    ("sequence_pair", _op, _forward, _forward_fake, _apply, _vmap),
    ("sequence_pair_backward", _backward_op, _backward, _backward_fake, _apply_backward, _vmap_backward),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    _lib.impl(_name, ops._autograd_kernel(_one, _autograd), "Autograd", with_keyset=True)
    torch.library.register_fake(f"fusedrnn::{_name}", _fake, lib=_lib)
    torch.library.register_vmap(_one, _rule, lib=_lib)


def run(cell: str, both: Sequence[Inputs], algorithm: str, keep_gates: bool, keep_states: bool) -> list[Sequence]:
    """y, h_n, c_n, gates, cells of each direction; nothing is recorded for autograd, unless it is compiled."""
    tensors = [t for inputs in both for t in ops.packed(inputs)]
    reverse = [inputs.reverse for inputs in both]
    return _split(ops._call(_op, cell, tensors, reverse, algorithm, keep_gates, keep_states), 5)


def recorded_pair(cell: str, both: Sequence[Inputs], algorithm: str, states: bool) -> list[Sequence]:
    """The same for autograd; ``states``: whether every c is an output that somebody may differentiate."""
    if torch.compiler.is_compiling():  # the op has the gradient: Dynamo does not look into it
        return run(cell, both, algorithm, True, states)
    tensors = [t for inputs in both for t in ops.packed(inputs)]
    return _split(PairFunction.apply(cell, [inputs.reverse for inputs in both], algorithm, states, *tensors), 5)


class PairFunction(torch.autograd.Function):
    """RecurrenceFunction for both directions of a layer."""

    @staticmethod
    def forward(ctx, cell, reverse, algorithm, states, *tensors):
        first, second = run(cell, _inputs(tensors, reverse), algorithm, True, True)
        ctx.cell, ctx.reverse, ctx.algorithm = cell, reverse, algorithm
        ctx.states = states and CELLS[cell].has_cell_state
        for _, _, _, gates, cells in (first, second):
            ctx.mark_non_differentiable(gates, *(() if ctx.states else (cells,)))
        ctx.set_materialize_grads(False)
        saved = [t for y, _, _, gates, cells in (first, second) for t in (y, gates, cells)]
        ctx.save_for_backward(*tensors, *saved)
        return (*first, *second)

    @staticmethod
    def backward(ctx, *arrived):
        tensors, saved = ctx.saved_tensors[: 2 * _FORWARD], _split(ctx.saved_tensors[2 * _FORWARD :], 3)
        asked = _split(ctx.needs_input_grad[4:], _FORWARD)
        both = []
        for (dy, dh_n, dc_n, _, dcells), inputs, kept, needs in zip(
            _split(arrived, 5), _inputs(tensors, ctx.reverse), saved, asked
        ):
            dc_n = dc_n if CELLS[ctx.cell].has_cell_state else None
            grads = Gradients(dy, dh_n, dc_n, dcells if ctx.states else None)
            both.append((grads, inputs, Saved(*kept), [*needs[:8]]))
        live = [any(needs) and any(g is not None for g in grads[:4]) for grads, _, _, needs in both]
        recording = torch.is_grad_enabled()
        alone = recording or _under_transform() or ops._under_old_vmap() or forward_ad._current_level >= 0
        if all(live) and not alone:
            given = [t for grads, inputs, kept, _ in both for t in (*grads[:4], *ops.packed(inputs), *kept[:3])]
            wanted = [need for *_, needs in both for need in needs]
            found = _split(ops._call(_backward_op, ctx.cell, given, ctx.reverse, ctx.algorithm, wanted), 8)
        else:
            one = functools.partial(_of_one, ctx.cell, algorithm=ctx.algorithm, differentiable=recording)
            found = [one(*given) if there else (None,) * 8 for given, there in zip(both, live)]
        gradients = (
            (*(d if need else None for d, need in zip(each, needs, strict=True)), None, None)
            for each, (*_, needs) in zip(found, both)
        )
        return (None,) * 4 + tuple(d for each in gradients for d in each)
