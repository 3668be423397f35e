"""Layers that are only run: weights packed once for the processor, by promise that nobody changes them."""

import torch
from torch import Tensor, nn

from fusedrnn import _build
from fusedrnn.cells import CELL_OF_MODE


def panels_of(
    cell: str, weights: dict[str, Tensor | None], heads: int = 1
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Packed W_hh of each sequence and, of one head where the dtype allows, W_ih; None where the kernels take none."""
    found = []
    for name, w_hh in weights.items():
        if not name.startswith("weight_hh"):
            continue
        if w_hh.device.type != "cpu":
            return None
        both = heads == 1 and _build._small_calls.packs_input(cell, w_hh)
        pair = [w_hh, weights[name.replace("_hh", "_ih")]] if both else [w_hh]
        panels = [_build._small_calls.pack(cell, w, False, heads, False) for w in pair]
        if None in panels:
            return None
        found.append((panels[0], panels[1] if len(panels) > 1 else None))
    return found


def bytes_of(packed: list[tuple]) -> int:
    """What panels take; scales, where some stand behind them, are buffers."""
    return sum(t.nbytes for panels_and_scales in packed for t in panels_and_scales[:2] if t is not None)


class Freezable(nn.Module):
    """What layers and cells have for :func:`freeze`."""

    # Of a frozen one: the parameters that were packed, by name, and whether each wanted a gradient.
    _frozen: dict[str, tuple[Tensor, bool]] | None = None
    # Of a quantized one, which is frozen too: what its weights are, buffers then.
    _quantized: torch.dtype | None = None
    # Of such a one: what x and h are rounded to, if they are.
    _activations: torch.dtype | None = None

    @property
    def packed_bytes(self) -> int:
        """How many bytes packed weights take, beside the parameters; 0 where none are kept."""
        return bytes_of(self.__dict__.get("_packed", ()))

    def _check_frozen(self) -> None:
        """Raises RuntimeError where the promise of freeze is seen to be broken."""
        if torch.compiler.is_exporting():
            return  # with tensors in place of the parameters, and none of the packed weights
        recorded = torch.is_grad_enabled()
        held, shadowed = self._parameters.get, self.__dict__  # a small call takes no longer than some such questions
        for name, (weight, _) in self._frozen.items():
            if (held(name) is not weight and self._held(name) is not weight) or name in shadowed:
                raise self._replaced(name)
            if recorded and weight.requires_grad:
                raise self._cannot_train(f"{name} requires grad")

    def _held(self, name: str) -> Tensor | None:
        return self._parameters[name] if name in self._parameters else self._buffers.get(name)

    def _replaced(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} is frozen, and its {name} was replaced: call fusedrnn.freeze again, or "
            "fusedrnn.unfreeze"
        )

    def _cannot_train(self, why: str) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__} is frozen and cannot be trained ({why}): call fusedrnn.unfreeze")

    def _freeze(self, wanted: dict[str, bool]) -> None:
        self._frozen = {name: (self._held(name), grad) for name, grad in wanted.items()}
        for name in wanted:
            self._held(name).requires_grad_(False)
        self.__dict__.pop("_packed", None)
        packed = self._pack() if _build._small_calls is not None else None
        if packed is not None:
            self.__dict__["_packed"] = packed

    def _pack(self) -> list | None:
        """What C++ takes beside the weights, for each sequence; None where that is nothing."""
        if not isinstance(self, nn.RNNBase):
            return None  # a single step reads weights where they lie
        return self._panels(CELL_OF_MODE[self.mode].name)

    def _panels(self, cell: str, heads: int = 1) -> list | None:
        names = self._flat_weights_names
        return panels_of(cell, {n: self._parameters[n] for n in names if n.startswith("weight")}, heads)

    def _wanted(self) -> dict[str, bool]:
        return {name: grad for name, (_, grad) in self._frozen.items()}

    def _unfreeze(self) -> None:
        for name, grad in self._wanted().items():
            if isinstance(self._parameters.get(name), Tensor):
                self._parameters[name].requires_grad_(grad)
        self.__dict__.pop("_packed", None)
        del self._frozen

    # What changes the weights by a call of the module packs them again.
    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self._frozen is not None:
            self._freeze(self._wanted())
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._frozen is not None:
            self._freeze(self._wanted())

    def train(self, mode: bool = True):
        if mode and self._frozen is not None:
            raise self._cannot_train("train() was called")
        return super().train(mode)

    # Packed weights are those of one processor: a copy packs its own.
    def __getstate__(self) -> dict:
        # RNNBase has its own, a cell that of Python 3.11's object, if any.
        inherited = nn.RNNBase.__getstate__(self) if isinstance(self, nn.RNNBase) else self.__dict__
        state = {name: value for name, value in inherited.items() if name != "_packed"}
        if self._frozen is not None:
            state["_frozen"] = self._wanted()
        return state

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        wanted = state.pop("_frozen", None)
        super().__setstate__(state)
        if wanted is not None:
            self._freeze(wanted)


def freeze(model: nn.Module) -> nn.Module:
    """Promises that the weights of every layer and cell of fusedrnn inside ``model`` stay as they are, in place.

    On the CPU W_hh, and in float32 W_ih (with AVX512-BF16 in bfloat16 too), are then packed once and not at every
    call (``layer.packed_bytes``). The layers go to ``eval()``, their parameters want no gradient any more, and a
    change of the numbers in them that is not made by the module itself (``p.data.copy_``, an optimizer, an alias in
    NumPy) is not seen: call freeze again, or :func:`unfreeze` first. ``load_state_dict``, ``to`` and the like do
    pack again. Copies and pickles are frozen as well. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ValueError: there is no layer or cell of fusedrnn in it, or one whose weights are computed (parametrizations).
        RuntimeError: at a call, where a parameter was replaced by another object or requires grad again; at
            ``train()``.
    """
    for layer, wanted in checked(model, "freeze", "frozen"):
        if layer._quantized is None:  # else it is frozen already
            layer._freeze(wanted)
            layer.eval()
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undoes :func:`freeze` in place; parameters want a gradient again if they did. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    for layer in layers_of(model, "unfreeze"):
        if layer._frozen is not None and layer._quantized is None:
            layer._unfreeze()
    return model


def checked(model: nn.Module, caller: str, done: str) -> list[tuple[Freezable, dict[str, bool]]]:
    """Every layer and cell, and of its parameters which want a gradient, or did; raises as :func:`freeze` does."""
    layers = layers_of(model, caller)
    if not layers:
        raise ValueError(
            f"{caller}: there is no layer or cell of fusedrnn in the model; call fusedrnn.convert on it first"
        )
    found = []
    for layer in layers:
        if layer.mode not in CELL_OF_MODE and done != "frozen":
            raise ValueError(f"{caller}: a Layer of a cell of one's own cannot be {done} yet, got {layer.cell.name}")
        if layer._quantized is not None:
            found.append((layer, layer._wanted()))
            continue
        names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else list(layer._parameters)
        computed = [name for name in names if name not in layer._parameters]
        if computed:
            raise ValueError(f"{caller}: {', '.join(computed)} of {type(layer).__name__} is computed, not a parameter")
        given = {name: layer._parameters[name].requires_grad for name in names if layer._parameters[name] is not None}
        found.append((layer, given | (layer._wanted() if layer._frozen is not None else {})))
    return found


def layers_of(model: nn.Module, caller: str) -> list[Freezable]:
    """Every layer and cell in a model; raises TypeError where that is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, Freezable)]
