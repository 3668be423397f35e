"""freeze and unfreeze: weights that are packed once, and every way in which the promise can break."""

import copy
import io
import multiprocessing
import threading

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import _build

LAYERS = (
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {"batch_first": True}),
    ("RNN", {"nonlinearity": "relu"}),
)
packs = pytest.mark.skipif(_build._small_calls is None, reason="this torch hands no tensors to C: nothing is packed")


def pair(name="LSTM", dtype=torch.float32, hidden=33, **options):
    torch.manual_seed(0)
    plain = getattr(fusedrnn, name)(5, hidden, dtype=dtype, **options)
    return plain, fusedrnn.freeze(copy.deepcopy(plain))


def result(layer, x):
    y, states = layer(x)
    return y, *(states if isinstance(states, tuple) else (states,))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, options", LAYERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("steps, batch", [(1, 1), (1, 70), (3, 2), (40, 1), (70, 5)])
def test_the_same_numbers(name, options, dtype, steps, batch):
    plain, frozen = pair(name, dtype, **options)
    x = torch.randn((batch, steps, 5) if options.get("batch_first") else (steps, batch, 5)).to(dtype)
    limit = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 2e-2)
    with torch.no_grad():
        want, got = result(plain, x), result(frozen, x)
        assert same(got, result(frozen, x))
    # A short call reads a plain layer's weights where they lie, and in float32 and perhaps bfloat16 x meets panels of
    # W_ih when frozen: both add in another order.
    for a, b in zip(want, got, strict=True):
        assert (a.double() - b.double()).abs().max() <= limit
    if steps * batch > 64 and steps > 1 and dtype in (torch.float64, torch.float16):
        assert same(want, got)
    assert same(got, result(frozen, x))  # gradients on, and none asked for


@packs
def test_packed_bytes():
    plain, frozen = pair(hidden=64, num_layers=2)
    assert plain.packed_bytes == 0
    assert frozen.packed_bytes >= 2 * 4 * 64 * 64 * 4
    assert fusedrnn.unfreeze(frozen).packed_bytes == 0


def test_a_plain_layer_sees_every_change():
    layer, _ = pair(hidden=16)
    x = torch.randn(70, 2, 5)
    alias = layer.weight_hh_l0.detach().numpy()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)

    def step():
        layer(x)[0].sum().backward()
        optimizer.step()

    changes = (
        lambda: layer.weight_hh_l0.data.copy_(torch.randn(64, 16)),
        lambda: alias.__setitem__((0, 0), 5.0),
        step,
        lambda: setattr(layer, "weight_hh_l0", nn.Parameter(torch.randn(64, 16))),
    )
    for change in changes:
        with torch.no_grad():
            before = result(layer, x)
        change()
        with torch.no_grad():
            after = result(layer, x)
        assert not same(before, after)
        twin = nn.LSTM(5, 16)
        twin.load_state_dict(layer.state_dict())
        assert torch.allclose(twin(x)[0], after[0], atol=1e-5)


def test_training_raises():
    _, frozen = pair()
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(RuntimeError, match=r"LSTM is frozen and cannot be trained \(train\(\) was called\)"):
        nn.Sequential(frozen).train()
    frozen.bias_hh_l0.requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot be trained \(bias_hh_l0 requires grad\): call fusedrnn.unfreeze"):
        frozen(torch.randn(3, 2, 5))
    with torch.no_grad():
        frozen(torch.randn(3, 2, 5))
    fusedrnn.unfreeze(frozen).train()
    assert all(p.requires_grad for p in frozen.parameters())
    frozen(torch.randn(3, 2, 5))[0].sum().backward()


def test_a_gradient_of_the_input_is_the_plain_one():
    plain, frozen = pair()
    xs = [torch.ones(9, 2, 5, requires_grad=True) for _ in range(2)]
    for layer, x in zip((plain, frozen), xs, strict=True):
        layer(x)[0].sum().backward()
    assert torch.equal(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("steps", [1, 90])
def test_a_replaced_parameter_raises(steps):
    _, frozen = pair()
    frozen.weight_hh_l0 = nn.Parameter(torch.zeros(132, 33))
    for options in ({}, {"return_all_states": True}):
        with pytest.raises(RuntimeError, match="LSTM is frozen, and its weight_hh_l0 was replaced"):
            frozen(torch.randn(steps, 2, 5), **options)
    with torch.no_grad():
        fusedrnn.freeze(frozen)(torch.randn(steps, 2, 5))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_compiled_and_traced():
    plain, frozen = pair()
    x = torch.randn(9, 2, 5)
    ways = (
        lambda m: torch.export.export(m, (x,)).module(),
        lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
        lambda m: torch.jit.trace(m, (x,)),
    )
    for way in ways:
        assert torch.allclose(way(frozen)(x)[0], plain(x)[0])


def test_what_the_module_changes_is_packed_again():
    _, frozen = pair()
    other, _ = pair()
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
    x = torch.randn(70, 2, 5)
    frozen.load_state_dict(other.state_dict())
    fusedrnn.freeze(other)  # whose x W_ih^T may add up in another order than a plain layer's
    with torch.no_grad():
        assert same(result(frozen, x), result(other, x))
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert same(result(frozen.to(dtype), x.to(dtype)), result(other.to(dtype), x.to(dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(result(frozen.float(), x), result(other.float(), x))


@packs
def test_copies_pack_their_own():
    _, frozen = pair(num_layers=2)
    x = torch.randn(70, 2, 5)
    file = io.BytesIO()
    torch.save(frozen, file)
    assert len(file.getvalue()) < 2 * sum(p.numel() * 4 for p in frozen.parameters()) + 50_000
    file.seek(0)
    for twin in (copy.deepcopy(frozen), torch.load(file, weights_only=False)):
        assert twin.packed_bytes == frozen.packed_bytes
        assert same(result(twin, x), result(frozen, x))
        with torch.no_grad():
            twin.weight_hh_l0.mul_(2)
        fusedrnn.freeze(twin)
        assert not same(result(twin, x), result(frozen, x))
        assert all(p.requires_grad for p in fusedrnn.unfreeze(twin).parameters())


def test_threads():
    plain, frozen = pair(hidden=64)
    x = torch.randn(70, 2, 5)
    with torch.no_grad():
        want, found = result(copy.deepcopy(frozen), x), []
        torch.testing.assert_close(want[0], plain(x)[0])
    threads = [threading.Thread(target=lambda: found.extend(result(frozen, x) for _ in range(10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(same(want, each) for each in found)


def own(name, hidden=34, **options):
    torch.manual_seed(0)
    cell = getattr(fusedrnn.zoo, name)
    plain = fusedrnn.Layer(cell, 5, hidden, num_layers=2, heads=2, bidirectional=True, **options)
    return plain, fusedrnn.freeze(copy.deepcopy(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["slstm", "gru", pytest.param("zoneout_lstm", marks=pytest.mark.slow)])
def test_a_layer_of_a_cell_of_ones_own(name, dtype):
    plain, frozen = own(name, dtype=dtype)
    if _build._small_calls is not None:
        assert frozen.packed_bytes >= 4 * 3 * 34 * 17 * plain.weight_hh_l0.element_size()
        assert fusedrnn.plan(frozen, 1, steps=1).details.kept
    limit = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for steps, batch in ((1, 1), (3, 2), (70, 5)):
        x = torch.randn(steps, batch, 5).to(dtype)
        inputs = {k: torch.rand(steps, batch, 34).to(dtype) for k in plain.cell.inputs}
        resets = torch.rand(steps, batch) < 0.2
        sizes = torch.tensor([batch] * steps)
        for options in ({}, {"resets": resets}, {"return_all_states": True}, {"lengths": torch.full((batch,), steps)}):
            with torch.no_grad():
                want, got = (layer(x, **inputs, **options) for layer in (plain, frozen))
            flat = [*torch.utils._pytree.tree_leaves(want)], [*torch.utils._pytree.tree_leaves(got)]
            for a, b in zip(*flat, strict=True):
                assert (a.double() - b.double()).abs().max() <= limit
        packed = nn.utils.rnn.PackedSequence(x.flatten(0, 1), sizes)
        given = {k: nn.utils.rnn.PackedSequence(t.flatten(0, 1), sizes) for k, t in inputs.items()}
        torch.testing.assert_close(frozen(packed, **given)[0].data, frozen(x, **inputs)[0].flatten(0, 1))
    x = torch.randn(3, 2, 5, dtype=dtype, requires_grad=True)
    inputs = {k: torch.rand(3, 2, 34).to(dtype) for k in plain.cell.inputs}
    grads = [torch.autograd.grad(layer(x, **inputs)[0].float().sum(), x)[0] for layer in (plain, frozen)]
    torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError, match="Layer is frozen and cannot be trained"):
        frozen.train()
    frozen.weight_hh_l0.requires_grad_()
    with pytest.raises(RuntimeError, match="weight_hh_l0 requires grad"):
        frozen(x, **inputs)
    assert fusedrnn.unfreeze(frozen).packed_bytes == 0


@packs
def test_a_frozen_layer_of_a_cell_of_ones_own_is_packed():
    """Its calls read the packed weights, and no longer the parameter; those that are recorded read the parameter."""
    _, frozen = own("slstm")
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        want = frozen(x)[0]
        frozen.weight_hh_l0.data.zero_()
        assert torch.equal(frozen(x)[0], want)
    assert not torch.equal(frozen(x.clone().requires_grad_())[0], want)
    frozen.load_state_dict(own("slstm")[0].state_dict())
    assert torch.equal(frozen(x)[0], want)


def _in_child(layer, x, queue):
    torch.set_num_threads(1)
    queue.put(layer(x)[0].numpy())


def test_after_a_fork():
    _, frozen = pair()
    x = torch.randn(70, 2, 5)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        child = context.Process(target=_in_child, args=(frozen, x, queue))
        child.start()
        got = queue.get(timeout=60)
        child.join(60)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(torch.from_numpy(got), frozen(x)[0], atol=1e-6)


def test_models_cells_and_what_is_refused():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 8), "cell": nn.GRUCell(4, 8), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match="there is no layer or cell of fusedrnn in the model"):
        fusedrnn.freeze(model)
    with pytest.raises(TypeError, match=r"freeze takes a torch\.nn\.Module, got int"):
        fusedrnn.freeze(3)
    fusedrnn.freeze(fusedrnn.convert(model))
    assert model["head"].weight.requires_grad
    assert not model["cell"].weight_hh.requires_grad
    assert model["cell"].packed_bytes == 0
    model["cell"](torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="GRUCell is frozen and cannot be trained"):
        model["cell"].train()
    fusedrnn.revert(model)
    assert type(model["rnn"]) is nn.LSTM
    assert model["rnn"].weight_hh_l0.requires_grad
    model.train()
    normed = nn.utils.parametrizations.weight_norm(fusedrnn.LSTM(4, 8), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"freeze: weight_hh_l0 of .*LSTM is computed, not a parameter"):
        fusedrnn.freeze(normed)
