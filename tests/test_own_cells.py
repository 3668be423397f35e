"""Cells that are registered while the process runs: states, parameters, inputs and heads in every skeleton."""

import importlib
import itertools

import pytest
import torch
from own_cells import OWN, compile_for_cpu
from problems import Case, assert_close, inputs_of, make, models, run, widened
from test_recurrence import need as recurrence_needs

from fusedrnn import cells, compiled, ops, planning, zoo
from fusedrnn.backends import cuda
from fusedrnn.backends.common import Inputs
from fusedrnn.cells import BUILT_IN, CELLS
from fusedrnn.definition import Definition
from fusedrnn.functional import recurrence_of_states

CASES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=1, B=3, I=4, H=4, heads=2),
    Case(T=5, B=2, I=7, H=16, bias=False, heads=4),
    Case(T=6, B=4, I=8, H=36, reverse=True, heads=2),
    Case(T=3, B=17, I=5, H=33, states=True),
    Case(T=3, B=70, I=9, H=130, heads=2),
    Case(T=7, B=5, I=6, H=20, lengths=(7, 7, 4, 2, 1), states=True, resets=True, heads=4),
    Case(T=7, B=3, I=4, H=17, lengths=(7, 5, 2), states=True, resets=True, reverse=True),
    Case(T=5, B=3, I=6, H=10, strided=True, heads=2),
    Case(T=9, B=23, I=3, H=10, states=True, heads=2),  # rows enough to go over the gradient of W_hh twice
    Case(T=9, B=23, I=3, H=10, states=True, reverse=True, heads=2),
    Case(T=5, B=9, I=3, H=8, resets=True, reverse=True, strided=True),
]
TRITON_CASES = [
    Case(T=3, B=3, I=4, H=8, heads=2),
    Case(T=7, B=5, I=6, H=20, lengths=(7, 7, 4, 2, 1), states=True, resets=True, heads=4),
    Case(T=4, B=17, I=4, H=34, resets=True, reverse=True, strided=True, heads=2),
    Case(T=5, B=2, I=7, H=17, bias=False),
]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = [*OWN, "lstm", "gru", "rnn_tanh"]
# Of built-in cells what test_recurrence has not.
PROBLEMS = [(cell, case) for cell in NAMES for case in CASES if cell in OWN or case.heads > 1]


def need(cell: str, backend: str) -> None:
    recurrence_needs(backend)
    if backend == "cpu" and cell in OWN:
        try:
            compile_for_cpu(cell)
        except RuntimeError as error:
            pytest.skip(f"cells of one's own are not tested on the CPU: {error}")
    if backend == "triton" and cell in OWN:
        importlib.import_module("own_cells_triton")
        cells.register(OWN[cell], "triton")


def check(cell, backend, algorithm, dtype, case):
    need(cell, backend)
    given = make(case, dtype, cell=cell)
    got = run(case, given, backend, algorithm, cell)
    exact = run(case, widened(given), "reference", cell=cell)
    assert_close(got, exact, models(case, given, cell=cell))
    for name, t in run(case, given, backend, algorithm, cell).items():
        assert torch.equal(t, got[name]), name


@pytest.mark.parametrize("cell, case", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_agrees_with_float64(cell, backend, dtype, case, poisoned):
    check(cell, backend, "auto", DTYPES[dtype], case)


def in_triton():
    """A kernel takes seconds to compile: two dtypes and the cells that differ are in `make test`."""
    for cell, dtype, algorithm, case in itertools.product(NAMES, DTYPES, ("step", "sequence"), TRITON_CASES):
        fast = dtype == ("bfloat16" if cell in ("test_slstm", "gru") else "float32") and cell in (*OWN, "gru")
        if cell in OWN or case.heads > 1:
            yield pytest.param(cell, dtype, algorithm, case, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize("cell, dtype, algorithm, case", [*in_triton()], ids=str)
def test_triton_agrees_with_float64(cell, dtype, algorithm, case, poisoned, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(cell, "triton", algorithm, DTYPES[dtype], case)


ZOO = {name: d for name, d in vars(zoo).items() if isinstance(d, Definition) and name not in BUILT_IN}


def of_the_zoo():
    """`make test`: MGU and sLSTM in two dtypes on the CPU; the rest, and Triton's kernels, are slow."""
    for name, dtype, backend in itertools.product(ZOO, DTYPES, ("cpu", "triton:step", "triton:sequence")):
        often = backend == "cpu" and name in ("mgu", "slstm") and dtype in ("float32", "bfloat16")
        for case in CASES if backend == "cpu" else TRITON_CASES:
            yield pytest.param(name, dtype, backend, case, marks=[] if often else [pytest.mark.slow])


@pytest.mark.parametrize("name, dtype, backend, case", [*of_the_zoo()], ids=str)
def test_zoo_agrees_with_float64(name, dtype, backend, case, poisoned, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cell, (backend, _, algorithm) = ZOO[name].cell.name, backend.partition(":")
    recurrence_needs(backend)
    if why := compiled.ensure(cell, backend):
        pytest.skip(f"{name} is not tested on {backend}: {why}")
    check(cell, backend, algorithm or "auto", DTYPES[dtype], case)


def in_cuda():
    """Of a definition, and of built-in cells what has several heads: compiled kernel by kernel, some seconds each."""
    often = {
        ("mgu", "float32", "step", TRITON_CASES[2]),
        ("slstm", "float32", "persistent", TRITON_CASES[1]),
        ("slstm", "bfloat16", "step", TRITON_CASES[1]),
        ("zoneout_lstm", "float64", "step", TRITON_CASES[2]),
        ("peephole_lstm", "float32", "persistent", TRITON_CASES[3]),
        ("gru", "float32", "persistent", TRITON_CASES[2]),
    }
    cells_of = ("mgu", "slstm", "peephole_lstm", "zoneout_lstm", "lstm", "gru", "rnn_tanh")
    for cell, dtype, algorithm, case in itertools.product(cells_of, DTYPES, ("step", "persistent"), TRITON_CASES):
        if (cell in BUILT_IN and case.heads == 1) or (algorithm, dtype) == ("persistent", "float64"):
            continue
        marks = [] if (cell, dtype, algorithm, case) in often else [pytest.mark.slow]
        yield pytest.param(cell, dtype, algorithm, case, marks=marks)


@pytest.mark.parametrize("cell, dtype, algorithm, case", [*in_cuda()], ids=str)
def test_cuda_agrees_with_float64(cell, dtype, algorithm, case, poisoned, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if cell not in BUILT_IN:
        cell = getattr(zoo, cell).cell.name
        recurrence_needs("cuda")
        assert compiled.ensure(cell, "cuda") == ""
    check(cell, "cuda", algorithm, DTYPES[dtype], case)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    "cell, dtype",
    [("slstm", "bfloat16"), ("zoneout_lstm", "float64"), ("peephole_lstm", "float32"), ("gru", "float32")],
)
def test_one_step_of_many_rows(cell, dtype, backend, poisoned, many_rows):
    """Any number of states, parameters, inputs and heads, with the products before the launch."""
    recurrence_needs(backend)
    if cell not in BUILT_IN:
        cell = getattr(zoo, cell).cell.name
        assert compiled.ensure(cell, backend) == ""
    check(cell, backend, "step", DTYPES[dtype], Case(T=1, B=19, I=7, H=34, resets=True, strided=True, heads=2))
    assert len(many_rows) > 2
    # By "auto" too, whatever else such a call could take.
    check(cell, backend, "auto", DTYPES[dtype], Case(T=1, B=9, I=7, H=34, states=True, heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slstm", "zoneout_lstm"])
def test_cuda_is_the_same_under_every_schedule(name):
    recurrence_needs("cuda")
    if torch.cuda.is_available():
        pytest.skip("schedules are the simulator's")
    cell, case = getattr(zoo, name).cell.name, TRITON_CASES[1]
    assert compiled.ensure(cell, "cuda") == ""
    given = make(case, torch.float32, cell=cell)
    first = run(case, given, "cuda", "persistent", cell)
    for seed in range(1, 6):
        with cuda.simulator_options(seed=seed, torn=seed % 2 == 0):
            for key, t in run(case, given, "cuda", "persistent", cell).items():
                assert torch.equal(t, first[key]), (seed, key)


@pytest.mark.parametrize("cell", NAMES)
def test_the_reference_is_a_loop(cell):
    """Heads and packing apart from the reference: each head is a layer of its own, weights cut by hand."""
    case = Case(T=4, B=3, I=5, H=12, heads=3, states=True)
    spec, given = CELLS[cell], make(case, torch.float64, cell=cell)
    got = run(case, given, "reference", cell=cell, wrt=())
    units = 4
    for k in range(3):
        of_head = slice(k * units, (k + 1) * units)

        def rows(t, of_head=of_head):
            return t.unflatten(0, (-1, 12))[:, of_head].flatten(0, 1)

        states = {name: given[name][:, of_head] for name in inputs_of(cell) if name in given and name[1:] == "0"}
        part = given | states | {name: rows(given[name]) for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
        part |= {name: given[name][..., of_head] for name in (*spec.parameters, *spec.inputs)}
        alone = run(Case(T=4, B=3, I=5, H=units, states=True), part, "reference", cell=cell, wrt=())
        for name, t in alone.items():
            torch.testing.assert_close(got[name][..., of_head], t, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", OWN)
def test_gradients_are_autograds(cell):
    """The reference's backward, by hand, against autograd through its forward."""
    case = Case(T=4, B=3, I=5, H=6, heads=2, states=True, resets=True)
    given = make(case, torch.float64, cell=cell)
    names = [name for name in inputs_of(cell) if name in given]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    spec = CELLS[cell]
    inputs = Inputs(
        *(leaves.get(name) for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")),
        None,
        given["resets"],
        False,
        tuple(leaves[f"{name}0"] for name in spec.states[2:]),
        tuple(leaves[name] for name in spec.parameters),
        tuple(leaves[name] for name in spec.inputs),
        2,
    )
    from fusedrnn.backends import reference

    y, h_n, finals, _, every = reference.recurrence(spec, inputs)
    outputs = [y, h_n, *finals, *(t.view(4, 3, 6) for t in every)]
    others = spec.states[1:]
    upstream = ["dy", "dh_n", *(f"d{n}_n" for n in others), *("dcells" if n == "c" else f"devery_{n}" for n in others)]
    pairs = [(t, given[name]) for t, name in zip(outputs, upstream, strict=True) if t.requires_grad]
    outputs, upstream = zip(*pairs)
    want = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    got = run(case, given, "reference", cell=cell)
    for name, t in zip(names, want):
        t = torch.zeros_like(given[name]) if t is None else t
        torch.testing.assert_close(got["d" + name], t, rtol=1e-10, atol=1e-12)


def function_of(cell, backend, recompute=False):
    """What takes the tensors of inputs_of (without w_hr), of two heads, and returns y, every final state, every state;
    and these tensors."""
    spec, given = CELLS[cell], make(Case(T=4, B=3, I=5, H=6, heads=2), torch.float64, cell=cell)
    others, parameters = len(spec.states) - 2, len(spec.states) - 2 + len(spec.parameters)

    def call(*tensors):
        plain, more = tensors[:7], tensors[7:]
        groups = more[:others], more[others:parameters], more[parameters:]
        inputs = Inputs(*plain, None, None, None, False, *groups, 2)
        y, finals, every = recurrence_of_states(spec, inputs, backend, "auto", recompute, True)
        return (y, *finals, *every)

    return call, [given[name] for name in inputs_of(cell) if name in given]


def loss_of(outputs):
    return sum((t * t).sum() * (k + 1) for k, t in enumerate(outputs) if t.requires_grad)


def gradients_of(call, tensors):
    tensors = [t.detach().requires_grad_() for t in tensors]
    found = torch.autograd.grad(loss_of(call(*tensors)), tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]


BOTH = pytest.mark.parametrize("cell, backend", [(cell, backend) for cell in OWN for backend in ("reference", "cpu")])


@BOTH
def test_recompute(cell, backend):
    need(cell, backend)
    call, tensors = function_of(cell, backend)
    again, _ = function_of(cell, backend, recompute=True)
    torch.testing.assert_close(gradients_of(again, tensors), gradients_of(call, tensors))


@BOTH
def test_compile_and_export(cell, backend):
    need(cell, backend)
    call, tensors = function_of(cell, backend)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    torch.testing.assert_close(gradients_of(compiled, tensors), gradients_of(call, tensors))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    exported = torch.export.export(Module(), tuple(tensors)).module()
    torch.testing.assert_close(exported(*tensors), call(*tensors))


@pytest.mark.gradcheck
@BOTH
def test_numerical_gradients(cell, backend):
    need(cell, backend)
    call, tensors = function_of(cell, backend)
    # A stabiliser has no gradient, whatever depends on it: m0, and c, which is scaled by it; h is not.
    names = [name for name in inputs_of(cell) if name != "w_hr"]
    tensors = [t.requires_grad_(name != "m0") for name, t in zip(names, tensors, strict=True)]
    last = 2 if cell == "test_slstm" else 5
    assert torch.autograd.gradcheck(lambda *t: call(*t)[:last], tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t)[:last], tensors, fast_mode=True)


@BOTH
def test_transforms(cell, backend):
    need(cell, backend)
    call, tensors = function_of(cell, backend)
    everywhere = torch.func.grad(lambda *t: call(*t)[0].square().sum(), tuple(range(len(tensors))))
    leaves = [t.detach().requires_grad_() for t in tensors]
    want = torch.autograd.grad(call(*leaves)[0].square().sum(), leaves, allow_unused=True)
    for got, t in zip(everywhere(*tensors), want):
        torch.testing.assert_close(got, torch.zeros_like(got) if t is None else t)
    x, *rest = tensors
    xs = torch.stack([x, x.flip(0), -x])
    for function in (
        lambda one: call(one, *rest),
        torch.func.grad(lambda one: call(one, *rest)[0].square().sum()),
        # Gradients of a weight and of the last parameter or input for each sample.
        lambda one: torch.func.grad(lambda w: call(one, *rest[:3], w, *rest[4:])[0].sum())(rest[3]),
        lambda one: torch.func.grad(lambda p: call(one, *rest[:-1], p)[0].sum())(rest[-1]),
    ):
        mapped, looped = torch.func.vmap(function)(xs), [function(one) for one in xs]
        looped = [*map(torch.stack, zip(*looped))] if isinstance(mapped, tuple) else torch.stack(looped)
        torch.testing.assert_close(mapped if isinstance(looped, torch.Tensor) else [*mapped], looped)
    tangent = torch.func.jvp(lambda one: call(one, *rest)[0], (x,), (xs[1],))[1]
    step = 1e-6 * xs[1]
    torch.testing.assert_close(tangent, (call(x + step, *rest)[0] - call(x - step, *rest)[0]) / 2e-6)


@BOTH
def test_the_ops_keep_their_word(cell, backend):
    need(cell, backend)
    _, tensors = function_of(cell, backend)
    spec = CELLS[cell]
    others, parameters = len(spec.states) - 2, len(spec.states) - 2 + len(spec.parameters)
    more = [t.requires_grad_() for t in tensors[7:]]
    groups = [*more[:others]], [*more[others:parameters]], [*more[parameters:]]
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = (t.requires_grad_() for t in tensors[:7])
    given = (
        cell, x, [h0, c0, *groups[0]], w_ih, w_hh, b_ih, b_hh, None, groups[1], groups[2], None, None, None, None,
        False, 2, backend, "auto",
    )  # fmt: skip
    for keep_gates in (True, False):
        torch.library.opcheck(ops.sequence_op, (*given, keep_gates, True))
    y, finals, gates, every = ops.sequence_op(*given, True, True)
    needs = [True] * (6 + len(finals) + len(spec.parameters) + len(spec.inputs))
    plain = [*given]
    plain[:1] = [cell, torch.ones_like(y), [None] * len(finals), [None] * len(every)]
    backward = (*plain[:-2], y, gates, every, *plain[-2:], needs)
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, backward)
    torch.library.opcheck(ops.sequence_backward_op, detached)


def test_what_is_missing_is_an_error():
    case = Case(T=2, B=2, I=3, H=4, heads=2)
    given = make(case, torch.float32, cell="test_zoneout")

    def call(**changed):
        plain = [given.get(name) for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
        made = Inputs(
            *plain, None, None, False, (), tuple(given[p] for p in ("p_i", "p_f", "p_o")), (given["keep"],), 2
        )._replace(**changed)
        return ops.run(ops.Call.of("test_zoneout", made, "reference", "auto", False, False), *ops.packed(made))

    call()
    for changed, message in (
        ({"parameters": ()}, "has 3 parameters, got 0"),
        ({"inputs": ()}, "has 1 inputs, got 0"),
        ({"others": (given["h0"],)}, "has 2 states, got 3"),
        ({"inputs": (given["keep"][:1],)}, "keep must have shape"),
        ({"parameters": (given["p_i"], given["p_f"].double(), given["p_o"])}, "p_f must have the dtype of x"),
        ({"heads": 3}, "heads must divide|must have shape"),
        ({"heads": 0}, "heads must be positive"),
        ({"heads": 1}, "must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changed)
    with pytest.raises(ValueError, match="built-in"):
        cells.register(CELLS["lstm"])


def test_backends_that_cannot_say_so():
    case = Case(T=2, B=2, I=3, H=4)
    given = make(case, torch.float32, cell="test_slstm")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        run(case, given, "cuda", cell="test_slstm")
    choice = planning.decide(planning.Problem("test_slstm", 3, 4, 0, torch.float32, "cuda", (8, 0)), planning.Machine())
    # Other tests of this process may have brought kernels of Triton.
    assert choice.backend == ("triton" if "triton" in cells.kernels_of("test_slstm") else "reference")
    assert "cuda cannot: it has no kernels of the cell test_slstm" in choice.why
