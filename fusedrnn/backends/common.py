"""What the backends written in Python share: row bookkeeping and the GEMMs after the loop."""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn.cells import Cell, accumulation_dtype, kernels_of


class Inputs(NamedTuple):
    """What an op computes from, in the order of its schema; see fusedrnn.ops."""

    x: Tensor  # [T, B, I] or [N, I]
    h0: Tensor  # [B, P]
    c0: Tensor | None  # [B, H]: the second state
    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P / heads]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]
    batch_sizes: Tensor | None  # int64 [T], on the CPU
    resets: Tensor | None  # bool [T, B] or [N]
    reverse: bool
    others: tuple[Tensor, ...] = ()  # [B, H] each: the states after c0
    parameters: tuple[Tensor, ...] = ()  # [H] each
    inputs: tuple[Tensor, ...] = ()  # [T, B, H] or [N, H] each
    heads: int = 1  # W_hh has a block for each

    @property
    def plain(self) -> tuple:
        """The fields that every cell has."""
        return self[:11]

    @property
    def states0(self) -> tuple[Tensor, ...]:
        """The states beside h, [B, H] each."""
        return () if self.c0 is None else (self.c0, *self.others)

    @property
    def special(self) -> bool:
        """Whether it takes what only cells of one's own have."""
        # Not bool() of a tuple, which Dynamo of torch 2.11 cannot trace.
        return len(self.others) + len(self.parameters) + len(self.inputs) > 0 or self.heads != 1


class Gradients(NamedTuple):
    """The gradients of the outputs, None where one is zero."""

    dy: Tensor | None  # [T, B, P] or [N, P]
    dh_n: Tensor | None  # [B, P]
    dc_n: Tensor | None  # [B, H]
    dcells: Tensor | None  # [T, B, H] or [N, H], in the accumulation dtype
    dothers_n: tuple[Tensor | None, ...] = ()  # of the states after c: as dc_n
    dothers: tuple[Tensor | None, ...] = ()  # as dcells


class Saved(NamedTuple):
    """What forward kept for backward."""

    y: Tensor  # [T, B, P] or [N, P]
    gates: Tensor  # [T, B, S*H] or [N, S*H]
    cells: Tensor  # [T, B, H] or [N, H], in the accumulation dtype
    others: tuple[Tensor, ...] = ()  # of the states after c: as cells


def simulator_folder() -> Path | None:
    """Where FUSEDRNN_SIMULATE says the simulator is: 1 in a checkout, or the path of tests/ptxsim; unset or 0: nowhere.

    Raises:
        RuntimeError: there is no simulator at that place.
    """
    setting = os.environ.get("FUSEDRNN_SIMULATE", "")
    if setting in ("", "0"):
        return None
    folder = Path(__file__).resolve().parents[2] / "tests" / "ptxsim" if setting == "1" else Path(setting).resolve()
    if not (folder / "__init__.py").exists():
        raise RuntimeError(f"FUSEDRNN_SIMULATE must be 1 in a checkout, or the path of tests/ptxsim; got {setting!r}")
    return folder


def simulator(name: str = ""):
    """The package ptxsim, or a module of it; None without FUSEDRNN_SIMULATE."""
    folder = simulator_folder()
    if folder is None:
        return None
    if "ptxsim" not in sys.modules:
        sys.path.insert(0, str(folder.parent))
        try:
            importlib.import_module("ptxsim")
        finally:
            sys.path.remove(str(folder.parent))
    return importlib.import_module(f"ptxsim{name}")


MOST_ACCUMULATORS = {"triton": 4, "cuda": 4}


def check_kernels(backend: str, cell: Cell) -> None:
    """Raises where a backend has no kernels of the cell."""
    if backend not in kernels_of(cell.name):
        raise RuntimeError(f"backend {backend!r} cannot run: it has no kernels of the cell {cell.name}")
    count, most = len(cell.accumulators), MOST_ACCUMULATORS.get(backend)
    if most is not None and count > most:
        raise RuntimeError(
            f"backend {backend!r} cannot run: its kernels have up to {most} accumulators, the cell "
            f"{cell.name} has {count}"
        )


def is_multiplied(x: Tensor, w_ih: Tensor) -> bool:
    """Whether x [..., G*H] is x W_ih^T itself, w_ih having no columns."""
    return w_ih.dim() == 2 and w_ih.shape[1] == 0 and x.shape[-1] == w_ih.shape[0]


def step_rows(x: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int]]:
    """(first row, number of rows) of every time step, in x seen as [N, I]."""
    if batch_sizes is None:
        steps, batch = x.shape[0], x.shape[1]
        return [(t * batch, batch) for t in range(steps)]
    rows, offset = [], 0
    for size in batch_sizes.tolist():
        rows.append((offset, size))
        offset += size
    return rows


def rows_of(t: Tensor) -> Tensor:
    """[T, B, K] or [N, K] as [N, K]."""
    return t.flatten(0, -2)


def sizes_on(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """``batch_sizes`` on a device, int64 [T]; nobody waits for the device, and a CUDA graph may be recorded.

    What a graph records must not read memory of the host again: there the numbers are arguments of kernels, one for
    some fifty different sizes.
    """
    if device.type != "cuda":
        return batch_sizes.to(device)
    if torch.compiler.is_compiling():
        return batch_sizes.to(device, non_blocking=True)
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            return batch_sizes.pin_memory().to(device, non_blocking=True)
    return _by_value(batch_sizes, device)


def _by_value(batch_sizes: Tensor, device: torch.device) -> Tensor:
    values, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    sizes = torch.zeros(batch_sizes.shape, dtype=torch.int64, device=device)
    torch._foreach_add_(sizes.split(counts.tolist()), values.tolist())
    return sizes


def dense(t: Tensor | None) -> Tensor | None:
    """Contiguous and beginning at 16 bytes, so that rows may be loaded in pieces of 16."""
    if t is None:
        return None
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors of one shape one after the other, zeros for None; None without any, or where there is None only."""
    given = [t for t in tensors if t is not None]
    if not given:
        return None
    if len(tensors) == 1:
        return dense(given[0])
    return torch.stack([torch.zeros_like(given[0]) if t is None else t for t in tensors])


def apart(stacked: Tensor, count: int) -> list[Tensor]:
    """The tensors of a stack: outputs of an op may not share memory."""
    return [stacked] if count == 1 else [t.clone() for t in stacked]


def empty_stack(like: Tensor, count: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A stack of ``count`` for a kernel to write to; of one the tensor itself, of none no elements."""
    sizes = (0,) if count == 0 else shape if count == 1 else (count, *shape)
    return like.new_empty(sizes, dtype=dtype)


def neighbours(sizes: Tensor, rows: int, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every row of packed data the row of the same sequence ``offset`` (1 or -1) steps on, whether there is one,
    the row's step, and its place in the step's batch; on the device of the sizes, see ``sizes_on``.
    """
    steps = sizes.shape[0]
    first = sizes.cumsum(0) - sizes
    step = torch.repeat_interleave(torch.arange(steps, device=sizes.device), sizes, output_size=rows)
    place = torch.arange(rows, device=sizes.device) - first[step]
    other = step + offset
    inside = (other >= 0) & (other < steps)
    other = other.clamp(0, steps - 1)
    return first[other] + place, inside & (place < sizes[other]), step, place


def last_rows(rows: int, batch: int, batch_sizes: Tensor | None, device: torch.device) -> slice | Tensor:
    """Which of the N rows are the last time step of each sequence: a slice, or an index [B]."""
    if batch_sizes is None or batch_sizes[-1] == batch:
        return slice(rows - batch, rows)
    sizes = sizes_on(batch_sizes, device)
    sequence = torch.arange(batch, device=device)
    length = (sizes.unsqueeze(1) > sequence).sum(0)
    return (sizes.cumsum(0) - sizes)[length - 1] + sequence


def previous(
    state0: Tensor, states: Tensor, batch_sizes: Tensor | None, reverse: bool, resets: Tensor | None = None
) -> Tensor:
    """For every row of ``states`` [N, K] what its step started from: another row of it, one of ``state0``, or zeros."""
    batch = state0.shape[0]
    state0 = state0.to(states.dtype)
    if batch_sizes is None:
        inner = (states[batch:], state0) if reverse else (state0, states[: states.shape[0] - batch])
        found = torch.cat(inner)
    else:
        rows = states.shape[0]
        row, inside, _, place = neighbours(sizes_on(batch_sizes, states.device), rows, 1 if reverse else -1)
        found = torch.cat([states, state0])[torch.where(inside, row, rows + place)]
    return found if resets is None else found.masked_fill(resets.reshape(-1, 1), 0)


def product(
    a: Tensor, b: Tensor, add: Tensor | None = None, out: Tensor | None = None, keep_sums: bool = False
) -> Tensor:
    """a b (+ add) of matrices, sums in float32 at least, rounded once; into ``out``, which may be ``add``. With
    ``keep_sums`` a b as it is summed, not rounded.

    Every product of these backends outside of their kernels. On the CPU 16 bits are widened: what torch's own product
    makes there of infinities, NaN and odd sizes depends on the processor. On a GPU float32 is tf32 where torch's own
    RNNs may take it, whatever other products may, and 16 bits are summed in float32 also where a sum is split.
    """
    if keep_sums and a.element_size() <= 2:
        if a.device.type == "cuda" and not torch.version.hip:
            with _flag_of(a):
                return torch.mm(a, b, out_dtype=torch.float32)
        return product(a.float(), b.float())
    if a.device.type == "cpu" and a.element_size() <= 2:
        wide = a.float() @ b.float() if add is None else torch.addmm(add.float(), a.float(), b.float())
        return wide.to(a.dtype) if out is None else out.copy_(wide)
    flag = _flag_of(a) if a.device.type == "cuda" else contextlib.nullcontext()
    with flag:
        return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, out=out)


def allow_tf32() -> bool:
    """Whether torch's own RNNs may compute float32 products in tf32 on a GPU."""
    # Follows torch.backends.cudnn.allow_tf32 as well, which itself raises when RNNs and convolutions differ.
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


def _flag_of(a: Tensor):
    """For the length of a with block, torch's flag of matrix products as those of ``a`` need it."""
    if a.dtype == torch.float32:
        return _as_flag("fp32_precision", "tf32" if allow_tf32() else "ieee")
    if a.dtype in (torch.bfloat16, torch.float16):
        kind = "bf16" if a.dtype == torch.bfloat16 else "fp16"
        return _as_flag(f"allow_{kind}_reduced_precision_reduction", False)
    return contextlib.nullcontext()


# Flags that are not as the user set them -> (how many products need that just now, what the user set).
_changed: dict[str, tuple[int, object]] = {}
_changing = threading.Lock()


@contextlib.contextmanager
def _as_flag(name: str, value):
    """They belong to the process: of several threads the first sets a flag, the last puts it back."""
    flags, words = torch.backends.cuda.matmul, {"none": "ieee"}
    with _changing:
        count, before = _changed.get(name, (0, None))
        if not count:
            before = getattr(flags, name)
            if name != "fp32_precision":  # a pair, in some versions of torch: may sums be split as well
                before = getattr(torch._C, f"_get_cublas_{name}")()
        changes = count > 0 or words.get(getattr(flags, name), getattr(flags, name)) != value
        if changes:
            _changed[name] = (count + 1, before)
            setattr(flags, name, value)
    try:
        yield
    finally:
        if changes:
            with _changing:
                count, before = _changed.pop(name)
                if count > 1:
                    _changed[name] = (count - 1, before)
                else:
                    setattr(flags, name, before)


def started_from(inputs: Inputs, y: Tensor) -> Tensor:
    """The h that every row's step started from, [N, P]."""
    return previous(inputs.h0, rows_of(y), inputs.batch_sizes, inputs.reverse, inputs.resets)


def gate_columns(dgates: Tensor, acc: tuple[int, ...], hidden: int) -> Tensor:
    """The columns of some accumulators; a view where they stand side by side."""
    first, last = acc[0], acc[-1]
    if acc == tuple(range(first, last + 1)):
        return dgates[:, first * hidden : (last + 1) * hidden]
    return torch.cat([dgates[:, a * hidden : (a + 1) * hidden] for a in acc], dim=1)


def weight_gradients(
    cell: Cell,
    inputs: Inputs,
    y: Tensor,  # [T, B, P] or [N, P]
    dgates: Tensor,  # [N, A*H]
    h: Tensor | None,  # [N, H] before projection; only with w_hr
    dy_total: Tensor | None,  # [N, P] gradient of y with the recurrent part; only with w_hr
    needs: Sequence[bool],
    dh0: Tensor,
    dc0: Tensor,
    dothers: Sequence[Tensor] = (),  # of the states after c
    dparameters: Sequence[Tensor | None] = (),  # [N, H] each, for every row
    dinputs: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """The eight gradients in the order of the op, from the gate gradients of the whole sequence; then those of the
    states after c, of the parameters and of the inputs.

    One GEMM each over all rows, for W_hh of several heads one a head; an output that is not needed is an empty tensor.
    """
    hidden = dgates.shape[-1] // len(cell.accumulators)
    dgates = rows_of(dgates)
    x = inputs.x
    multiplied = is_multiplied(x, inputs.w_ih)

    def wanted(k: int, make: Callable[[], Tensor]) -> Tensor:
        return make() if needs[k] else dgates.new_empty(0)

    dgates_x = gate_columns(dgates, cell.x_acc, hidden)
    dgates_h = dgates_x if cell.h_acc == cell.x_acc else gate_columns(dgates, cell.h_acc, hidden)
    return (
        wanted(0, lambda: (dgates_x.clone() if multiplied else product(dgates_x, inputs.w_ih)).view(x.shape)),
        wanted(1, lambda: dh0),
        wanted(2, lambda: dc0),
        wanted(3, lambda: torch.empty_like(inputs.w_ih) if multiplied else product(dgates_x.t(), rows_of(x))),
        wanted(4, lambda: _recurrent_gradient(inputs.heads, hidden, dgates_h, started_from(inputs, y))),
        wanted(5, lambda: dgates_x.sum(0)),
        wanted(6, lambda: dgates_h.sum(0)),
        wanted(7, lambda: product(rows_of(dy_total).t(), h)),
        *dothers,
        *(dgates.new_empty(0) if d is None else d.sum(0) for d in dparameters),
        *(dgates.new_empty(0) if d is None else d.view(*x.shape[:-1], hidden) for d in dinputs),
    )


def recurrent_product(dgates: Tensor, w_hh: Tensor, heads: int) -> Tensor:
    """dgates [rows, G*H] W_hh, of each head its own: [rows, P]."""
    if heads == 1:
        return product(dgates, w_hh)
    rows, units = dgates.shape[0], w_hh.shape[1]
    blocks, weights = dgates.reshape(rows, -1, heads, units), w_hh.view(-1, heads, units, units)
    found = [product(blocks[:, :, k].flatten(1), weights[:, k].flatten(0, 1)) for k in range(heads)]
    return torch.cat(found, 1)


# From so many rows on a step is two products and a kernel for the cell: its own kernel would read the weights once for
# every 32 rows.
MANY_ROWS = 512
# Of the sums of both products at a time: what is read again soon is still in L2.
PRODUCT_BYTES = 32 << 20


def products_of_rows(inputs: Inputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of a call of one step, some rows after the other: x W_ih^T and h W_hh^T, [rows, G*H] each, not rounded."""
    x, h, heads = rows_of(inputs.x), inputs.h0, inputs.heads
    if inputs.resets is not None:
        h = h.masked_fill(inputs.resets.reshape(-1, 1), 0)
    columns, wide = inputs.w_hh.shape[0], accumulation_dtype(x.dtype).itemsize
    each = max(PRODUCT_BYTES // (2 * columns * wide), 1)
    for first in range(0, h.shape[0], each):
        rows = slice(first, min(first + each, h.shape[0]))
        of_x = product(x[rows], inputs.w_ih.t(), keep_sums=True)
        if heads == 1:
            of_h = product(h[rows], inputs.w_hh.t(), keep_sums=True)
        else:
            units = inputs.w_hh.shape[1]
            blocks, weights = h[rows].unflatten(1, (heads, units)), inputs.w_hh.view(-1, heads, units, units)
            found = [product(blocks[:, k], weights[:, k].flatten(0, 1).t(), keep_sums=True) for k in range(heads)]
            of_h = torch.stack([t.unflatten(1, (-1, units)) for t in found], 2).flatten(1)
        yield rows, of_x, of_h


def _recurrent_gradient(heads: int, hidden: int, dgates: Tensor, started: Tensor) -> Tensor:
    """The gradient of W_hh [G*H, P / heads] from dgates [N, G*H] and what every row started from, [N, P]."""
    if heads == 1:
        return product(dgates.t(), started)
    rows, units = dgates.shape[0], hidden // heads
    blocks, started = dgates.reshape(rows, -1, heads, units), started.view(rows, heads, units)
    found = [product(blocks[:, :, k].flatten(1).t(), started[:, k]).view(-1, units, units) for k in range(heads)]
    return torch.stack(found, 1).view(-1, units)
