"""What the GPU backends ask of torch around their kernels, on a card of fake tensors: CUDA tensors without data."""

import contextlib
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fusedrnn import functional
from fusedrnn.backends import common, cuda, triton
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.backends.cuda_plan import CHIP_LIMITS
from fusedrnn.cells import BUILT_IN, CELLS

CUDA = torch.device("cuda", 0)
# Of fake tensors' addresses, which cuda.py looks at for their alignment.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class Card(FakeTensorMode):
    """Fake CUDA tensors beside real ones of the CPU. What has to wait for the device or reads memory of the host, which
    no CUDA graph may hold, raises; ``seen`` is called with every operation on the card."""

    def __init__(self, seen=lambda name, args: None):
        super().__init__(allow_non_fake_inputs=True)
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        to = torch.device(kwargs.get("device") or "cpu")
        if to.type == "cpu" and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        name = func._schema.name
        places = {t.device.type for t in tensors if t.dim()} | ({to.type} if "device" in kwargs else set())
        if name in ("aten::_to_copy", "aten::copy_") and len(places) > 1:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        # Some wait only for a mask, or where they are not told how long the output is.
        told = kwargs.get("output_size") or (
            name == "aten::index" and not any(t.dtype == torch.bool for t in args[1] if t is not None)
        )
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) and not told:
            raise RuntimeError(f"{name} waits for the device")
        self.seen(name, args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def card(monkeypatch):
    """A function that makes one; a graph is being recorded on it, and kernels are not launched."""

    class Kernels:
        simulator = None

        def number_of(self, cell):
            return 0

        def launch(self, name, *calls):
            launches.append(name)

    launches = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_kernels", lambda device: Kernels())
    monkeypatch.setattr(cuda, "chip", lambda device: CHIP_LIMITS["h100-sxm"])
    monkeypatch.setattr(triton, "_check", lambda x: None)
    monkeypatch.setattr(triton, "_chip", lambda device: triton.SM80)
    monkeypatch.setattr(triton, "launch", lambda kernel, *rest: launches.append(kernel))

    def make(seen=lambda name, args: None):
        made = Card(seen)
        made.launches = launches
        return made

    return make


SIZES = (7, 7, 7, 5, 4, 1)


def backward_and_forward(module, cell, algorithm, packed, reverse, projected=False, dtype=torch.float16, steps=6):
    """Of one direction, with resets and every gradient."""
    batch, inputs, hidden, out, gates = 7, 6, 16, 8 if projected else 16, len(cell.gates)
    rows = (sum(SIZES),) if packed else (steps, batch)

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=CUDA)

    c0 = new(batch, hidden) if cell.has_cell_state else None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    given = Inputs(
        new(*rows, inputs), new(batch, out), c0, new(gates * hidden, inputs), new(gates * hidden, out),
        new(gates * hidden), new(gates * hidden), new(out, hidden) if projected else None,
        torch.tensor(SIZES) if packed else None, new(*rows, dtype=torch.bool), reverse,
    )  # fmt: skip
    y, _, _, kept, cells = module.forward(cell, given, algorithm, True, True)
    assert y.device == CUDA
    upstream = Gradients(y, given.h0, c0, new(*rows, hidden, dtype=acc) if cell.has_cell_state else None)
    needs = [t is not None for t in given[:8]]
    return module.backward(cell, upstream, given, Saved(y, kept, cells), algorithm, needs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", sorted(BUILT_IN))
@pytest.mark.parametrize(
    "module, algorithm", [(cuda, "persistent"), (cuda, "step"), (triton, "step"), (triton, "sequence")]
)
def test_a_graph_may_be_recorded(card, module, algorithm, cell, packed, reverse):
    for projected in (False, True):
        if projected and (cell != "lstm" or algorithm != "step"):
            continue
        with card() as c:
            grads = backward_and_forward(module, CELLS[cell], algorithm, packed, reverse, projected)
        assert c.launches
        assert all(t.device == CUDA for t in grads)


@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_of_both_directions_may_be_recorded(card, packed):
    both = [cuda.forward_both, cuda.backward_both]
    module = SimpleNamespace(
        forward=lambda cell, inputs, *options: both[0](cell, [inputs, inputs._replace(reverse=True)], *options)[0],
        backward=lambda cell, *given: both[1](cell, [(*given[:3], given[4])] * 2, given[3])[0],
    )
    with card() as c:
        grads = backward_and_forward(module, CELLS["lstm"], "persistent", packed, False)
    assert c.launches == ["persistent_forward", "persistent_backward"]
    assert all(t.device == CUDA for t in grads)


@pytest.mark.parametrize("directions", [1, 2])
def test_resets_of_a_packed_sequence_are_recorded(card, directions):
    with card():
        x = torch.empty(sum(SIZES), 3, device=CUDA)
        masks = functional._masks(
            torch.empty(len(SIZES), 7, dtype=torch.bool, device=CUDA), x, 7, torch.tensor(SIZES), True, directions, None
        )
    assert [m.shape[0] for m in masks] == [sum(SIZES)] * directions


def test_outside_of_a_graph_nobody_waits(card, monkeypatch):
    """The sizes are copied from pinned memory, behind what runs."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: copies.append("pinned") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: copies.append((device, non_blocking)) or t)
    assert common.sizes_on(torch.tensor(SIZES), CUDA).tolist() == list(SIZES)
    assert copies == ["pinned", (CUDA, True)]


def test_the_card_finds_what_it_looks_for(card):
    """Indexing with a list copies it; .item() waits; so does what a mask selects."""
    for wrong in (lambda x: x[:, [0, 2]], lambda x: x[0, 0].item(), lambda x: x[x > 0], lambda x: x.cpu()):
        with card(), pytest.raises(RuntimeError, match=r"during CUDA graph capture|waits for the device"):
            wrong(torch.empty(3, 4, device=CUDA))


@pytest.mark.parametrize("sizes", [(1,), (3, 3, 3), (5, 4, 4, 2, 1, 1), tuple(range(200, 0, -1)), SIZES])
def test_sizes_as_arguments_of_kernels(sizes):
    assert common._by_value(torch.tensor(sizes), torch.device("cpu")).tolist() == list(sizes)


@pytest.mark.parametrize("sizes", [(1,), (3, 3, 3), (5, 4, 4, 2, 1, 1), SIZES])
def test_rows_of_packed_data(sizes):
    batch, rows = sizes[0], [(t, b) for t, n in enumerate(sizes) for b in range(n)]
    where = {at: k for k, at in enumerate(rows)}
    found = common.last_rows(len(rows), batch, torch.tensor(sizes), torch.device("cpu"))
    want = [max(k for k, (_, b) in enumerate(rows) if b == sequence) for sequence in range(batch)]
    assert torch.arange(len(rows))[found].tolist() == want
    for offset in (1, -1):
        row, inside, step, place = common.neighbours(torch.tensor(sizes), len(rows), offset)
        assert list(zip(step.tolist(), place.tolist())) == rows
        assert inside.tolist() == [(t + offset, b) in where for t, b in rows]
        assert [r for r, i in zip(row.tolist(), inside) if i] == [
            where[t + offset, b] for t, b in rows if (t + offset, b) in where
        ]


FLAGS = torch.backends.cuda.matmul


@pytest.fixture
def flags():
    """torch's flags of matrix products, which the tests here set; put back afterwards."""
    names = ("fp32_precision", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(FLAGS, name) for name in names], torch.backends.cudnn.rnn.fp32_precision
    yield
    for name, value in zip(names, before[0]):
        setattr(FLAGS, name, value)
    torch.backends.cudnn.rnn.fp32_precision = before[1]
    assert not common._changed


@pytest.mark.parametrize("module, algorithm", [(cuda, "persistent"), (triton, "step")])
@pytest.mark.parametrize("others", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("rnn", ["none", "ieee", "tf32"])
def test_float32_products_are_as_the_rnns(card, flags, module, algorithm, rnn, others):
    torch.backends.cudnn.rnn.fp32_precision, FLAGS.fp32_precision = rnn, others
    seen = []
    note = lambda name, args: seen.append((name, FLAGS.fp32_precision))
    with card(note):
        backward_and_forward(module, CELLS["lstm"], algorithm, False, False, dtype=torch.float32)
    products = {precision == "tf32" for name, precision in seen if name in ("aten::mm", "aten::addmm")}
    assert products == {rnn == "tf32"}
    assert sum(name in ("aten::mm", "aten::addmm") for name, _ in seen) >= 4  # x W_ih^T or not, dx, dh0, dW_ih, dW_hh
    assert {precision for name, precision in seen if name == "aten::new_empty"} == {others}
    assert FLAGS.fp32_precision == others


@pytest.mark.parametrize("dtype, flag", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("before", [True, False, (False, False)])
def test_sums_of_16_bits_are_float32(card, flags, dtype, flag, before):
    """All terms of a sum, also where the product splits it: dW sums over every row."""
    name = f"allow_{flag}_reduced_precision_reduction"
    pair = lambda: getattr(torch._C, f"_get_cublas_{name}")()
    setattr(FLAGS, name, before)
    was, seen = pair(), []
    with card(lambda op, args: seen.append((op, getattr(FLAGS, name)))):
        backward_and_forward(cuda, CELLS["lstm"], "persistent", False, False, dtype=dtype)
    assert {reduced for op, reduced in seen if op in ("aten::mm", "aten::addmm")} == {False}
    assert pair() == was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("module", [cuda, triton])
def test_products_of_a_step_of_many_rows_are_not_rounded(card, flags, module, dtype, many_rows):
    """Two a part, of two matrices of the dtype of x."""
    seen = []
    with card(lambda op, args: seen.append((op, args))):
        backward_and_forward(module, CELLS["lstm"], "step", False, False, dtype=dtype, steps=1)
    products = [args for op, args in seen if op == "aten::mm"]
    assert len(many_rows) > 1
    kept = products[: 2 * len(many_rows)]
    assert all(t.dtype == dtype for args in kept for t in args[:2])
    assert [args[2:] for args in kept] == [() if dtype == torch.float32 else (torch.float32,)] * len(kept)


def test_flags_are_put_back_by_the_last_thread(flags):
    FLAGS.fp32_precision = "ieee"
    inside, leave = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def hold(k):
        with common._as_flag("fp32_precision", "tf32"):
            inside[k].set()
            leave[k].wait(10)

    threads = [threading.Thread(target=hold, args=(k,)) for k in range(3)]
    for k in range(3):
        threads[k].start()
        inside[k].wait(10)
    for k in (0, 2, 1):
        assert FLAGS.fp32_precision == "tf32"
        leave[k].set()
        threads[k].join()
    assert FLAGS.fp32_precision == "ieee"
    with pytest.raises(ZeroDivisionError), common._as_flag("fp32_precision", "tf32"):
        raise ZeroDivisionError
    assert FLAGS.fp32_precision == "ieee"


class Driver:
    """Triton's, of a card that is not there: kernels are compiled for it, launches are written down."""

    def __init__(self):
        self.launches = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *args: (None, 2, 64, 0, 1024),
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def launcher_cls(self, source, metadata):
        return lambda *args: self.launches.append(args)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_later_steps_are_launched_as_triton_itself_would(card, monkeypatch, cell, packed):
    pytest.importorskip("triton", reason="launches of Triton's kernels")
    from triton.runtime import driver

    from fusedrnn.kernels import step

    monkeypatch.undo()
    for kernel in (step.step_forward_kernel, step.step_backward_kernel):  # of a card that is there
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton, "_check", lambda x: None)
    monkeypatch.setattr(triton, "_chip", lambda device: triton.chip_of((9, 0), 132, 232448))

    class Anew(triton.Steps):
        compiled = property(lambda self: None, lambda self, value: None)

    found = Driver()
    monkeypatch.setattr(driver, "_active", found)

    def launched(steps):
        found.launches.clear()
        monkeypatch.setattr(triton, "Steps", steps)
        before = triton.launches.total()
        with Card():
            backward_and_forward(triton, CELLS[cell], "step", packed, False, dtype=torch.bfloat16)
        assert triton.launches.total() - before == len(found.launches) == 2 * len(SIZES)
        of_step = {}  # a tensor is known by the place at which it came first
        return [
            [of_step.setdefault(id(a), (k, i)) if isinstance(a, torch.Tensor) else a for i, a in enumerate(step)]
            for k, step in enumerate(found.launches)
        ]

    # Words before the kernel's arguments: grid, stream, function, what was compiled, hooks.
    again, anew = launched(triton.Steps), launched(Anew)
    assert [(*step[:5], *step[9:]) for step in again] == [(*step[:5], *step[9:]) for step in anew]
    assert len({str(step) for step in again}) == len(again)
