"""Our six classes beside torch.nn's: every input and error input of torch's module database, and what it leaves out."""

import contextlib
import copy
import io
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

# On import it forbids torch.backends' flags to be set for the rest of the process, which other tests do.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = {name: next(info for info in module_db if info.module_cls is getattr(nn, name)) for name in NAMES}
DTYPES = (torch.float32, torch.float64)


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors in nested tuples and packed sequences, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def outputs_and_gradients(module: nn.Module, given: tuple, keywords: dict) -> list[torch.Tensor]:
    given, keywords = copy.deepcopy((given, keywords))
    leaves = [t for t in tensors_of((*given, *keywords.values())) if t.requires_grad]
    outputs = tensors_of(module(*given, **keywords))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    gradients = torch.autograd.grad(outputs, [*leaves, *module.parameters()], weights)
    assert leaves
    return [*(t.detach() for t in outputs), *gradients]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_input(name, dtype, training):
    info = INFOS[name]
    samples = list(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training))
    assert samples
    for sample in samples:
        args, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **keywords, dtype=dtype).train(training)
        ours = getattr(fusedrnn, name)(*args, **keywords, dtype=dtype).train(training)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert repr(ours) == repr(theirs)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        given = sample.forward_input.args, sample.forward_input.kwargs
        got, want = outputs_and_gradients(ours, *given), outputs_and_gradients(theirs, *given)
        assert len(got) == len(want)
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=tight, atol=tight)
        if sample.reference_fn is not None and not isinstance(given[0][0], PackedSequence):
            # The reference calls the module with a batch of one; it compares our module with itself.
            found = tensors_of(sample.reference_fn(ours, *given[0], **given[1]))
            for a, b in zip(found, tensors_of(ours(*given[0], **given[1])), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_error(name, dtype, training):
    info = INFOS[name]
    cases = list(info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training))
    assert cases
    for case in cases:
        sample = case.module_error_input
        args, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        keywords = {"dtype": dtype} | keywords
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(fusedrnn, name)(*args, **keywords)
        else:
            module = getattr(fusedrnn, name)(*args, **keywords).train(training)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)


LAYERS, CELLS = NAMES[:3], NAMES[3:]


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch.nn's and ours, with the same parameters."""
    theirs, ours = (getattr(package, name)(*args, **kwargs) for package in (nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def states_of(name: str, state: torch.Tensor):
    """The state [B, H] as this class takes it: hx, or a pair for an LSTM."""
    state = state if name in CELLS else state[None]
    return (state, state * 2) if name.startswith("LSTM") else state


def outputs_and_all_gradients(module: nn.Module, x: torch.Tensor, hx=None) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors_of((x, hx))]
    arguments = iter(leaves)
    x = next(arguments)
    hx = None if hx is None else next(arguments) if isinstance(hx, torch.Tensor) else tuple(arguments)
    outputs = tensors_of(module(x, hx))
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], wanted)]


def assert_same(theirs: nn.Module, ours: nn.Module, x: torch.Tensor, hx=None, **tolerance) -> None:
    want, got = (outputs_and_all_gradients(module, x, hx) for module in (theirs, ours))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-11, "atol": 1e-12, **tolerance})


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def old_state(module: nn.RNNBase, version: str) -> dict:
    """What a pickle of the whole module held once."""
    state = module.__getstate__()
    del state["proj_size"]
    if version == "before names":
        state["all_weights"] = module.all_weights
        for name in ("_all_weights", "_flat_weights_names", "_flat_weights"):
            del state[name]
    return state


@pytest.mark.parametrize("version", ["before proj_size", "before names"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_old_checkpoints_of_whole_modules(name, options, version):
    theirs, ours = pair(name, 3, 4, dtype=torch.float64, **options)
    loaded = []
    for module in (theirs, ours):
        again = type(module).__new__(type(module))
        again.__setstate__(copy.deepcopy(old_state(module, version)))
        loaded.append(again)
    assert repr(loaded[1]) == repr(loaded[0]) == repr(theirs)
    assert (loaded[1].backend, loaded[1].algorithm, loaded[1].recompute, loaded[1].proj_size) == (None, None, False, 0)
    assert [len(w) for w in loaded[1].all_weights] == [len(w) for w in theirs.all_weights]
    assert_same(*loaded, wide(5, 2, 3))
    assert_same(theirs, pickle.loads(pickle.dumps(loaded[1])), wide(5, 2, 3))
    assert_same(*(m.to(torch.float64) for m in loaded), wide(5, 2, 3))


class PickledBy010:
    """Pickles as a module of 0.1.0 did: by its class, with the attributes that torch.nn's has, and recompute."""

    def __init__(self, cls: type, theirs: nn.Module):
        self.cls, self.state = cls, theirs.__getstate__() | ({"recompute": True} if cls is fusedrnn.LSTM else {})

    def __reduce__(self):
        return object.__new__, (self.cls,), self.state


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_modules_that_0_1_0_pickled(name, options):
    if name not in LAYERS and "num_layers" in options:
        pytest.skip("a cell has one layer")
    theirs, _ = pair(name, 3, 4, dtype=torch.float64, **options)
    loaded = pickle.loads(pickle.dumps(PickledBy010(getattr(fusedrnn, name), theirs)))
    assert type(loaded) is getattr(fusedrnn, name)
    assert loaded.recompute == (name == "LSTM") if name in LAYERS else not hasattr(loaded, "recompute")
    x = wide(5, 2, 3) if name in LAYERS else wide(2, 3)
    assert_same(theirs, loaded, x)
    loaded.load_state_dict(theirs.state_dict())
    assert_same(theirs, pickle.loads(pickle.dumps(loaded)), x)
    holder = fusedrnn.revert(nn.Sequential(loaded))
    assert type(holder[0]) is type(theirs)
    assert_same(theirs, holder[0], x)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_with_weights_only_and_assign(name):
    theirs, ours = pair(name, 3, 4)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    meta = getattr(fusedrnn, name)(3, 4, device="meta")
    assert all(t.device.type == "meta" for t in tensors_of(meta(torch.empty(2, 3, device="meta"))))
    meta.load_state_dict(state, assign=True)
    assert_same(theirs, meta, torch.randn(2, 3), rtol=1e-5, atol=1e-6)
    empty = meta.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_same(theirs, empty, torch.randn(2, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_of_one_layer_warns_as_torch_does(name):
    told = []
    for package in (nn, fusedrnn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(package, name)(3, 4, dropout=0.5)
            getattr(package, name)(3, 4, num_layers=2, dropout=0.5)
        told.append([(w.category, str(w.message)) for w in caught])
    assert told[0] == told[1]
    assert len(told[0]) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_all_weights_and_flatten_parameters(name):
    _, ours = pair(name, 3, 4, num_layers=2, bidirectional=True)
    before = [p.data_ptr() for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [p.data_ptr() for p in ours.parameters()] == before
    assert [id(p) for weights in ours.all_weights for p in weights] == [id(p) for p in ours.parameters()]
    ours.bias_hh_l1 = nn.Parameter(torch.zeros_like(ours.bias_hh_l1))
    assert ours.all_weights[2][3] is ours.bias_hh_l1


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_some_parameters_need_no_gradient(name, frozen):
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    for module in (theirs, ours):
        for key, p in module.named_parameters():
            p.requires_grad_(not key.startswith(frozen))
    assert_same(theirs, ours, wide(5, 3), states_of(name, wide(5, 4)) if name in CELLS else None)
    for module in (theirs, ours):
        module.zero_grad()
        sum(t.sum() for t in tensors_of(module(wide(5, 3)))).backward()
    assert [p.grad is None for p in ours.parameters()] == [p.grad is None for p in theirs.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_replaced_and_tied_parameters(name):
    theirs, ours = pair(name, 4, 4, dtype=torch.float64)
    suffix = "" if name in CELLS else "_l0"
    for module in (theirs, ours):
        torch.manual_seed(2)
        fresh = nn.Parameter(torch.randn_like(getattr(module, f"weight_ih{suffix}")))
        setattr(module, f"weight_ih{suffix}", fresh)
        setattr(module, f"weight_hh{suffix}", fresh)
        setattr(module, f"bias_hh{suffix}", getattr(module, f"bias_ih{suffix}"))
        assert len(list(module.parameters())) == 2
    assert_same(theirs, ours, wide(5, 4), states_of(name, wide(5, 4)) if name in CELLS else None)


@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l1", "weight_ih_l1_reverse", "bias_hh_l0"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_parametrization_of_any_weight_is_computed_once_a_call(name, weight):
    class Twice(nn.Module):
        calls = 0

        def forward(self, w):
            self.calls += 1
            return w * 2

    theirs, ours = pair(name, 4, 4, 2, bidirectional=True, dtype=torch.float64)
    for module in (theirs, ours):
        nn.utils.parametrize.register_parametrization(module, weight, Twice())
    assert_same(theirs, ours, wide(5, 2, 4))
    counter = ours.parametrizations[weight][0]
    counter.calls = 0
    ours(wide(5, 2, 4))
    assert counter.calls == 1
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        ours(torch.randn(5, 2, 4))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("name", NAMES)
def test_weight_norm(name, wrap):
    theirs, ours = pair(name, 4, 4, dtype=torch.float64)
    for module in (theirs, ours):
        for weight in ("weight_ih", "weight_hh"):
            wrap(module, weight + ("" if name in CELLS else "_l0"))
    assert len(list(ours.parameters())) == 6
    assert_same(theirs, ours, wide(5, 4))


@pytest.mark.parametrize("name", NAMES)
def test_eval_mode_has_gradients(name):
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    assert_same(theirs.eval(), ours.eval(), wide(5, 3))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_not_contiguous(name):
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    x, state = wide(3, 2, 5).permute(2, 1, 0), wide(1, 4, 2).transpose(1, 2)
    if name in CELLS:
        x, state = x[:2, 0], state[0]
        hx = (state, state.flip(0)) if name == "LSTMCell" else state
    else:
        hx = (state, state.expand(1, 2, 4)) if name == "LSTM" else state
    assert not x.is_contiguous()
    assert not state.is_contiguous()
    given = tensors_of((x, hx))
    found = []
    for module in (theirs, ours):
        leaves = [t.detach().as_strided(t.shape, t.stride()).requires_grad_() for t in given]
        outputs = tensors_of(module(leaves[0], tuple(leaves[1:]) if len(leaves) > 2 else leaves[1]))
        found.append(
            [*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], [*leaves, *module.parameters()])]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[1][0], tensors_of(ours(x.contiguous(), hx))[0])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    x = wide(0, 3) if name in CELLS else wide(5, 0, 3)
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x, states_of(name, wide(0, 4)))


@pytest.mark.parametrize("given_states", [True, False])
@pytest.mark.parametrize("size", ["input_size", "hidden_size", "proj_size"])
@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_was_changed_by_hand(name, size, given_states):
    """A layer raises where torch.nn's does, a cell asks its weights, except for the size of its first zeros."""
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    hx = states_of(name, torch.randn(2, 4)) if given_states else None
    for module in (theirs, ours):
        setattr(module, size, 2)
    # On a CPU torch.nn.LSTM's library does not see that its zeros are too few.
    unseen = (name, size, given_states) == ("LSTM", "hidden_size", False)
    if name in CELLS and (given_states or size != "hidden_size"):
        torch.testing.assert_close(tensors_of(ours(x, hx)), tensors_of(theirs(x, hx)))
    else:
        with contextlib.nullcontext() if unseen else pytest.raises(RuntimeError):
            theirs(x, hx)
        with pytest.raises(RuntimeError, match=r"[Ee]xpected|must have shape"):
            ours(x, hx)


@pytest.mark.parametrize("name", NAMES)
def test_an_attribute_comes_before_the_parameter(name):
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    hx = states_of(name, torch.randn(2, 4))
    before = tensors_of(ours(x, hx))
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    for module in (theirs, ours):
        module.__dict__[weight] = torch.zeros_like(getattr(module, weight))
        if name not in CELLS:
            module._flat_weights = [getattr(module, w) for w in module._flat_weights_names]
    torch.testing.assert_close(tensors_of(ours(x, hx)), tensors_of(theirs(x, hx)))
    assert not torch.equal(tensors_of(ours(x, hx))[0], before[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_features(name, bias):
    for backend in (None, "reference"):
        theirs, ours = pair(name, 0, 4, bias=bias, dtype=torch.float64)
        ours.backend = backend
        for lead in ((3,), (), (0,), (70,)):
            assert_same(theirs, ours, wide(*lead, 0))
            assert_same(theirs, ours, wide(*lead, 0), states_of(name, wide(*lead, 4)))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse.*")
@pytest.mark.parametrize("name", CELLS)
def test_cells_take_sparse_input(name, layout):
    theirs, ours = pair(name, 30, 4, dtype=torch.float64)
    x = (wide(5, 30) * (torch.rand(5, 30) < 0.1)).to_sparse(layout=layout)
    found = []
    for module in (theirs, ours):
        outputs = tensors_of(module(x))
        found.append([*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], list(module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_hidden_size_zero(name):
    theirs, ours = pair(name, 3, 0, dtype=torch.float64)
    assert_same(theirs, ours, wide(2, 3))
    assert_same(theirs, ours, wide(2, 3), states_of(name, wide(2, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_parameters_on_the_cpu(name, dtype):
    theirs, ours = pair(name, 16, 24, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(7, 16).to(dtype)
    want = outputs_and_all_gradients(exact, x.double())
    got = outputs_and_all_gradients(ours, x)
    for k, (a, w) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        # y rounded once a step, 8 or 11 bits; a gradient sums what was rounded.
        limit = torch.finfo(dtype).eps * w.abs().max().item() * (2 if k < len(tensors_of(ours(x))) else 8)
        assert (a.double() - w).abs().max().item() <= limit


def expected_autocast(name: str, packed: bool, projected: bool, dtype: torch.dtype, state: torch.dtype | None):
    """(y and h, c): 16 bits, but the dtype of the sum where torch.nn adds the state to 16-bit products on a CPU."""
    carried = torch.promote_types(dtype, state or torch.float32)
    if name in ("RNN", "RNNCell") or (name == "LSTM" and not packed and not projected):
        return dtype, dtype
    return (dtype if projected else carried), carried


def exact_outputs(module, x, hx):
    """The module's outputs in float64."""

    def double(given):
        if isinstance(given, tuple) and not isinstance(given, PackedSequence):
            return tuple(t.double() for t in given)
        return None if given is None else given.to(torch.float64)

    return tensors_of(copy.deepcopy(module).double()(double(x), double(hx)))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name, options, packed",
    [
        *((name, {}, False) for name in NAMES),
        *((name, {}, True) for name in LAYERS),
        ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}, False),
        ("LSTM", {"proj_size": 3}, False),
        ("LSTM", {"proj_size": 3}, True),
        ("RNN", {"nonlinearity": "relu"}, False),
    ],
    ids=str,
)
def test_dtypes_under_autocast_are_torchs(name, options, packed, dtype, grad):
    theirs, ours = pair(name, 5, 6, **options)
    x = torch.randn(3, 5) if name in CELLS else torch.randn(3, 2, 5)
    if packed:
        x = pack_padded_sequence(x, [3, 2])
    lead = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = 3 if options.get("batch_first") or name in CELLS else 2
    for state in (None, torch.float32, dtype):
        shapes = [(batch, options.get("proj_size", 6)), (batch, 6)][: 1 + name.startswith("LSTM")]
        hx = None
        if state is not None:
            hx = tuple(torch.randn(s if name in CELLS else (lead, *s)).to(state) for s in shapes)
            hx = hx if len(hx) > 1 else hx[0]
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            got = tensors_of(ours(x, hx))
            try:
                want = tensors_of(theirs(x, hx))
            except RuntimeError as error:
                # oneDNN has an LSTM of 16 bits for processors that compute in them, of float16 for inference alone.
                if "primitive descriptor" not in str(error):
                    raise
                warnings.warn(f"held against float64 alone: torch.nn cannot run it here ({error})", stacklevel=1)
                want = None
        for ours_, exact_ in zip(got, exact_outputs(theirs, x, hx)):
            limit = 4 * torch.finfo(dtype).eps * max(1.0, exact_.abs().max().item())
            assert (ours_.double() - exact_).abs().max().item() <= limit
        h, c = expected_autocast(name, packed, "proj_size" in options, dtype, state)
        assert [t.dtype for t in got] == ([h] * (len(got) - 1) + [c] if len(shapes) > 1 else [h] * len(got))
        if want is not None:
            assert [t.dtype for t in got] == [t.dtype for t in want]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
        if grad:
            ours.zero_grad()
            sum(t.float().sum() for t in got).backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize(
    "name, tied", [*((name, True) for name in NAMES), *((name, False) for name in ("LSTM", "LSTMCell", "GRUCell"))]
)
def test_one_tensor_twice_compiles(name, tied):
    """Tied weights, or h and c (and x) that are the same tensor."""
    torch._dynamo.reset()
    ours = getattr(fusedrnn, name)(4, 4)
    suffix = "" if name in CELLS else "_l0"
    if tied:
        setattr(ours, f"weight_hh{suffix}", getattr(ours, f"weight_ih{suffix}"))
        setattr(ours, f"bias_hh{suffix}", getattr(ours, f"bias_ih{suffix}"))
    x = torch.randn(3, 4)
    h = x if name in CELLS else x[:1]
    hx = (h, h) if name.startswith("LSTM") else h
    compiled, found = torch.compile(ours, fullgraph=True, backend="aot_eager"), []
    for run in (compiled, ours):
        outputs = tensors_of(run(x, None if tied else hx))
        found.append([*outputs, *torch.autograd.grad([t.sum() for t in outputs], list(ours.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
