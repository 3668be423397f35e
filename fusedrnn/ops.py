"""The ops: schemas, checks, fake kernels, gradients and the router to the backends written in Python.

``fusedrnn::sequence`` runs one direction of one layer over a whole sequence, ``fusedrnn::sequence_backward``
is its gradient. libfusedrnn.so (csrc/cpu/op.cpp) defines them with their kernels for CPU tensors, answers backend "cpu"
itself and hands every other backend to the ``_python`` twin of the op; without that library, and on other devices, the
router below is the kernel. :func:`sequence` and :func:`sequence_backward` call them for cells of one or two states.

Shapes: T steps, B batch, I input, H hidden, P output (P = H without projection), G gates, A accumulators,
S saved arrays (fusedrnn.cells), N rows of packed data. x is [T, B, I], or [N, I] with ``batch_sizes`` [T]
(int64, on the CPU, as in PackedSequence). Where ``resets`` (bool, [T, B] or [N]) is true, the step starts from zero
states, in either direction. ``states`` and ``final_states`` are h [B, P], then the cell's other ones [B, H]. Of the
outputs, gates [T, B, S*H] are kept with ``keep_gates`` (else an empty tensor), and ``every_state`` with ``keep_states``
(else an empty list): of every state after h, which is y, its value after each step, [T, B, H] in the accumulation
dtype. every_state is differentiable, gates are not. ``needs`` says of which inputs the gradient is wanted: x, each
state, w_ih, w_hh, b_ih, b_hh, w_hr, each parameter, each input; another's is an empty tensor.

Where w_ih is [G*H, 0] and x has G*H columns, x is x W_ih^T itself; reference and cpu take that.

``parameters`` are the cell's vectors [H], ``inputs`` its tensors of every step, [T, B, H] or [N, H]. With ``heads`` n
the units are in n groups, and W_hh [G*H, H / n] takes a unit's gates from the h of its own group: of the rows of a gate
those of group k are multiplied by columns k H / n to (k + 1) H / n of h.

No backend serves ``lengths`` and ``reset_states`` yet: the schema has room for them, so that programs saved now can be
loaded later; they raise.
"""

import contextlib
import functools
import importlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from fusedrnn import _build, batching
from fusedrnn.backends.common import Gradients, Inputs, Saved, is_multiplied
from fusedrnn.cells import CELLS, accumulation_dtype

# Each backend's algorithms; "auto" leaves the choice to the backend.
BACKEND_ALGORITHMS = {
    "reference": ("auto",),
    "cpu": ("auto", "persistent"),
    "triton": ("auto", "step", "sequence"),
    "cuda": ("auto", "step", "persistent"),
}
BACKENDS = tuple(BACKEND_ALGORITHMS)
ALGORITHMS = ("auto", "step", "sequence", "persistent")
# Nobody asks for it by name: that of layers that `quantize` made with activations=torch.int8. Rows of x and h are
# rounded to 8 bits; the weights come in float32, and are such as int8 and a scale give.
INT8, INT8_BACKENDS = "int8", ("reference", "cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_INPUTS = (
    "Tensor x, Tensor[] states, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor[]? parameters, Tensor[]? inputs, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
    "Tensor[]? reset_states, bool reverse, int heads, "
)
SCHEMAS = {
    "sequence": (
        f"(str cell, {_INPUTS}str backend, str algorithm, bool keep_gates, bool keep_states)"
        " -> (Tensor y, Tensor[] final_states, Tensor gates, Tensor[] every_state)"
    ),
    "sequence_backward": (
        f"(str cell, Tensor? dy, Tensor?[] dfinal_states, Tensor?[] devery_state, {_INPUTS}"
        "Tensor y, Tensor gates, Tensor[] every_state, str backend, str algorithm, bool[] needs)"
        " -> (Tensor dx, Tensor[] dstates, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr, "
        "Tensor[] dparameters, Tensor[] dinputs, Tensor[] dreset_states)"
    ),
}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_lib = torch.library.Library("fusedrnn", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not _build.loaded():
        _lib.define(_name + _schema, tags=_TAGS)
    elif str(getattr(torch.ops.fusedrnn, _name).default._schema) != f"fusedrnn::{_name}{_schema}":
        raise ImportError(
            "fusedrnn's C++ extension was built from other sources than these: to build it again, "
            f"{_build.HOW_TO_BUILD}"
        )
    # All outputs in one list (csrc/cpu/op.cpp, elsewhere).
    _lib.define(f"{_name}_python{_schema.split(' -> ')[0]} -> Tensor[]")


def no_such_algorithm(backend: str, algorithm: str) -> str:
    has = ", ".join(BACKEND_ALGORITHMS.get(backend, ("auto",)))
    return f"algorithm {algorithm!r} of backend {backend!r} cannot run: it has {has}"


def check_sequence(cell: str, inputs: Inputs, backend: str, algorithm: str) -> None:
    """Raises on inputs the op cannot run. Looks at shapes, dtypes and devices only: no data is read."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    rounds = algorithm == INT8 and backend in INT8_BACKENDS
    if algorithm not in (*ALGORITHMS, INT8):
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm not in BACKEND_ALGORITHMS[backend] and not rounds:
        raise RuntimeError(no_such_algorithm(backend, algorithm))
    spec = CELLS[cell]
    gates = len(spec.gates)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, _ = inputs.plain
    heads = inputs.heads

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"fusedrnn::sequence: {message}")

    def check_dims(name: str, t: Tensor, *shape: int | None) -> None:
        fits = t.dim() == len(shape) and all(w is None or w == n for w, n in zip(shape, t.shape, strict=True))
        want = ", ".join("*" if w is None else str(w) for w in shape)
        check(fits, f"{name} must have shape [{want}], got {list(t.shape)}")

    for name, t in (("x", x), ("h0", h0), ("w_ih", w_ih), ("w_hh", w_hh)):
        check(t is not None, f"{name} must be a Tensor, got None")
    dims = 3 if batch_sizes is None else 2
    check(x.dim() == dims, f"x must have {dims} dimensions, got {x.dim()}")
    check(x.dtype in DTYPES, f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    check(not rounds or x.dtype == torch.float32, f"x must be float32 where it is rounded to 8 bits, got {x.dtype}")
    check(w_hh.dim() == 2, f"w_hh must have 2 dimensions, got {w_hh.dim()}")
    check(
        w_hh.shape[0] % gates == 0 and w_hh.shape[0] > 0,
        f"w_hh's first dimension must be {gates} * hidden_size, got {w_hh.shape[0]}",
    )
    check(heads >= 1, f"heads must be positive, got {heads}")
    hidden, out = w_hh.shape[0] // gates, w_hh.shape[1] * heads
    check(hidden % heads == 0, f"heads must divide hidden_size, {hidden}, got {heads}")
    check(h0.dim() == 2, f"h0 must have 2 dimensions, got {h0.dim()}")
    batch = h0.shape[0]
    multiplied = is_multiplied(x, w_ih)
    check_dims("w_ih", w_ih, gates * hidden, 0 if multiplied else x.shape[-1])
    if multiplied and backend not in ("reference", "cpu"):
        raise RuntimeError(f"backend {backend!r} cannot run: it multiplies x by w_ih, and w_ih has no columns")
    check_dims("h0", h0, batch, out)
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_dims(name, bias, gates * hidden)
    if w_hr is not None:
        check(cell == "lstm", f"w_hr (projection) exists only for the LSTM, not for {cell}")
        check(heads == 1, f"w_hr (projection) goes with one head, got {heads}")
        check_dims("w_hr", w_hr, out, hidden)
    else:
        check(out == hidden, f"w_hh must have shape [{gates * hidden}, {hidden // heads}], got {list(w_hh.shape)}")
    check((c0 is not None) == spec.has_cell_state, f"c0 must {'' if spec.has_cell_state else 'not '}be given")
    for name, given, want in (
        ("states", 1 + len(inputs.states0), len(spec.states)),
        ("parameters", len(inputs.parameters), len(spec.parameters)),
        ("inputs", len(inputs.inputs), len(spec.inputs)),
    ):
        check(given == want, f"{cell} has {want} {name}, got {given}")
    if c0 is not None:
        check_dims("c0", c0, batch, hidden)
    named = [
        *(zip(spec.states[2:], inputs.others, strict=True)),
        *(zip(spec.parameters, inputs.parameters, strict=True)),
        *(zip(spec.inputs, inputs.inputs, strict=True)),
    ]
    for k, (name, t) in enumerate(named):
        check(t is not None, f"{name} must be a Tensor, got None")
        if k < len(inputs.others):
            check_dims(name, t, batch, hidden)
        elif k < len(inputs.others) + len(inputs.parameters):
            check_dims(name, t, hidden)
        else:
            check_dims(name, t, *x.shape[:-1], hidden)
    if batch_sizes is None:
        check(x.shape[0] > 0, "Expected sequence length to be larger than 0 in RNN")
        check(x.shape[1] == batch, f"h0 must have batch size {x.shape[1]}, got {batch}")
    else:
        check(
            batch_sizes.dim() == 1 and batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu",
            f"batch_sizes must be a 1-D int64 tensor on the CPU, got {batch_sizes.dim()}-D {batch_sizes.dtype} "
            f"on {batch_sizes.device}",
        )
        check(batch_sizes.shape[0] > 0, "Expected sequence length to be larger than 0 in RNN")
    if resets is not None:
        check(resets.dtype == torch.bool, f"resets must be bool, got {resets.dtype}")
        check_dims("resets", resets, *x.shape[:-1])
        check(resets.device == x.device, f"resets must be on the device of x, {x.device}, got {resets.device}")
        check(resets.layout == torch.strided, f"resets must be a dense tensor, got layout {resets.layout}")
    check(x.layout == torch.strided, f"x must be a dense tensor, got layout {x.layout}")
    for name, t in (
        ("h0", h0),
        ("c0", c0),
        ("w_ih", w_ih),
        ("w_hh", w_hh),
        ("b_ih", b_ih),
        ("b_hh", b_hh),
        ("w_hr", w_hr),
        *named,
    ):
        if t is not None:
            check(t.dtype == x.dtype, f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
            check(t.layout == torch.strided, f"{name} must be a dense tensor, got layout {t.layout}")
            check(t.device == x.device, f"{name} must be on the device of x, {x.device}, got {t.device}")


def check_batch_sizes(batch_sizes: Tensor, rows: int, batch: int) -> None:
    """Raises unless ``batch_sizes`` begins with B, never increases, stays at least 1 and adds up to N.

    Reads the values, so it runs below the op only.
    """
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("fusedrnn::sequence: Expected sequence length to be larger than 0 in RNN")
    if sizes[0] != batch:
        raise RuntimeError(f"fusedrnn::sequence: h0 must have batch size {sizes[0]}, got {batch}")
    for t, (before, size) in enumerate(zip([batch, *sizes], sizes)):
        if size > before or size < 1:
            raise RuntimeError(
                f"fusedrnn::sequence: batch_sizes must not increase and must be at least 1, got {size} at step {t}"
            )
    if sum(sizes) != rows:
        raise RuntimeError(f"fusedrnn::sequence: batch_sizes must add up to the {rows} rows of x, got {sum(sizes)}")


def _backend(name: str):
    if name == "cpu":
        raise RuntimeError(f"backend 'cpu' cannot run: {_build.why_not_loaded() or 'it takes CPU tensors only'}")
    return importlib.import_module(f"fusedrnn.backends.{name}")


_autocast_available = functools.cache(torch.amp.is_autocast_available)


@_build.constant_when_compiled
def _has_autocast(device_type: str) -> bool:
    # Dynamo looks through functools.cache, and torch 2.11's cannot trace what is inside.
    return _autocast_available(device_type)


def without_autocast(x: Tensor):
    """The dtypes of an op are settled when it is called; autocast would reach into its products."""
    device = x.device.type
    on = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _inputs(
    cell, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, parameters, inputs, batch_sizes, lengths, resets, reset_states,
    reverse, heads,
) -> Inputs:  # fmt: skip
    """The op's inputs, of a cell that there is today."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    want = len(CELLS[cell].states)
    if len(states) != want:
        raise RuntimeError(f"fusedrnn::sequence: {cell} has {want} states, got {len(states)}")
    for name, given in (("lengths", lengths is not None), ("reset_states", bool(reset_states))):
        if given:
            raise RuntimeError(f"fusedrnn::sequence: the cell {cell} takes no {name}")
    h0, c0 = (*states, None)[:2]
    more = tuple(states[2:]), tuple(parameters or ()), tuple(inputs or ()), heads
    return Inputs(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, *more)


def _of_sequence(arguments) -> tuple[Inputs, str, str, bool, bool]:
    """The arguments of the op sequence, in groups."""
    return _inputs(*arguments[:16]), *arguments[16:]


def _of_backward(arguments) -> tuple[Gradients, Inputs, Saved, str, str, list[bool]]:
    """The arguments of the op sequence_backward after the cell, in groups; needs are in the order of
    :func:`differentiable`.
    """
    cell, dy, dfinals, devery, *rest = arguments
    inputs, (y, gates, every, backend, algorithm, needs) = _inputs(cell, *rest[:15]), rest[15:]
    states = len(CELLS[cell].states)
    for name, given, want in (
        ("dfinal_states", dfinals, states),
        ("devery_state", devery, states - 1),
        ("every_state", every, states - 1),
        ("needs", needs, 6 + states + len(inputs.parameters) + len(inputs.inputs)),
    ):
        if len(given) != want:
            hint = " (was forward run with keep_gates and keep_states?)" if name == "every_state" else ""
            raise RuntimeError(f"fusedrnn::sequence_backward: {name} must have {want} entries, got {len(given)}{hint}")
    if states == 1:
        needs = [*needs[:2], False, *needs[2:]]
    else:
        needs = [*needs[:3], *needs[1 + states : 6 + states], *needs[3 : 1 + states], *needs[6 + states :]]
    dh_n, dc_n = (*dfinals, None)[:2]
    # In y's place may be the dimension that vmap maps, or None: there is none of the others either.
    nothing = y.new_empty(0, dtype=accumulation_dtype(y.dtype)) if isinstance(y, Tensor) else None
    cells = every[0] if every else nothing
    grads = Gradients(dy, dh_n, dc_n, (*devery, None)[0], tuple(dfinals[2:]), tuple(devery[1:]))
    return grads, inputs, Saved(y, gates, cells, tuple(every[1:])), backend, algorithm, needs


def differentiable(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """What has a gradient: x, h0, c0 and the weights, then other states, parameters, inputs."""
    return (*inputs[:8], *inputs.others, *inputs.parameters, *inputs.inputs)


def _outputs(inputs: Inputs, keep_states: bool, y, h_n, c_n, gates, cells, *more):
    """What the op sequence returns; ``more`` are of the states after c the final ones, then all."""
    if inputs.c0 is None:
        return y, [h_n], gates, []
    others = len(inputs.others)
    return y, [h_n, c_n, *more[:others]], gates, [cells, *more[others:]] if keep_states else []


def _gradients(inputs: Inputs, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *more):
    """What the op sequence_backward returns, from the gradients in the order of :func:`differentiable`."""
    others, parameters = len(inputs.others), len(inputs.others) + len(inputs.parameters)
    dstates = [dh0, dc0, *more[:others]] if inputs.c0 is not None else [dh0]
    dparameters, dinputs = [*more[others:parameters]], [*more[parameters:]]
    return dx, dstates, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dparameters, dinputs, []


def _sequence_python(*arguments) -> list[Tensor]:
    """y, h_n, c_n, gates, cells; of the states after c the final ones, then all that are kept"""
    cell = arguments[0]
    inputs, backend, algorithm, keep_gates, keep_states = _of_sequence(arguments)
    check_sequence(cell, inputs, backend, algorithm)
    if inputs.batch_sizes is not None:
        check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])
    with without_autocast(inputs.x):
        return list(_backend(backend).forward(CELLS[cell], inputs, algorithm, keep_gates, keep_states))


def _sequence_backward_python(*arguments) -> list[Tensor]:
    """The gradients, in the order of :func:`differentiable`."""
    cell = arguments[0]
    grads, inputs, saved, backend, algorithm, needs = _of_backward(arguments)
    _check_backward(cell, grads, inputs, saved, backend, algorithm)
    if inputs.batch_sizes is not None:
        check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])
    # An input that is absent has no gradient to compute, whatever was asked.
    needs = [need and t is not None for need, t in zip(needs, differentiable(inputs), strict=True)]
    with without_autocast(inputs.x):
        found = _backend(backend).backward(CELLS[cell], grads, inputs, saved, algorithm, needs[:8])
    return [d if k < 8 or need else d.new_empty(0) for k, (d, need) in enumerate(zip(found, needs, strict=True))]


def _check_backward(cell: str, grads: Gradients, inputs: Inputs, saved: Saved, backend: str, algorithm: str) -> None:
    check_sequence(cell, inputs, backend, algorithm)
    if algorithm == INT8:
        raise RuntimeError("fusedrnn::sequence_backward: what is rounded to 8 bits has no gradient")
    x = inputs.x
    y_shape, h_shape, c_shape, gates_shape, cells_shape, *_ = _output_shapes(cell, inputs, True, True)
    for name, t, shape, dtype in (
        ("y", saved.y, y_shape, x.dtype),
        ("gates", saved.gates, gates_shape, x.dtype),
        ("cells", saved.cells, cells_shape, accumulation_dtype(x.dtype)),
        ("dy", grads.dy, y_shape, x.dtype),
        ("dh_n", grads.dh_n, h_shape, x.dtype),
        ("dc_n", grads.dc_n, c_shape, x.dtype),
        ("dcells", grads.dcells, cells_shape, accumulation_dtype(x.dtype)),
        *(("every_state", t, cells_shape, accumulation_dtype(x.dtype)) for t in saved.others),
        *(("dfinal_states", t, c_shape, x.dtype) for t in grads.dothers_n),
        *(("devery_state", t, cells_shape, accumulation_dtype(x.dtype)) for t in grads.dothers),
    ):
        if t is None and name.startswith("d"):
            continue
        got = "None" if t is None else f"{list(t.shape)} {t.dtype} on {t.device}"
        if t is None or tuple(t.shape) != shape or (t.dtype, t.device, t.layout) != (dtype, x.device, x.layout):
            hint = " (was forward run with keep_gates and keep_cells?)" if t is not None and t.numel() == 0 else ""
            raise RuntimeError(
                f"fusedrnn::sequence_backward: {name} must be a dense {list(shape)} {dtype} on {x.device}, "
                f"got {got}{hint}"
            )


def _output_shapes(cell: str, inputs: Inputs, keep_gates: bool, keep_cells: bool) -> tuple[tuple, ...]:
    spec, h0 = CELLS[cell], inputs.h0
    steps, batch, hidden = tuple(inputs.x.shape[:-1]), h0.shape[0], inputs.w_hh.shape[0] // len(spec.gates)
    others = len(inputs.others)
    return (
        (*steps, h0.shape[1]),
        (batch, h0.shape[1]),
        (batch, hidden) if spec.has_cell_state else (0,),
        (*steps, len(spec.saved) * hidden) if keep_gates and spec.saved else (0,),
        (*steps, hidden) if keep_cells and spec.has_cell_state else (0,),
        *((batch, hidden),) * others,
        *((*steps, hidden),) * (others * keep_cells),
    )


def _sequence_kernel(*arguments):
    return _outputs(_of_sequence(arguments)[0], arguments[-1], *_sequence_python(*arguments))


def _sequence_backward_kernel(*arguments):
    return _gradients(_of_backward(arguments)[1], *_sequence_backward_python(*arguments))


def _sequence_fake(*arguments):
    inputs, backend, algorithm, keep_gates, keep_states = _of_sequence(arguments)
    check_sequence(arguments[0], inputs, backend, algorithm)
    shapes = _output_shapes(arguments[0], inputs, keep_gates, keep_states)
    acc_dtype, last = accumulation_dtype(inputs.x.dtype), 5 + len(inputs.others)
    dtypes = (acc_dtype if k == 4 or k >= last else inputs.x.dtype for k in range(len(shapes)))
    made = (inputs.x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    return _outputs(inputs, keep_states, *made)


def _sequence_backward_fake(*arguments):
    grads, inputs, saved, backend, algorithm, needs = _of_backward(arguments)
    _check_backward(arguments[0], grads, inputs, saved, backend, algorithm)
    of = zip(differentiable(inputs), needs, strict=True)
    return _gradients(inputs, *(inputs.x.new_empty(t.shape if n and t is not None else (0,)) for t, n in of))


def _autograd_kernel(op, apply):
    """The op for autograd: ``apply`` records it where an input requires a gradient."""

    def kernel(keys, *arguments):
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "fusedrnn: forward mode (jvp) reaches neither torch.ops.fusedrnn.* nor the gradient of a layer that "
                "was called outside of it; call the layer inside"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _apply_sequence(*arguments):
    autograd = importlib.import_module("fusedrnn.autograd")
    inputs, backend, algorithm, keep_gates, keep_states = _of_sequence(arguments)
    if inputs.special:
        # Gates that need not be kept are computed again.
        found = autograd.apply_cell(arguments[0], inputs, backend, algorithm, not keep_gates, keep_states)
        return _outputs(inputs, keep_states, *found)
    y, h_n, c_n, gates, cells = autograd.recorded(*inputs.plain, arguments[0], backend, algorithm, False, keep_states)
    return _outputs(inputs, keep_states, y, h_n, c_n, gates if keep_gates else y.new_empty(0), cells)


def _apply_sequence_backward(*arguments):
    autograd = importlib.import_module("fusedrnn.autograd")
    grads, inputs, saved, backend, algorithm, needs = _of_backward(arguments)
    if inputs.special:
        found = autograd.apply_cell_backward(arguments[0], grads, inputs, saved, backend, algorithm, needs)
        return _gradients(inputs, *found)
    found = autograd.RecurrenceBackwardFunction.apply(
        *grads[:4], *inputs.plain, *saved[:3], arguments[0], backend, algorithm, False, needs
    )
    return _gradients(inputs, *found)


def _vmap_sequence(info, in_dims, *arguments):
    inputs, *rest = _of_sequence(arguments)
    dims = _of_sequence(_same_structure(arguments, in_dims))[0]
    if inputs.special:
        call = Call.of(arguments[0], inputs, *rest)
        outputs, out_dims = batching.cell(run, call, info, packed(dims), *packed(inputs))
        return _outputs(inputs, rest[-1], *outputs), _outputs(inputs, rest[-1], *out_dims)
    dims, given = (None, *dims.plain, *(None,) * len(rest)), (arguments[0], *inputs.plain, *rest)
    outputs, out_dims = batching.sequence(sequence, 1, info, dims, *given)
    keep_states = rest[-1]
    return _outputs(inputs, keep_states, *outputs), _outputs(inputs, keep_states, *out_dims)


def _vmap_sequence_backward(info, in_dims, *arguments):
    groups, dims = _of_backward(arguments), _of_backward(_same_structure(arguments, in_dims))
    if groups[1].special:
        call = Call.of(arguments[0], groups[1], groups[3], groups[4], True, True)
        mapped, given = (packed_backward(*three[:3]) for three in (dims, groups))
        outputs, out_dims = batching.cell_backward(run_backward, call, groups[5], info, mapped, *given)
        return _gradients(groups[1], *outputs), _gradients(groups[1], *out_dims)
    flat = [*groups[0][:4], *groups[1].plain, *groups[2][:3], *groups[3:]]
    mapped = [*dims[0][:4], *dims[1].plain, *dims[2][:3], None, None, None]
    outputs, out_dims = batching.sequence_backward(sequence_backward, 1, info, (None, *mapped), arguments[0], *flat)
    return _gradients(groups[1], *outputs), _gradients(groups[1], *out_dims)


def _same_structure(arguments, in_dims):
    """The mapped dimensions in the place of the tensors, everything else as it is."""
    placed = []
    for argument, dims in zip(arguments, in_dims, strict=True):
        if isinstance(argument, (list, tuple)):
            dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(argument)
            placed.append([d if isinstance(t, Tensor) or t is None else t for t, d in zip(argument, dims)])
        else:
            placed.append(dims if isinstance(argument, Tensor) else argument)
    return placed


# What a kernel in Python raised last in a thread.
_raised = threading.local()


def _noted(python):
    @functools.wraps(python)
    def kernel(*arguments):
        try:
            return python(*arguments)
        except Exception as error:
            _raised.error = error
            raise

    return kernel


sequence_op = torch.ops.fusedrnn.sequence.default
sequence_backward_op = torch.ops.fusedrnn.sequence_backward.default
for _name, _op, _python, _kernel, _fake, _apply, _rule in (
    (
        "sequence", sequence_op, _sequence_python, _sequence_kernel, _sequence_fake, _apply_sequence, _vmap_sequence,
    ),
    (
        "sequence_backward", sequence_backward_op, _sequence_backward_python, _sequence_backward_kernel,
        _sequence_backward_fake, _apply_sequence_backward, _vmap_sequence_backward,
    ),
):  # fmt: skip
    _lib.impl(_name + "_python", _noted(_python), "CompositeExplicitAutograd")
    _lib.impl(_name, _kernel, "CUDA")
    if not _build.loaded():
        _lib.impl(_name, _kernel, "CPU")
    _lib.impl(_name, _autograd_kernel(_op, _apply), "Autograd", with_keyset=True)
    torch.library.register_fake(f"fusedrnn::{_name}", _fake, lib=_lib)
    torch.library.register_vmap(_op, _rule, lib=_lib)

_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
# What torch has included where no transform, mode or tracer is on, inside and outside of inference_mode.
_PLAIN = (_keys.raw_repr(), _keys.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr())


def _call(op, *arguments):
    """The op, past the kernel for autograd where nothing else is on: whoever calls has seen to the gradient."""
    special = torch.compiler.is_compiling() or forward_ad._current_level >= 0
    if special or torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN:
        return op(*arguments)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    except RuntimeError as error:
        # torch 2.11 drops the words of an error that passes through the library.
        own = getattr(_raised, "error", None)
        if own is None or not str(error).startswith("fusedrnn: torch refused"):
            raise
        raise own from None
    finally:
        _raised.error = None


@dataclass(frozen=True)
class Call:
    """What is no tensor in a call of the op sequence, whatever the cell; the tensors are those of :func:`packed`."""

    cell: str
    reverse: bool
    heads: int
    backend: str
    algorithm: str
    keep_gates: bool
    keep_states: bool
    others: int
    parameters: int
    inputs: int

    @staticmethod
    def of(cell: str, inputs: Inputs, backend, algorithm, keep_gates, keep_states) -> "Call":
        counts = len(inputs.others), len(inputs.parameters), len(inputs.inputs)
        return Call(cell, inputs.reverse, inputs.heads, backend, algorithm, keep_gates, keep_states, *counts)

    def unpacked(self, tensors) -> Inputs:
        plain, (*more, batch_sizes, resets) = tensors[:8], tensors[8:]
        parameters = self.others + self.parameters
        groups = tuple(more[: self.others]), tuple(more[self.others : parameters]), tuple(more[parameters:])
        return Inputs(*plain, batch_sizes, resets, self.reverse, *groups, self.heads)

    @property
    def gradients(self) -> int:
        """How many gradients of outputs there are."""
        return 4 + 2 * self.others

    @property
    def given(self) -> int:
        """How many tensors :func:`packed` gives."""
        return 10 + self.others + self.parameters + self.inputs


def packed(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The tensors of a call: those of :func:`differentiable`, batch_sizes, resets."""
    return (*differentiable(inputs), inputs.batch_sizes, inputs.resets)


def packed_backward(grads: Gradients, inputs: Inputs, saved: Saved) -> tuple[Tensor | None, ...]:
    """The tensors of a call of the gradient."""
    return (*grads[:4], *grads.dothers_n, *grads.dothers, *packed(inputs), *saved[:3], *saved.others)


def _op_inputs(inputs: Inputs) -> tuple:
    """The arguments that both ops share."""
    states = [inputs.h0, *inputs.states0]
    return (
        inputs.x, states, *inputs[3:8], [*inputs.parameters], [*inputs.inputs], inputs.batch_sizes, None, inputs.resets,
        None, inputs.reverse, inputs.heads,
    )  # fmt: skip


def run(call: Call, *tensors: Tensor | None, keep_states: bool = False) -> tuple[Tensor, ...]:
    """One direction of one layer of any cell: y, h_n, c_n, gates, cells, then of the states after c the final ones and
    all that are kept, by the call or by ``keep_states``. Nothing is recorded for autograd, unless it is compiled.
    """
    keep_states = keep_states or call.keep_states
    fast = _below_the_dispatcher() if (call.backend, call.algorithm) == ("cpu", "auto") else None
    if fast is not None:
        found = fast.sequence(call.cell, tensors, call.reverse, call.heads, call.keep_gates, keep_states)
        if found is not None:
            return found
    y, finals, gates, every = _call(
        sequence_op, call.cell, *_op_inputs(call.unpacked(tensors)), call.backend, call.algorithm, call.keep_gates,
        keep_states,
    )  # fmt: skip
    c_n = finals[1] if len(finals) > 1 else y.new_empty(0)
    cells = every[0] if every else y.new_empty(0, dtype=accumulation_dtype(y.dtype))
    return y, finals[0], c_n, gates, cells, *finals[2:], *every[1:]


def run_backward(call: Call, needs, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients, in the order of :func:`differentiable` as needs is, from what :func:`packed_backward` gives."""
    fast = _below_the_dispatcher() if (call.backend, call.algorithm) == ("cpu", "auto") else None
    if fast is not None:
        found = fast.sequence_backward(call.cell, tensors, call.reverse, call.heads, needs)
        if found is not None:
            return found
    (dy, dh_n, dc_n, dcells, *more), rest = tensors[: call.gradients], tensors[call.gradients :]
    inputs, (y, gates, *every) = call.unpacked(rest[: call.given]), rest[call.given :]
    states, weights = [*needs[1:3], *needs[8 : 8 + call.others]], needs[3:8]
    if inputs.c0 is None:
        states, dfinals, devery, every = states[:1], [dh_n], [], []
    else:
        dfinals, devery = [dh_n, dc_n, *more[: call.others]], [dcells, *more[call.others :]]
    dx, dstates, *others, dparameters, dinputs, _ = _call(
        sequence_backward_op, call.cell, dy, dfinals, devery, *_op_inputs(inputs), y, gates, every, call.backend,
        call.algorithm, [needs[0], *states, *weights, *needs[8 + call.others :]],
    )  # fmt: skip
    dh0, dc0 = (*dstates, dx.new_empty(0))[:2]
    return dx, dh0, dc0, *others, *dstates[2:], *dparameters, *dinputs


def _under_old_vmap() -> bool:
    """Whether the vmap is on that torch.autograd.grad uses for ``is_grads_batched``: it takes no op with lists."""
    return not torch.compiler.is_compiling() and " VmapMode" in str(torch._C._dispatch_tls_local_include_set())


def sequence_arguments(
    cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, backend, algorithm, keep_gates,
    keep_cells,
) -> tuple:  # fmt: skip
    """The arguments of the op sequence for those of :func:`sequence`."""
    return (
        cell, x, [h0] if c0 is None else [h0, c0], w_ih, w_hh, b_ih, b_hh, w_hr, None, None, batch_sizes, None, resets,
        None, reverse, 1, backend, algorithm, keep_gates, keep_cells,
    )  # fmt: skip


# A profiler is to see an op, and what is called below the dispatcher is none.
profiled = torch._C._autograd._profiler_enabled


def _below_the_dispatcher():
    """What calls the CPU kernels without it; None where somebody looks on."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or profiled():
        return None
    return _build._small_calls


def sequence(cell: str, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer: y, h_n, c_n, gates, cells; nothing is recorded for autograd.

    Takes the fields of Inputs, then backend, algorithm, keep_gates and keep_cells; a tensor that there is not is empty.
    """
    fast = _below_the_dispatcher()
    if fast is not None and arguments[11] == "cpu" and arguments[12] == "auto":
        found = fast.sequence(cell, arguments[:10], arguments[10], 1, *arguments[13:])
        if found is not None:
            return found
    y, finals, gates, every = _call(sequence_op, *sequence_arguments(cell, *arguments))
    c_n = finals[1] if len(finals) > 1 else y.new_empty(0)
    cells = every[0] if every else y.new_empty(0, dtype=accumulation_dtype(y.dtype))
    return y, finals[0], c_n, gates, cells


def sequence_of_states(
    cell: str, inputs: Inputs, panels: Tensor | None, panels_ih: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """y, the final states and no other ones of one direction on the CPU, W_hh and W_ih packed or not; None where
    somebody looks on or wants a gradient.
    """
    states = (inputs.h0, *inputs.states0)
    found = sequence_of_layer(
        cell, inputs.x, states, *inputs[3:8], inputs.parameters, inputs.inputs, inputs.batch_sizes, inputs.resets,
        inputs.reverse, inputs.heads, panels, panels_ih,
    )  # fmt: skip
    return None if found is None else (found[0], [*found[1:]], [])


def sequence_of_layer(*arguments) -> tuple[Tensor, ...] | None:
    """The same by the arguments of ``_C.sequence_of_states`` (csrc/module.cpp): y, then the final states; a list that
    holds what backward needs as well where a gradient is wanted of a whole layer.
    """
    fast = _below_the_dispatcher()
    return None if fast is None else fast.sequence_of_states(*arguments)


def sequence_backward_arguments(
    cell, dy, dh_n, dc_n, dcells, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, y, gates,
    cells, backend, algorithm, needs,
) -> tuple:  # fmt: skip
    """The arguments of the op sequence_backward for those of :func:`sequence_backward`."""
    if len(needs) != 8:
        raise RuntimeError(f"fusedrnn::sequence_backward: needs must have 8 entries, got {len(needs)}")
    if c0 is None:
        if dc_n is not None or dcells is not None:
            raise RuntimeError(
                f"fusedrnn::sequence_backward: dc_n and dcells exist only for cells with a c, not {cell}"
            )
        states, dfinals, devery, every, needs = [h0], [dh_n], [], [], [*needs[:2], *needs[3:]]
    else:
        states, dfinals, devery, every = [h0, c0], [dh_n, dc_n], [dcells], [cells]
    return (
        cell, dy, dfinals, devery, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, None, None, batch_sizes, None, resets, None,
        reverse, 1, y, gates, every, backend, algorithm, needs,
    )  # fmt: skip


def sequence_backward(cell: str, *arguments) -> tuple[Tensor, ...]:
    """The gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, each empty where it is not needed; nothing is recorded.

    Takes the fields of Gradients, Inputs and Saved, then backend, algorithm and needs (eight).
    """
    fast = _below_the_dispatcher()
    if fast is not None and arguments[18] == "cpu" and arguments[19] == "auto":
        tensors = *arguments[:14], *arguments[15:18]
        found = fast.sequence_backward(cell, tensors, arguments[14], 1, arguments[20])
        if found is not None:
            return found
    if _under_old_vmap():
        return torch.ops.fusedrnn.sequence_backward_flat.default(cell, *arguments)
    return _sequence_backward(cell, *arguments)


def _sequence_backward(cell: str, *arguments) -> tuple[Tensor, ...]:
    dx, dstates, *others, _, _, _ = _call(sequence_backward_op, *sequence_backward_arguments(cell, *arguments))
    dc0 = dstates[1] if len(dstates) > 1 else dx.new_empty(0)
    return dx, dstates[0], dc0, *others


_lib.define(
    "sequence_backward_flat(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor h0, "
    "Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
    "Tensor? resets, bool reverse, Tensor y, Tensor gates, Tensor cells, str backend, str algorithm, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.impl("sequence_backward_flat", _sequence_backward, "CompositeExplicitAutograd")


def gates_in_torch_order(gates: Tensor, cell: str, backend: str) -> Tensor:
    """Saved gates [..., S*H] of any backend, gate after gate in the order of the cell table."""
    if backend != "cuda" or gates.numel() == 0:
        return gates
    # That backend keeps the S values of a unit side by side.
    return gates.unflatten(-1, (-1, len(CELLS[cell].saved))).transpose(-1, -2).flatten(-2)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants them: float32 and 16-bit ones in its dtype, others as they are."""
    if not (_has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
