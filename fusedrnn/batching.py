"""torch.func.vmap over the ops and over the Functions of fusedrnn.autograd.

Where no weight is mapped, and no gradient of one is wanted for each sample, the mapped dimension V joins the batch: one
call with V*B samples. Otherwise (an ensemble of weights, per-sample gradients, packed data) one call for each of the V.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Where B stands in the fields of backends.common's Inputs, Gradients and Saved; None: nowhere.
_INPUTS = (1, 0, 0, None, None, None, None, None, None, 1, None)
_GRADIENTS = (1, 0, 0, 1)
_SAVED = (1, 1, 1)
_BATCH_SIZES = 8
# The same of the outputs.
_OUTPUTS = (1, 0, 0, 1, 1)
_INPUT_GRADIENTS = (1, 0, 0, None, None, None, None, None)


def sequence(call: Callable, first: int, info, in_dims, *args):
    """The vmap rule of ``call``, whose arguments from ``first`` on are the fields of Inputs."""
    joins = args[first + _BATCH_SIZES] is None
    return _mapped(call, ((None,) * first + _INPUTS), _OUTPUTS, joins, info.batch_size, in_dims, args)


def sequence_backward(call: Callable, first: int, info, in_dims, *args):
    """The vmap rule of ``call``: from ``first`` on the fields of Gradients, Inputs and Saved; the last one is needs."""
    axes = (None,) * first + _GRADIENTS + _INPUTS + _SAVED
    joins = args[first + len(_GRADIENTS) + _BATCH_SIZES] is None and not any(args[-1][3:])
    return _mapped(call, axes, _INPUT_GRADIENTS, joins, info.batch_size, in_dims, args)


def cell(run: Callable, call, info, in_dims, *tensors):
    """The vmap rule of ops.run."""
    others = (*(0,) * call.others, *(1,) * (call.others * call.keep_states))
    joins = tensors[call.given - 2] is None
    one, axes = functools.partial(run, call), _axes_of(call)
    return _mapped(one, axes, (*_OUTPUTS, *others), joins, info.batch_size, in_dims, tensors)


def cell_backward(run: Callable, call, needs, info, in_dims, *tensors):
    """The vmap rule of ops.run_backward."""
    axes = (*_GRADIENTS, *(0,) * call.others, *(1,) * call.others, *_axes_of(call), *_SAVED, *(1,) * call.others)
    first = 8 + call.others
    joins = tensors[call.gradients + call.given - 2] is None
    joins = joins and not any(needs[3:8]) and not any(needs[first : first + call.parameters])
    one, out_axes = functools.partial(run, call, needs), _axes_of(call)[:-2]
    return _mapped(one, axes, out_axes, joins, info.batch_size, in_dims, tensors)


def _axes_of(call) -> tuple[int | None, ...]:
    """Where B stands in the tensors of a call."""
    return (*_INPUTS[:8], *(0,) * call.others, *(None,) * call.parameters, *(1,) * call.inputs, *_INPUTS[8:10])


def _mapped(call, axes: Sequence[int | None], out_axes, joins: bool, count: int, in_dims, args):
    dims = [d if isinstance(t, Tensor) else None for t, d in zip(args, in_dims, strict=True)]
    axes = (*axes, *(None,) * (len(args) - len(axes)))
    if joins and all(d is None or axis is not None for d, axis in zip(dims, axes)):
        outputs = call(*(_join(t, d, axis, count) for t, d, axis in zip(args, dims, axes)))
        return _split(outputs, out_axes, count)
    if count == 0:
        raise RuntimeError("fusedrnn: vmap over 0 weights, packed sequences or per-sample gradients is not possible")
    each = [call(*(t if d is None else t.select(d, k) for t, d in zip(args, dims))) for k in range(count)]
    return tuple(torch.stack(outputs) for outputs in zip(*each)), (0,) * len(out_axes)


def _join(t, dim: int | None, axis: int | None, count: int):
    """``t`` with its mapped dimension in front of its B, as one dimension; a tensor that is not mapped is repeated."""
    if axis is None or t is None:
        return t
    if t.dim() - (dim is not None) <= axis:  # the empty tensor that stands for gates or cells that were not kept
        return t if dim is None else t.select(dim, 0)
    t = t.unsqueeze(axis).expand(*t.shape[:axis], count, *t.shape[axis:]) if dim is None else t.movedim(dim, axis)
    return t.flatten(axis, axis + 1)


def _split(outputs: Sequence[Tensor], axes: Sequence[int | None], count: int):
    # An output that there is not has one dimension, and is not mapped.
    axes = [None if t.dim() == 1 else axis for t, axis in zip(outputs, axes, strict=True)]
    split = (
        t if axis is None else t.unflatten(axis, (count, t.shape[axis] // max(count, 1)))
        for t, axis in zip(outputs, axes)
    )
    return tuple(split), tuple(axes)
