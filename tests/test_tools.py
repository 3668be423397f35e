"""Other tools: what asks a module for its class, what looks its type up in a table, what reads its weights."""

import abc
import copy
import importlib
import pickle
import sys
import typing
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import _build, integrations
from fusedrnn.convert import as_torch

LAYERS, CELLS = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")
NAMES = LAYERS + CELLS


def first(outputs) -> torch.Tensor:
    while isinstance(outputs, tuple):
        outputs = outputs[0]
    return outputs


def test_the_library_knows_of_every_class():
    for name in NAMES:
        ours, theirs = getattr(fusedrnn, name), getattr(nn, name)
        assert issubclass(ours, theirs)
        assert isinstance(ours(3, 4), theirs)
        assert not isinstance(theirs(3, 4), ours)
        assert inspect_of(ours) - {"packed_bytes", "stream"} == inspect_of(theirs), name


def inspect_of(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")} - {"backend", "algorithm", "recompute", "mode"}


@pytest.mark.parametrize("name", NAMES)
def test_init_functions(name):
    def init(module):
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and isinstance(module, getattr(nn, name)):
            for p in module.parameters():
                nn.init.constant_(p, 0.5)

    model = nn.Sequential(getattr(fusedrnn, name)(3, 4)).apply(init)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_dynamo_traces_ours_and_treats_torch_s_as_before(name):
    from torch._dynamo.exc import Unsupported

    ours, theirs = getattr(fusedrnn, name)(3, 4), getattr(nn, name)(3, 4)
    compiled = torch.compile(nn.Sequential(ours), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(compiled(x)[0], ours(x)[0])
    converted = fusedrnn.convert(type("Mine", (type(theirs),), {"helper": len})(3, 4))
    torch.testing.assert_close(torch.compile(converted, fullgraph=True, backend="aot_eager")(x)[0], converted(x)[0])
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(Unsupported, match="Dynamo does not support RNN, GRU, or LSTM"):
        torch.compile(nn.Sequential(theirs), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("name", NAMES)
def test_skip_init(name):
    module = nn.utils.skip_init(getattr(fusedrnn, name), 3, 4, dtype=torch.float64)
    module.load_state_dict(getattr(nn, name)(3, 4, dtype=torch.float64).state_dict())
    assert first(module(torch.randn(2, 3, dtype=torch.float64))).shape == (2, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_expanded_weights_are_torch_s(name):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    ours = getattr(fusedrnn, name)(3, 4, batch_first=True)
    theirs = fusedrnn.revert(copy.deepcopy(ours))
    x, errors = torch.randn(2, 5, 3), []
    for module in (ours, theirs):
        try:
            call_for_per_sample_grads(module)(x)[0].sin().sum().backward()
        except RuntimeError as error:  # torch.nn.LSTM's: its op has no rule there
            errors.append(str(error))
            continue
    assert len(errors) in (0, 2)
    assert len(set(errors)) < 2
    if not errors:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample, q.grad_sample)


@pytest.mark.parametrize("spec", ["theirs", "ours", "default"])
@pytest.mark.parametrize("name", NAMES)
def test_quantize_dynamic(name, spec):
    from torch.ao.quantization import quantize_dynamic

    model = nn.Sequential(getattr(fusedrnn, name)(3, 4))
    chosen = {"theirs": {getattr(nn, name)}, "ours": {type(model[0])}, "default": None}[spec]
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quantised = quantize_dynamic(model, chosen)
        want = quantize_dynamic(fusedrnn.revert(copy.deepcopy(model)), chosen and {getattr(nn, name)})
    assert type(model[0]) is getattr(fusedrnn, name)
    if name == "RNN":
        assert type(quantised[0]) is fusedrnn.RNN
        assert any("no dynamically quantised RNN" in str(w.message) for w in told) == (spec != "default")
        return
    assert type(quantised[0]) is type(want[0])
    assert "torch.ao.nn.quantized" in type(quantised[0]).__module__
    assert torch.equal(first(quantised(x)), first(want(x)))
    torch.testing.assert_close(first(quantised(x)), first(model(x)), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["theirs", "ours"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", *CELLS])
def test_a_quantised_graph(name, spec):
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, quantize_fx

    model = nn.Sequential(getattr(fusedrnn, name)(3, 4), nn.Identity()).eval()
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)

    def quantised(model, chosen):
        mapping = QConfigMapping().set_object_type(chosen, default_dynamic_qconfig)
        return quantize_fx.convert_fx(quantize_fx.prepare_fx(model, mapping, (x,)))

    got = quantised(model, getattr(nn if spec == "theirs" else fusedrnn, name))
    want = quantised(fusedrnn.revert(copy.deepcopy(model)), getattr(nn, name))
    assert type(getattr(got, "0")) is type(getattr(want, "0"))
    assert "torch.ao.nn.quantized" in type(getattr(got, "0")).__module__
    assert torch.equal(first(got(x)), first(want(x)))
    assert type(model[0]) is getattr(fusedrnn, name)


@pytest.mark.filterwarnings("ignore")
def test_statically_quantised():
    from torch.ao import quantization

    model, x = nn.Sequential(fusedrnn.LSTM(8, 6)).eval(), torch.randn(5, 2, 8)
    found = []
    for each in (model, fusedrnn.revert(copy.deepcopy(model))):
        each.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(each)
        prepared(x)
        found.append(type(quantization.convert(prepared)[0]))
    assert found[0] is found[1]
    assert "torch.ao.nn.quantized" in found[0].__module__


def test_what_a_library_is_told_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "a_counter.py").write_text("import torch\ntable = {torch.nn.LSTM: 'lstm', torch.nn.Linear: 'linear'}\n")
    (tmp_path / "a_changed_counter.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("a_counter", "a_changed_counter"):
        monkeypatch.setitem(integrations._TABLES, name, lambda module: integrations._enter_types(module.table))
    counter = importlib.import_module("a_counter")
    assert counter.table[fusedrnn.LSTM] == "lstm"
    assert set(counter.table) == {nn.LSTM, nn.Linear, fusedrnn.LSTM}
    assert "exec_module" not in vars(counter.__spec__.loader)
    counter.table = {nn.GRU: "gru"}
    assert "a_counter" in fusedrnn.integrations.register()
    assert counter.table[fusedrnn.GRU] == "gru"
    with pytest.warns(UserWarning, match="this version of a_changed_counter cannot be told"):
        importlib.import_module("a_changed_counter")
    del sys.modules["a_changed_counter"]  # or every later call of register would raise


def test_register_imports_nothing():
    before = set(sys.modules)
    assert set(fusedrnn.integrations.register()) <= before
    assert set(sys.modules) == before


@pytest.mark.parametrize("name", NAMES)
def test_jit_script_says_what_to_do(name):
    model = nn.Sequential(getattr(fusedrnn, name)(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=rf"cannot compile fusedrnn.{name}: script fusedrnn.revert"):
            torch.jit.script(model)
        scripted = torch.jit.script(fusedrnn.revert(copy.deepcopy(model)))
    x = torch.randn(2, 3)
    torch.testing.assert_close(first(scripted(x)), first(model(x)))
    assert type(model[0]) is getattr(fusedrnn, name)


class Decoder(nn.GRU):
    """As many models have one: it adds a helper and overrides no computation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset_parameters()

    def init_hidden(self, n):
        return torch.zeros(self.num_layers, n, self.hidden_size)

    def flatten_parameters(self):
        raise AssertionError("nobody needs this")

    def extra_repr(self):
        return "decoder"


class DecoderCell(nn.LSTMCell):
    @property
    def width(self):
        return self.hidden_size


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", [Decoder, DecoderCell])
def test_a_subclass_that_overrides_no_computation(cls, monkeypatch):
    if cls is Decoder:
        monkeypatch.delattr(Decoder, "flatten_parameters")
    model = nn.Sequential(cls(3, 4))
    x = torch.randn(2, 3)
    want = first(model(x))
    ours = getattr(fusedrnn, cls.__base__.__name__)
    assert str(fusedrnn.conversion_report(model)[0]) == f"0 ({cls.__name__}): left: convert was not called"
    fusedrnn.convert(model)
    layer = model[0]
    assert isinstance(layer, cls)
    assert isinstance(layer, ours)
    assert type(layer).__name__ == cls.__name__
    assert type(layer).__module__ == __name__
    assert layer._may_be_direct
    assert repr(layer) == repr(cls(3, 4))
    assert layer.width == 4 if cls is DecoderCell else layer.init_hidden(2).shape == (1, 2, 4)
    assert str(fusedrnn.conversion_report(model)[0]) == f"0 ({cls.__name__}): swapped"
    assert fusedrnn.convert(model)[0] is layer
    torch.testing.assert_close(first(model(x)), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(layer)
        assert torch.equal(first(other(x)), first(model(x)))
    weight = "weight_hh" if cls is DecoderCell else "weight_hh_l0"
    parametrizations.weight_norm(layer, weight)
    torch.testing.assert_close(first(model(x)), want)
    parametrizations.weight_norm(layer, weight.replace("hh", "ih"))
    fusedrnn.revert(model)
    torch.testing.assert_close(first(model(x)), want)
    assert not isinstance(layer, ours)
    for name in (weight, weight.replace("hh", "ih")):
        nn.utils.parametrize.remove_parametrizations(layer, name)
    assert type(layer) is cls


class Padded(abc.ABC, nn.RNNBase):
    """As in pytorch-forecasting: a base class beside torch.nn's, whose forward hands over to super()."""

    @abc.abstractmethod
    def start(self): ...

    def forward(self, x, hx=None, lengths=None):
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, hx = super().forward(packed, hx=hx)
        return nn.utils.rnn.pad_packed_sequence(y)[0], hx


class PaddedGRU(Padded, nn.GRU):
    def start(self):
        return None


class OfItsOwn(nn.GRU):
    def forward(self, x, hx=None):
        return nn.GRU.forward(self, x, hx)


def test_a_forward_that_hands_over():
    layer, x = PaddedGRU(3, 4), torch.randn(5, 2, 3)
    want = layer(x, lengths=torch.tensor([2, 5]))
    fusedrnn.convert(layer)
    assert isinstance(layer, fusedrnn.GRU)
    ran = []
    with fusedrnn.functional.recording(lambda *about: ran.append(about[0].name)):
        got = layer(x, lengths=torch.tensor([2, 5]))
    assert ran == ["gru"]
    torch.testing.assert_close(got, want)
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert type(fusedrnn.revert(layer)) is PaddedGRU
    with pytest.warns(UserWarning, match="a subclass of GRU that overrides forward"):
        fusedrnn.convert(OfItsOwn(3, 4))


def test_a_twin_shares_the_parameters_and_leaves_the_module():
    ours = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True, backend="reference")
    twin = as_torch(ours)
    assert type(twin) is nn.LSTM
    assert all(p is q for p, q in zip(twin.parameters(), ours.parameters(), strict=True))
    twin.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    assert ours.weight_hh_l0 is not twin.weight_hh_l0
    assert "backend" not in vars(twin)
    assert ours.backend == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_fx_keeps_the_layer_as_a_leaf(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn = nn.Linear(3, 3), getattr(fusedrnn, name)(3, 4)

        def forward(self, x, h):
            y = self.rnn(self.first(x), (h, h) if name.startswith("LSTM") else h)
            return (y[0] if name in LAYERS or name == "LSTMCell" else y).relu()

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["first", "rnn"]
    assert traced.rnn is model.rnn
    x, h = torch.randn(2, 3), torch.randn(1 if name in LAYERS else 2, 4)
    assert torch.equal(traced(x, h), model(x, h))
    if name in LAYERS:
        options = torch.fx.symbolic_trace(KeywordModel(model.rnn))
        assert torch.equal(
            options(x[None], h[None], torch.tensor([1, 0])),
            KeywordModel(model.rnn)(x[None], h[None], torch.tensor([1, 0])),
        )


class KeywordModel(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h, lengths):
        return self.rnn(x, lengths=lengths, padding_value=-1.0)[0]


class Duck:
    """No Tensor, but something that answers in its place."""

    called: typing.ClassVar[list] = []

    def __init__(self, t):
        self.t = t

    def __getattr__(self, name):
        return getattr(self.__dict__["t"], name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def bare(value):
            if isinstance(value, Duck):
                return value.t
            return type(value)(map(bare, value)) if type(value) in (list, tuple) else value

        cls.called.append(function)
        return function(*map(bare, args), **{key: bare(value) for key, value in (kwargs or {}).items()})


class Mine(fusedrnn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0] * 2


@pytest.mark.parametrize("cls", [*(getattr(fusedrnn, name) for name in NAMES), Mine])
def test_what_answers_torch_function(cls):
    module = cls(3, 4)
    x, h = torch.randn(2, 3), torch.randn(1 if issubclass(cls, nn.RNNBase) else 2, 4)
    if issubclass(cls, nn.RNNBase):
        x, h = x[:, None], h[None]
    states = [h, h] if "LSTM" in cls.__name__ else [h]

    def call(wrap_x, wrap_h):
        hx = [wrap_h(s) for s in states]
        return first(module(wrap_x(x), tuple(hx) if len(hx) > 1 else hx[0]))

    for wraps in ((Duck, Duck), (Duck, lambda t: t), (lambda t: t, Duck)):
        Duck.called.clear()
        assert torch.equal(call(*wraps), call(lambda t: t, lambda t: t))
        assert Duck.called[0].__qualname__ == f"{'GRU' if cls is Mine else cls.__name__}.forward"
    assert torch.equal(first(module(Duck(x))), first(module(x)))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="must be a Tensor"):
        cls.__mro__[cls is Mine].forward(module, Duck(x))
    with pytest.raises(TypeError, match="must be a"):
        module(object())


def test_a_packed_batch_of_what_answers_torch_function():
    layer, x = fusedrnn.LSTM(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 2])
    layer.register_forward_hook(lambda *_: None)
    duck = nn.utils.rnn.PackedSequence(packed.data, packed.batch_sizes)._replace(data=Duck(packed.data))
    Duck.called.clear()
    assert torch.equal(layer(duck)[0].data, layer(packed)[0].data)
    assert Duck.called


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_tensor_subclasses_pass_through(name):
    module, x = getattr(fusedrnn, name)(3, 4), torch.randn(2, 3, requires_grad=True)
    y = first(module(x.as_subclass(Subclass)))
    assert type(y) is Subclass
    got, want = (torch.autograd.grad(v.sum(), x)[0] for v in (y, first(module(x))))
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


class Doubled(nn.Module):
    def forward(self, w):
        return w * 2


def doubled_list(m):
    m._flat_weights = [w * 2 for w in m._flat_weights]


def doubled_item(m):
    m._flat_weights[1] = m._flat_weights[1] * 2


def doubled_by_a_hook_in_the_list(m):
    m.register_forward_pre_hook(lambda m, _: m._flat_weights.__setitem__(1, m.weight_hh_l0 * 2))


def doubled_by_a_hook_by_name(m):
    m.raw = m.weight_hh_l0
    del m.weight_hh_l0
    m.register_forward_pre_hook(lambda m, _: setattr(m, "weight_hh_l0", m.raw * 2))


def set_and_then_doubled(m):
    m.weight_hh_l0 = nn.Parameter(m.weight_hh_l0.detach() + 1)
    with torch.no_grad():
        m(torch.zeros(1, 1, 3))
    doubled_list(m)


def put_among_the_parameters(m):
    m._parameters["weight_hh_l0"] = nn.Parameter(m.weight_hh_l0.detach() * 2)


def deleted(m):
    w = m.weight_hh_l0
    del m.weight_hh_l0
    m._flat_weights[1] = w * 2


def parametrized(m):
    nn.utils.parametrize.register_parametrization(m, "weight_hh_l0", Doubled())


WEIGHTS = (
    doubled_list, doubled_item, doubled_by_a_hook_in_the_list, doubled_by_a_hook_by_name, set_and_then_doubled,
    put_among_the_parameters, deleted, parametrized,
)  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_set_in_any_way_are_used(change, backend):
    torch.manual_seed(0)
    theirs, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    ours = fusedrnn.GRU(3, 4, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    plain = theirs(x)[0]
    for module in (theirs, ours):
        change(module)
    want = theirs(x)[0]
    assert not torch.allclose(want, plain)
    for got in (ours(x)[0], torch.compile(ours, fullgraph=True, backend="aot_eager")(x)[0]):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], want)
    if change is not deleted:  # _apply of torch.nn puts the named ones back, and so does ours
        for module in (theirs, ours):
            module.double()
        torch.testing.assert_close(ours(x.double())[0], theirs(x.double())[0])


def test_weights_that_a_class_computes_are_used():
    def doubled(base):
        got = lambda self: [getattr(self, name) * 2 for name in self._flat_weights_names]
        return type("Doubled", (base,), {"_flat_weights": property(got, lambda self, _: None)})

    torch.manual_seed(0)
    theirs, ours, x = doubled(nn.LSTM)(3, 4), doubled(fusedrnn.LSTM)(3, 4), torch.randn(5, 2, 3)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_every_public_method_is_torch_s(name):
    theirs, ours = (getattr(package, name)(3, 4, 2, bidirectional=True) for package in (nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    x, h, order = torch.randn(5, 2, 3), torch.randn(4, 2, 4), torch.tensor([1, 0])
    hx = (h, h + 1) if name == "LSTM" else h
    for call in (
        lambda m: m.permute_hidden(hx, order),
        lambda m: m.permute_hidden(hx, None),
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_hidden_size(x, torch.tensor([2, 1])),
        lambda m: m.check_input(x, None),
        lambda m: m.check_forward_args(x, hx, None),
        lambda m: m.check_hidden_size(h, (4, 2, 4)),
        lambda m: m.extra_repr(),
        lambda m: m.all_weights,
    ):
        got, want = call(ours), call(theirs)
        assert str(got) == str(want)
    for call in (
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_forward_args(x, (h[:1], h[:1]) if name == "LSTM" else h[:1], None),
        lambda m: m.check_hidden_size(h, (4, 2, 5)),
    ):
        errors = []
        for module in (theirs, ours):
            with pytest.raises(RuntimeError) as raised:
                call(module)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
    if name == "LSTM":
        assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)


@pytest.mark.parametrize("method", ["permute_hidden", "check_forward_args", "get_expected_hidden_size"])
def test_a_subclass_that_overrides_a_public_method_is_asked(method):
    asked = []

    def override(self, *args):
        asked.append(method)
        return getattr(fusedrnn.LSTM, method)(self, *args)

    layer = type("Asked", (fusedrnn.LSTM,), {method: override})(3, 4)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [2, 5], enforce_sorted=False)
    h = torch.randn(1, 2, 4)
    want = fusedrnn.LSTM.forward(plain := fusedrnn.LSTM(3, 4), packed, (h, h))
    layer.load_state_dict(plain.state_dict())
    for grad in (True, False):
        asked.clear()
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(packed, (h, h))[1][0], want[1][0])
        assert asked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wheel", [True, False])
@pytest.mark.parametrize("name, options", [("LSTM", {}), ("GRUCell", {}), ("RNN", {"backend": "reference"})])
def test_the_profiler_sees_the_op(name, options, wheel, grad, monkeypatch):
    if wheel:  # which has no _direct
        monkeypatch.setattr(_build, "_calls", _build._small_calls)
    module = getattr(fusedrnn, name)(3, 4, **options)
    x = torch.randn(5, 3) if name in CELLS else torch.randn(5, 2, 3)
    with torch.set_grad_enabled(grad), torch.profiler.profile(record_shapes=True) as profile:
        y = first(module(x))
        if grad:
            y.sum().backward()
    (seen,) = (e for e in profile.events() if e.name == "fusedrnn::sequence")
    assert [1, *x.shape][-2:] == next(s for s in seen.input_shapes if s)[-2:]
    assert sum(e.name == "fusedrnn::sequence_backward" for e in profile.events()) == grad


def needs(*packages: str):
    """The packages, imported; skips where one is missing."""
    return [
        pytest.importorskip(name, reason=f"whether {name} sees fusedrnn's layers is not tested: extra 'tools'")
        for name in packages
    ]


def model_of(package, name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(getattr(package, name)(3, 4), *([nn.Identity()] if name in CELLS else []))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_counters(name):
    thop, ptflops, fvcore = needs("thop", "ptflops", "fvcore.nn")
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    counted = []
    for package in (nn, fusedrnn):
        model = model_of(package, name)
        macs = thop.profile(copy.deepcopy(model), inputs=(x,), verbose=False)
        for backend in ("pytorch", "aten"):
            complexity = ptflops.get_model_complexity_info(
                copy.deepcopy(model), tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, backend=backend,
                input_constructor=lambda _: {"input": x}, verbose=False,
            )  # fmt: skip
            macs += complexity
        counted.append(macs)
        if package is fusedrnn:
            of_products = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total()
    want, got = counted
    assert got[:4] == want[:4]  # thop and the table of classes
    assert got[0] > 0
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name.removesuffix("Cell")]
    products = x.shape[:-1].numel() * gates * 4 * (3 + 4)
    assert got[4] == of_products == products  # what counts ops


@pytest.mark.parametrize("name, proj_size", [*((name, 0) for name in NAMES), ("LSTM", 2)])
def test_flop_counter(name, proj_size):
    """The matrix products of forward, and those of backward as torch counts a product's: one for each gradient."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[name.removesuffix("Cell")]
    I, H, P, rows = 3, 4, proj_size or 4, 2 if name in CELLS else 10
    module = getattr(fusedrnn, name)(I, H, **({"proj_size": proj_size} if proj_size else {}))
    x = torch.randn(2, I) if name in CELLS else torch.randn(5, 2, I)
    of_x, of_h, of_projection = gates * H * I, gates * H * P, H * P if proj_size else 0
    for with_dx in (False, True):
        x = x.detach().requires_grad_(with_dx)
        with FlopCounterMode(display=False) as forward:
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        assert forward.get_total_flops() == 2 * rows * (of_x + of_h + of_projection)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        want = 2 * rows * ((1 + with_dx) * of_x + 2 * (of_h + of_projection))
        assert backward.get_total_flops() == want


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.rnn = getattr(fusedrnn, name)(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_opacus(name):
    opacus, validators = needs("opacus", "opacus.validators")

    torch.manual_seed(0)
    model, x = Classifier(name), torch.randn(6, 5, 3)
    (error,) = validators.ModuleValidator.validate(model)
    assert "ShouldReplace" in type(error).__name__
    private = validators.ModuleValidator.fix(model)
    torch.testing.assert_close(private(x), model(x))
    data = torch.utils.data.TensorDataset(x, torch.randint(0, 2, (6,)))
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=private,
        optimizer=torch.optim.SGD(private.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(inputs), labels).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torchrl(name):
    rl, tensordict = needs("torchrl.modules", "tensordict")
    keywords = {"input_size": 3, "hidden_size": 4, "in_key": "obs", "out_key": "emb"}
    torch.manual_seed(0)
    theirs = getattr(rl, f"{name}Module")(**keywords)
    converted = fusedrnn.convert(copy.deepcopy(theirs))
    keys = {"in_keys": ["obs", *theirs.in_keys[1:]], "out_keys": theirs.out_keys}
    layer = getattr(fusedrnn, name)(3, 4, batch_first=True)
    layer.load_state_dict(getattr(theirs, name.lower()).state_dict())
    given = getattr(rl, f"{name}Module")(**{name.lower(): layer}, **keys)
    starts = (torch.arange(24) % 5 == 0).view(4, 6, 1)
    data = tensordict.TensorDict({"obs": torch.randn(4, 6, 3), "is_init": starts}, [4, 6])
    seen = []
    for module in (theirs, converted, given):
        assert isinstance(getattr(module, name.lower()), getattr(fusedrnn if module is not theirs else nn, name))
        with rl.set_recurrent_mode(True):
            y = module(data.clone())["emb"]
        step = module(data[:, 0].clone())
        gradients = torch.autograd.grad(y.sin().sum(), list(module.parameters()))
        seen.append([y, step["emb"], *gradients])
    for other in seen[1:]:
        for got, want in zip(other, seen[0], strict=True):
            torch.testing.assert_close(got, want)
