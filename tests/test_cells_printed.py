"""What is printed of a cell, in each language, computes what its function and torch's gradient do."""

import ctypes
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import cells, printing, zoo
from fusedrnn.definition import Definition

ROOT = Path(__file__).resolve().parents[1]
F = torch.nn.functional


@fusedrnn.cell(gates=("a", "b"), states=("h", "k"), parameters=("p",), inputs=("m",))
def everything(x, u, s, p, m):
    """Every operation there is a printer for, and what torch makes of many others (hardsigmoid's gradient, for one, is
    off by 1e-8 in torch: it takes 1 / 6 in float32).
    """
    a = x.a + u.a
    y = F.softplus(a) + F.silu(u.b) + F.gelu(a) + F.elu(a) + F.leaky_relu(a) + F.hardtanh(x.b)
    y = y + F.softsign(a) + F.mish(a) + F.relu6(a) + a**2 + a**3 + F.hardswish(a) + F.selu(u.b) + torch.lerp(a, m, 0.3)
    y = y + torch.clamp(a, -1, 1) + a.clamp(min=0.1) + torch.sign(a) + torch.abs(a) + torch.expm1(a) + a.sin() + m.cos()
    y = (
        y
        + torch.erf(a)
        + torch.maximum(a, m)
        + torch.minimum(a, p)
        + (a > 0).to(a.dtype) * m
        + F.gelu(u.b, approximate="tanh")
    )
    y = (
        y
        + torch.where((a > 0) & ~(m > 0.5) | (p < 0), a, 0.1)
        + F.threshold(a, 0.1, 2.0)
        + 2**p
        + a.exp()
        + torch.tensor(0.3)
    )
    y = (
        y
        + torch.logaddexp(a, m)
        + torch.addcmul(a, m, p)
        + torch.rsqrt(a * a + 1)
        + 1 / (a * a + 2)
        + torch.log(1 + a * a)
    )
    y = (
        y
        + (a * a + 0.5) ** 0.5
        + (a - 1).floor() * m
        + torch.ceil(p) * m
        + torch.nan_to_num(a)
        + 1.0 / (2 + m.square())
    )
    return torch.tanh(0.01 * y) + 0.5 * s.h, torch.sigmoid(s.k + y.detach() * 0.1 - s.h)


CELLS = {k: v for k, v in vars(zoo).items() if isinstance(v, Definition)} | {"everything": everything}


def given(cell: Definition, rows: int, hidden: int) -> list[list[torch.Tensor]]:
    """x, u, states, parameters, inputs, gradients of the new states; odd ones are not near a kink."""
    counts = (
        len(cell.gates),
        len(cell.gates),
        len(cell.states),
        len(cell.parameters),
        len(cell.inputs),
        len(cell.states),
    )
    groups = [[torch.randn(rows, hidden, dtype=torch.float64) for _ in range(n)] for n in counts]
    if cell.name == "slstm":
        groups[2][2] = groups[2][2].abs() + 1
        groups[2][2][0] = 0.0
    return groups


def accumulated(cell: Definition, x, u) -> list[torch.Tensor]:
    t = cell.traced
    acc = [torch.zeros_like(x[0]) for _ in t.accumulators]
    for part, slots in ((x, t.x_acc), (u, t.h_acc)):
        for gate, slot in zip(part, slots, strict=True):
            acc[slot] = acc[slot] + gate
    return acc


def expected(cell: Definition, groups):
    """New states and the gradients of x, u, states, parameters, inputs, by autograd."""
    leaves = [[t.clone().requires_grad_() for t in group] for group in groups[:5]]
    news = cell.step(*leaves)
    flat = list(itertools.chain(*leaves))
    pairs = [(n, d) for n, d in zip(news, groups[5]) if n.requires_grad]
    grads = torch.autograd.grad([n for n, _ in pairs], flat, [d for _, d in pairs], allow_unused=True)
    return news, [torch.zeros_like(t) if g is None else g for t, g in zip(flat, grads)]


def check(cell: Definition, groups, news, dacc, dprev, dparameters, dinputs, tolerance: float) -> None:
    t = cell.traced
    want, grads = expected(cell, groups)
    got = [*(dacc[a] for a in t.x_acc), *(dacc[a] for a in t.h_acc), *dprev, *dparameters, *dinputs]
    if not t.direct:
        assert torch.count_nonzero(grads[2 * len(cell.gates)]) == 0
        got[2 * len(cell.gates)] = torch.zeros_like(want[0])
    for k, (a, b) in enumerate(zip([*news, *got], [*want, *grads], strict=True)):
        scale = b.abs().max().item() + 1
        assert (a.double() - b).abs().max().item() <= tolerance * scale, (cell.name, k)


def python_functions(source: str, name: str):
    space = {"torch": torch, "number": lambda value, like: torch.full_like(like, value)}
    exec(source, space)
    return space[f"{name}_forward"], space[f"{name}_backward"]


@pytest.mark.parametrize("name", CELLS)
def test_torch(name):
    cell = CELLS[name]
    groups = given(cell, 7, 5)
    x, u, prev, parameters, inputs, d = groups
    forward, backward = python_functions(printing.plain_torch(cell.traced, name), name)
    news, saved = forward(accumulated(cell, x, u), prev, parameters, inputs)
    assert len(saved) == len(cell.traced.saved_names)
    check(cell, groups, news, *backward(d, saved, news, prev, parameters, inputs), tolerance=1e-13)


@pytest.mark.parametrize("name", printing.PRINTED)
def test_what_the_package_brings_along(name):
    """The checked-in source, whatever this torch traces."""
    cell, entry = CELLS[name], cells.CELLS[name]
    groups = given(cell, 7, 5)
    x, u, prev, parameters, inputs, d = groups
    news, saved = entry.forward(accumulated(cell, x, u), prev, parameters, inputs)
    assert len(saved) == len(entry.saved)
    check(cell, groups, news, *entry.backward(d, saved, news, prev, parameters, inputs), tolerance=1e-13)


@pytest.mark.parametrize("name", ["gru", "ligru", "zoneout_lstm"])
def test_an_infinite_gradient_makes_no_nan(name):
    """d - d z would, for an infinite d."""
    cell = CELLS[name]
    t = cell.traced
    _, backward = python_functions(printing.plain_torch(t, name), name)

    def blocks(number, names):
        return [torch.full((2, 3), number) for _ in names]

    d = blocks(0.25, t.states)
    d[0][1, 2] = math.inf
    given = blocks(0.25, t.saved), blocks(0.75, t.states), blocks(0.75, t.states), [], blocks(0.5, t.inputs)
    dacc, dprev, _, _ = backward(d, *given)
    assert all(not x.isnan().any() for x in (*dacc, *dprev))
    assert torch.isinf(torch.stack(dacc)).any()


FUNCTIONS = (
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "abs",
    "sigmoid",
    "tanh",
    "relu",
    "sin",
    "cos",
    "erf",
    "floor",
    "ceil",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("printed")
    structs = "\n".join(printing.cpp(cell.traced, name) for name, cell in CELLS.items())
    calls = "\n".join(f"CELL({name})" for name in CELLS)
    source = f'#include "printed_cells.h"\nnamespace fusedrnn {{\n{structs}\n{calls}\n}}\n'
    (folder / "cells.cpp").write_text(source)
    flags = "-std=c++20 -O1 -shared -fPIC -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
    names = ["-Wno-unused-parameter", "-Wno-psabi", "-DFUSEDRNN_CAPABILITY=here", "-DFUSEDRNN_VECTOR_BYTES=16"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command = ["g++", *flags.split(), *names, *folders, "cells.cpp", "-o", "cells.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "cells.so"))


def pointers(tensors):
    return (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


@pytest.mark.parametrize("kind", ["double", "float", "vec_double", "vec_float"])
@pytest.mark.parametrize("name", CELLS)
def test_cpp(name, kind, compiled):
    cell, dtype = CELLS[name], torch.float64 if "double" in kind else torch.float32
    # float32 sees the same numbers as float64, and their sums are exact.
    groups = [[(t * 64).round() / 64 for t in group] for group in given(cell, 8, 6)]
    x, u, prev, parameters, inputs, d = groups
    t = cell.traced
    ins = [v.to(dtype).contiguous() for v in (*accumulated(cell, x, u), *prev, *parameters, *inputs, *d)]
    counts = (len(t.states), len(t.saved), len(t.accumulators), len(t.states), len(t.parameters), len(t.inputs))
    outs = [torch.full_like(ins[0], math.nan) for _ in range(sum(counts))]
    getattr(compiled, f"{name}_{kind}")(pointers(ins), pointers(outs), ctypes.c_int64(ins[0].numel()))
    groups_out, start = [], 0
    for n in counts:
        groups_out.append(outs[start : start + n])
        start += n
    news, _, dacc, dprev, dparameters, dinputs = groups_out
    check(cell, groups, news, dacc, dprev, dparameters, dinputs, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("kind", ["double", "float", "vec_double", "vec_float"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, kind, compiled):
    """Within a few ulp of torch over the whole range, and its infinities, NaN, zeros and subnormal numbers."""
    dtype = torch.float64 if "double" in kind else torch.float32
    info = torch.finfo(dtype)
    high = 700.0 if dtype == torch.float64 else 87.0
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1.0,
        -1.0,
        -2.0,
        info.max,
        info.min,
        info.tiny,
        info.tiny / 8,
        1e-3,
        1e3,
    ]
    a = torch.cat(
        [
            torch.tensor(special, dtype=dtype),
            torch.linspace(-1.3 * high, 1.3 * high, 4094).to(dtype),
            torch.randn(4096, dtype=torch.float64).mul(3).exp().to(dtype),
            torch.randn(4092, dtype=dtype),
        ]
    )
    if name in ("sin", "cos"):
        a = a.clamp(-1e3, 1e3)
    a = a[: a.numel() // 8 * 8].contiguous()
    b = torch.empty_like(a)
    getattr(compiled, f"{name}_of_{kind}")(
        *map(ctypes.c_void_p, (a.data_ptr(), b.data_ptr())), ctypes.c_int64(a.numel())
    )
    want = getattr(torch, name)(a.double())
    rounded = want.to(dtype)
    assert torch.equal(b.isnan(), rounded.isnan())
    # At the edge of what is finite a last bit may differ.
    edge = want.abs() > 0.999 * info.max
    assert torch.equal(b.isinf() & ~edge, rounded.isinf() & ~edge)
    at = rounded.isfinite() & b.isfinite()
    # sigmoid need not have the subnormal numbers.
    error = ((b.double() - want).abs()[at] - (info.tiny if name == "sigmoid" else 0)) / want.abs()[at].clamp(
        min=info.tiny
    )
    assert error.max().item() <= 6 * info.eps, (a[at][error.argmax()], error.max() / info.eps)


inside = pytest.mark.interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter_of_triton():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    env.pop("FUSEDRNN_SIMULATE", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-m",
        "interpreted",
        __file__,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


STEP = """
@triton.jit
def {name}_step(given, found, n: tl.constexpr):
    o = tl.arange(0, n)
{loads}
    b_next, b_saved = {name}_forward(b_acc, b_prev, b_parameters, b_inputs)
    b_dacc, b_dprev, b_dparameters, b_dinputs = {name}_backward(
        b_d, b_saved, b_next, b_prev, b_parameters, b_inputs)
{stores}
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    source = [printing.TRITON_HEAD]
    for name, cell in CELLS.items():
        t = cell.traced
        sizes = {"acc": t.accumulators, "prev": t.states, "parameters": t.parameters, "inputs": t.inputs, "d": t.states}
        loads, k = [], 0
        for what, names in sizes.items():
            blocks = ", ".join(f"tl.load(given + {k + j} * n + o)" for j in range(len(names)))
            loads.append(f"    b_{what} = ({blocks}{',' if len(names) == 1 else ''})")
            k += len(names)
        stores, k = [], 0
        for what, n in (
            ("next", len(t.states)),
            ("saved", len(t.saved)),
            ("dacc", len(t.accumulators)),
            ("dprev", len(t.states)),
            ("dparameters", len(t.parameters)),
            ("dinputs", len(t.inputs)),
        ):
            stores += [f"    tl.store(found + {k + j} * n + o, b_{what}[{j}])" for j in range(n)]
            k += n
        source += [printing.triton(t, name), STEP.format(name=name, loads="\n".join(loads), stores="\n".join(stores))]
    path = tmp_path_factory.mktemp("printed") / "printed_cells.py"
    path.write_text("\n\n".join(source))
    spec = importlib.util.spec_from_file_location("printed_cells", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_triton(name, dtype, interpreted):
    cell = CELLS[name]
    groups = [[(t * 64).round() / 64 for t in group] for group in given(cell, 8, 8)]
    x, u, prev, parameters, inputs, d = groups
    t = cell.traced
    ins = torch.stack([*accumulated(cell, x, u), *prev, *parameters, *inputs, *d]).to(dtype)
    counts = (len(t.states), len(t.saved), len(t.accumulators), len(t.states), len(t.parameters), len(t.inputs))
    outs = torch.full((sum(counts), 64), math.nan, dtype=dtype)
    getattr(interpreted, f"{name}_step")[(1,)](ins, outs, n=64)
    news, _, *grads = [[r.view(8, 8) for r in group] for group in outs.split(counts)]
    check(cell, groups, news, *grads, 1e-12 if dtype == torch.float64 else 2e-5)
