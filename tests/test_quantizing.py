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


# x and h in 8 bits as well. A rounding that goes the other way is as large as the unit, and a last bit of h can turn
# it: a loop in float64 follows y, step by step, and what is summed in whole numbers has to have the same bits.


def rounded_rows(x):
    """Rows as they are multiplied, in float64; the whole numbers are those of float32."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    whole = (x * (torch.full_like(largest, 127) / largest)).round()
    assert not (whole.abs() > 127).any()
    return torch.where(largest.isfinite(), whole.double() * (largest / 127).double(), x.double())


def step(mode, gx, gh, h, c):
    if mode == "LSTM":
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (r, z, n), (r_h, z_h, n_h) = gx.chunk(3, -1), gh.chunk(3, -1)
        z = (z + z_h).sigmoid()
        return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h, c
    return (gx + gh).tanh() if mode == "RNN_TANH" else (gx + gh).relu(), c


def followed(layer, x, y, states, dtype):
    """y and the final c of a layer of one direction [T, B, .], of which each step starts from the h that it had."""
    held = {name: layer._held(name) for name in layer._weight_names()}
    wide = {name: (w.double() * layer._scale(name).double().unsqueeze(1)).to(dtype) for name, w in held.items()}
    suffix = "_l0" if isinstance(layer, nn.RNNBase) else ""
    w_ih, w_hh, w_hr = (wide.get(f"weight_{part}{suffix}") for part in ("ih", "hh", "hr"))
    b_ih, b_hh = (getattr(layer, f"bias_{part}{suffix}").to(dtype) if layer.bias else 0 for part in ("ih", "hh"))
    h, c = (*(s.clone() for s in states), None)[:2]
    c, found = None if c is None else c.to(dtype), []
    for t in range(len(x)):
        gx = rounded_rows(x[t]).to(dtype) @ w_ih.t() + b_ih
        gh = rounded_rows(h).to(dtype) @ w_hh.t() + b_hh
        new, c = step(layer.mode, gx, gh, h.to(dtype), c)
        found.append(new if w_hr is None else new @ w_hr.t())
        h = y[t]
    return [torch.stack(found), *([] if c is None else [c])]


def whole(name="LSTM", hidden=33, inputs=5, **options):
    return fusedrnn.quantize(made(name, hidden, inputs, **options), activations=torch.int8)


def assert_rounds(layer, x, states):
    """Against the loop in float64, with twice the error that the same loop has in float32."""
    hx = states if len(states) > 1 else states[0]
    if isinstance(layer, nn.RNNBase):
        y, h, *c = result(layer, x, tuple(s.unsqueeze(0) for s in states) if len(states) > 1 else hx.unsqueeze(0))
        assert torch.equal(h[0], y[-1])
    else:
        h, *c = result(layer, x[0], hx)
        y = h.unsqueeze(0)
    found = [y, *(s.reshape(s.shape[-2:]) for s in c)]
    right, single = (followed(layer, x, y, states, dtype) for dtype in (torch.float64, torch.float32))
    assert off(found, right) <= 2 * off(single, right) + 2e-7
    return found


def start_of(layer, batch):
    sizes = [getattr(layer, "proj_size", 0) or layer.hidden_size, layer.hidden_size]
    return [torch.randn(batch, size) for size in sizes[: 2 if layer.mode == "LSTM" else 1]]


ROUNDED = (
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {"bias": False}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
)
rounding = pytest.mark.parametrize("name, options", ROUNDED, ids=lambda v: v if isinstance(v, str) else "-".join(v))


@packs
@rounding
@pytest.mark.parametrize("inputs, hidden", [(1, 1), (129, 5), (3, 129), (64, 16), (70, 512), (1100, 20)])
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 3), (1, 70), (2, 1), (2, 70), (40, 1), (40, 3)])
def test_rounded_against_float64(name, options, inputs, hidden, steps, batch):
    if options.get("proj_size", 0) >= hidden:
        options = {}
    layer = whole(name, hidden, inputs, **options)
    x, states = torch.randn(steps, batch, inputs), start_of(layer, batch)
    assert same(assert_rounds(layer, x, states), assert_rounds(layer, x, states))


@packs
@pytest.mark.parametrize("inputs, hidden, batch", [(7, 33, 1), (1, 1, 3), (40, 129, 7), (7, 33, 70)])
@pytest.mark.parametrize("name, options", CELLS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_rounded_cells(name, options, inputs, hidden, batch):
    cell = whole(name, hidden, inputs, **options)
    assert cell.packed_bytes > 0
    found = assert_rounds(cell, torch.randn(1, batch, inputs), start_of(cell, batch))
    assert all(t.shape[-2:] == (batch, hidden) for t in found)


def test_ties_go_to_even():
    layer = made("RNN", 4, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(4) * 127)
        layer.weight_hh_l0.copy_(torch.eye(4) * 127)
    fusedrnn.quantize(layer, activations=torch.int8)
    x = torch.tensor([[[127, 0.5, 1.5, 2.5]], [[0, 0, 0, 0]]])
    assert result(layer, x)[0].tolist() == [[[127 * 127, 0, 254, 254]], [[127 * 127 * 127, 0, 254 * 127, 254 * 127]]]


@packs
@pytest.mark.parametrize("hidden", [1, 5, 129])
@pytest.mark.parametrize("inputs", [1, 30, 33, 512, 1024])
@pytest.mark.parametrize("kind", ["normal", "signs", "largest", "opposite"])
def test_rounded_products_are_exact(inputs, hidden, kind):
    # Up to this depth floats hold the sums as well, so that these bits are those of every processor. With numbers of
    # -127 and 127 alone, sums of few products are the largest.
    layer = made("RNN", hidden, inputs, nonlinearity="relu", bias=False)
    signs = {"signs": lambda t: t.sign(), "largest": torch.ones_like, "opposite": lambda t: -torch.ones_like(t)}
    of_kind = signs.get(kind, lambda t: t)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(of_kind(layer.weight_ih_l0) * (-1 if kind == "opposite" else 1))
        layer.weight_hh_l0.copy_(of_kind(layer.weight_hh_l0) / hidden)
    fusedrnn.quantize(layer, activations=torch.int8)

    def product(rows, part):
        w, scale = layer._held(f"weight_{part}_l0"), layer._scale(f"weight_{part}_l0")
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
        q = (rows * (torch.full_like(largest, 127) / largest)).round()
        return (q.double() @ w.double().t()).float() * (largest / 127) * scale

    for batch in (1, 2, 3, 4, 7, 17, 49):
        x, h = of_kind(torch.randn(3, batch, inputs)), torch.randn(1, batch, hidden)
        y, before = result(layer, x, h)[0], h[0]
        for t in range(3):
            assert torch.equal(y[t], (product(x[t], "ih") + product(before, "hh")).relu())
            before = y[t]


def parts(layer):
    """A layer of one direction for each sequence of a stack."""
    found = []
    for k in range(layer.num_layers):
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            names = [n for n in layer.state_dict() if f"_l{k}{suffix}" in n and ("reverse" in n) == bool(suffix)]
            state = {n.replace(f"_l{k}{suffix}", "_l0"): layer.state_dict()[n] for n in names}
            options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
            options |= {"proj_size": layer.proj_size} if layer.proj_size else {}
            one = type(layer)(state["weight_ih_l0"].shape[1], layer.hidden_size, bias=layer.bias, **options)
            fusedrnn.quantize(one, activations=torch.int8).load_state_dict(state)
            found.append(one)
    return found


@packs
@every
@pytest.mark.parametrize("steps, batch", [(1, 1), (40, 3), (70, 1), (9, 70)])
def test_rounded_stacks_are_made_of_layers(name, options, steps, batch):
    layer, exact = whole(name, 40, **options), fusedrnn.quantize(made(name, 40, **options))
    x = torch.randn(steps, batch, 5)
    y, loose = (result(m, x.transpose(0, 1) if layer.batch_first else x)[0] for m in (layer, exact))
    y, loose = (t.transpose(0, 1) if layer.batch_first else t for t in (y, loose))
    singles = parts(layer)
    for forward in singles[:: 1 + layer.bidirectional]:
        ys = [result(forward, x)[0]]
        if layer.bidirectional:
            ys.append(result(singles[singles.index(forward) + 1], x.flip(0))[0].flip(0))
        x = torch.cat(ys, -1)
    # W_hr's sums are of float32, in an order that depends on how threads share the rows.
    assert near([x], [y], [loose]) if layer.proj_size else torch.equal(x, y)


def near(found, right, unrounded):
    """Whether two ways are the same but for last bits, and what these turn; others are further off."""
    pairs = zip(found, right, unrounded, strict=True)
    return all((a - b).norm() <= 0.1 * (c - b).norm() for a, b, c in pairs if b.numel() and not torch.equal(a, b))


@packs
@every
def test_rounded_whatever_the_way(name, options):
    layer = whole(name, 40, **options)
    exact = fusedrnn.quantize(made(name, 40, **options))
    first = options.get("batch_first", False)
    lengths = torch.tensor([12, 30, 1, 17])
    x = torch.randn(30, 4, 5)
    x = x.transpose(0, 1) if first else x
    for more in (
        {"lengths": lengths},
        {"return_all_states": True},
        {"resets": torch.rand(x.shape[:2]) < 0.2},
        {"resets": torch.rand(x.shape[:2]) < 0.2, "lengths": lengths},
    ):
        got = result(layer, x, **more)
        with fusedrnn.backend("reference"):
            want = result(layer, x, **more)
        assert near(got, want, result(exact, x, **more))
    want, loose = result(layer, x), result(exact, x)
    with fusedrnn.backend("reference"):
        assert near(result(layer, x), want, loose)
        assert not near(loose, want, loose)
    with torch.no_grad():
        assert near(flat(fusedrnn.record_gates(layer, x)[0]), want, loose)
    with torch.autocast("cpu", torch.bfloat16):
        found = result(layer, x)
        assert all(t.dtype == torch.float32 for t in found)
        assert near(found, want, loose)
        assert result(layer, x.bfloat16())[0].dtype == torch.float32
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    y = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], first)[0]
    y, x = (y.transpose(0, 1), x.transpose(0, 1)) if first else (y, x)
    for b, length in enumerate(lengths):
        one = x[:length, b : b + 1]
        alone = result(layer, one.transpose(0, 1) if first else one)[0]
        alone = (alone.transpose(0, 1) if first else alone)[:, 0]
        # Of W_hr sums are float32, in an order that goes by how many rows there are.
        assert torch.equal(alone, y[:length, b]) or "proj_size" in options


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rounded_exported_compiled_and_traced():
    options = {"num_layers": 2, "bidirectional": True}
    layer, exact = whole(**options), fusedrnn.quantize(made(**options))
    x = torch.randn(9, 2, 5)
    want, loose = result(layer, x), result(exact, x)
    steps = torch.export.Dim("steps", min=2, max=100)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: steps},))
    assert program.state_dict["weight_hh_l0"].dtype == torch.int8
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    static = torch.export.export(layer, (x,))
    for other in (
        program.module(),
        torch.export.load(file).module(),
        static.run_decompositions(fusedrnn.decompositions()).module(),
        program.run_decompositions(fusedrnn.decompositions()).module(),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(layer, (x,)),
    ):
        assert near(result(other, x), want, loose)
    cell = whole("GRUCell", 33, 5)
    assert near(
        [torch.compile(cell, fullgraph=True, backend="aot_eager")(x[0])],
        result(cell, x[0]),
        result(fusedrnn.quantize(made("GRUCell", 33, 5)), x[0]),
    )


@packs
@pytest.mark.parametrize(
    "name, options", [("LSTM", {"num_layers": 2, "proj_size": 7}), ("GRU", {"batch_first": True})], ids=["LSTM", "GRU"]
)
def test_rounded_streams(name, options):
    layer = whole(name, 70, **options)
    first = options.get("batch_first", False)
    x = torch.randn(300, 3, 5)
    y, *states = result(layer, x.transpose(0, 1) if first else x)
    stream = layer.stream(3)
    found = [stream(step).clone() for step in x[:5]]
    rest = stream(x[5:].transpose(0, 1) if first else x[5:])
    found = torch.cat([torch.stack(found), rest.transpose(0, 1) if first else rest])
    assert torch.equal(found, y.transpose(0, 1) if first else y)
    assert same(flat(stream.states), states)
    reference = fusedrnn.quantize(made(name, 70, backend="reference", **options), activations=torch.int8)
    other = reference.stream(3)
    found = torch.stack([other(step).clone() for step in x[:9]])
    exact = fusedrnn.quantize(made(name, 70, **options))
    loose = result(exact, x[:9].transpose(0, 1) if first else x[:9])[0]
    y, loose = (y.transpose(0, 1), loose.transpose(0, 1)) if first else (y, loose)
    assert near([found], [y[:9]], [loose])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [1, 6])
def test_rounded_rows_that_are_not_finite(name, bad, steps):
    layer, exact = whole(name, 20), fusedrnn.quantize(made(name, 20))
    x = torch.randn(steps, 5, 5)
    x[0, 2, 1] = bad
    got, want = result(layer, x)[0], result(exact, x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got[0, 2], want[0, 2], atol=2e-6, equal_nan=True)  # as it is
    others = [0, 1, 3, 4]
    assert torch.equal(got[:, others], result(layer, x[:, others])[0])
    with fusedrnn.backend("reference"):
        assert torch.equal(result(layer, x)[0].isnan(), want.isnan())


@packs
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1e5, 1e33])
@pytest.mark.parametrize("inputs, batch", [(40, 1), (40, 20), (65600, 3)])
def test_rounded_small_and_large_inputs(scale, inputs, batch):
    layer = whole("RNN", 4, inputs, nonlinearity="relu", bias=False)
    x = torch.randn(2, batch, inputs) * scale
    x[0, 0, 0] *= 1000
    y = result(layer, x)[0]
    right = followed(layer, x, y, [torch.zeros(batch, 4)], torch.float64)[0]
    # Of every row of the input, to float32's rounding of the sums, times the weights.
    limit = x.abs().amax(-1).cummax(0).values.double() * layer.weight_ih_l0_scale.max() * 127 * inputs**0.5 * 2**-19
    assert ((y - right).abs().amax(-1) <= limit + 1e-37).all()
    assert torch.equal(y, result(layer, x)[0])
    assert y.isfinite().all()


def test_rounded_has_no_gradient():
    layer, x = whole(), torch.randn(3, 2, 5)
    with pytest.raises(RuntimeError, match=r"LSTM is quantized and cannot be trained \(train\(\) was called\): call"):
        layer.train()
    for each, given in ((layer, x), (whole("GRUCell"), x[0])):
        with pytest.raises(
            RuntimeError, match="a layer quantized with activations rounds x and h to 8 bits, which has no"
        ):
            each(given.clone().requires_grad_())
        each(given)
        with torch.no_grad():
            each(given.clone().requires_grad_())


@packs
def test_what_rounds_is_copied_loaded_and_undone():
    layer = whole(num_layers=2)
    assert repr(layer).endswith("num_layers=2, quantized=torch.int8, activations=torch.int8)")
    x, exact = torch.randn(9, 2, 5), fusedrnn.quantize(made(num_layers=2))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = whole(num_layers=2)
    loaded.load_state_dict(exact.state_dict())
    for twin in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
        loaded,
        layer.to("cpu"),
        fusedrnn.freeze(layer),
    ):
        assert same(result(twin, x), result(layer, x))
        assert twin.packed_bytes == layer.packed_bytes
    plan = fusedrnn.plan(layer, 2)
    assert plan.details.activations == torch.int8
    assert "packed in int8 once, by quantize" in plan.why
    assert "x and h rounded to int8" in plan.why
    assert "rounded" not in fusedrnn.plan(exact, 2).why
    assert "packed in int8 once, by quantize" in fusedrnn.plan(whole("GRUCell"), 2).why
    with fusedrnn.backend("reference"):
        assert fusedrnn.plan(layer, 2).algorithm == "int8"
    for back in (fusedrnn.unquantize, fusedrnn.revert):
        wide = back(copy.deepcopy(layer))
        assert "activations" not in repr(wide)
        assert same(result(wide, x), result(back(copy.deepcopy(exact)), x))
    assert same(result(fusedrnn.quantize(fusedrnn.unquantize(copy.deepcopy(layer))), x), result(exact, x))
    own = fusedrnn.Layer(fusedrnn.zoo.lstm, 5, 33)
    fusedrnn.quantize(own, activations=torch.int8)
    single = whole()
    single.load_state_dict(own.state_dict())
    loose = result(fusedrnn.unquantize(copy.deepcopy(own)), x)
    assert near(result(own, x), result(single, x), loose)


@packs
@pytest.mark.parametrize("crowded", [False, True])
def test_rounded_with_many_threads(crowded):
    layer = whole(hidden=300)
    for shape in ((20, 1, 5), (5, 64, 5)):
        x = torch.randn(shape)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            want = result(layer, x)
        finally:
            torch.set_num_threads(threads)
        if crowded:
            _build._extension.crowd()
        assert same(result(layer, x), want)


def test_activations_that_are_refused():
    for wrong in (torch.bfloat16, torch.quint8, "int8"):
        with pytest.raises(ValueError, match=f"activations must be torch.int8 or None, got {wrong}"):
            fusedrnn.quantize(made(), activations=wrong)
    with pytest.raises(
        ValueError, match=r"activations=torch.int8 goes with weights in torch.int8, got dtype=torch.bfloat16"
    ):
        fusedrnn.quantize(made(), torch.bfloat16, torch.int8)
    layer = whole()
    assert fusedrnn.quantize(layer, activations=torch.int8) is layer
    with pytest.raises(
        ValueError, match=r"LSTM is quantized with activations=torch.int8, got None; call fusedrnn.unquantize"
    ):
        fusedrnn.quantize(layer)
    with pytest.raises(
        ValueError, match=r"LSTM is quantized with activations=None, got torch.int8; call fusedrnn.unquantize"
    ):
        fusedrnn.quantize(fusedrnn.quantize(made()), activations=torch.int8)
    with pytest.raises(ValueError, match="algorithm must be one of auto, step, sequence, persistent, got 'int8'"):
        fusedrnn.LSTM(3, 4, algorithm="int8")


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
for name, options in t.ROUNDED:
    for steps, batch, inputs, hidden in ((1, 1, 7, 29), (9, 3, 5, 129), (4, 70, 1100, 66), (40, 4, 8, 512)):
        layer = t.whole(name, hidden, inputs, **options)
        x, states = torch.randn(steps, batch, inputs), t.start_of(layer, batch)
        t.assert_rounds(layer, x, states)
    t.test_rounded_whatever_the_way(name, options)
for name, options in t.CELLS:
    t.test_rounded_cells(name, options, 40, 35, 7)
for scale in (0.0, 1e-44, 1e33):
    for inputs, batch in ((40, 20), (65600, 3)):
        t.test_rounded_small_and_large_inputs(scale, inputs, batch)
t.test_rounded_rows_that_are_not_finite("LSTM", float("inf"), 6)
t.test_ties_go_to_even()
for kind in ("normal", "signs", "largest", "opposite"):
    t.test_rounded_products_are_exact(1024, 129, kind)
    t.test_rounded_products_are_exact(33, 5, kind)
for layer, whole in ((t.whole(hidden=200), {capability!r} == "avx2"), (fusedrnn.quantize(t.made(hidden=200)), False)):
    plan = fusedrnn.plan(layer, 2)
    assert plan.details.digits == ("in whole numbers" in plan.why) == whole
t.test_rounded_with_many_threads(False)
t.test_rounded_streams("GRU", {{"batch_first": True}})
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
