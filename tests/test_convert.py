"""convert and revert: layers are swapped in place, parameters stay the same objects."""

import copy

import pytest
import torch
from torch import nn

import fusedrnn


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
    theirs = nn.LSTM(3, 4, dtype=torch.float64)
    ours = fusedrnn.convert(theirs)
    assert type(ours) is fusedrnn.LSTM
    assert ours.weight_ih_l0 is theirs.weight_ih_l0
    back = fusedrnn.revert(ours)
    assert type(back) is nn.LSTM
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], back(x)[0])


def test_state_dicts_fit_both_ways():
    model = Tagger()
    state = copy.deepcopy(model.state_dict())
    fusedrnn.convert(model).load_state_dict(state, strict=True)
    fusedrnn.revert(model).load_state_dict(state, strict=True)


def test_hooks_survive():
    seen = []
    model = nn.Sequential(nn.LSTM(3, 4))
    model[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    fusedrnn.convert(model)(torch.zeros(2, 1, 3))
    assert seen == [fusedrnn.LSTM]


def test_subclasses_are_left_alone():
    class Special(nn.LSTM):
        def forward(self, *args):
            return "special"

    with pytest.warns(UserWarning, match="Special is left as it is"):
        model = fusedrnn.convert(nn.Sequential(Special(3, 4)))
    assert type(model[0]) is Special


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"convert takes a torch.nn.Module, got dict"):
        fusedrnn.convert({})
