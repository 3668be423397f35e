"""torch.compile, double backward, opcheck: what the autograd layer and the fake kernels promise."""

import pytest
import torch
from problems import INPUTS, Case, make
from test_recurrence import RUNS, need

import fusedrnn
from fusedrnn import ops

testing = pytest.importorskip("torch._dynamo.testing", reason="torch.compile is not tested: no Dynamo")


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 3, "bias": False}])
def test_compile_fullgraph_once_for_every_length(options):
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager")
    module = fusedrnn.LSTM(5, 8, **options)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps in (3, 7, 20, 1):
        x = torch.randn(steps, 2, 5)
        results = []
        for run in (compiled, module):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            if steps == 1:
                torch._dynamo.maybe_mark_dynamic(leaf, 0)
            y, (h, c) = run(leaf)
            (y.sin().sum() + h.cos().sum() + c.sum()).backward()
            results.append([y, h, c, leaf.grad, *(p.grad.clone() for p in module.parameters())])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
        if steps == 20:
            assert counter.frame_count == 1


def test_compile_without_grad_and_with_states():
    torch._dynamo.reset()
    module = fusedrnn.LSTM(5, 8, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(2, 6, 5), (torch.randn(1, 2, 8), torch.randn(1, 2, 8))
    with torch.no_grad():
        for a, b in zip((compiled(x, hx)[0], *compiled(x, hx)[1]), (module(x, hx)[0], *module(x, hx)[1])):
            assert torch.equal(a, b)


def test_compile_inside_a_model_has_no_graph_break():
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 5)
            self.lstm = fusedrnn.LSTM(5, 8, num_layers=2)
            self.head = torch.nn.Linear(8, 11)

        def forward(self, tokens):
            return self.head(self.lstm(self.embedding(tokens))[0])

    model, tokens = Model(), torch.randint(0, 11, (6, 3))
    explained = torch._dynamo.explain(model)(tokens)
    assert explained.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize("backend, algorithm", [r for r in RUNS if r[1] != "persistent"])  # no float64 there
def test_double_backward_reaches_every_input(backend, algorithm):
    need(backend, torch.float64)
    theirs = torch.nn.LSTM(3, 4, dtype=torch.float64)
    ours = fusedrnn.LSTM(3, 4, dtype=torch.float64, backend=backend, algorithm=algorithm)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf)[0].pow(2).sum(), leaf, create_graph=True)
        penalty = (grad.norm(dim=-1) - 1).pow(2).sum()
        found.append(torch.autograd.grad(penalty, [leaf, *module.parameters()]))
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_third_derivative():
    lstm = fusedrnn.LSTM(2, 2, dtype=torch.float64)
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    value = lstm(x)[0].sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.pow(2).sum()
    (third,) = torch.autograd.grad(value, x)
    assert third.abs().max() > 0
    theirs = torch.nn.LSTM(2, 2, dtype=torch.float64)
    theirs.load_state_dict(lstm.state_dict())
    value = theirs(x)[0].sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.pow(2).sum()
    torch.testing.assert_close(third, torch.autograd.grad(value, x)[0])


CASES = [Case(T=3, B=2, I=4, H=5), Case(T=3, B=2, I=4, H=5, proj=2, bias=False, lengths=(3, 2), reverse=True)]


def forward_args(case: Case, backend: str, save: bool):
    given = make(case, torch.float32)
    tensors = [given.get(name) for name in INPUTS]
    return ("lstm", *tensors, case.batch_sizes(), None, case.reverse, backend, "auto", save, save), given


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_opcheck_sequence(backend, algorithm, case, save):
    need(backend)
    args, _ = forward_args(case, backend, save)
    torch.library.opcheck(ops.sequence, args)


@pytest.mark.parametrize("needs", [[True] * 8, [False, True] * 4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_opcheck_sequence_backward(backend, algorithm, case, needs):
    need(backend)
    (cell, *rest), given = forward_args(case, backend, True)
    y, _, _, gates, cells = ops.sequence(cell, *rest)
    args = (cell, given["dy"], None, given["dc_n"], None, *rest[:11], y, gates, cells, *rest[11:13], needs)
    torch.library.opcheck(ops.sequence_backward, args)


def test_raw_op_under_autograd_raises():
    args, given = forward_args(CASES[0], "reference", True)
    given["x"].requires_grad_()
    y = ops.sequence(*args)[0]
    with pytest.raises(NotImplementedError, match="not differentiable"):
        y.sum().backward()


def test_backward_keeps_the_choice_of_forward():
    lstm = fusedrnn.LSTM(3, 4)
    x = torch.randn(2, 2, 3, requires_grad=True)
    with fusedrnn.backend("reference"):
        y = lstm(x)[0]
    assert y.grad_fn.next_functions  # the graph outlives the context
    seen = []
    original = ops.importlib.import_module

    def spy(name):
        seen.append(name)
        return original(name)

    ops.importlib.import_module, keep = spy, original
    try:
        y.sum().backward()
    finally:
        ops.importlib.import_module = keep
    assert seen == ["fusedrnn.backends.reference"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backward_under_autocast_is_that_of_the_forward(backend):
    need(backend)
    lstm = fusedrnn.LSTM(4, 6, backend=backend)
    x = torch.randn(3, 2, 4, requires_grad=True)
    y = lstm(x)[0]
    want = torch.autograd.grad(y.sum(), [x, *lstm.parameters()], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), [x, *lstm.parameters()])
    for a, b in zip(want, got):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_raises_and_is_never_silently_zero(frozen):
    lstm = fusedrnn.LSTM(4, 6).requires_grad_(not frozen)
    x = torch.randn(3, 2, 4)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda a: lstm(a)[0], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        lstm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
