"""torch.compile, double backward, opcheck: what the autograd layer and the fake kernels promise."""

from concurrent.futures import ThreadPoolExecutor

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


# What a plain call is computed by: one call of C++, with a backend asked for the way through Python.
DIRECT = [
    *((name + "Cell", {}, shape) for name in ("LSTM", "GRU", "RNN") for shape in ((3, 4), (4,))),
    ("RNNCell", {"nonlinearity": "relu", "bias": False}, (3, 4)),
    *((name, {}, (2, 3, 4)) for name in ("LSTM", "GRU", "RNN")),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}, (3, 2, 4)),
    ("GRU", {"num_layers": 2, "bidirectional": True, "bias": False}, (3, 2, 4)),
]


def direct_pair(name, options, dtype=torch.float64):
    need("cpu")
    plain, python = (getattr(fusedrnn, name)(4, 5, dtype=dtype, backend=b, **options) for b in (None, "cpu"))
    python.load_state_dict(plain.state_dict())
    return plain, python


def states_of(module, x):
    """h0 (and c0) that fit, with gradients."""
    lead = (x.shape[0],) if x.dim() == 2 else ()
    if x.dim() == 3:
        batch = x.shape[0 if module.batch_first else 1]
        lead = (module.num_layers * (2 if module.bidirectional else 1), batch)
    sizes = (getattr(module, "proj_size", 0) or 5, 5)[: 2 if module.mode == "LSTM" else 1]
    states = [torch.randn(*lead, size, dtype=x.dtype, requires_grad=True) for size in sizes]
    return (states, tuple(states)) if len(states) > 1 else (states, states[0])


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else [t for r in results for t in flat(r)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, options, shape", DIRECT)
def test_direct_call_equals_the_way_through_python(name, options, shape, dtype):
    modules = direct_pair(name, options, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    leaves, hx = states_of(modules[0], x)
    assert (
        modules[0]._direct(x, *(leaves if name == "LSTMCell" else (hx, None) if "Cell" in name else (hx,))) is not None
    )
    for given in (hx, None):
        found = []
        for module in modules:
            outputs = flat(module(x, given))
            wanted = [x, *module.parameters(), *(leaves if given is not None else ())]
            found.append([*outputs, *torch.autograd.grad(sum((y * y).sum() for y in outputs), wanted)])
            with torch.no_grad():
                found[-1] += flat(module(x, given))
            with torch.inference_mode():
                found[-1] += flat(module(x, given))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("name, options, shape", DIRECT)
def test_direct_call_is_differentiable_twice(name, options, shape):
    modules = direct_pair(name, options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves, hx = states_of(modules[0], x)
    found = []
    for module in modules:
        wanted = [x, *leaves, *module.parameters()]
        first = torch.autograd.grad(sum(y.pow(3).sum() for y in flat(module(x, hx))), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, options, shape", [DIRECT[0], DIRECT[-2]])
def test_direct_call_in_the_hands_of_autograd(name, options, shape):
    module, python = direct_pair(name, options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def first(m, a=x):
        return flat(m(a))[0]

    want = torch.autograd.grad(first(python).sum(), x)[0]
    y = first(module)
    for retain in (True, False):
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=retain)[0], want)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)
    # Only a state, only a bias, nothing of the weights.
    leaves, hx = states_of(module, x)
    bias = "bias_hh" if "Cell" in name else "bias_hh_l0"
    for only in (lambda m: leaves[-1], lambda m: m.get_parameter(bias)):
        found = [torch.autograd.grad(flat(m(x, hx))[0].sum(), only(m))[0] for m in (module, python)]
        assert torch.equal(*found)
        assert found[0].abs().max() > 0
    # Every saved tensor passes the hooks.
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        y = first(module)
    assert len(seen) > 4
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    # What is saved may not change.
    y = first(module)
    with torch.no_grad():
        next(module.parameters()).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # A batch of gradients.
    y, other = first(module), first(python)
    grads = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = torch.autograd.grad(y, x, grads, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.autograd.grad(other, x, grads, is_grads_batched=True)[0])
    # Transforms, whose tensors are not plain.
    want = torch.autograd.grad(first(python).sum(), x)[0]
    _, pullback = torch.func.vjp(lambda a: first(module, a), x.detach())
    torch.testing.assert_close(pullback(torch.ones_like(y))[0], want)


def test_direct_call_gives_way():
    """To subclasses, modes, autocast, parametrizations and whatever does not fit."""
    module, _ = direct_pair("GRUCell", {}, torch.float32)
    x = torch.randn(3, 4)

    class Tagged(torch.Tensor):
        pass

    assert module._direct(x, None, None) is not None
    tagged = x.as_subclass(Tagged)
    assert module._direct(tagged, None, None) is None
    assert isinstance(module(tagged), Tagged)
    for bad in (x.double(), x[:, :3], x[None, None], x.to_sparse(), x.to("meta"), x[:0], None, 1):
        assert module._direct(bad, None, None) is None
        assert module._direct(x, bad, None) is None or bad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert module._direct(x, None, None) is None
    with fusedrnn.backend("reference"):
        assert module._direct(x, None, None) is None
    with torch.device("cpu"):
        assert module._direct(x, None, None) is None
    with torch._subclasses.FakeTensorMode():
        assert module._direct(x, None, None) is None
    with fusedrnn.functional.recording(lambda *_: None):
        assert module._direct(x, None, None) is None
    inside = []
    torch.func.vmap(lambda row: inside.append(module._direct(row, None, None)) or row)(x)
    assert inside == [None]
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    assert module._direct(x, None, None) is None
    assert module(x).grad_fn is not None


def test_direct_call_gives_way_to_a_changed_layer():
    module, _ = direct_pair("GRU", {}, torch.float32)
    x = torch.randn(3, 2, 4)
    module.num_layers = 0
    assert module._direct(x, None) is None
    module.num_layers = 1
    assert module._direct(x, None) is not None
    module.bias_ih_l0 = None
    assert module._direct(x, None) is None
    with pytest.raises(TypeError, match=r"weights\[2\] must be a Tensor, got NoneType"):
        module(x)


def test_direct_call_on_many_threads():
    module, _ = direct_pair("LSTM", {})
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def gradient(k):
        leaf = (x * k).requires_grad_()
        return torch.autograd.grad(module(leaf)[0].sum(), leaf)[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradient, range(20)))
    for k, grad in enumerate(found):
        assert torch.equal(grad, gradient(k))
