"""Drop-in modules for torch.nn's recurrent layers and cells.

Each subclasses the class that it stands for, so isinstance and issubclass answer what tools expect, and everything
torch.nn's class has is there. Dynamo refuses instances of nn.LSTM, nn.GRU and nn.RNN: fusedrnn.integrations tells it
that these may be traced.
"""

import itertools
import sys
import types
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import functional
from fusedrnn.cells import CELL_OF_MODE
from fusedrnn.quantizing import Quantizable
from fusedrnn.streaming import Stream

# What torch.nn's forward calls to check its input, and ours only where a subclass overrides it.
_CHECKS = {"check_forward_args", "get_expected_hidden_size", "get_expected_cell_size"}
# What a call asks a module for, and the way through C++ does not.
_ASKED = {
    *("_weights", "_states", "_state_sizes", "_check_states", "_batch_states", "_check_dims", "_step"),
    *("check_input", "check_hidden_size", "permute_hidden", "_flat_weights", "_flat_weights_names", "__getattr__"),
    *_CHECKS,
}


def _overridden(cls: type) -> set[str]:
    """The names in the classes before ours in the order of ``cls``."""
    before = itertools.takewhile(lambda base: base.__module__ != __name__, cls.__mro__)
    return {name for base in before for name in vars(base)}


def _may_be_direct(cls: type) -> bool:
    """Whether no class before ours in the order of ``cls`` overrides what is asked, or has weights of its own."""
    return not any(name in _ASKED or name.startswith(("weight_", "bias_")) for name in _overridden(cls))


def _elsewhere(module: nn.Module, given: tuple, call: tuple, options: dict):
    """What a call returns where somebody else computes it: ``given`` holds something that is no Tensor and answers
    __torch_function__, or stands for a value in torch.fx, whose graph gets the module as a leaf. Else None.
    """
    if all(t is None or isinstance(t, Tensor) for t in given):
        return None
    for t in given:
        if isinstance(t, torch.fx.Proxy):
            options = {name: value for name, value in options.items() if value is not None}
            return t.tracer.create_proxy("call_module", t.tracer.path_of_module(module), call, options)
    if not torch.overrides.has_torch_function(given):
        return None
    # Not that of a user's subclass, which has called this one.
    package = __name__.partition(".")[0]
    forward = next(base.forward for base in type(module).__mro__ if base.__module__.partition(".")[0] == package)
    if isinstance(call[0], PackedSequence):  # whoever unwraps its arguments looks into tuples
        whole = forward

        def forward(module, input, *hx, **options):
            return whole(module, PackedSequence(*input), *hx, **options)

        call = (tuple(call[0]), *call[1:])
    return torch.overrides.handle_torch_function(forward, given, module, *call, **options)


def _all(hx) -> tuple:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def _per_sample(module: nn.Module) -> bool:
    """Whether its weights are those of torch.nn.utils._per_sample_grad, at the moment."""
    expanded = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    if expanded is None or torch.compiler.is_compiling():
        return False
    return any(isinstance(p, expanded.ExpandedWeight) for p in module._parameters.values())


def _given(**keywords) -> dict:
    """Those that are not None: they may have come by position."""
    return {name: value for name, value in keywords.items() if value is not None}


def _cannot_be_scripted(module: nn.Module) -> NoReturn:
    raise RuntimeError(
        f"torch.jit.script cannot compile fusedrnn.{type(module).__name__}: script "
        "fusedrnn.revert(copy.deepcopy(model)), which has the same weights and runs torch.nn's layers, or keep "
        "fusedrnn's with torch.jit.trace or torch.export"
    )


class RecurrentLayer(Quantizable, nn.RNNBase):
    """What LSTM, GRU and RNN share: checks, unbatched and packed input, the call of the functional layer."""

    backend: str | None = None
    algorithm: str | None = None
    recompute: bool = False

    # torch.nn.utils.skip_init looks for device.
    def __init__(
        self,
        *args,
        device=None,
        dtype=None,
        backend: str | None = None,
        algorithm: str | None = None,
        recompute: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs, **_given(device=device, dtype=dtype))
        if recompute:
            self.recompute = True
        if backend is not None or algorithm is not None:
            functional.planning.check_choice(backend, algorithm)
            self.backend, self.algorithm = backend, algorithm
            self.flatten_parameters()

    def __init_subclass__(cls, **keywords) -> None:
        super().__init_subclass__(**keywords)
        cls._may_be_direct = _may_be_direct(cls)
        cls._checks_itself = bool(_CHECKS & _overridden(cls))

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        # torch.nn does so at the next call.
        names, refs = (vars(self).get(f"_flat_weight{what}") for what in ("s_names", "_refs"))
        if refs and names and name in names:
            refs[names.index(name)] = None if value is None else weakref.ref(value)

    def __prepare_scriptable__(self) -> NoReturn:
        _cannot_be_scripted(self)

    def flatten_parameters(self) -> None:
        """Where torch's own op was asked for, as in torch.nn; no kernel here wants the weights in one piece."""
        if self.backend == "torch":
            super().flatten_parameters()

    def stream(self, batch: int = 1) -> Stream:
        """A :class:`~fusedrnn.streaming.Stream` of the layer as it is now: it is fed a step or a few at a time.

        Raises:
            TypeError: the cell is one's own.
            ValueError: the layer is bidirectional, would drop out, or ``batch`` is not positive.
        """
        return Stream(self, batch)

    def _weights(self) -> list[Tensor]:
        if self._quantized is not None:
            return self._widened(self._flat_weights_names)
        # By name, so that parametrizations, weight_norm, functional_call and replaced parameters all count. Where those
        # are what they were, and _flat_weights is not, a wrapper has put its own there for torch.nn's forward.
        named = [getattr(self, name, None) for name in self._flat_weights_names]
        flat = getattr(self, "_flat_weights", named)
        if all(mine is w for mine, w in zip(flat, named)):
            return named
        computed = "_flat_weights" not in vars(self)
        refs = getattr(self, "_flat_weight_refs", [])
        unchanged = all(ref is None or w is None or ref() is w for ref, w in zip(refs, named))
        return list(flat) if computed or unchanged else named

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.layout != torch.strided:
            raise RuntimeError(f"input must be a dense tensor or a PackedSequence, got layout {input.layout}")
        # None where a parametrization computes it: once a call is enough, and functional.layers compares dtypes too.
        weight = self._parameters.get("weight_ih_l0")
        if weight is not None and input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if self._quantized is not None and input.dtype != torch.float32 and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"{type(self).__name__} is quantized and takes torch.float32, got {input.dtype}")
        dims = 2 if batch_sizes is not None else 3
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _states(self, hx) -> tuple[Tensor, ...]:
        """hx as a tuple of state tensors, checked to be that."""
        if not isinstance(hx, Tensor):
            raise TypeError(f"{type(self).__name__}: hx must be a Tensor, got {type(hx).__name__}")
        return (hx,)

    def _state_sizes(self) -> tuple[int, ...]:
        """The last dimension of every state."""
        return (self.proj_size or self.hidden_size,)

    def _check_states(self, states: tuple[Tensor, ...], batch: int) -> None:
        lead = self.num_layers * (2 if self.bidirectional else 1)
        for k, (state, size) in enumerate(zip(states, self._state_sizes(), strict=True)):
            which = f"hidden[{k}]" if len(states) > 1 else "hidden"
            self.check_hidden_size(state, (lead, batch, size), f"Expected {which} size {{}}, got {{}}")

    def forward(
        self,
        input,
        hx=None,
        *,
        resets: Tensor | None = None,
        return_all_states: bool = False,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
    ):
        """See the class; input [T, B, I], [B, T, I], [T, I], a PackedSequence or a nested tensor."""
        if self._frozen is not None:
            self._check_frozen()
        if lengths is None and not (return_all_states or self.recompute or (self.dropout and self.training)):
            found = self._direct(input, hx, resets)
            if found is not None:
                return found
        if _per_sample(self):
            # Such weights know torch's functions only, and torch.nn's own forward has what rules there are.
            self._cannot_be_given(resets=resets is not None, return_all_states=return_all_states)
            return super().forward(input, hx)
        return self._checked(input, hx, resets, return_all_states, lengths, padding_value)

    def _checked(self, input, hx, resets, return_all_states, lengths, padding_value, inputs=None):
        """forward past the way through C++; ``inputs`` are those of a cell of one's own, by name."""
        inputs = {} if inputs is None else inputs
        packed = isinstance(input, PackedSequence)
        if not isinstance(input, Tensor) or not (hx is None or isinstance(hx, Tensor)) or inputs:
            beside = (t.data if isinstance(t, PackedSequence) else t for t in inputs.values())
            given = (input.data if packed else input, *_all(hx), resets, lengths, *beside)
            options = {"resets": resets, "lengths": lengths, **inputs}
            options |= {"return_all_states": True} if return_all_states else {}
            options |= {"padding_value": padding_value} if padding_value else {}
            found = _elsewhere(self, given, (input,) if hx is None else (input, hx), options)
            if found is not None:
                return found
        batch_sizes = sorted_indices = unsorted_indices = None
        batched = True
        if packed:
            input, batch_sizes, sorted_indices, unsorted_indices = input
            if torch.compiler.is_exporting():
                functional.check_packed_export(batch_sizes)
            self.check_input(input, batch_sizes)
            if sorted_indices is not None and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                batch = sorted_indices.size(0)  # known to the compiler, which would break the graph to read batch_sizes
            elif torch.jit.is_tracing() and not torch.compiler.is_compiling():
                batch = batch_sizes[0]  # as a number it would be that of the example
            else:
                batch = int(batch_sizes[0]) if batch_sizes.numel() else 0
        else:
            if not isinstance(input, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: input must be a Tensor or a PackedSequence, got {type(input).__name__}"
                )
            if input.is_nested:
                if resets is not None or return_all_states or lengths is not None or inputs:
                    beside = "resets, return_all_states, lengths and inputs of the cell"
                    raise RuntimeError(f"{type(self).__name__}: {beside} cannot be given with nested input")
                return self._nested(input, hx, padding_value)
            if input.dim() not in (2, 3):
                got = f"{input.dim()}D tensor" if self.mode.startswith("RNN") else f"{input.dim()}D"
                raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {got} instead")
            batched = input.dim() == 3
            if not batched:
                input = input.unsqueeze(0 if self.batch_first else 1)
            batch = input.size(0 if self.batch_first else 1)

        if hx is None:
            self.check_input(input, batch_sizes)
            lead = self.num_layers * (2 if self.bidirectional else 1)
            # A node of ONNX starts from zeros where it gets no states.
            exported = functional.exporting_to_onnx()
            states = tuple(None if exported else input.new_zeros(lead, batch, size) for size in self._state_sizes())
        else:
            states = self._states(hx)
            if not packed:
                states = self._batch_states(states, batched)
            if sorted_indices is not None:
                states = self._permuted(states, sorted_indices)
            if self._checks_itself:
                self.check_forward_args(input, states if len(states) > 1 else states[0], batch_sizes)
            else:
                self.check_input(input, batch_sizes)
                self._check_states(states, batch)
        if not packed and input.size(1 if self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        if resets is not None:
            resets = self._batch_resets(resets, batched, sorted_indices)
        if lengths is not None and not batched:
            raise RuntimeError("lengths is for a batch: cut an unbatched input instead")
        inputs = self._batch_inputs(inputs, batched, batch_sizes)
        y, finals, every = self._run(
            input, states, batch_sizes, resets, return_all_states, lengths, padding_value, inputs
        )
        if packed:
            y = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                finals = self._permuted(finals, unsorted_indices)
        elif not batched:
            y = functional.reshaped(y, "squeeze", 0 if self.batch_first else 1)
            finals = [functional.reshaped(s, "squeeze", 1) for s in finals]
        final = tuple(finals) if len(finals) > 1 else finals[0]
        if not return_all_states:
            return y, final
        if packed:
            every = [PackedSequence(s.transpose(0, 1), batch_sizes, sorted_indices, unsorted_indices) for s in every]
        elif not batched:
            every = [s.squeeze(1 if self.batch_first else 2) for s in every]
        return y, final, tuple(every) if len(every) > 1 else every[0]

    def _run(self, input, states, batch_sizes, resets, return_all_states, lengths, padding_value, inputs):
        """y, the final states and every state (or None) of a batch that was checked."""
        y, *finals, every = functional.layers(
            CELL_OF_MODE[self.mode],
            input,
            states[0],
            states[1] if len(states) > 1 else None,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes,
            resets,
            return_all_states,
            self.recompute,
            self.backend,
            self._asked,
            lengths,
            padding_value,
        )
        return y, [s for s in finals if s is not None], every

    def _batch_inputs(self, inputs, batched: bool, batch_sizes: Tensor | None) -> list[Tensor]:
        return []

    def _direct(self, input, hx, resets=None):
        """What forward returns, in one call of C++; None where that does not apply."""
        module = self._called_as(input)
        if not self._may_be_direct or module is None:
            return None
        h0, c0 = hx, None
        if hx is not None and self.mode == "LSTM":
            if type(hx) is not tuple or len(hx) != 2 or hx[0] is None:
                return None
            h0, c0 = hx
        packed = batch_sizes = None
        if type(input) is PackedSequence:
            packed, input, batch_sizes = input, input.data, input.batch_sizes
            if hx is not None and packed.sorted_indices is not None:
                return None
        found = functional.direct(
            "layers", self.backend, self.algorithm, CELL_OF_MODE[self.mode].name, module,
            self._flat_weights_names, input, h0, c0, self.bias, self.num_layers, 2 if self.bidirectional else 1,
            self.batch_first, batch_sizes, resets,
        )  # fmt: skip
        if found is None:
            return None
        y, *finals = found
        if packed is not None:
            y = PackedSequence(y, batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            if packed.unsorted_indices is not None:
                finals = self._permuted(finals, packed.unsorted_indices)
        return y, finals[0] if len(finals) == 1 else tuple(finals)

    def _permuted(self, states: Sequence[Tensor], order: Tensor) -> Sequence[Tensor]:
        found = self.permute_hidden(tuple(states) if len(states) > 1 else states[0], order)
        return found if len(states) > 1 else (found,)

    def _nested(self, input: Tensor, hx, padding_value: float):
        """forward of a nested tensor [B, *, I]: y is nested as the input is."""
        name = type(self).__name__
        if not self.batch_first:
            raise RuntimeError(f"{name}: a nested input [B, *, I] needs batch_first=True")
        if padding_value != 0:
            raise RuntimeError(f"{name}: padding_value cannot be given with nested input, which has no padding")
        if input.dim() != 3:
            raise RuntimeError(f"{name}: a nested input must have 3 dimensions [B, *, I], got {input.dim()}")
        jagged = input.layout == torch.jagged
        if jagged and (input._ragged_idx != 1 or input.lengths() is not None):
            raise RuntimeError(
                f"{name}: of a jagged input [B, *, I] the second dimension must be ragged, without holes"
            )
        offsets = input.offsets() if jagged else None
        lengths = offsets.diff() if jagged else input._nested_tensor_size()[:, 0]
        padded = torch.nested.to_padded_tensor(input, 0.0)
        y, states = self.forward(padded, hx, lengths=lengths)
        if not jagged:
            rows = [row[:length] for row, length in zip(y, lengths.tolist(), strict=True)]
            return torch.nested.as_nested_tensor(rows), states
        # Row by row of the batch, what is inside: as the values of the input.
        rows = torch.arange(input.values().shape[0], device=y.device)
        sequence = torch.searchsorted(offsets, rows, right=True) - 1
        values = y[sequence, rows - offsets[sequence]]
        return torch.nested.nested_tensor_from_jagged(values, offsets), states

    def _cannot_be_given(self, **options: bool) -> None:
        for name, given in options.items():
            if given:
                raise RuntimeError(f"{type(self).__name__}: {name} cannot be given with per-sample weights")

    def _batch_resets(self, resets: Tensor, batched: bool, sorted_indices: Tensor | None) -> Tensor:
        if not isinstance(resets, Tensor):
            raise TypeError(f"{type(self).__name__}: resets must be a Tensor, got {type(resets).__name__}")
        if not batched:
            if resets.dim() != 1:
                raise RuntimeError(f"For unbatched 2-D input, resets should be 1-D but got a {resets.dim()}-D tensor")
            resets = resets.unsqueeze(0 if self.batch_first else 1)
        if sorted_indices is not None and resets.dim() == 2:
            if resets.shape[1] != sorted_indices.shape[0]:
                raise RuntimeError(
                    f"resets must have shape [T, B] with B = {sorted_indices.shape[0]}, got {list(resets.shape)}"
                )
            resets = resets.index_select(1, sorted_indices)
        return resets

    def _batch_states(self, states: tuple[Tensor, ...], batched: bool) -> tuple[Tensor, ...]:
        dims, kind = (3, "batched") if batched else (2, "unbatched")
        if any(s.dim() != dims for s in states):
            names = "hx and cx" if len(states) > 1 else "hx"
            got = ", ".join(f"{s.dim()}-D" for s in states)
            got = f"({got}) tensors" if len(states) > 1 else f"{got} tensor"
            raise RuntimeError(f"For {kind} {dims}-D input, {names} should also be {dims}-D but got {got}")
        return states if batched else tuple(s.unsqueeze(1) for s in states)


class LSTM(RecurrentLayer, nn.LSTM):
    """Multi-layer long short-term memory, a drop-in for :class:`torch.nn.LSTM`.

    Same arguments, parameters, state_dict, initialisation and errors as torch.nn.LSTM; for each step

    .. code-block:: text

        i, f, o = sigmoid(W_i x + U_i h + b_i), ...     input, forget, output gate: in (0, 1)
        g       = tanh(W_g x + U_g h + b_g)             candidate
        c'      = f * c + i * g                         cell state
        h'      = o * tanh(c')                          output (times W_hr with a projection)

    Args:
        input_size: I, features of x.
        hidden_size: H, features of c, and of h without a projection.
        num_layers: L, layers stacked on each other.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are [B, T, .] and not [T, B, .]; the states are not affected.
        dropout: probability of dropping an output of each layer but the last, in training.
        bidirectional: a second direction runs from the last step to the first; outputs are concatenated.
        proj_size: P, projects h to P features (0: no projection).
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
        backend: "reference", "cpu", "triton", "cuda" or "torch" (torch's own op) for this module; None lets planning
            choose, and :class:`fusedrnn.backend` overrides it.
        algorithm: of that backend: "step" or "sequence" of triton, "step" or "persistent" of cuda, "persistent" of cpu;
            None chooses by the sizes.
        recompute: keep only h and c for backward and compute the gates again there: less memory, more time.

    Inputs:
        input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] or a PackedSequence.
        hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), zeros if absent.
        resets: bool [T, B] ([B, T] with ``batch_first``, [T] without a batch; [T, B] for a PackedSequence, in the order
            of the batch before packing): where true a new sequence begins, in both directions: h and c are zeros before
            that step, and the backward direction starts anew, from zeros, at the step before it.
        return_all_states: the states after every step as well, see below.
        lengths: integers [B], on any device, in any order: the steps of each sequence of a padded batch, 0 to T. Output
            past an end is ``padding_value``, the states are those at each end, and what the input holds there, NaN
            included, reaches nothing: the numbers of pack_padded_sequence and pad_packed_sequence(total_length=T) in
            one call. A GPU is not waited for, so that a length out of bounds is found there by an assertion on the
            device.
        padding_value: of the output past an end.

    Outputs:
        output [T, B, D*P] (or packed), (h_n [L*D, B, P], c_n [L*D, B, H]). With ``return_all_states=True`` also the
        states after every step, (h [L*D, T, B, P], c [L*D, T, B, H]): ``(h[:, t], c[:, t])`` is a valid hx, and they
        are differentiable. [L*D, B, T, .] with ``batch_first``; PackedSequences of [N, L*D, .] for packed input.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.LSTM does, with the rule and what came.

    Source: Hochreiter and Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber and Cummins, 2000; the
    projection is that of https://arxiv.org/abs/1402.1128.
    """

    def _state_sizes(self) -> tuple[int, int]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _states(self, hx) -> tuple[Tensor, Tensor]:
        if isinstance(hx, Tensor):
            # torch.nn.LSTM indexes whatever comes; a stacked pair works there, so it does here.
            hx = tuple(hx)
        if not isinstance(hx, (tuple, list)) or not all(isinstance(s, Tensor) for s in hx):
            got = ", ".join(type(s).__name__ for s in hx) if isinstance(hx, (tuple, list)) else ""
            raise TypeError(
                f"LSTM: hx must be a tuple of two Tensors (h_0, c_0), got {type(hx).__name__}{got and f' of {got}'}"
            )
        if len(hx) != 2:
            raise RuntimeError(f"LSTM: hx must be a tuple of two Tensors (h_0, c_0), got {len(hx)}")
        return tuple(hx)


class GRU(RecurrentLayer, nn.GRU):
    """Multi-layer gated recurrent unit, a drop-in for :class:`torch.nn.GRU`.

    .. code-block:: text

        r, z = sigmoid(W_r x + b_r + U_r h + b'_r), ...      reset and update gate: in (0, 1)
        n    = tanh(W_n x + b_n + r * (U_n h + b'_n))        candidate
        h'   = (1 - z) * n + z * h

    Arguments and inputs as :class:`LSTM`, without ``proj_size``; hx is h_0 [L*D, B, H].

    Outputs:
        output [T, B, D*H] (or packed), h_n [L*D, B, H].

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.GRU does.

    Source: Cho et al., 2014, https://arxiv.org/abs/1406.1078; r multiplies the product, as in torch.nn and cuDNN.
    """


class RNN(RecurrentLayer, nn.RNN):
    """Multi-layer Elman RNN, a drop-in for :class:`torch.nn.RNN`: h' = tanh or relu of (W x + b + U h + b').

    Arguments and inputs as :class:`GRU`, and ``nonlinearity`` ("tanh" or "relu") after ``num_layers``.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.RNN does.

    Source: Elman, "Finding structure in time", 1990.
    """


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class RecurrentCell(Quantizable, nn.RNNCellBase):
    """What the three cells share: checks, input without a batch, one step in one launch."""

    mode: str
    backend: str | None = None
    algorithm: str | None = None

    def __init__(
        self, *args, device=None, dtype=None, backend: str | None = None, algorithm: str | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs, **_given(device=device, dtype=dtype))
        if backend is not None or algorithm is not None:
            functional.planning.check_choice(backend, algorithm)
            self.backend, self.algorithm = backend, algorithm

    def __init_subclass__(cls, **keywords) -> None:
        super().__init_subclass__(**keywords)
        cls._may_be_direct = _may_be_direct(cls)

    def __prepare_scriptable__(self) -> NoReturn:
        _cannot_be_scripted(self)

    def _weights(self) -> list[Tensor | None]:
        if self._quantized is not None:
            return self._widened(_CELL_WEIGHTS)
        return [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]

    def _check_dims(self, what: str, t: Tensor) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"{type(self).__name__}: {what} must be a Tensor, got {type(t).__name__}")
        if t.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected {what} to be 1D or 2D, got {t.dim()}D instead")

    def _direct(self, input: Tensor, h0: Tensor | None, c0: Tensor | None):
        """What forward returns, in one call of C++; None where that does not apply."""
        if self._frozen is not None:
            self._check_frozen()
        module = self._called_as(input)
        if not self._may_be_direct or module is None:
            return None
        cell = CELL_OF_MODE[self.mode].name
        return functional.direct("cell", self.backend, self.algorithm, cell, module, _CELL_WEIGHTS, input, h0, c0)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """See the class."""
        h = self._direct(input, hx, None)
        if h is None:
            h = _elsewhere(self, (input, hx), (input,) if hx is None else (input, hx), {})
        if h is not None:
            return h
        if _per_sample(self):
            return super().forward(input, hx)
        self._check_dims("input", input)
        if hx is not None:
            self._check_dims("hidden", hx)
        return self._step(input, None if hx is None else (hx,))[0]

    def _step(self, input: Tensor, states: tuple[Tensor, ...] | None) -> list[Tensor]:
        if input.layout != torch.strided:
            input = input.to_dense()  # torch.nn's cells multiply sparse ones
        batched = input.dim() == 2
        cell = CELL_OF_MODE[self.mode]
        if not batched:
            input = input.unsqueeze(0)
        input_size, hidden_size = self.weight_ih.size(1), self.weight_hh.size(1)
        if input.size(1) != input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {input_size}")
        if states is None:
            # A node of ONNX starts from zeros by itself.
            zeros = None if functional.exporting_to_onnx() else input.new_zeros(input.size(0), self.hidden_size)
            states = (zeros,) * len(cell.states)
            if torch.compiler.is_compiling() and len(states) > 1:
                states = (zeros, input.new_zeros(input.size(0), self.hidden_size))  # Dynamo refuses one tensor twice
        elif not batched:
            states = tuple(s.unsqueeze(0) for s in states)
        for k, state in enumerate(states if states[0] is not None else ()):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
                )
            if state.dim() != 2 or state.size(1) != hidden_size:
                got = state.size(1) if state.dim() > 1 else f"{state.dim()}D"
                raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {got}, expected {hidden_size}")
        if hidden_size == 0 and states[0] is not None:
            # torch.nn's cells take it. Empty sums keep everything in the graph.
            nothing = sum(t.sum() for t in (input, *self._weights()) if t is not None)
            return [(s if batched else s.squeeze(0)) + nothing for s in states]
        h0, c0 = states if cell.has_cell_state else (*states, None)
        results = functional.one_step(cell, input, h0, c0, *self._weights(), self.backend, self._asked)
        return [s if batched else s.squeeze(0) for s in results if s is not None]


class LSTMCell(RecurrentCell, nn.LSTMCell):
    """One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, features of x.
        hidden_size: H, features of h and c.
        bias: False leaves out b_ih and b_hh.
        device: as in :class:`LSTM`.
        dtype: as in :class:`LSTM`.
        backend: as in :class:`LSTM`.
        algorithm: as in :class:`LSTM`.

    Inputs:
        input: [B, I] or [I].
        hx: (h_0, c_0), each [B, H] or [H], zeros if absent.

    Outputs:
        (h_1, c_1), each [B, H] or [H].

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.LSTMCell does.
    """

    mode = "LSTM"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        if hx is None or (type(hx) is tuple and len(hx) == 2 and hx[0] is not None):
            states = self._direct(input, *(hx or (None, None)))
            if states is not None:
                return states
        states = _elsewhere(self, (input, *_all(hx)), (input,) if hx is None else (input, hx), {})
        if states is not None:
            return states
        if _per_sample(self):
            return nn.LSTMCell.forward(self, input, hx)
        self._check_dims("input", input)
        if hx is not None:
            if not isinstance(hx, (tuple, list)):
                raise TypeError(f"LSTMCell: hx must be a tuple of two Tensors (h_0, c_0), got {type(hx).__name__}")
            for k, state in enumerate(hx):
                self._check_dims(f"hx[{k}]", state)
            if len(hx) != 2:
                raise RuntimeError(f"LSTMCell expects two hidden states, got {len(hx)}")
        h, c = self._step(input, None if hx is None else tuple(hx))
        return h, c


class GRUCell(RecurrentCell, nn.GRUCell):
    """One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`; arguments as in :class:`LSTMCell`.

    Inputs:
        input: [B, I] or [I].
        hx: [B, H] or [H], zeros if absent.

    Outputs:
        h_1 [B, H] or [H].

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.GRUCell does.
    """

    mode = "GRU"


class RNNCell(RecurrentCell, nn.RNNCell):
    """One step of an Elman RNN, a drop-in for :class:`torch.nn.RNNCell`; shapes as in :class:`GRUCell`.

    ``nonlinearity`` is "tanh" or "relu".

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.RNNCell does; another nonlinearity raises at the first call.
    """

    @property
    def mode(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"RNN_{self.nonlinearity.upper()}"


def _under_its_name(cls: type) -> None:
    """Gives a class a forward of its own name, which Python puts into messages: LSTM.forward() got an unexpected ..."""
    shared = cls.forward
    own = types.FunctionType(
        shared.__code__, shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    own.__kwdefaults__, own.__annotations__ = shared.__kwdefaults__, shared.__annotations__
    own.__doc__, own.__module__, own.__qualname__ = shared.__doc__, shared.__module__, f"{cls.__name__}.forward"
    cls.forward = own


for _cls in (LSTM, GRU, RNN, GRUCell, RNNCell):
    _under_its_name(_cls)
