"""torch.compile, torch.func, double backward, opcheck: what the layer above the kernels promises."""

import contextlib
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import INPUTS, Case, make
from test_recurrence import RUNS, need
from test_torch_modules import tensors_of
from torch.multiprocessing.reductions import StorageWeakRef

import fusedrnn
from fusedrnn import _build, ops
from fusedrnn.autograd import RecurrenceFunction

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
    torch.library.opcheck(ops.sequence_op, ops.sequence_arguments(*args))


@pytest.mark.parametrize("needs", [[True] * 8, [False, True] * 4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_opcheck_sequence_backward(backend, algorithm, case, needs):
    need(backend)
    (cell, *rest), given = forward_args(case, backend, True)
    y, _, _, gates, cells = ops.sequence(cell, *rest)
    args = (cell, given["dy"], None, given["dc_n"], None, *rest[:11], y, gates, cells, *rest[11:13], needs)
    torch.library.opcheck(ops.sequence_backward_op, ops.sequence_backward_arguments(*args))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_raw_op_is_differentiable(backend, case):
    need(backend)
    args, _ = forward_args(case, backend, False)
    leaves = [t.requires_grad_() for t in args[1:9] if t is not None]
    y, finals, gates, every = ops.sequence_op(*ops.sequence_arguments(*args))
    assert gates.numel() == 0
    assert not every
    found = torch.autograd.grad(sum((t * t).sum() for t in (y, *finals)), leaves, create_graph=True)
    y, h_n, c_n, *_ = RecurrenceFunction.apply(*args[1:12], args[0], *args[12:14], False, False)
    want = torch.autograd.grad(sum((t * t).sum() for t in (y, h_n, c_n)), leaves, create_graph=True)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    second = [torch.autograd.grad(sum(g.sum() for g in grads), leaves[0])[0] for grads in (found, want)]
    torch.testing.assert_close(*second)


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


# What a plain call is computed by: one call of C++, with a backend asked for the way through Python.
DIRECT = [
    *((name + "Cell", {}, shape) for name in ("LSTM", "GRU", "RNN") for shape in ((3, 4), (4,))),
    ("RNNCell", {"nonlinearity": "relu", "bias": False}, (3, 4)),
    *((name, {}, (2, 3, 4)) for name in ("LSTM", "GRU", "RNN")),
    ("LSTM", {"proj_size": 2, "bias": False, "batch_first": True}, (3, 2, 4)),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}, (3, 2, 4)),
    ("GRU", {"num_layers": 2, "bidirectional": True, "bias": False}, (3, 2, 4)),
]


@pytest.fixture(params=["fusedrnn._direct", "fusedrnn._C"])
def calls(request, monkeypatch):
    """What takes calls past torch's dispatcher, with gradients or without."""
    found = {getattr(m, "__name__", ""): m for m in (_build._calls, _build._small_calls)}
    if request.param not in found:
        pytest.skip(
            f"calls by {request.param} are not tested here: it is not built, or not for torch {torch.__version__}"
        )
    monkeypatch.setattr(_build, "_calls", found[request.param])
    with torch.set_grad_enabled(request.param == "fusedrnn._direct"):
        yield request.param


@pytest.fixture
def recorded_calls(calls):
    """The same where gradients are on; those of fusedrnn._C are past the dispatcher where there is one sequence."""
    with torch.enable_grad():
        yield calls


def direct_pair(name, options, dtype=torch.float64):
    need("cpu")
    # Whoever asks for an algorithm goes through Python.
    plain, python = (getattr(fusedrnn, name)(4, 5, dtype=dtype, algorithm=a, **options) for a in (None, "persistent"))
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
def test_direct_call_equals_the_way_through_python(name, options, shape, dtype, calls):
    modules = direct_pair(name, options, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    leaves, hx = states_of(modules[0], x)
    assert (
        modules[0]._direct(x, *(leaves if name == "LSTMCell" else (hx, None) if "Cell" in name else (hx,))) is not None
    )
    for given in (hx, None):
        found = []
        for module in modules:
            with torch.enable_grad():
                outputs = flat(module(x, given))
            wanted = [x, *module.parameters(), *(leaves if given is not None else ())]
            found.append([*outputs, *torch.autograd.grad(outputs, wanted, [2 * y.detach() for y in outputs])])
            with torch.no_grad():
                found[-1] += flat(module(x, given))
            with torch.inference_mode():
                found[-1] += flat(module(x, given))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("name, options, shape", DIRECT)
def test_direct_call_is_differentiable_twice(name, options, shape, recorded_calls):
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


@pytest.mark.parametrize("name, options, shape", [DIRECT[0], *DIRECT[-3:-1]])
def test_direct_call_in_the_hands_of_autograd(name, options, shape, recorded_calls):
    module, python = direct_pair(name, options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if "num_layers" not in options:
        assert module._direct(x, *(None,) * (2 if "Cell" in name else 1)) is not None

    def first(m, a=x):
        return flat(m(a))[0]

    want = torch.autograd.grad(first(python).sum(), x)[0]
    y = first(module)
    for retain in (True, False):
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=retain)[0], want)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)
    # What was answered may change.
    found = [torch.autograd.grad(y.sum(), list(module.parameters())) for y in (first(module).mul_(2), first(module))]
    for changed, grad in zip(*found, strict=True):
        torch.testing.assert_close(changed, 2 * grad)
    # Only a state, only one of the weights.
    leaves, hx = states_of(module, x)
    for only in (lambda m: leaves[-1], lambda m: list(m.parameters())[-1]):
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


def test_direct_call_gives_way(calls):
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
    negative = torch._neg_view(x)
    assert module._direct(negative, None, None) is None
    torch.testing.assert_close(module(negative), module(-x))
    with torch.inference_mode():
        unsavable = x.clone()
    with torch.no_grad():
        assert module._direct(unsavable, None, None) is not None
    with torch.enable_grad():
        assert module._direct(x, None, None).grad_fn is not None
        assert module._direct(unsavable, None, None) is None
        assert module(unsavable).grad_fn is not None
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
    with torch.enable_grad():
        assert module(x).grad_fn is not None


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", [("LSTM", {}), ("LSTM", {"proj_size": 3}), ("GRU", {}), ("RNN", {})], ids=str)
def test_direct_call_under_autocast(calls, name, options, state):
    """To the bit what the way through Python gives, gradients included; once a weight is no parameter, that way."""
    module = getattr(fusedrnn, name)(4, 6, **options)
    x, hx = torch.randn(3, 2, 4), None
    if state is not None:
        hx = tuple(torch.randn(1, 2, n).to(state) for n in (options.get("proj_size", 6), 6)[: 1 + (name == "LSTM")])
        hx = hx if len(hx) > 1 else hx[0]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 2])
    for given, grad in ((x, False), (x, True) if calls == "fusedrnn._direct" else (packed, False)):
        found = []
        for way in (contextlib.nullcontext(), fusedrnn.functional.recording(lambda *_: None)):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), way:
                assert (module._direct(given, hx) is None) == bool(found)
                assert torch.is_autocast_enabled("cpu")
                found.append(tensors_of(module(given, hx)))
            if grad:
                module.zero_grad()
                sum(t.float().sum() for t in found[-1]).backward()
                found[-1] += [p.grad for p in module.parameters()]
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module._direct(x.as_subclass(type("Tagged", (torch.Tensor,), {})), hx) is None
        assert module._direct(x.double(), hx) is None
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        assert module._direct(x, hx) is None


def test_direct_call_gives_way_to_a_changed_layer(calls):
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


# torch.func over modules: name, options, shape of the input.
FUNC = [
    *((name + "Cell", {}, shape) for name in ("LSTM", "GRU", "RNN") for shape in ((3, 4), (4,))),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}, (3, 2, 4)),
    ("LSTM", {"recompute": True, "bias": False}, (2, 3, 4)),
    ("GRU", {"num_layers": 2, "bidirectional": True}, (2, 3, 4)),
    ("GRU", {"recompute": True}, (2, 4)),
    ("RNN", {"nonlinearity": "relu"}, (2, 3, 4)),
]


def func_of(name, options, backend=None):
    """A module, its parameters, and a function of (parameters, x, *states) that gives all outputs."""
    module = getattr(fusedrnn, name)(4, 5, dtype=torch.float64, backend=backend, **options)

    def call(weights, x, *states):
        hx = None if not states else states if len(states) > 1 else states[0]
        return tuple(flat(torch.func.functional_call(module, weights, (x, hx))))

    return module, {k: w.detach() for k, w in module.named_parameters()}, call


def looped(function, in_dims, *args):
    """What torch.func.vmap(function, in_dims) gives, by a loop."""
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    dims = torch.utils._pytree.tree_leaves(
        tuple(torch.utils._pytree.tree_map(lambda _, d=d: d, a) for a, d in zip(args, in_dims)),
        is_leaf=lambda d: d is None,
    )
    count = next(t.shape[d] for t, d in zip(leaves, dims) if d is not None)
    each = [
        function(*spec.unflatten([t if d is None else t.select(d, k) for t, d in zip(leaves, dims)]))
        for k in range(count)
    ]
    return torch.utils._pytree.tree_map(lambda *ts: torch.stack(ts), *each)


def assert_same(got, want):
    got, want = (torch.utils._pytree.tree_leaves(found) for found in (got, want))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def squared(call):
    return lambda *args: sum((y * y).sum() for y in call(*args))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name, options, shape", FUNC)
@pytest.mark.filterwarnings("error:.*performance drop.*")
def test_vmap(name, options, shape, backend):
    need(backend)
    module, weights, call = func_of(name, options, backend)
    x = torch.randn(2, *shape, dtype=torch.float64)
    # states_of takes a 2-D x for a cell's batch.
    unbatched_layer = "Cell" not in name and len(shape) == 2
    states = [] if unbatched_layer else [s.detach() for s in states_of(module, x[0])[0]]
    members = {k: torch.stack([w, 0.5 * w, -w]) for k, w in weights.items()}
    cases = [
        ((None, 0), (weights, x)),
        ((None, 1), (weights, x.movedim(0, 1))),
        ((0, None), (members, x[0])),
        ((0, 0), (members, torch.cat([x, x[:1] + 1]))),
    ]
    if states:
        some = [torch.stack([s, 2 * s], -1) for s in states]
        cases.append(((None, None, *(-1 for _ in some)), (weights, x[0], *some)))
        cases.append(((None, 0, *(None for _ in states)), (weights, x, *states)))
    for dims, args in cases:
        for function in (call, torch.func.grad(squared(call), argnums=(0, 1))):
            want = looped(function, dims, *args)
            assert_same(torch.func.vmap(function, dims)(*args), want)
            if function is call:
                with torch.no_grad():
                    assert_same(torch.func.vmap(function, dims)(*args), want)
    # The gradient of a map: by torch.func, and by autograd as in the training of an ensemble.
    mapped = squared(torch.func.vmap(call, (0, None)))
    want = torch.func.grad(squared(lambda *args: looped(call, (0, None), *args)), argnums=(0, 1))(members, x[0])
    assert_same(torch.func.grad(mapped, argnums=(0, 1))(members, x[0]), want)
    leaves = {k: w.clone().requires_grad_() for k, w in members.items()}
    point = x[0].clone().requires_grad_()
    got = torch.autograd.grad(mapped(leaves, point), [*leaves.values(), point])
    assert_same(got, [*want[0].values(), want[1]])
    # Two maps.
    twice = torch.func.vmap(torch.func.vmap(call, (None, 0)), (0, None))(members, x)
    assert_same(twice, looped(lambda m, a: looped(call, (None, 0), m, a), (0, None), members, x))


@pytest.mark.parametrize("name, options, shape", FUNC)
def test_jacobians_and_hessians(name, options, shape):
    """Forward mode and reverse mode, and one on the other, agree with torch.nn's reverse mode and with each other."""
    func = torch.func
    module, weights, call = func_of(name, options)
    theirs = getattr(torch.nn, name)(
        4, 5, dtype=torch.float64, **{k: o for k, o in options.items() if k != "recompute"}
    )
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    want = func.jacrev(lambda a: tuple(flat(theirs(a))), chunk_size=1)(x)
    for jacobian in (func.jacrev, func.jacfwd):
        assert_same(jacobian(lambda a: call(weights, a))(x), want)
    assert all(j.abs().max() > 0 for j in want)
    loss = squared(call)
    reverse = func.jacrev(func.jacrev(loss, argnums=1), argnums=1)(weights, x)
    assert reverse.abs().max() > 0
    for second in (
        func.jacfwd(func.jacrev(loss, argnums=1), argnums=1),
        func.jacrev(func.jacfwd(loss, argnums=1), argnums=1),
        func.jacfwd(func.jacfwd(loss, argnums=1), argnums=1),
    ):
        assert_same(second(weights, x), reverse)
    if "Cell" not in name and shape == (2, 3, 4):
        tangent = {k: torch.randn_like(w) for k, w in weights.items()}
        got = func.jvp(func.grad(loss), (weights, x), (tangent, torch.zeros_like(x)))[1]
        _, pullback = func.vjp(lambda w: func.grad(loss)(w, x), weights)
        assert_same(got, pullback(tangent)[0])  # a Hessian is symmetric


@pytest.mark.parametrize("wrt", ["x", "h0", "b_hh"])
def test_forward_mode_is_never_silently_zero(wrt):
    forward_ad = torch.autograd.forward_ad
    given = {"x": torch.randn(3, 2, 4), "h0": torch.randn(1, 2, 6)}
    gru = fusedrnn.GRU(4, 6).requires_grad_(False)
    weights = dict(gru.named_parameters())
    point = given.get(wrt, weights["bias_hh_l0"])

    def call(t):
        inputs = given | {wrt: t}
        changed = weights | ({"bias_hh_l0": t} if wrt == "b_hh" else {})
        return torch.func.functional_call(gru, changed, (inputs["x"], inputs["h0"]))[0]

    tangent = torch.randn_like(point)
    want = torch.autograd.functional.jvp(call, point, tangent)[1]  # by a double backward
    assert want.abs().max() > 0
    torch.testing.assert_close(torch.func.jvp(call, (point,), (tangent,))[1], want)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(call(forward_ad.make_dual(point, tangent)))
        torch.testing.assert_close(y.tangent, want)
        torch.testing.assert_close(y.primal, call(point))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("create_graph", [True, False])
def test_forward_mode_raises_where_it_does_not_reach(backend, create_graph):
    """The gradient of a layer that was called before, and the raw op."""
    need(backend or "reference")
    gru, x = fusedrnn.GRU(4, 6, backend=backend), torch.randn(3, 2, 4, requires_grad=True)
    y = gru(x)[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(y, x, dual, create_graph=create_graph)
        args = list(forward_args(CASES[0], backend or "reference", False)[0])
        x = args[1]
        args[1] = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="jvp"):
            ops.sequence(*args)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda a: ops.sequence(args[0], a, *args[2:]), (x,), (x,))


def test_raw_ops_without_the_extension():
    """The kernels in Python raise in the same places."""
    run = 'import sys, pytest; sys.modules["fusedrnn._C"] = None; sys.exit(pytest.main(sys.argv[1:]))'
    # Where nothing is compiled, torch's own op runs unless another is asked for.
    chosen = "(raw_op_is_differentiable or does_not_reach) and reference"
    done = subprocess.run(
        [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout, done.stdout


def test_vmap_over_packed_input_resets_and_every_state():
    lstm = fusedrnn.LSTM(4, 5, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    sizes = torch.tensor([3, 2, 2])

    def packed(a):
        y, states = lstm(torch.nn.utils.rnn.PackedSequence(a, sizes))
        return y.data, *states

    def grad(a):
        return torch.func.grad(lambda b: squared(packed)(b))(a)

    assert_same(torch.func.vmap(packed)(x), looped(packed, (0,), x))
    assert_same(torch.func.vmap(grad)(x), looped(grad, (0,), x))
    assert_same(torch.func.jacfwd(packed)(x[0]), torch.func.jacrev(packed)(x[0]))
    resets = torch.rand(3, 7, 1) < 0.4

    def every(a, mask):
        return tuple(flat(lstm(a[:, None], resets=mask, return_all_states=True)))

    def gradient(a, mask):
        return torch.func.grad(squared(every))(a, mask)

    for function in (every, gradient):
        for dims, args in (((0, 0), (x, resets)), ((0, None), (x, resets[0])), ((None, 0), (x[0], resets))):
            assert_same(torch.func.vmap(function, dims)(*args), looped(function, dims, *args))


def test_vmap_over_a_compiled_layer():
    layer, x = fusedrnn.GRU(4, 5), torch.randn(2, 3, 2, 4)
    got = torch.func.vmap(torch.compile(layer, backend="aot_eager"))(x)
    for a, b in zip(got, looped(layer, (0,), x), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_of_nothing():
    cell = fusedrnn.GRUCell(4, 5)
    assert torch.func.vmap(cell)(torch.zeros(2, 0, 4)).shape == (2, 0, 5)
    loss = torch.func.vmap(torch.func.grad(lambda w, x: torch.func.functional_call(cell, w, x).sum()), (None, 0))
    with pytest.raises(RuntimeError, match="over 0"):
        loss(dict(cell.named_parameters()), torch.zeros(0, 3, 4))


@pytest.mark.parametrize("name, options, shape", FUNC)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_is_checked_saved_and_good_for_another_batch(name, options, shape):
    module = getattr(fusedrnn, name)(4, 5, **options)
    traced, stream = torch.jit.trace(module, (torch.randn(shape),)), io.BytesIO()
    torch.jit.save(traced, stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    x = torch.randn(shape) if len(shape) < 2 else torch.randn(*shape[:-2], 7, 4)
    got, want = flat(loaded(x)), flat(module(x))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    parameters = dict(loaded.named_parameters())
    grads = torch.autograd.grad(got[0].sum(), [parameters[n] for n, _ in module.named_parameters()])
    for a, b in zip(grads, torch.autograd.grad(want[0].sum(), list(module.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_forward_mode_under_autocast():
    for name, shape in (("LSTMCell", (3, 4)), ("GRUCell", (3, 4)), ("GRU", (2, 3, 4))):
        module, x = getattr(fusedrnn, name)(4, 5), torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16):
            for y, dual in zip(flat(module(x)), flat(torch.func.jvp(lambda a, m=module: flat(m(a)), (x,), (x,))[0])):
                assert y.dtype == dual.dtype
                torch.testing.assert_close(y, dual, rtol=2e-2, atol=2e-2)


IN_PLACE = [
    ("LSTM", {}),
    ("GRU", {"batch_first": True}),
    ("GRU", {"bidirectional": True, "batch_first": True}),
    ("RNN", {"num_layers": 2}),
    ("LSTM", {"recompute": True}),
    ("GRU", {"recompute": True, "batch_first": True}),
]
ACCESS = {
    "dense": lambda m, x: m(x)[0],
    "unbatched": lambda m, x: m(x[:, 0])[0],
    "packed": lambda m, x: m(torch.nn.utils.rnn.pack_padded_sequence(x, [5, 3], enforce_sorted=False))[0].data,
    "resets": lambda m, x: m(x, resets=x.detach()[..., 0] > 0)[0],
    "lengths": lambda m, x: m(x, lengths=torch.arange(x.shape[0 if m.batch_first else 1]).clamp(max=2))[0],
}


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_is_mapped_over_what_comes_from_above(name, backend):
    """Nothing else is mapped, the states neither."""
    need(backend)
    layer = getattr(fusedrnn, name)(3, 4, backend=backend, algorithm="persistent" if backend == "cpu" else None)
    x = torch.randn(5, 2, 3, requires_grad=True)
    y = layer(x)[0]
    grads = torch.randn(3, *y.shape)
    one = lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    torch.testing.assert_close(torch.func.vmap(one)(grads), torch.stack([one(grad) for grad in grads]))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("name, options", IN_PLACE, ids=str)
def test_outputs_may_be_changed_in_place(name, options, access, backend):
    need(backend or "reference")
    # Whoever asks for an algorithm goes through Python.
    chosen = {"backend": backend, "algorithm": "persistent" if backend == "cpu" else None}
    layer = getattr(fusedrnn, name)(3, 4, **options, **chosen)
    x = torch.randn(5, 2, 3, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def gradients(y, way):
        if way == "batched":
            return torch.autograd.grad(y, wanted[0], torch.randn(3, *y.shape).fill_(0.5), is_grads_batched=True)
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=way == "twice")
        return first if way == "once" else torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)

    for way in ("once", "twice", "batched"):
        want = gradients(torch.relu(ACCESS[access](layer, x) * 2), way)
        y = ACCESS[access](layer, x)
        for a, b in zip(gradients(y.mul_(2).relu_(), way), want, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        (y := ACCESS[access](layer, x)).mul_(2)
    for outputs in (flat(layer(x)), [ACCESS[access](layer, x)]):
        for t in outputs:
            assert t.requires_grad
            assert not t.detach_().requires_grad


def test_outputs_changed_in_place_under_transforms_and_in_traces():
    layer = fusedrnn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    want = torch.func.grad(lambda a: torch.relu(layer(a)[0]).sum())(x)
    assert torch.equal(torch.func.grad(lambda a: torch.relu_(layer(a)[0]).sum())(x), want)
    program = torch.export.export(layer, (x,)).module()
    leaf = x.clone().requires_grad_()
    torch.relu_(program(leaf)[0]).sum().backward()
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_compiled_autograd(name):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd", reason="compiled autograd is not tested")
    torch._dynamo.reset()
    module = getattr(fusedrnn, name)(3, 4)
    x = torch.randn(2, 3) if name == "LSTMCell" else torch.randn(5, 2, 3)
    x.requires_grad_()

    def gradients(factor, change):
        y = flat(module(x))[0]
        y = y.mul_(factor) if change else y * factor
        return torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])

    # What was compiled where nobody changed y has to see that somebody does.
    for factor, change in ((1.0, False), (3.0, True), (2.0, False), (2.0, True)):
        want = gradients(factor, False)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            got = gradients(factor, change and name != "LSTMCell")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_saved_is_let_go_with_the_output():
    """Saved-tensor hooks see y, and what watches it keeps no memory."""
    layer, x = fusedrnn.GRU(3, 4), torch.randn(5, 2, 3)
    for algorithm in (None, "persistent"):
        layer.algorithm = algorithm
        seen = []

        def pack(t, seen=seen):
            seen.append(t.data_ptr())
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)[0]
        assert y.data_ptr() in seen
        memory = StorageWeakRef(y.untyped_storage())
        loss = y.sum()
        del y
        assert memory.expired()
        loss.backward()


@pytest.mark.parametrize("name, shape", [("LSTM", (5, 2, 3)), ("GRU", (5, 3)), ("RNNCell", (2, 3)), ("LSTMCell", (3,))])
def test_inference_tensors_train(name, shape):
    module = getattr(fusedrnn, name)(3, 4)
    with torch.inference_mode():
        x = torch.randn(shape)
        states = flat(module(x))[-1 if name in ("GRU", "RNNCell") else -2 :]
    hx = tuple(states) if len(states) > 1 else states[0]
    for given in (None, hx):
        got = torch.autograd.grad(flat(module(x, given))[0].sum(), list(module.parameters()))
        plain = tuple(s.clone() for s in given) if isinstance(given, tuple) else given is not None and given.clone()
        want = torch.autograd.grad(
            flat(module(x.clone(), None if plain is False else plain))[0].sum(), list(module.parameters())
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


class Packing(torch.nn.Module):
    def __init__(self, name, **options):
        super().__init__()
        self.rnn = getattr(fusedrnn, name)(3, 4, **options)

    def forward(self, x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, states = self.rnn(packed)
        return torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0], *flat([states])


@pytest.mark.parametrize("name, options", [("GRU", {}), ("LSTM", {"bidirectional": True, "num_layers": 2})])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore::torch.jit.TracerWarning:torch")
def test_jit_trace_of_packed_input_is_not_frozen_to_the_example(name, options):
    model = Packing(name, **options)
    traced = torch.jit.trace(model, (torch.randn(2, 5, 3), torch.tensor([3, 5])))
    for x, lengths in ((torch.randn(4, 7, 3), [2, 7, 1, 6]), (torch.randn(1, 2, 3), [2])):
        found = [run(x, torch.tensor(lengths)) for run in (traced, model)]
        grads = [torch.autograd.grad(y.sin().sum(), list(model.parameters())) for y, *_ in found]
        for a, b in zip((*found[0], *grads[0]), (*found[1], *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, options, shape", FUNC)
def test_make_fx_keeps_sizes_open(name, options, shape):
    module = getattr(fusedrnn, name)(4, 5, **options)
    weights = dict(module.named_parameters())
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    call = lambda weights, x: torch.func.functional_call(module, weights, x)
    traced = make_fx(call, tracing_mode="symbolic")(weights, torch.randn(shape))
    assert any(node.target is ops.sequence_op for node in traced.graph.nodes)
    x = torch.randn(shape) if len(shape) < 2 else torch.randn(*shape[:-2], 7, 4)
    for a, b in zip(flat(traced(weights, x)), flat(module(x)), strict=True):
        torch.testing.assert_close(a, b)


LOWERED = [
    ("LSTM", {}, None, torch.float32),
    ("LSTM", {"proj_size": 2, "bias": False}, None, torch.bfloat16),
    ("LSTM", {"bidirectional": True}, "resets", torch.float64),
    ("GRU", {"bidirectional": True, "num_layers": 2}, "lengths", torch.float32),
    ("RNN", {"nonlinearity": "relu"}, "lengths", torch.float64),
    ("LSTM", {"return_all_states": True}, None, torch.float32),
]


@pytest.mark.parametrize(
    "name, options, given, dtype, dynamic", [*((*case, True) for case in LOWERED), (*LOWERED[2], False)], ids=str
)
def test_a_program_in_operations_of_torch_alone(name, options, given, dtype, dynamic):
    options = dict(options)
    call = {"return_all_states": True} if options.pop("return_all_states", False) else {}
    layer = getattr(fusedrnn, name)(3, 4, dtype=dtype, **options).eval()

    def inputs(steps, batch):
        of = {"resets": torch.rand(steps, batch) < 0.3, "lengths": torch.randint(0, steps + 1, (batch,))}
        return torch.randn(steps, batch, 3, dtype=dtype), call | ({given: of[given]} if given else {})

    open_size, (x, keywords) = torch.export.Dim.DYNAMIC, inputs(5, 2)
    dims = {"resets": {0: open_size, 1: open_size}, "lengths": {0: open_size}}
    shapes = {"input": {0: open_size, 1: open_size}} | {k: dims.get(k) for k in keywords}
    program = torch.export.export(layer, (x,), keywords, dynamic_shapes=shapes if dynamic else None)
    table = torch.export.default_decompositions() if dynamic else {}
    table.update(fusedrnn.decompositions())
    lowered = program.run_decompositions(table)
    called = {str(n.target) for n in lowered.graph.nodes if n.op == "call_function"}
    assert not any("fusedrnn" in target for target in called)
    assert ("scan" in called) == dynamic
    for steps, batch in ((5, 2), (9, 3), (2, 2)) if dynamic else ((5, 2),):
        x, keywords = inputs(steps, batch)
        with fusedrnn.backend("reference"):
            want = flat(layer(x, **keywords))
        for a, b in zip(flat(lowered.module()(x, **keywords)), want, strict=True):
            torch.testing.assert_close(a, b)
