"""Swap torch.nn's recurrent layers inside a model for ours, and back, by changing the class of each module in place."""

import copy
import functools
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fusedrnn import modules, ops
from fusedrnn.freezing import unfreeze
from fusedrnn.quantizing import unquantize

_NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
# Of torch.nn's classes ours.
CLASSES: dict[type, type] = {getattr(nn, name): getattr(modules, name) for name in _NAMES}
_THEIRS = {ours: theirs for theirs, ours in CLASSES.items()}
# What torch.nn's classes do not have.
_OPTIONS = ("backend", "algorithm", "recompute")
# What our classes work out for each subclass.
_OF_A_CLASS = ("_may_be_direct", "_checks_itself")
# What a subclass may override: nothing of it computes.
_HARMLESS = {
    "__init__",
    "__repr__",
    "__setstate__",
    "__getstate__",
    "reset_parameters",
    "extra_repr",
    "flatten_parameters",
}


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

    A module of a subclass of torch.nn's classes becomes one of a new class of that name, a subclass of both, which
    pickles wherever the user's class does.

    Left alone, with a warning that names the module and the reason: subclasses that override a method that computes
    (the reason names it; a ``forward`` that calls ``super().forward`` does not), modules whose ``forward`` was
    replaced, ScriptModules, quantised layers, and dtypes without a kernel. :func:`conversion_report` lists all of them;
    :func:`revert` undoes the swap.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _swap(model, CLASSES, "convert")


def revert(model: nn.Module) -> nn.Module:
    """Swaps every fusedrnn layer and cell inside ``model``, in place, for torch.nn's: the inverse of :func:`convert`.

    Options that torch.nn does not have (``backend``, ``algorithm``, ``recompute``) are dropped, frozen layers are
    unfrozen, quantized ones get their rounded weights in float32. A subclass that convert took gets its class back;
    subclasses of ours that the user wrote are left, with a warning. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    if isinstance(model, nn.Module):
        unquantize(unfreeze(model))
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
        why = "" if swapped else _obstacle(module, CLASSES)
        if not swapped and not why and _target(type_before_parametrizations(module), CLASSES):
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
    if _target(cls, classes) is None:
        base = next((base for base in classes if issubclass(cls, base)), None)
        if base is None or (classes is CLASSES and issubclass(cls, tuple(_THEIRS))):
            return ""
        return f"a subclass of {base.__name__}" + (
            f" {_stops(cls)}" if classes is CLASSES else " that revert knows not"
        )
    if "forward" in vars(module):
        return "its forward was replaced"
    if classes is CLASSES and (name := next((name for name in _OPTIONS if name in vars(module)), None)):
        return f"its attribute {name} would be read as fusedrnn's option"
    dtype = next((p.dtype for p in module.parameters() if p.dtype not in ops.DTYPES), None)
    return f"no kernel takes its dtype, {dtype}" if dtype is not None else ""


def _stops(cls: type) -> str:
    """What in a subclass of torch.nn's classes stops its swap; "" if nothing does."""
    theirs = next(base for base in cls.__mro__ if base in CLASSES)
    ours = CLASSES[theirs]
    # Between nn.Module and the class, and in ours: what is computed, checked or read.
    used = {name for base in ours.__mro__ for name in vars(base) if base.__module__ != nn.Module.__module__} - _HARMLESS
    used |= {"__call__", "__getattr__", "__getattribute__", "__reduce__", "__reduce_ex__", "__init_subclass__"}
    used -= {"__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__static_attributes__"}
    used -= {"__firstlineno__", "__constants__", "__qualname__", "__parameters__", "__orig_bases__"}
    for base in cls.__mro__[: cls.__mro__.index(theirs)]:
        if base in theirs.__mro__:
            continue
        stops = (name for name in vars(base) if name in used or name.startswith(("weight_", "bias_")))
        name = next((name for name in stops if not (name == "forward" and _hands_over(vars(base)[name]))), None)
        if name is not None:
            kind = "overrides" if hasattr(theirs, name) else "has an attribute that fusedrnn's class uses,"
            return f"that {kind} {name}"
    return ""


def _hands_over(forward) -> bool:
    """Whether it calls super().forward, which then is ours."""
    code = getattr(forward, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and {"super", "forward"} <= set(code.co_names)


def _target(cls: type, classes: dict[type, type]) -> type | None:
    """The class that takes the place of ``cls``; None where there is none."""
    if cls in classes:
        return classes[cls]
    if classes is _THEIRS:
        return vars(cls).get("_converted_from")
    if issubclass(cls, tuple(_THEIRS)) or not issubclass(cls, tuple(CLASSES)) or _stops(cls):
        return None
    return _converted(cls)


@functools.cache
def _converted(cls: type) -> type:
    """A user's subclass of torch.nn's class with ours in front of torch.nn's."""
    ours = next(CLASSES[base] for base in cls.__mro__ if base in CLASSES)
    about = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls, ours), about | {"_converted_from": cls, "__reduce_ex__": _reduce})


def _reduce(self, protocol):
    return _restored, (type(self)._converted_from,), self.__getstate__()


def _restored(cls: type) -> nn.Module:
    made = _converted(cls)
    return made.__new__(made)


def as_torch(module: nn.Module) -> nn.Module:
    """torch.nn's twin of one of our modules, with the same parameters, hooks and mode; ``module`` stays as it is."""
    if module._quantized is not None:
        module = unquantize(copy.deepcopy(module))
    theirs = next(theirs for ours, theirs in _THEIRS.items() if isinstance(module, ours))
    state = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in vars(module).items() if k not in _OPTIONS}
    state.pop("_flat_weight_refs", None)
    twin = theirs.__new__(theirs)
    twin.__setstate__(state)
    return twin


def _swap(model: nn.Module, classes: dict[type, type], verb: str) -> nn.Module:
    for path, module in _named_modules(model, verb):
        why = _obstacle(module, classes)
        if why:
            name = f"{path or 'the model'} ({type(module).__name__})"
            warnings.warn(f"fusedrnn.{verb} leaves {name} as it is: {why}", stacklevel=3)
            continue
        target = _target(type_before_parametrizations(module), classes)
        if target is None:
            continue
        if is_parametrized(module):
            # torch made a class for this module alone, a subclass of its own with the weights as properties.
            properties = {name: value for name, value in vars(type(module)).items() if name not in _OF_A_CLASS}
            target = type(type(module).__name__, (target,), properties)
        if classes is _THEIRS:
            for option in _OPTIONS:
                vars(module).pop(option, None)
        module.__class__ = target
    return model
