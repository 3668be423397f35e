"""The ops: schemas, checks, fake kernels and the router to the backends written in Python.

``fusedrnn::sequence`` runs one direction of one layer over a whole sequence, ``fusedrnn::sequence_backward``
is its gradient. Both are registered for the CPU by the C++ extension, which answers backend "cpu" itself and
hands every other backend to the ``_python`` twin of the op; without the extension, and on other devices, the
router below is the kernel.

Shapes: T steps, B batch, I input, H hidden, P output (P = H without projection), G gates, A accumulators,
S saved arrays (fusedrnn.cells), N rows of packed data. x is [T, B, I], or [N, I] with ``batch_sizes`` [T]
(int64, on the CPU, as in PackedSequence). Where ``resets`` (bool, [T, B] or [N]) is true, the step starts from zero
states, in either direction. Of the outputs, gates [T, B, S*H] are kept with ``keep_gates``, cells [T, B, H] (every c,
in the accumulation dtype) with ``keep_cells``; both are empty otherwise. cells are differentiable, gates are not.
"""

import contextlib
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import _build, batching
from fusedrnn.backends.common import Gradients, Inputs, Saved
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
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_INPUTS = (
    "Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? batch_sizes, Tensor? resets, bool reverse, "
)
_CHOICE = "str backend, str algorithm, "
_SEQUENCE = (
    f"(str cell, {_INPUTS}{_CHOICE}bool keep_gates, bool keep_cells)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_BACKWARD = (
    f"(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, {_INPUTS}"
    f"Tensor y, Tensor gates, Tensor cells, {_CHOICE}bool[] needs) -> "
    "(Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr)"
)

_lib = torch.library.Library("fusedrnn", "DEF")
for _name, _schema in (("sequence", _SEQUENCE), ("sequence_backward", _BACKWARD)):
    try:
        _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    except RuntimeError as error:  # the extension's kernel has another schema
        raise ImportError(
            "fusedrnn's C++ extension was built from other sources than these: to build it again, "
            f"{_build.HOW_TO_BUILD}"
        ) from error
    _lib.define(_name + "_python" + _schema)


def no_such_algorithm(backend: str, algorithm: str) -> str:
    has = ", ".join(BACKEND_ALGORITHMS[backend])
    return f"algorithm {algorithm!r} of backend {backend!r} cannot run: it has {has}"


def check_sequence(cell: str, inputs: Inputs, backend: str, algorithm: str) -> None:
    """Raises on inputs the op cannot run. Looks at shapes, dtypes and devices only: no data is read."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm not in BACKEND_ALGORITHMS[backend]:
        raise RuntimeError(no_such_algorithm(backend, algorithm))
    spec = CELLS[cell]
    gates = len(spec.gates)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, _ = inputs

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
    check(w_hh.dim() == 2, f"w_hh must have 2 dimensions, got {w_hh.dim()}")
    check(
        w_hh.shape[0] % gates == 0 and w_hh.shape[0] > 0,
        f"w_hh's first dimension must be {gates} * hidden_size, got {w_hh.shape[0]}",
    )
    hidden, out = w_hh.shape[0] // gates, w_hh.shape[1]
    check(h0.dim() == 2, f"h0 must have 2 dimensions, got {h0.dim()}")
    batch = h0.shape[0]
    check_dims("w_ih", w_ih, gates * hidden, x.shape[-1])
    check_dims("h0", h0, batch, out)
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_dims(name, bias, gates * hidden)
    if w_hr is not None:
        check(spec.has_cell_state, f"w_hr (projection) exists only for the LSTM, not for {cell}")
        check_dims("w_hr", w_hr, out, hidden)
    else:
        check(out == hidden, f"w_hh must have shape [{gates * hidden}, {hidden}], got {list(w_hh.shape)}")
    check((c0 is not None) == spec.has_cell_state, f"c0 must {'' if spec.has_cell_state else 'not '}be given")
    if c0 is not None:
        check_dims("c0", c0, batch, hidden)
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


def without_autocast(x: Tensor):
    """The dtypes of an op are settled when it is called; autocast would reach into its products."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _sequence_python(cell, *arguments):
    inputs, (backend, algorithm, keep_gates, keep_cells) = Inputs(*arguments[:11]), arguments[11:]
    check_sequence(cell, inputs, backend, algorithm)
    if inputs.batch_sizes is not None:
        check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])
    with without_autocast(inputs.x):
        return _backend(backend).forward(CELLS[cell], inputs, algorithm, keep_gates, keep_cells)


def _of_backward(arguments) -> tuple[Gradients, Inputs, Saved, str, str, Sequence[bool]]:
    """The arguments of sequence_backward after the cell, in groups."""
    return Gradients(*arguments[:4]), Inputs(*arguments[4:15]), Saved(*arguments[15:18]), *arguments[18:]


def _sequence_backward_python(cell, *arguments):
    grads, inputs, saved, backend, algorithm, needs = _of_backward(arguments)
    _check_backward(cell, grads, inputs, saved, backend, algorithm, needs)
    if inputs.batch_sizes is not None:
        check_batch_sizes(inputs.batch_sizes, inputs.x.shape[0], inputs.h0.shape[0])
    # An input that is absent has no gradient to compute, whatever was asked.
    needs = [need and t is not None for need, t in zip(needs, inputs[:8])]
    with without_autocast(inputs.x):
        return _backend(backend).backward(CELLS[cell], grads, inputs, saved, algorithm, needs)


def _check_backward(
    cell: str, grads: Gradients, inputs: Inputs, saved: Saved, backend: str, algorithm: str, needs: Sequence[bool]
) -> None:
    check_sequence(cell, inputs, backend, algorithm)
    x = inputs.x
    y_shape, h_shape, c_shape, gates_shape, cells_shape = _output_shapes(cell, inputs, True, True)
    for name, t, shape, dtype in (
        ("y", saved.y, y_shape, x.dtype),
        ("gates", saved.gates, gates_shape, x.dtype),
        ("cells", saved.cells, cells_shape, accumulation_dtype(x.dtype)),
        ("dy", grads.dy, y_shape, x.dtype),
        ("dh_n", grads.dh_n, h_shape, x.dtype),
        ("dc_n", grads.dc_n, c_shape, x.dtype),
        ("dcells", grads.dcells, cells_shape, accumulation_dtype(x.dtype)),
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
    if len(needs) != 8:
        raise RuntimeError(f"fusedrnn::sequence_backward: needs must have 8 entries, got {len(needs)}")


def _output_shapes(cell: str, inputs: Inputs, keep_gates: bool, keep_cells: bool) -> tuple[tuple, ...]:
    spec, h0 = CELLS[cell], inputs.h0
    steps, batch, hidden = tuple(inputs.x.shape[:-1]), h0.shape[0], inputs.w_hh.shape[0] // len(spec.gates)
    return (
        (*steps, h0.shape[1]),
        (batch, h0.shape[1]),
        (batch, hidden) if spec.has_cell_state else (0,),
        (*steps, len(spec.saved) * hidden) if keep_gates and spec.saved else (0,),
        (*steps, hidden) if keep_cells and spec.has_cell_state else (0,),
    )


def _sequence_fake(cell, *arguments):
    inputs, (backend, algorithm, keep_gates, keep_cells) = Inputs(*arguments[:11]), arguments[11:]
    check_sequence(cell, inputs, backend, algorithm)
    y, h_n, c_n, gates, cells = _output_shapes(cell, inputs, keep_gates, keep_cells)
    new = inputs.x.new_empty
    return new(y), new(h_n), new(c_n), new(gates), new(cells, dtype=accumulation_dtype(inputs.x.dtype))


def _sequence_backward_fake(cell, *arguments):
    grads, inputs, saved, backend, algorithm, needs = _of_backward(arguments)
    _check_backward(cell, grads, inputs, saved, backend, algorithm, needs)
    return tuple(inputs.x.new_empty(t.shape if need and t is not None else (0,)) for t, need in zip(inputs[:8], needs))


def _autograd_kernel(op):
    """not_differentiable of csrc/autograd.cpp, where that is not built."""

    def below(keys, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class NotDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            return below(*arguments)

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(
                "torch.ops.fusedrnn.* called directly is not differentiable; call fusedrnn.LSTM or "
                "fusedrnn.functional, or run it under torch.no_grad()"
            )

    def kernel(keys, *arguments):
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                "fusedrnn: forward mode (jvp) reaches neither torch.ops.fusedrnn.* nor the gradient of a layer that "
                "was called outside of it; call the layer inside"
            )
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return (NotDifferentiable.apply if recorded else below)(keys, *arguments)

    return kernel


for _name, _kernel, _fake in (
    ("sequence", _sequence_python, _sequence_fake),
    ("sequence_backward", _sequence_backward_python, _sequence_backward_fake),
):
    _lib.impl(_name + "_python", _kernel, "CompositeExplicitAutograd")
    _lib.impl(_name, _kernel, "CUDA")
    if not _build.loaded():
        _lib.impl(_name, _kernel, "CPU")
        _lib.impl(_name, _autograd_kernel(getattr(torch.ops.fusedrnn, _name).default), "Autograd", with_keyset=True)
    torch.library.register_fake(f"fusedrnn::{_name}", _fake, lib=_lib)

sequence = torch.ops.fusedrnn.sequence.default
sequence_backward = torch.ops.fusedrnn.sequence_backward.default
for _op, _rule in ((sequence, batching.sequence), (sequence_backward, batching.sequence_backward)):
    torch.library.register_vmap(_op, functools.partial(_rule, _op, 1), lib=_lib)


def gates_in_torch_order(gates: Tensor, cell: str, backend: str) -> Tensor:
    """Saved gates [..., S*H] of any backend, gate after gate in the order of the cell table."""
    if backend != "cuda" or gates.numel() == 0:
        return gates
    # That backend keeps the S values of a unit side by side.
    return gates.unflatten(-1, (-1, len(CELLS[cell].saved))).transpose(-1, -2).flatten(-2)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants them: float32 and 16-bit ones in its dtype, others as they are."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
