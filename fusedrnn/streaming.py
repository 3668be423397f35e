"""Streams: a layer that is fed step by step keeps its states, and hands out its own memory."""

import copy
import ctypes

import torch
from torch import Tensor, nn

from fusedrnn import _build, functional
from fusedrnn.cells import CELL_OF_MODE
from fusedrnn.freezing import freeze

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Stream:
    """A layer of one direction, run on sequences that come bit by bit; ``layer.stream(batch)`` makes one.

    ``y = stream(x)``: one step, x [B, I] and y [B, P], or a chunk of steps, x and y as the layer has them ([T, B, .],
    or [B, T, .] with batch_first). The states start as zeros and stay inside. ``y`` is the stream's own memory, which
    the next call of the same length overwrites: ``y.clone()`` keeps it, ``out=`` has it written to a tensor of yours.
    No gradient is recorded, and nothing drops out.

    The weights are those that the layer had when the stream was made: copied, and on the CPU packed for the processor.
    There all layers are one call of C++ where the layer would take backend "cpu" (csrc/cpu/stream.h has the same for
    programs without Python); elsewhere, where nothing was compiled and of a Layer of a cell of one's own, a call is one
    of the layer.

    One thread at a time. :attr:`states` is what to save; a stream itself is neither pickled nor copied.
    """

    # Of a Layer of a cell of one's own: a copy that is called.
    _run_layer: nn.RNNBase | None = None

    def __init__(self, layer: nn.RNNBase, batch: int = 1) -> None:
        name = type(layer).__name__
        own = layer.mode not in CELL_OF_MODE  # a Layer
        if own and layer.cell.inputs:
            raise ValueError(
                f"{name}: a stream has x alone, and {layer.cell.name} takes {', '.join(layer.cell.inputs)}"
            )
        if layer.bidirectional:
            raise ValueError(f"{name}: a stream goes one way, and this layer is bidirectional")
        if layer.training and layer.dropout:
            raise ValueError(f"{name}: nothing drops out in a stream: call eval() first, got dropout={layer.dropout}")
        if layer._frozen is not None:
            layer._check_frozen()
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch must be a positive integer, got {batch!r}")
        self.batch = batch
        self._layer = layer.__class__, layer.num_layers, layer.bias, layer.backend, layer._asked
        self._batch_first, self._input = layer.batch_first, layer.input_size
        self._out = layer.proj_size or layer.hidden_size
        self._sizes = [(layer.num_layers, batch, size) for size in layer._state_sizes()]
        self._buffers: dict[int, Tensor] = {}
        weights = [None if w is None else w.detach() for w in layer._weights()]  # in float32 where they are quantized
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self._stream = None
        if own:
            self._run_layer = self._copy_of(layer)
            self._held = [weights[0].new_zeros(size) for size in self._sizes]
            self._bytes = sum(w.nbytes for w in weights if w is not None) + self._run_layer.packed_bytes
            return
        self._cell = CELL_OF_MODE[layer.mode]
        choice = functional.planning.choose(
            self._cell.name,
            input_size=layer.input_size,
            hidden_size=layer.hidden_size,
            proj_size=layer.proj_size,
            dtype=self.dtype,
            device=self.device,
            backend=layer.backend,
            algorithm=layer._asked,
        )
        if choice.backend == "cpu" and self.dtype in _DTYPES:
            self._stream, self._at, self._bytes = self._made(layer, weights)
        else:
            self._weights = [None if w is None else w.clone() for w in weights]
            self._held = [weights[0].new_zeros(size) for size in self._sizes]
            self._bytes = sum(w.nbytes for w in self._weights if w is not None)

    @staticmethod
    def _copy_of(layer: nn.RNNBase) -> nn.RNNBase:
        """With weights of its own, packed where that helps."""
        with torch.no_grad():
            twin = copy.deepcopy(layer)
        twin.batch_first = False
        computed = any(name not in twin._parameters for name in twin._flat_weights_names)
        return twin.eval().requires_grad_(False) if computed else freeze(twin)

    def _made(self, layer: nn.RNNBase, weights: list[Tensor]) -> tuple:
        names, quantized = layer._flat_weights_names, layer._quantized
        if quantized is not None and layer._widens(self.batch):
            quantized = None
        if quantized is not None:
            weights = [layer._held(name).detach() for name in names]
        held = [None if w is None else w.contiguous() for w in weights]
        scales = [None if quantized is None or s is None else s.contiguous() for s in map(layer._scale, names)]
        per, layers = len(held) // layer.num_layers, []
        for k in range(layer.num_layers):
            w_ih, w_hh, *others = held[k * per : (k + 1) * per]
            w_hr = others.pop() if layer.proj_size else None
            of_rows = scales[k * per], scales[k * per + 1], scales[(k + 1) * per - 1] if layer.proj_size else None
            given = (w_ih, w_hh, *(others or (None, None)), w_hr, *of_rows)
            layers.append(tuple(None if w is None else w.data_ptr() for w in given))
        sizes = (self.batch, layer.input_size, layer.hidden_size, layer.proj_size)
        narrow = None if quantized is None else str(quantized).removeprefix("torch.")
        make = _build._extension.stream
        rounds = layer._activations is not None
        stream, h, c, count = make(self._cell.name, _DTYPES[self.dtype], *sizes, narrow, rounds, tuple(layers))
        return stream, (h, c)[: len(self._sizes)], count

    @property
    def packed_bytes(self) -> int:
        """What the stream's weights take, in bytes."""
        return self._bytes

    @property
    def states(self) -> Tensor | tuple[Tensor, ...]:
        """A copy of the states, as the layer returns them: h [L, B, P], or (h, c) with c [L, B, H]. To be assigned as
        well.
        """
        if self._stream is None:
            found = [t.clone() for t in self._held]
        else:
            found = [torch.empty(size, dtype=self.dtype) for size in self._sizes]
            for t, at in zip(found, self._at, strict=True):
                ctypes.memmove(t.data_ptr(), at, t.nbytes)
        return tuple(found) if len(found) > 1 else found[0]

    @states.setter
    def states(self, states: Tensor | tuple[Tensor, ...]) -> None:
        given = (states,) if isinstance(states, Tensor) else tuple(states)
        wanted = [tuple(size) for size in self._sizes]
        if [tuple(t.shape) for t in given] != wanted:
            raise RuntimeError(f"states must have the shapes {wanted}, got {[tuple(t.shape) for t in given]}")
        for k, t in enumerate(given):
            if t.dtype != self.dtype or t.device != self.device:
                raise RuntimeError(f"states must be {self.dtype} on {self.device}, got {t.dtype} on {t.device}")
            if self._stream is None:
                self._held[k] = t.detach().clone()
            else:
                t = t.detach().contiguous()
                ctypes.memmove(self._at[k], t.data_ptr(), t.nbytes)

    def reset(self, rows: Tensor | None = None) -> None:
        """Zeros the states of all sequences of the batch, or of those where ``rows`` [B], bool, is true."""
        states = self.states
        for t in (states,) if isinstance(states, Tensor) else states:
            if rows is None:
                t.zero_()
            else:
                t[:, self._checked_resets(rows, (self.batch,))] = 0
        self.states = states

    def _checked_resets(self, resets: Tensor, lead: tuple[int, ...]) -> Tensor:
        if tuple(resets.shape) != lead or resets.dtype != torch.bool or resets.device != self.device:
            got = f"{resets.dtype} {tuple(resets.shape)} on {resets.device}"
            raise RuntimeError(f"resets must be torch.bool {lead} on {self.device}, got {got}")
        return resets

    def __call__(self, x: Tensor, *, resets: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """y of one step or a chunk; ``resets`` [B], or as x without its last dimension: where true, a step starts from
        zero states. ``out``: what y is written to and what is returned.

        Raises:
            RuntimeError: a shape, dtype or device is wrong, a gradient would be needed, or another thread is in here.
        """
        # As few questions as will do: a small step takes as long as ten of them.
        dims = x.dim()
        shape = tuple(x.shape)
        if dims == 2:
            steps, fits = 1, shape == (self.batch, self._input)
        elif dims == 3:
            steps = shape[1 if self._batch_first else 0]
            fits = steps > 0 and shape[0 if self._batch_first else 1] == self.batch and shape[2] == self._input
        else:
            fits = False
        if not fits or x.dtype != self.dtype or x.device != self.device:
            raise RuntimeError(self._wanted(x))
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a stream records no gradient, and x requires one: use torch.no_grad() or x.detach()")
        if resets is not None:
            self._checked_resets(resets, shape[:-1])
        if out is not None and (tuple(out.shape) != (*shape[:-1], self._out) or out.dtype != self.dtype):
            got = f"{out.dtype} {tuple(out.shape)}"
            raise RuntimeError(f"out must be {self.dtype} {(*shape[:-1], self._out)}, got {got}")
        swapped = dims == 3 and self._batch_first
        if swapped:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        y = self._layers(x, steps, resets) if self._stream is None else self._run(x, steps, resets, dims, swapped, out)
        if y is out:
            return y
        if swapped:
            y = y.transpose(0, 1)
        return y if out is None else out.copy_(y)

    def _wanted(self, x: Tensor) -> str:
        chunk = f"[{self.batch}, T, {self._input}]" if self._batch_first else f"[T, {self.batch}, {self._input}]"
        return (
            f"x must be {self.dtype} on {self.device} and have shape [{self.batch}, {self._input}] or {chunk}, got "
            f"{x.dtype} on {x.device} {tuple(x.shape)}"
        )

    def _run(self, x, steps: int, resets, dims: int, swapped: bool, out) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        if resets is not None:
            resets = resets.contiguous()
        into = out
        if out is None or swapped or not out.is_contiguous() or out.device.type != "cpu":
            into = self._buffers.get(steps if dims == 3 else 0)
            if into is None:
                into = torch.empty((steps, self.batch, self._out)[3 - dims :], dtype=self.dtype)
                self._keep(into, steps if dims == 3 else 0)
        run = _build._extension.stream_run
        run(self._stream, x.data_ptr(), steps, None if resets is None else resets.data_ptr(), into.data_ptr())
        return into

    def _keep(self, buffer: Tensor, steps: int) -> None:
        # A step's, and that of the last length of a chunk.
        self._buffers = {k: b for k, b in self._buffers.items() if k == 0 or steps == 0} | {steps: buffer}

    @torch.no_grad()
    def _layers(self, x, steps: int, resets) -> Tensor:
        single = x.dim() == 2
        if single:
            x = x.unsqueeze(0)
            resets = None if resets is None else resets.unsqueeze(0)
        if self._run_layer is not None:
            held = tuple(self._held)
            y, states = self._run_layer.forward(x, held if len(held) > 1 else held[0], resets=resets)
            self._held = [states] if isinstance(states, Tensor) else [*states]
            return y[0] if single else y
        _, layers, bias, backend, algorithm = self._layer
        h0, c0 = self._held[0], self._held[1] if len(self._held) > 1 else None
        y, *found, _ = functional.layers(
            self._cell, x, h0, c0, self._weights, bias, layers, 0.0, False, False, False,
            None, resets, False, False, backend, algorithm, None, 0.0,
        )  # fmt: skip
        self._held = [t for t in found if t is not None]
        return y[0] if single else y

    def __repr__(self) -> str:
        return f"Stream(of {self._layer[0].__name__}, batch={self.batch}, {self.dtype}, {self.device})"

    def __reduce__(self):
        raise TypeError("a stream is neither pickled nor copied: save its states, and make another one of the layer")
