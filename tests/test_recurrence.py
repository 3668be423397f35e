"""One suite for every backend: outputs and all gradients against float64, edge sizes, packed, repeatable.

Without a GPU the kernels of "triton" and "cuda" are compiled for sm_80 and run by tests/ptxsim on CPU tensors.
"""

import itertools

import pytest
import torch
from problems import CASES, INPUTS, Case, assert_close, at_own_kinks, call, make, models, run, widened

from fusedrnn import _build, ops, planning, recompute
from fusedrnn.backends import common, cuda_plan
from fusedrnn.backends.common import Inputs
from fusedrnn.backends.triton import SEQUENCE_MAX_HIDDEN, math_of
from fusedrnn.cells import BUILT_IN
from fusedrnn.planning import Problem

GPU_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [
    ("reference", "auto"),
    ("cpu", "auto"),
    ("triton", "step"),
    ("triton", "sequence"),
    ("cuda", "step"),
    ("cuda", "persistent"),
]
MATHS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
}
EVERYTHING = [(*r, math) for r in RUNS for math in MATHS if math != "tf32" or r[0] in ("triton", "cuda")]


def device_of(backend: str) -> str:
    return GPU_DEVICE if backend in ("triton", "cuda") else "cpu"


def need(backend: str, dtype: torch.dtype = torch.float32) -> None:
    problem = Problem("lstm", 4, 4, 0, dtype, device_of(backend), (8, 0))
    reason = planning.unsupported(backend, problem, planning.machine())
    if backend == "cpu":
        # Nobody may mistake a build that failed for one that was left out.
        assert _build.loaded() or _build.FACTS.get("extension") is False, reason
    if reason:
        pytest.skip(f"the kernels of backend {backend} are not tested here: {reason}")


def refuses(algorithm: str, case: Case, math: str) -> bool:
    """Whether the problem is not for this algorithm; a step must run everything."""
    if algorithm == "sequence":
        return bool(case.proj) or SEQUENCE_MAX_HIDDEN[math_of(MATHS[math], math == "tf32")] < case.H
    return algorithm == "persistent" and (bool(case.proj) or math == "float64")


def cases_of(algorithm: str) -> list[Case]:
    return [c for c in CASES if algorithm in ("auto", "step") or (not c.proj and c.H <= 32)]


def check_against_float64(cell, backend, algorithm, math, case, monkeypatch):
    dtype = MATHS[math]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", math == "tf32")
    need(backend, dtype)
    given = make(case, dtype, device_of(backend), cell=cell)
    if refuses(algorithm, case, math):
        with pytest.raises((RuntimeError, ValueError), match=f"algorithm '{algorithm}'.* cannot run"):
            run(case, given, backend, algorithm, cell)
        return
    got = run(case, given, backend, algorithm, cell)
    exact = run(case, widened(given), "reference", cell=cell)
    kinks = {"exact_for": lambda found: at_own_kinks(case, given, found)} if cell == "rnn_relu" else {}
    assert_close(got, exact, models(case, make(case, dtype, cell=cell), tf32=math == "tf32", cell=cell), **kinks)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, algorithm, math", EVERYTHING)
def test_agrees_with_float64(backend, algorithm, math, case, poisoned, monkeypatch):
    check_against_float64("lstm", backend, algorithm, math, case, monkeypatch)


OTHER_CELLS = [name for name in BUILT_IN if name != "lstm"]
OTHER_CASES = [CASES[k] for k in (1, 2, 3, 5, 7, 8, 11, 12, 13, 16)]


def other_cells():
    """Triton's kernels of these cells in float16 and tf32 are slow: half a second each to compile, and they differ from
    those in bfloat16 and float32 in what the LSTM's differ in, whose are all taken."""
    for cell, (backend, algorithm, math) in itertools.product(OTHER_CELLS, EVERYTHING):
        marks = [pytest.mark.slow] if backend == "triton" and math in ("float16", "tf32") else []
        yield pytest.param(cell, backend, algorithm, math, marks=marks)


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
@pytest.mark.parametrize("cell, backend, algorithm, math", [*other_cells()])
def test_every_cell_agrees_with_float64(cell, backend, algorithm, math, case, poisoned, monkeypatch):
    check_against_float64(cell, backend, algorithm, math, case, monkeypatch)


@pytest.fixture
def wide_blocks(monkeypatch):
    """Persistent forward takes 16 units a block, which planning does for larger problems only."""
    units = lambda problem: cuda_plan.BACKWARD_UNITS if problem.backward else cuda_plan.WIDE_UNITS
    monkeypatch.setattr(cuda_plan, "_persistent", lambda p, chip: cuda_plan._with_units(p, chip, units(p)))


def wide_cases():
    for cell, case in itertools.product(BUILT_IN, CASES):
        if not case.proj and (cell == "lstm" or case in OTHER_CASES):
            marks = [pytest.mark.slow] if cell.startswith("rnn") else []
            yield pytest.param(cell, case, marks=marks, id=f"cuda-{cell}-{case}")


@pytest.mark.parametrize("math", ["tf32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cell, case", [*wide_cases()])
def test_wide_blocks_agree_with_float64(cell, math, case, poisoned, monkeypatch, wide_blocks):
    check_against_float64(cell, "cuda", "persistent", math, case, monkeypatch)


MANY_ROWS = [
    Case(T=1, B=19, I=5, H=33, states=True),
    Case(T=1, B=9, I=7, H=40, bias=False, strided=True, resets=True, reverse=True),
    Case(T=1, B=5, I=6, H=20, lengths=(1, 1, 1, 1, 1), states=True, resets=True),
    Case(T=1, B=7, I=5, H=12, proj=7, resets=True),
]
STEPS = [run for run in EVERYTHING if run[1] == "step"]


@pytest.mark.parametrize(
    "cell, case", [(cell, case) for cell in BUILT_IN for case in MANY_ROWS if cell == "lstm" or not case.proj], ids=str
)
@pytest.mark.parametrize("backend, algorithm, math", STEPS)
def test_one_step_of_many_rows_agrees_with_float64(
    cell, backend, algorithm, math, case, poisoned, monkeypatch, many_rows
):
    check_against_float64(cell, backend, algorithm, math, case, monkeypatch)
    assert len(many_rows) > 1 or "rnn" in cell
    assert sum(part.stop - part.start for part in many_rows) == case.B


@pytest.mark.parametrize(
    "cell, case",
    [
        *((cell, Case(T=6, B=5, I=4, H=20, resets=True)) for cell in ("lstm", "gru")),
        *(
            (cell, Case(T=7, B=5, I=6, H=12, lengths=(7, 7, 4, 2, 1), resets=True, reverse=True))
            for cell in ("lstm", "gru")
        ),
        ("lstm", Case(T=4, B=3, I=5, H=12, proj=7, bias=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("math", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gates_are_computed_again_as_they_were(backend, cell, math, case, poisoned, many_rows):
    """Sums are not rounded on their way to the gates: those differ from the step kernel's by no more than the order of
    float32 sums, which rarely is another value of 16 bits."""
    need(backend)
    given = make(case, MATHS[math], device_of(backend), cell=cell)
    tensors = [given.get(name) for name in INPUTS]
    inputs = Inputs(*tensors, case.batch_sizes(), given.get("resets"), case.reverse)
    y, _, _, gates, _ = ops.sequence(cell, *inputs.plain, backend, "step", True, False)
    again = recompute.gates_of(cell, inputs, y, backend, "step")
    assert len(many_rows) > 1
    assert gates.shape == again.shape
    eps = torch.finfo(MATHS[math]).eps
    torch.testing.assert_close(again, gates, rtol=eps if math != "float32" else 1e-5, atol=1e-6)
    if math != "float32":
        assert (again == gates).float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.skipif(GPU_DEVICE == "cuda", reason="a GPU's schedule cannot be chosen: the order of blocks is not varied")
@pytest.mark.parametrize(
    "backend, algorithm, math, case",
    [(*r, case) for r in EVERYTHING if r[0] in ("triton", "cuda") for case in CASES if not refuses(r[1], case, r[2])],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(backend, algorithm, math, case, monkeypatch):
    check_schedules(backend, algorithm, math, case, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(GPU_DEVICE == "cuda", reason="a GPU's schedule cannot be chosen: the order of blocks is not varied")
@pytest.mark.parametrize("math", ["tf32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.proj], ids=str)
def test_every_schedule_of_wide_blocks_gives_the_same_bits(math, case, monkeypatch, wide_blocks):
    check_schedules("cuda", "persistent", math, case, monkeypatch)


def check_schedules(backend, algorithm, math, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", math == "tf32")
    need(backend)
    given = make(case, MATHS[math])
    first = run(case, given, backend, algorithm)
    for seed in range(1, 6):
        # With every second one 16-byte accesses come in two halves.
        with common.simulator().options(seed=seed, torn=seed % 2):
            for name, t in run(case, given, backend, algorithm).items():
                assert torch.equal(t, first[name]), (seed, name)


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_without_grad_is_the_same(backend, algorithm, poisoned):
    need(backend)
    for case in cases_of(algorithm):
        given = make(case, torch.float32, device_of(backend))
        with_grad = run(case, given, backend, algorithm)
        for name, t in run(case, given, backend, algorithm, wrt=()).items():
            assert torch.equal(t, with_grad[name]), (case, name)


@pytest.mark.parametrize("math", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_bitwise_repeatable(backend, algorithm, math):
    dtype = MATHS[math]
    need(backend, dtype)
    for case in (Case(T=9, B=6, I=12, H=40), Case(T=6, B=3, I=5, H=24, lengths=(6, 4, 4), reverse=True)):
        given = make(case, dtype, device_of(backend))
        first = run(case, given, backend, algorithm)
        for name, t in run(case, given, backend, algorithm).items():
            assert torch.equal(t, first[name]), (case, name)


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_empty_batch(backend, algorithm):
    need(backend)
    case = Case(T=3, B=0, I=4, H=5)
    given = make(case, torch.float32, device_of(backend))
    found = run(case, given, backend, algorithm)
    assert found["y"].shape == (3, 0, 5)
    assert found["h_n"].shape == found["c_n"].shape == (0, 5)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        assert torch.equal(found["d" + name], torch.zeros_like(given[name])), name


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_expanded_input(backend, algorithm):
    need(backend)
    case = Case(T=4, B=3, I=5, H=8)
    given = make(case, torch.float32, device_of(backend))
    given["x"] = given["x"][:, :1].expand(4, 3, 5)
    given["h0"] = given["h0"][:1].expand(3, 8)
    dense = {name: t.contiguous() for name, t in given.items()}
    exact = run(case, dense, backend, algorithm)
    for name, t in run(case, given, backend, algorithm).items():
        assert torch.equal(t, exact[name]), name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_nan_does_not_pass_a_reset(backend, algorithm, cell):
    """Neither a state forward nor a gradient back."""
    need(backend)
    cases = [Case(T=4, B=4, I=3, H=5, resets=True)]
    if cell == "lstm" and algorithm in ("auto", "step"):
        cases.append(Case(T=4, B=4, I=3, H=5, proj=2, resets=True))
    for case in cases:
        given = make(case, torch.float32, device_of(backend), cell=cell)
        given["resets"].fill_(False)
        given["resets"][0, 1] = given["resets"][2, 2] = given["resets"][3, 3] = True
        clean = run(case, given, backend, algorithm, cell)
        # In row 0 there is none, in row 1 it comes before its reset, in row 2 from an input, in row 3 from a gradient.
        for name in ("h0", "c0"):
            if name in given:
                given[name][1] = float("nan")
        given["x"][1, 2] = given["dy"][3, 3] = float("nan")
        got = run(case, given, backend, algorithm, cell)
        clean["y"][1, 2] = clean["dx"][:2, 2] = clean["dx"][3, 3] = float("nan")
        for name in ("dh0", "dc0"):
            if name in clean:
                assert torch.equal(clean[name][1], torch.zeros_like(clean[name][1])), name
                clean[name][2] = float("nan")
        for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
            if name in clean:
                assert torch.equal(got[name].isnan(), clean[name].isnan()), (case, name)
                torch.testing.assert_close(got[name], clean[name], equal_nan=True)


@pytest.mark.parametrize("through", [("h_n", "c_n"), ("y",), ("c_n",), ("h_n",)], ids=str)
@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_gradients_of_some_outputs_only(backend, algorithm, through):
    need(backend)
    for case in (CASES[4], CASES[7], CASES[12], CASES[9] if algorithm in ("auto", "step") else CASES[8]):
        given = make(case, torch.float32, device_of(backend))
        exact = run(case, widened(given), "reference", through=through)
        got = run(case, given, backend, algorithm, through=through)
        assert_close(got, exact, models(case, given, through=through))


@pytest.mark.parametrize("backend, algorithm", RUNS)
def test_only_asked_gradients_are_computed(backend, algorithm):
    need(backend)
    for case in (CASES[4], CASES[10] if algorithm in ("auto", "step") else CASES[8]):
        given = make(case, torch.float32, device_of(backend))
        full = run(case, given, backend, algorithm)
        for name in INPUTS:
            if name in given:
                alone = run(case, given, backend, algorithm, wrt=(name,))
                assert torch.equal(alone["d" + name], full["d" + name]), name


GRADCHECKS = [
    Case(T=3, B=2, I=2, H=3),
    Case(T=2, B=2, I=2, H=3, bias=False, reverse=True),
    Case(T=3, B=3, I=2, H=3, proj=2),
    Case(T=3, B=3, I=2, H=3, lengths=(3, 2, 1)),
    Case(T=3, B=3, I=2, H=3, proj=1, lengths=(3, 2, 1), reverse=True),
    Case(T=3, B=2, I=2, H=3, states=True, resets=True),
    Case(T=3, B=3, I=2, H=3, proj=1, lengths=(3, 2, 1), reverse=True, states=True, resets=True),
]


def gradchecks():
    """In the simulator a direction drawn at random in all inputs at once; every entry by itself takes seconds there."""
    for backend, algorithm in RUNS:
        simulated = device_of(backend) == "cpu" and backend in ("triton", "cuda")
        marks = [pytest.mark.slow] if simulated else []
        for case in GRADCHECKS:
            if not refuses(algorithm, case, "float64"):
                name = f"{backend}-{algorithm}-{case}"
                if simulated:
                    yield pytest.param(backend, algorithm, case, True, id=f"{name}-one_direction")
                yield pytest.param(backend, algorithm, case, False, id=name, marks=marks)


@pytest.mark.gradcheck
@pytest.mark.parametrize("backend, algorithm, case, fast", list(gradchecks()))
def test_gradcheck(backend, algorithm, case, fast):
    need(backend, torch.float64)
    given = make(case, torch.float64, device_of(backend))
    names = [name for name in INPUTS if name in given]

    def function(*tensors):
        tensors = dict(zip(names, tensors)) | {"resets": given.get("resets")}
        return tuple(call(case, tensors, backend, algorithm).values())

    inputs = [given[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)
