"""Recurrent layers as functions: layers, directions, dropout between layers, packed sequences."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import ops, planning
from fusedrnn.autograd import RecurrenceFunction
from fusedrnn.cells import CELLS, Cell


def recurrence(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    backend: str,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer: y, h_n, c_n. Saves for backward only when a gradient will be asked for."""
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    if (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or _has_tangent(tensors):
        return RecurrenceFunction.apply(*tensors, batch_sizes, cell.name, reverse, backend, algorithm)[:3]
    return ops.sequence(cell.name, *tensors, batch_sizes, reverse, backend, algorithm, False)[:3]


def _has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode derivatives are asked for: the Function raises on them, the bare op would give zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


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
    backend: str | None,
    algorithm: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A stack of layers. ``weights`` is flat, in the order of torch.nn's ``_flat_weights``."""
    directions = 2 if bidirectional else 1
    given = {"input": input, "h0": h0, **({"c0": c0} if cell.has_cell_state else {})}
    given |= {f"weights[{k}]": w for k, w in enumerate(weights)}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if len(weights) < 2 or weights[1].dim() != 2:
        raise RuntimeError("weights must begin with w_ih and w_hh, each with 2 dimensions")
    for name, t in list(given.items())[1 : 2 + cell.has_cell_state]:
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
    input, h0, c0, *weights = ops.autocast(input.device.type, input, h0, c0, *weights)
    _check_same(input, h0, "hidden")
    if c0 is not None:
        _check_same(input, c0, "cell state")
    for w in weights:
        _check_same(input, w, "parameter")
    chosen = planning.choose(
        cell.name,
        input_size=weights[0].shape[1],
        hidden_size=weights[1].shape[0] // len(cell.gates),
        proj_size=weights[1].shape[1] if projection else 0,
        dtype=input.dtype,
        device=input.device,
        backend=backend,
        algorithm=algorithm,
    )
    if chosen.backend == "torch":
        return _torch_layers(
            cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
            batch_sizes,
        )  # fmt: skip

    x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for layer in range(num_layers):
        ys = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = weights[k * per : (k + 1) * per]
            b_ih, b_hh = rest[:2] if bias else (None, None)
            w_hr = rest[-1] if projection else None
            y, h, c = recurrence(
                cell, x, h0[k], None if c0 is None else c0[k], w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes,
                direction == 1, chosen.backend, chosen.algorithm,
            )  # fmt: skip
            ys.append(y)
            h_n.append(h)
            c_n.append(c)
        x = ys[0] if directions == 1 else torch.cat(ys, -1)
        if dropout and training and layer + 1 < num_layers:
            x = F.dropout(x, dropout)
    y = x.transpose(0, 1) if batch_first and batch_sizes is None else x
    return y, torch.stack(h_n), torch.stack(c_n) if cell.has_cell_state else None


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
    input, h0, c0, *weights = ops.autocast(input.device.type, input, h0, c0, w_ih, w_hh, b_ih, b_hh)
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
    if chosen.backend == "torch":
        result = getattr(torch._VF, f"{cell.name}_cell")(input, h0 if c0 is None else (h0, c0), *weights)
        return (result, None) if c0 is None else result
    algorithm = chosen.algorithm
    if algorithm == "auto" and "step" in ops.BACKEND_ALGORITHMS[chosen.backend]:
        algorithm = "step"
    _, h, c = recurrence(cell, input.unsqueeze(0), h0, c0, *weights, None, None, False, chosen.backend, algorithm)
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
    backend: str | None = None,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multi-layer LSTM over a whole sequence.

    Args:
        input: [T, B, I] ([B, T, I] with ``batch_first``), or packed data [N, I] with ``batch_sizes``.
            float32, float64, bfloat16 or float16.
        hx: h0 [L*D, B, P] and c0 [L*D, B, H]; P is H without a projection.
        weights: for each layer and direction w_ih [4H, I], w_hh [4H, P], then b_ih and b_hh [4H] if
            ``bias``, then w_hr [P, H] if P < H. Rows in the order i, f, g, o.
        batch_sizes: int64 [T] on the CPU, as in PackedSequence; then ``batch_first`` has no effect.
        backend, algorithm: see :func:`fusedrnn.backend`; None lets planning choose.

    Returns:
        y [T, B, D*P] (or packed [N, D*P]), h_n [L*D, B, P], c_n [L*D, B, H].

    Raises:
        TypeError: something is no Tensor.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Equations as in torch.nn.LSTM; projection as in https://arxiv.org/abs/1402.1128.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be a tuple of two Tensors (h_0, c_0), got {type(hx).__name__}")
    h0, c0 = hx
    return layers(
        CELLS["lstm"], input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
        batch_sizes, backend, algorithm,
    )  # fmt: skip


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
    backend: str | None = None,
    algorithm: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-layer GRU over a whole sequence: :func:`lstm` without c, weights [3H, .] in the order r, z, n.

    Returns y [T, B, D*H] (or packed) and h_n [L*D, B, H]. Equations as in torch.nn.GRU: the reset gate
    multiplies the recurrent product, bias included.
    """
    return layers(
        CELLS["gru"], input, hx, None, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
        batch_sizes, backend, algorithm,
    )[:2]  # fmt: skip


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


def _torch_layers(
    cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes
):
    """torch's own op, for devices no backend of ours covers."""
    hx = h0 if c0 is None else (h0, c0)
    tail = (list(weights), bias, num_layers, dropout, training, bidirectional)
    op = getattr(torch._VF, cell.mode.lower())
    if batch_sizes is None:
        result = op(input, hx, *tail, batch_first)
    else:
        result = op(input, batch_sizes, hx, *tail)
    return (*result, None) if c0 is None else result
