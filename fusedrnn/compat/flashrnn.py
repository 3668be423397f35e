"""FlashRNN's function (package flashrnn, 1.0.8), for a CPU too: :func:`flashrnn`.

Letters as in that package: B batch, T steps, G gates, N heads, D units of a head, P units of the same head one step
before, S states. In its layout strings H stands for N.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedrnn import functional, layer, zoo
from fusedrnn.backends.common import Inputs
from fusedrnn.definition import Definition, cell


@functools.cache
def _from_outside(definition: Definition) -> Definition:
    """A cell that takes the product of the input from outside: of a gate i as the input wi."""
    inner, gates = definition.function, definition.gates

    def step(x, u, s, **w):
        return inner(x._replace(**{gate: getattr(x, gate) + w[f"w{gate}"] for gate in gates}), u, s)

    inputs = [f"w{gate}" for gate in gates]
    return cell(step, gates=gates, states=definition.states, inputs=inputs, name=f"flash_{definition.name}")


@dataclass(frozen=True)
class _Function:
    """A cell, and which gate of R, of b beside R and of b beside W each of its gates takes (-1: none)."""

    cell: Definition
    recurrent: tuple[int, ...]
    bias: tuple[int, ...]
    bias_of_input: tuple[int, ...]


_FOUR = (0, 1, 2, 3)
_FUNCTIONS = {
    "lstm": _Function(zoo.lstm, _FOUR, _FOUR, (-1,) * 4),
    "slstm": _Function(zoo.slstm, _FOUR, _FOUR, (-1,) * 4),
    # R has the candidate first, then r and z; W has r, z and the candidate; b has R's, then the candidate's of W.
    "gru": _Function(zoo.gru, (1, 2, 0), (1, 2, 0), (-1, -1, 3)),
    "elman": _Function(zoo.rnn_tanh, (0,), (0,), (-1,)),
}
BACKENDS = ("vanilla", "vanilla_fwbw", "cuda", "cuda_fused", "triton_fused")


def flashrnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    states: Tensor | None = None,
    function: str = "lstm",
    config: Any = None,
    backend: str = "cuda_fused",
    dtype: str = "bfloat16",
) -> tuple[Tensor, Tensor]:
    """What flashrnn.flashrnn computes, with its arguments and layouts.

    Everything is computed in the dtype of ``Wx``. ``backend`` and ``dtype`` are that package's and choose nothing here:
    planning does, or ``with fusedrnn.backend(...)``. With gradient_recurrent_clipval or gradient_recurrent_cut in the
    config, the sequence is a loop of torch's operations.

    Args:
        Wx: [B, T, G, N, D] (input_shape "TBGHD": [T, B, G, N, D]), the product of the input, without a bias.
        R: [G, N, D, P] ("GHDP"; or "HGDP", "HPGD", "HPDG").
        b: [G, N, D] ("GHD"; or "HGD", "HDG"); of a gru 4 gates.
        states: [S, B, 1, N, D], in the config's output_shape; absent: the config's initial_val, zeros.
        function: "lstm", "slstm" (gates i, f, z, o), "gru" or "elman"; a config's own comes first.
        config: a FlashRNNConfig, or anything with its fields.

    Returns:
        Every state at every step [S, B, T, N, D] (in the config's output_shape), S being h; h, c; or h, c, n, m. Then
        the last ones, [S, B, 1, N, D]. Of an slstm h and c / n are meant: c, n and m are so up to a factor. Where n is
        given, it has to be 1 or more (or 0, with c), as every n is that this returns.

    Raises:
        ValueError: a function, backend or layout that there is not; shapes that do not fit; forward_clipval.
    """
    function = getattr(config, "function", function)
    backend = getattr(config, "backend", backend)
    if function not in _FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(_FUNCTIONS)}, got {function!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if getattr(config, "forward_clipval", None) is not None:
        raise ValueError("forward_clipval is not supported: must be None, got " + repr(config.forward_clipval))
    layout = {
        name: getattr(config, name, default)
        for name, default in (
            ("input_shape", "BTGHD"), ("recurrent_shape", "GHDP"), ("bias_shape", "GHD"), ("output_shape", "SBTHD"),
        )
    }  # fmt: skip
    kind = _FUNCTIONS[function]
    Wx = _as("Wx", Wx, layout["input_shape"], "TBGHD")
    R = _as("R", R, layout["recurrent_shape"], "GHDP").to(Wx.dtype)
    b = _as("b", b, layout["bias_shape"], "GHD").to(Wx.dtype)
    steps, batch, _, heads, units = Wx.shape
    _check(kind, function, Wx, R, b)
    count = len(kind.cell.states)
    if states is None:
        values = getattr(config, "initial_val", 0.0)
        if isinstance(values, Sequence):
            states = Wx.new_empty(count, batch, 1, heads, units)
            for state, value in zip(states, values, strict=True):
                state.fill_(value)
        else:
            states = Wx.new_full((count, batch, 1, heads, units), values)
    else:
        states = _as("states", states, layout["output_shape"], "SBTHD").to(Wx.dtype)
        if tuple(states.shape) != (count, batch, 1, heads, units):
            raise ValueError(f"states must be {[count, batch, 1, heads, units]} (SBTHD), got {list(states.shape)}")
    clip, cut = (getattr(config, f"gradient_recurrent_{what}", None) for what in ("clipval", "cut"))
    run = _fused if clip is None and not cut else _loop
    found = run(kind, Wx, R, b, states, *(() if run is _fused else (clip, bool(cut))))  # [S, T, B, N, D]
    every = _as("states", found, "STBHD", layout["output_shape"])
    return every, every.narrow(layout["output_shape"].index("T"), steps - 1, 1)


def _as(name: str, t: Tensor, have: str, want: str) -> Tensor:
    """A view with its dimensions in another order."""
    if sorted(have) != sorted(want):
        raise ValueError(f"the layout of {name} must be made of the letters {want}, got {have!r}")
    if t.dim() != len(have):
        raise ValueError(f"{name} must have {len(have)} dimensions, {have}, got {list(t.shape)}")
    return t if have == want else t.permute([have.index(letter) for letter in want])


def _check(kind: _Function, function: str, Wx: Tensor, R: Tensor, b: Tensor) -> None:
    steps, _, _, heads, units = Wx.shape
    biases = max(*kind.bias, *kind.bias_of_input) + 1
    if steps < 1:
        raise ValueError("Wx must have at least one step")
    for name, t, letters, want in (
        ("Wx", Wx[0, 0], "GHD", (len(kind.cell.gates), heads, units)),
        ("R", R, "GHDP", (len(kind.recurrent), heads, units, units)),
        ("b", b, "GHD", (biases, heads, units)),
    ):
        if tuple(t.shape) != want:
            raise ValueError(f"{name} of function {function!r} must be {list(want)} ({letters}), got {list(t.shape)}")


def _of_gates(t: Tensor, gates: tuple[int, ...]) -> Tensor:
    """Of t [G, ...] the gates that are named, zeros where none is."""
    if gates == tuple(range(t.shape[0])):
        return t  # no copy forward, no scatter backward
    return torch.stack([torch.zeros_like(t[0]) if gate < 0 else t[gate] for gate in gates])


def _fused(kind: _Function, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor) -> Tensor:
    definition, (steps, batch, gates, heads, units) = kind.cell, Wx.shape
    hidden = heads * units
    choice = layer.choose_for(definition, gates * hidden, hidden, Wx.dtype, Wx.device, heads=heads)
    x, width, inputs = Wx.reshape(steps, batch, gates * hidden), 0, ()
    if choice.backend not in ("cpu", "reference"):
        # Their kernels multiply x by W_ih.
        definition = _from_outside(definition)
        choice = layer.choose_for(definition, 1, hidden, Wx.dtype, Wx.device, heads=heads)
        x, width = Wx.new_zeros(steps, batch, 1), 1
        inputs = tuple(gate.reshape(steps, batch, hidden) for gate in Wx.unbind(2))
    h0, *others = (state.reshape(batch, hidden) for state in states.unbind(0))
    inputs = Inputs(
        x=x,
        h0=h0,
        c0=others[0] if others else None,
        w_ih=Wx.new_zeros(gates * hidden, width),
        w_hh=_of_gates(R, kind.recurrent).reshape(gates * hidden, units),
        b_ih=_of_gates(b, kind.bias_of_input).flatten() if max(kind.bias_of_input) >= 0 else None,
        b_hh=_of_gates(b, kind.bias).flatten(),
        w_hr=None,
        batch_sizes=None,
        resets=None,
        reverse=False,
        others=tuple(others[1:]),
        inputs=inputs,
        heads=heads,
    )
    y, _, every = functional.recurrence_of_states(
        definition.cell, inputs, choice.backend, choice.algorithm, keep_cells=bool(others)
    )
    found = torch.stack([y, *(state.to(y.dtype) for state in every[: len(others)])])
    return found.view(-1, steps, batch, heads, units)


class _Clip(torch.autograd.Function):
    """x, whose gradient is limited to ``most`` in each element."""

    @staticmethod
    def forward(x, most):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.most, ctx.most), None


def _loop(kind: _Function, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor, clip: float | None, cut: bool) -> Tensor:
    """The same, what reaches h through R clipped to ``clip``, or none of it."""
    now, found = [state.squeeze(1) for state in states.unbind(0)], []
    R, b_u, b_x = _of_gates(R, kind.recurrent), _of_gates(b, kind.bias), _of_gates(b, kind.bias_of_input)
    for step in Wx.unbind(0):
        h = now[0].detach() if cut else _Clip.apply(now[0], clip)
        u = torch.einsum("bnp,gndp->gbnd", h, R) + b_u.unsqueeze(1)
        now = [*kind.cell.step((step + b_x).unbind(1), u.unbind(0), now)]
        found.append(torch.stack(now))
    return torch.stack(found, 1)
