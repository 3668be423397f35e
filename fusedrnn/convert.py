"""Swap torch.nn's recurrent layers inside a model for ours, and back, by changing the class of each module in place."""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fusedrnn import modules, ops

_NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
_OURS = {getattr(nn, name): getattr(modules, name) for name in _NAMES}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


@dataclass(frozen=True)
class ConversionEntry:
    """One recurrent layer or cell of a model: see :func:`conversion_report`.

    Attributes:
        path: its name in ``model.named_modules()``, the first one where it has several; "" is the model itself.
        class_name: the name of its class.
        swapped: whether it runs on fusedrnn.
        why: the reason it does not; "" where it does.
    """

    path: str
    class_name: str
    swapped: bool
    why: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.class_name}): {'swapped' if self.swapped else f'left: {self.why}'}"


def convert(model: nn.Module) -> nn.Module:
    """Swaps every LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell of torch.nn inside ``model``, in place, for ours.

    Each module stays the same object and only its class changes: parameters, buffers, hooks, training mode,
    parametrizations and whatever refers to it (optimizers, other modules) stay as they are. Returns ``model``.

    Left alone, with a warning that names the module and the reason: subclasses of torch.nn's classes (convert before
    wrappers that subclass, such as ``fully_shard``), modules whose ``forward`` was replaced, ScriptModules, quantised
    layers, and dtypes without a kernel. :func:`conversion_report` lists all of them; :func:`revert` undoes the swap.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _swap(model, _OURS, "convert")


def revert(model: nn.Module) -> nn.Module:
    """Swaps every fusedrnn layer and cell inside ``model``, in place, for torch.nn's: the inverse of :func:`convert`.

    Options that torch.nn does not have (``backend``, ``algorithm``, ``recompute``) are dropped. Subclasses of ours are
    left, with a warning. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _swap(model, _THEIRS, "revert")


def conversion_report(model: nn.Module) -> list[ConversionEntry]:
    """What :func:`convert` swapped in ``model`` and what it left, and why: an entry for each recurrent layer and cell.

    It looks at the model as it is now, so it may be called at any time, before convert as well.

    >>> import fusedrnn
    >>> from torch import nn
    >>> model = fusedrnn.convert(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)))
    >>> print(*fusedrnn.conversion_report(model))
    1 (GRU): swapped

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    found = []
    for path, module in _named_modules(model, "conversion_report"):
        swapped = isinstance(module, tuple(_THEIRS))
        why = "" if swapped else _obstacle(module, _OURS)
        if not swapped and not why and type_before_parametrizations(module) in _OURS:
            why = "convert was not called"
        if swapped or why:
            found.append(ConversionEntry(path, type(module).__name__, swapped, why))
    return found


def _named_modules(model: nn.Module, caller: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _obstacle(module: nn.Module, classes: dict[type, type]) -> str:
    """Why a recurrent module cannot be swapped; "" where it can, and for modules that are not recurrent."""
    cls = type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule is compiled already" if getattr(module, "original_name", "") in _NAMES else ""
    if cls.__module__.startswith("torch.ao."):
        return "it is quantised" if cls.__name__ in _NAMES else ""
    if cls not in classes:
        base = next((base for base in classes if issubclass(cls, base)), None)
        return f"a subclass of {base.__name__} may override what a swap would lose" if base else ""
    if "forward" in vars(module):
        return "its forward was replaced"
    dtype = next((p.dtype for p in module.parameters() if p.dtype not in ops.DTYPES), None)
    return f"no kernel takes its dtype, {dtype}" if dtype is not None else ""


def _swap(model: nn.Module, classes: dict[type, type], verb: str) -> nn.Module:
    for path, module in _named_modules(model, verb):
        why = _obstacle(module, classes)
        if why:
            name = f"{path or 'the model'} ({type(module).__name__})"
            warnings.warn(f"fusedrnn.{verb} leaves {name} as it is: {why}", stacklevel=3)
            continue
        target = classes.get(type_before_parametrizations(module))
        if target is None:
            continue
        if is_parametrized(module):
            # torch made a class for this module alone, a subclass of its own with the weights as properties.
            target = type(type(module).__name__, (target,), dict(vars(type(module))))
        if classes is _THEIRS:
            for option in ("backend", "algorithm", "recompute"):
                vars(module).pop(option, None)
        module.__class__ = target
    return model
