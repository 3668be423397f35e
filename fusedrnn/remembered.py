"""What was traced of a cell, kept on disk: to trace again takes seconds, most of them torch's imports.

A trace is taken from the cache for a function of the same code, constants, and what it refers to outside of itself.
Where some of that is not known by its content (a tensor, an object of a class), nothing is kept.
"""

import builtins
import hashlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from fusedrnn import graph
from fusedrnn.graph import Operand, Traced, Value, ordered

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype)
_VALUES = ("next", "saved", "dacc", "dprev", "dparameters", "dinputs", "output")


class _UnknownError(Exception):
    pass


def key_of(function: Callable, *facts) -> str:
    """What a trace of the function depends on; empty where that is not known."""
    try:
        parts = _content(function, [])
    except _UnknownError:
        return ""
    here = hashlib.sha256(Path(graph.__file__).read_bytes()).hexdigest()
    return repr((parts, facts, torch.__version__, sys.version_info[:3], here))


def _content(value, above: list) -> object:
    if any(value is one for one in above):
        return "again", next(k for k, one in enumerate(above) if one is value)
    above = [*above, value]
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [_content(v, above) for v in value]
    if isinstance(value, frozenset):
        return "frozenset", sorted(map(repr, (_content(v, above) for v in value)))
    if isinstance(value, types.CodeType):
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        counts = value.co_argcount, value.co_kwonlyargcount, value.co_posonlyargcount, value.co_flags
        return value.co_code.hex(), names, counts, [_content(c, above) for c in value.co_consts]
    of_library = _library(value)
    if of_library:
        return of_library
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        outside = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        missing = [n for n in _names(value.__code__) if n not in outside and n in vars(builtins)]
        parts = [value.__code__, value.__defaults__, *(value.__kwdefaults__ or {}).values(), *cells, *outside.values()]
        return [*map(str, outside), *missing, *(value.__kwdefaults__ or {})], [_content(p, above) for p in parts]
    raise _UnknownError


def _library(value) -> tuple[str, ...]:
    """The name of what belongs to torch, Python's mathematics or its built-in functions."""
    if isinstance(value, types.ModuleType):
        where, what = value.__name__, ""
    else:
        where = getattr(value, "__module__", None) or ""
        what = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        if not callable(value) or not what or "<locals>" in what:
            return ()
    root = where.split(".")[0]
    return ("library", where, what) if root in ("torch", "math", "builtins", "operator") else ()


def _names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return sorted({*code.co_names, *(name for c in inner for name in _names(c))})


def traced(name: str, key: str, make: Callable[[], Traced]) -> Traced:
    """The trace of that key from the cache, made where it is not there."""
    from fusedrnn import compiled

    if not key:
        return make()
    made: list[Traced] = []

    def write(path: Path) -> None:
        made.append(make())
        path.write_text(dumps(made[0]))

    try:
        path = compiled.kept(f"trace-{name}", ".json", key, write)
        return made[0] if made else loads(path.read_text())
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        if made:
            return made[0]
    return make()


def dumps(traced: Traced) -> str:
    groups = {f.name: getattr(traced, f.name) for f in fields(Traced)}
    roots = [v for name in _VALUES for v in (groups[name] if name != "output" else [groups[name]])]
    values = ordered([v for v in roots if isinstance(v, Value)])
    place = {id(v): k for k, v in enumerate(values)}

    def operand(v: Operand | None):
        return {"v": place[id(v)]} if isinstance(v, Value) else None if v is None else repr(v)

    lines = [[v.op, list(v.args) if v.leaf else [operand(a) for a in v.args], v.name, v.serial] for v in values]
    for name in _VALUES:
        groups[name] = operand(groups[name]) if name == "output" else [operand(v) for v in groups[name]]
    return json.dumps({"values": lines, **groups})


def loads(text: str) -> Traced:
    groups = json.loads(text)
    values: list[Value] = []

    def operand(v) -> Operand | None:
        if isinstance(v, dict):
            return values[v["v"]]
        if v is None or v in ("True", "False"):
            return None if v is None else v == "True"
        return float(v)

    for op, args, name, serial in groups.pop("values"):
        leaf = op not in graph.OPERATIONS
        value = Value(op, tuple(args) if leaf else tuple(operand(a) for a in args), serial)
        value.name = name
        values.append(value)
    for name in _VALUES:
        groups[name] = operand(groups[name]) if name == "output" else [operand(v) for v in groups[name]]
    return Traced(**{name: tuple(v) if isinstance(v, list) else v for name, v in groups.items()})
