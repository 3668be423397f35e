"""Libraries that ask for the type of a module, or for the name of an op, and what they are told about ours.

isinstance(m, torch.nn.LSTM) is true of fusedrnn.LSTM, but a table keyed by type(m) does not see it. A library whose
table can be entered is entered when it is imported, or at once where that has happened; none is imported here.
"""

import copy
import functools
import importlib.abc
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from fusedrnn import modules
from fusedrnn.convert import CLASSES, as_torch

_entered: set[str] = set()


def register() -> tuple[str, ...]:
    """Enters fusedrnn's classes and ops into every library that is imported and has a table for them.

    Importing fusedrnn, or one of these libraries after it, does the same; call it where a library was imported in
    another way, or where its table was replaced by a new one.

    Returns:
        The modules whose tables were entered, by now: of torch (Dynamo, FlopCounterMode, quantize_dynamic), thop,
        ptflops, fvcore, Opacus.
    """
    for name in _TABLES:
        module = sys.modules.get(name)
        # One that is being imported is entered when it is there.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _enter(name, module)
    return tuple(name for name in _TABLES if name in _entered)


def _enter(name: str, module: ModuleType) -> None:
    _TABLES[name](module)
    _entered.add(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: what the others find is entered after it ran."""

    def find_spec(self, name, path=None, target=None):
        if name not in _TABLES:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module):
            run(module)
            if module.__name__ != name:  # a loader that others share
                return
            del loader.exec_module
            try:
                _enter(name, module)
            except (AttributeError, KeyError, TypeError, ImportError) as error:
                # Whoever imports that library may never use it with us.
                warnings.warn(f"fusedrnn: this version of {name} cannot be told about it: {error!r}", stacklevel=2)

        loader.exec_module = exec_module
        return spec


def _enter_types(table: dict) -> None:
    """Our classes beside torch.nn's, where those are."""
    for theirs, ours in CLASSES.items():
        if theirs in table:
            table[ours] = table[theirs]


# Dynamo


def _let_dynamo_trace(builder: ModuleType) -> None:
    # Dynamo refuses instances of nn.LSTM, nn.GRU and nn.RNN unless this setting is on: on for ours, one by one.
    original = builder.VariableBuilder.wrap_module
    if hasattr(original, "_fusedrnn"):
        return

    @functools.wraps(original)
    def wrap_module(self, value):
        if isinstance(value, modules.RecurrentLayer) and not builder.config.allow_rnn:
            with builder.config.patch(allow_rnn=True):
                return original(self, value)
        return original(self, value)

    wrap_module._fusedrnn = True
    builder.VariableBuilder.wrap_module = wrap_module


# Counters of work


def _multiplications(cell: str, x, w_ih, w_hh, w_hr=None) -> int:
    """Of one direction of one layer, from the shapes [.., I], [G*H, I], [G*H, P], [P, H]."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    per_row = w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1]
    return rows * (per_row + (w_hr[0] * w_hr[1] if w_hr is not None else 0))


def _count_flops(counter: ModuleType) -> None:
    ops = torch.ops.fusedrnn
    if ops.sequence in counter.flop_registry:
        return

    @counter.register_flop_formula(ops.sequence)
    def sequence_flop(cell, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, *_, **__) -> int:
        return 2 * _multiplications(cell, x, w_ih, w_hh, w_hr)

    @counter.register_flop_formula(ops.sequence_backward)
    def sequence_backward_flop(cell, dy, dfinals, devery, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, *rest, **__) -> int:
        needs, rows = rest[-1], _multiplications(cell, x, (1, 1), (0, 0))
        of_x, (of_w_ih, of_w_hh, _, _, of_w_hr) = needs[0], needs[-5:]
        hidden_part = w_hh[0] * w_hh[1] + (w_hr[0] * w_hr[1] if w_hr is not None else 0)
        weights = of_w_hh * w_hh[0] * w_hh[1] + (w_hr[0] * w_hr[1] if w_hr is not None and of_w_hr else 0)
        return 2 * rows * (hidden_part + weights + (of_x + of_w_ih) * w_ih[0] * w_ih[1])


def _shapes(call: Callable) -> Callable:
    """A counter of multiplications from the inputs of the op, whose shapes ``call`` tells."""

    def count(inputs, outputs) -> int:
        x, w_ih, w_hh, w_hr = (call(inputs[k]) for k in (1, 3, 4, 7))
        return _multiplications("", x, w_ih, w_hh, w_hr)

    return count


def _count_aten(ops: ModuleType) -> None:
    ops.ATEN_OPS_MAPPING[torch.ops.fusedrnn.sequence] = _shapes(lambda t: None if t is None else tuple(t.shape))


def _count_traced(flop_count: ModuleType) -> None:
    flop_count._DEFAULT_SUPPORTED_OPS["fusedrnn::sequence"] = _shapes(
        lambda value: value.type().sizes() if value.isCompleteTensor() else None
    )


# Quantisation and privacy


class _Quantised:
    """What quantize_dynamic calls for one of our classes: torch.nn's twin of the module is quantised."""

    def __init__(self, theirs: type, quantised: type | None) -> None:
        self.theirs, self.quantised = theirs, quantised

    def from_float(self, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:
        if self.quantised is None:
            warnings.warn(
                f"torch.ao has no dynamically quantised {self.theirs.__name__}: it stays as it is", stacklevel=2
            )
            return mod
        return self.quantised.from_float(as_torch(mod))

    def __deepcopy__(self, memo):
        return self


def _quantise_dynamically(mappings: ModuleType) -> None:
    table = mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
    for theirs, ours in CLASSES.items():
        table[ours] = _Quantised(theirs, table.get(theirs))


def _quantise_by_module(quantize: ModuleType) -> None:
    _enter_types(quantize.get_default_custom_config_dict()["float_to_observed_custom_module_class"])
    # A spec that names torch.nn.LSTM means every layer that is one.
    original = quantize.propagate_qconfig_
    if hasattr(original, "_fusedrnn"):
        return

    @functools.wraps(original)
    def propagate_qconfig_(module, qconfig_dict=None, prepare_custom_config_dict=None):
        qconfig_dict = dict(qconfig_dict or {})
        for theirs, ours in CLASSES.items():
            if theirs in qconfig_dict:
                qconfig_dict.setdefault(ours, qconfig_dict[theirs])
        return original(module, qconfig_dict, prepare_custom_config_dict)

    propagate_qconfig_._fusedrnn = True
    quantize.propagate_qconfig_ = propagate_qconfig_


def _quantise_a_graph(quantize_fx: ModuleType) -> None:
    # It asks for types in many places: it gets torch.nn's twins, of the same parameters, in a copy of the model.
    original = quantize_fx._prepare_fx
    if hasattr(original, "_fusedrnn"):
        return

    @functools.wraps(original)
    def _prepare_fx(model, qconfig_mapping, *args, **kwargs):
        twins = {id(m): as_torch(m) for m in model.modules() if isinstance(m, tuple(CLASSES.values()))}
        if twins:
            kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, twins | kept)
            if isinstance(qconfig_mapping, quantize_fx.QConfigMapping):
                by_type = qconfig_mapping.object_type_qconfigs
                for theirs, ours in CLASSES.items():
                    if ours in by_type:
                        qconfig_mapping.set_object_type(theirs, by_type[ours])
        return original(model, qconfig_mapping, *args, **kwargs)

    _prepare_fx._fusedrnn = True
    quantize_fx._prepare_fx = _prepare_fx


def _make_private(validators: ModuleType) -> None:
    _enter_types(validators.ModuleValidator.VALIDATORS)
    _enter_types(validators.ModuleValidator.FIXERS)


_TABLES: dict[str, Callable[[ModuleType], None]] = {
    "torch._dynamo.variables.builder": _let_dynamo_trace,
    "torch.utils.flop_counter": _count_flops,
    "torch.ao.quantization.quantization_mappings": _quantise_dynamically,
    "torch.ao.quantization.quantize": _quantise_by_module,
    "torch.ao.quantization.quantize_fx": _quantise_a_graph,
    "thop.profile": lambda profile: _enter_types(profile.register_hooks),
    "ptflops.pytorch_ops": lambda ops: _enter_types(ops.MODULES_MAPPING),
    "ptflops.aten_ops": _count_aten,
    "fvcore.nn.flop_count": _count_traced,
    "opacus.validators": _make_private,
}

sys.meta_path.insert(0, _Finder())
register()
