"""Source of a traced cell (fusedrnn.graph): a C++ struct as csrc/cells.h wants it, functions of Triton and of torch.

All three compute the same operations in the same grouping. `make cells` prints the cells that the package brings along
(``write_printed``).
"""

import keyword
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from fusedrnn.graph import Operand, Traced, Value, ordered

_COMPARISON, _SUM, _PRODUCT, _UNARY, _ATOM = 1, 2, 3, 4, 5
_DEEPEST = 12
_INFIX = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT)}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class Language:
    """How values are written; this base writes calls of functions with the names of the operations."""

    reserved: frozenset[str] = frozenset()
    indent = ""
    prefix = ""  # of every name

    def number(self, value: float | bool, like: str) -> str:
        return repr(value)

    def leaf(self, kind: str, index: int) -> str:
        plural = {"parameter": "parameters", "input": "inputs"}.get(kind, kind)
        return f"{self.prefix}{plural}[{index}]"

    def call(self, op: str, args: list[str], value: Value) -> str:
        return f"{op}({', '.join(args)})"

    def truth(self, op: str, args: list[str]) -> str:
        return f"!{args[0]}" if op == "not" else f"{args[0]} {'&' if op == 'and' else '|'} {args[1]}"

    def assign(self, name: str, text: str, value: Value) -> str:
        return f"{name} = {text}"


class Cpp(Language):
    indent = "    "
    reserved = frozenset(
        (
            "acc prev parameters inputs next saved d dacc dprev dparameters dinputs T auto bool break case catch char "
            "class const continue default delete do double else enum explicit export extern false float for friend "
            "goto if inline int long mutable namespace new not and or xor operator private protected public register "
            "return short signed sizeof static struct switch template this throw true try typedef typeid typename "
            "union unsigned using virtual void volatile while neg abs exp expm1 log log1p sqrt sigmoid tanh relu sin "
            "cos erf floor ceil maximum minimum at_least at_most where forward backward output x_acc h_acc "
        ).split()
    )

    def number(self, value, like):
        if isinstance(value, bool):
            return "true" if value else "false"
        if math.isnan(value):
            return "T(FUSEDRNN_NAN)"
        if math.isinf(value):
            return "T(FUSEDRNN_INFINITY)" if value > 0 else "T(-FUSEDRNN_INFINITY)"
        text = repr(value)
        exact = abs(value) < 2.0**24 and value * 2.0**10 == int(value * 2.0**10)
        return f"T({text}f)" if exact else f"T({text})"

    def call(self, op, args, value):
        # A NaN passes both; the limit is no NaN.
        for name, limited in (("maximum", "at_least"), ("minimum", "at_most")):
            if op == name:
                for number, other in ((0, 1), (1, 0)):
                    if not isinstance(value.args[number], Value):
                        return f"{limited}({args[number]}, {args[other]})"
        return super().call(op, args, value)

    def assign(self, name, text, value):
        return f"const {'auto' if value.boolean else 'T'} {name} = {text};"


class Triton(Language):
    indent = "    "
    prefix = "b_"
    reserved = frozenset("b_acc b_prev b_parameters b_inputs b_next b_saved b_d".split())

    def number(self, value, like):
        return _python_number(value)

    def call(self, op, args, value):
        # A number beside a block takes its dtype in arithmetic, but in these it is float32.
        if op in ("maximum", "minimum"):
            args = [a if _is_float32(v) else f"number({a}, LIKE)" for a, v in zip(args, value.args)]
            return f"tl.{op}({', '.join(args)}, propagate_nan=tl.PropagateNan.ALL)"
        if op == "where":
            return f"tl.where({', '.join(_filled(args, value, [_is_float32(v) for v in value.args[1:]]))})"
        if op in ("exp", "log", "sqrt", "abs", "sin", "cos", "erf", "floor", "ceil"):
            return f"tl.{op}({', '.join(args)})"
        return super().call(op, args, value)

    def truth(self, op, args):
        return f"{args[0]} == 0" if op == "not" else super().truth(op, args)


class Torch(Language):
    indent = "    "
    reserved = frozenset("acc prev parameters inputs next saved d torch inf nan".split())

    def number(self, value, like):
        return _python_number(value)

    def call(self, op, args, value):
        if op in ("maximum", "minimum"):
            for number, other in ((0, 1), (1, 0)):
                if not isinstance(value.args[number], Value):
                    return f"torch.clamp({args[other]}, {'min' if op == 'maximum' else 'max'}={args[number]})"
            return f"torch.{op}({', '.join(args)})"
        if op == "where":
            args = _filled(args, value, [True, True])
        return f"torch.{op}({', '.join(args)})"

    def truth(self, op, args):
        return f"~{args[0]}" if op == "not" else super().truth(op, args)


class Equations(Language):
    """For people."""

    reserved: frozenset[str] = frozenset()

    def __init__(self, traced: Traced) -> None:
        self.traced = traced

    def number(self, value, like):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)

    def leaf(self, kind, index):
        t = self.traced
        if kind == "acc":
            parts = [
                f"{part}.{t.gates[g]}"
                for part, slots in (("x", t.x_acc), ("u", t.h_acc))
                for g, slot in enumerate(slots)
                if slot == index
            ]
            return " + ".join(parts)
        return f"s.{t.states[index]}" if kind == "prev" else (t.parameters if kind == "parameter" else t.inputs)[index]

    def truth(self, op, args):
        return f"not {args[0]}" if op == "not" else f"{args[0]} {op} {args[1]}"


def _is_float32(operand: Operand) -> bool:
    """Not a number that float32 would round."""
    try:
        return isinstance(operand, Value) or struct.unpack("f", struct.pack("f", operand))[0] == operand
    except OverflowError:
        return False


def _filled(args: list[str], value: Value, fits: Sequence[bool]) -> list[str]:
    """The arguments of where; a block for a number that does not fit as it is, or that has no block beside it."""
    number = [not isinstance(v, Value) for v in value.args[1:]]
    return [
        args[0],
        *(f"number({a}, LIKE)" if n and (all(number) or not f) else a for a, n, f in zip(args[1:], number, fits)),
    ]


def _python_number(value: float | bool) -> str:
    if isinstance(value, bool) or math.isfinite(value):
        return repr(value)
    return f'float("{value}")'


class Writer:
    """Writes values in one language: what is used once stands where it is used, the rest has a name."""

    def __init__(self, language: Language, roots: Sequence[Operand], known: dict[int, str]) -> None:
        self.language, self.known = language, dict(known)
        self.lines: list[str] = []
        self.taken: set[str] = set(language.reserved) | set(keyword.kwlist)
        self.uses: dict[int, int] = {}
        for value in ordered(roots, lambda v: id(v) in self.known):
            if id(value) not in self.known:
                for a in value.values():
                    self.uses[id(a)] = self.uses.get(id(a), 0) + 1
        for r in roots:
            if isinstance(r, Value):
                self.uses[id(r)] = self.uses.get(id(r), 0) + 1
        # How deep the expression of each is; what would be too deep to read, or for a parser, gets a name.
        depth: dict[int, int] = {}
        for value in ordered(roots, lambda v: id(v) in self.known):
            depth[id(value)] = 1 + max((depth[id(a)] for a in value.values() if id(value) not in self.known), default=0)
            if depth[id(value)] > _DEEPEST:
                self.uses[id(value)] = 2
            if self._has_name(value):
                depth[id(value)] = 0

    def _has_name(self, value: Value) -> bool:
        return not value.leaf and bool(value.name or self.uses.get(id(value), 0) > 1)

    def text(self, operand: Operand, above: int = 0) -> str:
        """Of an operand, in brackets where what stands around it binds more strongly than it: ``above``."""
        if isinstance(operand, Value):
            for value in ordered([operand], lambda v: id(v) in self.known)[:-1]:
                if id(value) not in self.known and self._has_name(value):
                    self._text(value, 0)
        return self._text(operand, above)

    def _text(self, operand: Operand, above: int) -> str:
        language = self.language
        if not isinstance(operand, Value):
            text = language.number(operand, "")
            return f"({text})" if text.startswith("-") and above > _SUM else text
        if id(operand) in self.known:
            return self.known[id(operand)]
        if operand.leaf:
            text = language.leaf(operand.op, operand.args[0])
            return f"({text})" if " " in text and above > _SUM else text
        text, strength = self._operation(operand)
        if self._has_name(operand):
            name = self.name(operand.name)
            self.lines.append(language.indent + language.assign(name, text, operand))
            self.known[id(operand)] = name
            return name
        return f"({text})" if strength < above else text

    def _operation(self, value: Value) -> tuple[str, int]:
        op, args = value.op, value.args
        if op in _INFIX:
            sign, strength = _INFIX[op]
            left = self._text(args[0], strength)
            # Of equal strength the left one comes first.
            return f"{left} {sign} {self._text(args[1], strength + 1)}", strength
        if op == "neg":
            return f"-{self._text(args[0], _ATOM)}", _UNARY
        if op in _COMPARE:
            return f"{self._text(args[0], _SUM)} {_COMPARE[op]} {self._text(args[1], _SUM)}", _COMPARISON
        if op in ("and", "or", "not"):
            return self.language.truth(op, [self._text(a, _ATOM) for a in args]), _COMPARISON
        return self.language.call(op, [self._text(a, 0) for a in args], value), _ATOM

    def name(self, wanted: str) -> str:
        """One that is not taken, the wanted one if it can be."""
        prefix = self.language.prefix
        name, k = prefix + wanted if wanted else f"{prefix}t0", 0
        while name in self.taken:
            k += 1
            name = f"{prefix}{wanted}_{k}" if wanted else f"{prefix}t{k}"
        self.taken.add(name)
        return name


_WIDTH = 120


def _wide(text: str) -> list[str]:
    """The lines of one statement, broken at spaces outside of quotes where it is too long."""
    indent = len(text) - len(text.lstrip())
    lines = []
    while len(text) > _WIDTH:
        at = text.rfind(" ", indent + 1, _WIDTH)
        if at <= indent:
            break
        lines.append(text[:at])
        text = " " * (indent + 4) + text[at + 1 :]
    return [*lines, text]


def _wide_python(text: str) -> list[str]:
    """Python goes on in the next line only within brackets."""
    if len(text) > _WIDTH and not text.endswith(","):
        before, sign, after = text.partition(" = ")
        text = f"{before}{sign}({after})"
    return _wide(text)


def _of_backward(t: Traced, language: Language, roots: Sequence[Operand], with_h: bool) -> tuple[Writer, list[str]]:
    """A writer of what is made of the new states and what was saved, and the names that the latter has there."""
    news = [(k, v) for k, v in enumerate(t.next) if isinstance(v, Value) and not v.leaf and (k or with_h)]
    known = {id(v): language.leaf("next", k) for k, v in reversed(news)}
    writer = Writer(language, roots, known | {id(v): "" for v in t.saved})
    names = [writer.name(name) for name in t.saved_names]
    writer.known |= {id(v): name for v, name in zip(t.saved, names)}
    return writer, names


def cpp(t: Traced, name: str, struct_name: str = "") -> str:
    """The cell of that name as a C++ struct; see csrc/cells.h."""
    language = Cpp()

    def slots(function: str, acc: Sequence[int]) -> str:
        others = "".join(f"gate == {gate} ? {slot} : " for gate, slot in enumerate(acc) if slot != gate)
        return f"  FUSEDRNN_HD static constexpr int {function}(int gate) {{ return {others}gate; }}"

    def body(writer: Writer, roots: list[tuple[str, Operand]], saved: Sequence[str] = ()) -> list[str]:
        for target, value in roots:
            text = writer.text(value)
            writer.lines.append(f"    {target} {text};")
            if isinstance(value, Value) and id(value) not in writer.known and not value.leaf:
                writer.known[id(value)] = target.removesuffix(" =")
        read = [k for k, n in enumerate(saved) if any(re.search(rf"\b{n}\b", line) for line in writer.lines)]
        first = [f"    const T {', '.join(f'{saved[k]} = saved[{k}]' for k in read)};"] if read else []
        return [line for text in [*first, *writer.lines] for line in _wide(text)]

    results = [
        *((f"saved[{k}] =", v) for k, v in enumerate(t.saved)),
        *((f"next[{k}] =", v) for k, v in enumerate(t.next)),
    ]
    forward = body(Writer(language, [v for _, v in results], {}), results)
    results = [
        *((f"dacc[{k}] =", v) for k, v in enumerate(t.dacc)),
        *((f"dprev[{k}] =", v) for k, v in enumerate(t.dprev) if k or t.direct),
        *((f"dparameters[{k}] =", v) for k, v in enumerate(t.dparameters)),
        *((f"dinputs[{k}] =", v) for k, v in enumerate(t.dinputs)),
    ]
    writer, saved = _of_backward(t, language, [v for _, v in results], t.uses_h)
    backward = body(writer, results, saved)
    lines = [
        f"struct {struct_name or name} {{",
        f'  static constexpr const char* kName = "{name}";',
        f"  static constexpr int kGates = {len(t.gates)};  // {' '.join(t.gates)}",
        f"  static constexpr int kAccumulators = {len(t.accumulators)};  // {' '.join(t.accumulators)}",
        f"  static constexpr int kSaved = {len(t.saved)};  // {' '.join(t.saved_names)}".rstrip(" /"),
        f"  static constexpr int kStates = {len(t.states)};  // {' '.join(t.states)}",
        f"  static constexpr int kParameters = {len(t.parameters)}, kInputs = {len(t.inputs)};",
        f"  static constexpr bool kUsesH = {str(t.uses_h).lower()}, kUsesHPrev = {str(t.uses_h_prev).lower()}, "
        f"kDirectH = {str(t.direct).lower()};",
        slots("x_acc", t.x_acc),
        slots("h_acc", t.h_acc),
        "",
        "  template <typename T>",
        "  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,",
        "                                  T* saved) {",
        *forward,
        "  }",
        "",
        "  template <typename T>",
        "  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,",
        "                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,",
        "                                   T* dinputs) {",
        *backward,
        "  }",
    ]
    if t.output is not None:
        writer, saved = _of_backward(t, language, [t.output], False)
        lines += [
            "",
            "  template <typename T>",
            "  FUSEDRNN_HD static T output(const T* saved, const T* next) {",
            *body(writer, [("return", t.output)], saved),
            "  }",
        ]
    return "\n".join([*lines, "};", ""])


def _tuples(groups: Sequence[Sequence[str]]) -> list[str]:
    """The statement that returns tuples, an item a line where it is too long for one."""

    def written(items: Sequence[str]) -> str:
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"

    line = f"    return {', '.join(map(written, groups))}"
    if len(line) <= _WIDTH:
        return [line]
    lines = ["    return ("]
    for items in groups:
        text = f"        {written(items)},"
        lines += (
            [text] if len(text) <= _WIDTH else ["        (", *(f"            {item}," for item in items), "        ),"]
        )
    return [*lines, "    )"]


def _python(t: Traced, language: Language, name: str, decorator: str) -> str:
    b = language.prefix

    def function(what: str, arguments: Sequence[str], writer: Writer, first: list[str], groups, like: str) -> str:
        # What is a number is a block of it.
        filled = [[v if isinstance(v, Value) else f"number({language.number(v, '')}, LIKE)" for v in g] for g in groups]
        texts = [[v if isinstance(v, str) else writer.text(v) for v in group] for group in filled]
        lines = [text.replace("LIKE", like) for text in [*first, *writer.lines]]
        results = [[text.replace("LIKE", like) for text in group] for group in texts]
        return "\n".join(
            [
                *([decorator] if decorator else []),
                f"def {name}_{what}({', '.join(b + a for a in arguments)}):",
                *(line for text in [*lines, *_tuples(results)] for line in _wide_python(text)),
            ]
        )

    news = Writer(language, [*t.saved, *t.next], {})
    for value in t.saved:
        news.text(value)
    forward = function("forward", ("acc", "prev", "parameters", "inputs"), news, [], (t.next, t.saved), f"{b}acc[0]")
    groups = (t.dacc, t.dprev, t.dparameters, t.dinputs)
    writer, saved = _of_backward(t, language, [v for group in groups for v in group], t.uses_h)
    first = [f"    {', '.join(saved)} = {b}saved{'[0]' if len(saved) == 1 else ''}"] if saved else []
    backward = function(
        "backward", ("d", "saved", "next", "prev", "parameters", "inputs"), writer, first, groups, f"{b}d[0]"
    )
    return f"{forward}\n\n\n{backward}\n"


_POINTWISE = ("expm1", "log1p", "number", "relu", "sigmoid", "tanh")
TRITON_HEAD = f"""import triton
import triton.language as tl
from fusedrnn.kernels.pointwise import {", ".join(_POINTWISE)}


"""


def triton(t: Traced, name: str) -> str:
    """The cell as two functions of Triton, to stand after ``TRITON_HEAD``; see CellKernels in kernels/cells.py."""
    return _python(t, Triton(), name, "@triton.jit")


def plain_torch(t: Traced, name: str) -> str:
    """The cell as two functions of torch."""
    return _python(t, Torch(), name, "")


def equations(t: Traced) -> list[str]:
    """The forward step for people, a line for each value that has a name."""
    language = Equations(t)
    writer = Writer(language, t.next, {})
    for value in sorted(ordered(t.next), key=lambda v: v.serial):
        if value.name:
            writer.text(value)
    return [*writer.lines, *(f"new {state} = {writer.text(value)}" for state, value in zip(t.states, t.next))]


# Of the zoo: what the package brings along in every language.
PRINTED = ("lstm", "gru", "rnn_tanh", "rnn_relu", "slstm")
_EDIT = "Printed by `make cells` from fusedrnn/zoo.py, which is what to edit."


def struct_of(name: str) -> str:
    """The C++ struct of one of these: RnnTanh of rnn_tanh."""
    return name.title().replace("_", "")


def printed() -> dict[str, str]:
    """The files of the cells that the package brings along, by their paths in a checkout: what stands in them."""
    from fusedrnn import zoo

    cells = {name: getattr(zoo, name).traced for name in PRINTED}
    structs = "\n".join(cpp(t, name, struct_of(name)) for name, t in cells.items())
    of_triton = "\n\n".join(triton(t, name) for name, t in cells.items())
    of_torch = "\n\n".join(plain_torch(t, name) for name, t in cells.items())
    functions = [f for f in _POINTWISE if re.search(rf"\b{f}\(", of_triton)]
    kernels, facts = {}, {}
    for name, t in cells.items():
        functions_of = {"forward": f"{name}_forward", "backward": f"{name}_backward"}
        kernels[name] = functions_of | {"backward_uses_h": t.uses_h or t.uses_h_prev, "has_direct": t.direct}
        facts[name] = {
            "gates": t.gates,
            "accumulators": t.accumulators,
            "x_acc": t.x_acc,
            "h_acc": t.h_acc,
            "saved": t.saved_names,
            "states": t.states,
            "parameters": t.parameters,
            "inputs": t.inputs,
            "has_direct": t.direct,
            **functions_of,
        }
    return {
        "csrc/printed.h": f'// {_EDIT}\n// clang-format off\n#pragma once\n\n#include "pointwise.h"\n\n'
        f"namespace fusedrnn {{\n\n{structs}\n}}  // namespace fusedrnn\n",
        "kernels/printed.py": f'"""{_EDIT}"""\n# fmt: off\n\nimport triton\nimport triton.language as tl\n\n'
        f"from .pointwise import {', '.join(functions)}\n\n\n{of_triton}\n\n"
        f"# fusedrnn.kernels.cells.CellKernels of each.\n{_table('KERNELS', kernels)}",
        "fusedrnn/printed.py": f'"""{_EDIT}"""\n# fmt: off\n\nimport torch\n\n\ndef number(value, like):\n'
        f"    return torch.full_like(like, value)\n\n\n{of_torch}\n\n"
        f"# fusedrnn.cells.Cell of each.\n{_table('CELLS', facts)}",
    }


def _table(name: str, entries: dict[str, dict[str, object]]) -> str:
    lines = [f"{name} = {{"]
    for cell, facts in entries.items():
        lines += [f'    "{cell}": {{', *(f'        "{k}": {_literal(v)},' for k, v in facts.items()), "    },"]
    return "\n".join([*lines, "}", ""])


def _literal(value: object) -> str:
    if isinstance(value, str):  # the name of a function
        return value
    return repr(value).replace("'", '"')


def write_printed() -> None:
    """Prints the cells that the package brings along, in a checkout."""
    root = Path(__file__).resolve().parents[1]
    for path, text in printed().items():
        (root / path).write_text(text)
