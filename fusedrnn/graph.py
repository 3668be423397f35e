"""What a cell computes, as a graph of pointwise operations: traced from its function, in two parts for both ways.

The function of a definition (fusedrnn.definition) is run once by torch on tensors without data; torch gives its
gradient too. What comes out are aten operations. Here they become values of a small set of operations
(``OPERATIONS``), equal ones the same object, from which fusedrnn.printing writes C++, Triton and torch.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# name -> (arguments, whether the result is a truth value)
OPERATIONS = {
    **dict.fromkeys(("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "sigmoid", "tanh", "relu"), (1, False)),
    **dict.fromkeys(("sin", "cos", "erf", "floor", "ceil"), (1, False)),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), (2, False)),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "and", "or"), (2, True)),
    "not": (1, True),
    "where": (3, False),
}


class Value:
    """A leaf (``op`` is "acc", "prev", "parameter", "input" or "d", ``args`` its index; while tracing "x" or "u") or an
    operation on other values and numbers.
    """

    __slots__ = ("args", "boolean", "name", "op", "serial")

    def __init__(self, op: str, args: tuple, serial: int) -> None:
        self.op, self.args, self.name, self.serial = op, args, "", serial
        self.boolean = op in OPERATIONS and OPERATIONS[op][1]

    @property
    def leaf(self) -> bool:
        return self.op not in OPERATIONS

    def values(self) -> list["Value"]:
        return [] if self.leaf else [a for a in self.args if isinstance(a, Value)]


Operand = Value | float | bool


class Graph:
    """Makes values; equal ones are one, and what changes no bit of a finite number is left out."""

    def __init__(self) -> None:
        self._made: dict = {}

    def leaf(self, kind: str, index: int) -> Value:
        return self._make(kind, (index,))

    def _make(self, op: str, args: tuple) -> Value:
        # 1 and 1.0 and True are equal, and so would be 0.0 and -0.0.
        key = (op, *((id(a) if isinstance(a, Value) else repr(a)) for a in args))
        return self._made.setdefault(key, Value(op, args, len(self._made)))

    def __call__(self, op: str, *args: Operand) -> Operand:
        if all(not isinstance(a, Value) for a in args):
            return _of_numbers(op, args)
        a, b = args[0], args[1] if len(args) > 1 else None
        if op == "add":
            if _is(a, 0) or _is(b, 0):
                return b if _is(a, 0) else a
            if _op(b) == "neg":
                return self("sub", a, b.args[0])
            if _op(a) == "neg":
                return self("sub", b, a.args[0])
        elif op == "sub":
            if _is(b, 0):
                return a
            if _is(a, 0):
                return self("neg", b)
            if _op(b) == "neg":
                return self("add", a, b.args[0])
        elif op == "mul":
            for one, other in ((a, b), (b, a)):
                if _is(one, 1):
                    return other
                if _is(one, -1):
                    return self("neg", other)
            if "neg" in (_op(a), _op(b)):
                found = self("mul", *(v.args[0] if _op(v) == "neg" else v for v in args))
                return found if _op(a) == _op(b) else self("neg", found)
        elif op == "div":
            if _is(b, 1):
                return a
            if _op(a) == "neg":
                return self("neg", self("div", a.args[0], b))
        elif (op == "neg" and _op(a) == "neg") or (op == "not" and _op(a) == "not"):
            return a.args[0]
        elif op == "where":
            condition, a, b = args
            if not isinstance(condition, Value):
                return a if condition else b
            if _same(a, b):
                return a
            if _op(condition) == "not":
                return self("where", condition.args[0], b, a)
        elif op in ("and", "or") and not (isinstance(a, Value) and isinstance(b, Value)):
            number, value = (a, b) if isinstance(b, Value) else (b, a)
            return value if bool(number) == (op == "and") else bool(number)
        return self._make(op, args)

    def with_leaves(self, roots: Sequence[Operand], replace: Callable[[Value], Operand | None]) -> list[Operand]:
        """The roots made again with every value for which ``replace`` has one put in its place."""
        done: dict[int, Operand] = {}
        for value in ordered(roots):
            found = replace(value)
            if found is None:
                args = tuple(done[id(a)] if isinstance(a, Value) else a for a in value.args)
                found = value if value.leaf else _instead(value, self(value.op, *args))
            done[id(value)] = found
        return [done[id(r)] if isinstance(r, Value) else r for r in roots]


def _instead(value: Value, found: Operand) -> Operand:
    """``found``, which takes the place of ``value`` in the order of the function too."""
    if isinstance(found, Value) and not found.leaf:
        found.name = found.name or value.name
        found.serial = min(found.serial, value.serial)
    return found


def _is(a, number: float) -> bool:
    return not isinstance(a, (Value, bool)) and a == number


def _same(a: Operand, b: Operand) -> bool:
    return a is b or (not isinstance(a, Value) and not isinstance(b, Value) and repr(a) == repr(b))


def _op(a) -> str:
    return a.op if isinstance(a, Value) else ""


_NUMBERS = {
    "neg": operator.neg, "abs": abs, "exp": math.exp, "expm1": math.expm1, "log": math.log, "log1p": math.log1p,
    "sqrt": math.sqrt, "tanh": math.tanh, "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "relu": lambda a: max(a, 0.0), "sin": math.sin, "cos": math.cos, "erf": math.erf, "floor": math.floor,
    "ceil": math.ceil, "add": operator.add,
    "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "maximum": max, "minimum": min,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": operator.not_,
    "where": lambda c, a, b: a if c else b,
}  # fmt: skip


def _of_numbers(op: str, args: tuple) -> float | bool:
    found = _NUMBERS[op](*args)
    return found if OPERATIONS[op][1] else float(found)


def ordered(roots: Sequence[Operand], stop: Callable[[Value], bool] = lambda value: False) -> list[Value]:
    """Everything that the roots need, each after what it is made of; not past a value for which ``stop`` holds."""
    found: list[Value] = []
    seen: set[int] = set()
    todo = [(r, False) for r in reversed(roots) if isinstance(r, Value)]
    while todo:
        value, made = todo.pop()
        if made:
            found.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            todo.append((value, True))
            if not stop(value):
                todo.extend((a, False) for a in reversed(value.values()) if id(a) not in seen)
    return found


# --- from aten ---


def _power(g: Graph, base: Operand, exponent: Operand) -> Operand:
    if isinstance(exponent, Value):
        if isinstance(base, Value) or base <= 0:
            raise _NoPrinter("aten.pow, of a tensor to the power of a tensor,")
        return g("exp", g("mul", exponent, math.log(base)))
    if exponent < 0:
        return g("div", 1.0, _power(g, base, -exponent))
    if exponent == 0.5:
        return g("sqrt", base)
    if exponent != int(exponent) or exponent > 16:
        raise _NoPrinter(f"aten.pow with the exponent {exponent}")
    result: Operand = 1.0
    for _ in range(int(exponent)):
        result = g("mul", result, base)
    return result


def _clamp(g: Graph, a: Operand, low: Operand | None = None, high: Operand | None = None) -> Operand:
    a = a if low is None else g("maximum", a, low)
    return a if high is None else g("minimum", a, high)


def _elu(g: Graph, a: Operand, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Operand:
    below = g("mul", g("expm1", g("mul", a, float(input_scale))), float(alpha * scale))
    return g("where", g("gt", a, 0.0), g("mul", a, float(scale)), below)


def _gelu(g: Graph, a: Operand, approximate: str = "none") -> Operand:
    if approximate == "none":
        return g("mul", g("mul", a, 0.5), g("add", g("erf", g("mul", a, math.sqrt(0.5))), 1.0))
    inner = g("add", a, g("mul", g("mul", g("mul", a, a), a), 0.044715))
    return g("mul", g("mul", a, 0.5), g("add", g("tanh", g("mul", inner, math.sqrt(2 / math.pi))), 1.0))


def _add(sign: str):
    return lambda g, a, b, alpha=1: g(sign, a, g("mul", b, float(alpha)))


def _plain(op: str):
    return lambda g, *args: g(op, *args)


def _div(g: Graph, a: Operand, b: Operand, rounding_mode: str | None = None) -> Operand:
    quotient = g("div", a, b)
    if rounding_mode == "trunc":
        raise _NoPrinter("aten.div with rounding_mode='trunc'")
    return quotient if rounding_mode is None else g("floor", quotient)


def _sign(g: Graph, a: Operand) -> Operand:
    # Of NaN torch's is 0 on the CPU.
    return g("where", g("gt", a, 0.0), 1.0, g("where", g("lt", a, 0.0), -1.0, 0.0))


# aten's name -> what it is in OPERATIONS; arguments as aten's, the graph first.
ATEN: dict[str, Callable] = {
    **{name: _plain(name) for name in OPERATIONS if name not in ("and", "or", "not", "add", "sub", "div")},
    "add": _add("add"),
    "sub": _add("sub"),
    "rsub": lambda g, a, b, alpha=1: g("sub", b, g("mul", a, float(alpha))),
    "div": _div,
    "logical_and": _plain("and"),
    "logical_or": _plain("or"),
    "logical_not": _plain("not"),
    "bitwise_and": _plain("and"),
    "bitwise_or": _plain("or"),
    "bitwise_not": _plain("not"),
    "isnan": lambda g, a: g("ne", a, a),
    "isinf": lambda g, a: g("eq", g("abs", a), math.inf),
    "reciprocal": lambda g, a: g("div", 1.0, a),
    "rsqrt": lambda g, a: g("div", 1.0, g("sqrt", a)),
    "square": lambda g, a: g("mul", a, a),
    "log2": lambda g, a: g("div", g("log", a), math.log(2)),
    "exp2": lambda g, a: g("exp", g("mul", a, math.log(2))),
    "sign": _sign,
    "clamp": _clamp,
    "clamp_min": lambda g, a, low: _clamp(g, a, low),
    "clamp_max": lambda g, a, high: _clamp(g, a, None, high),
    "hardtanh": lambda g, a, low=-1.0, high=1.0: _clamp(g, a, float(low), float(high)),
    "leaky_relu": lambda g, a, slope=0.01: g("where", g("gt", a, 0.0), a, g("mul", a, float(slope))),
    "elu": _elu,
    "gelu": _gelu,
    "pow": _power,
    # Only the value is left of a tensor that is filled with one, and nothing of a copy.
    "full": lambda g, size, value, **_: _number(value),
    "full_like": lambda g, a, value, **_: _number(value),
    "scalar_tensor": lambda g, value, **_: _number(value),
    # Of such memory every number is written before it is read.
    **dict.fromkeys(("empty", "empty_like", "empty_permuted"), lambda g, *_, **__: math.nan),
    "zeros_like": lambda g, a, **_: 0.0,
    "ones_like": lambda g, a, **_: 1.0,
    "copy": lambda g, a, b, **_: b,
    **dict.fromkeys(("alias", "detach", "clone", "lift_fresh_copy", "expand", "view"), lambda g, a, *_, **__: a),
}
# Those that take truth values as such.
_OF_TRUTH = {
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "where", "copy"),
    *("alias", "detach", "clone", "lift_fresh_copy", "expand", "view", "full_like", "zeros_like", "ones_like"),
}


def _number(value) -> float | bool:
    return value if isinstance(value, bool) else float(value)


class _NoPrinter(Exception):
    pass


class CellError(RuntimeError):
    """A function that cannot become a cell; the message names the operation or the rule."""


def imported(module: torch.fx.GraphModule, leaves: Sequence[Operand], graph: Graph, shape: tuple, cell: str):
    """What a traced module returns, its tensors as values of ``graph``; ``leaves`` stand for its arguments."""
    found: dict[torch.fx.Node, Operand] = {}
    given = iter(leaves)

    def operand(argument):
        if isinstance(argument, torch.fx.Node):
            return found[argument]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        return argument

    for node in module.graph.nodes:
        if node.op == "placeholder":
            found[node] = next(given)
        elif node.op == "get_attr":
            constant = getattr(module, node.target)
            if constant.numel() != 1:
                raise CellError(
                    f"the cell {cell} uses a tensor of shape {list(constant.shape)} that is none of its arguments: "
                    "name it in parameters=(...) or inputs=(...)"
                )
            found[node] = _number(constant.item())
        elif node.op == "call_function":
            found[node] = _of_node(node, operand, graph, shape, cell)
        elif node.op == "output":
            return torch.utils._pytree.tree_map_only(torch.fx.Node, operand, node.args[0])
    raise AssertionError("a traced module has an output")


def _of_node(node: torch.fx.Node, operand: Callable, graph: Graph, shape: tuple, cell: str) -> Operand:
    name = str(node.target).removesuffix(".default")
    if not isinstance(node.target, torch._ops.OpOverload) or not name.startswith("aten."):
        raise CellError(f"the cell {cell} uses {name}, for which there is no printer")
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and tuple(value.shape) not in (shape, ()):
        raise CellError(f"the cell {cell} uses {name}, which is not pointwise: there is no printer for it")
    short = name.split(".")[1]
    if short == "_to_copy":
        (argument,) = [operand(a) for a in node.args]
        dtype = node.kwargs.get("dtype")
        if isinstance(argument, Value) and argument.boolean and dtype is not None and dtype.is_floating_point:
            return graph("where", argument, 1.0, 0.0)
        if not isinstance(argument, Value) or dtype in (None, torch.float64):
            return argument
        raise CellError(f"the cell {cell} converts to {dtype}: there is no printer for it, a cell has one dtype")
    if short not in ATEN:
        raise CellError(f"the cell {cell} uses {name}, for which there is no printer")
    args = [operand(a) for a in node.args]
    if short == "mul" and all(isinstance(a, Value) and a.boolean for a in args):
        short = "logical_and"
    if short not in _OF_TRUTH:
        # A truth value in arithmetic is 0 or 1.
        args = [graph("where", a, 1.0, 0.0) if isinstance(a, Value) and a.boolean else a for a in args]
    elif short.startswith("logical"):
        args = [graph("ne", a, 0.0) if isinstance(a, Value) and not a.boolean else a for a in args]
    try:
        return ATEN[short](graph, *args, **{k: operand(v) for k, v in node.kwargs.items()})
    except _NoPrinter as error:
        raise CellError(f"the cell {cell} uses {error} for which there is no printer") from None
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise CellError(f"the cell {cell} uses {name} on numbers: {error}") from None


# --- what a cell is made of ---


@dataclass(frozen=True)
class Traced:
    """A cell's forward and backward as values, and what backward keeps."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    accumulators: tuple[str, ...]
    x_acc: tuple[int, ...]
    h_acc: tuple[int, ...]
    next: tuple[Operand, ...]
    saved: tuple[Value, ...]
    saved_names: tuple[str, ...]
    dacc: tuple[Operand, ...]
    dprev: tuple[Operand, ...]
    dparameters: tuple[Operand, ...]
    dinputs: tuple[Operand, ...]
    output: Operand | None  # the first state from saved and the other new states alone; None where that cannot be
    uses_h: bool  # backward reads the new h
    uses_h_prev: bool  # forward or backward reads h beyond the matmul
    direct: bool  # h before has a gradient past the matmul

    def backward_values(self) -> list[Operand]:
        return [*self.dacc, *self.dprev, *self.dparameters, *self.dinputs]


def trace(
    name: str,
    function: Callable,
    gates: tuple[str, ...],
    states: tuple[str, ...],
    parameters: tuple[str, ...],
    inputs: tuple[str, ...],
) -> Traced:
    """Runs the function of a cell once, on tensors without data, with its gradient.

    ``function`` takes lists of tensors (x, u, states, parameters, inputs) and returns (new states, named tensors).

    Raises:
        CellError: an operation has no printer, or asks for the value of a tensor.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    shape = (2, 3)
    counts = (len(gates), len(gates), len(states), len(parameters), len(inputs))
    kinds = [(k, i) for k, n in zip(("x", "u", "prev", "parameter", "input"), counts) for i in range(n)]
    kinds += [("d", i) for i in range(len(states))]

    def run(*tensors):
        groups, start = [], 0
        for count in counts:
            groups.append(tensors[start : start + count])
            start += count
        news, pullback, named = torch.func.vjp(
            lambda *t: function(*_grouped(t, counts)), *tensors[:start], has_aux=True
        )
        return news, named, pullback(tensors[start:])

    blocks = [torch.ones(shape, dtype=torch.float64) for _ in kinds]
    try:
        module = make_fx(
            torch.func.functionalize(run),
            decomposition_table=torch.export.default_decompositions(),
            tracing_mode="fake",
        )(*blocks)
    except Exception as error:
        if "DataDependent" not in type(error).__name__:
            raise
        raise CellError(
            f"the cell {name} asks for the value of a tensor, and while it is traced they have none: torch.where "
            "chooses between two tensors"
        ) from error
    graph = Graph()
    leaves = [graph.leaf(*kind) for kind in kinds]
    news, named, grads = imported(module, leaves, graph, shape, name)
    for local, value in named.items():
        if isinstance(value, Value) and not value.leaf and not value.name:
            value.name = local
    return _divided(graph, gates, states, parameters, inputs, list(news), list(grads))


def _grouped(tensors: Sequence, counts: Sequence[int]) -> list[Sequence]:
    groups, start = [], 0
    for count in counts:
        groups.append(tensors[start : start + count])
        start += count
    return groups


def _divided(graph: Graph, gates, states, parameters, inputs, news: list[Operand], grads: list[Operand]) -> Traced:
    n = len(gates)
    grads = _factored(graph, grads)
    dx, du, rest = grads[:n], grads[n : 2 * n], grads[2 * n :]
    everything = [*news, *grads]
    summed = _summed(graph, everything)
    # A gate has one accumulator where its two parts come as their sum only, and are differentiated as one.
    left = {(v.op, v.args[0]) for v in ordered(summed) if v.op in ("x", "u")}
    one = [("x", g) not in left and ("u", g) not in left and _same(dx[g], du[g]) for g in range(n)]
    one = [o or (not _reads(everything, ("x", g)) and not _reads(everything, ("u", g))) for g, o in enumerate(one)]
    names, x_acc, h_acc, g = [], [0] * n, [0] * n, 0
    while g < n:
        run = next((k for k in range(g, n) if one[k]), n) - g if not one[g] else 1
        for slots, suffix in ((x_acc, "" if one[g] else "x"), (h_acc, "" if one[g] else "h")):
            for k in range(g, g + run):
                if one[g] and slots is h_acc:
                    slots[k] = x_acc[k]
                    continue
                slots[k] = len(names)
                names.append(gates[k] + suffix)
        g += run

    def placed(value: Value) -> Operand | None:
        if value.op == "x":
            return graph.leaf("acc", x_acc[value.args[0]])
        return graph.leaf("acc", h_acc[value.args[0]]) if value.op == "u" else None

    made = graph.with_leaves(_summed(graph, everything, one), placed)
    news, grads = made[: len(news)], made[len(news) :]
    dacc: list[Operand] = [0.0] * len(names)
    for k in range(n):
        dacc[x_acc[k]], dacc[h_acc[k]] = grads[k], grads[n + k]
    dprev = grads[2 * n : 2 * n + len(states)]
    dparameters = grads[2 * n + len(states) : 2 * n + len(states) + len(parameters)]
    dinputs = grads[len(grads) - len(inputs) :] if inputs else []
    assert len(rest) == len(states) + len(parameters) + len(inputs)
    backward = [*dacc, *dprev, *dparameters, *dinputs]
    kept = _kept(news, backward)
    saved = [v for v in kept if v is not news[0]]
    uses_h = len(kept) > len(saved)
    free = {id(v) for v in [*kept, *news[1:]] if isinstance(v, Value)}
    reads = ordered(backward, lambda v: id(v) in free)
    output = news[0] if _from_saved(news, {id(v) for v in saved}) else None
    return Traced(
        gates, states, parameters, inputs, tuple(names), tuple(x_acc), tuple(h_acc), tuple(news), tuple(saved),
        tuple(_names_of(saved, names, gates)), tuple(dacc), tuple(dprev), tuple(dparameters), tuple(dinputs), output,
        uses_h=uses_h,
        uses_h_prev=any(v.op == "prev" and v.args[0] == 0 for v in [*ordered(news), *reads]),
        direct=isinstance(dprev[0], Value) or dprev[0] != 0,
    )  # fmt: skip


def _reads(roots: Sequence[Operand], leaf: tuple) -> bool:
    return any((v.op, v.args[0]) == leaf for v in ordered(roots) if v.leaf)


def _factored(graph: Graph, grads: Sequence[Operand]) -> list[Operand]:
    """Gradients with d (1 - z) for d - d z, so that an infinite d makes no NaN where z is not 1."""
    done: dict[int, Operand] = {}
    for value in ordered(grads):
        args = value.args if value.leaf else tuple(done[id(a)] if isinstance(a, Value) else a for a in value.args)
        d, product = args if value.op == "sub" else (None, None)
        if isinstance(d, Value) and _op(product) == "mul" and any(a is d for a in product.args) and _of_d(d):
            x, y = product.args
            done[id(value)] = graph("mul", d, graph("sub", 1.0, y if x is d else x))
        else:
            done[id(value)] = value if value.leaf else _instead(value, graph(value.op, *args))
    return [done[id(r)] if isinstance(r, Value) else r for r in grads]


def _of_d(value: Value) -> bool:
    return any(v.op == "d" for v in ordered([value]))


def _summed(graph: Graph, roots: Sequence[Operand], only: Sequence[bool] | None = None) -> list[Operand]:
    """The roots with x.g + u.g, in a sum of any length, as one leaf ("sum", g)."""
    done: dict[int, Operand] = {}
    for value in ordered(roots):
        if value.leaf:
            done[id(value)] = value
            continue
        args = tuple(done[id(a)] if isinstance(a, Value) else a for a in value.args)
        found = graph(value.op, *args)
        if _op(found) == "add":
            terms = _terms(found)
            for g in {v.args[0] for v in terms if _op(v) == "x"}:
                x, u = graph.leaf("x", g), graph.leaf("u", g)
                if terms.count(x) == terms.count(u) == 1 and (only is None or only[g]):
                    place = min(terms.index(x), terms.index(u))
                    terms = [t for t in terms if t is not x and t is not u]
                    terms.insert(place, x if only is not None else graph.leaf("sum", g))
            if len(terms) < len(_terms(found)):
                total = terms[0]
                for term in terms[1:]:
                    total = graph("add", total, term)
                found = total
        done[id(value)] = _instead(value, found)
    return [done[id(r)] if isinstance(r, Value) else r for r in roots]


def _terms(value: Operand) -> list[Operand]:
    return [t for a in value.args for t in _terms(a)] if _op(value) == "add" else [value]


def _kept(news: Sequence[Operand], backward: Sequence[Operand]) -> list[Value]:
    """What forward keeps: the fewest values from which, with the states, parameters and inputs, backward can be
    computed; of several such sets the one nearest to backward, so that activations are kept and not what they are of.

    The new states after the first are kept anyway; the first is there as y and costs reading it: it may be among them.
    A minimal cut between the accumulators and what backward reads.
    """
    depends = {id(v): False for v in ordered(backward)}
    for value in ordered(backward):
        depends[id(value)] = value.op == "d" or any(depends[id(a)] for a in value.values())
    wanted: list[Value] = []
    for value in ordered(backward):
        if depends[id(value)]:
            wanted += [a for a in value.values() if not depends[id(a)]]
    wanted += [r for r in backward if isinstance(r, Value) and not depends[id(r)]]
    forward = ordered([*news, *wanted])
    free = {id(v) for v in news[1:] if isinstance(v, Value)}
    nodes = [v for v in forward if id(v) not in free and not (v.leaf and v.op != "acc")]
    # Only what comes from an accumulator has to be kept.
    bound: set[int] = set()
    for value in nodes:
        if value.op == "acc" or any(id(a) in bound for a in value.values()):
            bound.add(id(value))
    nodes = [v for v in nodes if id(v) in bound]
    index = {id(v): k for k, v in enumerate(nodes)}
    source, sink = 2 * len(nodes), 2 * len(nodes) + 1
    capacity: dict[tuple[int, int], float] = {}
    for k, value in enumerate(nodes):
        cost = math.inf if value.boolean else 1.0 if value is news[0] else 4.0
        capacity[2 * k, 2 * k + 1] = cost
        if value.op == "acc":
            capacity[source, 2 * k] = math.inf
        for a in value.values():
            if id(a) in index:
                capacity[2 * index[id(a)] + 1, 2 * k] = math.inf
    for value in wanted:
        if id(value) in index:
            capacity[2 * index[id(value)] + 1, sink] = math.inf
    reach = _sink_side(capacity, source, sink)
    found = [v for k, v in enumerate(nodes) if 2 * k not in reach and 2 * k + 1 in reach]
    # In the order of the function, what is no activation last.
    return sorted(found, key=lambda v: (v.leaf, v.args[0] if v.leaf else v.serial))


def _sink_side(capacity: dict[tuple[int, int], float], source: int, sink: int) -> set[int]:
    """The nodes that reach the sink when the most that can flow does."""
    residual = dict(capacity)
    after: dict[int, set[int]] = {}
    for a, b in capacity:
        residual.setdefault((b, a), 0.0)
        after.setdefault(a, set()).add(b)
        after.setdefault(b, set()).add(a)
    while True:
        came = {source: source}
        todo = [source]
        while todo and sink not in came:
            a = todo.pop(0)
            for b in sorted(after.get(a, ())):
                if b not in came and residual[a, b] > 0:
                    came[b] = a
                    todo.append(b)
        if sink not in came:
            break
        path, b = [], sink
        while b != source:
            path.append((came[b], b))
            b = came[b]
        flow = min(residual[edge] for edge in path)
        assert flow < math.inf, "every accumulator can be kept"
        for a, b in path:
            residual[a, b] -= flow
            residual[b, a] += flow
    reach, todo = {sink}, [sink]
    while todo:
        b = todo.pop()
        for a in after.get(b, ()):
            if a not in reach and residual[a, b] > 0:
                reach.add(a)
                todo.append(a)
    return reach


def _from_saved(news: Sequence[Operand], saved: set[int]) -> bool:
    """Whether the first state can be made from what is kept and the other states."""
    others = {id(v) for v in news[1:] if isinstance(v, Value)}
    needed = ordered(news[:1], lambda v: id(v) in saved or id(v) in others)
    return all(id(v) in saved or id(v) in others or not v.leaf for v in needed)


def _names_of(saved: Sequence[Value], accumulators: Sequence[str], gates: Sequence[str]) -> list[str]:
    names: list[str] = []
    for k, value in enumerate(saved):
        name = value.name
        if value.op == "acc":
            name = accumulators[value.args[0]]
            # Its gate's name is for what the activation makes of it.
            name = f"a_{name}" if name in gates else name
        names.append(name if name and name not in names else f"s{k}")
    return names
