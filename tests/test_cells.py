"""The definition of a cell: what is made of its function, and the errors of one that cannot be a cell."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import printing, zoo
from fusedrnn._build import TORCH_TESTED
from fusedrnn.cells import CELLS
from fusedrnn.definition import Definition

ROOT = Path(__file__).resolve().parents[1]
ZOO = {name: value for name, value in vars(zoo).items() if isinstance(value, Definition)}


def test_importing_traces_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import fusedrnn, fusedrnn.zoo; "
        "new = set(sys.modules) - before; "
        "assert not new & {'torch._dynamo', 'torch._functorch.aot_autograd', 'torch.fx.experimental.proxy_tensor'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", printing.PRINTED)
def test_the_built_in_cells_are_what_their_definitions_give(name):
    cell, found = CELLS[name], ZOO[name].traced
    assert ZOO[name].cell is cell
    for field in ("gates", "states", "parameters", "inputs", "accumulators", "x_acc", "h_acc"):
        assert getattr(found, field) == getattr(cell, field), field
    assert found.saved_names == cell.saved
    assert found.direct == cell.has_direct


@pytest.mark.skipif(
    torch.__version__.split("+")[0] != TORCH_TESTED[-1],
    reason="another torch may trace in another order: the numbers are compared, in test_cells_printed.py",
)
def test_the_built_in_cells_are_printed():
    for path, text in printing.printed().items():
        assert (ROOT / path).read_text() == text, f"{path} is not what `make cells` prints"


@pytest.mark.parametrize(
    "name, accumulators, kept",
    [
        ("mgu", "f nx nh", "f n nh"),
        ("cifg", "f g o", "f g o"),
        ("janet", "s n", "n a_s"),
        ("ligru", "z n", "z n"),
        ("peephole_lstm", "i f g o", "i f g o"),
        ("slstm", "i f z o", "i z o a_f"),
        ("grud", "r z nx nh", "r z n nh"),
        ("zoneout_lstm", "i f g o", "i f g o"),
        ("recurrent_dropout_lstm", "i f g o", "i f g o"),
    ],
)
def test_what_is_kept(name, accumulators, kept):
    found = ZOO[name].traced
    assert " ".join(found.accumulators) == accumulators
    assert " ".join(found.saved_names) == kept
    assert f"kept for backward: {kept}" in str(ZOO[name])


def test_print_says_what_a_cell_costs():
    assert str(zoo.mgu) == (
        "mgu: 2 gates f n, 1 state h\n"
        "step\n"
        "  f = sigmoid(x.f + u.f)\n"
        "  n = tanh(x.n + f * u.n)\n"
        "  new h = s.h + f * (n - s.h)\n"
        "accumulators: f nx nh\n"
        "  a gate whose parts of x and h are not only added has two\n"
        "kept for backward: f n nh\n"
        "  bytes of a unit and step: 12 in float32, 24 in float64, 6 in bfloat16 and float16"
    )


def test_a_sum_of_any_length_is_one_accumulator():
    @fusedrnn.cell(gates=("a", "b", "c", "d"), parameters=("p",))
    def sums(x, u, s, p):
        a = torch.sigmoid((x.a + p * s.h) + u.a)
        b = torch.tanh(x.b - u.b)
        c = torch.sigmoid(x.c + u.c) + 0 * x.c
        d = torch.sigmoid(x.d + u.d.detach())
        return a * b * c * d

    assert sums.traced.accumulators == ("a", "bx", "cx", "dx", "bh", "ch", "dh")
    assert sums.traced.x_acc == (0, 1, 2, 3)
    assert sums.traced.h_acc == (0, 4, 5, 6)


def test_one_content_is_one_cell():
    def make(factor):
        @fusedrnn.cell(gates=("h",))
        def scaled(x, u, s):
            return torch.tanh(factor * (x.h + u.h))

        return scaled

    assert make(0.5).cell is make(0.5).cell
    assert make(0.5).cell.name != make(0.25).cell.name


def test_a_definition_is_itself_in_copies():
    assert pickle.loads(pickle.dumps(zoo.mgu)) is zoo.mgu
    assert copy.deepcopy(zoo.mgu) is zoo.mgu
    assert repr(zoo.mgu) == "<fusedrnn.cell mgu: gates f n, states h>"
    assert "Minimal gated unit" in zoo.mgu.__doc__


def of(function, **options):
    return fusedrnn.cell(**{"gates": ("h",), **options})(function)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x, u, s: torch.cumsum(x.h, 0), "uses aten.cumsum, for which there is no printer"),
        (lambda x, u, s: x.h + u.h.mean(), "uses aten.mean, for which there is no printer"),
        (lambda x, u, s: torch.softmax(x.h + u.h, 1), "uses aten._softmax, for which there is no printer"),
        (lambda x, u, s: x.h @ u.h.t() @ s.h, "not pointwise"),
        (lambda x, u, s: torch.lgamma(x.h + u.h), "uses aten.lgamma, for which there is no printer"),
        (lambda x, u, s: (x.h + u.h) ** s.h, "aten.pow, of a tensor to the power of a tensor"),
        (lambda x, u, s: torch.rand_like(x.h) * u.h, "uses aten.rand"),
        (lambda x, u, s: x.h if u.h.sum() > 0 else u.h, "asks for the value of a tensor"),
        (lambda x, u, s: (x.h + u.h).float(), "a cell has one dtype"),
        (lambda x, u, s: x.h + u.h[:1], "not pointwise|no printer"),
        (lambda x, u, s: x.h + u.h + torch.ones(2, 3, dtype=torch.float64).cumsum(0), "there is no printer"),
        (lambda x, u, s: (x.h + u.h)[:1], "of one shape"),
    ],
)
def test_what_cannot_be_a_cell_is_named(function, message):
    with pytest.raises(RuntimeError, match=message):
        str(of(function, name="odd"))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x, u, s: None, "must return a tensor for each state, got NoneType"),
        (lambda x, u, s: (x.h, u.h), "must return its 1 states h, got 2 tensors"),
    ],
)
def test_what_a_function_must_return(function, message):
    with pytest.raises(TypeError, match=message):
        str(of(function, name="odd"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gates": "fn"}, "gates must be a tuple of names, got the string 'fn'"),
        ({"gates": ()}, "a cell has at least one of gates"),
        ({"states": ()}, "a cell has at least one of states"),
        ({"gates": ("f", "f")}, "gates must be different names, got f, f"),
        ({"gates": ("for",)}, "gates must be names as Python's variables have, got 'for'"),
        ({"parameters": ("_p",)}, "parameters must be names that do not begin with _, got '_p'"),
        ({"parameters": ("p",), "inputs": ("p",)}, "p cannot be both a parameter and an input"),
    ],
)
def test_names(options, message):
    with pytest.raises(ValueError, match=message):
        of(lambda x, u, s: x.h, name="odd", **options)
