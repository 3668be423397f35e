"""GRU, RNN and the three cells beside torch.nn's: results, gradients, parameters, errors, convert, special values."""

import copy
import itertools
import pickle

import pytest
import torch
from problems import INPUTS, Case, make, run, widened
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


@pytest.mark.parametrize("name, extra", CELLS, ids=str)
def test_a_cell_call_is_one_launch_on_triton(name, extra):
    need("triton")
    from fusedrnn.backends import triton

    device = device_of("triton")
    cell = getattr(fusedrnn, name)(5, 8, device=device, backend="triton", **extra)
    x = torch.randn(3, 5, device=device)
    for grad in (False, True):
        triton.launches.clear()
        with torch.set_grad_enabled(grad):
            outputs = cell(x)
        assert triton.launches == {"step_forward_kernel": 1}
    triton.launches.clear()
    (outputs[0] if name == "LSTMCell" else outputs).sum().backward()
    assert triton.launches == {"step_backward_kernel": 1}


@pytest.mark.parametrize("name, extra", CELLS, ids=str)
def test_a_cell_call_is_one_launch_on_cuda(name, extra, monkeypatch):
    need("cuda")
    from fusedrnn.backends import cuda

    device, called = device_of("cuda"), []
    launch = cuda._Kernels.launch
    monkeypatch.setattr(
        cuda._Kernels, "launch", lambda self, kind, *rest: called.append(kind) or launch(self, kind, *rest)
    )
    cell = getattr(fusedrnn, name)(5, 8, device=device, backend="cuda", **extra)
    x = torch.randn(3, 5, device=device)
    simulator = cuda._simulated().simulator if device == "cpu" else None

    def launches_of(work) -> list[str]:
        """The names of the host's calls; each is one launch, which the simulator counts."""
        called.clear()
        if simulator is not None:
            simulator.reset_counters()
        result.append(work())
        assert simulator is None or simulator.counters()["launches"] == len(called)
        return list(called)

    result = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert launches_of(lambda: cell(x)) == ["step_forward"]
    y = result[-1][0] if name == "LSTMCell" else result[-1]
    assert launches_of(lambda: y.sum().backward()) == ["step_backward"]


@pytest.mark.parametrize("name", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_compiles_without_a_break(name):
    ours = getattr(fusedrnn, name)(4, 5)
    x = torch.randn(3, 4)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


SPECIAL = [float("inf"), -float("inf"), float("nan"), 1e4, 1e30, -1e30]
PLACES = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
MODULES = {"lstm": ("LSTM", {}), "gru": ("GRU", {})} | {
    f"rnn_{kind}": ("RNN", {"nonlinearity": kind}) for kind in ("tanh", "relu")
}


def torchs(case: Case, given: dict[str, torch.Tensor], cell: str) -> dict[str, torch.Tensor]:
    """What problems.run returns, by torch.nn."""
    name, options = MODULES[cell]
    module = getattr(nn, name)(case.I, case.H, dtype=given["x"].dtype, **options)
    leaves = {key: given[key].detach().cpu().requires_grad_() for key in INPUTS if key in given}
    with torch.no_grad():
        for p, key in zip(module.parameters(), ("w_ih", "w_hh", "b_ih", "b_hh"), strict=True):
            p.copy_(leaves[key])
            leaves[key] = p
    states = [leaves[key][None] for key in ("h0", "c0") if key in leaves]
    y, finals = module(leaves["x"], tuple(states) if cell == "lstm" else states[0])
    outputs = [y, *(t[0] for t in (finals if cell == "lstm" else (finals,)))]
    names = ("y", "h_n", "c_n")[: len(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), [given[f"d{name}"].cpu() for name in names])
    return dict(zip(names, (t.detach() for t in outputs))) | {f"d{key}": g for key, g in zip(leaves, grads)}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_special_values_are_torchs(backend, algorithm, cell, where):
    """Outputs and all gradients: NaN and infinities stand where torch.nn has them, and nowhere else."""
    need(backend)
    case = Case(T=3, B=3, I=5, H=7)
    if where not in make(case, torch.float32, cell=cell):
        return
    for value in SPECIAL if backend in ("reference", "cpu") or where == "x" else SPECIAL[:3]:
        given = make(case, torch.float32, device_of(backend), cell=cell)
        given[where].view(-1)[12 % given[where].numel()] = value
        want = torchs(case, given, cell)
        got = run(case, given, backend, algorithm, cell)
        for name, t in want.items():
            torch.testing.assert_close(
                got[name].cpu(), t, equal_nan=True, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, v=value: f"{n} {v}: {m}"
            )


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_saturated_inputs_make_no_nan(backend, cell):
    need(backend)
    case = Case(T=4, B=3, I=5, H=7)
    for value in (1e4, 1e30):
        for dtype in (torch.float32, torch.float64):
            given = make(case, dtype, cell=cell)
            given["x"] *= value
            got, want = run(case, given, backend, cell=cell), torchs(case, given, cell)
            for name, t in want.items():
                assert torch.equal(got[name].isfinite(), t.isfinite()), name
                scale = t[t.isfinite()].abs().max().item()
                tight = 1e-4 if dtype == torch.float32 else 1e-11
                torch.testing.assert_close(got[name], t, rtol=tight, atol=tight * min(scale, 1e30))
            assert cell == "rnn_relu" or all(t.isfinite().all() for t in got.values())


LONG = Case(T=20_000, B=2, I=3, H=6)


@pytest.mark.parametrize("cell", MODULES)
def test_20000_steps_in_float32(cell):
    need("cpu")
    given = make(LONG, torch.float32, cell=cell)
    found, exact = run(LONG, given, "cpu", cell=cell), run(LONG, widened(given), "cpu", cell=cell)
    # Roundings of a sum of so many terms, one after the other, add up like the steps of a random walk.
    allowed = torch.finfo(torch.float32).eps * LONG.T**0.5
    for name, t in exact.items():
        assert t.abs().max() > 0, name
        assert (found[name] - t).abs().max() <= allowed * t.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_20000_steps_beside_torch(backend, cell):
    """float32, forward and backward, is as near to torch.nn in float64 as torch.nn in float32 is."""
    need(backend)
    given = make(LONG, torch.float32, cell=cell)
    exact, theirs = torchs(LONG, widened(given), cell), torchs(LONG, given, cell)
    ours = run(LONG, given, backend, cell=cell)
    for name, t in exact.items():
        assert ours[name].isfinite().all(), name
        assert t.abs().max() > 0, name
        error, allowed = ((found[name] - t).abs().max().item() for found in (ours, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * t.abs().max().item(), name
