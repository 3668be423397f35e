"""What the CUDA kernels cost, counted in the simulator. docs/kernels.md has the formulas."""

import sys
from pathlib import Path

import pytest
import torch

from fusedrnn import planning

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_cost

pytestmark = pytest.mark.skipif(
    "cuda" not in planning.machine().on_cpu,
    reason="costs are counted by the simulator, where there is an nvcc and no GPU",
)
SLOW = {kernel: pytest.mark.slow for kernel in gpu_cost.GOALS if kernel.batch > 16}


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, id=str(k).replace(" ", "-"), marks=SLOW.get(k, ())) for k in gpu_cost.GOALS]
)
def test_goals(kernel):
    cost = gpu_cost.per_step(kernel)
    assert cost["warp_instr"] <= kernel.instructions
    assert cost["global_ld_bytes"] <= kernel.read
    assert cost["sector_ratio"] <= 1.3
    assert cost["atom_global"] == 0
    assert cost["grid_arrive"] == 0
    if kernel.algorithm == "step":
        assert cost["launches"] == 4
        assert cost["blocks"] >= 90
        return
    assert cost["launches"] == 1
    assert cost["blocks"] >= (48 if kernel.backward else 64)
    assert cost["bar_block"] == cost["blocks"], "one block barrier a step, no grid barrier"
    floor = gpu_cost.floor_bytes(kernel, -(-kernel.hidden // 16))
    assert cost["global_ld_bytes"] <= 1.1 * floor[0]
    assert cost["global_st_bytes"] <= 1.1 * floor[1]


PERSISTENT = [kernel for kernel in gpu_cost.GOALS if kernel.algorithm == "persistent"]


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, id=str(k).replace(" ", "-"), marks=SLOW.get(k, ())) for k in PERSISTENT]
)
def test_an_ordinary_step_by_the_model(kernel):
    """The blocks fill the mailbox themselves. Times are a model's: no GPU was timed."""
    cost = gpu_cost.by_the_clock(kernel, 200, 250)
    assert cost["ns"] <= kernel.nanoseconds
    assert cost["mma"] == cost["mma_ideal"], "nothing is multiplied before it has come"
    if kernel.batch <= 16:  # backward asks a tile of 8 rows at a time, of which both directions have two a block
        rounds = 4 if kernel.backward and kernel.directions == 2 else 3
        assert cost["most_rounds"] <= rounds, (
            "beside its polls a warp asks once, and perhaps again for what was missing"
        )
    assert cost["mma_chain"] <= 8
    hbm = sum(ns for (_, _, reason), ns in cost["waits"].items() if reason == "first touch of HBM")
    assert hbm <= 10, "nothing waits for HBM in the middle of a sequence"


@pytest.mark.parametrize("backward", [False, True])
def test_weights_are_read_once_a_launch(backward):
    kernel = gpu_cost.Kernel("persistent", backward, 16, 256, 0, 0)
    cost = gpu_cost.per_step(kernel)
    weights = 4 * kernel.hidden**2 * 2
    slices = cost["blocks"] // (kernel.hidden // (16 if backward else 8))
    reads = cost["reads_once"]
    if backward:  # the first step has no dgates to read
        reads += kernel.hidden // 16 * kernel.batch * 4 * kernel.hidden * 2
    # Beside W_hh: the biases, or dh_n, dc_n and the last c.
    assert slices * weights <= reads <= 1.2 * slices * weights


@pytest.mark.parametrize("backward, tile, packets", [(False, 24, 2 * 3), (True, 12, 0)])
def test_exact_products_shuffle_no_weights(backward, tile, packets):
    """Of float32 without tf32 a tile's sums, once, and forward the packets that are gathered; H does not matter."""
    for hidden in (128, 256):
        cost = gpu_cost.per_step(gpu_cost.Kernel("persistent", backward, 8, hidden, 0, 0, dtype=torch.float32))
        assert cost["shfl"] == cost["blocks"] * (8 * tile + packets)


@pytest.mark.parametrize("backward", [False, True])
def test_a_small_problem_by_the_model(backward):
    """Warps that open a barrier themselves had two turns, one of them after their block had ended: a crash."""
    cost = gpu_cost.by_the_clock(gpu_cost.Kernel("persistent", backward, 2, 32, 0, 0), 200, 250)
    assert 300 < cost["ns"] < 2000
