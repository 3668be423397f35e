"""The layer of a cell of one's own. Sizes: T steps, B batch, I input, H hidden, P output, G gates, L layers, D
directions, N rows of packed data.
"""

import math
import os
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import compiled, functional, ops, planning
from fusedrnn.autograd import CallFunction
from fusedrnn.backends.common import Inputs
from fusedrnn.definition import Definition
from fusedrnn.modules import RecurrentLayer


class Layer(RecurrentLayer):
    """A recurrent layer of any cell: what :class:`LSTM` is for the LSTM.

    Weights have torch's names and shapes: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H], bias_ih_l0 and bias_hh_l0
    [G*H], the rows of a gate after another in the order of the cell's gates; the cell's own parameters are vectors [H],
    p_i_l0, p_i_l0_reverse and so on. All begin uniform in ±1/sqrt(H), as torch.nn's.

    On the CPU the LSTM, GRU, RNN and sLSTM of :mod:`fusedrnn.zoo` are there; another cell is compiled by the C++
    compiler (CXX, or g++) at its first call, and kept in a cache on disk (FUSEDRNN_CACHE, else ~/.cache/fusedrnn).
    Where there is no compiler the reference runs, a loop of torch's operations, with one warning.

    Args:
        cell: a definition (:func:`fusedrnn.cell`), such as those of :mod:`fusedrnn.zoo`.
        input_size: I.
        hidden_size: H.
        num_layers, bias, batch_first, dropout, bidirectional: as in :class:`LSTM`.
        proj_size: P, projects h to P features (0: no projection); for the LSTM of :mod:`fusedrnn.zoo` alone.
        heads: W_hh is block-diagonal, a block for each group of H / heads units: weight_hh_l0 is [G*H, H / heads].
        device, dtype, backend, algorithm, recompute: as in :class:`LSTM`.

    Raises:
        TypeError: ``cell`` is no definition.
        ValueError: sizes that do not fit.
        RuntimeError: the cell's function has an operation without a printer, or asks for the value of a tensor.
    """

    def __init__(
        self,
        cell: Definition,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        heads: int = 1,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
        algorithm: str | None = None,
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(cell, Definition):
            raise TypeError(f"cell must be a definition (fusedrnn.cell makes one of a function), got {cell!r}")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        if not isinstance(heads, int) or heads < 1 or hidden_size % heads:
            raise ValueError(f"heads must divide hidden_size, {hidden_size}, got {heads}")
        found = cell.cell
        if proj_size:
            if not 0 < proj_size < hidden_size:
                raise ValueError("proj_size has to be a positive integer, smaller than hidden_size, or zero to disable")
            if heads > 1:
                raise ValueError(f"proj_size goes with one head, got {heads}")
            if found.name != "lstm":
                raise ValueError(f"proj_size is for the LSTM, not for the cell {cell.name}")
        functional.planning.check_choice(backend, algorithm)
        self.cell, self.mode = cell, found.mode
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.proj_size, self.heads = proj_size, heads
        if recompute:
            self.recompute = True
        if backend is not None or algorithm is not None:
            self.backend, self.algorithm = backend, algorithm
        options = {"device": device, "dtype": dtype}
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        rows, out = len(found.gates) * hidden_size, proj_size or hidden_size
        for layer in range(num_layers):
            for suffix in ("", "_reverse") if bidirectional else ("",):
                columns = input_size if layer == 0 else out * (2 if bidirectional else 1)
                shapes = {"weight_ih": (rows, columns), "weight_hh": (rows, out // heads)}
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}
                shapes |= {"weight_hr": (out, hidden_size)} if proj_size else {}
                shapes |= dict.fromkeys(found.parameters, (hidden_size,))
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values()):
                    if hasattr(self, name):
                        raise ValueError(f"a parameter of the cell {cell.name} has the name of another one: {name}")
                    setattr(self, name, nn.Parameter(torch.empty(shape, **options)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads != 1 else ""
        return f"{self.cell.name}, {super().extra_repr()}{heads}"

    def flatten_parameters(self) -> None:
        """Nothing: no kernel wants the weights in one piece."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile fusedrnn.Layer: torch.jit.trace, torch.compile and torch.export can"
        )

    def _states(self, hx) -> tuple[Tensor, ...]:
        names = self.cell.states
        if len(names) == 1:
            return super()._states(hx)
        if not isinstance(hx, (tuple, list)) or len(hx) != len(names):
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"Layer: hx must be a tuple of {len(names)} Tensors ({', '.join(names)}), got {got}")
        for name, state in zip(names, hx):
            if not isinstance(state, Tensor):
                raise TypeError(f"Layer: {name} in hx must be a Tensor, got {type(state).__name__}")
        return tuple(hx)

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, *[self.hidden_size] * (len(self.cell.states) - 1))

    def permute_hidden(self, hx, permutation: Tensor | None):
        if permutation is None or isinstance(hx, Tensor):
            return super().permute_hidden(hx, permutation)
        return tuple(s.index_select(1, permutation) for s in hx)

    def _direct(self, input, hx, resets=None):
        """What forward returns of a dense batch on the CPU, a call of C++ for each sequence; None where that does not
        apply.
        """
        if torch.compiler.is_compiling() or type(input) is not Tensor or input.dim() != 3 or type(self) is not Layer:
            return None
        if self._quantized is not None or resets is not None or functional._recorders:
            return None
        if (self.recompute and torch.is_grad_enabled()) or (self.dropout and self.training):
            return None
        cell, kept = self.cell.cell, self.__dict__.get("_packed")
        states = () if hx is None else (hx,) if len(cell.states) == 1 else hx
        x, weights = input.transpose(0, 1) if self.batch_first else input, self._weights()
        first = weights[0]
        fits = type(states) is tuple and x.shape[2] == self.input_size and first is not None and x.dtype == first.dtype
        if not fits or cell.inputs or x.shape[0] == 0 or self._choose(x.dtype, x.device).backend != "cpu":
            return None
        directions = 2 if self.bidirectional else 1
        lead = self.num_layers * directions
        if not all(type(s) is Tensor and s.dim() == 3 and s.shape[0] == lead for s in states):
            return None
        per, ys, finals = len(weights) // lead, [], []
        for k in range(lead):
            of_k = states if lead == 1 else tuple(s[k : k + 1] for s in states)
            packed = (None, None) if kept is None else kept[k]
            found = self._sequence(x, of_k, weights[k * per : (k + 1) * per], k % directions == 1, packed)
            if found is None:
                return None
            y, *ends = found
            ys.append(y)
            finals.append(ends)
            if len(ys) == directions:
                x, ys = y if directions == 1 else torch.cat(ys, -1), []
        ends = finals[0] if lead == 1 else [torch.cat(each) for each in zip(*finals)]
        return x.transpose(0, 1) if self.batch_first else x, tuple(ends) if len(ends) > 1 else ends[0]

    def _sequence(self, x, states, weights, reverse: bool, packed) -> tuple[Tensor, ...] | None:
        """y [T, B, P] and the final states [1, B, H] of one direction of a layer, from such states or, without, zeros;
        None where somebody looks on.
        """
        cell, (w_ih, w_hh, *rest) = self.cell.cell, weights
        w_hr = rest.pop(2 * self.bias) if self.proj_size else None
        b_ih, b_hh = (*rest[: 2 * self.bias], None, None)[:2]
        weights, parameters = (w_ih, w_hh, b_ih, b_hh, w_hr), tuple(rest[2 * self.bias :])
        found = ops.sequence_of_layer(
            cell.name, x, states, *weights, parameters, (), None, None, reverse, self.heads, *packed
        )
        if type(found) is not list:
            return found
        count = max(2, len(cell.states))
        h0, c0, *others = (*states, *(None,) * count)[:count]
        given = x, h0, c0, *weights, *others, *parameters
        return CallFunction.apply(cell.name, False, reverse, self.heads, found, *given)

    def _pack(self) -> list | None:
        if self._quantized is not None:
            return None  # a call takes them in float32
        weight = self._parameters["weight_hh_l0"]
        chosen = self._choose(weight.dtype, weight.device).backend
        return self._panels(self.cell.cell.name, self.heads) if chosen == "cpu" else None

    def forward(
        self,
        input,
        hx=None,
        *,
        resets: Tensor | None = None,
        return_all_states: bool = False,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        **inputs,
    ):
        """The whole sequence.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I], or a PackedSequence.
            hx: the states to start from, [L*D, B, H] each: a tensor for a cell of one state, else a tuple in their
                order; zeros if absent.
            resets, return_all_states, lengths, padding_value: as in :meth:`LSTM.forward`.
            inputs: the cell's inputs by name, each in the layout of ``input`` with H for I, for all layers and
                directions; or with L*D in front, one for each. A step of it belongs to that step of the input, in the
                reverse direction too.

        Returns:
            y [T, B, D*P] (or as ``input``), the final states as ``hx``; with ``return_all_states`` then every state, as
            :meth:`LSTM.forward` has it.

        Raises:
            TypeError: something is no Tensor; an input of the cell is missing, or it has none of that name.
            ValueError, RuntimeError: shapes, dtypes or devices do not fit together.
        """
        if self._frozen is not None:
            self._check_frozen()
        for name in inputs:
            if name not in self.cell.inputs:
                has = f"its inputs are {', '.join(self.cell.inputs)}" if self.cell.inputs else "its cell has no inputs"
                raise TypeError(f"Layer.forward() got an unexpected keyword argument {name!r}: {has}")
        for name in self.cell.inputs:
            if name not in inputs:
                raise TypeError(f"Layer.forward() needs {name}=, an input of the cell {self.cell.name}")
        if lengths is None and not (return_all_states or inputs):
            found = self._direct(input, hx, resets)
            if found is not None:
                return found
        given = {name: inputs[name] for name in self.cell.inputs}
        return self._checked(input, hx, resets, return_all_states, lengths, padding_value, given)

    def _batch_inputs(self, inputs, batched: bool, batch_sizes: Tensor | None) -> list[Tensor]:
        """Each as [T, B, H] (packed [N, H]), or with L*D in front."""
        found = []
        dims = 2 if batch_sizes is not None or not batched else 3
        for name, t in inputs.items():
            if isinstance(t, PackedSequence):
                if batch_sizes is None or not torch.equal(t.batch_sizes, batch_sizes):
                    raise RuntimeError(f"Layer: {name} must be packed as the input is")
                t = t.data
            if not isinstance(t, Tensor):
                raise TypeError(f"Layer: {name} must be a Tensor, got {type(t).__name__}")
            if t.dim() not in (dims, dims + 1):
                raise RuntimeError(f"Layer: {name} must have {dims} dimensions, or {dims + 1}, got {t.dim()}")
            if not batched:
                t = t.unsqueeze(-2 if not self.batch_first else -3)
            if batch_sizes is None and self.batch_first:
                t = t.transpose(-2, -3)
            found.append(t)
        return found

    def _run(self, input, states, batch_sizes, resets, return_all_states, lengths, padding_value, inputs):
        if functional.exporting_to_onnx():
            from fusedrnn import onnx

            onnx.check(self.cell.cell, heads=self.heads)
            return super()._run(input, states, batch_sizes, resets, return_all_states, lengths, padding_value, inputs)
        cell, directions = self.cell.cell, 2 if self.bidirectional else 1
        time_first = batch_sizes is not None or not self.batch_first
        x = input if time_first else input.transpose(0, 1)
        weights, device = self._weights(), input.device.type
        x, *tensors = functional._distinct(functional.operands(self._asked, device, x, *states, *weights, *inputs))
        n = len(states)
        states, weights, inputs = tensors[:n], tensors[n : n + len(weights)], tensors[n + len(weights) :]
        kinds = [*(("hidden", t) for t in states), *(("parameter", t) for t in weights)]
        for what, t in (*kinds, *zip(self.cell.inputs, inputs)):
            functional._check_same(x, t, what)
        lead = self.num_layers * directions
        rows = (*x.shape[:-1], self.hidden_size)
        for name, t in zip(self.cell.inputs, inputs):
            if tuple(t.shape) not in (rows, (lead, *rows)):
                raise RuntimeError(
                    f"Layer: {name} must have shape {list(rows)} (steps first), or {[lead, *rows]}, got {list(t.shape)}"
                )
        inputs = [t.unsqueeze(0).expand(lead, *rows) if tuple(t.shape) == rows else t for t in inputs]
        chosen = self._choose(x.dtype, x.device)
        runs, algorithm = chosen.backend, chosen.algorithm
        padding = None
        if lengths is not None:
            lengths = functional._check_lengths(lengths, x, states[0].shape[1], batch_sizes)
            if not (inputs or return_all_states) and functional.packs(
                lengths, runs, (input, *states, *weights), resets
            ):

                def call(data, batch_sizes, states, resets):
                    y, ends, _ = self._run(data, states, batch_sizes, resets, False, None, 0.0, inputs)
                    return y, *ends

                y, *ends = functional.by_packing(call, input, states, lengths, self.batch_first, padding_value, resets)
                return y, ends, None
            padding = functional.Padding.of(lengths, x.shape[0])
            x, *inputs = (padding.cut(t) for t in (x, *inputs))
        masks = (None,) * directions
        if resets is not None:
            masks = functional._masks(resets, x, states[0].shape[1], batch_sizes, time_first, directions, padding)
        below = None  # of each sequence what is packed, where a call may go past the dispatcher
        alone = not (return_all_states or functional._recorders or algorithm == ops.INT8)
        if runs == "cpu" and padding is None and alone:
            below = self.__dict__.get("_packed")
            if below is None and not torch.is_grad_enabled():
                below = [(None, None)] * lead
        per = len(weights) // lead
        own = len(cell.parameters)
        finals: list[Sequence[Tensor]] = []
        every: list[Sequence[Tensor]] = []
        for layer in range(self.num_layers):
            both = []
            for direction in range(directions):
                k = layer * directions + direction
                w_ih, w_hh, *rest = weights[k * per : (k + 1) * per]
                parameters, rest = tuple(rest[len(rest) - own :]), rest[: len(rest) - own]
                b_ih, b_hh = rest[:2] if self.bias else (None, None)
                w_hr = rest[-1] if self.proj_size else None
                h0, c0, *others = (*(s[k] for s in states), None)[: max(n, 2)]
                of_weights = w_ih, w_hh, b_ih, b_hh, w_hr
                own_inputs = tuple(t[k] for t in inputs)
                more = tuple(others), parameters, own_inputs, self.heads
                both.append(Inputs(x, h0, c0, *of_weights, batch_sizes, masks[direction], direction == 1, *more))
            done = [None]
            if below is not None:
                packed = below[layer * directions :]
                done = [ops.sequence_of_states(cell.name, given, *of) for given, of in zip(both, packed)]
            if None in done:
                done = [None]
                found = functional.layer_of_states(
                    cell, both, runs, algorithm, self.recompute, return_all_states, layer, padding
                )
            else:
                found = done
            ys = [y for y, _, _ in found]
            for y, ends, all_states in found:
                finals.append(ends[:n])
                every.append([y, *all_states[: n - 1]])
            x = ys[0] if directions == 1 else torch.cat(ys, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        states_of = None
        if return_all_states:
            states_of = tuple(torch.stack(s).to(x.dtype) for s in zip(*every))
            states_of = states_of if time_first else tuple(s.transpose(1, 2) for s in states_of)
        if padding is not None and padding_value != 0:
            x = padding.cut(x, padding_value)
        if lead == 1 and done[0] is not None:
            ends = [state.unsqueeze_(0) for state in finals[0]]  # nobody else has them
        else:
            ends = [functional._together([*s]) for s in zip(*finals)]
        return x if time_first else x.transpose(0, 1), ends, states_of

    def _choose(self, dtype: torch.dtype, device: torch.device) -> planning.Choice:
        return choose_for(
            self.cell,
            self.input_size,
            self.hidden_size,
            dtype,
            device,
            proj_size=self.proj_size,
            heads=self.heads,
            backend=self.backend,
            algorithm=self._asked,
        )


def choose_for(
    cell: Definition,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    proj_size: int = 0,
    heads: int = 1,
    backend: str | None = None,
    algorithm: str | None = None,
) -> planning.Choice:
    """What runs a cell, which is compiled by then; see ``planning.choose``."""
    name, asked = cell.cell.name, backend
    if planning._forced:
        asked, _ = planning._innermost(tuple(planning._forced), asked, algorithm)
    asked = asked or planning.parse(os.environ.get(planning.ENVIRONMENT_VARIABLE, ""))[0]
    why = ""
    for candidate in (asked,) if asked else ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        if candidate not in ("cpu", "triton", "cuda") or not (asked or planning.may_run(candidate, device)):
            continue
        if not (why := compiled.ensure(name, candidate)):
            break
    if why and asked:
        raise RuntimeError(f"backend {asked!r} was asked for but cannot run: {why}")
    chosen = planning.choose(
        name,
        input_size=input_size,
        hidden_size=hidden_size,
        proj_size=proj_size,
        dtype=dtype,
        device=device,
        backend=backend,
        algorithm=algorithm,
        heads=heads,
    )
    if why and chosen.backend == "reference":
        planning._tell_once(f"fusedrnn: the reference, a loop of torch's operations, runs the cell {cell.name}: {why}")
    return chosen
