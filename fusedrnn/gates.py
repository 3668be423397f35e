"""What the gates of recurrent layers did: recorded from the activations that the kernels save, and summarised.

Sizes: T steps, B batch, I input, H hidden, P output (P = H without projection).
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import functional, modules
from fusedrnn.cells import accumulation_dtype

SIGMOID = ("i", "f", "o", "r", "z")
TANH = ("g", "n")
# The gate that multiplies the state of the step before.
KEEPS = {"lstm": "f", "gru": "z"}

_THEIRS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_OURS = (modules.RecurrentLayer, modules.RecurrentCell)


class Saturation(NamedTuple):
    """Shares of steps, per unit [H], in which a gate stood near the two ends of its range."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one direction of one layer, detached, in the dtype of the layer: ``gates["f"]`` is [T, B, H].

    An LSTM has i, f, g, o, c and h, a GRU r, z, n and h, an RNN h (torch.nn's names and equations). c is float32 for
    16-bit layers; h is [T, B, P] with a projection. Steps and samples stand in the order of the input, for a reverse
    direction too. Steps that a sequence of a packed or padded batch does not have are NaN, ``valid`` is False there,
    and no summary counts them. ``input`` [T, B, I] is what the layer's module was called with.

    Summaries of 16-bit gates are computed in float32; all take every step of every sample.
    """

    name: str
    cell: str
    layer: int
    direction: int
    tensors: dict[str, Tensor] = field(repr=False)
    input: Tensor | None = field(repr=False)
    valid: Tensor | None = field(repr=False)  # [T, B], None: all

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, gates before states."""
        return tuple(self.tensors)

    @property
    def sigmoid_names(self) -> tuple[str, ...]:
        """The gates that lie in (0, 1)."""
        return tuple(name for name in self.names if name in SIGMOID)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise KeyError(f"{self.cell} has {', '.join(self.names)}, got {name!r}")
        return self.tensors[name]

    def _rows(self, t: Tensor) -> Tensor:
        """[T, B, K] as [N, K], the steps that exist, in float32 or float64."""
        t = t.flatten(0, 1) if self.valid is None else t[self.valid]
        return t.to(accumulation_dtype(t.dtype))

    def _activation(self, name: str) -> str | None:
        if name in SIGMOID:
            return "sigmoid"
        return "tanh" if name in TANH or self.cell == "rnn_tanh" else None

    def openness(self, name: str) -> Tensor:
        """Mean of a sigmoid gate over steps and samples, per unit [H]: 0 is closed, 1 open.

        Raises:
            ValueError: the gate is no sigmoid.
        """
        value = self[name]
        if name not in SIGMOID:
            raise ValueError(f"openness takes a sigmoid gate ({', '.join(SIGMOID)}), got {name!r}")
        return self._rows(value).mean(0)

    def saturation(self, name: str, low: float = 0.1, high: float = 0.9) -> Saturation:
        """Per unit [H], the share of steps in which a sigmoid is below ``low``, and in which it is above ``high``.

        For a tanh (g, n, h of a tanh RNN): below -``high``, and above ``high``.

        Raises:
            ValueError: the values come from neither; or not 0 <= low < high <= 1.
        """
        if not 0 <= low < high <= 1:
            raise ValueError(f"saturation needs 0 <= low < high <= 1, got low={low}, high={high}")
        rows, activation = self._rows(self[name]), self._activation(name)
        if activation is None:
            raise ValueError(f"saturation takes a sigmoid or a tanh, but {name} of {self.cell} is neither")
        below = low if activation == "sigmoid" else -high
        return Saturation((rows < below).to(rows.dtype).mean(0), (rows > high).to(rows.dtype).mean(0))

    def half_life(self) -> Tensor:
        """Steps after which half of a unit's state is left, if nothing is added, per unit [H].

        ln 0.5 / mean(ln k), k the gate that multiplies the old state: f of an LSTM, z of a GRU. The exponential of
        mean(ln k) is the geometric mean of k over steps and samples. 0 where a k is 0, infinite where every k is 1.

        Raises:
            ValueError: an RNN has no such gate.
        """
        if self.cell not in KEEPS:
            raise ValueError(f"half_life needs a gate that keeps the state (LSTM, GRU), {self.cell} has none")
        return math.log(2) / self._rows(self[KEEPS[self.cell]]).log().mean(0).abs()

    def correlation(self, name: str) -> Tensor:
        """Pearson's correlation of the mean over units of ``name`` with each feature of the input [I].

        Over all steps of all samples, in float64. NaN where the feature or the mean is constant.
        """
        if self.input is None:
            raise ValueError(f"{self.name} was called through fusedrnn.functional: its input was not recorded")
        features, mean = self._rows(self.input).double(), self._rows(self[name]).double().mean(1, keepdim=True)

        def centred(t: Tensor) -> Tensor:
            # Rounding would leave a constant column a little of either sign.
            return torch.where(t.amax(0) == t.amin(0), torch.nan, t - t.mean(0))

        a, b = centred(features), centred(mean)
        return (a * b).sum(0) / ((a * a).sum(0) * (b * b).sum(0)).sqrt()

    def summary(self, low: float = 0.1, high: float = 0.9) -> dict[str, Any]:
        """Plain numbers: the means over units of what the methods give, and the quartiles of the half-life.

        ``correlation`` is the strongest one, with its feature; None where every one is NaN.
        """
        gates: dict[str, Any] = {}
        for name in self.names:
            key = "openness" if name in SIGMOID else "mean"
            found = gates[name] = {key: float(self._rows(self[name]).mean())}
            if self._activation(name):
                shares = self.saturation(name, low, high)
                found |= {"saturated_low": float(shares.low.mean()), "saturated_high": float(shares.high.mean())}
            if self.input is not None:
                r = self.correlation(name)
                strongest = int(r.abs().nan_to_num(-1).argmax())
                found["correlation"] = None if r.isnan().all() else {"feature": strongest, "r": float(r[strongest])}
        steps, batch, _ = self["h"].shape
        units = self[self.names[0]].shape[-1]
        result = {"cell": self.cell, "layer": self.layer, "direction": self.direction}
        result |= {"steps": steps, "batch": batch, "hidden": units, "gates": gates, "half_life": None}
        if self.cell in KEEPS:
            # Not torch.quantile, which interpolates between two infinities to NaN.
            sorted_lives = self.half_life().sort().values
            quartiles = [float(sorted_lives[round((units - 1) * q)]) for q in (0.25, 0.5, 0.75)]
            result["half_life"] = dict(zip(("quartile_1", "median", "quartile_3"), quartiles))
        return result


class Record(dict[str, Gates]):
    """What :func:`record_gates` saw, by name, in the order of the calls."""

    def summary(self, low: float = 0.1, high: float = 0.9) -> dict[str, dict[str, Any]]:
        """:meth:`Gates.summary` of every entry."""
        return {name: gates.summary(low, high) for name, gates in self.items()}


@dataclass
class _Call:
    """One call of a recurrent module, and the sequences it ran."""

    path: str
    is_cell: bool
    batch_first: bool = False
    input: Tensor | PackedSequence | None = None
    sequences: list[tuple] = field(default_factory=list)  # the arguments of functional.recording's callback


def record_gates(module: nn.Module, /, *args, **kwargs) -> tuple[Any, Record]:
    """Runs ``module(*args, **kwargs)`` once and keeps what the gates of its recurrent layers did.

    The gates are those that the kernels save for backward, so nothing runs twice; they are kept without grad mode as
    well, and the output can be differentiated as ever.

    Args:
        module: a fusedrnn layer or cell, or any module that holds some; one of torch.nn's goes through
            :func:`fusedrnn.convert` first. Not compiled.
        args, kwargs: for the module.

    Returns:
        The module's output, and a :class:`Record`: a dict of :class:`Gates`. Names are the module's path and the
        suffix of torch's parameters, such as ``encoder.lstm.l0_reverse`` (``l0`` if the module is the layer itself).
        A second call of the same layer gives ``encoder.lstm.l0#2``. The calls of a cell, one step each, are stacked
        in their order, under its path (``cell`` if it is the module itself). Sequences run by
        :mod:`fusedrnn.functional` outside of any layer go by ``functional.l0`` and so on.

    Raises:
        TypeError: ``module`` is no torch.nn.Module.
        RuntimeError: it holds no recurrent layer, one of torch.nn, or is compiled; no sequence ran through a kernel
            of ours; or a cell was called with batches of different sizes.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"record_gates takes a torch.nn.Module, got {type(module).__name__}")
    layers = _recurrent_layers(module)
    calls: list[_Call] = []
    running: list[_Call] = []

    def enter(path: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            input = args[0] if args else kwargs.get("input")
            call = _Call(path, isinstance(layer, modules.RecurrentCell), getattr(layer, "batch_first", False), input)
            calls.append(call)
            running.append(call)

        return hook

    def leave(layer: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    def keep(*sequence) -> None:
        if not running:
            calls.append(_Call("functional", is_cell=False))
        (running or calls)[-1].sequences.append(sequence)

    hooks = []
    try:
        for path, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(enter(path), with_kwargs=True))
            hooks.append(layer.register_forward_hook(leave, always_call=True))
        with functional.recording(keep):
            output = module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return output, _named(calls)


def _recurrent_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers to watch, by path; raises on what cannot be recorded."""
    if torch.compiler.is_compiling():
        raise RuntimeError("record_gates cannot be compiled: call it outside of torch.compile")
    layers: dict[str, nn.Module] = {}
    for path, inner in module.named_modules():
        where = f"{path or 'the module'} ({type(inner).__name__})"
        # What torch.compile returns, and what Module.compile leaves behind.
        if "_orig_mod" in inner._modules or inner._compiled_call_impl is not None:
            raise RuntimeError(f"{where} is compiled: record_gates takes the module as it was before torch.compile")
        if type(inner) in _THEIRS:
            raise RuntimeError(f"{where} is a layer of torch.nn: call fusedrnn.convert on the model first")
        if isinstance(inner, _OURS):
            layers[path] = inner
        elif isinstance(inner, _THEIRS):
            raise RuntimeError(f"{where} is a subclass of torch.nn's, and such a layer does not give its gates")
    if not layers:
        raise RuntimeError(f"{type(module).__name__} holds no recurrent layer of fusedrnn")
    return layers


def _named(calls: list[_Call]) -> Record:
    if not calls:
        raise RuntimeError("no recurrent layer ran in this thread: a compiled function, or threads of their own?")
    record, stacked = Record(), {}
    for call in calls:
        if not call.sequences:
            raise RuntimeError(f"{call.path or 'the module'} ran through torch's own op, which gives no gates")
        if call.is_cell:
            stacked.setdefault(call.path, []).append(call)
            continue
        for sequence in call.sequences:
            _, layer, direction, *_ = sequence
            plain = name = f"{call.path}.l{layer}".lstrip(".") + ("_reverse" if direction else "")
            count = 1
            while name in record:
                count += 1
                name = f"{plain}#{count}"
            record[name] = _of_sequence(name, sequence, call)
    for path, steps in stacked.items():
        name = path or "cell"
        record[name] = _of_cell(name, steps)
    return record


def _of_sequence(name: str, sequence: tuple, call: _Call) -> Gates:
    cell, layer, direction, y, gates, cells, batch_sizes, lengths = sequence
    order = call.input.unsorted_indices if isinstance(call.input, PackedSequence) else None
    valid = None
    if batch_sizes is not None:
        longest_first = (torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]).to(y.device)
        valid = longest_first if order is None else longest_first.index_select(1, order)
    elif lengths is not None:
        valid = torch.arange(y.shape[0], device=lengths.device).unsqueeze(1) < lengths

    def dense(t: Tensor) -> Tensor:
        """Packed rows [N, K] as [T, B, K], in the order of the input, NaN where a sequence has ended."""
        t = t.detach()
        if valid is None:
            return t
        if lengths is not None:
            return torch.where(valid.unsqueeze(-1), t, torch.nan)
        padded = t.new_full((*valid.shape, t.shape[-1]), torch.nan)
        padded[longest_first] = t
        return padded if order is None else padded.index_select(1, order)

    tensors = {}
    if cell.saved:
        parts = zip(cell.saved, gates.chunk(len(cell.saved), -1))
        tensors = {gate: dense(t) for gate, t in parts if gate in cell.gates}
    if cell.has_cell_state:
        tensors["c"] = dense(cells)
    tensors["h"] = dense(y)
    input = call.input
    if input is not None:
        if isinstance(input, PackedSequence):
            input = input.data
        elif call.is_cell:
            input = torch.atleast_2d(input)[None]
        elif input.dim() == 2:
            input = input[:, None]
        elif call.batch_first:
            input = input.transpose(0, 1)
        input = dense(input)
    return Gates(name, cell.name, layer, direction, tensors, input, valid)


def _of_cell(name: str, calls: list[_Call]) -> Gates:
    steps = [_of_sequence(name, sequence, call) for call in calls for sequence in call.sequences]
    sizes = {step["h"].shape[1] for step in steps}
    if len(sizes) > 1:
        raise RuntimeError(f"{name} was called with batches of {sorted(sizes)}: record_gates stacks calls of one size")
    first = steps[0]
    tensors = {gate: torch.cat([step[gate] for step in steps]) for gate in first.names}
    return Gates(name, first.cell, 0, 0, tensors, torch.cat([step.input for step in steps]), None)
