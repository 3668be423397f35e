"""lengths=: a padded batch of sequences of different lengths, against torch.nn on the packed batch."""

import io
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_onnx_export import EXPORTERS, agree, export, nodes
from test_recurrence import RUNS, device_of, need
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional

T, B, I, H = 7, 4, 3, 5
LENGTHS = torch.tensor([3, 7, 1, 5])
OPTIONS = {
    "one": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "plain": {"num_layers": 3, "bias": False},
}
CLASSES = ["LSTM", "GRU", "RNN", "relu"]


def make(name, space=fusedrnn, dtype=torch.float64, **options):
    if name == "relu":
        name, options = "RNN", options | {"nonlinearity": "relu"}
    return getattr(space, name)(I, H, dtype=dtype, **options)


def pair(name, dtype=torch.float64, backend=None, algorithm=None, **options):
    torch.manual_seed(0)
    theirs = make(name, torch.nn, **options)
    ours = make(name, dtype=dtype, backend=backend, algorithm=algorithm, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(layer, dtype=torch.float64, lengths=LENGTHS, steps=T):
    """x and the states, as leaves; past the ends x is NaN."""
    batch, lead = len(lengths), layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(steps, batch, I, dtype=dtype)
    x[torch.arange(steps)[:, None] >= lengths] = torch.nan
    x = x.transpose(0, 1).contiguous() if layer.batch_first else x
    sizes = (layer.proj_size or H, H)[: 2 if layer.mode == "LSTM" else 1]
    return [t.requires_grad_() for t in (x, *(torch.randn(lead, batch, size, dtype=dtype) for size in sizes))]


def flat(found):
    return [found] if isinstance(found, torch.Tensor) else [t for each in found for t in flat(each)]


def hx_of(states):
    return None if not states else tuple(states) if len(states) > 1 else states[0]


def packed(theirs, x, states, lengths=LENGTHS, padding_value=0.0):
    """y, h_n(, c_n) of torch.nn: pack, call, pad."""
    found, final = theirs(
        pack_padded_sequence(x, lengths.cpu(), theirs.batch_first, enforce_sorted=False), hx_of(states)
    )
    steps = x.shape[1 if theirs.batch_first else 0]
    return [pad_packed_sequence(found, theirs.batch_first, padding_value, steps)[0], *flat(final)]


def gradients(outputs, leaves):
    torch.manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in outputs]
    return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), leaves)


def check(ours, theirs, dtype=torch.float64, device="cpu", states=True, **tolerance):
    leaves = inputs(theirs)
    leaves = leaves if states else leaves[:1]
    mine = [t.detach().to(device, dtype).requires_grad_() for t in leaves]
    want = packed(theirs, leaves[0], leaves[1:])
    got = flat(ours(mine[0], hx_of(mine[1:]), lengths=LENGTHS.to(device)))
    want += gradients(want, [*leaves, *theirs.parameters()])
    got += gradients(got, [*mine, *ours.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, **tolerance)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_pack_and_pad(backend, name, options, states):
    need(backend)
    ours, theirs = pair(name, backend=backend, **OPTIONS[options])
    check(ours, theirs, states=states)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("backend, algorithm", [r for r in RUNS if r[0] in ("triton", "cuda")])
def test_on_every_kernel(backend, algorithm, name):
    need(backend)
    device = device_of(backend)
    ours, theirs = pair(name, torch.float32, backend, algorithm, bidirectional=True)
    check(ours.to(device), theirs, torch.float32, device, rtol=1e-4, atol=1e-4)


def test_with_a_projection():
    ours, theirs = pair("LSTM", proj_size=2, bidirectional=True, num_layers=2)
    check(ours, theirs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_on_the_cpu_a_padded_batch_is_the_packed_one(batch_first):
    """To the bit, resets and dropout too: the steps past the ends are not computed."""
    ours, _ = pair("LSTM", torch.float32, num_layers=2, dropout=0.5, bidirectional=True, batch_first=batch_first)
    x, *states = (t.detach().float().requires_grad_() for t in inputs(ours))
    resets = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.3
    torch.manual_seed(5)
    got = flat(ours(x, tuple(states), lengths=LENGTHS, resets=resets))
    torch.manual_seed(5)
    batch = pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False)
    y, final = ours(batch, tuple(states), resets=(resets.t() if batch_first else resets)[: int(LENGTHS.max())])
    want = [pad_packed_sequence(y, batch_first, 0.0, x.shape[1 if batch_first else 0])[0], *flat(final)]
    for a, b in zip([*got, *gradients(got, [x, *states])], [*want, *gradients(want, [x, *states])], strict=True):
        assert torch.equal(a, b)


def test_resets_of_another_shape_are_refused_with_lengths():
    ours, _ = pair("GRU", torch.float32)
    with pytest.raises(RuntimeError, match=r"resets must have shape \[T, B\] = "):
        ours(torch.zeros(T, B, I), lengths=LENGTHS, resets=torch.zeros(T - 1, B, dtype=torch.bool))


@pytest.mark.parametrize("recompute", [True, False])
def test_every_state_and_padding_value(recompute):
    ours, theirs = pair("LSTM", bidirectional=True)
    ours.recompute = recompute
    x, *states = inputs(theirs)
    y, (h_n, c_n), (h, c) = ours(x, tuple(states), lengths=LENGTHS, padding_value=-3.0, return_all_states=True)
    want = packed(theirs, x, states, padding_value=-3.0)
    for a, b in zip((y, h_n, c_n), want):
        torch.testing.assert_close(a, b)
    ends = LENGTHS - 1, torch.arange(B)
    for states_of, final in ((h, h_n), (c, c_n)):
        torch.testing.assert_close(states_of[0][ends], final[0])
        torch.testing.assert_close(states_of[1][0], final[1])
    for grad in gradients([h, c], [x, *states]):
        assert grad.isfinite().all()
    # Going on after the third step of the two that have one.
    longer = LENGTHS > 3
    on = ours(x[3:, longer], (h[:, 2, longer], c[:, 2, longer]), lengths=LENGTHS[longer] - 3)[0][..., :H]
    torch.testing.assert_close(on, y[3:, longer, :H].masked_fill(y[3:, longer, :H] == -3.0, 0))


def test_nothing_past_an_end_reaches_a_gradient():
    """Nor can a state that nobody asked for overflow there."""
    ours = fusedrnn.RNN(I, H, nonlinearity="relu", bidirectional=True)
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(4.0)
    x = torch.ones(200, 2, I, requires_grad=True)
    y, h = ours(x, lengths=torch.tensor([2, 3]))
    found = gradients([y, h], [x, *ours.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found)
    assert not found[0][3:].any()


def test_resets_and_lengths():
    ours, theirs = pair("GRU", bidirectional=True, num_layers=2)
    x, _ = inputs(theirs)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 0] = resets[4, 1] = resets[1, 3] = True
    resets[5:, 0] = True  # past its end
    y, h = ours(x, resets=resets, lengths=LENGTHS)
    want, want_h = ours(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), resets=resets)
    torch.testing.assert_close(y, pad_packed_sequence(want, total_length=T)[0])
    torch.testing.assert_close(h, want_h)


def test_a_sequence_without_a_step_keeps_its_states():
    for name in CLASSES:
        ours, theirs = pair(name, num_layers=2, bidirectional=True)
        lengths = torch.tensor([2, 0, 3, 0])
        x, *states = inputs(theirs, lengths=lengths)
        y, final = ours(x, hx_of(states), lengths=lengths, padding_value=7.0)
        assert bool((y[:, 1] == 7).all())
        for start, end in zip(states, flat(final)):
            assert torch.equal(start[:, [1, 3]], end[:, [1, 3]])
        kept = lengths > 0
        some = packed(theirs, x[:, kept], [s[:, kept] for s in states], lengths[kept], 7.0)
        for a, b in zip([y, *flat(final)], some):
            torch.testing.assert_close(a[:, kept], b)
        assert all(g.isfinite().all() for g in gradients([y, *flat(final)], [x, *states, *ours.parameters()]))


def test_every_kind_of_lengths():
    ours, theirs = pair("LSTM")
    x = inputs(theirs)[0]
    want = flat(ours(x, lengths=LENGTHS))
    dtypes = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    for lengths in (*map(LENGTHS.to, dtypes), LENGTHS.numpy(), tuple(LENGTHS.tolist()), LENGTHS.tolist()):
        for a, b in zip(flat(ours(x, lengths=lengths)), want):
            assert torch.equal(a, b)
    full = x.detach().nan_to_num()
    for a, b in zip(flat(ours(full, lengths=torch.full((B,), T))), flat(ours(full))):
        torch.testing.assert_close(a, b)
    y, h, c = functional.lstm(x, (torch.zeros(1, B, H).double(),) * 2, list(ours.parameters()), lengths=LENGTHS)
    for a, b in zip((y, h, c), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "lengths, why",
    [
        (torch.tensor([3, 8, 1, 5]), "between 0 and the 7 steps of the input, got 1 to 8"),
        (torch.tensor([3, -1, 1, 5]), "between 0 and the 7 steps of the input, got -1 to 5"),
        (torch.tensor([3, 1, 5]), r"shape \[B\] = \[4\], got \[3\]"),
        (torch.tensor([[3, 1, 5, 2]]), r"shape \[B\] = \[4\], got \[1, 4\]"),
        (torch.tensor([3.0, 1, 5, 2]), "must be integers, got torch.float32"),
        (torch.tensor([True] * 4), "must be integers, got torch.bool"),
    ],
)
def test_what_is_no_length_raises(lengths, why):
    with pytest.raises(RuntimeError, match=why):
        fusedrnn.GRU(I, H)(torch.zeros(T, B, I), lengths=lengths)


def test_where_lengths_make_no_sense():
    gru, x = fusedrnn.GRU(I, H), torch.zeros(T, B, I)
    with pytest.raises(RuntimeError, match="a packed one has its lengths"):
        gru(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), lengths=LENGTHS)
    with pytest.raises(RuntimeError, match="lengths is for a batch"):
        gru(x[:, 0], lengths=torch.tensor(3))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_recorded_gates_are_those_of_the_packed_batch(name):
    ours, theirs = pair(name, num_layers=2, bidirectional=True)
    x = inputs(theirs)[0].detach()
    y, record = fusedrnn.record_gates(ours, x, lengths=LENGTHS)
    _, want = fusedrnn.record_gates(ours, pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    assert list(record) == list(want)
    for key in want:
        assert torch.equal(record[key].valid, want[key].valid)
        for gate in want[key].names:
            torch.testing.assert_close(record[key][gate], want[key][gate], equal_nan=True)
        torch.testing.assert_close(record[key].input, want[key].input, equal_nan=True)
    assert torch.equal(y[0], ours(x, lengths=LENGTHS)[0])


def test_reads_no_value():
    """On a device whose values nobody can read: there is no synchronisation to wait for."""
    ours = fusedrnn.LSTM(I, H, 2, bidirectional=True, device="meta", backend="reference")
    y, (h, c) = ours(torch.empty(T, B, I, device="meta"), lengths=torch.empty(B, dtype=torch.int64, device="meta"))
    assert y.shape == (T, B, 2 * H)
    assert h.shape == c.shape == (4, B, H)
    (y.sum() + h.sum() + c.sum()).backward()


@pytest.mark.parametrize("here, there, seen", [("cpu", "cuda", ["pin", True]), ("meta", "cpu", [False, True])])
def test_how_lengths_get_to_the_device_of_the_input(here, there, seen, monkeypatch):
    """A copy to a GPU waits for nothing, one to the CPU does."""
    found = []

    def to(t, device, non_blocking=False):
        found.append(non_blocking)
        return torch.full(t.shape, 2) if torch.device(device).type == "cpu" else t

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: found.append("pin") or t)
    x = types.SimpleNamespace(shape=(T, B, I), device=torch.device(there))
    functional._check_lengths(torch.ones(B, dtype=torch.int64, device=here), x, B, None)
    assert found == seen


def test_bitwise_repeatable():
    ours, theirs = pair("LSTM", bidirectional=True, num_layers=2)
    leaves = inputs(theirs)
    found = []
    for _ in range(2):
        outputs = flat(ours(leaves[0], tuple(leaves[1:]), lengths=LENGTHS))
        found.append([*outputs, *gradients(outputs, [*leaves, *ours.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_gradcheck(name):
    ours, _ = pair(name, bidirectional=True)
    lengths = torch.tensor([2, 0, 3])
    x = torch.randn(3, 3, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, H, dtype=torch.float64, requires_grad=True)

    def call(x, h):
        return tuple(flat(ours(x, (h, 2 * h) if name == "LSTM" else h, lengths=lengths)))

    assert torch.autograd.gradcheck(call, (x, h))
    assert torch.autograd.gradgradcheck(call, (x, h))


@pytest.mark.parametrize("options", ["one", "stack"])
def test_compiled_once_for_every_length(options):
    pytest.importorskip("torch._dynamo.testing", reason="torch.compile is not tested: no Dynamo")
    torch._dynamo.reset()
    ours, theirs = pair("LSTM", **OPTIONS[options])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, n: ours(x, lengths=n), fullgraph=True, dynamic=True, backend=counter)
    for steps, lengths in ((7, [3, 7, 1, 5]), (9, [9, 2, 4]), (4, [4, 1, 1, 1, 2])):
        lengths = torch.tensor(lengths)
        x = inputs(theirs, lengths=lengths, steps=steps)[0]
        for a, b in zip(flat(compiled(x, lengths)), packed(theirs, x, [], lengths)):
            torch.testing.assert_close(a, b)
        leaves = [x, *ours.parameters()]
        for a, b in zip(
            gradients(flat(compiled(x, lengths)), leaves), gradients(flat(ours(x, lengths=lengths)), leaves)
        ):
            torch.testing.assert_close(a, b)
        # Dynamo gives the compiler an empty graph first.
        assert sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs) == 1


class Tagger(torch.nn.Module):
    def __init__(self, name="LSTM", **options):
        super().__init__()
        self.rnn = make(name, dtype=torch.float32, **options)
        self.head = torch.nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x, lengths):
        y, final = self.rnn(x, lengths=lengths)
        return self.head(y), *flat(final)


STACK = OPTIONS["stack"]


def test_exported_saved_and_loaded_elsewhere(tmp_path):
    """In a process that knows the model no more, with other sizes."""
    model = Tagger(**STACK).eval()
    dynamic = torch.export.Dim.DYNAMIC
    example = inputs(model.rnn, torch.float32)[0].detach(), LENGTHS
    program = torch.export.export(model, example, dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic}))
    torch.export.save(program, tmp_path / "tagger.pt2")
    lengths = torch.tensor([2, 9, 4])
    x = inputs(model.rnn, torch.float32, lengths, 9)[0].detach()
    torch.save({"args": (x, lengths), "want": model(x, lengths)}, tmp_path / "case.pt")
    ways = ["import fusedrnn"]
    if fusedrnn.build_info()["extension"]:  # the library alone has the ops
        ways.append(f"torch.ops.load_library({str(Path(fusedrnn.__file__).with_name('libfusedrnn.so'))!r})")
    script = (
        "import sys, torch\n"
        "exec(sys.argv[3])\n"
        "case = torch.load(sys.argv[2])\n"
        "found = torch.export.load(sys.argv[1]).module()(*case['args'])\n"
        "for a, b in zip(found, case['want'], strict=True): torch.testing.assert_close(a, b)\n"
        "print('equal')"
    )
    for way in ways:
        command = [sys.executable, "-c", script, tmp_path / "tagger.pt2", tmp_path / "case.pt", way]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_onnx_sequence_lens(dynamo, name):
    model = Tagger(name, **STACK)
    x = inputs(model.rnn, torch.float32)[0].detach().nan_to_num()
    found = export(model, (x, LENGTHS), ((0, 1), (0,)), dynamo)
    assert len(nodes(found)) == 2
    assert all(node.input[4] for node in nodes(found))
    for steps, lengths in (
        (T, LENGTHS),
        (9, torch.tensor([2, 9, 4])),
        (1, torch.tensor([1])),
        (5, torch.tensor([3, 2])),
    ):
        x = inputs(model.rnn, torch.float32, lengths, steps)[0].detach().nan_to_num()
        agree(found, model, (x, lengths), reference=False)  # which ignores sequence_lens


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_onnx_padding_value(dynamo):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = fusedrnn.GRU(I, H, bidirectional=True)

        def forward(self, x, lengths):
            return self.gru(x, lengths=lengths, padding_value=-1.0)

    model = Padded()
    args = torch.randn(T, B, I), LENGTHS
    agree(export(model, args, ((0, 1), (0,)), dynamo), model, args, reference=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_for_other_lengths():
    ours = make("GRU", dtype=torch.float32, bidirectional=True)
    x = inputs(ours, torch.float32)[0].detach()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ours

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)

    traced = torch.jit.trace(Model(), (x, LENGTHS))
    stream = io.BytesIO()
    torch.jit.save(traced, stream)
    stream.seek(0)
    lengths = torch.tensor([2, 9, 4])
    x = inputs(ours, torch.float32, lengths, 9)[0].detach()
    for a, b in zip(torch.jit.load(stream)(x, lengths), ours(x, lengths=lengths)):
        torch.testing.assert_close(a, b)


def test_vmap_over_lengths():
    ours, theirs = pair("LSTM", bidirectional=True)
    x = inputs(theirs)[0].detach().nan_to_num()
    lengths = torch.stack([LENGTHS, LENGTHS.flip(0)])
    got = torch.func.vmap(lambda n: tuple(flat(ours(x, lengths=n))))(lengths)
    for k, n in enumerate(lengths):
        for a, b in zip(got, flat(ours(x, lengths=n))):
            torch.testing.assert_close(a[k], b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    ours, theirs = pair("LSTM", dtype, bidirectional=True)
    x, *states = (t.detach() for t in inputs(theirs))
    want = packed(ours, x.to(dtype), [s.to(dtype) for s in states])
    got = flat(ours(x.to(dtype), tuple(s.to(dtype) for s in states), lengths=LENGTHS))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, options",
    [("LSTM", {}), ("LSTM", {"bidirectional": True}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})],
    ids=str,
)
def test_dtypes_under_autocast_are_those_of_a_packed_batch(name, options):
    ours, theirs = pair(name, torch.float32, **options)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = flat(ours(x, lengths=LENGTHS)), packed(theirs.float(), x, [])
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_torchs_own_op_takes_them_packed(monkeypatch):
    """Where no backend of ours runs."""
    monkeypatch.setattr(functional.planning, "choose", lambda *_, **__: functional.planning.Choice("torch", "auto", ""))
    ours, theirs = pair("LSTM", **STACK)
    x, *states = inputs(theirs)
    got = flat(ours(x, tuple(states), lengths=LENGTHS, padding_value=2.0))
    for a, b in zip(got, packed(theirs, x, states, padding_value=2.0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize(
    "name, options", [("LSTM", {}), ("GRU", {"bidirectional": True, "num_layers": 2}), ("RNN", {})]
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_nested_input_is_variable_length(name, options, layout):
    layer = getattr(fusedrnn, name)(3, 4, batch_first=True, dtype=torch.float64, **options)
    sequences = [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in (5, 1, 7)]
    wanted = [*sequences, *layer.parameters()]

    def states(hx):
        return hx if isinstance(hx, tuple) else (hx,)

    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    y, got = layer(nested)
    assert (y.is_nested, y.layout) == (True, layout)
    if layout == torch.jagged:
        assert y.shape[:2] == nested.shape[:2]
        assert (y + nested[..., :1]).shape == y.shape
    each = [layer(s) for s in sequences]
    for row, (want, _) in zip(y.unbind(), each, strict=True):
        torch.testing.assert_close(row, want)
    for s, *parts in zip(states(got), *(states(hx) for _, hx in each), strict=True):
        torch.testing.assert_close(s, torch.stack(parts, 1))
    h = states(got)[0]
    again = layer(nested, got)[0]
    for k, row in enumerate(again.unbind()):
        start = tuple(s[:, k] for s in states(got))
        torch.testing.assert_close(row, layer(sequences[k], start if name == "LSTM" else start[0])[0])
    found = torch.autograd.grad(sum(row.sin().sum() for row in y.unbind()) + h.sum(), wanted)
    want = torch.autograd.grad(sum(a.sin().sum() + states(hx)[0].sum() for a, hx in each), wanted)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_nested_input_that_cannot_be_taken():
    gru = fusedrnn.GRU(3, 4, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(k, 3) for k in (2, 3)], layout=torch.jagged)
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(nested)[0].values(), gru(nested)[0].values())
    with pytest.raises(RuntimeError, match="needs batch_first=True"):
        fusedrnn.GRU(3, 4)(nested)
    with pytest.raises(RuntimeError, match="cannot be given with nested input"):
        gru(nested, lengths=torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="no padding"):
        gru(nested, padding_value=1.0)
    with pytest.raises(RuntimeError, match="without holes"):
        gru(nested.transpose(1, 2))
    with pytest.raises(RuntimeError, match="Expected 3, got 2"):
        gru(nested[..., :2])
