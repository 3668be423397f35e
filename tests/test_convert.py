"""convert and revert: modules and parameters stay the same objects, only the class of a module changes."""

import copy
import functools
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fusedrnn

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.fixture(autouse=True)
def _nothing_is_left(recwarn):
    """A module left that a test does not expect to be left fails it."""
    yield
    assert not [str(w.message) for w in recwarn if " as it is: " in str(w.message)]


class Nested(nn.Module):
    """All six classes, two levels down, in lists and dictionaries."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: getattr(nn, name)(4, 4) for name in NAMES[:3]})
        self.cells = nn.Sequential(nn.ModuleList([getattr(nn, name)(4, 4) for name in NAMES[3:]]))
        self.relu = nn.RNN(4, 4, nonlinearity="relu")

    def recurrent(self) -> list[nn.Module]:
        return [*self.layers.values(), *self.cells[0], self.relu]

    def forward(self, x):  # [3, 4]
        outputs = [module(x) for module in self.recurrent()]
        return torch.stack([y[0] if isinstance(y, tuple) else y for y in outputs])


def names_of(modules) -> list[str]:
    return [f"{type(m).__module__.split('.')[0]}.{type(m).__name__}" for m in modules]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.stack = nn.ModuleList([nn.LSTM(6, 8, bidirectional=True), nn.LSTM(16, 8, num_layers=2, dropout=0.1)])
        self.shared = self.stack[1]
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.stack:
            x, _ = layer(x)
        return self.head(x)


def test_convert_shares_parameters_and_revert_undoes_it():
    model = Tagger().eval()
    tokens = torch.randint(0, 11, (7, 3))
    want, before = model(tokens), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fusedrnn.convert(model) is model
    assert [type(m) for m in model.stack] == [fusedrnn.LSTM] * 2
    assert model.shared is model.stack[1]
    assert not model.stack[1].training
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    torch.testing.assert_close(model(tokens), want)
    model(tokens).sum().backward()
    optimizer.step()
    changed = model(tokens)
    assert not torch.allclose(changed, want)
    fusedrnn.revert(model)
    assert [type(m) for m in model.stack] == [nn.LSTM] * 2
    torch.testing.assert_close(model(tokens), changed)


def test_a_layer_itself():
    layer = nn.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    want = layer(x)[0]
    assert fusedrnn.convert(layer) is layer
    assert type(layer) is fusedrnn.LSTM
    torch.testing.assert_close(layer(x)[0], want)
    assert fusedrnn.revert(layer) is layer
    assert type(layer) is nn.LSTM
    assert torch.equal(layer(x)[0], want)


def test_state_dicts_fit_both_ways():
    model = Tagger()
    state = copy.deepcopy(model.state_dict())
    fusedrnn.convert(model).load_state_dict(state, strict=True)
    fusedrnn.revert(model).load_state_dict(state, strict=True)


def test_all_six_classes_nested():
    model, x = Nested().eval(), torch.randn(3, 4)
    before, want, state = dict(model.named_modules()), model(x), copy.deepcopy(model.state_dict())
    fusedrnn.convert(model)
    assert dict(model.named_modules()) == before
    assert names_of(model.recurrent()) == [f"fusedrnn.{name}" for name in (*NAMES, "RNN")]
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model(x), want)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    fusedrnn.convert(model)
    fusedrnn.revert(model)
    assert names_of(model.recurrent()) == [f"torch.{name}" for name in (*NAMES, "RNN")]
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_survives_with_its_module(name):
    module, x = getattr(nn, name)(3, 4), torch.randn(2, 3, requires_grad=True)
    reference, seen = weakref.ref(module), []

    def note(kind):
        return lambda hooked, *args, **keywords: seen.append((kind, hooked is module, type(hooked)))

    module.register_forward_hook(note("forward"))
    module.register_forward_pre_hook(note("forward pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_state_dict_post_hook(note("state_dict"))
    module.register_state_dict_pre_hook(note("state_dict pre"))
    module.register_load_state_dict_pre_hook(note("load_state_dict pre"))
    module.register_load_state_dict_post_hook(note("load_state_dict"))
    removed = module.register_forward_hook(note("removed"))
    fusedrnn.convert(module)
    removed.remove()
    assert reference() is module
    y = module(x)
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    module.load_state_dict(module.state_dict())
    ours = getattr(fusedrnn, name)
    assert sorted(seen) == sorted(
        (f"{kind}{pre}", True, ours)
        for kind in ("forward", "backward", "state_dict", "load_state_dict")
        for pre in ("", " pre")
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("weight", ["ih", "hh"])
@pytest.mark.parametrize("name", NAMES)
def test_parametrizations(name, weight, wrapper):
    weight = f"weight_{weight}" + ("" if name.endswith("Cell") else "_l0")
    theirs = WRAPPERS[wrapper](getattr(nn, name)(4, 4, dtype=torch.float64), weight).eval()
    x, seen = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), []
    ours = copy.deepcopy(theirs)
    before = type(ours)
    parameters = list(ours.parameters())
    fusedrnn.convert(ours)
    assert type(ours).__name__ == before.__name__
    assert parametrize.type_before_parametrizations(ours) is getattr(fusedrnn, name)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in parameters]
    for module in (theirs, ours):
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        seen.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    # The class of the layer it was copied from is still torch's.
    assert parametrize.type_before_parametrizations(theirs) is getattr(nn, name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fusedrnn.revert(ours)
    assert vars(type(ours)).keys() == vars(before).keys()
    assert type(ours).__bases__ == before.__bases__ == (getattr(nn, name),)
    torch.testing.assert_close(seen[0][0], ours(x)[0] if isinstance(ours(x), tuple) else ours(x))
    fusedrnn.convert(ours)
    parametrize.remove_parametrizations(ours, weight)
    assert type(ours) is getattr(fusedrnn, name)


def test_parametrized_after_convert_as_well():
    layer = fusedrnn.convert(parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0"))
    parametrizations.weight_norm(layer, "weight_ih_l0")
    x = torch.randn(3, 2, 4)
    want = layer(x)[0]
    want.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    torch.testing.assert_close(fusedrnn.revert(layer)(x)[0], want)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm():
    model = nn.Sequential(nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"))
    x = torch.randn(3, 2, 4)
    want = model(x)[0]
    fusedrnn.convert(model)
    model[0].weight_hh_l0_g.data *= 2
    got = model(x)[0]
    assert not torch.allclose(got, want)
    got.sum().backward()
    assert model[0].weight_hh_l0_v.grad is not None
    fusedrnn.revert(model)
    torch.testing.assert_close(model(x)[0], got)
    nn.utils.remove_weight_norm(fusedrnn.convert(model)[0], "weight_hh_l0")
    torch.testing.assert_close(model(x)[0], got)


def test_tied_modules_and_parameters():
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4)})
    model["again"] = model["a"]
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    x = torch.randn(3, 2, 4)

    def gradients():
        model.zero_grad()
        y = x
        for layer in model.values():
            y, _ = layer(y)
        y.sum().backward()
        return [p.grad for p in model.parameters()]

    want = gradients()
    fusedrnn.convert(model)
    assert model["again"] is model["a"]
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0
    assert len(want) == 7
    for got, gradient in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("dtype, device", [(torch.bfloat16, "cpu"), (torch.float64, "meta")], ids=str)
def test_dtype_and_device_stay(dtype, device):
    model = fusedrnn.convert(nn.Sequential(nn.LSTM(3, 4, dtype=dtype, device=device)))
    y, _ = model(torch.zeros(2, 1, 3, dtype=dtype, device=device))
    assert (y.dtype, y.device.type) == (dtype, device)


def test_an_optimizer_goes_on():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.GRU(3, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 2, 3)
    for swapped, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if swapped and step == 2:
                fusedrnn.convert(model)
            optimizer.zero_grad()
            model(x)[0].pow(2).sum().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_converted_model(name):
    model, x = fusedrnn.convert(nn.Sequential(getattr(nn, name)(3, 4))), torch.randn(2, 3)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert type(other[0]) is getattr(fusedrnn, name)
        assert torch.equal(other(x)[0], model(x)[0])
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert type(fusedrnn.revert(other)[0]) is getattr(nn, name)


def test_revert_drops_what_torch_does_not_have():
    layer = fusedrnn.GRU(3, 4, backend="reference")
    fusedrnn.revert(layer)
    assert vars(layer).keys() == vars(nn.GRU(3, 4)).keys()
    assert fusedrnn.convert(layer).backend is None


class Special(nn.LSTM):
    def forward(self, *args):
        return "special"


def replaced_forward() -> nn.Module:
    module = nn.GRU(3, 4)
    module.forward = functools.partial(module.forward)
    return module


def with_an_attribute() -> nn.Module:
    module = nn.GRU(3, 4)
    module.backend = "mine"
    return module


def scripted() -> nn.Module:
    return torch.jit.script(nn.LSTM(3, 4))


LEFT = {
    "a subclass of LSTM that overrides forward": lambda: Special(3, 4),
    "a subclass of GRUCell that overrides __call__": lambda: type("Mine", (nn.GRUCell,), {"__call__": max})(3, 4),
    "a subclass of RNN that overrides check_input": lambda: parametrizations.weight_norm(
        type("Mine", (type("Mixin", (), {"check_input": print}), nn.RNN), {})(3, 4), "weight_hh_l0"
    ),
    "a subclass of GRU that has an attribute that fusedrnn's class uses, _weights": lambda: type(
        "Mine", (nn.GRU,), {"_weights": 1}
    )(3, 4),
    "its attribute backend would be read as fusedrnn's option": with_an_attribute,
    "its forward was replaced": replaced_forward,
    "a ScriptModule is compiled already": scripted,
    "it is quantised": lambda: torch.ao.nn.quantizable.LSTMCell(3, 4),
    "no kernel takes its dtype, torch.complex64": lambda: nn.GRU(3, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_and_why(why):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: jit and quantisation are deprecated, complex numbers experimental
        left = LEFT[why]()
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([left]), nn.RNN(3, 3))
    before = type(left)
    with pytest.warns(UserWarning, match=rf"fusedrnn.convert leaves 1.0 \({before.__name__}\) as it is: {why}") as told:
        fusedrnn.convert(model)
    assert told[0].filename == __file__
    assert type(model[1][0]) is before
    assert model[1][0] is left
    entries = fusedrnn.conversion_report(model)
    assert [(e.path, e.class_name, e.swapped) for e in entries] == [
        ("1.0", before.__name__, False),
        ("2", "RNN", True),
    ]
    assert entries[0].why.startswith(why)
    assert str(entries[0]) == f"1.0 ({before.__name__}): left: {entries[0].why}"
    assert str(entries[1]) == "2 (RNN): swapped"


def test_revert_leaves_subclasses_of_ours():
    class Mine(fusedrnn.LSTM):
        pass

    model = nn.Sequential(Mine(3, 4))
    with pytest.warns(UserWarning, match=r"fusedrnn.revert leaves 0 \(Mine\).*a subclass of LSTM"):
        fusedrnn.revert(model)
    assert type(model[0]) is Mine


def test_report():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": fusedrnn.GRUCell(3, 4), "c": nn.Linear(3, 3)})
    model["again"] = model["a"]
    before = fusedrnn.conversion_report(model)
    assert [str(e) for e in before] == ["a (LSTM): left: convert was not called", "b (GRUCell): swapped"]
    fusedrnn.convert(model)
    assert [e.swapped for e in fusedrnn.conversion_report(model)] == [True, True]
    (entry,) = fusedrnn.conversion_report(model["a"])
    assert str(entry) == "the model (LSTM): swapped"
    parametrizations.weight_norm(model["b"], "weight_hh")
    assert [e.swapped for e in fusedrnn.conversion_report(model)] == [True, True]


def test_what_is_no_module():
    for function in (fusedrnn.convert, fusedrnn.revert, fusedrnn.conversion_report):
        with pytest.raises(TypeError, match=rf"{function.__name__} takes a torch.nn.Module, got dict"):
            function({})
