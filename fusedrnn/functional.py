"""Recurrent layers as functions: layers, directions, dropout between layers, packed sequences."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import rnn as rnn_utils

from fusedrnn import _build, ops, pair, planning, trials
from fusedrnn.autograd import CallFunction, recorded, recorded_cell
from fusedrnn.backends import reference
from fusedrnn.backends.common import Inputs, neighbours, sizes_on
from fusedrnn.cells import CELLS, Cell

# A trace fixes the sizes of weights, of which torch warns; what may change in another call stays open.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fusedrnn\.")

# (thread, callback) of every open ``recording`` block. A plain list, because Dynamo has to guard on it.
_recorders: list[tuple[int, Callable]] = []


@contextlib.contextmanager
def recording(callback: Callable):
    """Calls ``callback(cell, layer, direction, y, gates, cells, batch_sizes, lengths)`` for every sequence of a layer
    and direction that this thread computes, in order, with what the kernels computed: y [T, B, P] (or packed [N, P]),
    gates [T, B, S*H] in the order of ``cell.saved`` (None if the cell saves none), cells [T, B, H] in float32 or
    float64 (None without a c); detached. What stands after a sequence's end means nothing. A Cell's call is a sequence
    of one step.
    """
    entry = (threading.get_ident(), callback)
    _recorders.append(entry)
    try:
        yield
    finally:
        _recorders.remove(entry)


def direct(name: str, backend: str | None, algorithm: str | None, *arguments):
    """A module's call as one call of C++ ("cell" or "layers", see csrc/module.cpp) on the backend "cpu"; None where
    it is not built, or something is on that needs the way through Python.
    """
    if torch.compiler.is_compiling() or _recorders or forward_ad._current_level >= 0:
        return None
    if planning._forced:
        backend, algorithm = planning._innermost(tuple(planning._forced), backend, algorithm)
    if algorithm is not None or not (backend is None or backend == "cpu"):
        return None
    packed = "_packed" in arguments[1]  # of a frozen layer
    small = packed or not torch.is_grad_enabled() or _build._calls is _build._small_calls
    if small and _build._small_calls is not None and not ops.profiled():
        if name == "layers" and torch.is_autocast_enabled("cpu"):
            return _under_autocast(functools.partial(_small_call, name), *arguments)
        return _small_call(name, *arguments)
    if _build._calls is None or _build._calls is _build._small_calls:
        return None
    if name == "layers":
        *arguments, batch_sizes, resets = arguments
        if batch_sizes is not None or resets is not None:
            return None
        if torch.is_autocast_enabled("cpu"):
            return _under_autocast(_build._calls.layers, *arguments)
    return getattr(_build._calls, name)(*arguments)


def _small_call(name: str, cell: str, module: dict, names: Sequence[str], input, h0, c0, *options):
    """A call of ``_C``, recorded for autograd where it answers what backward needs."""
    found = getattr(_build._small_calls, name)(cell, module, names, input, h0, c0, *options)
    if type(found) is not list:
        return found
    weights = [*map(module["_parameters"].get, names)]
    if options and not options[0]:  # no bias
        weights[2:2] = None, None
    if len(weights) < 5:
        weights.append(None)
    return CallFunction.apply(cell, bool(options) and options[3], False, 1, found, input, h0, c0, *weights)


def _under_autocast(call: Callable, cell: str, module: dict, names: Sequence[str], input, h0, c0, *options):
    """The call "layers" of tensors as autocast wants them, its results as ``layers`` gives them."""
    weights = module["_parameters"]
    given = (input, h0, c0, *(None if name in module else weights.get(name) for name in names))
    if type(input) is not Tensor or input.device.type != "cpu" or _traced():
        return None
    for t in given:
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return None
    flat = module.get("_flat_weights")
    if flat is not None and (len(flat) != len(names) or any(a is not b for a, b in zip(flat, given[3:]))):
        return None  # a wrapper's own weights
    carried = _carried_dtype(input if h0 is None else h0 if c0 is None else c0)
    input, h0, c0, *cast = ops.autocast("cpu", *given)
    module = module | {"_parameters": dict(zip(names, cast)), "_flat_weights": cast}
    module.pop("_packed", None)  # of other weights
    torch.set_autocast_enabled("cpu", False)
    try:
        found = call(cell, module, names, input, h0, c0, *options)
    finally:
        torch.set_autocast_enabled("cpu", True)
    if found is None or carried is None:
        return found
    projection = module.get("proj_size")
    packed = len(options) > 4 and options[4] is not None
    if cell != "gru" and not (len(found) == 3 and (packed or projection)):
        return found
    y, h, *c = found
    return (y, h, *(t.to(carried) for t in c)) if projection else tuple(t.to(carried) for t in found)


class Padding(NamedTuple):
    """Where sequences of different lengths end in a padded batch, for any backend and without reading a value.

    Every direction runs forwards over all steps: the one that is reverse gets each row turned over within its length,
    and every step past an end starts anew from zeros, so that nothing there can overflow or reach a gradient.
    """

    lengths: Tensor  # int64 [B]
    inside: Tensor  # bool [T, B]
    last: Tensor  # int64 [B], the last step of each
    turned: Tensor  # int64 [T, B], the step that a step becomes when its row is turned over

    @staticmethod
    def of(lengths: Tensor, steps: int) -> "Padding":
        lengths, step = lengths.long(), torch.arange(steps, device=lengths.device).unsqueeze(1)
        inside = step < lengths
        # A length that is negative or beyond T makes an index that is out of bounds, which gather refuses.
        return Padding(
            lengths, inside, torch.where(lengths == 0, 0, lengths - 1), torch.where(inside, lengths - 1 - step, step)
        )

    def turn(self, t: Tensor) -> Tensor:
        """[T, B, ...] with every row turned over within its length."""
        index = self.turned if t.dim() == 2 else self.turned.unsqueeze(-1).expand_as(t)
        return t.gather(0, index)

    def cut(self, t: Tensor, value: float = 0.0) -> Tensor:
        """[..., T, B, K] with ``value`` past the ends."""
        return torch.where(self.inside.unsqueeze(-1), t, value)

    def at_end(self, t: Tensor, start: Tensor) -> Tensor:
        """Of states [T, B, K] the last of each row; ``start`` [B, K] where a row has no step."""
        ends = t.gather(0, self.last.unsqueeze(-1).expand(1, *t.shape[1:])).squeeze(0)
        return torch.where((self.lengths == 0).unsqueeze(-1), start, ends.to(start.dtype))

    def before(self, inputs: Inputs) -> Inputs:
        """What the op gets."""
        x, resets = inputs.x, inputs.resets
        if inputs.reverse:
            x, resets = self.turn(x), None if resets is None else self.turn(resets)
            inputs = inputs._replace(inputs=tuple(self.turn(t) for t in inputs.inputs))
        outside = ~self.inside
        return inputs._replace(x=x, resets=outside if resets is None else resets | outside, reverse=False)

    def after(self, inputs, y, finals, gates, every, with_gates: bool, with_states: bool) -> tuple:
        """What the op would have returned for the inputs as they came, gates and the states after every step where
        somebody wants them; states must be kept.
        """
        ends = [self.at_end(states, start) for states, start in zip(every, inputs.states0)]
        finals = [self.at_end(y, inputs.h0), *(ends or finals[1:])]
        turn = self.turn if inputs.reverse else lambda t: t
        y = turn(self.cut(y))
        gates = turn(self.cut(gates)) if with_gates and gates.dim() == 3 else gates
        every = [turn(self.cut(t)) if t.dim() == 3 else t for t in every] if with_states else every
        return y, finals, gates, every


def _check_lengths(lengths, x: Tensor, batch: int, batch_sizes: Tensor | None) -> Tensor:
    """``lengths`` as a tensor on the device of x [T, B, I]; raises on what cannot be one."""
    if batch_sizes is not None:
        raise RuntimeError("lengths is for a padded batch; a packed one has its lengths")
    lengths = torch.as_tensor(lengths)
    if lengths.dtype in (torch.uint16, torch.uint32, torch.uint64):  # of which torch has few operations
        lengths = lengths.long()
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise RuntimeError(f"lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise RuntimeError(f"lengths must have shape [B] = [{batch}], got {list(lengths.shape)}")
    if lengths.layout != torch.strided:
        raise RuntimeError(f"lengths must be a dense tensor, got layout {lengths.layout}")
    if x.device.type == "cpu":
        lengths = lengths.to(x.device)  # waits for them: non_blocking would read what has not come yet
    if lengths.device.type == "cpu" and lengths.numel() and not _traced():
        low, high = lengths.aminmax()
        if low < 0 or high > x.shape[0]:
            raise RuntimeError(
                f"lengths must be between 0 and the {x.shape[0]} steps of the input, got {int(low)} to {int(high)}"
            )
        if x.device.type == "cuda":
            lengths = lengths.pin_memory()  # a copy from other memory may wait for the GPU
    return lengths.to(x.device, non_blocking=True)


def by_packing(call, input: Tensor, states, lengths: Tensor, batch_first: bool, padding_value: float, resets=None):
    """y of a padded batch and its final states by a call for a packed one: ``call(data, batch_sizes, states, resets)``.

    No length may be 0. Their values are read.
    """
    steps, batch_dim = input.shape[1 if batch_first else 0], 0 if batch_first else 1
    packed = rnn_utils.pack_padded_sequence(input, lengths.cpu(), batch_first, enforce_sorted=False)
    data, batch_sizes, order, back = packed
    if resets is not None:
        resets = resets.index_select(batch_dim, order).narrow(1 - batch_dim, 0, batch_sizes.shape[0])
        resets = resets.t() if batch_first else resets
    y, *finals = call(data, batch_sizes, [s.index_select(1, order) for s in states], resets)
    y = rnn_utils.PackedSequence(y, batch_sizes, order, back)
    y, _ = rnn_utils.pad_packed_sequence(y, batch_first, padding_value, steps)
    return y, *(s.index_select(1, back) for s in finals)


def packs(lengths: Tensor | None, backend: str, tensors: Sequence[Tensor | None], resets) -> bool:
    """Whether a padded batch is computed as a packed one, which is less work: where lengths are read for nothing."""
    if lengths is None or backend != "cpu" or _recorders or _traced() or _has_tangent(tensors):
        return False
    # resets of another shape have an error of their own.
    if resets is not None and (not isinstance(resets, Tensor) or resets.shape != tensors[0].shape[:2]):
        return False
    return lengths.numel() > 0 and int(lengths.min()) > 0


def recurrence(
    cell: Cell,
    inputs: Inputs,
    backend: str,
    algorithm: str,
    recompute: bool = False,
    keep_cells: bool = False,
    layer: int = 0,
    padding: Padding | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer: y, h_n, c_n, cells. Saves for backward only when a gradient will be asked for."""
    y, finals, every = recurrence_of_states(cell, inputs, backend, algorithm, recompute, keep_cells, layer, padding)
    return y, finals[0], finals[1], every[0]


def recurrence_of_states(
    cell: Cell,
    inputs: Inputs,
    backend: str,
    algorithm: str,
    recompute: bool = False,
    keep_cells: bool = False,
    layer: int = 0,
    padding: Padding | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same for any number of states: y, the final ones, and what every state after h was at each step.

    An empty tensor stands for the c of a cell of one state, and for states that were not kept.
    """
    given, wanted, mine = inputs, keep_cells, _my_recorders()
    if padding is not None:
        inputs, keep_cells = padding.before(inputs), True
    tensors = ops.differentiable(inputs) if inputs.special else inputs[:8]
    if algorithm == ops.INT8 and (_has_tangent(tensors) or _may_need_gradient(tensors)):
        raise RuntimeError(
            "a layer quantized with activations rounds x and h to 8 bits, which has no gradient, and one may be asked "
            "for: use torch.no_grad() or x.detach()"
        )
    if _has_tangent(tensors):
        backend = "reference"
        outputs = _in_plain_torch(cell, inputs)
    elif inputs.special:
        outputs = _any_cell(cell, inputs, backend, algorithm, recompute and not mine, bool(mine), keep_cells, tensors)
    elif _may_need_gradient(tensors):
        outputs = recorded(*_savable(inputs).plain, cell.name, backend, algorithm, recompute and not mine, keep_cells)
    else:
        outputs = ops.sequence(cell.name, *inputs.plain, backend, algorithm, bool(mine), bool(mine) or keep_cells)
    return _after(cell, given, outputs, backend, wanted, mine, layer, padding)


def _my_recorders() -> list[Callable]:
    """The callbacks of this thread's ``recording`` blocks."""
    return [callback for thread, callback in _recorders if thread == threading.get_ident()] if _recorders else []


def _after(
    cell: Cell,
    given: Inputs,
    outputs: Sequence[Tensor],
    backend: str,
    keep_cells: bool,
    mine: list[Callable],
    layer: int,
    padding: Padding | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What recurrence_of_states returns, from what the op did, after the callbacks."""
    others = len(given.others)
    y, h_n, c_n, gates, cells = outputs[:5]
    finals, every = [h_n, c_n, *outputs[5 : 5 + others]], [cells, *outputs[5 + others :]]
    if padding is not None:
        y, finals, gates, every = padding.after(given, y, finals, gates, every, bool(mine), keep_cells or bool(mine))
    for callback in mine:
        callback(
            cell,
            layer,
            int(given.reverse),
            y.detach(),
            ops.gates_in_torch_order(gates, cell.name, backend).detach() if cell.saved else None,
            every[0].detach() if cell.has_cell_state else None,
            given.batch_sizes,
            None if padding is None else padding.lengths,
        )
    return y, finals, every


def layer_of_states(
    cell: Cell,
    directions: Sequence[Inputs],
    backend: str,
    algorithm: str,
    recompute: bool,
    keep_cells: bool,
    layer: int,
    padding: Padding | None,
) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """recurrence_of_states of every direction of a layer; a backend may take two together, see fusedrnn.pair."""
    if not _goes_as_a_pair(directions, backend, algorithm, recompute):
        options = backend, algorithm, recompute, keep_cells, layer, padding
        return [recurrence_of_states(cell, inputs, *options) for inputs in directions]
    mine, wanted, both = _my_recorders(), keep_cells, directions
    if padding is not None:
        both, keep_cells = [padding.before(inputs) for inputs in directions], True
    if _may_need_gradient([t for inputs in both for t in inputs[:8]]):
        outputs = pair.recorded_pair(cell.name, [_savable(inputs) for inputs in both], algorithm, keep_cells)
    else:
        outputs = pair.run(cell.name, both, algorithm, bool(mine), bool(mine) or keep_cells)
    return [_after(cell, given, o, backend, wanted, mine, layer, padding) for given, o in zip(directions, outputs)]


def _goes_as_a_pair(directions: Sequence[Inputs], backend: str, algorithm: str, recompute: bool) -> bool:
    if len(directions) != 2 or backend != "cuda" or algorithm == "step" or recompute:
        return False
    if directions[0].special or directions[0].w_hr is not None:
        return False
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return False
    return not (_under_transform() or any(_has_tangent(inputs[:8]) for inputs in directions))


def _any_cell(cell, inputs, backend, algorithm, recompute, keep_gates, keep_states, tensors) -> tuple[Tensor, ...]:
    """What ops.run returns, recorded for autograd where a gradient may be asked for."""
    gradient = _may_need_gradient(tensors)
    keep_gates = not recompute if gradient else keep_gates
    call = ops.Call.of(cell.name, inputs, backend, algorithm, keep_gates, keep_states)
    if torch.compiler.is_compiling() or not gradient:
        # Compiled, it is the op that has the gradient: Dynamo does not look into it.
        return ops.run(call, *ops.packed(inputs), keep_states=keep_gates)
    return recorded_cell(call, *ops.packed(inputs))


def _savable(inputs: Inputs) -> Inputs:
    """The inputs such that autograd can keep them: of an inference tensor a copy."""
    if torch.compiler.is_compiling() or not any(t is not None and t.is_inference() for t in inputs[:10]):
        return inputs
    return Inputs(*(t.clone() if t is not None and t.is_inference() else t for t in inputs[:10]), *inputs[10:])


_NO_VIEW = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def reshaped(t: Tensor, operation: str, *dims: int) -> Tensor:
    """``t.operation(*dims)`` of a result nobody else has. It is no view where it need not be one, as torch.nn's are
    not: a view cannot be detached in place.
    """
    if type(t) is not Tensor or _traced() or torch.jit.is_tracing():
        return getattr(t, operation)(*dims)
    with torch._C._ExcludeDispatchKeyGuard(_NO_VIEW):
        return getattr(t, f"{operation}_")(*dims)


def _may_need_gradient(tensors: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return False  # a trace with a Function in it can be neither checked nor saved
    return _under_transform() or any(t is not None and t.requires_grad for t in tensors)


def _under_transform() -> bool:
    """Whether a transform of torch.func is on: its tensors do not tell what the ones they stand for require."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _traced() -> bool:
    """Whether a value must not be read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or _under_transform()


def _has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode derivatives may be asked for: the bare op would give zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return _under_transform() or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _in_plain_torch(cell: Cell, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns with everything kept, from operations that torch can differentiate in any way."""
    ops.check_sequence(cell.name, inputs, "reference", "auto")
    if inputs.batch_sizes is not None:
        ops.check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])
    with ops.without_autocast(inputs.x):
        return reference.forward(cell, inputs, "auto", True, True)


@_build.constant_when_compiled
def exporting_to_onnx() -> bool:
    """torch.onnx.is_in_onnx_export, which Dynamo takes to be False, for the exporter's second way through Dynamo too.

    It imports the exporters, 0.15 s, so that it is asked only in what can be an export.
    """
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) or not torch.onnx.is_in_onnx_export():
        return False
    if torch.compiler.is_compiling():
        from fusedrnn import onnx

        torch.compiler.allow_in_graph(onnx.symbolic)
    return True


def check_packed_export(batch_sizes: Tensor) -> None:
    """Raises in an export that packs: torch has no size for what comes out of that."""
    unbacked = torch.fx.experimental.symbolic_shapes.free_unbacked_symbols
    # Dynamo of torch 2.11 takes every compilation for an export, and cannot trace that function.
    if exporting_to_onnx() or (not torch.compiler.is_dynamo_compiling() and unbacked(batch_sizes)):
        raise RuntimeError(
            "torch.export and torch.onnx.export(dynamo=True) cannot export packed sequences: call the layer on the "
            "padded batch with lengths=, or export to ONNX with dynamo=False"
        )


def layers(
    cell: Cell,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    return_all_states: bool,
    recompute: bool,
    backend: str | None,
    algorithm: str | None,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """A stack of layers: y, h_n, c_n and every state. ``weights`` is flat, in the order of ``_flat_weights``.

    In an export to ONNX the states may be None.
    """
    if exporting_to_onnx():
        from fusedrnn import onnx

        return onnx.layers(
            cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
            batch_sizes, resets, return_all_states, lengths, padding_value,
        )  # fmt: skip
    return _stack(
        cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes,
        resets, return_all_states, recompute, backend, algorithm, lengths, padding_value,
    )  # fmt: skip


def _stack(
    cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes,
    resets, return_all_states, recompute, backend, algorithm, lengths, padding_value,
):  # fmt: skip
    directions = 2 if bidirectional else 1
    states = (h0, c0) if cell.has_cell_state else (h0,)
    for k, t in enumerate((input, *states, *weights)):
        if not isinstance(t, Tensor):
            names = ("input", "h0", "c0")[: 1 + len(states)]
            name = names[k] if k < len(names) else f"weights[{k - len(names)}]"
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if batch_sizes is not None and not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be a Tensor, got {type(batch_sizes).__name__}")
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        raise RuntimeError("weights must begin with w_ih and w_hh, each with 2 dimensions")
    for name, t in zip(("h0", "c0"), states):
        if t.dim() != 3 or t.shape[0] != num_layers * directions:
            raise RuntimeError(
                f"{name} must have shape [{num_layers * directions}, batch, features], got {list(t.shape)}"
            )
    projection = cell.has_cell_state and weights[1].shape[1] != weights[1].shape[0] // len(cell.gates)
    per = 2 + 2 * bias + projection
    if len(weights) != per * num_layers * directions:
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: expected {per * num_layers * directions} tensors for "
            f"{num_layers} layers and {directions} directions, got {len(weights)}"
        )
    carried = None if algorithm == ops.INT8 else _carried_dtype(h0 if c0 is None else c0)
    as_given = input, h0, c0, *weights
    input, h0, c0, *weights = _distinct(operands(algorithm, input.device.type, *as_given))
    dtype, device = input.dtype, input.device
    for k, t in enumerate((h0, *weights) if c0 is None else (h0, *weights, c0)):
        if t.dtype != dtype or t.device != device:
            _check_same(input, t, "hidden" if k == 0 else "cell state" if k > len(weights) else "parameter")
    time_first = batch_sizes is not None or not batch_first
    x = input if time_first else input.transpose(0, 1)
    if lengths is not None:
        lengths = _check_lengths(lengths, x, h0.shape[1], batch_sizes)
    chosen = planning.choose(
        cell.name,
        input_size=weights[0].shape[1],
        hidden_size=weights[1].shape[0] // len(cell.gates),
        proj_size=weights[1].shape[1] if projection else 0,
        dtype=dtype,
        device=device,
        backend=backend,
        algorithm=algorithm,
    )
    if not chosen.asked and chosen.backend in (*trials.ON_GPU, "torch") and trials.applies(input.device):
        tensors = (input, h0, c0, *weights)
        if not (
            chosen.instead
            or lengths is not None
            or _recorders
            or torch.compiler.is_compiling()
            or _has_tangent(tensors)
        ):
            given = trials.Call(
                cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
                batch_sizes, resets, return_all_states, recompute,
            )  # fmt: skip
            chosen = trials.tuned(given, chosen, not _under_transform() and _may_need_gradient(tensors))
    runs = chosen.backend
    if runs == "torch":
        options = {
            "resets": resets is not None,
            "return_all_states": return_all_states,
            "recompute": recompute and (chosen.asked or bool(chosen.instead)),
            "lengths under a transform or a trace": lengths is not None and _traced(),
        }
        if lengths is not None and not options["lengths under a transform or a trace"]:
            options["a length of 0"] = bool((lengths == 0).any())
        runs = _torch_or_instead(chosen, [name for name, wanted in options.items() if wanted], as_given)
    if runs == "torch":
        # Autocast is torch's own too.
        input, h0, c0, *weights = _distinct(as_given)
        return *_torch_layers(
            cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
            batch_sizes, lengths, padding_value,
        ), None  # fmt: skip

    if not return_all_states and packs(lengths, runs, as_given, resets):

        def call(data, batch_sizes, states, resets):
            found = layers(
                cell, data, *states, *(None,) * (c0 is None), as_given[3:], bias, num_layers, dropout, training,
                bidirectional, batch_first, batch_sizes, resets, False, recompute, backend, algorithm, None, 0.0,
            )  # fmt: skip
            return found[: 1 + len(states)]

        given = [t for t in as_given[1:3] if t is not None]
        found = by_packing(call, as_given[0], given, lengths, batch_first, padding_value, resets)
        return *found, *(None,) * (4 - len(found))
    padding = None
    if lengths is not None:
        padding = Padding.of(lengths, x.shape[0])
        x = padding.cut(x)
    masks = (None,) * directions
    if resets is not None:
        masks = _masks(resets, x, h0.shape[1], batch_sizes, time_first, directions, padding)
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    all_h: list[Tensor] = []
    all_c: list[Tensor] = []
    for layer in range(num_layers):
        both = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = weights[k * per : (k + 1) * per]
            b_ih, b_hh = rest[:2] if bias else (None, None)
            w_hr = rest[-1] if projection else None
            of_c = None if c0 is None else c0[k]
            of_weights = w_ih, w_hh, b_ih, b_hh, w_hr
            both.append(Inputs(x, h0[k], of_c, *of_weights, batch_sizes, masks[direction], direction == 1))
        found = layer_of_states(cell, both, runs, chosen.algorithm, recompute, return_all_states, layer, padding)
        ys = [y for y, _, _ in found]
        for _, finals, every in found:
            h_n.append(finals[0])
            c_n.append(finals[1])
            all_c.append(every[0])
        all_h += ys
        x = ys[0] if directions == 1 else torch.cat(ys, -1)
        if dropout and training and layer + 1 < num_layers:
            x = F.dropout(x, dropout)
    states = None
    if return_all_states:
        states = (torch.stack(all_h), *((torch.stack(all_c).to(x.dtype),) if cell.has_cell_state else ()))
        states = states if time_first else tuple(s.transpose(1, 2) for s in states)
    if padding is not None and padding_value != 0:
        x = padding.cut(x, padding_value)
    y, h, c = x, _together(h_n), _together(c_n) if c0 is not None else None
    # torch.nn's LSTM is oneDNN's, in 16 bits throughout, unless packed or with a projection; an RNN adds nothing to h.
    packed = batch_sizes is not None or lengths is not None
    if carried is not None and (cell.name == "gru" or (c0 is not None and (packed or projection))):
        c = None if c is None else c.to(carried)
        if not projection:
            y, h = y.to(carried), h.to(carried)
        if states is not None:
            states = tuple(s.to(t.dtype) for s, t in zip(states, (h, c)))
    return y if time_first else reshaped(y, "transpose", 0, 1), h, c, states


def _together(states: list[Tensor]) -> Tensor:
    """[B, .] of each layer and direction as [L*D, B, .]."""
    return torch.stack(states) if len(states) > 1 else reshaped(states[0], "unsqueeze", 0)


def _masks(
    resets: Tensor,
    x: Tensor,
    batch: int,
    batch_sizes: Tensor | None,
    time_first: bool,
    directions: int,
    padding: Padding | None,
) -> tuple[Tensor, ...]:
    """The reset mask of each direction, in the layout of x without features.

    A new sequence begins at a step that is reset, in both directions: the one that runs backwards starts anew where it
    leaves that step for the one before.
    """
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a Tensor, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise RuntimeError(f"resets must be a bool tensor, got {resets.dtype}")
    if resets.device != x.device:
        raise RuntimeError(f"resets must be on the device of the input, {x.device}, got {resets.device}")
    if resets.layout != torch.strided:
        raise RuntimeError(f"resets must be a dense tensor, got layout {resets.layout}")
    if batch_sizes is not None and not torch.compiler.is_compiling():
        # The op checks them too, but the mask is gathered by them before.
        ops.check_batch_sizes(batch_sizes, x.shape[0], batch)
    steps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    want = (steps, batch) if time_first else (batch, steps)
    if tuple(resets.shape) != want:
        letters = "T, B" if time_first else "B, T"
        raise RuntimeError(f"resets must have shape [{letters}] = {list(want)}, got {list(resets.shape)}")
    mask = resets if time_first else resets.t()
    if padding is not None:
        mask = mask & padding.inside
    if batch_sizes is None:
        # No tensor of T - 1 steps, which would be a case of its own in a compiled graph where that is 1.
        return (mask,) if directions == 1 else (mask, torch.cat([mask, torch.zeros_like(mask[:1])])[1:])
    rows = x.shape[0]
    after, inside, step, place = neighbours(sizes_on(batch_sizes, x.device), rows, 1)
    packed = mask[step, place]
    return (packed, packed[after.clamp(max=rows - 1)] & inside)[:directions]


def one_step(
    cell: Cell,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    backend: str | None,
    algorithm: str | None,
) -> tuple[Tensor, Tensor | None]:
    """A sequence of one step: input [B, I], h0 and c0 [B, H]; returns h and c. On a GPU it is one launch."""
    if exporting_to_onnx():
        from fusedrnn import onnx

        return onnx.one_step(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh)
    carried = None if algorithm == ops.INT8 else _carried_dtype(h0 if c0 is None else c0)
    as_given = input, h0, c0, w_ih, w_hh, b_ih, b_hh
    input, h0, c0, *weights = _distinct(operands(algorithm, input.device.type, *as_given))
    for what, t in (("hidden", h0), ("cell state", c0), *(("parameter", w) for w in weights)):
        if t is not None:
            _check_same(input, t, what)
    chosen = planning.choose(
        cell.name,
        input_size=w_ih.shape[1],
        hidden_size=w_hh.shape[1],
        proj_size=0,
        dtype=input.dtype,
        device=input.device,
        backend=backend,
        algorithm=algorithm,
    )
    runs = _torch_or_instead(chosen, [], as_given) if chosen.backend == "torch" else chosen.backend
    if runs == "torch":
        input, h0, c0, *weights = _distinct(as_given)
        result = getattr(torch._VF, f"{cell.name}_cell")(input, h0 if c0 is None else (h0, c0), *weights)
        return (result, None) if c0 is None else result
    algorithm = chosen.algorithm
    if algorithm == "auto" and "step" in ops.BACKEND_ALGORITHMS[runs]:
        algorithm = "step"
    given = Inputs(input.unsqueeze(0), h0, c0, *weights, None, None, None, False)
    _, h, c, _ = recurrence(cell, given, runs, algorithm)
    if carried is not None and cell.name in ("lstm", "gru"):
        h, c = h.to(carried), c.to(carried)
    return h, c if cell.has_cell_state else None


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    recompute: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> tuple:
    """Multi-layer LSTM over a whole sequence.

    Args:
        input: [T, B, I] ([B, T, I] with ``batch_first``), or packed data [N, I] with ``batch_sizes``.
            float32, float64, bfloat16 or float16.
        hx: h0 [L*D, B, P] and c0 [L*D, B, H]; P is H without a projection.
        weights: for each layer and direction w_ih [4H, I], w_hh [4H, P], then b_ih and b_hh [4H] if
            ``bias``, then w_hr [P, H] if P < H. Rows in the order i, f, g, o.
        batch_sizes: int64 [T] on the CPU, as in PackedSequence; then ``batch_first`` has no effect.
        resets: bool [T, B] ([B, T] with ``batch_first``; rows in the order of ``hx`` if packed): where true, a new
            sequence begins at that step, so that its h and c start from zeros.
        return_all_states: return the states after every step as well.
        lengths: int [B], of a padded batch: the steps of each sequence, 0 to T. y is ``padding_value`` past an end,
            states are those at each end (of a sequence without a step: ``hx``).
        recompute: keep no gates for backward (only h and c) and compute them again there.
        backend, algorithm: see :func:`fusedrnn.backend`; None lets planning choose.

    Returns:
        y [T, B, D*P] (or packed [N, D*P]), h_n [L*D, B, P], c_n [L*D, B, H]; with ``return_all_states`` then a tuple of
        every h [L*D, T, B, P] and every c [L*D, T, B, H] ([L*D, B, T, .] with ``batch_first``, [L*D, N, .] if packed).

    Raises:
        TypeError: something is no Tensor.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Equations as in torch.nn.LSTM; projection as in https://arxiv.org/abs/1402.1128.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be a tuple of two Tensors (h_0, c_0), got {type(hx).__name__}")
    h0, c0 = hx
    y, h_n, c_n, states = layers(
        CELLS["lstm"], input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
        batch_sizes, resets, return_all_states, recompute, backend, algorithm, lengths, padding_value,
    )  # fmt: skip
    return (y, h_n, c_n, states) if return_all_states else (y, h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    recompute: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> tuple:
    """Multi-layer GRU over a whole sequence: :func:`lstm` without c, weights [3H, .] in the order r, z, n.

    Returns y [T, B, D*H] (or packed), h_n [L*D, B, H], and with ``return_all_states`` a tuple of every h. Equations as
    in torch.nn.GRU: the reset gate multiplies the recurrent product, bias included.

    Raises:
        TypeError, RuntimeError: as :func:`lstm`.
    """
    return _one_state(
        "gru", input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes,
        resets, return_all_states, recompute, backend, algorithm, lengths, padding_value,
    )  # fmt: skip


def rnn(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    recompute: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> tuple:
    """Multi-layer Elman RNN: :func:`gru` with one gate, weights [H, .]. ``nonlinearity`` is "tanh" or "relu".

    Equations as in torch.nn.RNN.

    Raises:
        TypeError, RuntimeError: as :func:`lstm`.
        ValueError: there is no such nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return _one_state(
        f"rnn_{nonlinearity}", input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
        batch_sizes, resets, return_all_states, recompute, backend, algorithm, lengths, padding_value,
    )  # fmt: skip


def _one_state(cell: str, input: Tensor, hx: Tensor, *rest) -> tuple:
    y, h_n, _, states = layers(CELLS[cell], input, hx, None, *rest)
    return (y, h_n) if states is None else (y, h_n, states)


def _check_same(input: Tensor, other: Tensor, what: str) -> None:
    if other.dtype != input.dtype:
        raise RuntimeError(
            f"Input and {what} tensors are not the same dtype, found input tensor with {input.dtype} and "
            f"{what} tensor with {other.dtype}"
        )
    if other.device != input.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, found input tensor at {input.device} and "
            f"{what} tensor at {other.device}"
        )


def operands(algorithm: str | None, device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants them; what is rounded to 8 bits is float32, whatever it wants."""
    if algorithm == ops.INT8:
        return tuple(None if t is None else t.float() for t in tensors)
    return ops.autocast(device_type, *tensors)


def _carried_dtype(state: Tensor) -> torch.dtype | None:
    """Under autocast on a CPU torch.nn adds the state to 16-bit products step by step: the dtype of that sum."""
    if not torch.is_autocast_enabled("cpu") or state.device.type != "cpu" or state.dtype == torch.float64:
        return None
    return torch.promote_types(state.dtype, torch.get_autocast_dtype("cpu"))


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, but one that comes twice (h and c, tied weights) is a view the second time: Dynamo refuses that."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return found


def _torch_or_instead(chosen: planning.Choice, beyond: list[str], tensors: Sequence[Tensor | None]) -> str:
    """What runs a call with options ``beyond`` torch's own op. Raises RuntimeError where nothing does."""
    if any(thread == threading.get_ident() for thread, _ in _recorders):
        beyond = [*beyond, "record_gates"]
    if chosen.instead and (beyond or torch.compiler.is_compiling() or _under_transform() or _has_tangent(tensors)):
        # Compiled, torch's op is as many operations as there are steps; transforms know little of it.
        return chosen.instead
    if beyond:
        verb = "need" if len(beyond) > 1 else "needs"
        raise RuntimeError(f"{' and '.join(beyond)} {verb} a kernel of fusedrnn: {chosen.why}")
    return "torch"


def _torch_layers(
    cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes, lengths,
    padding_value,
):  # fmt: skip
    """torch's own op: asked for, faster, or on a device that no backend of ours covers.

    It wants the lengths on the host, and none to be 0.
    """
    if not training and input.device.type == "cuda" and _may_need_gradient((input, h0, c0, *weights)):
        # cuDNN has gradients in training only; without dropout that is all the difference.
        training, dropout = True, 0.0
    tail = (list(weights), bias, num_layers, dropout, training, bidirectional)
    op = getattr(torch._VF, cell.mode.lower())

    def call(data, batch_sizes, states, _):
        hx = states[0] if c0 is None else tuple(states)
        return op(data, hx, *tail, batch_first) if batch_sizes is None else op(data, batch_sizes, hx, *tail)

    states = [h0] if c0 is None else [h0, c0]
    if lengths is None:
        result = call(input, batch_sizes, states, None)
    else:
        result = by_packing(call, input, states, lengths, batch_first, padding_value)
    return (*result, None) if c0 is None else result
