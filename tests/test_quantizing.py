"""quantize and unquantize: weights in int8 and bfloat16, held against float64 with the rounded weights."""

import copy
import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import _build, quantizing

DTYPES = [torch.int8, torch.bfloat16]
LAYERS = (
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3, "num_layers": 2}),
    ("LSTM", {"proj_size": 20, "bias": False, "bidirectional": True}),
    ("GRU", {"batch_first": True}),
    ("GRU", {"bias": False, "num_layers": 3}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {"bidirectional": True}),
)
CELLS = (("LSTMCell", {}), ("GRUCell", {"bias": False}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}))
packs = pytest.mark.skipif(_build._small_calls is None, reason="this torch hands no tensors to C: nothing is packed")
kinds = pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "bfloat16"])
every = pytest.mark.parametrize("name, options", LAYERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))


@pytest.fixture(autouse=True)
def never_widened(request, monkeypatch):
    """Weights of fewer bits are computed with as they are, at sizes where float32 would be faster too."""
    if "as_it_is" not in request.keywords:
        monkeypatch.setattr(quantizing, "float32_is_faster", lambda *_: False)


def rounded(w, dtype):
    """The weights that a quantized layer stands for, in float64 where they are int8 times a float32 scale."""
    if dtype == torch.bfloat16:
        return w.bfloat16().double()
    scale = w.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (w / scale).round(), 0.0).double() * scale.double()


def made(name="LSTM", hidden=33, inputs=5, **options):
    torch.manual_seed(0)
    return getattr(fusedrnn, name)(inputs, hidden, **options)


def reference(layer, dtype):
    """torch.nn's in float64, with the rounded weights."""
    twin = fusedrnn.revert(copy.deepcopy(layer)).double().eval()
    state = layer.state_dict()
    twin.load_state_dict({k: rounded(w, dtype) if k.startswith("weight_") else w for k, w in state.items()})
    return twin


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for each in found for t in flat(each) if each is not None]


def result(layer, *given, **options):
    with torch.no_grad():
        found = layer(*given, **options)
        if isinstance(found[0], nn.utils.rnn.PackedSequence):
            found = (found[0].data, *found[1:])
    return flat(found)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def assert_as_right(layer, plain, dtype, *draws):
    """Over some inputs the largest error is at most twice that of float32 layers with the same weights (torch.nn's,
    ours), and an ulp or two; a second call gives the same bits.
    """
    exact = reference(plain, dtype)
    single = copy.deepcopy(exact).float()
    floats = single, fusedrnn.freeze(fusedrnn.convert(copy.deepcopy(single)))
    error = allowed = 0.0
    for given in draws:
        got, right = result(layer, *given), result(exact, *map(doubled, given))
        assert all(t.dtype == torch.float32 and t.shape == r.shape for t, r in zip(got, right, strict=True))
        assert same(got, result(layer, *given))
        error = max(error, off(got, right))
        allowed = max(allowed, *(off(result(each, *given), right) for each in floats))
    assert error <= 2 * allowed + 2e-7


def off(found, right):
    """The largest error, of values of at most 1 as it is, of others relative to the largest."""
    return max(float((t.double() - r).abs().max() / r.abs().max().clamp(min=1)) for t, r in zip(found, right))


def doubled(t):
    if isinstance(t, torch.Tensor):
        return t.double()
    if isinstance(t, nn.utils.rnn.PackedSequence):
        return nn.utils.rnn.PackedSequence(t.data.double(), *t[1:])
    return None if t is None else tuple(s.double() for s in t)


def states_of(layer, batch):
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    states = tuple(torch.randn(directions, batch, size) for size in sizes)
    return states if len(states) > 1 else states[0]


@kinds
@every
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 70), (25, 1), (40, 5), (9, 70), (300, 5)])
def test_against_float64(name, options, dtype, steps, batch):
    plain = made(name, **options)
    layer = fusedrnn.quantize(copy.deepcopy(plain), dtype)
    x = torch.randn((batch, steps, 5) if options.get("batch_first") else (steps, batch, 5))
    assert_as_right(layer, plain, dtype, (x,), (x, states_of(plain, batch)))


@kinds
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("inputs, hidden", [(1, 1), (129, 5), (3, 129), (64, 16), (300, 257)])
@pytest.mark.parametrize("steps, batch", [(1, 1), (4, 1), (6, 17)])
def test_odd_sizes(name, dtype, inputs, hidden, steps, batch):
    plain = made(name, hidden, inputs)
    draws = [(torch.randn(steps, batch, inputs),) for _ in range(12 if batch == 1 else 2)]
    assert_as_right(fusedrnn.quantize(copy.deepcopy(plain), dtype), plain, dtype, *draws)


@kinds
@pytest.mark.parametrize("inputs, hidden, batch", [(7, 33, 1), (1, 1, 3), (40, 129, 7), (7, 33, 70)])
@pytest.mark.parametrize("name, options", CELLS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_cells(name, options, dtype, inputs, hidden, batch):
    plain = made(name, hidden, inputs, **options)
    cell = fusedrnn.quantize(copy.deepcopy(plain), dtype)
    assert cell.packed_bytes == 0
    x, h = torch.randn(batch, inputs), torch.randn(batch, hidden)
    hx = (h, torch.randn(batch, hidden)) if name == "LSTMCell" else h
    assert_as_right(cell, plain, dtype, (x,), (x, hx), *((torch.randn(batch, inputs), hx) for _ in range(10)))
    single = result(cell, x[0])
    assert all(s.shape == (hidden,) and (s - t[0]).abs().max() < 1e-5 for s, t in zip(single, result(cell, x)))


@kinds
@every
def test_packed_lengths_and_what_kernels_have_beside(name, options, dtype):
    plain = made(name, **options)
    layer = fusedrnn.quantize(copy.deepcopy(plain), dtype)
    first = options.get("batch_first", False)
    x, lengths = torch.randn(4, 9, 5), torch.tensor([3, 9, 1, 5])
    x = x if first else x.transpose(0, 1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    got = result(layer, packed)
    assert_as_right(layer, plain, dtype, (packed,))
    y, *states = result(layer, x, lengths=lengths)
    padded = layer(packed)[0]
    padded = nn.utils.rnn.pad_packed_sequence(padded, first)[0]
    assert all((a - b).abs().max() < 2e-6 for a, b in zip((y, *states), (padded, *got[1:]), strict=True))
    # What C++ has no call for is computed with the weights in float32.
    wide = fusedrnn.unquantize(copy.deepcopy(layer))
    resets = torch.rand(x.shape[:2]) < 0.2
    for more in ({"resets": resets}, {"return_all_states": True}, {"resets": resets, "lengths": lengths}):
        a, b = result(layer, x, **more), result(wide, x, **more)
        assert all((p - q).abs().max() < 2e-6 for p, q in zip(a, b, strict=True))
    with fusedrnn.backend("reference"):
        assert all((p - q).abs().max() < 2e-6 for p, q in zip(result(layer, x), result(wide, x), strict=True))


@kinds
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [1, 6])
def test_nan_and_infinity_stay_in_their_row(name, dtype, bad, steps):
    layer = fusedrnn.quantize(made(name, 20), dtype)
    wide = fusedrnn.unquantize(copy.deepcopy(layer))
    x = torch.randn(steps, 5, 5)
    x[0, 2, 1] = bad
    got, want = result(layer, x)[0], result(wide, x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got, want, atol=2e-6, equal_nan=True)
    assert got[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e5, 1e33])
@pytest.mark.parametrize("inputs, batch", [(40, 1), (40, 20), (65600, 3)])
def test_small_and_large_inputs(scale, inputs, batch):
    # The longest row is one that whole numbers of 32 bits might not hold the products of.
    layer = fusedrnn.quantize(made("RNN", 4, inputs, nonlinearity="relu", bias=False))
    wide = fusedrnn.unquantize(copy.deepcopy(layer)).double()
    x = torch.randn(2, batch, inputs) * scale
    x[0, 0, 0] *= 1000
    got, want = result(layer, x)[0].double(), result(wide, x.double())[0]
    # Of every row of the input, to float32's rounding of its largest, times the weights.
    limit = x.abs().amax(-1).cummax(0).values.double() * layer.weight_ih_l0_scale.max() * 127 * inputs**0.5 * 2**-19
    assert ((got - want).abs().amax(-1) <= limit + 1e-37).all()


def test_rows_of_zeros_and_weights_that_are_not_finite():
    plain = made(hidden=16)
    with torch.no_grad():
        plain.weight_hh_l0[3:20] = 0
        plain.weight_ih_l0.zero_()
        plain.weight_hh_l0[40] = 1e-42
    layer = fusedrnn.quantize(copy.deepcopy(plain))
    assert (layer.weight_hh_l0_scale[3:20] == 0).all()
    x = torch.randn(6, 2, 5)
    assert_as_right(layer, plain, torch.int8, (x,))
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            plain.weight_hh_l0[1, 1] = bad
        before = plain.weight_hh_l0
        with pytest.raises(ValueError, match="weight_hh_l0 of LSTM holds NaN or infinity and cannot become int8"):
            fusedrnn.quantize(plain)
        assert plain.weight_hh_l0 is before
        assert plain.training
        wide = fusedrnn.quantize(copy.deepcopy(plain), torch.bfloat16)
        assert torch.equal(result(wide, x)[0].isnan(), result(fusedrnn.unquantize(copy.deepcopy(wide)), x)[0].isnan())


def test_what_is_stored():
    plain = made("LSTM", 300, 100, num_layers=2, proj_size=30)
    size = {}
    for dtype in (None, *DTYPES):
        layer = copy.deepcopy(plain) if dtype is None else fusedrnn.quantize(copy.deepcopy(plain), dtype)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        size[dtype] = len(file.getvalue())
        if dtype is None:
            continue
        for name, w in plain.state_dict().items():
            assert layer.state_dict()[name].dtype == (dtype if name.startswith("weight") else torch.float32)
            if name.startswith("weight"):
                wide = layer.state_dict()[name].float()
                if dtype == torch.int8:
                    wide *= layer.state_dict()[f"{name}_scale"].unsqueeze(1)
                    assert (wide - w).abs().max() <= w.abs().max() / 253
                assert torch.allclose(wide.double(), rounded(w, dtype), rtol=1e-6, atol=0)
    assert size[torch.bfloat16] < 0.55 * size[None]
    assert size[torch.int8] < 0.31 * size[None]


@kinds
def test_loading(dtype):
    plain, other = made(num_layers=2), made("LSTM", num_layers=2)
    with torch.no_grad():
        for p in other.parameters():
            p.uniform_(-0.3, 0.3)
    x, wanted = torch.randn(70, 2, 5), fusedrnn.quantize(copy.deepcopy(other), dtype)
    for assign in (False, True):
        for state in (wanted.state_dict(), other.state_dict()):
            layer = nn.Sequential(fusedrnn.quantize(copy.deepcopy(plain), dtype))
            layer.load_state_dict({f"0.{k}": v.clone() for k, v in state.items()}, assign=assign)
            assert layer[0].weight_hh_l0.dtype == dtype
            assert same(result(layer, x), result(wanted, x))
    state = wanted.state_dict()
    layer = fusedrnn.quantize(copy.deepcopy(plain), dtype)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        layer.load_state_dict(state | {"weight_hh_l0": torch.zeros(3, 3)})
    if dtype == torch.int8:
        message = r'"weight_ih_l0" is int8, the layer not quantized: call fusedrnn.quantize\(model, torch.int8\) first'
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                copy.deepcopy(plain).load_state_dict(state, strict=strict)
        with pytest.raises(RuntimeError, match=r'"weight_ih_l0" is int8, the layer torch\.bfloat16'):
            fusedrnn.quantize(copy.deepcopy(plain), torch.bfloat16).load_state_dict(state)
        with pytest.raises(RuntimeError, match='"weight_ih_l0" is int8 and has no "weight_ih_l0_scale"'):
            layer.load_state_dict({k: v for k, v in state.items() if "scale" not in k}, strict=False)
        with pytest.raises(RuntimeError, match='"weight_hh_l1" holds NaN or infinity and cannot become int8'):
            layer.load_state_dict(other.state_dict() | {"weight_hh_l1": torch.full((132, 33), float("nan"))})
    else:
        twin = copy.deepcopy(plain)
        twin.load_state_dict(state)
        assert same(result(twin, x), result(fusedrnn.unquantize(wanted), x))


@kinds
@every
def test_unquantize_and_revert(name, options, dtype):
    plain = made(name, **options)
    plain.weight_hh_l0.requires_grad_(False)
    layer = fusedrnn.quantize(copy.deepcopy(plain), dtype)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in plain.named_parameters() if "bias" in n]
    for back in (fusedrnn.unquantize, fusedrnn.revert):
        wide = back(copy.deepcopy(layer))
        assert list(wide.state_dict()) == list(plain.state_dict())
        for key, p in wide.named_parameters():
            assert p.requires_grad == (key != "weight_hh_l0")
            w = plain.state_dict()[key]
            assert torch.allclose(p.double(), rounded(w, dtype) if key.startswith("weight") else w.double(), rtol=1e-6)
        assert wide.train()(torch.randn(3, 2, 5))[0].sum().backward() is None
    again = fusedrnn.quantize(fusedrnn.unquantize(copy.deepcopy(layer)), dtype)
    x = torch.randn(3, 2, 5)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(result(again, x), result(layer, x), strict=True))


@kinds
def test_training_raises(dtype):
    layer = fusedrnn.quantize(made(), dtype)
    assert not layer.training
    with pytest.raises(RuntimeError, match=r"LSTM is quantized and cannot be trained \(train\(\) was called\): call"):
        nn.Sequential(layer).train()
    layer.bias_hh_l0.requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot be trained \(bias_hh_l0 requires grad\): call fusedrnn.unquantize"):
        layer(torch.randn(3, 2, 5))
    layer.bias_hh_l0.requires_grad_(False)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(132, 33))
    with pytest.raises(RuntimeError, match="LSTM is quantized, and its weight_hh_l0 was replaced"):
        layer(torch.randn(3, 2, 5))


@kinds
def test_a_gradient_of_the_input(dtype):
    layer = fusedrnn.quantize(made(), dtype)
    wide = fusedrnn.unquantize(copy.deepcopy(layer))
    xs = [torch.ones(9, 2, 5, requires_grad=True) for _ in range(2)]
    for each, x in zip((layer, wide), xs, strict=True):
        each(x)[0].sum().backward()
    assert torch.equal(xs[0].grad, xs[1].grad)
    cell = fusedrnn.quantize(made("GRUCell"), dtype)
    cell(xs[0][0]).sum().backward()


@kinds
def test_casting_moving_and_autocast(dtype):
    layer = fusedrnn.quantize(made(), dtype)
    x = torch.randn(4, 2, 5)
    want = result(layer, x)
    assert same(result(layer.float().to("cpu", torch.float32), x), want)
    assert layer.weight_hh_l0.dtype == dtype
    for wrong in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match=f"LSTM is quantized and computes in float32, it cannot become {wrong}"):
            layer.to(wrong)
        with pytest.raises(ValueError, match=f"LSTM is quantized and takes torch.float32, got {wrong}"):
            layer(x.to(wrong))
    with torch.autocast("cpu", torch.bfloat16):
        wide = fusedrnn.unquantize(copy.deepcopy(layer))
        assert same(result(layer, x), result(wide, x))
    assert f"quantized={dtype}" in repr(layer)


@kinds
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_compiled_and_traced(dtype):
    layer = fusedrnn.quantize(made(num_layers=2, bidirectional=True), dtype)
    x = torch.randn(9, 2, 5)
    program = torch.export.export(layer, (x,))
    assert program.state_dict["weight_hh_l0"].dtype == dtype
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for other in (
        program.module(),
        torch.export.load(file).module(),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(layer, (x,)),
    ):
        assert all((a - b).abs().max() < 2e-6 for a, b in zip(result(other, x), result(layer, x), strict=True))


@packs
@kinds
def test_copies_pack_their_own(dtype):
    layer = fusedrnn.quantize(made(hidden=64, num_layers=2), dtype)
    size = 1 if dtype == torch.int8 else 2
    assert 1 <= layer.packed_bytes / (size * 4 * 64 * (5 + 3 * 64)) < 1.15
    x = torch.randn(70, 2, 5)
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < size * 4 * 64 * (5 + 3 * 64) + 40_000
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert twin.packed_bytes == layer.packed_bytes
        assert same(result(twin, x), result(layer, x))
        assert all(p.requires_grad for p in fusedrnn.unquantize(twin).parameters())
        assert twin.packed_bytes == 0


@kinds
@pytest.mark.parametrize(
    "name, options",
    [
        ("LSTM", {"num_layers": 2, "proj_size": 7}),
        ("GRU", {"num_layers": 2, "batch_first": True}),
        ("RNN", {"bias": False}),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_streams(name, options, dtype, backend):
    layer = fusedrnn.quantize(made(name, 70, **options, backend=backend), dtype)
    first = options.get("batch_first", False)
    x = torch.randn(300, 3, 5).transpose(0, 1) if first else torch.randn(300, 3, 5)
    y, *states = result(layer, x)
    stream = layer.stream(3)
    steps = x.unbind(1 if first else 0)
    found = [stream(step.contiguous()).clone() for step in steps[:5]]
    assert (torch.stack(found, 1 if first else 0) - (y[:, :5] if first else y[:5])).abs().max() < 2e-6
    rest = stream(x[:, 5:] if first else x[5:])
    assert (rest - (y[:, 5:] if first else y[5:])).abs().max() < 2e-6
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(flat(stream.states), states, strict=True))
    if backend is None and fusedrnn.plan(layer, 3).backend == "cpu":
        plain = fusedrnn.unquantize(copy.deepcopy(layer)).stream(3)
        assert stream.packed_bytes < (0.6 if dtype == torch.int8 else 0.75) * plain.packed_bytes
    layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="is quantized, and its weight_hh_l0 was replaced"):
        layer.stream()


def test_a_layer_of_a_built_in_cell():
    torch.manual_seed(0)
    layer = fusedrnn.quantize(fusedrnn.Layer(fusedrnn.zoo.lstm, 3, 40))
    x = torch.randn(9, 2, 3)
    wide = fusedrnn.unquantize(copy.deepcopy(layer))
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(result(layer, x), result(wide, x), strict=True))


@packs
@kinds
def test_c_plus_plus_computes_it(dtype, monkeypatch):
    layer, cell = fusedrnn.quantize(made(bidirectional=True), dtype), fusedrnn.quantize(made("LSTMCell"), dtype)
    monkeypatch.setattr(fusedrnn.functional, "layers", None)
    monkeypatch.setattr(fusedrnn.functional, "one_step", None)
    layer(torch.randn(9, 2, 5))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(9, 3, 5), [9, 4, 1])
    layer(packed)
    cell(torch.randn(2, 5))
    plan = fusedrnn.plan(layer, 2)
    assert plan.details.quantized == dtype
    assert f"W_hh packed in {str(dtype)[6:]} once, by quantize (" in plan.why
    assert f"W_hh read where it lies in {str(dtype)[6:]}" in fusedrnn.plan(cell, 2).why


@kinds
def test_without_small_calls(dtype, monkeypatch):
    layer = fusedrnn.quantize(made(bidirectional=True), dtype)
    x = torch.randn(9, 2, 5)
    want = result(layer, x)
    monkeypatch.setattr(_build, "_small_calls", None)
    other = copy.deepcopy(layer)
    assert other.packed_bytes == 0
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(result(other, x), want, strict=True))


@kinds
def test_threads(dtype):
    layer = fusedrnn.quantize(made(hidden=200), dtype)
    x = torch.randn(30, 2, 5)
    want, found = result(layer, x), []
    threads = [threading.Thread(target=lambda: found.extend(result(layer, x) for _ in range(10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(same(want, each) for each in found)


@packs
@kinds
@pytest.mark.as_it_is
def test_where_float32_is_faster(dtype):
    small, large = (fusedrnn.quantize(made(hidden=hidden), dtype) for hidden in (16, 200))
    assert quantizing.float32_is_faster(dtype, 1024, 1, False)
    assert not quantizing.float32_is_faster(dtype, 160_000, 1, False)
    for layer, batch, wide in ((large, 1, False), (small, 1, True), (large, 64, dtype == torch.bfloat16)):
        if wide or not quantizing.float32_is_faster(dtype, 160_000, batch, False):
            x, before = torch.randn(9, batch, 5), layer.packed_bytes
            exact = fusedrnn.freeze(fusedrnn.unquantize(copy.deepcopy(layer)))
            got, want = result(layer, x), result(exact, x)
            assert same(got, want) if wide else all((a - b).abs().max() < 2e-6 for a, b in zip(got, want, strict=True))
            state = sum(w.numel() * 4 for name, w in exact.named_parameters() if "weight" in name)
            assert layer.packed_bytes - before == (state + exact.packed_bytes if wide else 0)
            assert ("in float32, which is faster at this size" in fusedrnn.plan(layer, batch).why) == wide
            assert copy.deepcopy(layer).packed_bytes == before
            packed = nn.utils.rnn.pack_padded_sequence(x, [9] * batch)
            assert same(result(layer, packed)[1:], got[1:])
            assert torch.equal(layer.stream(batch)(x[0]), exact.stream(batch)(x[0])) or not wide
    cell = fusedrnn.quantize(made("GRUCell"), dtype)
    exact, x = fusedrnn.freeze(fusedrnn.unquantize(copy.deepcopy(cell))), torch.randn(3, 5)
    assert "in float32, which is faster at this size" in fusedrnn.plan(cell, 3).why
    assert same(result(cell, x), result(exact, x))
    assert cell.packed_bytes == 4 * 3 * 33 * (5 + 33)
    assert torch.equal(cell(x), exact(x))
    cell(x.requires_grad_()).sum().backward()


@packs
@kinds
@pytest.mark.parametrize("crowded", [False, True])
def test_one_thread_does_the_work_of_all(dtype, crowded):
    layer = fusedrnn.quantize(made(hidden=300), dtype)
    for shape in ((20, 1, 5), (5, 64, 5)):
        x = torch.randn(shape)
        want = result(layer, x)
        if crowded:
            _build._extension.crowd()
        assert same(result(layer, x), want)


_AGAINST = """
import copy, sys, torch, fusedrnn
sys.path.insert(0, {tests!r})
import test_quantizing as t
t.quantizing.float32_is_faster = lambda *_: False
assert fusedrnn.build_info()["cpu_capability"] == {capability!r}
for dtype in t.DTYPES:
    for name, options in t.LAYERS:
        for steps, batch, inputs, hidden in ((1, 1, 7, 29), (9, 3, 5, 33), (4, 20, 3, 66), (100, 4, 8, 40)):
            plain = t.made(name, hidden, inputs, **options)
            x = torch.randn((batch, steps, inputs) if options.get("batch_first") else (steps, batch, inputs))
            t.assert_as_right(fusedrnn.quantize(copy.deepcopy(plain), dtype), plain, dtype, (x,))
    for name, options in t.CELLS:
        t.test_cells(name, options, dtype, 40, 35, 7)
"""


@packs
@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_other_instruction_sets(capability):
    if capability not in fusedrnn.build_info()["cpu_capabilities_built"]:
        pytest.skip("not compiled in")
    code = _AGAINST.format(tests=os.path.dirname(__file__), capability=capability)
    env = os.environ | {"FUSEDRNN_CPU_CAPABILITY": capability}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if "cpu_capability" in found.stderr:
        pytest.skip("this processor has not got it")
    assert found.returncode == 0, found.stderr


def test_models_and_what_is_refused():
    with pytest.raises(TypeError, match=r"quantize takes a torch\.nn\.Module, got int"):
        fusedrnn.quantize(3)
    with pytest.raises(TypeError, match=r"unquantize takes a torch\.nn\.Module, got int"):
        fusedrnn.unquantize(3)
    with pytest.raises(ValueError, match="quantize: there is no layer or cell of fusedrnn in the model"):
        fusedrnn.quantize(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"dtype must be torch.int8 or torch.bfloat16, got torch.float16"):
        fusedrnn.quantize(made(), torch.float16)
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(made(), made().to(dtype))
        with pytest.raises(ValueError, match=f"LSTM is {dtype}, only float32 is quantized: call .float"):
            fusedrnn.quantize(model)
        assert isinstance(model[0].weight_hh_l0, nn.Parameter)  # none of it is changed
    layer = fusedrnn.quantize(made())
    assert fusedrnn.quantize(layer) is layer
    with pytest.raises(ValueError, match=r"LSTM is quantized to torch\.int8; call fusedrnn.unquantize first"):
        fusedrnn.quantize(layer, torch.bfloat16)
    normed = nn.utils.parametrizations.weight_norm(fusedrnn.LSTM(4, 8), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"quantize: weight_hh_l0 of .*LSTM is computed, not a parameter"):
        fusedrnn.quantize(normed)
    with pytest.raises(ValueError, match="a Layer of a cell of one's own cannot be quantized yet"):
        fusedrnn.quantize(fusedrnn.Layer(fusedrnn.zoo.slstm, 3, 4))


def test_beside_freeze():
    x = torch.randn(70, 2, 5)
    frozen = fusedrnn.freeze(made())
    layer = fusedrnn.quantize(frozen)
    want = result(layer, x)
    for function in (fusedrnn.freeze, fusedrnn.unfreeze):
        assert same(result(function(layer), x), want)
        assert layer.weight_hh_l0.dtype == torch.int8
    assert all(p.requires_grad for p in fusedrnn.unquantize(layer).parameters())
