"""resets, return_all_states, recompute and recording, at the module: against torch.nn run piece by piece.

That every backend's kernels compute them right is shown by tests/test_recurrence.py.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional, ops, recompute

T, B, I, H = 7, 3, 4, 5
CLASSES = ["LSTM", "GRU", "RNN"]


def pair(name: str, **options):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(I, H, dtype=torch.float64, **options)
    ours = getattr(fusedrnn, name)(I, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def mask() -> torch.Tensor:
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3, 0] = resets[5, 0] = resets[0, 1] = resets[6, 2] = True
    return resets


def piecewise(theirs, x, resets):
    """Output and final h of torch.nn on every stretch between two resets on its own, from zero states."""
    ys = []
    finals = []
    for b in range(x.shape[1]):
        starts = sorted({0, *resets[:, b].nonzero().flatten().tolist()})
        pieces = [theirs(x[start:end, b]) for start, end in zip(starts, [*starts[1:], x.shape[0]])]
        ys.append(torch.cat([y for y, _ in pieces]))
        finals.append(pieces[-1][1][0] if isinstance(pieces[-1][1], tuple) else pieces[-1][1])
    return torch.stack(ys, 1), torch.stack(finals, 1)


@pytest.mark.parametrize("name", CLASSES)
def test_resets_are_new_sequences(name):
    ours, theirs = pair(name)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    y, hx = ours(x, resets=mask())
    want, h_n = piecewise(theirs, x, mask())
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(hx[0] if name == "LSTM" else hx, h_n)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), [x, *ours.parameters()])
    want = torch.autograd.grad((want * weight).sum(), [x, *theirs.parameters()])
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_resets_part_sequences_for_both_directions():
    ours, theirs = pair("LSTM", num_layers=2, bidirectional=True)
    # A second layer mixes directions, so pieces of the whole stack are compared.
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, _ = ours(x, resets=mask())
    torch.testing.assert_close(y, piecewise(theirs, x, mask())[0])
    first = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    first.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(first(x.transpose(0, 1), resets=mask().t())[0].transpose(0, 1), y)
    torch.testing.assert_close(ours(x[:, 0], resets=mask()[:, 0])[0], y[:, 0])
    assert torch.equal(ours(x, resets=torch.zeros(T, B, dtype=torch.bool))[0], ours(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_of_a_packed_sequence(bidirectional):
    ours, theirs = pair("GRU", bidirectional=bidirectional)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), [4, 7, 5]
    resets = mask()
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, lengths_out = pad_packed_sequence(ours(packed, resets=resets)[0])
    assert lengths_out.tolist() == lengths
    for b, n in enumerate(lengths):
        want = piecewise(theirs, x[:n, b : b + 1], resets[:n, b : b + 1])[0]
        torch.testing.assert_close(y[:n, b : b + 1], want)


def test_infinity_does_not_cross_a_reset():
    for name in CLASSES:
        ours, _ = pair(name, **({"nonlinearity": "relu"} if name == "RNN" else {}))
        x = torch.randn(T, B, I, dtype=torch.float64)
        x[2, 0] = float("nan")
        y, _ = ours(x, resets=mask())
        assert y[2, 0].isnan().all()
        assert y[3:, 0].isfinite().all()
        assert y[:, 1:].isfinite().all()


def test_wrong_resets_raise():
    ours, _ = pair("LSTM")
    x = torch.randn(T, B, I, dtype=torch.float64)
    for resets, error, message in (
        (mask().float(), RuntimeError, "resets must be a bool tensor, got torch.float32"),
        (mask()[:-1], RuntimeError, rf"resets must have shape \[T, B\] = \[{T}, {B}\], got \[{T - 1}, {B}\]"),
        (mask().tolist(), TypeError, "resets must be a Tensor, got list"),
        (mask().to_sparse(), RuntimeError, "resets must be a dense tensor, got layout torch.sparse_coo"),
        (mask().to("meta"), RuntimeError, "resets must be on the device of the input, cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            ours(x, resets=resets)
    with pytest.raises(RuntimeError, match="For unbatched 2-D input, resets should be 1-D but got a 2-D tensor"):
        ours(x[:, 0], resets=mask())
    packed = pack_padded_sequence(x, [4, 7, 5], enforce_sorted=False)
    with pytest.raises(RuntimeError, match=r"resets must have shape \[T, B\]"):
        ours(packed, resets=mask()[:, :2])
    weights, states = list(ours.parameters()), (torch.zeros(1, B, H, dtype=torch.float64),) * 2
    with pytest.raises(RuntimeError, match="weights must begin with w_ih and w_hh, each with 2 dimensions"):
        functional.lstm(x, states, [weights[2], *weights[1:]])
    for sizes, error, message in (
        ([3, 2], TypeError, "batch_sizes must be a Tensor, got list"),
        (torch.tensor([3, 1]), RuntimeError, "batch_sizes must add up to the 5 rows of x, got 4"),
        (torch.tensor([2, 3]), RuntimeError, "h0 must have batch size 2, got 3"),
        (torch.tensor([3, -1]), RuntimeError, "batch_sizes must not increase and must be at least 1, got -1 at step 1"),
        (torch.tensor([], dtype=torch.int64), RuntimeError, "Expected sequence length to be larger than 0"),
    ):
        with pytest.raises(error, match=message):
            functional.lstm(
                x[:2].flatten(0, 1)[:5], states, weights, batch_sizes=sizes,
                resets=torch.zeros(len(sizes), len(states[0][0]), dtype=torch.bool),
            )  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_every_state_is_a_start(name):
    ours, _ = pair(name, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, final, states = ours(x, return_all_states=True)
    assert torch.equal(y, ours(x)[0])
    h = states[0] if name == "LSTM" else states
    assert h.shape == (2, T, B, H)
    assert torch.equal(h[-1], y)
    at = lambda t: tuple(s[:, t] for s in states) if name == "LSTM" else states[:, t]
    for a, b in zip(at(T - 1) if name == "LSTM" else [at(T - 1)], final if name == "LSTM" else [final]):
        torch.testing.assert_close(a, b)
    rest, _ = ours(x[3:], at(2))
    torch.testing.assert_close(rest, y[3:])


def test_every_state_is_differentiable():
    ours, theirs = pair("LSTM", bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    _, _, (_, c) = ours(x, return_all_states=True)
    weight = torch.randn_like(c)
    got = torch.autograd.grad((c * weight).sum(), [x, *ours.parameters()])
    wanted = 0
    for t in range(T):
        # The state after step t, of the forward direction of the first t + 1 steps, of the backward one of the others.
        wanted = wanted + (theirs(x[: t + 1])[1][1][0] * weight[0, t]).sum()
        wanted = wanted + (theirs(x[t:])[1][1][1] * weight[1, t]).sum()
    for a, b in zip(got, torch.autograd.grad(wanted, [x, *theirs.parameters()])):
        torch.testing.assert_close(a, b)


def test_every_state_of_other_layouts():
    ours, _ = pair("LSTM", num_layers=2, batch_first=True)
    x = torch.randn(B, T, I, dtype=torch.float64)
    _, _, (h, c) = ours(x, return_all_states=True)
    assert (h.shape, c.shape) == ((2, B, T, H), (2, B, T, H))
    one, _, (h1, c1) = ours(x[1], return_all_states=True)
    assert (one.shape, h1.shape, c1.shape) == ((T, H), (2, T, H), (2, T, H))
    torch.testing.assert_close(h1, h[:, 1])
    packed = pack_padded_sequence(x, [4, 7, 5], batch_first=True, enforce_sorted=False)
    _, _, (hp, cp) = ours(packed, return_all_states=True)
    assert isinstance(hp, PackedSequence)
    padded, _ = pad_packed_sequence(cp, batch_first=True)
    assert padded.shape == (B, T, 2, H)
    torch.testing.assert_close(padded[0, :4], c[:, 0, :4].transpose(0, 1))
    half = fusedrnn.LSTM(I, H, dtype=torch.bfloat16)
    _, _, (h, c) = half(torch.randn(T, B, I, dtype=torch.bfloat16), return_all_states=True)
    assert h.dtype == c.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_recompute_keeps_no_gates_and_gives_the_same_gradients(name, dtype, monkeypatch):
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype, **({"proj_size": 3} if name == "LSTM" else {})}
    plain = getattr(fusedrnn, name)(I, H, **options)
    lean = getattr(fusedrnn, name)(I, H, recompute=True, **options)
    lean.load_state_dict(plain.state_dict())
    packed = pack_padded_sequence(torch.randn(T, B, I, dtype=dtype), [7, 5, 2])
    resets = mask()
    grads, saved = [], []
    for layer in (plain, lean):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            y = layer(packed, resets=resets)[0].data
        saved.append(sum(kept))
        grads.append(torch.autograd.grad(y.float().sin().sum(), list(layer.parameters())))
    gates = {"LSTM": 4, "GRU": 4, "RNN": 0}[name]
    assert saved[0] - saved[1] == 2 * 2 * packed.data.shape[0] * gates * H
    for a, b in zip(*grads):
        # The products are the same, in sums of another order.
        torch.testing.assert_close(a, b, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def in_pieces(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST_STEPS", recompute.PIECES)
    monkeypatch.setattr(recompute, "LEAST_BYTES", 0)


def states_and_gradients(layer, x, hx, **options):
    """The sum of sines of every output, and its gradients."""
    y, hn, states = layer(x, hx, return_all_states=True, **options)
    outputs = [y, *(hn if type(hn) is tuple else (hn,)), *(states if type(states) is tuple else (states,))]
    total = sum((t.data if isinstance(t, PackedSequence) else t).sin().sum() for t in outputs)
    leaves = [x.data if isinstance(x, PackedSequence) else x, *(hx if type(hx) is tuple else (hx,))]
    return torch.autograd.grad(total, [*leaves, *layer.parameters()])


@pytest.mark.parametrize("lengths", [None, [19, 19, 9, 1], [9, 4, 3, 2]])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "projected"])
def test_recompute_in_pieces(name, with_resets, lengths, monkeypatch):
    """A long sequence's gradients, gone through piece by piece, are those of the whole."""
    in_pieces(monkeypatch)
    torch.manual_seed(0)
    steps, batch = 19 if lengths is None else lengths[0], 4
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    if name == "projected":
        name, options["proj_size"] = "LSTM", 3
    plain, lean = (getattr(fusedrnn, name)(I, H, recompute=r, **options) for r in (False, True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(steps, batch, I, dtype=torch.float64)
    x = x if lengths is None else pack_padded_sequence(x, lengths)
    (x if lengths is None else x.data).requires_grad_()
    h = torch.randn(4, batch, options.get("proj_size", H), dtype=torch.float64, requires_grad=True)
    hx = (h, torch.randn(4, batch, H, dtype=torch.float64, requires_grad=True)) if name == "LSTM" else h
    resets = torch.rand(steps, batch) < 0.2 if with_resets else None
    calls = []
    sequence_backward = ops.sequence_backward
    monkeypatch.setattr(ops, "sequence_backward", lambda *a: (calls.append(1), sequence_backward(*a))[1])
    want, got = (states_and_gradients(layer, x, hx, resets=resets) for layer in (plain, lean))
    assert len(calls) == 4 + 4 * recompute.PIECES
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_recompute_in_pieces_of_bfloat16(monkeypatch):
    in_pieces(monkeypatch)
    torch.manual_seed(0)
    plain, lean = (fusedrnn.LSTM(I, 20, dtype=torch.bfloat16, recompute=r) for r in (False, True))
    exact = torch.nn.LSTM(I, 20, dtype=torch.float64)
    for layer in (lean, exact):
        layer.load_state_dict(plain.state_dict())
    x, dy = torch.randn(2, 60, 5, 20).to(torch.bfloat16)
    x = x[..., :I]

    def gradients(layer, x, dy):
        x = x.detach().requires_grad_()
        layer(x)[0].backward(dy)
        found = [x.grad, *(p.grad for p in layer.parameters())]
        return [g.double() for g in found]

    want = gradients(exact, x.double(), dy.double())
    for a, b, c in zip(gradients(lean, x, dy), gradients(plain, x, dy), want, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


def test_recompute_twice_differentiable():
    layer = fusedrnn.LSTM(2, 3, dtype=torch.float64, recompute=True)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    resets = torch.tensor([[False, True], [True, False], [False, False]])
    weights = list(layer.parameters())

    def function(x, *weights):
        zeros = x.new_zeros(1, 2, 3)
        return functional.lstm(x, (zeros, zeros), weights, resets=resets, return_all_states=True, recompute=True)[3][1]

    assert torch.autograd.gradgradcheck(function, (x, *weights))


def test_options_compile_without_a_break():
    ours = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, recompute=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (T, T + 2):
        x = torch.randn(steps, B, I, requires_grad=True)
        resets = torch.rand(steps, B) < 0.3
        y, _, (h, c) = compiled(x, resets=resets, return_all_states=True)
        want, _, (want_h, want_c) = ours(x, resets=resets, return_all_states=True)
        for a, b in ((y, want), (h, want_h), (c, want_c)):
            torch.testing.assert_close(a, b)
        got = torch.autograd.grad(y.sum() + c.sin().sum(), [x, *ours.parameters()])
        for a, b in zip(got, torch.autograd.grad(want.sum() + want_c.sin().sum(), [x, *ours.parameters()])):
            torch.testing.assert_close(a, b)


def test_functional_rnn_is_torchs():
    for nonlinearity in ("tanh", "relu"):
        theirs = torch.nn.RNN(I, H, 2, nonlinearity=nonlinearity)
        x, h0 = torch.randn(T, B, I), torch.randn(2, B, H)
        y, h_n = functional.rnn(x, h0, list(theirs.parameters()), nonlinearity, num_layers=2)
        want, want_h = theirs(x, h0)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(h_n, want_h)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sin'"):
        functional.rnn(x, h0, list(theirs.parameters()), "sin", num_layers=2)


@pytest.mark.parametrize("grad", [False, True])
def test_recording_hands_over_what_the_kernels_computed(grad):
    ours = fusedrnn.LSTM(I, H, num_layers=2, bidirectional=True, recompute=True)
    seen = []
    x = torch.randn(T, B, I)
    with torch.set_grad_enabled(grad), functional.recording(lambda *record: seen.append(record)):
        y, _ = ours(x)
    assert [(cell.name, layer, direction) for cell, layer, direction, *_ in seen] == [
        ("lstm", layer, direction) for layer in range(2) for direction in range(2)
    ]
    for cell, _, direction, h, gates, cells, batch_sizes, lengths in seen:
        i, f, g, o = gates.unflatten(-1, (len(cell.saved), H)).unbind(-2)
        assert batch_sizes is lengths is None
        torch.testing.assert_close(o * cells.tanh(), h)
        c_prev = torch.cat([cells[1:], torch.zeros(1, B, H)] if direction else [torch.zeros(1, B, H), cells[:-1]])
        torch.testing.assert_close(f * c_prev + i * g, cells)
        assert not any(t.requires_grad for t in (h, gates, cells))
    assert torch.equal(torch.cat([seen[2][3], seen[3][3]], -1), y)
    if grad:
        y.sum().backward()
    ours(x)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_an_unknown_keyword_is_the_functions_own_error(name):
    x = torch.zeros(2, 1, 3)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'foo'"):
        getattr(functional, name)(x, x, [], foo=1)
