"""Layers that are only run, with weights of fewer bits: int8 times a scale for each row, or bfloat16; x and h too."""

import functools

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _build, ops
from fusedrnn.cells import CELL_OF_MODE
from fusedrnn.freezing import Freezable, bytes_of, checked, layers_of, panels_of

DTYPES = (torch.int8, torch.bfloat16)
_MOST = 127
# What C++ is given in place of a module: with its weights, and the batch from which on it is the other, with weights in
# float32.
_CALLS = ("_packed_call", "_wide_call")


def rounded(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight [rows, columns] in ``dtype``, and for int8 what each row is multiplied by: ``max |row| / 127``."""
    if dtype == torch.bfloat16:
        return w.to(dtype), None
    w = w.float()
    scale = w.abs().amax(1) / _MOST if w.shape[1] else w.new_zeros(w.shape[0])
    # A row of zeros has scale 0.
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    return (w / divisor).round().clamp(-_MOST, _MOST).to(torch.int8), scale


def widened(w: Tensor, scale: Tensor | None) -> Tensor:
    """What :func:`rounded` gave, in float32."""
    wide = w.to(torch.float32)
    return wide if scale is None else wide * scale.unsqueeze(1)


@functools.cache
def _whole_numbers() -> bool:
    """Whether int8 is multiplied in whole numbers here, not widened (csrc/cpu/digits.h)."""
    return _build._extension.plan("lstm", 6, 100, 1, 8, 8, 0, 1, 0, 0, 0, True, False, 1, False)["digits"]


def float32_is_faster(dtype: torch.dtype, weights: int, batch: int, cell: bool) -> bool:
    """Whether steps of ``batch`` rows take less time in float32, as measured on a CPU, of a layer or of a cell;
    ``weights``: in W_hh and in W_ih, on average.
    """
    if cell:
        return weights < 1 << 17 or (batch >= 16 and weights < 1 << 19)
    if dtype == torch.int8 and _whole_numbers():
        return weights < 8192
    return weights < 32768 or batch >= (8 if weights >= 1 << 19 else 4)


class Quantizable(Freezable):
    """What layers and cells have for :func:`quantize`."""

    @property
    def packed_bytes(self) -> int:
        """How many bytes packed weights take, beside the parameters and buffers; 0 where none are kept."""
        found, wide = super().packed_bytes, self.__dict__.get("_wide_call")
        if wide is not None:
            found += sum(wide["_parameters"][name].nbytes for name in self._weight_names())
            found += bytes_of(wide.get("_packed", ()))
        return found

    @property
    def _asked(self) -> str | None:
        """The algorithm that planning is asked for."""
        return self.algorithm if self._activations is None else ops.INT8

    def _weight_names(self) -> list[str]:
        names = self._flat_weights_names if isinstance(self, nn.RNNBase) else ("weight_ih", "weight_hh")
        return [name for name in names if name.startswith("weight_")]

    def _scale(self, name: str) -> Tensor | None:
        return self._buffers.get(f"{name}_scale")

    def _widened(self, names: list[str]) -> list[Tensor | None]:
        """The parameters of these names, in float32."""
        weights = self._weight_names()
        return [widened(self._held(n), self._scale(n)) if n in weights else getattr(self, n, None) for n in names]

    def _quantize(self, dtype: torch.dtype, activations: torch.dtype | None, wanted: dict[str, bool]) -> None:
        for name in self._weight_names():
            w, scale = rounded(self._parameters.pop(name).detach(), dtype)
            self.register_buffer(name, w)
            if scale is not None:
                self.register_buffer(f"{name}_scale", scale)
        self._quantized, self._activations = dtype, activations
        self._renewed()
        self._freeze(wanted)

    def _unquantize(self) -> None:
        wanted = self._wanted()
        order = self._flat_weights_names if isinstance(self, nn.RNNBase) else [*self._weight_names(), *self._parameters]
        wide = dict(zip(order, self._widened(order), strict=True))
        for name in self._weight_names():
            for buffer in (name, f"{name}_scale"):
                self._buffers.pop(buffer, None)
        for name in order:
            self._parameters.pop(name, None)
        for name, w in wide.items():
            parameter = w if w is None or isinstance(w, nn.Parameter) else nn.Parameter(w, requires_grad=False)
            self._parameters[name] = parameter
            if parameter is not None:
                parameter.requires_grad_(wanted.get(name, parameter.requires_grad))
        for name in ("_packed", *_CALLS):
            self.__dict__.pop(name, None)
        del self._frozen, self._quantized
        self.__dict__.pop("_activations", None)
        self._renewed()

    def _renewed(self) -> None:
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()

    def _pack(self) -> list | None:
        for name in _CALLS:
            self.__dict__.pop(name, None)
        if self._quantized is None:
            return super()._pack()
        cell, names = CELL_OF_MODE[self.mode].name, self._weight_names()
        if any(self._held(name).device.type != "cpu" for name in names):
            return None
        found = []
        for name in names:
            if not name.startswith("weight_ih"):
                continue
            all_three = [name.replace("_ih", part) for part in ("_ih", "_hh", "_hr")]
            # Of a cell: a single step reads weights where they lie, unless it multiplies 8 bits by 8.
            panels, rounds = [None, None], self._activations is not None
            if isinstance(self, nn.RNNBase) or rounds:
                panels = [_build._small_calls.pack(cell, self._held(n), True, 1, rounds) for n in all_three[1::-1]]
                if None in panels:
                    return None
            found.append((*panels, *map(self._scale, all_three), rounds))
        order = self._flat_weights_names if isinstance(self, nn.RNNBase) else [*names, *self._parameters]
        sizes = {name: getattr(self, name, 0) for name in ("input_size", "hidden_size", "proj_size")}
        sizes["wide_from"] = next((batch for batch in (1, 4, 8, 16) if self._widens(batch)), None)
        # As if it was the __dict__ of a module with parameters of such dtypes.
        self.__dict__["_packed_call"] = sizes | {"_parameters": {n: self._held(n) for n in order}, "_packed": found}
        return found

    def _called_as(self, input) -> dict | None:
        """What C++ is given as the module's __dict__; None: nothing."""
        if self._quantized is None:
            return self.__dict__
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return None
        narrow = self.__dict__.get("_packed_call")
        if narrow is None or narrow["wide_from"] is None:
            return narrow
        batch = 1
        if narrow["wide_from"] == 1:
            pass
        elif type(input) is PackedSequence:
            batch = int(input.batch_sizes[0]) if input.batch_sizes.numel() else 0
        elif isinstance(input, Tensor) and input.dim() > 1:
            batch = input.shape[0 if input.dim() == 2 or self.batch_first else 1]
        if batch < narrow["wide_from"]:
            return narrow
        return self.__dict__.get("_wide_call") or self._wide_call(narrow)

    def _widens(self, batch: int) -> bool:
        """Whether a call for so many sequences takes the weights in float32."""
        if self._activations is not None:
            return False  # they would not be rounded
        w_ih, w_hh = map(self._held, self._weight_names()[:2])
        weights = (w_ih.numel() + w_hh.numel()) // 2
        return float32_is_faster(self._quantized, weights, batch, not isinstance(self, nn.RNNBase))

    def _wide_call(self, narrow: dict) -> dict:
        names, cell = list(narrow["_parameters"]), CELL_OF_MODE[self.mode].name
        wide = dict(zip(names, self._widened(names), strict=True))
        found = {name: value for name, value in narrow.items() if name != "_packed"} | {"_parameters": wide}
        if isinstance(self, nn.RNNBase):
            found["_packed"] = panels_of(cell, wide)
            if found["_packed"] is None:
                return narrow
        self.__dict__["_wide_call"] = found
        return found

    def _replaced(self, name: str) -> RuntimeError:
        if self._quantized is None:
            return super()._replaced(name)
        return RuntimeError(
            f"{type(self).__name__} is quantized, and its {name} was replaced: call fusedrnn.unquantize, then "
            "fusedrnn.quantize again"
        )

    def _cannot_train(self, why: str) -> RuntimeError:
        if self._quantized is None:
            return super()._cannot_train(why)
        return RuntimeError(
            f"{type(self).__name__} is quantized and cannot be trained ({why}): call fusedrnn.unquantize"
        )

    def extra_repr(self) -> str:
        """As torch.nn's, and what the weights are quantized to."""
        found = super().extra_repr()
        for name, dtype in (("quantized", self._quantized), ("activations", self._activations)):
            found += "" if dtype is None else f", {name}={dtype}"
        return found

    def _apply(self, fn, *args, **kwargs):
        if self._quantized is None:
            return super()._apply(fn, *args, **kwargs)
        # It may move, and no more: a bfloat16 weight stays one whatever `float` says.
        to = fn(torch.empty(0)).dtype
        if to != torch.float32:
            raise RuntimeError(
                f"{type(self).__name__} is quantized and computes in float32, it cannot become {to}: call "
                "fusedrnn.unquantize first"
            )
        return super()._apply(lambda t: fn(t).to(t.dtype), *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        for name in self._weight_names():
            key = prefix + name
            given, scale = state_dict.get(key), f"{key}_scale"
            if not isinstance(given, Tensor):
                continue
            if given.dtype == torch.int8:
                if self._quantized != torch.int8:
                    mine = self._quantized or "not quantized"
                    errors.append(f'"{key}" is int8, the layer {mine}: call fusedrnn.quantize(model, torch.int8) first')
                    del state_dict[key]
                elif scale not in state_dict:
                    errors.append(f'"{key}" is int8 and has no "{scale}"')
            elif self._quantized is not None and given.dim() == 2:
                if self._quantized == torch.int8 and not given.is_meta and not given.isfinite().all():
                    errors.append(f'"{key}" holds NaN or infinity and cannot become int8')
                    continue
                state_dict[key], state_dict[scale] = rounded(given.detach(), self._quantized)
                if self._quantized == torch.bfloat16:
                    del state_dict[scale]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name not in _CALLS}


def quantize(model: nn.Module, dtype: torch.dtype = torch.int8, activations: torch.dtype | None = None) -> nn.Module:
    """Stores the weights of every layer and cell of fusedrnn inside ``model`` in fewer bits, in place.

    W_ih, W_hh and W_hr become buffers of the same names: with ``torch.int8`` whole numbers of -127 to 127, each row
    times a scale of its own, ``max |row| / 127``, a buffer ``weight_hh_l0_scale`` [rows]; with ``torch.bfloat16``
    rounded ones. Biases stay. Everything is computed in float32 all the same, x and the states are not rounded: results
    are those of the layer with the rounded weights, up to the rounding of float32 sums.

    With ``activations=torch.int8``, which goes with int8 weights, what W_ih and W_hh multiply is rounded as well, at
    every step: a row of x or h [., K] to whole numbers of -127 to 127, half to even, times ``max |row| / 127``; a row
    that is not finite stays as it is. Their products are whole numbers and exact. That is faster and less exact:
    what torch's and ONNX Runtime's dynamic quantisation do. Biases, c and the states stay float32, and h that W_hr
    multiplies is not rounded. There is no gradient of the input, and autocast changes nothing.

    As with :func:`freeze` the layers go to ``eval()``, want no gradient of their own (one of the input is given), and
    what changes the numbers of a buffer behind the module's back is not seen. ``load_state_dict`` takes quantized
    weights, and rounds float ones. :func:`unquantize` goes back to float32 with the rounded weights, so does
    :func:`revert`. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ValueError: ``dtype`` or ``activations`` is another, or they do not go together; there is no layer or cell of
            fusedrnn in the model, one whose weights are computed (parametrizations), not float32, quantized in another
            way already, or, for int8, not finite.
        RuntimeError: at a call, where a weight was replaced by another object or a bias requires grad again; at
            ``train()``, and where the module is cast to another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"quantize: dtype must be torch.int8 or torch.bfloat16, got {dtype}")
    if activations not in (None, torch.int8):
        raise ValueError(f"quantize: activations must be torch.int8 or None, got {activations}")
    if activations is not None and dtype != torch.int8:
        raise ValueError(f"quantize: activations={activations} goes with weights in torch.int8, got dtype={dtype}")
    found = checked(model, "quantize", "quantized")
    for layer, wanted in found:
        name = type(layer).__name__
        if layer._quantized not in (None, dtype):
            raise ValueError(f"quantize: {name} is quantized to {layer._quantized}; call fusedrnn.unquantize first")
        if layer._quantized is not None and layer._activations != activations:
            raise ValueError(
                f"quantize: {name} is quantized with activations={layer._activations}, got {activations}; call "
                "fusedrnn.unquantize first"
            )
        if layer._quantized is not None:
            continue
        other = next((p.dtype for p in map(layer._held, wanted) if p.dtype != torch.float32), None)
        if other is not None:
            raise ValueError(f"quantize: {name} is {other}, only float32 is quantized: call .float() first")
        for weight in layer._weight_names() if dtype == torch.int8 else ():
            w = layer._held(weight)
            if not w.is_meta and not w.isfinite().all():
                raise ValueError(f"quantize: {weight} of {name} holds NaN or infinity and cannot become int8")
    for layer, wanted in found:
        if layer._quantized is None:
            layer._quantize(dtype, activations, wanted)
            layer.eval()
    return model


def unquantize(model: nn.Module) -> nn.Module:
    """Undoes :func:`quantize` in place, but for the rounding: the weights are float32 parameters again, and parameters
    want a gradient if they did. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    for layer in layers_of(model, "unquantize"):
        if layer._quantized is not None:
            layer._unquantize()
    return model
