"""Problems for the one suite that every backend passes, their float64 answers, and how far off one may be."""

import unittest.mock
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrnn.backends import reference
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.cells import CELLS, accumulation_dtype
from fusedrnn.functional import recurrence_of_states

INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
OUTPUTS = ("y", "h_n", "c_n", "cells")


def inputs_of(cell: str) -> tuple[str, ...]:
    """INPUTS, then the cell's other states, parameters and inputs: what ops.differentiable gives."""
    spec = CELLS[cell]
    return (*INPUTS, *(f"{state}0" for state in spec.states[2:]), *spec.parameters, *spec.inputs)


def outputs_of(cell: str, states: bool) -> tuple[str, ...]:
    """What a call returns, and a gradient may come through; with ``states`` every state after h as well."""
    others = ("c", *CELLS[cell].states[2:])[: len(CELLS[cell].states) - 1]  # whatever the second one is called
    finals, every = [f"{state}_n" for state in others], [f"every_{state}" for state in others]
    return ("y", "h_n", *finals, *("cells" if name == "every_c" else name for name in every if states))


@dataclass(frozen=True)
class Case:
    """One direction of one layer. ``lengths`` (sorted) makes it packed; ``proj`` 0 is no projection. With ``states``
    every c is an output as well (of a cell that has one); ``resets`` draws a mask that is true in a third of places.
    """

    T: int
    B: int
    I: int
    H: int
    proj: int = 0
    bias: bool = True
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    strided: bool = False
    scale: float = 1.0
    states: bool = False
    resets: bool = False
    heads: int = 1

    def __str__(self) -> str:
        text = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        text += f"-P{self.proj}" if self.proj else ""
        text += "" if self.bias else "-nobias"
        text += "-packed" if self.lengths else ""
        text += "-strided" if self.strided else ""
        text += f"-scale{self.scale:g}" if self.scale != 1 else ""
        text += "-states" * self.states + "-resets" * self.resets
        text += f"-heads{self.heads}" if self.heads > 1 else ""
        return text + ("-reverse" if self.reverse else "")

    def batch_sizes(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(self.T)])


CASES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=1, B=3, I=4, H=5),
    Case(T=4, B=1, I=3, H=5, reverse=True),
    Case(T=5, B=2, I=7, H=16, bias=False),
    Case(T=6, B=4, I=8, H=32, reverse=True),
    Case(T=3, B=17, I=5, H=33),
    Case(T=3, B=2, I=9, H=129),
    Case(T=7, B=5, I=6, H=20, lengths=(7, 7, 4, 2, 1)),
    Case(T=7, B=5, I=6, H=20, lengths=(7, 7, 4, 2, 1), reverse=True),
    Case(T=4, B=3, I=5, H=12, proj=7),
    Case(T=4, B=3, I=5, H=12, proj=1, lengths=(4, 2, 1), reverse=True),
    Case(T=5, B=3, I=6, H=10, strided=True),
    Case(T=5, B=2, I=4, H=9, scale=30.0),
    Case(T=6, B=5, I=4, H=20, states=True, resets=True),
    Case(T=5, B=9, I=3, H=7, resets=True, reverse=True, strided=True),
    Case(T=7, B=5, I=6, H=12, lengths=(7, 7, 4, 2, 1), states=True, resets=True),
    Case(T=7, B=3, I=4, H=17, lengths=(7, 5, 2), states=True, resets=True, reverse=True),
    Case(T=4, B=3, I=5, H=12, proj=7, states=True, resets=True),
]


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, cell: str = "lstm") -> dict[str, Tensor]:
    """Inputs and output gradients, drawn once in float64 and rounded to ``dtype``."""
    spec = CELLS[cell]
    gates, out = len(spec.gates), case.proj or case.H
    rows = (case.T, case.B) if case.lengths is None else (sum(case.lengths),)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype).to(device)
        if case.strided and len(shape) > 1:
            wide = t.new_full((*shape[:-1], shape[-1] * 2 + 1), float("nan"))
            wide[..., 1::2] = t
            t = wide[..., 1::2]
        return t

    weight = case.H**-0.5
    made = {
        "x": draw(*rows, case.I, scale=case.scale),
        "h0": draw(case.B, out),
        "c0": draw(case.B, case.H) if spec.has_cell_state else None,
        "w_ih": draw(gates * case.H, case.I, scale=weight),
        "w_hh": draw(gates * case.H, out // case.heads, scale=weight),
        "b_ih": draw(gates * case.H, scale=weight) if case.bias else None,
        "b_hh": draw(gates * case.H, scale=weight) if case.bias else None,
        "w_hr": draw(case.proj, case.H, scale=weight) if case.proj else None,
        "dy": draw(*rows, out),
        "dh_n": draw(case.B, out),
        "dc_n": draw(case.B, case.H),
        "dcells": draw(*rows, case.H).to(accumulation_dtype(dtype)) if case.states else None,
        "resets": torch.rand(rows, generator=generator).lt(1 / 3).to(device) if case.resets else None,
    }
    for name in spec.states[2:]:
        # A normaliser is positive.
        start = draw(case.B, case.H)
        made[f"{name}0"] = start.abs() + 1 if name == "n" else start
        made[f"d{name}_n"] = draw(case.B, case.H)
        made[f"devery_{name}"] = draw(*rows, case.H).to(accumulation_dtype(dtype)) if case.states else None
    if cell.startswith("ligru") and case.bias and dtype.itemsize == 2:
        # Each unit far on one side of the rectifier's kink, whose slope else depends on a rounding.
        units = slice(case.H * spec.gates.index("n"), case.H * (spec.gates.index("n") + 1))
        made["b_ih"][units] += torch.arange(case.H).remainder(2).mul(8).sub(4).to(made["b_ih"])
        made["w_hh"][units] *= 0.1
    made |= {name: draw(case.H) for name in spec.parameters}
    made |= {name: draw(*rows, case.H).sigmoid() for name in spec.inputs}
    return {name: t for name, t in made.items() if t is not None}


def call(case: Case, tensors: dict[str, Tensor], backend: str, algorithm: str = "auto", cell: str = "lstm"):
    """y, h_n and, where the cell has one, c_n; every c with ``case.states``."""
    args = [tensors.get(name) for name in INPUTS]
    spec = CELLS[cell]
    inputs = Inputs(
        *args,
        case.batch_sizes(),
        tensors.get("resets"),
        case.reverse,
        tuple(tensors[f"{name}0"] for name in spec.states[2:]),
        tuple(tensors[name] for name in spec.parameters),
        tuple(tensors[name] for name in spec.inputs),
        case.heads,
    )
    y, finals, every = recurrence_of_states(spec, inputs, backend, algorithm, keep_cells=case.states)
    others = len(spec.states) - 1
    outputs = (y, *finals[: 1 + others], *(every[:others] if case.states else ()))
    return dict(zip(outputs_of(cell, case.states), outputs, strict=True))


def run(
    case: Case,
    given: dict[str, Tensor],
    backend: str,
    algorithm: str = "auto",
    cell: str = "lstm",
    wrt: tuple[str, ...] | None = None,
    through: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients ("d" + name) of the inputs ``wrt`` through the outputs ``through``; None: of all."""
    inputs = {name: given[name].detach() for name in inputs_of(cell) if name in given}
    wrt = tuple(name for name in inputs if wrt is None or name in wrt)
    for name in wrt:
        inputs[name].requires_grad_()
    outputs = call(case, inputs | {"resets": given.get("resets")}, backend, algorithm, cell)
    result = {name: t.detach() for name, t in outputs.items()}
    if wrt:
        used = [name for name in outputs if (through is None or name in through) and outputs[name].requires_grad]
        grads = torch.autograd.grad(
            [outputs[name] for name in used],
            [inputs[name] for name in wrt],
            [given["d" + name] for name in used],
            allow_unused=True,
        )
        # Nothing differentiates a stabiliser.
        result |= {"d" + name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(wrt, grads)}
    return result


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The very same numbers in float64 on the CPU."""
    return {name: t.cpu() if t.dtype == torch.bool else t.detach().double().cpu() for name, t in given.items()}


def _to_tf32(t: Tensor, nearest: bool) -> Tensor:
    """float32 with the 10 bits of mantissa of tf32: rounded to nearest, or cut as mma does with its operands."""
    bits = t.contiguous().view(torch.int32)
    bits = bits + (0xFFF + ((bits >> 13) & 1) if nearest else 0)
    return torch.where(t.isfinite(), (bits & ~0x1FFF).view(torch.float32), t)


def models(case: Case, given: dict[str, Tensor], tf32: bool = False, **options) -> list[dict[str, Tensor]]:
    """What float32 math gives that rounds only what a kernel stores: y, gates, gate gradients.

    A kernel may compute the input gates in one GEMM beforehand: then they are rounded too. With ``tf32`` the
    operands of the products are rounded or cut, those of a GEMM beforehand perhaps not.
    """
    dtype, product, input_gates = given["x"].dtype, reference.product, reference.input_gates
    products = [product]
    if tf32:
        products = [lambda a, b, n=n: product(_to_tf32(a, n), _to_tf32(b, n)) for n in (True, False)]

    def beforehand(x: Tensor, w: Tensor, b: Tensor | None, *rounds: bool) -> Tensor:
        with unittest.mock.patch.object(reference, "product", product):
            return input_gates(x, w, b, *rounds).to(dtype).to(x.dtype)

    found = []
    for one in products:
        for gates in (input_gates, beforehand):
            with (
                unittest.mock.patch.object(reference, "product", one),
                unittest.mock.patch.object(reference, "input_gates", gates),
            ):
                found.append(run(case, given, "reference", **options))
    return found


def at_own_kinks(case: Case, given: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exact gradients of rnn_relu, but its slope is that of ``found``: a sum near 0 is rounded to either side of it."""
    wide = widened(given)
    inputs, none = [wide.get(name) for name in INPUTS], torch.empty(0, dtype=torch.float64)
    grads = reference.backward(
        CELLS["rnn_relu"],
        Gradients(wide["dy"], wide["dh_n"], None, None),
        Inputs(*inputs, case.batch_sizes(), wide.get("resets"), case.reverse),
        Saved(found["y"].double().cpu(), none, none),
        "auto",
        [t is not None for t in inputs],
    )
    return {"d" + name: g for name, g in zip(INPUTS, grads) if name in given}


def assert_close(
    got: dict[str, Tensor],
    exact: dict[str, Tensor],
    models: list[dict[str, Tensor]],
    factor: float = 2.0,
    exact_for=lambda found: {},
):
    """Every tensor is at most ``factor`` times as far from the float64 answer as the worst model is.

    A unit in the last place of the largest entry is granted on top (float32: four): a model can be exact by
    luck. float64 has to reach 1e-12. ``exact_for`` gives exact answers that depend on what is compared with them.
    """
    for model in models:
        assert got.keys() == exact.keys() == model.keys()
    answers = [exact | exact_for(model) for model in models]
    exact = exact | exact_for(got)
    for name, t in got.items():
        assert t.isfinite().all(), f"{name} is not finite"
        assert t.shape == exact[name].shape, name
        if not t.numel():
            continue
        scale = exact[name].abs().max().item()
        error = (t.double().cpu() - exact[name]).abs().max().item()
        allowed = factor * max((m[name].double().cpu() - e[name]).abs().max().item() for m, e in zip(models, answers))
        # The cells of a 16-bit problem are float32, but what they come from is 16-bit.
        dtype = got["y"].dtype if name == "cells" or name.startswith("every_") else t.dtype
        allowed += torch.finfo(dtype).eps * scale * (4 if dtype == torch.float32 else 1)
        if t.dtype == torch.float64:
            allowed = 1e-12 * max(scale, 1.0)
        assert error <= allowed, f"{name} ({t.dtype}): error {error:.3e}, allowed {allowed:.3e}"
