"""fusedrnn.Layer of cells of one's own, against a loop of their functions in float64."""

import contextlib
import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import fusedrnn
from fusedrnn import _build, compiled, ops, planning, printing, remembered, zoo
from fusedrnn.definition import Definition

ZOO = {name: value for name, value in vars(zoo).items() if isinstance(value, Definition)}
OFTEN = ("mgu", "slstm")
pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")


def slow_but(names, often=OFTEN):
    return [pytest.param(name, marks=[] if name in often else [pytest.mark.slow]) for name in names]


def loop(layer, x, hx=None, resets=None, **inputs):
    """What a layer computes for x [T, B, I], by the function of its cell: y and the final states, [L*D, B, H] each."""
    H, heads = layer.hidden_size, layer.heads
    names, directions = layer.cell.states, 2 if layer.bidirectional else 1
    finals = []
    for k in range(layer.num_layers):
        ys = []
        for d in range(directions):
            suffix = f"_l{k}{'_reverse' if d else ''}"
            w_ih, w_hh = (getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh"))
            b_ih, b_hh = (getattr(layer, name + suffix) if layer.bias else 0.0 for name in ("bias_ih", "bias_hh"))
            parameters = [getattr(layer, p + suffix) for p in layer.cell.parameters]
            at = k * directions + d
            states = [x.new_zeros(x.shape[1], H) if hx is None else hx[s][at] for s in range(len(names))]
            out = [None] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                if resets is not None:
                    shifted = resets if not d else torch.cat([resets[1:], torch.zeros_like(resets[:1])])
                    states = [torch.where(shifted[t][:, None], 0.0, s) for s in states]
                blocks = states[0].unflatten(1, (heads, -1))
                w = w_hh.view(-1, heads, H // heads, H // heads)
                u = torch.einsum("bnp,gnup->bgnu", blocks, w).flatten(1) + b_hh
                given = [(i[at] if i.dim() == 4 else i)[t] for i in inputs.values()]
                xs, us = (x[t] @ w_ih.t() + b_ih).split(H, 1), u.split(H, 1)
                states = list(layer.cell.step(xs, us, states, parameters, given))
                out[t] = states[0]
            ys.append(torch.stack(out))
            finals.append(states)
        x = torch.cat(ys, -1)
    return x, tuple(torch.stack(s) for s in zip(*finals))


def inputs_of(cell, *shape, dtype=torch.float32):
    return {name: torch.rand(*shape, dtype=dtype) for name in cell.inputs}


def states_of(cell, lead, B, H, dtype):
    found = [torch.randn(lead, B, H, dtype=dtype) for _ in cell.states]
    if cell.name == "slstm":
        found[2] = found[2].abs() + 1
    return found


class SlopesOf(TorchFunctionMode):
    """Gives torch.relu of each step the slope that ``y`` [T, B, H] says: a sum near 0 has either."""

    def __init__(self, y):
        super().__init__()
        self.steps = iter((y > 0).double())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] * next(self.steps) if function is torch.relu else function(*args, **(kwargs or {}))


def flat(y, finals, wanted):
    """A loss through y and the final states that have a gradient."""
    return sum((t.double() * w).sum() for t, w in zip((y, *finals), wanted) if t.requires_grad)


def check(name, dtype, backend, H=10, heads=1, T=4, B=3, I=5, bidirectional=True, num_layers=1, reset=False, **options):
    torch.manual_seed(1)
    cell = ZOO[name]
    layer = fusedrnn.Layer(
        cell, I, H, num_layers, bidirectional=bidirectional, heads=heads, dtype=dtype, backend=backend, **options
    )
    exact = copy.deepcopy(layer).double()
    lead = num_layers * (2 if bidirectional else 1)
    x, hx = torch.randn(T, B, I, dtype=dtype), states_of(cell, lead, B, H, dtype)
    inputs = inputs_of(cell, T, B, H, dtype=dtype)
    resets = torch.rand(T, B) < 0.3 if reset else None
    answers = []
    for run, to in ((layer, dtype), (lambda x, hx, **given: loop(exact, x, hx, **given), torch.float64)):
        given = [t.to(to).requires_grad_() for t in (x, *hx, *inputs.values())]
        named = dict(zip(inputs, given[1 + len(hx) :]))
        states = tuple(given[1 : 1 + len(hx)])
        if run is layer:
            y, finals = layer(given[0], states if len(states) > 1 else states[0], resets=resets, **named)
            finals = finals if isinstance(finals, tuple) else (finals,)
        else:
            in_16_bits = name == "rnn_relu" and dtype.itemsize == 2
            with SlopesOf(answers[0][0]) if in_16_bits else contextlib.nullcontext():
                y, finals = run(given[0], states, resets=resets, **named)
        if not answers:
            wanted = [torch.randn(t.shape, dtype=torch.float64) for t in (y, *finals)]
            if cell.name == "slstm":
                wanted[-1].zero_()
        weights = list((layer if run is layer else exact).parameters())
        grads = torch.autograd.grad(flat(y, finals, wanted), [*given, *weights], allow_unused=True)
        zero = [torch.zeros_like(t) if g is None else g for t, g in zip([*given, *weights], grads)]
        answers.append([y, *finals, *zero])
    names = ["y", *cell.states, "dx", *(f"d{s}" for s in cell.states), *(f"d{i}" for i in inputs)]
    names += [f"d{n}" for n, _ in layer.named_parameters()]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for what, a, b in zip(names, *answers, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert a.dtype == dtype
        assert (a.double() - b).abs().max().item() <= tolerance * scale, (name, what)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", slow_but(ZOO))
def test_agrees_with_the_loop(name, backend, dtype, poisoned):
    check(name, dtype, backend)
    check(name, dtype, backend, H=129, T=1, B=1, bidirectional=False)


@pytest.mark.parametrize("name", slow_but(ZOO))
def test_layers_resets_and_16_bits(name, poisoned):
    check(name, torch.float64, "cpu", num_layers=2, reset=True)
    check(name, torch.float64, "cpu", recompute=True, bias=False)
    for dtype in (torch.bfloat16, torch.float16):
        check(name, dtype, "cpu", T=3, bidirectional=False)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("name", slow_but(ZOO, ("slstm",)))
def test_heads(name, heads, poisoned):
    check(name, torch.float64, "cpu", H=24, heads=heads)
    check(name, torch.float32, "cpu", H=24, heads=heads, B=9)


@pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [2, 3, 4])
@pytest.mark.parametrize("name", ["slstm", "gru"])
def test_heads_that_threads_share(name, heads, dtype):
    """Two threads take whole heads, or units of three: one thread's numbers."""
    torch.manual_seed(0)
    layer = fusedrnn.Layer(ZOO[name], 5, 48 * heads, heads=heads, bidirectional=True, dtype=dtype)
    x = pack_padded_sequence(torch.randn(9, 20, 5).to(dtype), [9] * 12 + [5] * 5 + [1] * 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, states = layer(x)
            outputs = [y.data, *(states if isinstance(states, tuple) else (states,))]
            loss = sum(t.float().square().sum() for t in outputs[:2])
            found.append([*outputs, *torch.autograd.grad(loss, list(layer.parameters()))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, heads", [("slstm", 1), ("slstm", 3), ("gru", 3), *(
    pytest.param(name, 3, marks=pytest.mark.slow) for name in ("mgu", "peephole_lstm", "zoneout_lstm"))
])  # fmt: skip
def test_a_long_sequence_goes_in_pieces(name, heads, packed):
    """Where nothing is kept for backward; with it, all at once."""
    torch.manual_seed(0)
    cell = ZOO[name]
    layer = fusedrnn.Layer(cell, 3, 129, heads=heads, bidirectional=True, dtype=torch.float64)
    lengths = [2500, 2500, 900, 1] if packed else [2500] * 4
    x, inputs = torch.randn(2500, 4, 3, dtype=torch.float64), inputs_of(cell, 2500, 4, 129, dtype=torch.float64)
    resets = None if packed else torch.rand(2500, 4) < 0.01
    if packed:
        x, *given = (pack_padded_sequence(t, lengths) for t in (x, *inputs.values()))
        inputs = dict(zip(inputs, given))
    hx = states_of(cell, 2, 4, 129, torch.float64)
    found = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y, states = layer(x, tuple(hx) if len(hx) > 1 else hx[0], resets=resets, **inputs)
        found.append([y.data if packed else y, *(states if isinstance(states, tuple) else (states,))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulator has CPU tensors, this machine a GPU")
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(
            name,
            dtype,
            marks=[] if (name, dtype) in (("mgu", torch.float32), ("slstm", torch.float64)) else [pytest.mark.slow],
        )
        for name in ZOO
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ],
    ids=str,
)
def test_triton(name, dtype, algorithm, poisoned):
    pytest.importorskip("triton")
    check(name, dtype, "triton", algorithm=algorithm, bidirectional=False, reset=True)


def in_cuda():
    often = (
        ("mgu", torch.float32, "step", 1),
        ("slstm", torch.float64, "step", 4),
        ("slstm", torch.float32, "persistent", 2),
    )
    for name, dtype, algorithm, heads in itertools.product(
        ZOO, (torch.float32, torch.float64, torch.bfloat16), ("step", "persistent"), (1, 2, 4)
    ):
        if (algorithm, dtype) == ("persistent", torch.float64):
            continue
        here = (name, dtype, algorithm, heads)
        yield pytest.param(*here, marks=[] if here in often else [pytest.mark.slow])


@pytest.mark.skipif("cuda" not in planning.machine().on_cpu, reason="the simulator needs nvcc, and has CPU tensors")
@pytest.mark.parametrize("name, dtype, algorithm, heads", [*in_cuda()], ids=str)
def test_cuda(name, dtype, algorithm, heads, poisoned):
    check(name, dtype, "cuda", algorithm=algorithm, H=24, heads=heads, bidirectional=False, reset=True)


@pytest.mark.skipif("cuda" not in planning.machine().on_cpu, reason="the simulator needs nvcc, and has CPU tensors")
def test_plan_of_cuda():
    layer = fusedrnn.Layer(zoo.slstm, 8, 512, heads=4, backend="cuda", dtype=torch.bfloat16)
    choice = fusedrnn.plan(layer, 16)
    assert (choice.algorithm, choice.details.grid[0]) == ("persistent", 4 * 128 // choice.details.units)
    step = fusedrnn.plan(fusedrnn.Layer(zoo.slstm, 8, 512, heads=4, backend="cuda", dtype=torch.float64), 16)
    assert step.algorithm == "step"
    assert "float64 is for checking gradients" in step.why
    five = fusedrnn.cell(gates=("a", "b", "c", "d", "e"), name="five")(
        lambda x, u, s: x.a + u.a + x.b * x.c + u.d * u.e
    )
    with pytest.raises(RuntimeError, match="kernels have up to 4 accumulators"):
        fusedrnn.plan(fusedrnn.Layer(five, 8, 8, backend="cuda"), 16)


@pytest.mark.parametrize("name", ["mgu", "slstm", "zoneout_lstm"])
def test_packed_padded_and_every_state(name):
    cell = ZOO[name]
    layer = fusedrnn.Layer(cell, 5, 6, bidirectional=True, dtype=torch.float64)
    lengths = [4, 1, 3]
    x, inputs = torch.randn(4, 3, 5, dtype=torch.float64), inputs_of(cell, 4, 3, 6, dtype=torch.float64)

    def packed(t):
        return pack_padded_sequence(t, lengths, enforce_sorted=False)

    y, finals = layer(packed(x), **{k: packed(t) for k, t in inputs.items()})
    y, _ = pad_packed_sequence(y)
    padded, ends, every = layer(x, lengths=torch.tensor(lengths), return_all_states=True, **inputs)
    torch.testing.assert_close(y, padded)
    finals, ends, every = (t if isinstance(t, tuple) else (t,) for t in (finals, ends, every))
    for b, length in enumerate(lengths):
        alone, last = loop(layer, x[:length, b : b + 1], **{k: t[:length, b : b + 1] for k, t in inputs.items()})
        torch.testing.assert_close(y[:length, b], alone[:, 0])
        for state, end, all_of, exact in zip(finals, ends, every, last, strict=True):
            torch.testing.assert_close(state[:, b], exact[:, 0])
            torch.testing.assert_close(end[:, b], exact[:, 0])
            torch.testing.assert_close(all_of[0, length - 1, b], exact[0, 0])


@pytest.mark.parametrize("name", ZOO)
def test_what_stands_past_an_end_reaches_no_gradient(name):
    """NaN in the input or in an input of the cell."""
    layer = fusedrnn.Layer(ZOO[name], 5, 6, 2, bidirectional=True, dtype=torch.float64, backend="reference")
    lengths = torch.tensor([4, 1, 0])
    given = {"input": torch.randn(4, 3, 5, dtype=torch.float64), **inputs_of(ZOO[name], 4, 3, 6, dtype=torch.float64)}
    found = []
    for filler in (0.0, torch.nan):
        tensors = {k: t.clone() for k, t in given.items()}
        for t in tensors.values():
            t[torch.arange(4)[:, None] >= lengths] = filler
            t.requires_grad_()
        y, finals = layer(**tensors, lengths=lengths)
        outputs = [y, *(finals if isinstance(finals, tuple) else (finals,))]
        wanted = [*tensors.values(), *layer.parameters()]
        found.append([*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(t.isfinite().all() for t in found[0])


class Gated(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.rnn, self.options = fusedrnn.Layer(zoo.recurrent_dropout_lstm, 5, 6, backend="reference"), options

    def forward(self, x, mask):
        return self.rnn(x, mask=mask, **self.options)[0]


class Answers:
    """No Tensor, but something that answers in its place."""

    def __init__(self, t):
        self.t = t

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def bare(value):
            return value.t if isinstance(value, Answers) else value

        return function(*map(bare, args), **{name: bare(value) for name, value in kwargs.items()})


@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 4])}], ids=["", "lengths"])
def test_inputs_of_a_cell_reach_a_graph_of_fx_and_who_answers_for_a_tensor(options):
    model, x, mask = Gated(options), torch.randn(4, 2, 5), torch.rand(4, 2, 6)
    want = model(x, mask)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    assert torch.equal(graph(x, mask), want)
    for a, b in ((Answers(x), mask), (x, Answers(mask)), (Answers(x), Answers(mask))):
        assert torch.equal(model(a, b), want)


# Plain calls of these are one of C++ for each sequence.
ONE_CALL = [
    ("slstm", {"heads": 2}),
    ("mgu", {"bias": False}),
    ("peephole_lstm", {}),
    ("lstm", {"proj_size": 3}),
    ("slstm", {"heads": 2, "num_layers": 2, "bidirectional": True}),
    ("gru", {"num_layers": 2}),
]


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("name, options", ONE_CALL)
def test_a_call_without_gradients_is_one_of_c(name, options, batch_first, monkeypatch):
    """And returns and raises what the long way does."""
    layer = fusedrnn.Layer(ZOO[name], 5, 6, batch_first=batch_first, **options)
    calls, found = [], []
    short = ops.sequence_of_layer

    def noted(*arguments):
        calls.append(short(*arguments))
        return calls[-1]

    monkeypatch.setattr(ops, "sequence_of_layer", noted)

    def both(x, hx=None):
        answers = [layer(x, hx)]
        monkeypatch.setattr(fusedrnn.Layer, "_direct", lambda *given: None)
        answers.append(layer(x, hx))
        monkeypatch.undo()
        monkeypatch.setattr(ops, "sequence_of_layer", noted)
        for y, states in answers:
            found.append([y, *(states if isinstance(states, tuple) else (states,))])
        for a, b in zip(*found[-2:], strict=True):
            assert (a.shape, a.stride()) == (b.shape, b.stride())
            assert torch.equal(a, b)
        return answers[0][1]

    with torch.no_grad():
        x = torch.randn(4, 3, 5)
        states = both(x)
        assert calls[0] is not None
        both(x, states)
        fusedrnn.freeze(layer)
        both(x[:, :1].contiguous(), None)
        both(torch.randn(3, 4, 5)[:0] if batch_first else x[:, :0])
        assert None not in calls
        for wrong in (x[..., :4], x.double(), x[:0] if not batch_first else x[:, :0]):
            with pytest.raises((RuntimeError, ValueError), match=r"input_size|dtype|sequence length"):
                layer(wrong)
        many = states if isinstance(states, tuple) else (states,)
        small = tuple(s[:, :1] for s in many)
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size"):
            layer(x, small if len(small) > 1 else small[0])
        flat = tuple(s[0] for s in many)
        with pytest.raises(RuntimeError, match="should also be 3-D"):
            layer(x, flat if len(flat) > 1 else flat[0])
        assert layer(x[0])[0].shape[0] == 3  # unbatched
        fusedrnn.unfreeze(layer)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("name, options", ONE_CALL)
@pytest.mark.skipif(_build._small_calls is None, reason="this torch hands no tensors to C")
def test_a_call_with_gradients_is_one_of_c_each_way(name, options, batch_first, monkeypatch):
    """And returns what the long way does."""
    layer = fusedrnn.Layer(ZOO[name], 5, 6, batch_first=batch_first, dtype=torch.float64, **options)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        states = layer(x)[1]
    states = tuple(s.requires_grad_() for s in (states if isinstance(states, tuple) else (states,)))
    short = fusedrnn.Layer._direct
    ways = short, lambda *given: None

    def flat(way, hx=None):
        monkeypatch.setattr(fusedrnn.Layer, "_direct", way)
        y, ends = layer(x, hx)
        return [y, *(ends if isinstance(ends, tuple) else (ends,))]

    of_y = "TransposeBackward0" if batch_first else "CatBackward0" if layer.bidirectional else "CallFunctionBackward"
    assert type(flat(short)[0].grad_fn).__name__ == of_y
    assert short(layer, x, None) is not None
    for hx in (None, states if len(states) > 1 else states[0]):
        wanted = [x, *layer.parameters(), *(() if hx is None else states)]
        found = []
        for way in ways:
            results = flat(way, hx)
            found.append([*results, *torch.autograd.grad(results, wanted, [2 * t.detach() for t in results])])
            # Of one result alone; of a gradient.
            found[-1] += torch.autograd.grad(flat(way, hx)[-1].sum(), wanted[0])
            first = torch.autograd.grad(sum(t.pow(3).sum() for t in flat(way, hx)), wanted, create_graph=True)
            found[-1] += [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)]
        for a, b in zip(*found, strict=True):
            assert (a.shape, a.stride()) == (b.shape, b.stride())
            assert torch.equal(a, b)
    y = flat(short)[0]
    want = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autograd.forward_ad.dual_level():  # which no kernel knows
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], want)
    for graph in (False, True):
        changed = flat(short)[0].mul_(2)
        torch.testing.assert_close(torch.autograd.grad(changed.sum(), x, create_graph=graph)[0], 2 * want)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        y = flat(short)[0]
    assert len(seen) > 4
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    y = flat(short)[0]
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # Frozen, and of what keeps no gates, the long way.
    fusedrnn.freeze(layer)
    assert short(layer, x, None) is None
    fusedrnn.unfreeze(layer)
    layer.recompute = True
    assert short(layer, x, None) is None
    recomputed = torch.autograd.grad(flat(short)[0].sum(), x)[0]
    torch.testing.assert_close(recomputed, want)


def test_nested_input_and_an_input_of_the_cell():
    layer = fusedrnn.Layer(zoo.recurrent_dropout_lstm, 5, 6, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(k, 5) for k in (2, 3)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="inputs of the cell cannot be given with nested input"):
        layer(x, mask=torch.rand(2, 3, 6))


def test_batch_first_unbatched_and_inputs_of_each_direction():
    cell = zoo.zoneout_lstm
    layer = fusedrnn.Layer(cell, 5, 6, 2, bidirectional=True, dtype=torch.float64)
    first = fusedrnn.Layer(cell, 5, 6, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    first.load_state_dict(layer.state_dict())
    x, inputs = torch.randn(4, 3, 5, dtype=torch.float64), inputs_of(cell, 4, 4, 3, 6, dtype=torch.float64)
    y, finals = layer(x, **inputs)
    exact, last = loop(layer, x, **inputs)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(finals, last)
    turned, _ = first(x.transpose(0, 1), **{k: t.transpose(1, 2) for k, t in inputs.items()})
    torch.testing.assert_close(turned.transpose(0, 1), exact)
    alone, states = layer(x[:, 1], **{k: t[:, :, 1] for k, t in inputs.items()})
    torch.testing.assert_close(alone, exact[:, 1])
    assert states[0].shape == (4, 6)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_built_in_cells_are_torch_s(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6, 2, bidirectional=True)
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[name](5, 6, 2, bidirectional=True)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x), theirs(x))


def test_projection():
    layer = fusedrnn.Layer(zoo.lstm, 5, 6, proj_size=3)
    theirs = torch.nn.LSTM(5, 6, proj_size=3)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(x), theirs(x))
    with pytest.raises(ValueError, match="proj_size is for the LSTM, not for the cell mgu"):
        fusedrnn.Layer(zoo.mgu, 5, 6, proj_size=3)


def test_names_and_shapes():
    layer = fusedrnn.Layer(zoo.peephole_lstm, 5, 6, 2, bidirectional=True, heads=2)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["weight_ih_l0"] == (24, 5)
    assert shapes["weight_hh_l1_reverse"] == (24, 3)
    assert shapes["p_i_l0"] == shapes["p_o_l1_reverse"] == (6,)
    assert len(shapes) == 4 * 7
    assert "peephole_lstm, 5, 6, num_layers=2, bidirectional=True, heads=2" in repr(layer)
    x = torch.randn(3, 2, 5)
    y, _ = layer(x)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.cell is zoo.peephole_lstm
        assert torch.equal(same(x)[0], y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer)) == set(shapes)


def test_gates_are_recorded():
    layer = fusedrnn.Layer(zoo.mgu, 5, 6)
    x = torch.randn(4, 3, 5)
    _, record = fusedrnn.record_gates(layer, x)
    assert record["l0"].names == ("f", "n", "h")
    assert ((record["l0"]["f"] > 0) & (record["l0"]["f"] < 1)).all()


@pytest.mark.gradcheck
@pytest.mark.parametrize("name", ["mgu", "slstm", "peephole_lstm", "zoneout_lstm"])
def test_gradcheck(name):
    cell = ZOO[name]
    layer = fusedrnn.Layer(cell, 2, 4, heads=2, dtype=torch.float64, backend="cpu")
    inputs = inputs_of(cell, 3, 2, 4, dtype=torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    def function(x, *rest):
        weights, given = rest[: len(names)], dict(zip(inputs, rest[len(names) :]))
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,), given)[0]

    tensors = [torch.randn(3, 2, 2, dtype=torch.float64), *layer.parameters(), *inputs.values()]
    tensors = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", OFTEN)
def test_compiles_as_one_graph(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6, bidirectional=True)
    x = torch.randn(4, 3, 5, requires_grad=True)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, y_fast = layer(x)[0], fast(x)[0]
    torch.testing.assert_close(y_fast, y)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), [x, *layer.parameters()]) for t in (y, y_fast))):
        torch.testing.assert_close(a, b)


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.parametrize("name", OFTEN)
def test_compiles_by_inductor(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6, heads=2)
    x = torch.randn(4, 3, 5, requires_grad=True)

    def call(x):
        y, states = layer(x.sin())
        return y * 2, *(states if isinstance(states, tuple) else (states,))

    want, got = call(x), torch.compile(call, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    wanted = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out[0].square().sum(), wanted) for out in (want, got)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OFTEN)
def test_exports(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6)
    x = torch.randn(4, 3, 5)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("name", OFTEN)
def test_vmap(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6)
    x = torch.randn(2, 4, 3, 5)
    found = torch.func.vmap(lambda one: layer(one)[0])(x)
    torch.testing.assert_close(found, torch.stack([layer(one)[0] for one in x]))


@pytest.mark.parametrize("name", OFTEN)
def test_gradients_of_every_sample(name):
    layer = fusedrnn.Layer(ZOO[name], 5, 6, heads=2, dtype=torch.float64)
    weights, xs = dict(layer.named_parameters()), torch.randn(3, 4, 2, 5, dtype=torch.float64)

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, xs)
    for k, x in enumerate(xs):
        for n, g in zip(weights, torch.autograd.grad(loss(weights, x), [*weights.values()])):
            torch.testing.assert_close(found[n][k], g)


@pytest.mark.parametrize("name", OFTEN)
def test_double_backward_is_that_of_the_loop(name):
    """A penalty on the gradient, as training with one has it."""
    layer = fusedrnn.Layer(ZOO[name], 5, 6, heads=2, dtype=torch.float64)
    x, answers = torch.randn(4, 3, 5, dtype=torch.float64), []
    for run in (layer, lambda x: loop(layer, x)):
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(run(x)[0].sin().sum(), x, create_graph=True)
        answers.append(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()], allow_unused=True))
    for got, want in zip(*answers, strict=True):
        torch.testing.assert_close(torch.zeros(()) if got is None else got, torch.zeros(()) if want is None else want)


DDP = """
import os, sys
import torch, torch.distributed as dist, fusedrnn
rank, folder, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
layer = fusedrnn.Layer(getattr(fusedrnn.zoo, name), 5, 6, 2, heads=2)
x = torch.randn(4, 6, 5)
alone = torch.autograd.grad(layer(x)[0].square().mean(), [*layer.parameters()])
both = torch.nn.parallel.DistributedDataParallel(layer)
both(x[:, 3 * rank : 3 * rank + 3])[0].square().mean().backward()
for p, g in zip(layer.parameters(), alone):
    torch.testing.assert_close(p.grad, g)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo may abort the end of the interpreter (github.com/pytorch/pytorch/issues/190489)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("name", OFTEN)
def test_ddp(name, tmp_path):
    """Two processes of half the batch each have the gradients of one with all of it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path), name], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: fusedrnn.Layer(lambda x: x, 2, 3), TypeError, "cell must be a definition"),
        (lambda: fusedrnn.Layer(zoo.mgu, 2, 0), ValueError, "hidden_size must be greater than zero"),
        (lambda: fusedrnn.Layer(zoo.mgu, 2, 3, heads=2), ValueError, "heads must divide hidden_size, 3, got 2"),
        (lambda: fusedrnn.Layer(zoo.mgu, 2, 3, backend="x"), ValueError, "backend must be one of"),
        (lambda: fusedrnn.Layer(zoo.mgu, 2, 3)(torch.zeros(2, 1, 4)), RuntimeError, "must be equal to input_size"),
        (lambda: fusedrnn.Layer(zoo.mgu, 2, 3)(torch.zeros(2, 1, 2), m=1), TypeError, "its cell has no inputs"),
        (
            lambda: fusedrnn.Layer(zoo.grud, 2, 3)(torch.zeros(2, 1, 2)),
            TypeError,
            "needs decay=, an input of the cell grud",
        ),
        (
            lambda: fusedrnn.Layer(zoo.grud, 2, 3)(torch.zeros(2, 1, 2), decay=torch.zeros(2, 1, 2)),
            RuntimeError,
            r"decay must have shape \[2, 1, 3\]",
        ),
        (
            lambda: fusedrnn.Layer(zoo.slstm, 2, 3)(torch.zeros(2, 1, 2), torch.zeros(1, 1, 3)),
            TypeError,
            r"hx must be a tuple of 4 Tensors \(h, c, n, m\), got Tensor",
        ),
        (
            lambda: fusedrnn.Layer(zoo.mgu, 2, 3, backend="torch")(torch.zeros(2, 1, 2)),
            RuntimeError,
            "torch has no op for the cell",
        ),
        (lambda: torch.jit.script(fusedrnn.Layer(zoo.mgu, 2, 3)), RuntimeError, "torch.jit.script cannot compile"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- the cache ---

CALL = """
import sys, time, warnings
import torch, fusedrnn
from fusedrnn import compiled
made = []
real = compiled.subprocess.run
traced = []
made_by = fusedrnn.definition.trace
fusedrnn.definition.trace = lambda *given: (traced.append(1), made_by(*given))[1]
compiled.subprocess.run = lambda command, **options: (made.append(command), real(command, **options))[1]
layer = fusedrnn.Layer(fusedrnn.zoo.janet, 3, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    y = layer(torch.ones(2, 1, 3))[0]
    y = layer(torch.ones(2, 1, 3))[0]
print("compiled", sum("-shared" in c for c in made))
print("traced", len(traced))
print("backends", *sorted(fusedrnn.cells.kernels_of(layer.cell.cell.name)))
print("folder", compiled.cache_folder())
print("runs", layer._choose(y.dtype, y.device).backend)
print("told", *(str(w.message) for w in told if "fusedrnn" in str(w.message)))
"""


def called(folder, cell="janet", **environment):
    env = os.environ | {"FUSEDRNN_CACHE": str(folder), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", CALL.replace("janet", cell)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_what_is_for_built_in_cells_says_so():
    layer = fusedrnn.Layer(fusedrnn.zoo.mgu, 3, 4)
    assert fusedrnn.plan(layer, 2).backend in ("cpu", "reference")
    for call, kind in (
        (lambda layer: fusedrnn.explain(layer, steps=1, batch=1), TypeError),
        (lambda layer: fusedrnn.tune(layer, torch.randn(3, 2, 3)), TypeError),
    ):
        with pytest.raises(kind, match=r"built-in|LSTM, GRU or RNN|of one's own"):
            call(layer)


def test_a_cell_is_compiled_once(tmp_path):
    assert called(tmp_path / "cache")["compiled"] == "1"
    folder = tmp_path / "cache" / "cells"
    assert folder.stat().st_mode & 0o777 == 0o700
    (library,) = folder.glob("*.so")
    found = {"compiled": "0", "traced": "0", "backends": "cpu reference", "runs": "cpu", "folder": str(folder)}
    assert called(folder.parent) == found
    (trace,) = folder.glob("trace-*.json")
    trace.write_text(trace.read_text()[:100])
    assert called(folder.parent) == found | {"traced": "1"}
    broken = library.read_bytes()[:5000]
    library.write_bytes(broken)
    assert called(folder.parent)["compiled"] == "1"
    assert library.read_bytes() != broken


HALF, TABLE = 0.5, torch.ones(3)


def scaled(t, by=1.0):
    return t * by


def cell_of(source, **names):
    names = globals() | names
    exec(compile(f"def f(x, u, s):\n    return {source}", "a cell", "exec"), names)
    return names["f"]


def test_the_key_of_a_trace_is_everything_it_depends_on():
    plain = "scaled(torch.tanh(x.h + u.h)) * 0.5 + HALF"
    keys = [
        remembered.key_of(cell_of(plain)),
        remembered.key_of(cell_of(plain.replace("0.5", "0.25"))),
        remembered.key_of(cell_of(plain, HALF=0.25)),
        remembered.key_of(cell_of(plain.replace("tanh", "sigmoid"))),
        remembered.key_of(cell_of(plain, scaled=lambda t, by=2.0: t * by)),
        remembered.key_of(cell_of(plain, scaled=lambda t, by=3.0: t * by)),
        remembered.key_of(cell_of(plain, scaled=torch.abs)),
        remembered.key_of(cell_of(plain), "another name"),
    ]
    assert len(set(keys)) == len(keys)
    assert remembered.key_of(cell_of(plain)) == keys[0]
    by = [0.5, 0.25]
    assert len({remembered.key_of(lambda x, u, s, k=k: x.h * k) for k in by}) == 2
    assert len({remembered.key_of((lambda k: lambda x, u, s: x.h * k)(k)) for k in by}) == 2  # noqa: B023
    for unknown in ("x.h * TABLE", "layer(x.h)"):
        assert remembered.key_of(cell_of(unknown, layer=torch.nn.ReLU())) == ""


@pytest.mark.parametrize("name", ZOO)
def test_a_trace_read_back_is_the_same(name):
    traced = ZOO[name].traced
    again = remembered.loads(remembered.dumps(traced))
    for write in (printing.cpp, printing.triton, printing.plain_torch):
        assert write(again, name) == write(traced, name)
    assert printing.equations(again) == printing.equations(traced)


def test_two_processes_at_once(tmp_path):
    env = os.environ | {"FUSEDRNN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CALL], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    found = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], found
    assert sorted(out.splitlines()[0] for out, _ in found) == ["compiled 0", "compiled 1"]


def test_no_compiler_is_told_once(tmp_path):
    found = called(tmp_path / "cache", CXX="no-such-compiler")
    assert found["backends"] == "reference"
    assert found["told"].count("there is no C++ compiler: no-such-compiler was not found") == 1
    found = called(tmp_path / "cache", CXX="false")
    assert "could not compile it" in found["told"]


def test_slstm_needs_no_compiler(tmp_path):
    found = called(tmp_path / "cache", "slstm", CXX="no-such-compiler")
    assert found == {
        "compiled": "0",
        "traced": "0",
        "backends": "cpu cuda reference triton",
        "runs": "cpu",
        "folder": found["folder"],
    }


def test_a_folder_of_others_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    open_to_all = tmp_path / "open"
    (open_to_all / "cells").mkdir(parents=True)
    (open_to_all / "cells").chmod(0o777)
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o777)
    (tmp_path / "file").touch()
    for folder, why in (
        (open_to_all, "others may write"),
        (tmp_path / "above", "others may write"),
        (tmp_path / "file", "is not a folder|exists|Not a directory"),
    ):
        monkeypatch.setenv("FUSEDRNN_CACHE", str(folder))
        compiled.cache_folder.cache_clear()
        with pytest.warns(UserWarning, match=why):
            found = compiled.cache_folder()
        assert found.parent == tmp_path
        assert found.name.startswith("fusedrnn-")
        assert found.stat().st_mode & 0o777 == 0o700
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "above")
    assert "is not a folder" in compiled._private(link)
    monkeypatch.setattr(compiled.os, "geteuid", lambda: 4321)
    mine = tmp_path / "mine"
    assert compiled._private(mine) == f"{mine} belongs to another user"
    compiled.cache_folder.cache_clear()
