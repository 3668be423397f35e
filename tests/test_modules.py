"""fusedrnn.LSTM beside torch.nn.LSTM: results, gradients, parameters, state, errors."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

COMBINATIONS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "proj_size": proj}
    for layers, bias, batch_first, bidirectional, proj in itertools.product(
        (1, 2), (True, False), (False, True), (False, True), (0, 3)
    )
]


def pair(*args, **kwargs) -> tuple[nn.LSTM, fusedrnn.LSTM]:
    theirs, ours = nn.LSTM(*args, **kwargs), fusedrnn.LSTM(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def flat(output) -> list[torch.Tensor]:
    y, states = output
    return [y.data if isinstance(y, PackedSequence) else y, *states]


def results(module, make_input, make_hx=None) -> list[torch.Tensor]:
    """Outputs and the gradients of input, states and parameters."""
    module.zero_grad()
    leaf, given = make_input()
    hx = None if make_hx is None else make_hx()
    outputs = flat(module(given) if hx is None else module(given, hx))
    generator = torch.Generator().manual_seed(3)
    sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs).backward()
    leaves = [leaf, *(hx or ())]
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())]


def assert_same(module_a, module_b, make_input, make_hx=None):
    a, b = results(module_a, make_input, make_hx), results(module_b, make_input, make_hx)
    assert len(a) == len(b)
    for p, q in zip(a, b):
        assert p.shape == q.shape
        tight = 1e-11 if p.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(q, p, rtol=tight, atol=tight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(f"{k}{int(v)}" for k, v in o.items()))
def test_all_arguments_in_combination(options, dtype):
    theirs, ours = pair(5, 7, dtype=dtype, **options)
    directions = 2 if options["bidirectional"] else 1
    lead, out = options["num_layers"] * directions, options["proj_size"] or 7

    def leaf(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    def dense():
        x = leaf(3, 4, 5)
        return x, x

    def unbatched():
        x = leaf(4, 5)
        return x, x

    def packed(lengths):
        x = leaf(4, 3, 5)
        return x, pack_padded_sequence(x, lengths, enforce_sorted=False)

    batch = 3 if options["batch_first"] else 4
    assert_same(theirs, ours, dense)
    assert_same(theirs, ours, dense, lambda: (leaf(lead, batch, out), leaf(lead, batch, 7)))
    assert_same(theirs, ours, unbatched)
    assert_same(theirs, ours, unbatched, lambda: (leaf(lead, out), leaf(lead, 7)))
    for lengths in ([4, 2, 1], [1, 4, 3], [4, 4, 4], [1, 1, 1]):
        assert_same(theirs, ours, lambda n=lengths: packed(n))
        assert_same(theirs, ours, lambda n=lengths: packed(n), lambda: (leaf(lead, 3, out), leaf(lead, 3, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_same_seed_same_parameters(dtype):
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dtype": dtype}
    torch.manual_seed(5)
    theirs = nn.LSTM(5, 7, **options)
    torch.manual_seed(5)
    ours = fusedrnn.LSTM(5, 7, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, ours.state_dict()[name]), name
    assert repr(theirs) == repr(ours)
    assert [len(w) for w in theirs.all_weights] == [len(w) for w in ours.all_weights]
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_at_least_as_near_to_float64_as_torch(dtype):
    theirs, ours = pair(16, 32, num_layers=2, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(10, 4, 16).to(dtype)
    want = exact(x.double())[0]
    error = {m: (m(x)[0].double() - want).abs().max().item() for m in (theirs, ours)}
    assert ours(x)[0].dtype == dtype
    assert error[ours] <= 2 * error[theirs] + torch.finfo(dtype).eps


def test_dropout_is_torchs_bit_for_bit():
    theirs, ours = pair(5, 8, num_layers=3, dropout=0.4)
    x = torch.randn(6, 3, 5)
    seen = []
    for module in (theirs, ours):
        torch.manual_seed(11)
        seen.append(module(x)[0])
    assert ((seen[0] - seen[1]).abs() < 1e-6).all()
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    torch.testing.assert_close(ours(x)[0], theirs.eval()(x)[0], rtol=1e-5, atol=1e-6)


def test_dropout_of_packed_and_batch_first():
    x = torch.randn(3, 6, 5)
    for given in (x, pack_padded_sequence(x, [6, 3, 2], batch_first=True)):
        theirs, ours = pair(5, 8, num_layers=2, dropout=0.5, batch_first=True)
        seen = []
        for module in (theirs, ours):
            torch.manual_seed(11)
            seen.append(flat(module(given))[0])
        torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)


def test_packed_returns_packed_in_the_callers_order():
    _, ours = pair(5, 8)
    x = torch.randn(6, 3, 5)
    packed = pack_padded_sequence(x, [2, 6, 3], enforce_sorted=False)
    y, (h, _) = ours(packed)
    assert isinstance(y, PackedSequence)
    padded, lengths = pad_packed_sequence(y)
    assert lengths.tolist() == [2, 6, 3]
    for b, n in enumerate([2, 6, 3]):
        alone, (h_alone, _) = ours(x[:n, b])
        torch.testing.assert_close(padded[:n, b], alone)
        torch.testing.assert_close(h[:, b], h_alone)


def test_pickle_deepcopy_save():
    _, ours = pair(5, 8, num_layers=2)
    x = torch.randn(4, 2, 5)
    want = ours(x)[0]
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    again = fusedrnn.LSTM(5, 8, num_layers=2)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for module in (again, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert torch.equal(module(x)[0], want)


def test_replaced_tied_and_frozen_parameters_count():
    theirs, ours = pair(6, 6, num_layers=2)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l0 = nn.Parameter(torch.full_like(module.weight_ih_l0, 0.1))
        module.bias_ih_l0.requires_grad_(False)

    x = torch.randn(4, 2, 6)
    for module in (theirs, ours):
        module(x)[0].sum().backward()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert ours.bias_ih_l0.grad is None
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad, rtol=1e-5, atol=1e-5)


def test_functional_call_and_meta():
    _, ours = pair(5, 8)
    x = torch.randn(4, 2, 5)
    zero = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    assert torch.func.functional_call(ours, zero, x)[0].abs().max() == 0
    meta = fusedrnn.LSTM(5, 8, bidirectional=True, device="meta")
    y, (h, c) = meta(torch.empty(4, 2, 5, device="meta"))
    assert y.shape == (4, 2, 16)
    assert h.shape == c.shape == (2, 2, 8)


CONSTRUCTOR_ERRORS = [
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": 1.5},
    {"input_size": 0},
    {"input_size": "5"},
    {"num_layers": 0},
    {"dropout": 1.5},
    {"dropout": True},
    {"dropout": "x"},
    {"bias": 1},
    {"batch_first": 0},
    {"proj_size": 8},
    {"proj_size": -1},
]


@pytest.mark.parametrize("wrong", CONSTRUCTOR_ERRORS, ids=str)
def test_constructor_errors_are_torchs(wrong):
    options = {"input_size": 5, "hidden_size": 8} | wrong
    with pytest.raises(Exception) as theirs:
        nn.LSTM(**options)
    with pytest.raises(theirs.type) as ours:
        fusedrnn.LSTM(**options)
    assert str(ours.value) == str(theirs.value)


def packed_of(*shape, lengths=(4, 2)):
    return pack_padded_sequence(torch.zeros(shape), list(lengths))


FORWARD_ERRORS = {
    "4-D input": lambda: (torch.zeros(2, 3, 4, 5),),
    "1-D input": lambda: (torch.zeros(5),),
    "input size": lambda: (torch.zeros(4, 2, 6),),
    "packed input size": lambda: (packed_of(4, 2, 6),),
    "no steps": lambda: (torch.zeros(0, 2, 5),),
    "dtype": lambda: (torch.zeros(4, 2, 5, dtype=torch.float64),),
    "integer dtype": lambda: (torch.zeros(4, 2, 5, dtype=torch.int64),),
    "2-D states": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 8), torch.zeros(1, 8))),
    "3-D states of unbatched": lambda: (torch.zeros(4, 5), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))),
    "mixed ranks": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(1, 8))),
    "h0 batch": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8))),
    "h0 size": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 2, 7), torch.zeros(1, 2, 8))),
    "c0 size": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 9))),
    "h0 layers": lambda: (torch.zeros(4, 2, 5), (torch.zeros(2, 2, 8), torch.zeros(1, 2, 8))),
    "packed h0 batch": lambda: (packed_of(4, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))),
    "h0 dtype": lambda: (torch.zeros(4, 2, 5), (torch.zeros(1, 2, 8).double(), torch.zeros(1, 2, 8).double())),
    "h0 device": lambda: (
        torch.zeros(4, 2, 5),
        (torch.zeros(1, 2, 8, device="meta"), torch.zeros(1, 2, 8, device="meta")),
    ),
}


@pytest.mark.parametrize("wrong", FORWARD_ERRORS)
def test_forward_errors_are_torchs(wrong):
    theirs, ours = pair(5, 8)
    args = FORWARD_ERRORS[wrong]()
    with pytest.raises(Exception) as expected:
        theirs(*args)
    with pytest.raises(expected.type) as got:
        ours(*args)
    # torch.nn does not check packed input and leaves the rest to ATen's matmul.
    if wrong not in ("packed input size", "packed h0 batch", "integer dtype", "h0 dtype", "h0 device"):
        assert str(got.value) == str(expected.value)


def test_errors_of_our_own():
    ours = fusedrnn.LSTM(5, 8)
    x = torch.zeros(4, 2, 5)
    with pytest.raises(RuntimeError, match=r"not the same dtype.*float32.*float64"):
        ours(x, (torch.zeros(1, 2, 8).double(), torch.zeros(1, 2, 8).double()))
    with pytest.raises(RuntimeError, match=r"not at the same device.*cpu.*meta"):
        ours(x, (torch.zeros(1, 2, 8, device="meta"), torch.zeros(1, 2, 8, device="meta")))
    with pytest.raises(TypeError, match="hx must be a tuple of two Tensors"):
        ours(x, (None, None))
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got list"):
        ours([[1.0]])
    with pytest.raises(ValueError, match="backend must be one of"):
        fusedrnn.LSTM(5, 8, backend="cudnn")
    with pytest.raises(ValueError, match="algorithm must be one of"):
        fusedrnn.LSTM(5, 8, algorithm="fast")
    bad = PackedSequence(torch.zeros(5, 5), torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match="batch_sizes must add up to the 5 rows of x, got 4"):
        ours(bad)
    bad = PackedSequence(torch.zeros(5, 5), torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="batch_sizes must not increase and must be at least 1, got 3 at step 1"):
        ours(bad)


def test_an_unsorted_batch_breaks_no_graph():
    """Its batch size is that of the indices that sort it; a sorted one has none, and its size has to be read."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 4), [2, 5, 3], enforce_sorted=False)
    lstm = fusedrnn.LSTM(4, 8)
    y, (h, _) = torch.compile(lstm, backend="aot_eager")(packed)
    assert not counters["graph_break"]
    want, (want_h, _) = lstm(packed)
    torch.testing.assert_close(y.data, want.data)
    torch.testing.assert_close(h, want_h)
