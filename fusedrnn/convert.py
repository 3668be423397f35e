"""Swap torch.nn's recurrent layers inside a model for ours, and back, sharing their parameters."""

import warnings

from torch import nn

from fusedrnn import modules

_OURS = {getattr(nn, name): getattr(modules, name) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _swapped(module: nn.Module, classes: dict[type, type], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    target = classes.get(type(module))
    result = module
    if target is None and isinstance(module, tuple(classes)):
        warnings.warn(f"{type(module).__name__} is left as it is: it may override what a swap would lose", stacklevel=4)
    if target is not None:
        # The new module is the old one under another class: parameters, buffers, hooks and mode are shared.
        result = target.__new__(target)
        result.__dict__.update(module.__dict__)
        for name in ("backend", "algorithm"):
            if classes is _THEIRS:
                result.__dict__.pop(name, None)
    done[id(module)] = result
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _swapped(child, classes, done)
    return result


def convert(model: nn.Module) -> nn.Module:
    """Swaps every LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell of torch.nn inside ``model``, in place, for ours.

    Returns the model; when the model itself is such a layer, its replacement. Subclasses of theirs (a parametrized
    layer is one) are left alone, with a warning: they may override what the swap would lose. Optimizers keep working,
    since parameters stay the same objects. :func:`revert` undoes it.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _run(model, _OURS, "convert")


def revert(model: nn.Module) -> nn.Module:
    """Swaps every fusedrnn layer and cell inside ``model``, in place, for torch.nn's, sharing its parameters."""
    return _run(model, _THEIRS, "revert")


def _run(model: nn.Module, classes: dict[type, type], verb: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}")
    return _swapped(model, classes, {})
