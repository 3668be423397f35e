"""torch.onnx.export, both exporters: one node a layer, the numbers those of ONNX Runtime and of the reference
evaluator; weights read back from nodes.
"""

import io
import itertools
import warnings

import numpy as np
import pytest
import torch

import fusedrnn
import fusedrnn.onnx
import fusedrnn.zoo

onnx = pytest.importorskip("onnx", reason="export to ONNX is not tested: no onnx (extra 'test')")
pytest.importorskip("onnxscript", reason="export to ONNX is not tested: no onnxscript (extra 'test')")
runtime = pytest.importorskip("onnxruntime", reason="export to ONNX is not tested: no onnxruntime (extra 'test')")

from onnx.reference import ReferenceEvaluator  # noqa: E402

I, H = 3, 5
NAMES = ("LSTM", "GRU", "RNN", "relu")
OPERATOR = {"relu": "RNN"}
SIZES = [(4, 2), (9, 3), (1, 1)]  # T, B
EXPORTERS = [pytest.param(False, id="traced"), pytest.param(True, id="dynamo")]
DYNAMIC = torch.export.Dim.DYNAMIC
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning"),
]


def make(name, num_layers=1, **options):
    if name == "relu":
        return fusedrnn.RNN(I, H, num_layers, nonlinearity="relu", **options)
    return getattr(fusedrnn, name)(I, H, num_layers, **options)


class Several(torch.nn.Module):
    """Layers that get the same input, and every output of theirs as one flat tuple."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, *states):
        """States [6, B, H], of which each layer takes as many as it needs."""
        outputs = []
        for layer in self.layers:
            hx = tuple(s[: layer.num_layers * (2 if layer.bidirectional else 1)] for s in states)
            y, final = layer(x, (hx if len(hx) > 1 else hx[0]) if hx else None)
            outputs += [y, *(final if isinstance(final, tuple) else (final,))]
        return tuple(outputs)


def export(model, args, dynamic, dynamo, **options):
    """The ModelProto; ``dynamic``: for each input the dimensions that vary."""
    buffer, names = io.BytesIO(), [f"in{k}" for k in range(len(args))]
    if dynamo:
        shapes = tuple(dict.fromkeys(dims, DYNAMIC) for dims in dynamic)
        if isinstance(model, Several) and len(args) > 1:  # its *states are one argument
            shapes = (shapes[0], shapes[1:])
        torch.onnx.export(
            model.eval(), args, buffer, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False, **options
        )
    else:
        axes = {name: list(dims) for name, dims in zip(names, dynamic) if dims}
        torch.onnx.export(
            model.eval(), args, buffer, dynamo=False, input_names=names, dynamic_axes=axes or None, **options
        )
    found = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(found, full_check=True)
    return found


def nodes(model, operators=("LSTM", "GRU", "RNN")):
    return [node for node in model.graph.node if node.op_type in operators]


def agree(found, model, args, reference=True):
    with torch.no_grad():
        want = model(*args)
    want = want if isinstance(want, tuple) else (want,)
    session = runtime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), args, strict=True)}
    results = [session.run(None, feed)]
    # The reference evaluator has no RNN with Relu.
    if reference and all(b"Relu" not in a.strings for node in nodes(found) for a in node.attribute):
        results.append(ReferenceEvaluator(found).run(None, feed))
    for got in results:
        for a, b in zip(got, want, strict=True):
            assert a.shape == tuple(b.shape)
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=2e-6)


def check_layers(layers, given, batch_first, dynamo):
    model = Several(*layers)
    states = 0 if not given else 2 if layers[0].mode == "LSTM" else 1

    def inputs(steps, batch):
        x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), I)
        return (x, *(torch.randn(6, batch, H) for _ in range(states)))

    found = export(model, inputs(5, 2), ((0, 1), *((1,),) * states), dynamo)
    assert len(nodes(found)) == sum(layer.num_layers for layer in layers)
    for steps, batch in SIZES:
        agree(found, model, inputs(steps, batch))
    return found


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamo", [EXPORTERS[0], pytest.param(True, id="dynamo", marks=pytest.mark.slow)])
def test_every_layer(dynamo, name, given):
    options = itertools.product((1, 2, 3), (False, True), (False, True))
    layers = [make(name, n, bidirectional=bi, bias=bias) for n, bi, bias in options]
    found = check_layers(layers, given, False, dynamo)
    assert {node.op_type for node in nodes(found)} == {OPERATOR.get(name, name)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_two_bidirectional_layers(dynamo, name):
    """batch_first with states, and every input of a node that is constant is an initializer."""
    found = check_layers([make(name, 2, bidirectional=True, batch_first=True)], True, True, dynamo)
    constants = {t.name for t in found.graph.initializer}
    for node in nodes(found):
        assert set(node.input[1:4]) <= constants


class OneStep(torch.nn.Module):
    def __init__(self, *cells):
        super().__init__()
        self.cells = torch.nn.ModuleList(cells)

    def forward(self, x, h, c):
        outputs = []
        for cell in self.cells:
            for hx in (None, (h, c) if isinstance(cell, fusedrnn.LSTMCell) else h):
                found = cell(x, hx)
                outputs += found if isinstance(found, tuple) else [found]
        return tuple(outputs)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_every_cell(dynamo):
    kinds = [(fusedrnn.LSTMCell, {}), (fusedrnn.GRUCell, {}), (fusedrnn.RNNCell, {})]
    kinds += [(fusedrnn.RNNCell, {"nonlinearity": "relu"}), (fusedrnn.GRUCell, {"bias": False})]
    model = OneStep(*(kind(I, H, **options) for kind, options in kinds))

    def inputs(batch):
        return torch.randn(batch, I), torch.randn(batch, H), torch.randn(batch, H)

    found = export(model, inputs(2), ((0,), (0,), (0,)), dynamo)
    assert len(nodes(found)) == 10
    for batch in (2, 1, 7):
        agree(found, model, inputs(batch))


class First(torch.nn.Module):
    """y of a layer, from whatever it is called with."""

    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x):
        return self.layer(x, **self.options)[0]


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_unbatched_float64_and_dropout_that_is_off(dynamo):
    model = First(fusedrnn.GRU(I, H, 2, dropout=0.5, bidirectional=True))
    x = torch.randn(4, I)
    found = export(model, (x,), ((0,),), dynamo)
    agree(found, model, (torch.randn(7, I),))
    assert "Dropout" not in {node.op_type for node in found.graph.node}
    double, x = First(fusedrnn.RNN(I, H).double()), torch.randn(7, 2, I).double()
    found = export(double, (x[:4],), ((0, 1),), dynamo)
    # ONNX Runtime has no RNN for it.
    np.testing.assert_allclose(ReferenceEvaluator(found).run(None, {"in0": x.numpy()})[0], double(x).detach().numpy())


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_every_state_of_a_gru(dynamo):
    class Every(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = fusedrnn.GRU(I, H, 2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.gru(x, return_all_states=True)

    model = Every()
    found = export(model, (torch.randn(2, 4, I),), ((0, 1),), dynamo)
    agree(found, model, (torch.randn(3, 6, I),))


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize(
    "layer, options, why",
    [
        (fusedrnn.LSTM(I, H, proj_size=2), {}, "no projection"),
        (fusedrnn.GRU(I, H), {"resets": torch.zeros(4, 2, dtype=torch.bool)}, "no resets"),
        (fusedrnn.LSTM(I, H), {"return_all_states": True}, "c after the last step only"),
        (fusedrnn.GRU(I, H).bfloat16(), {}, "not torch.bfloat16"),
        (fusedrnn.Layer(fusedrnn.zoo.mgu, I, H), {}, "none for the cell 'mgu"),
        (fusedrnn.Layer(fusedrnn.zoo.lstm, I, 6, heads=2), {}, "have one head, not 2"),
    ],
    ids=["projection", "resets", "every_c", "bfloat16", "own cell", "heads"],
)
def test_what_onnx_cannot_say_raises(layer, options, why, dynamo):
    x = torch.randn(4, 2, I, dtype=layer.weight_ih_l0.dtype)
    with pytest.raises(Exception, match="no ONNX operator computes this layer") as raised:
        export(First(layer, **options), (x,), ((),), dynamo)
    assert why in str(raised.value)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_a_layer_of_a_built_in_cell_a_frozen_and_a_quantized_one(dynamo):
    layers = [fusedrnn.Layer(fusedrnn.zoo.lstm, I, H, 2, bidirectional=True), fusedrnn.freeze(fusedrnn.GRU(I, H))]
    layers += [fusedrnn.quantize(fusedrnn.GRU(I, H), dtype) for dtype in (torch.int8, torch.bfloat16)]
    for layer in layers:
        model = First(layer).eval()
        found = export(model, (torch.randn(4, 2, I),), ((0, 1),), dynamo)
        assert len(nodes(found)) == layer.num_layers
        agree(found, model, (torch.randn(7, 3, I),))


def test_in_a_branch():
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = fusedrnn.GRU(I, H)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.gru(x)[0], lambda x: self.gru(-x)[0], (x,))

    model, x = Branch(), torch.randn(4, 2, I).abs()
    found = export(model, (x,), ((),), True)
    for each in (x, -x):
        agree(found, model, (each,), reference=False)


class Packed(torch.nn.Module):
    def __init__(self, enforce_sorted, **options):
        super().__init__()
        self.enforce_sorted, self.rnn = enforce_sorted, fusedrnn.LSTM(I, H, **options)

    def forward(self, x, lengths):
        rnn = torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(x, lengths, self.rnn.batch_first, self.enforce_sorted)
        y, (h, c) = self.rnn(packed)
        return rnn.pad_packed_sequence(y, self.rnn.batch_first)[0], h, c


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True, "batch_first": True}])
def test_packed_input_is_traced_to_sequence_lens(options, enforce_sorted):
    model = Packed(enforce_sorted, **options)

    def inputs(*lengths):
        x = torch.randn(max(lengths), len(lengths), I)
        return (x.transpose(0, 1) if "batch_first" in options else x), torch.tensor(lengths)

    found = export(model, inputs(5, 3, 2), ((0, 1), (0,)), False)
    assert all(node.input[4] for node in nodes(found))
    assert len(nodes(found)) == options.get("num_layers", 1)
    for lengths in ((5, 3, 2), (7, 7, 4, 1), *(() if enforce_sorted else ((2, 6, 1, 4, 4),))):
        agree(found, model, inputs(*lengths), reference=False)  # which ignores sequence_lens


def test_packed_input_and_dynamo_names_lengths():
    args = torch.randn(5, 3, I), torch.tensor([5, 3, 2])
    for refused in (
        lambda: export(Packed(False), args, ((), ()), True),
        lambda: torch.export.export(Packed(False), args),
    ):
        with pytest.raises(Exception, match="call the layer on the padded batch with lengths="):
            refused()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_saved_program_is_translated_op_by_op(name, bias):
    model = Several(make(name, 2, bidirectional=True, bias=bias)).eval()
    dynamic = {0: DYNAMIC, 1: DYNAMIC}
    program = torch.export.export(model, (torch.randn(4, 2, I),), dynamic_shapes={"x": dynamic})
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    program, buffer = torch.export.load(stream), io.BytesIO()
    table = fusedrnn.onnx.translation_table(program)
    torch.onnx.export(program, (), buffer, custom_translation_table=table, verbose=False)
    found = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(found, full_check=True)
    assert len(nodes(found)) == 4  # a direction each
    for steps, batch in SIZES:
        agree(found, model, (torch.randn(steps, batch, I),))


def test_saved_program_that_cannot_be_translated():
    class Every(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.LSTM(I, H)

        def forward(self, x):
            return self.rnn(x, return_all_states=True)[2][1]

    program = torch.export.export(Every(), (torch.randn(4, 2, I),))
    with pytest.raises(RuntimeError, match="c after the last step only"):
        fusedrnn.onnx.translation_table(program)
    program = torch.export.export(First(fusedrnn.LSTM(I, H, proj_size=2)), (torch.randn(4, 2, I),))
    table = fusedrnn.onnx.translation_table(program)
    with pytest.raises(Exception, match="no projection"):
        torch.onnx.export(program, (), io.BytesIO(), custom_translation_table=table, verbose=False)
    program = torch.export.export(First(fusedrnn.Layer(fusedrnn.zoo.gru, I, 6, heads=2)), (torch.randn(4, 2, I),))
    with pytest.raises(Exception, match="one head, not 2"):
        torch.onnx.export(program, (), io.BytesIO(), custom_translation_table=table, verbose=False)


def same(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_weights_are_read_back(dynamo, name, tmp_path):
    layer = make(name, 2, bidirectional=True)
    found = export(First(layer), (torch.randn(4, 2, I),), ((),), dynamo)
    path = tmp_path / "model.onnx"
    onnx.save(found, path)
    for source in (found, path, str(path)):
        other = make(name, 2, bidirectional=True)
        assert fusedrnn.onnx.load_weights(other, source) is other
        same(other, layer)
    theirs = getattr(torch.nn, OPERATOR.get(name, name))(
        I, H, 2, bidirectional=True, **({"nonlinearity": "relu"} if name == "relu" else {})
    )
    same(fusedrnn.onnx.load_weights(theirs, found), layer)


def test_weights_of_chosen_nodes_and_of_torch_nns_export():
    layer, theirs = fusedrnn.LSTM(I, 300), torch.nn.LSTM(I, 300)  # too large for the exporter to reorder
    for module in (layer, theirs):
        for dynamo in (True, False):
            found = export(First(module), (torch.randn(4, 2, I),), ((),), dynamo)
            same(fusedrnn.onnx.load_weights(fusedrnn.LSTM(I, 300), found), module)
    gru, lstm, cell = fusedrnn.GRU(I, H), fusedrnn.LSTM(I, H, bias=False), fusedrnn.GRUCell(I, H)
    model = Several(gru, lstm)
    found = export(model, (torch.randn(4, 2, I),), ((),), False)
    names = {node.op_type: node.name for node in nodes(found)}
    for source, target in ((gru, fusedrnn.GRU(I, H)), (gru, cell), (lstm, fusedrnn.LSTM(I, H))):
        fusedrnn.onnx.load_weights(target, found, names[source.mode])
    same(cell, gru)
    target = fusedrnn.onnx.load_weights(fusedrnn.LSTM(I, H), found, names["LSTM"])
    assert torch.equal(target.weight_hh_l0, lstm.weight_hh_l0)
    assert not target.bias_hh_l0.any()
    same(fusedrnn.onnx.load_weights(fusedrnn.LSTM(I, H, bias=False), found, [names["LSTM"]]), lstm)


def one_node(operator, **attributes):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    shapes = {"W": (1, gates * H, I), "R": (1, gates * H, H), "B": (1, 2 * gates * H)}
    inputs = ["X", *shapes]
    if attributes.pop("peepholes", False):
        shapes["P"] = (1, 3 * H)
        inputs += ["", "", "", "P"]
    node = onnx.helper.make_node(operator, inputs, ["Y"], name="n", hidden_size=H, **attributes)
    value = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(np.ones(s, np.float32), k) for k, s in shapes.items()]
    graph = onnx.helper.make_graph([node], "g", [value("X", 1, None)], [value("Y", 1, None)], constants)
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize(
    "model, module, why",
    [
        (one_node("GRU"), fusedrnn.GRU(I, H), "linear_before_reset is 0"),
        (one_node("LSTM", clip=1.0), fusedrnn.LSTM(I, H), "clip"),
        (one_node("LSTM", input_forget=1), fusedrnn.LSTM(I, H), "input_forget"),
        (one_node("LSTM", direction="reverse"), fusedrnn.LSTM(I, H), "direction is 'reverse'"),
        (one_node("LSTM", peepholes=True), fusedrnn.LSTM(I, H), "peepholes"),
        (one_node("LSTM"), fusedrnn.LSTM(I, H, bidirectional=True), "direction is 'forward'"),
        (one_node("LSTM"), fusedrnn.LSTM(I, H, 2), "takes 2 nodes, got 1"),
        (one_node("LSTM"), fusedrnn.LSTM(I, H + 1), "weight_ih_l0 must have shape"),
        (one_node("LSTM"), fusedrnn.LSTM(I, H, bias=False), "has biases"),
        (one_node("LSTM"), fusedrnn.GRU(I, H), "the module is a GRU"),
        (one_node("RNN", activations=["Relu"]), fusedrnn.RNN(I, H), "ours .'tanh"),
        (one_node("RNN"), fusedrnn.RNN(I, H, nonlinearity="relu"), "ours .'relu"),
    ],
)
def test_nodes_that_do_not_fit(model, module, why):
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=why):
        fusedrnn.onnx.load_weights(module, model)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_load_weights_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="recurrent layer or cell, got Linear"):
        fusedrnn.onnx.load_weights(torch.nn.Linear(2, 2), one_node("LSTM"))
    with pytest.raises(ValueError, match="no recurrent node 'other', it has n"):
        fusedrnn.onnx.load_weights(fusedrnn.LSTM(I, H), one_node("LSTM"), "other")
    open_weights = one_node("LSTM")
    del open_weights.graph.initializer[0]
    with pytest.raises(ValueError, match="depends on 'W'"):
        fusedrnn.onnx.load_weights(fusedrnn.LSTM(I, H), open_weights)


def test_export_leaves_nothing_behind():
    """After an export, also one that failed, a call computes as before."""
    layer, x = fusedrnn.LSTM(I, H), torch.randn(4, 2, I)
    want = layer(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(First(layer), (x,), ((),), False)
        with pytest.raises(RuntimeError):
            export(First(fusedrnn.LSTM(I, H, proj_size=2)), (x,), ((),), False)
    assert not torch.jit.is_tracing()
    assert torch.equal(layer(x)[0], want)


class Loop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = fusedrnn.LSTMCell(I, H)

    def forward(self, x):
        hx, every = None, []
        for t in range(3):
            hx = self.cell(x[t], hx)
            every.append(hx[0])
        return torch.stack(every)


class EncoderDecoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = fusedrnn.LSTM(I, H, 2, bidirectional=True)
        self.decoder = fusedrnn.LSTM(2 * H, H, 2, bidirectional=True)

    def forward(self, x):
        return self.decoder(*self.encoder(x))[0]


def with_weight_norm():
    return First(torch.nn.utils.parametrizations.weight_norm(fusedrnn.GRU(I, H), "weight_hh_l0"))


def with_tied_weights():
    gru = fusedrnn.GRU(I, H, bidirectional=True)
    gru.weight_hh_l0_reverse = gru.weight_hh_l0
    return First(gru)


MODELS = [(Loop, 3), (EncoderDecoder, 4), (with_weight_norm, 1), (with_tied_weights, 1)]


@pytest.mark.parametrize("make_model, count", MODELS)
@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_models(dynamo, make_model, count):
    model = make_model()
    found = export(model, (torch.randn(4, 2, I),), ((1,),), dynamo)
    assert len(nodes(found)) == count
    agree(found, model, (torch.randn(4, 3, I),))


@pytest.mark.parametrize(
    "name, options", [("LSTM", {"proj_size": 2}), ("GRU", {"bidirectional": True, "num_layers": 2})]
)
def test_a_saved_program_with_lengths(name, options, tmp_path):
    """No node computes it: lowered to operations of torch it becomes a Scan."""
    model = Padded(getattr(fusedrnn, name)(3, 4, batch_first=True, **options)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    example = (torch.randn(2, 5, 3), torch.tensor([3, 5]))
    program = torch.export.export(model, example, dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic}))
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    with pytest.raises(RuntimeError, match=r"no ONNX operator.*run_decompositions\(fusedrnn.decompositions\(\)\)"):
        torch.onnx.export(
            program, (), tmp_path / "none.onnx", custom_translation_table=fusedrnn.onnx.translation_table(program),
            dynamo=True, verbose=False,
        )  # fmt: skip
    lowered = program.run_decompositions(fusedrnn.decompositions())
    torch.onnx.export(lowered, (), tmp_path / "program.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "program.onnx")
    for x, lengths in ((torch.randn(4, 9, 3), [2, 9, 0, 1]), (torch.randn(1, 2, 3), [2])):
        lengths = torch.tensor(lengths)
        feeds = {given.name: t.numpy() for given, t in zip(session.get_inputs(), (x, lengths))}
        for got, want in zip(session.run(None, feeds), model(x, lengths), strict=True):
            torch.testing.assert_close(torch.tensor(got), want)


class Padded(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        y, states = self.rnn(x, lengths=lengths)
        return y, *(states if isinstance(states, tuple) else (states,))
