"""GRU, RNN and the three cells beside torch.nn's: results, gradients, parameters, errors, convert, special values."""

import copy
import itertools
import pickle

import pytest
import torch
from problems import Case, make, run
from test_recurrence import RUNS, device_of, need
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

LAYERS = [("GRU", {}), ("RNN", {"nonlinearity": "tanh"}), ("RNN", {"nonlinearity": "relu"})]
CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
COMBINATIONS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for layers, bias, batch_first, bidirectional in itertools.product(
        (1, 2), (True, False), (False, True), (False, True)
    )
]


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch.nn's and ours, initialised from the same seed."""
    made = []
    for package in (nn, fusedrnn):
        torch.manual_seed(5)
        made.append(getattr(package, name)(*args, **kwargs))
    return tuple(made)


def leaf(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(f"{k}{int(v)}" for k, v in o.items()))
@pytest.mark.parametrize("name, extra", LAYERS, ids=str)
def test_all_arguments_in_combination(name, extra, options):
    theirs, ours = pair(name, 5, 7, dtype=torch.float64, **options, **extra)
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    lead = options["num_layers"] * (2 if options["bidirectional"] else 1)
    batch = 3 if options["batch_first"] else 4

    def outputs(module, x, hx, lengths):
        given = x if lengths is None else pack_padded_sequence(x, lengths, options["batch_first"], enforce_sorted=False)
        y, h = module(given, hx)
        return [y if lengths is None else y.data, h]

    for x, hx, lengths in (
        (leaf(3, 4, 5), None, None),
        (leaf(3, 4, 5), leaf(lead, batch, 7), None),
        (leaf(4, 5), leaf(lead, 7), None),
        (leaf(3, 4, 5), leaf(lead, batch, 7), [2, 3, 1][:batch] + [1] * (batch - 3)),
    ):
        got, want = outputs(ours, x, hx, lengths), outputs(theirs, x, hx, lengths)
        leaves = [t for t in (x, hx) if t is not None]
        got += torch.autograd.grad([t.sin().sum() for t in got], [*leaves, *ours.parameters()])
        want += torch.autograd.grad([t.sin().sum() for t in want], [*leaves, *theirs.parameters()])
        for p, q in zip(got, want, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name, extra", LAYERS, ids=str)
def test_copies_and_pickles(name, extra):
    _, ours = pair(name, 3, 4, num_layers=2, **extra)
    x = torch.randn(2, 3, 3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x)[0], ours(x)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name, extra", CELLS, ids=str)
def test_cells(name, extra, bias):
    theirs, ours = pair(name, 5, 7, bias, dtype=torch.float64, **extra)
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    two = name == "LSTMCell"

    for x, state in ((leaf(3, 5), None), (leaf(3, 5), leaf(3, 7)), (leaf(5), leaf(7)), (leaf(0, 5), leaf(0, 7))):
        hx = state if state is None or not two else (state, state.detach() * 2)
        leaves = [t for t in (x, state) if t is not None]
        found = []
        for module in (ours, theirs):
            outputs = module(x, hx)
            outputs = list(outputs) if two else [outputs]
            found.append(
                outputs + list(torch.autograd.grad([t.sin().sum() for t in outputs], [*leaves, *module.parameters()]))
            )
        for p, q in zip(*found, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


ERRORS = [
    ((3, 9), (3, 20)),
    ((3, 10), (3, 21)),
    ((3, 10), (5, 20)),
    ((10,), (1, 20)),
    ((3, 1, 10), (3, 20)),
    ((3, 10), (3, 1, 20)),
    ((3, 10), (4,)),
]


@pytest.mark.parametrize("shape, state", ERRORS, ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_errors_of_cells_are_torchs(name, shape, state):
    raised = []
    for module in pair(name, 10, 20):
        h = torch.zeros(state)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            module(torch.zeros(shape), (h, h) if name == "LSTMCell" else h)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_a_nonlinearity_that_does_not_exist():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        fusedrnn.RNN(3, 4, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        fusedrnn.RNNCell(3, 4, nonlinearity="gelu")(torch.zeros(1, 3))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name, extra", CELLS, ids=str)
def test_a_cell_on_a_gpu_is_one_step(name, extra, backend):
    need(backend)
    cell = getattr(fusedrnn, name)(5, 8, device=device_of(backend), backend=backend, **extra)
    assert fusedrnn.plan(cell, 3).algorithm == "step"
    x = torch.randn(3, 5, device=device_of(backend))
    with fusedrnn.backend("reference"):
        want = cell(x)
    torch.testing.assert_close(cell(x), want)


@pytest.mark.parametrize("name", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_compiles_without_a_break(name):
    ours = getattr(fusedrnn, name)(4, 5)
    x = torch.randn(3, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def test_convert_and_revert_all_six():
    model = nn.ModuleDict(
        {name: getattr(nn, name)(3, 4) for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")}
    )
    model["relu"] = nn.RNN(3, 4, nonlinearity="relu")
    parameters = dict(model.named_parameters())
    x, want = torch.randn(2, 3), {}
    for name, module in model.items():
        want[name] = module(x)
    fusedrnn.convert(model)
    for name, module in model.items():
        assert type(module) is getattr(fusedrnn, name if name != "relu" else "RNN")
        torch.testing.assert_close(module(x), want[name])
    assert all(p is parameters[name] for name, p in model.named_parameters())
    fusedrnn.revert(model)
    for name, module in model.items():
        assert type(module) is getattr(nn, name if name != "relu" else "RNN")
        assert torch.equal(module(x)[0], want[name][0])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("where", ["x", "h0"])
@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_special_values_are_torchs(backend, algorithm, cell, where, value):
    """inf saturates a gate, NaN stays in its row; a part that a sum does not have makes no NaN."""
    need(backend)
    case = Case(T=3, B=3, I=5, H=7)
    given = make(case, torch.float32, device_of(backend), cell=cell)
    given[where][..., 1, 2] = value
    module = getattr(nn, "GRU" if cell == "gru" else "RNN")(
        5, 7, **({} if cell == "gru" else {"nonlinearity": cell[4:]})
    )
    for p, name in zip(module.parameters(), ("w_ih", "w_hh", "b_ih", "b_hh"), strict=True):
        p.data = given[name].cpu()
    want, _ = module(given["x"].cpu(), given["h0"].cpu()[None])
    got = run(case, given, backend, algorithm, cell, wrt=())["y"]
    torch.testing.assert_close(got.cpu(), want, equal_nan=True, rtol=1e-5, atol=1e-6)
