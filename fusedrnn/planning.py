"""Which backend and algorithm run, and why: pure functions of frozen data, testable without a GPU.

``choose`` decides what may be decided above the op: it sees the cell, sizes that are parameters, dtype and
device, never T or B (a compiled graph must not specialise on them). The algorithm "auto" is resolved below the
op by the backend's own ``plan``, which sees T and B.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fusedrnn import _build, compiled, trials
from fusedrnn.backends import cuda
from fusedrnn.backends.common import MOST_ACCUMULATORS, simulator, simulator_folder
from fusedrnn.cells import BUILT_IN, CELL_OF_MODE, CELLS, kernels_of
from fusedrnn.ops import ALGORITHMS, BACKEND_ALGORITHMS, BACKENDS, DTYPES, INT8, INT8_BACKENDS, no_such_algorithm

ENVIRONMENT_VARIABLE = "FUSEDRNN_BACKEND"
LOST = (
    "Lost is its speed; resets, return_all_states, recompute, record_gates, a length of 0, torch.compile and the "
    "transforms of torch.func run in the reference, a loop of torch's operations"
)
# What backend "cuda" needs for cells of one's own and for several heads, as a name in Machine.unavailable.
DEVICE_CODE = "a compiler of device code"
# What can be asked for: the op's backends, and torch's own op.
NAMES = (*BACKENDS, "torch")


@dataclass(frozen=True)
class Machine:
    """What can run here. ``capability`` is (major, minor) of the CUDA device, None without one.

    ``unavailable`` maps a backend to the reason why it cannot run at all; ``on_cpu`` names the GPU backends
    that accept CPU tensors (the interpreter, the simulator).
    """

    unavailable: tuple[tuple[str, str], ...] = ()
    on_cpu: tuple[str, ...] = ()

    def reason(self, backend: str) -> str | None:
        return dict(self.unavailable).get(backend)


@dataclass(frozen=True)
class Problem:
    """What a choice above the op may depend on. proj_size is 0 without a projection."""

    cell: str
    input_size: int
    hidden_size: int
    proj_size: int
    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] | None = None
    heads: int = 1


@dataclass(frozen=True)
class Choice:
    """A backend ("torch" means torch's own op), an algorithm, the reason in words, and the backend's own plan.

    ``asked``: a backend or algorithm was asked for. ``timed``: it was the fastest on this card, see fusedrnn.tune.
    ``instead``: what runs where torch's op cannot do what is asked, and the kernels are wrong here or none is built.
    """

    backend: str
    algorithm: str
    why: str
    details: object | None = None
    asked: bool = False
    timed: bool = False
    instead: str | None = None


def check_choice(backend: str | None, algorithm: str | None) -> None:
    """Raises ValueError on a name that does not exist."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")


def unsupported(backend: str, problem: Problem, machine: Machine) -> str | None:
    """Why ``backend`` cannot run ``problem`` on ``machine``; None when it can."""
    reason = machine.reason(backend)
    if reason is not None:
        return reason
    if backend == "torch":
        own = problem.cell not in BUILT_IN or problem.heads != 1
        return f"torch has no op for the cell {problem.cell} with heads={problem.heads}" if own else None
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is not one of float32, float64, bfloat16, float16"
    if backend == "reference":
        return None
    if backend not in kernels_of(problem.cell):
        return f"it has no kernels of the cell {problem.cell}"
    if (count := len(CELLS[problem.cell].accumulators)) > MOST_ACCUMULATORS.get(backend, count):
        return f"its kernels have up to {MOST_ACCUMULATORS[backend]} accumulators, the cell {problem.cell} has {count}"
    own = problem.cell not in BUILT_IN or problem.heads != 1
    if backend == "cuda" and own and machine.reason(DEVICE_CODE):
        return f"its kernels of this cell with heads={problem.heads} are compiled first: {machine.reason(DEVICE_CODE)}"
    if backend == "cpu":
        return None if problem.device_type == "cpu" else f"it takes CPU tensors, got {problem.device_type}"
    if problem.device_type == "cpu" and backend in machine.on_cpu:
        return None
    if problem.device_type != "cuda":
        return f"it takes CUDA tensors, got {problem.device_type}"
    if problem.capability is not None and problem.capability < (8, 0):
        major, minor = problem.capability
        return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def decide(problem: Problem, machine: Machine, backend: str | None = None, algorithm: str | None = None) -> Choice:
    """The backend and algorithm for a problem.

    A backend that was asked for and cannot run, or has not the algorithm, raises RuntimeError; an algorithm asked for
    without a backend gives way to "auto" where the backend that runs has no such one, and ``why`` says so.
    """
    check_choice(backend, algorithm)
    algorithm = algorithm or "auto"
    if backend is not None:
        reason = unsupported(backend, problem, machine)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} was asked for but cannot run: {reason}")
        if algorithm not in BACKEND_ALGORITHMS.get(backend, ("auto",)):
            raise RuntimeError(no_such_algorithm(backend, algorithm))
        return Choice(backend, algorithm, f"backend {backend!r} was asked for")
    if problem.device_type == "meta":
        return Choice("reference", algorithm, "meta tensors have no data: only shapes are computed")
    order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(problem.device_type, ())
    reasons = []
    for name in order:
        reason = unsupported(name, problem, machine)
        if reason is None:
            why = f"{name} is the first choice for {problem.device_type} tensors"
            if reasons:
                why = f"{name} runs because " + "; ".join(reasons)
            if algorithm not in BACKEND_ALGORITHMS[name]:
                return Choice(name, "auto", f"{why}; {no_such_algorithm(name, algorithm)}")
            return Choice(name, algorithm, why)
        reasons.append(f"{name} cannot: {reason}")
    if not order:
        reasons.append(f"fusedrnn has no kernel for device {problem.device_type!r}")
    if problem.cell not in BUILT_IN or problem.heads != 1:
        return Choice("reference", "auto", "the reference runs: " + "; ".join(reasons))
    why, instead = "torch's own op runs: " + "; ".join(reasons), None
    if problem.device_type == "cpu" and unsupported("reference", problem, machine) is None:
        why, instead = f"{why}. {LOST}", "reference"
    if algorithm != "auto":
        why = f"{why}; {no_such_algorithm('torch', algorithm)}"
    return Choice("torch", "auto", why, instead=instead)


@functools.cache
def machine() -> Machine:
    """This process's machine. Looks at what is built and installed, starts nothing."""
    unavailable = []
    on_cpu = []
    if not _build.loaded():
        unavailable.append(("cpu", _build.why_not_loaded()))
    simulate = simulator_folder() is not None
    if importlib.util.find_spec("triton") is None:
        unavailable.append(("triton", "the package triton is not installed"))
    elif simulate or os.environ.get("TRITON_INTERPRET") == "1":
        on_cpu.append("triton")
    if simulate and simulator(".build").cuda_home() is None:
        unavailable.append(("cuda", "no nvcc was found that could compile the kernels for the simulator"))
    elif simulate:
        on_cpu.append("cuda")
    elif why := cuda.missing():
        unavailable.append(("cuda", why))
    if "cuda" not in dict(unavailable) and (why := compiled.why_no_device_code()):
        unavailable.append((DEVICE_CODE, why))
    return Machine(tuple(unavailable), tuple(on_cpu))


@_build.constant_when_compiled
def may_run(backend: str, device: torch.device) -> bool:
    """Whether a backend has not been found unable to run at all."""
    return machine_with(device).reason(backend) is None


def machine_with(device: torch.device) -> Machine:
    """``machine()``, and why the kernels do not run on a CUDA device: its driver is asked."""
    found = machine()
    if device.type != "cuda" or found.reason("cuda") or not (why := cuda.why_not(device.index)):
        return found
    return replace(found, unavailable=(*found.unavailable, ("cuda", why)))


@functools.cache
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index)


def parse(setting: str) -> tuple[str | None, str | None]:
    """Backend and algorithm of a setting such as "triton:step"; None for what it leaves out. Raises ValueError."""
    name, _, algorithm = setting.partition(":")
    check_choice(name or None, algorithm or None)
    return name or None, algorithm or None


# (thread, backend, algorithm) of every open block, oldest first. A plain list, because Dynamo has to guard on it.
_forced: list[tuple[int, str | None, str | None]] = []


class backend(contextlib.ContextDecorator):
    """Forces a backend, and optionally an algorithm, for every fusedrnn layer called inside ``with`` in this thread.

    Backward uses what forward used, wherever it is called. Outside of ``with`` it does nothing, and warns.
    Order of precedence: the innermost ``with fusedrnn.backend``, the module's own argument, the environment
    variable FUSEDRNN_BACKEND ("triton" or "triton:step"), planning.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "torch" (torch's own op); None leaves the choice to planning.
        algorithm: "auto"; of triton "step" or "sequence", of cuda "step" or "persistent", of cpu "persistent".

    Raises:
        ValueError: there is no such backend or algorithm.
    """

    def __init__(self, name: str | None, algorithm: str | None = None):
        self._used = True  # nothing to warn of if the check raises
        check_choice(name, algorithm)
        self._choice, self._entered, self._used = (name, algorithm), [], False

    def __call__(self, function: Callable) -> Callable:
        self._used = True
        return super().__call__(function)

    def __enter__(self) -> None:
        self._used = True
        entry = (threading.get_ident(), *self._choice)
        self._entered.append(entry)
        _forced.append(entry)

    def __exit__(self, *exception) -> None:
        mine = threading.get_ident()
        # Other threads may have entered since: the last equal entry is this block's own or as good.
        entry = self._entered.pop(next(k for k in reversed(range(len(self._entered))) if self._entered[k][0] == mine))
        del _forced[len(_forced) - 1 - _forced[::-1].index(entry)]

    def __del__(self) -> None:
        if not getattr(self, "_used", True) and not sys.is_finalizing():
            name = ", ".join(repr(part) for part in self._choice if part is not None)
            warnings.warn(
                f"fusedrnn.backend({name}) did nothing: write `with fusedrnn.backend({name}):` around the calls",
                RuntimeWarning,
                stacklevel=2,
            )


_told: set[str] = set()


def _tell_once(message: str) -> None:
    """Warns at the line that called into this package and into torch."""
    if message in _told:
        return
    _told.add(message)
    inner = tuple(str(Path(module.__file__).parent) for module in (_build, torch))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


@_build.constant_when_compiled
def _innermost(blocks: tuple, backend: str | None, algorithm: str | None) -> tuple[str | None, str | None]:
    """What this thread's innermost block forces; what the module asks for when there is none."""
    mine = [entry[1:] for entry in blocks if entry[0] == threading.get_ident()]
    return mine[-1] if mine and mine[-1] != (None, None) else (backend, algorithm)


def asked_for() -> tuple[str | None, str | None]:
    """The backend and algorithm that this thread's innermost block or the environment forces. Raises ValueError."""
    asked = _innermost(tuple(_forced), None, None)
    return asked if asked != (None, None) else parse(os.environ.get(ENVIRONMENT_VARIABLE, ""))


def choose(
    cell: str,
    *,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    algorithm: str | None = None,
    try_out: bool = True,
    heads: int = 1,
) -> Choice:
    """The choice for this machine, with all overrides applied. Warns once when torch's own op has to run.

    On a GPU kernels are checked before their first call, if ``try_out``; wrong ones give way to torch's own op. The
    algorithm INT8 stays whatever is forced, and the reference runs it where the chosen backend has none.
    """
    rounds = algorithm == INT8
    if rounds:
        algorithm = None
    if _forced:
        backend, algorithm = _innermost(tuple(_forced), backend, algorithm)
    setting = "" if backend or algorithm else os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not torch.compiler.is_compiling():
        # Sizes of weights, which a trace with symbols fixes.
        input_size, hidden_size, proj_size = int(input_size), int(hidden_size), int(proj_size)
    key = cell, input_size, hidden_size, proj_size, dtype, device, backend, algorithm, setting, heads
    return _choose(try_out, rounds, *key)


@_build.constant_when_compiled
def _choose(try_out: bool, rounds: bool, *key) -> Choice:
    # Dynamo looks through functools.cache, so the constant it may keep is this function's.
    choice = _cached_choice(kernels_of(key[0]), *key)
    if rounds:
        runs = choice.backend if choice.backend in INT8_BACKENDS else "reference"
        return Choice(runs, INT8, f"{choice.why}; {runs} rounds x and h to 8 bits", asked=True)
    cell, _, _, _, dtype, device, backend, _, setting, _ = key
    # A cell of one's own has no op of torch to be compared with.
    if choice.backend not in trials.ON_GPU or cell not in BUILT_IN or not trials.applies(device):
        return choice
    why = trials.why_wrong(cell, dtype, choice.backend, choice.algorithm, device, try_out)
    if not why:
        return choice
    line = f"{cell} {why} [{'; '.join(trials.about(device))}]"
    if backend or parse(setting)[0]:
        raise RuntimeError(f"backend {choice.backend!r} was asked for but is wrong on this card: {line}")
    said = f"the kernels are wrong on this card, torch's own op runs. Please report this line: {line}"
    _tell_once(f"fusedrnn: {said}")
    return Choice("torch", "auto", said, instead="reference")


@functools.cache
def _cached_choice(
    _kernels, cell, input_size, hidden_size, proj_size, dtype, device, backend, algorithm, setting, heads
) -> Choice:
    if setting:
        backend, algorithm = parse(setting)
    problem = Problem(
        cell,
        input_size,
        hidden_size,
        proj_size,
        dtype,
        device.type,
        _capability(device.index) if device.type == "cuda" and torch.version.cuda else None,
        heads,
    )
    choice = decide(problem, machine_with(device), backend, algorithm)
    if backend is None and (choice.backend == "torch" or (algorithm or "auto") != choice.algorithm):
        _tell_once(f"fusedrnn: {choice.why}")
    return replace(choice, asked=backend is not None or algorithm is not None)


def recurrent_layer(layer: object, caller: str) -> torch.nn.Module:
    """``layer``, if it is one of ours. Raises TypeError, which says what to pass instead."""
    from fusedrnn import modules

    ours = (modules.RecurrentLayer, modules.RecurrentCell)
    if isinstance(layer, ours):
        return layer
    got = type(layer).__name__
    if isinstance(layer, torch.nn.RNNBase | torch.nn.RNNCellBase):
        hint = f"torch.nn's {got}: call fusedrnn.convert on it first"
    elif isinstance(layer, torch.nn.Module):
        inner = [path for path, module in layer.named_modules() if isinstance(module, ours)]
        hint = (
            f"{got}: pass one of the layers that it holds, {', '.join(inner[:3])}" if inner else f"{got}, which is none"
        )
    else:
        hint = got
    raise TypeError(f"{caller} takes a recurrent layer or cell of fusedrnn, got {hint}")


def plan(layer: torch.nn.Module, batch: int, *, steps: int | None = None, backward: bool = False) -> Choice:
    """What a fusedrnn layer runs for a batch of that size, and why; computes nothing.

    Args:
        layer: a layer or cell of fusedrnn; its first layer is planned, on the device of its parameters: one direction,
            or both where they are one launch (under transforms of torch.func, and in gradients that are to be
            differentiated, they are two).
        batch: the batch size B.
        steps: the length T; where it is given, what fusedrnn.tune found for it counts, and that few steps take `step`
            and, on the CPU, read weights where they lie. Without it a long sequence is planned.
        backward: plan the gradient instead.

    Returns:
        The choice with the algorithm settled; ``why`` says in words what led to it, ``details`` is the backend's own
        plan (grid, tiles, shared memory in bytes), None where a backend has nothing to plan.

    Raises:
        TypeError: ``layer`` is none of fusedrnn's, or ``batch`` no integer.
        ValueError: ``batch`` is less than 1.
        RuntimeError: a backend that was asked for cannot run.
    """
    layer = recurrent_layer(layer, "plan")
    if isinstance(batch, bool) or not isinstance(batch, int | torch.SymInt):
        raise TypeError(f"batch must be an int, got {type(batch).__name__}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    weight = layer._weights()[1]
    proj_size, heads = getattr(layer, "proj_size", 0), getattr(layer, "heads", 1)
    if hasattr(layer, "cell"):  # a Layer, whose cell is compiled by that
        cell, choice = layer.cell.cell, layer._choose(weight.dtype, weight.device)
    else:
        cell = CELL_OF_MODE[layer.mode]
        choice = choose(
            cell.name,
            input_size=layer.input_size,
            hidden_size=layer.hidden_size,
            proj_size=proj_size,
            dtype=weight.dtype,
            device=weight.device,
            backend=layer.backend,
            algorithm=layer._asked,
            try_out=False,
        )
    on_card = choice.backend in trials.ON_GPU and trials.applies(weight.device) and not choice.asked
    if on_card and steps is not None and isinstance(layer, torch.nn.RNNBase):
        out = proj_size or layer.hidden_size
        sizes = (steps, batch, layer.input_size, layer.hidden_size, out, layer.num_layers, layer.bidirectional)
        options = (False, False, False, layer.recompute)
        key = trials.tuned_key(weight.device, cell.name, weight.dtype, *sizes, options, backward)
        choice = trials.known_choice(key, choice)
    if on_card and not choice.timed:
        choice = replace(choice, why=f"{choice.why}; a model's choice, not timed on this card (fusedrnn.tune does)")
    if choice.backend == "cpu":
        return _on_cpu(choice, layer, cell, batch, weight, steps, backward)
    if choice.backend not in ("triton", "cuda"):
        return choice
    if isinstance(layer, torch.nn.RNNCellBase) and choice.algorithm == "auto":
        choice = replace(choice, algorithm="step")
    directions, alone = {}, ""
    if choice.backend == "cuda" and getattr(layer, "bidirectional", False):
        if len(cell.states) > 2 or cell.parameters or cell.inputs or heads != 1:
            alone = f"; one direction after the other: {cell.name} with heads={heads}"
        elif layer.recompute:
            alone = "; one direction after the other: recompute"
        else:
            directions = {"directions": 2}
    details = importlib.import_module(f"fusedrnn.backends.{choice.backend}").plan_for(
        cell,
        batch,
        layer.input_size,
        layer.hidden_size,
        proj_size,
        weight.dtype,
        weight.device,
        choice.algorithm,
        backward,
        steps,
        heads,
        **directions,
    )
    why = f"{choice.why}; {details.why}{alone if details.algorithm == 'persistent' else ''}"
    return replace(choice, algorithm=details.algorithm, why=why, details=details)


def _on_cpu(choice: Choice, layer, cell, batch: int, weight: torch.Tensor, steps: int | None, backward: bool) -> Choice:
    packed, many = "_packed" in layer.__dict__, isinstance(layer, torch.nn.RNNBase)
    quantized = layer._quantized if packed else None
    widened = quantized is not None and not backward and layer._widens(batch)
    details = importlib.import_module("fusedrnn.backends.cpu").plan_for(
        cell,
        batch,
        layer.input_size,
        layer.hidden_size,
        getattr(layer, "proj_size", 0),
        weight.dtype,
        backward=backward,
        steps=1 if isinstance(layer, torch.nn.RNNCellBase) else steps,
        kept=packed and (many or layer._activations is not None),
        quantized=None if widened else quantized,
        activations=layer._activations if packed else None,
        heads=getattr(layer, "heads", 1),
        directions=1 + getattr(layer, "bidirectional", False),
        layers=getattr(layer, "num_layers", 1),
    )
    why = f"{choice.why}; {details.why}"
    if widened:
        why = f"{why}; weights of {str(quantized).removeprefix('torch.')} in float32, which is faster at this size"
    return replace(choice, algorithm=details.algorithm, why=why, details=details)
