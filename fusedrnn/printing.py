"""Source of a traced cell (fusedrnn.graph): a C++ struct as in csrc/cells.h, functions of Triton and of torch.

All three compute the same operations in the same grouping.
"""

import keyword
import math
import struct
from collections.abc import Callable, Sequence

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
            "union unsigned using virtual void volatile while neg abs exp expm1 log log1p sqrt sigmoid tanh sin cos "
            "erf floor ceil maximum minimum at_least at_most where forward backward output x_acc h_acc "
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
            name = self._name(operand.name)
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

    def _name(self, wanted: str) -> str:
        prefix = self.language.prefix
        name, k = prefix + wanted if wanted else f"{prefix}t0", 0
        while name in self.taken:
            k += 1
            name = f"{prefix}{wanted}_{k}" if wanted else f"{prefix}t{k}"
        self.taken.add(name)
        return name


def _wide(text: str, most: int = 120) -> list[str]:
    """The lines of one statement, broken at spaces outside of quotes where it is too long."""
    indent = len(text) - len(text.lstrip())
    lines = []
    while len(text) > most:
        at = text.rfind(" ", indent + 1, most)
        if at <= indent:
            break
        lines.append(text[:at])
        text = " " * (indent + 4) + text[at + 1 :]
    return [*lines, text]


def _wide_python(text: str) -> list[str]:
    """Python goes on in the next line only within brackets."""
    if len(text) > 120:
        before, sign, after = text.partition(" = ")
        head, tail = (before + sign, after) if sign else ("    return ", text.strip().removeprefix("return "))
        text = f"{head}({tail})"
    return _wide(text)


def _known_in_backward(t: Traced, leaf: Callable[[str, int], str]) -> dict[int, str]:
    news = [(k, v) for k, v in enumerate(t.next) if isinstance(v, Value) and not v.leaf and (k or t.uses_h)]
    known = {id(v): leaf("next", k) for k, v in reversed(news)}
    return known | {id(v): leaf("saved", k) for k, v in enumerate(t.saved)}


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def cpp(t: Traced, name: str) -> str:
    """The cell as a C++ struct of that name; see csrc/cells.h."""
    language = Cpp()

    def slots(function: str, acc: Sequence[int]) -> str:
        runs = "gate" if list(acc) == list(range(len(acc))) else None
        if runs is None:
            runs = str(acc[-1])
            for gate in range(len(acc) - 2, -1, -1):
                runs = f"gate == {gate} ? {acc[gate]} : {runs}"
        return f"  FUSEDRNN_HD static constexpr int {function}(int gate) {{ return {runs}; }}"

    def body(roots: list[tuple[str, Operand]], known: dict[int, str]) -> list[str]:
        writer = Writer(language, [r for _, r in roots], known)
        for target, value in roots:
            text = writer.text(value)
            writer.lines.append(f"    {target} = {text};")
            if isinstance(value, Value) and id(value) not in writer.known and not value.leaf:
                writer.known[id(value)] = target
        return [line for text in writer.lines for line in _wide(text)]

    forward = body(
        [*((f"saved[{k}]", v) for k, v in enumerate(t.saved)), *((f"next[{k}]", v) for k, v in enumerate(t.next))], {}
    )
    results = [
        *((f"dacc[{k}]", v) for k, v in enumerate(t.dacc)),
        *((f"dprev[{k}]", v) for k, v in enumerate(t.dprev) if k or t.direct),
        *((f"dparameters[{k}]", v) for k, v in enumerate(t.dparameters)),
        *((f"dinputs[{k}]", v) for k, v in enumerate(t.dinputs)),
    ]
    backward = body(results, _known_in_backward(t, language.leaf))
    lines = [
        f"struct {name} {{",
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
        writer = Writer(
            language, [t.output], {k: v for k, v in _known_in_backward(t, language.leaf).items() if v != "next[0]"}
        )
        result = writer.text(t.output)
        lines += [
            "",
            "  template <typename T>",
            "  FUSEDRNN_HD static T output(const T* saved, const T* next) {",
            *(line for text in writer.lines for line in _wide(text)),
            f"    return {result};",
            "  }",
        ]
    return "\n".join([*lines, "};", ""])


def _python(t: Traced, language: Language, name: str, decorator: str) -> str:
    b = language.prefix

    def function(
        what: str, arguments: Sequence[str], groups: Sequence[Sequence[Operand]], known: dict[int, str], like: str
    ):
        writer = Writer(language, [v for group in groups for v in group], known)
        # What is a number is a block of it.
        filled = [[v if isinstance(v, Value) else f"number({language.number(v, '')}, LIKE)" for v in g] for g in groups]
        texts = [[v if isinstance(v, str) else writer.text(v) for v in group] for group in filled]
        results = ", ".join(f"({', '.join(g)}{',' if len(g) == 1 else ''})" for g in texts)
        lines = [
            *([decorator] if decorator else []),
            f"def {name}_{what}({', '.join(b + a for a in arguments)}):",
            *(
                line
                for text in [*writer.lines, f"    return {results}"]
                for line in _wide_python(text.replace("LIKE", like))
            ),
        ]
        return "\n".join(lines)

    forward = function("forward", ("acc", "prev", "parameters", "inputs"), (t.next, t.saved), {}, f"{b}acc[0]")
    backward = function(
        "backward",
        ("d", "saved", "next", "prev", "parameters", "inputs"),
        (t.dacc, t.dprev, t.dparameters, t.dinputs),
        _known_in_backward(t, language.leaf),
        f"{b}d[0]",
    )
    return f"{forward}\n\n\n{backward}\n"


TRITON_HEAD = """import triton
import triton.language as tl
from fusedrnn.kernels.pointwise import expm1, log1p, number, sigmoid, tanh


"""


def triton(t: Traced, name: str) -> str:
    """The cell as two functions of Triton, to stand after ``TRITON_HEAD``; see kernels/cells.py."""
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
