"""The Triton kernels' sm_80 code in ptxsim, beyond the suite of every backend: wide tiles, seeds, launches, cost."""

import pytest
import torch
from problems import INPUTS, Case, assert_close, make, models, run, widened

from fusedrnn.backends import triton as backend
from fusedrnn.backends.common import Inputs
from fusedrnn.cells import CELLS

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fusedrnn.kernels.tile import unstack  # noqa: E402

pytestmark = pytest.mark.skipif(
    backend._simulator() is None, reason="needs FUSEDRNN_SIMULATE=1, which the tests set where there is no GPU"
)

WIDE = [
    Case(T=3, B=16, I=96, H=64),
    Case(T=3, B=66, I=48, H=80, reverse=True),
    Case(T=2, B=40, I=16, H=32),
    Case(T=2, B=9, I=130, H=40, proj=33),
    Case(T=3, B=18, I=8, H=20, lengths=(3,) * 7 + (2,) * 11, reverse=True),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def fits(case: Case, algorithm: str, math: str) -> bool:
    return algorithm == "step" or (not case.proj and backend.SEQUENCE_MAX_HIDDEN[math] >= case.H)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_agrees_with_float64(algorithm, dtype, poisoned):
    for case in WIDE:
        if not fits(case, algorithm, backend.math_of(dtype, tf32=False)):
            continue
        given = make(case, dtype)
        backend.launches.clear()
        found = run(case, given, "triton", algorithm)
        count = case.T if algorithm == "step" else 1
        assert backend.launches == {f"{algorithm}_forward_kernel": count, f"{algorithm}_backward_kernel": count}, case
        try:
            assert_close(found, run(case, widened(given), "reference"), models(case, given))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_the_order_of_warps_and_blocks_does_not_matter(algorithm):
    import ptxsim

    for dtype in (torch.bfloat16, torch.float32):
        case = Case(T=3, B=18, I=24, H=48, lengths=(3,) * 7 + (2,) * 11, reverse=True)
        given = make(case, dtype)
        first = run(case, given, "triton", algorithm)
        for seed in range(1, 6):
            with ptxsim.options(seed=seed):
                for name, t in run(case, given, "triton", algorithm).items():
                    assert torch.equal(t, first[name]), (dtype, seed, name)


@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_what_is_kept_changes_nothing_else(algorithm, poisoned):
    case = Case(T=3, B=3, I=4, H=9)
    given = make(case, torch.float32)
    inputs = Inputs(*map(given.get, INPUTS), None, None, False)
    full = backend.forward(CELLS["lstm"], inputs, algorithm, True, True)
    for keep_gates, keep_cells in ((False, True), (True, False)):
        *outputs, gates, cells = backend.forward(CELLS["lstm"], inputs, algorithm, keep_gates, keep_cells)
        kept = (*outputs, gates if keep_gates else full[3], cells if keep_cells else full[4])
        for k, (got, want) in enumerate(zip(kept, full, strict=True)):
            assert torch.equal(got, want), (keep_gates, keep_cells, k)
        assert keep_gates or not gates.numel()
        assert keep_cells or not cells.numel()


@pytest.mark.parametrize("resets, cost", [(False, 285_000), (True, 292_000)])
def test_a_step_reads_the_weights_once(resets, cost, monkeypatch):
    """Bytes: each weight once in the whole grid, x and h once in each block of units."""
    simulator = backend._simulator()
    counted = {}

    def launch(kernel, grid, *rest, **options):
        counted[kernel.__name__] = grid, simulator_launch(kernel, grid, *rest, **options)

    simulator_launch = simulator.launch
    monkeypatch.setattr(simulator, "launch", launch)
    case = Case(T=1, B=16, I=768, H=768, resets=resets)
    run(case, make(case, torch.bfloat16), "triton", "step")
    (units, rows), forward = counted["step_forward_kernel"]
    assert units * rows >= 90
    for weight in ("w_ih", "w_hh"):
        assert forward["by_arg"][weight]["ld_bytes"] == 4 * 768 * 768 * 2
    assert forward["by_arg"]["x"]["ld_bytes"] == units * 16 * 768 * 2
    assert forward["global_ld_bytes"] <= 14.5e6
    assert forward["warp_instr"] <= cost
    assert forward["mma"] == 2 * 4 * 768 * 768 * 16 // (16 * 8 * 16)


@triton.jit
def unstack_kernel(x, y, A: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr):
    o = tl.arange(0, BU)[:, None] * BB + tl.arange(0, BB)[None, :]
    o_x = tl.arange(0, A * BU)[:, None] * BB + tl.arange(0, BB)[None, :]
    blocks = unstack(tl.load(x + o_x), A, BU, BB)
    for a in tl.static_range(A):
        tl.store(y + a * (BU * BB) + o, blocks[a])


@pytest.mark.parametrize("accumulators", [1, 2, 4])
def test_accumulators_are_unstacked_in_order(accumulators):
    x = torch.randn(accumulators * 8, 16)
    y = torch.full_like(x, float("nan"))
    constants = {"A": accumulators, "BU": 8, "BB": 16}
    backend.launch(unstack_kernel, (1, 1), {"x": x, "y": y}, constants, num_warps=1, num_stages=1)
    assert torch.equal(x, y)
