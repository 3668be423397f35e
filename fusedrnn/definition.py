"""A cell as one Python function: the decorator, and what is known of a cell once its function was traced."""

import collections
import functools
import hashlib
import keyword
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import printed, printing, remembered
from fusedrnn.cells import CELLS, Cell, register
from fusedrnn.graph import CellError, Traced, trace

_lock = threading.RLock()


def cell(
    function: Callable | None = None,
    *,
    gates: Sequence[str],
    states: Sequence[str] = ("h",),
    parameters: Sequence[str] = (),
    inputs: Sequence[str] = (),
    name: str | None = None,
) -> Any:
    """Makes a function the definition of a recurrent cell, for :class:`fusedrnn.Layer`.

    .. code-block:: python

        @fusedrnn.cell(gates=("f", "n"), states=("h",))
        def mgu(x, u, s):
            f = torch.sigmoid(x.f + u.f)
            n = torch.tanh(x.n + f * u.n)
            return s.h + f * (n - s.h)

    The function is one step: ``x.f`` is W_ih x + b_ih of gate f, ``u.f`` is W_hh h + b_hh, ``s.h`` the state before the
    step. It returns the new states in their order (one tensor where there is one state); the first is the output, and
    what W_hh multiplies in the next step. All tensors are of one shape, [B, H], and the function uses pointwise
    operations of torch: it is run on any backend as compiled code, and its gradient is torch's. What has no gradient
    is ``detach()``-ed.

    Args:
        gates: names, in the order of the rows of the weights.
        states: names; the first is the output.
        parameters: names of vectors [H] that belong to the layer; arguments of the function by keyword.
        inputs: names of tensors [T, B, H] given at a call of the layer; arguments of the function by keyword.
        name: of the cell; that of the function if absent.

    Raises:
        ValueError: names that are none, or that come twice.
    """
    if function is None:
        return functools.partial(cell, gates=gates, states=states, parameters=parameters, inputs=inputs, name=name)
    return Definition(function, gates, states, parameters, inputs, name)


class Definition:
    """A cell, as :func:`fusedrnn.cell` makes it. Called, it is its function. ``str`` (and ``print``) says what the
    cell costs: gates, accumulators, what is kept for backward. Nothing is traced before that, or a layer, asks for it.
    """

    def __init__(self, function, gates, states=("h",), parameters=(), inputs=(), name=None) -> None:
        self.function = function
        self.name = function.__name__ if name is None else name
        groups = {"gates": gates, "states": states, "parameters": parameters, "inputs": inputs}
        for group, names in groups.items():
            if isinstance(names, str):
                raise ValueError(f"{group} must be a tuple of names, got the string {names!r}")
            groups[group] = names = tuple(names)
            for word in (self.name, *names):
                if not (isinstance(word, str) and word.isidentifier() and word.isascii()) or keyword.iskeyword(word):
                    raise ValueError(f"{group} must be names as Python's variables have, got {word!r}")
                if word.startswith("_"):
                    raise ValueError(f"{group} must be names that do not begin with _, got {word!r}")
            if len(set(names)) < len(names):
                raise ValueError(f"{group} must be different names, got {', '.join(names)}")
        self.gates, self.states, self.parameters, self.inputs = groups.values()
        for group in ("gates", "states"):
            if not groups[group]:
                raise ValueError(f"a cell has at least one of {group}")
        both = set(self.parameters) & set(self.inputs)
        if both:
            raise ValueError(f"{', '.join(sorted(both))} cannot be both a parameter and an input")
        self._of_gates = collections.namedtuple("gates", self.gates)
        self._of_states = collections.namedtuple("states", self.states)
        self.__doc__ = function.__doc__
        self.__name__, self.__qualname__, self.__module__ = self.name, function.__qualname__, function.__module__

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<fusedrnn.cell {self.name}: gates {' '.join(self.gates)}, states {' '.join(self.states)}>"

    def __reduce__(self):
        # By its name, as a function is: the module that defines it gives the same again.
        return _found, (self.__module__, self.__qualname__)

    def step(self, x, u, states, parameters=(), inputs=()) -> tuple[Tensor, ...]:
        """The function on lists of tensors in the order of the names; the new states.

        Raises:
            TypeError: it does not return a tensor for each state.
        """
        keywords = dict(zip((*self.parameters, *self.inputs), (*parameters, *inputs), strict=True))
        found = self.function(self._of_gates(*x), self._of_gates(*u), self._of_states(*states), **keywords)
        news = (found,) if isinstance(found, Tensor) else found
        news = tuple(news) if isinstance(news, (tuple, list)) else news
        if not isinstance(news, tuple) or not all(isinstance(t, Tensor) for t in news):
            raise TypeError(f"the cell {self.name} must return a tensor for each state, got {type(found).__name__}")
        if len(news) != len(self.states):
            raise TypeError(
                f"the cell {self.name} must return its {len(self.states)} states {', '.join(self.states)}, "
                f"got {len(news)} tensors"
            )
        return news

    @functools.cached_property
    def traced(self) -> Traced:
        """Its operations and those of its gradient.

        Raises:
            RuntimeError: an operation has no printer.
        """
        with _lock:
            about = self.gates, self.states, self.parameters, self.inputs
            key = remembered.key_of(self.function, self.name, *about)
            return remembered.traced(self.name, key, lambda: trace(self.name, self._named_step, *about))

    def _named_step(self, *groups):
        """New states, and the local variables that were tensors when the function returned: they name what it makes."""
        found: dict[str, Tensor] = {}
        code = getattr(self.function, "__code__", None)

        def watch(frame, event, argument):
            if event == "return" and frame.f_code is code:
                found.update({k: v for k, v in frame.f_locals.items() if isinstance(v, Tensor)})

        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            news = self.step(*groups)
        finally:
            sys.setprofile(before)
        shape = groups[0][0].shape
        for state, new in zip(self.states, news):
            if new.shape != shape:
                raise CellError(
                    f"the cell {self.name} must return states of one shape, that of its arguments; "
                    f"{state} has {list(new.shape)} for {list(shape)}"
                )
        # A state that is handed on as it came is a tensor of its own.
        return tuple(t.clone() for t in news), {k: t for k, t in found.items() if t.shape == shape}

    @functools.cached_property
    def cell(self) -> Cell:
        """Its entry in the table of cells, under a name that is of this content alone."""
        with _lock:
            if self.name in printed.CELLS and self.__module__ == "fusedrnn.zoo":
                return CELLS[self.name]
            t = self.traced
            source = printing.plain_torch(t, self.name)
            key = hashlib.sha256(repr((source, t.gates, t.states, t.parameters, t.inputs)).encode()).hexdigest()[:12]
            name = f"{self.name}_{key}"
            if name not in CELLS:
                names = {"torch": torch, "number": printed.number}
                exec(compile(source, f"<cell {name}>", "exec"), names)
                register(
                    Cell(
                        name=name,
                        mode=name,
                        gates=t.gates,
                        accumulators=t.accumulators,
                        x_acc=t.x_acc,
                        h_acc=t.h_acc,
                        saved=t.saved_names,
                        forward=names[f"{self.name}_forward"],
                        backward=names[f"{self.name}_backward"],
                        states=t.states,
                        parameters=t.parameters,
                        inputs=t.inputs,
                        has_direct=t.direct,
                    )
                )
                DEFINITIONS[name] = self
            return CELLS[name]

    def __str__(self) -> str:
        t = self.traced
        kept = len(t.saved_names)
        others = len(t.states) - 1
        lines = [
            f"{self.name}: {_counted(len(t.gates), 'gate')} {' '.join(t.gates)}, "
            f"{_counted(len(t.states), 'state')} {' '.join(t.states)}",
            *(
                f"  {what}: {' '.join(names)}"
                for what, names in (("parameters [H]", t.parameters), ("inputs [T, B, H]", t.inputs))
                if names
            ),
            "step",
            *(f"  {line}" for line in printing.equations(t)),
            f"accumulators: {' '.join(t.accumulators)}",
            "  a gate whose parts of x and h are not only added has two",
            f"kept for backward: {' '.join(t.saved_names) or 'nothing'}"
            + (f", and {' '.join(t.states[1:])} after every step" if others else ""),
            "  bytes of a unit and step: "
            + ", ".join(
                f"{kept * size + others * wide} in {dtype}"
                for dtype, size, wide in (("float32", 4, 4), ("float64", 8, 8), ("bfloat16 and float16", 2, 4))
            ),
            *(["  backward reads the output too"] if t.uses_h else []),
        ]
        return "\n".join(lines)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# Name in the table of cells -> where it comes from.
DEFINITIONS: dict[str, Definition] = {}


def _found(module: str, name: str) -> Definition:
    import importlib

    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
