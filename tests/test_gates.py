"""record_gates, its summaries, the plots and the command, against gates and numbers computed by hand."""

import copy
import itertools
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import __main__, functional, record_gates
from fusedrnn.gates import Gates

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not fusedrnn._build.loaded(), reason="no C++ extension: cpu"))
BACKENDS = ["reference", CPU, "triton", "cuda"]


def by_hand(layer, x, reverse=False, suffix="l0"):
    """The gates of one direction of one layer from torch.nn's equations, one step after the other, from zeros."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, f"{name}_{suffix}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    steps = []
    for x_t in x.flip(0) if reverse else x:
        a, b = x_t @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh
        if layer.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            found = {"i": i, "f": f, "g": g, "o": o, "c": c, "h": h}
        elif layer.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
            r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
            n = (an + r * bn).tanh()
            h = (1 - z) * n + z * h
            found = {"r": r, "z": z, "n": n, "h": h}
        else:
            h = (a + b).tanh() if layer.mode == "RNN_TANH" else (a + b).relu()
            found = {"h": h}
        steps.append(found)
    whole = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    return {name: t.flip(0) if reverse else t for name, t in whole.items()}


def assert_gates(gates, want, **tolerance):
    assert gates.names == tuple(want)
    for name in want:
        torch.testing.assert_close(gates[name], want[name], msg=lambda text: f"{name}: {text}", **tolerance)  # noqa: B023
        assert not gates[name].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_backend_gives_the_gates_of_torchs_equations(kind, backend):
    layer = getattr(fusedrnn, kind)(3, 5, bidirectional=True, backend=backend)
    x = torch.randn(3, 2, 3)
    y, record = record_gates(layer, x)
    assert list(record) == ["l0", "l0_reverse"]
    for direction, suffix in enumerate(record):
        gates = record[suffix]
        assert (gates.layer, gates.direction) == (0, direction)
        assert_gates(gates, by_hand(layer, x, bool(direction), suffix), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gates["h"], y[0].detach().chunk(2, -1)[direction], rtol=0, atol=0)
    assert torch.equal(gates.input, x)


def test_layers_on_each_other_with_batch_first_and_relu():
    layer = fusedrnn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True)
    x = torch.randn(2, 5, 3)
    _, record = record_gates(layer, x)
    below = by_hand(layer, x.transpose(0, 1))
    assert_gates(record["l0"], below)
    assert_gates(record["l1"], by_hand(layer, below["h"], suffix="l1"))
    assert torch.equal(record["l1"].input, x.transpose(0, 1))


def test_input_without_a_batch():
    layer, x = fusedrnn.GRU(3, 4), torch.randn(5, 3)
    _, record = record_gates(layer, x)
    assert_gates(record["l0"], by_hand(layer, x[:, None]))


def test_output_gradients_and_hx_are_those_of_a_plain_call():
    layer = fusedrnn.LSTM(3, 4)
    x, hx = torch.randn(5, 2, 3, requires_grad=True), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    plain = layer(x, hx)
    (y, (h_n, c_n)), record = record_gates(layer, x, hx)
    for got, want in zip((y, h_n, c_n), (plain[0], *plain[1])):
        assert torch.equal(got, want)
    assert torch.equal(record["l0"]["c"][-1], c_n[0])
    got, want = (torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (y, plain[0]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_layer_that_keeps_no_gates_for_backward():
    layer, x = fusedrnn.GRU(3, 4, recompute=True), torch.randn(5, 2, 3)
    assert_gates(record_gates(layer, x)[1]["l0"], by_hand(layer, x))


@pytest.mark.parametrize("grad", [False, True])
def test_no_second_forward(monkeypatch, grad):
    calls = []
    op = functional.ops.sequence
    for module in (functional, fusedrnn.autograd):
        monkeypatch.setattr(module.ops, "sequence", lambda *args: calls.append(args) or op(*args))
    with torch.set_grad_enabled(grad):
        _, record = record_gates(fusedrnn.LSTM(3, 4, 2), torch.randn(5, 2, 3))
    assert len(record) == len(calls) == 2


def test_packed_gates_are_padded_with_nan_in_the_order_of_the_input():
    layer = fusedrnn.LSTM(2, 3)
    sequences = [torch.randn(length, 2) for length in (2, 4, 1)]
    _, record = record_gates(layer, pack_sequence(sequences, enforce_sorted=False))
    gates = record["l0"]
    assert gates.valid.sum(0).tolist() == [2, 4, 1]
    for b, x in enumerate(sequences):
        want = by_hand(layer, x[:, None])
        for name in gates.names:
            torch.testing.assert_close(gates[name][: len(x), b], want[name][:, 0])
            assert gates[name][len(x) :, b].isnan().all()
        assert torch.equal(gates.input[: len(x), b], x)
    alone = torch.cat([by_hand(layer, x[:, None])["f"][:, 0] for x in sequences])
    torch.testing.assert_close(gates.openness("f"), alone.mean(0))


def test_projection():
    gates = record_gates(fusedrnn.LSTM(3, 6, proj_size=2), torch.randn(5, 2, 3))[1]["l0"]
    assert gates["h"].shape == (5, 2, 2)
    assert gates["o"].shape == gates["c"].shape == (5, 2, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gates_are_summarised_in_float32(dtype):
    layer = fusedrnn.LSTM(3, 4, dtype=dtype)
    gates = record_gates(layer, torch.randn(300, 2, 3, dtype=dtype))[1]["l0"]
    assert gates["f"].dtype == dtype
    assert gates["c"].dtype == torch.float32
    assert torch.equal(gates.openness("f"), gates["f"].float().flatten(0, 1).mean(0))
    assert gates.half_life().dtype == gates.saturation("g").low.dtype == torch.float32


class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.steps = nn.ModuleDict({"cell": getattr(fusedrnn, kind)(3, 4)})

    def forward(self, x):
        hx = None
        for x_t in x:
            hx = self.steps["cell"](x_t, hx)
        return hx


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_calls_of_a_cell_are_stacked(kind):
    model, x = Loop(kind), torch.randn(5, 2, 3)
    _, record = record_gates(model, x)
    assert list(record) == ["steps.cell"]
    layer = getattr(fusedrnn, kind.removesuffix("Cell"))(3, 4)
    for name, w in model.steps["cell"].named_parameters():
        setattr(layer, f"{name}_l0", w)
    assert_gates(record["steps.cell"], by_hand(layer, x))
    assert torch.equal(record["steps.cell"].input, x)


def test_a_cell_alone_and_without_a_batch():
    gates = record_gates(fusedrnn.GRUCell(3, 4), torch.randn(3))[1]["cell"]
    assert gates["z"].shape == (1, 1, 4)


def test_a_cell_called_with_two_batch_sizes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = fusedrnn.GRUCell(3, 4)

        def forward(self, x):
            return self.cell(x), self.cell(x[:1])

    with pytest.raises(RuntimeError, match=r"cell was called with batches of \[1, 2\]"):
        record_gates(Two(), torch.randn(2, 3))


def test_a_tied_layer_called_twice_gives_two_entries():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = self.decoder = fusedrnn.GRU(4, 4)

        def forward(self, x):
            return self.decoder(self.encoder(x)[0])

    model, x = Twice(), torch.randn(5, 2, 4)
    _, record = record_gates(model, x)
    assert list(record) == ["encoder.l0", "encoder.l0#2"]
    assert_gates(record["encoder.l0#2"], by_hand(model.encoder, record["encoder.l0"]["h"]))


def test_a_converted_model():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 3), nn.Linear(4, 2)
            self.encoder = nn.LSTM(3, 4, 2)

        def forward(self, tokens):
            return self.head(self.encoder(self.embedding(tokens))[0])

    model, tokens = Tagger(), torch.randint(9, (5, 2))
    want = model(tokens)
    with pytest.raises(RuntimeError, match=r"encoder \(LSTM\) is a layer of torch.nn: call fusedrnn.convert"):
        record_gates(model, tokens)
    y, record = record_gates(fusedrnn.convert(model), tokens)
    torch.testing.assert_close(y, want)
    assert list(record) == ["encoder.l0", "encoder.l1"]
    assert_gates(record["encoder.l0"], by_hand(model.encoder, model.embedding(tokens).detach()))


def test_functional_calls_outside_of_a_layer():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fusedrnn.GRU(3, 4)

        def forward(self, x):
            return functional.gru(x, x.new_zeros(1, x.shape[1], 4), self.layer._weights())

    model, x = Bare(), torch.randn(5, 2, 3)
    gates = record_gates(model, x)[1]["functional.l0"]
    assert_gates(gates, by_hand(model.layer, x))
    with pytest.raises(ValueError, match="its input was not recorded"):
        gates.correlation("z")
    assert "correlation" not in gates.summary()["gates"]["z"]


def test_what_cannot_be_recorded():
    x = torch.randn(5, 2, 3)
    layer = fusedrnn.LSTM(3, 4)
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        record_gates(lambda x: x, x)
    with pytest.raises(RuntimeError, match="Linear holds no recurrent layer of fusedrnn"):
        record_gates(nn.Linear(3, 4), x)
    with pytest.raises(RuntimeError, match="is compiled"):
        record_gates(nn.Sequential(torch.compile(layer)), x)
    compiled = copy.deepcopy(layer)
    compiled.compile()
    with pytest.raises(RuntimeError, match=r"the module \(LSTM\) is compiled"):
        record_gates(compiled, x)
    with pytest.raises(RuntimeError, match=r"0 \(Odd\) is a subclass of torch.nn's"):
        record_gates(nn.Sequential(type("Odd", (nn.LSTM,), {})(3, 4)), x)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x

    with pytest.raises(RuntimeError, match="no recurrent layer ran in this thread"):
        record_gates(Unused(), x)


def test_a_layer_that_fails_leaves_no_hook_behind():
    layer = fusedrnn.LSTM(3, 4)
    with pytest.raises(RuntimeError, match="Expected 3, got 7"):
        record_gates(layer, torch.randn(5, 2, 7))
    assert not layer._forward_hooks
    _, record = record_gates(layer, torch.randn(5, 2, 3))
    assert list(record) == ["l0"]


def known(cell="lstm", valid=None, input=None, **values):
    """Gates of given values [T, B, H]."""
    tensors = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in values.items()}
    return Gates("l0", cell, 0, 0, tensors, input, valid)


# T 2, B 2, H 2
F = [[[0.5, 1.0], [0.05, 1.0]], [[0.5, 1.0], [0.95, 1.0]]]


def test_openness_by_hand():
    assert known(f=F).openness("f").tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="openness takes a sigmoid gate"):
        known(f=F, g=F).openness("g")
    with pytest.raises(KeyError, match="lstm has f, got 'z'"):
        known(f=F).openness("z")


def test_saturation_by_hand():
    low, high = known(f=F).saturation("f")
    assert (low.tolist(), high.tolist()) == ([0.25, 0.0], [0.25, 1.0])
    low, high = known(f=F).saturation("f", low=0.6, high=0.96)
    assert (low.tolist(), high.tolist()) == ([0.75, 0.0], [0.0, 1.0])
    low, high = known(g=[[[-0.95, 0.1]], [[0.95, -0.91]]]).saturation("g")
    assert (low.tolist(), high.tolist()) == ([0.5, 0.5], [0.5, 0.0])
    assert known("rnn_tanh", h=F).saturation("h").high.tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match="h of rnn_relu is neither"):
        known("rnn_relu", h=F).saturation("h")
    with pytest.raises(ValueError, match=r"low=0.9, high=0.1"):
        known(f=F).saturation("f", 0.9, 0.1)


def test_half_life_by_hand():
    # Units: sqrt(1/2 * 1/8) = 1/4, so half a step; always 1, so for ever; once 0, so none.
    f = torch.tensor([[0.5, 1.0, 0.0], [0.125, 1.0, 0.5]])[:, None]
    assert known(f=f).half_life().tolist() == pytest.approx([0.5, math.inf, 0.0])
    assert known("gru", z=f).half_life().tolist() == pytest.approx([0.5, math.inf, 0.0])
    valid = torch.tensor([[True], [False]])
    assert known(f=f, valid=valid).half_life().tolist() == pytest.approx([1.0, math.inf, 0.0])
    with pytest.raises(ValueError, match="rnn_tanh has none"):
        known("rnn_tanh", h=f).half_life()


def test_half_life_is_what_a_cell_state_does():
    layer = fusedrnn.LSTM(1, 1)
    with torch.no_grad():
        for w in layer.parameters():
            w.zero_()
        layer.bias_ih_l0[1] = math.log(0.9 / 0.1)  # f = 0.9; g = 0, so nothing is added
    gates = record_gates(layer, torch.zeros(50, 1, 1), (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))[1]["l0"]
    half = float(gates.half_life())
    assert half == pytest.approx(math.log(0.5) / math.log(0.9), rel=1e-4)
    c = gates["c"].flatten()
    before, after = c[math.floor(half) - 1], c[math.ceil(half) - 1]
    assert after < 0.5 < before


def test_correlation_by_hand():
    # The mean over units is 1, 2, 4; features: 3 of it minus 1, its negative, 0 1 0, constant.
    f = torch.tensor([[0.0, 2.0], [1.0, 3.0], [4.0, 4.0]])[:, None]
    x = torch.tensor([[2.0, -1.0, 0.0, 0.1], [5.0, -2.0, 1.0, 0.1], [11.0, -4.0, 0.0, 0.1]])[:, None]
    r = known(f=f, input=x).correlation("f")
    third = -1 / 3 / math.sqrt((16 + 1 + 25) / 9 * 2 / 3)
    assert r[:3].tolist() == pytest.approx([1.0, -1.0, third])
    assert r[3].isnan()
    assert known(f=torch.full((3, 1, 2), 0.1), input=x).correlation("f").isnan().all()


def test_summary_by_hand():
    x = torch.tensor([[[1.0], [3.0]], [[1.0], [5.0]]])
    found = known(f=F, g=F, h=F, input=x).summary()
    assert {k: found[k] for k in ("cell", "layer", "direction", "steps", "batch", "hidden")} == {
        "cell": "lstm", "layer": 0, "direction": 0, "steps": 2, "batch": 2, "hidden": 2,
    }  # fmt: skip
    f = found["gates"]["f"]
    assert (f["openness"], f["saturated_low"], f["saturated_high"]) == pytest.approx((0.75, 0.125, 0.625))
    # mean of f: .75 .525 .75 .975, of x: 1 3 1 5; centred 0 -.225 0 .225 and -1.5 .5 -1.5 2.5
    assert f["correlation"]["feature"] == 0
    assert f["correlation"]["r"] == pytest.approx(0.45 / math.sqrt(2 * 0.225**2 * 11))
    assert found["gates"]["g"].pop("correlation") == f["correlation"]
    assert found["gates"]["g"] == pytest.approx({"mean": 0.75, "saturated_low": 0, "saturated_high": 0.625})
    assert found["half_life"]["quartile_3"] == math.inf
    constant = known("rnn_tanh", h=F, input=torch.ones(2, 2, 1)).summary()
    assert constant["half_life"] is None
    assert constant["gates"]["h"]["correlation"] is None


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib", reason="plots need the extra 'plots'")
    from fusedrnn import plots

    return plots


def test_heatmap_shows_the_values(plots):
    _, record = record_gates(fusedrnn.LSTM(3, 8), torch.randn(6, 2, 3))
    gates = record["l0"]
    figure = plots.heatmap(gates, ("f", "g", "c"), sample=1, units=[5, 2], tokens="a $b$\n")
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title("left") for axis in maps] == ["forget gate f", "candidate g", "cell state c"]
    for axis, name in zip(maps, "fgc"):
        assert axis.images[0].get_array().tolist() == gates[name][:, 1, [5, 2]].T.tolist()
    limits = [axis.images[0].get_clim() for axis in maps]
    largest = float(gates["c"][:, 1, [5, 2]].abs().max())
    assert limits == [(0, 1), (-1, 1), (-largest, largest)]
    assert "".join(label.get_text() for label in maps[-1].get_xticklabels()) == "a␣$b$⏎"
    figure.canvas.draw()


def test_heatmap_of_a_packed_sample_ends_with_it(plots):
    batch = pack_sequence([torch.randn(length, 3) for length in (2, 4)], enforce_sorted=False)
    gates = record_gates(fusedrnn.GRU(3, 4), batch)[1]["l0"]
    assert plots.heatmap(gates, "z").axes[0].images[0].get_array().shape == (4, 2)


def test_traces_show_the_values(plots):
    gates = record_gates(fusedrnn.GRU(1, 8), torch.randn(6, 1, 1))[1]["l0"]
    figure = plots.traces(gates, [3], series=gates.input[:, 0, 0])
    series, sigmoids, signed = figure.axes
    assert series.lines[0].get_ydata().tolist() == gates.input.flatten().tolist()
    assert sigmoids.get_ylim() == pytest.approx((-0.03, 1.03))
    for axis, names in ((sigmoids, "rz"), (signed, "nh")):
        lines = {line.get_label(): [float(v) for v in line.get_ydata()] for line in axis.lines}
        assert {name: lines[name] for name in names} == {name: gates[name][:, 0, 3].tolist() for name in names}
    assert signed.get_xlabel() == "step"
    varying = gates["h"][:, 0].var(0)
    assert plots.most_varying(gates, 2) == varying.topk(2).indices.tolist()
    figure.canvas.draw()


def test_openness_counts_the_values(plots):
    figure = plots.openness([known(f=F), known("gru", z=[[[0.3, math.nan]]])])
    left, right = figure.axes
    shares = left.patches[-1].get_data().values
    assert [round(float(share), 3) for share in (shares[2], shares[20], shares[38], shares[39])] == [
        0.125, 0.25, 0.125, 0.5,
    ]  # fmt: skip
    assert right.patches[-1].get_data().values.sum() == 1
    with pytest.raises(ValueError, match="has none"):
        plots.openness(known("rnn_tanh", h=F))


def test_units_that_do_alike_stand_together(plots):
    """Twelve sines of three phases, shuffled, and four units that hardly move."""
    steps = torch.arange(40.0)
    kinds = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    moving = torch.sin(steps[:, None] * 0.5 + kinds * 2.1) + 0.01 * torch.randn(40, 12)
    h = torch.cat([moving, 1e-3 * torch.randn(40, 4)], 1)[:, None]
    order = plots.in_order(known("rnn_tanh", h=h.tolist()), 12)
    assert sorted(order) == list(range(12))
    runs = [kinds[unit].item() for unit in order]
    assert sum(a != b for a, b in itertools.pairwise(runs)) == 2, runs
    assert plots.in_order(known("rnn_tanh", h=[[[1.0, 1.0]]]), 5) in ([0, 1], [1, 0])
    assert plots.in_order(known("rnn_tanh", h=[[[1.0]], [[2.0]]]), 5) == [0]


def test_what_cannot_be_drawn(plots):
    gates = record_gates(fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3))[1]["l0"]
    with pytest.raises(ValueError, match=r"sample must be in 0..1, got 2"):
        plots.heatmap(gates, sample=2)
    with pytest.raises(ValueError, match=r"units must be in 0..3, got \[4\]"):
        plots.traces(gates, [4])
    with pytest.raises(ValueError, match="tokens must name the 5 steps of the sample, got 2"):
        plots.heatmap(gates, tokens="ab")
    with pytest.raises(ValueError, match=r"series must have shape \[5\], got \[4\]"):
        plots.traces(gates, series=torch.zeros(4))
    with pytest.raises(KeyError, match="lstm has i, f, g, o, c, h, got 'z'"):
        plots.heatmap(gates, "z")


def test_without_matplotlib(monkeypatch):
    from fusedrnn import plots

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need the extra 'plots'"):
        plots.heatmap(known(f=F, h=F))


@pytest.fixture
def checkpoint(tmp_path):
    """As examples/char_lm.py writes it."""

    def save(cell, path=tmp_path / "demo.pt", **more):
        torch.manual_seed(0)
        parts = {"embedding": nn.Embedding(5, 8), "rnn": getattr(nn, cell)(8, 8, 2), "head": nn.Linear(8, 5)}
        state = nn.ModuleDict(parts).state_dict()
        config = {"cell": cell, "hidden": 8, "layers": 2, "characters": list("?abc\n")}
        torch.save(config | {"state_dict": state} | more, path)
        return path

    return save


def test_command_with_json(plots, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["gates", "--checkpoint", str(checkpoint("LSTM")), "--text", "ab\nx", "--out", str(out), "--json"]
    assert __main__.main([*command, "--layer", "1", "--units", "0,2-3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["layers"]) == ["rnn.l1"]
    assert found["layers"]["rnn.l1"]["steps"] == 4
    names = ["heatmap_rnn_l1.png", "traces_rnn_l1.png", "openness.png"]
    assert found["pictures"] == [str(out / name) for name in names]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize("cell, pictures", [("GRU", 5), ("RNN", 4)])
def test_command(plots, checkpoint, tmp_path, capsys, cell, pictures):
    command = ["gates", "--checkpoint", str(checkpoint(cell)), "--text", "ab\nx", "--out", str(tmp_path / "out")]
    assert __main__.main(command) == 0
    printed = capsys.readouterr().out
    assert f"rnn.l1: {'rnn_tanh' if cell == 'RNN' else 'gru'}, 8 units, 4 steps" in printed
    assert ("half-life" in printed) == (cell == "GRU")
    assert printed.count(".png") == pictures


@pytest.mark.parametrize(
    "change, message",
    [
        (["--text", ""], "--text must not be empty"),
        (["--layer", "2"], "--layer must be in 0..1, got 2"),
        (["--units", "8"], "units must be in 0..7, got [8]"),
        (["--checkpoint", "no-such.pt"], "No such file or directory: 'no-such.pt'"),
    ],
)
def test_command_with_wrong_input(plots, checkpoint, tmp_path, capsys, change, message):
    command = ["gates", "--checkpoint", str(checkpoint("GRU")), "--text", "ab", "--out", str(tmp_path / "out"), *change]
    assert __main__.main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (["--units", "abc"], "units are numbers and ranges, such as 0,3,8-15, got 'abc'"),
        (["--units", "5-3"], "units are numbers and ranges, such as 0,3,8-15, got '5-3'"),
        (["--top", "0"], "must be a number of at least 1, got '0'"),
    ],
)
def test_command_with_wrong_numbers(capsys, change, message):
    with pytest.raises(SystemExit):
        __main__.main(["gates", "--checkpoint", "x.pt", "--text", "ab", *change])
    assert message in capsys.readouterr().err


def test_command_says_which_characters_the_model_has_not_seen(plots, checkpoint, tmp_path, capsys, monkeypatch):
    seen, shown = [], []
    heatmap, record = plots.heatmap, __main__.record_gates
    monkeypatch.setattr(
        plots, "heatmap", lambda g, **k: shown.append((k["tokens"], len(k["units"]))) or heatmap(g, **k)
    )
    monkeypatch.setattr(__main__, "record_gates", lambda m, x: seen.append(x.flatten().tolist()) or record(m, x))
    command = ["gates", "--checkpoint", str(checkpoint("GRU")), "--text", "axyab", "--out", str(tmp_path / "out")]
    assert __main__.main([*command, "--top", "3"]) == 0
    assert "warning: the model has not seen 'xy'" in capsys.readouterr().err
    assert seen == [[1, 0, 0, 1, 2]]
    assert shown == [("a\ufffd\ufffdab", 3)] * 2
    assert __main__.main([*command[:4], "ab", *command[5:]]) == 0
    assert "warning" not in capsys.readouterr().err


def test_command_where_the_backend_cannot_run(plots, checkpoint, tmp_path, capsys):
    command = ["gates", "--checkpoint", str(checkpoint("GRU")), "--text", "ab", "--out", str(tmp_path / "out")]
    with fusedrnn.backend("cpu", "step"):
        assert __main__.main(command) == 2
    assert "error: " in capsys.readouterr().err


def test_command_with_a_file_of_another_kind(plots, checkpoint, tmp_path, capsys):
    path = tmp_path / "other.pt"
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        assert __main__.main(["gates", "--checkpoint", str(path), "--text", "ab"]) == 2
        assert f"{path} is no checkpoint of examples/char_lm.py" in capsys.readouterr().err
    no_state = {"characters": ["a"], "hidden": 8, "cell": "GRU", "layers": 1, "state_dict": [1]}
    for content in ({"weight": torch.ones(2)}, [1, 2], no_state):
        torch.save(content, path)
        assert __main__.main(["gates", "--checkpoint", str(path), "--text", "ab"]) == 2
        assert f"{path} is no checkpoint of examples/char_lm.py" in capsys.readouterr().err
    checkpoint("GRU", path, layers=1)
    assert __main__.main(["gates", "--checkpoint", str(path), "--text", "ab"]) == 2
    assert "weight_ih_l1" in capsys.readouterr().err
