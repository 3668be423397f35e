"""Both directions of a layer in one launch of the backend cuda: the bits of two launches."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from test_cuda_kernels import SEEDS, draw, problem

from fusedrnn import planning
from fusedrnn.backends import cuda
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.backends.cuda_plan import CHIP_LIMITS, plan
from fusedrnn.cells import BUILT_IN, CELLS

ROOT = Path(__file__).resolve().parents[1]
H100, A100 = CHIP_LIMITS["h100-sxm"], CHIP_LIMITS["a100"]
simulated = pytest.mark.skipif(
    "cuda" not in planning.machine().on_cpu,
    reason="launches are counted by the simulator, where there is an nvcc and no GPU",
)
NEEDS = [True] * 7 + [False]


def directions(cell, dtype, sizes, resets, hidden=40, batch=9):
    """(inputs, gradients of the outputs) of each."""
    found, generator = [], torch.Generator().manual_seed(3)
    for reverse in (False, True):
        given, upstream = draw(4, batch, 5, hidden, dtype, sizes, seed=int(reverse), cell=CELLS[cell])
        lead = given[0].shape[:-1]
        mask = torch.rand(lead, generator=generator) < 0.3 if resets else None
        dcells = torch.rand(*lead, hidden, generator=generator) if CELLS[cell].has_cell_state else None
        inputs = Inputs(*given, None if sizes is None else torch.tensor(sizes), mask, reverse)
        found.append((inputs, Gradients(*upstream, dcells)))
    return found


def one_by_one(cell, given):
    outputs = [cuda.forward(CELLS[cell], inputs, "persistent", True, True) for inputs, _ in given]
    kept = [Saved(o[0], o[3], o[4]) for o in outputs]
    grads = [
        cuda.backward(CELLS[cell], grads, inputs, saved, "persistent", NEEDS)
        for (inputs, grads), saved in zip(given, kept)
    ]
    return outputs, grads


def together(cell, given):
    outputs = cuda.forward_both(CELLS[cell], [inputs for inputs, _ in given], "persistent", True, True)
    kept = [Saved(o[0], o[3], o[4]) for o in outputs]
    both = [(grads, inputs, saved, NEEDS) for (inputs, grads), saved in zip(given, kept)]
    return outputs, cuda.backward_both(CELLS[cell], both, "persistent")


def assert_equal_bits(got, want):
    for these, those in zip(got, want, strict=True):
        for a, b in zip(these, those, strict=True):
            for k, (s, t) in enumerate(zip(a, b, strict=True)):
                assert torch.equal(s, t), k


def launches(call):
    """What a call returns, and how often it launched something."""
    counters = cuda._simulated().simulator.counters
    before = counters()["launches"]
    found = call()
    return found, counters()["launches"] - before


@simulated
@pytest.mark.parametrize("sizes", [None, (9, 9, 3, 1)])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("cell", BUILT_IN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_launch_gives_the_bits_of_two(cell, dtype, resets, sizes, poisoned):
    given = directions(cell, dtype, sizes, resets)
    want, apart = launches(lambda: one_by_one(cell, given))
    got, at_once = launches(lambda: together(cell, given))
    assert (apart, at_once) == (4, 2)
    assert_equal_bits(got, want)


@simulated
@pytest.mark.parametrize("hidden, batch", [(256, 16), (129, 3)])
def test_one_launch_of_several_blocks_and_groups(hidden, batch, poisoned):
    given = directions("lstm", torch.bfloat16, None, True, hidden, batch)
    chosen = [cuda._plan_of(CELLS["lstm"], given[0][0], "auto", False, n) for n in (1, 2)]
    assert chosen[1].directions == 2
    assert chosen[0].grid == chosen[1].grid, "or bits are not compared"
    assert_equal_bits(together("lstm", given), one_by_one("lstm", given))


@simulated
@pytest.mark.parametrize("sizes", [None, (9, 9, 3, 1)])
def test_under_every_schedule(sizes, poisoned):
    given = directions("gru", torch.bfloat16, sizes, True)
    want = one_by_one("gru", given)
    for seed in SEEDS:
        with cuda.simulator_options(seed=seed, torn=seed % 2 == 0):
            assert_equal_bits(together("gru", given), want)


WRONG = {
    "forward is one": ("persistent_forward.cuh", "all.of[blockIdx.z]", "all.of[0]"),
    "backward is one": ("persistent_backward.cu", "all.of[blockIdx.z]", "all.of[0]"),
    "forward has the pointers of the one": ("persistent_forward.cuh", "& p = plain(given);", "& p = plain(all.of[0]);"),
    "a launch of one": ("launcher.cpp", "unsigned(p.groups), unsigned(count)}", "unsigned(p.groups), 1u}"),
}


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("bug", ["none", *WRONG])
def test_a_wrong_direction_is_caught(bug, tmp_path, monkeypatch, poisoned):
    given = directions("lstm", torch.bfloat16, None, False)
    want = one_by_one("lstm", given)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    folder = tmp_path / "csrc" / "cuda"
    path = folder / "instances.h"
    of = r"(#define FUSEDRNN_PERSISTENT_%s_OF\(Cell, gates, X\)) "
    text, few = path.read_text(), r"\1 FUSEDRNN_BOTH(X, 4, Cell, bfloat16)\n"
    text, forward = re.subn(of % "(?:FORWARD|FORWARD_WIDE)" + r".*?float16\)\n", few, text, flags=re.DOTALL)
    text, backward = re.subn(of % "BACKWARD" + r".*\n", few, text)
    assert (forward, backward) == (2, 1)
    path.write_text(text)
    if bug in WRONG:
        name, old, new = WRONG[bug]
        source = (folder / name).read_text()
        assert old in source, "the planted bug has lost its place"
        (folder / name).write_text(source.replace(old, new, 1))
    kernels = cuda._simulate(folder, ["persistent_forward", "persistent_forward_wide", "persistent_backward"])
    monkeypatch.setattr(cuda, "_kernels", lambda device: kernels)
    monkeypatch.setattr(cuda, "_POLL_LIMIT_SIMULATED", 200)
    if bug == "none":
        assert_equal_bits(together("lstm", given), want)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            assert_equal_bits(together("lstm", given), want)


# Where it is one launch


@pytest.mark.parametrize(
    "chip, hidden, batch, backward, grid",
    [
        (H100, 256, 16, False, (32, 2)),  # as one direction has it
        (H100, 512, 16, False, (32, 2)),
        (H100, 768, 16, True, (48, 1)),
        (H100, 1024, 16, False, (64, 1)),
        (H100, 1024, 64, True, (64, 1)),  # two slices one after the other
        (A100, 512, 16, False, (32, 1)),
        (A100, 768, 32, True, (48, 1)),
    ],
)
def test_both_directions_where_they_fit(chip, hidden, batch, backward, grid):
    sizes = {"hidden": hidden, "batch": batch, "backward": backward}
    chosen = plan(problem(**sizes, directions=2), chip)
    assert (chosen.grid, chosen.directions) == (grid, 2)
    assert 2 * grid[0] * grid[1] <= chip.multiprocessors
    assert grid[0] * chosen.units >= hidden
    assert f"{grid[0]} x {grid[1]} blocks x 2 directions in one launch on {chip.multiprocessors} multip" in chosen.why
    assert plan(problem(**sizes), chip).directions == 1


@pytest.mark.parametrize(
    "chip, changes, words",
    [
        (A100, {"hidden": 1024}, "2 x 64 blocks must be resident at once, a100 has 108 multiprocessors"),
        (A100, {"hidden": 1024, "backward": True}, "2 x 64 blocks must be resident at once, a100 has 108"),
        (H100, {"hidden": 1024, "dtype": "float32"}, "2 x 128 blocks must be resident at once"),
        (H100, {"hidden": 640, "batch": 64}, "one launch with 2 rounds of 32 rows a block takes longer, by a model"),
        (H100, {"hidden": 640, "batch": 256}, "a batch of 256 takes 8 rounds"),
    ],
)
def test_one_after_the_other_and_why(chip, changes, words):
    chosen, alone = plan(problem(**changes, directions=2), chip), plan(problem(**changes), chip)
    assert chosen.directions == 1
    assert chosen.why == f"{alone.why}; one direction after the other: {chosen.why.split('other: ')[-1]}"
    assert words in chosen.why
    assert (chosen.algorithm, chosen.grid, chosen.units) == ("persistent", alone.grid, alone.units)


def test_what_takes_step_takes_it_for_each_direction():
    for changes in ({"dtype": "float64"}, {"steps": 2}, {"hidden": 2000}):
        chosen = plan(problem(**changes, directions=2), H100)
        assert chosen == plan(problem(**changes), H100)
        assert chosen.algorithm == "step"


@simulated
def test_a_refused_launch_gives_way(monkeypatch):
    """A process that gets 108 of 132 multiprocessors: 2 x 64 blocks of both directions become 64 of each."""
    monkeypatch.setattr(cuda, "_resident", {})
    given = directions("lstm", torch.bfloat16, None, False, 1024, 8)
    both = [inputs for inputs, _ in given]
    with cuda.simulator_options(chip="a100"):
        with pytest.raises(RuntimeError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
            cuda.forward_both(CELLS["lstm"], both, "persistent", True, True)
        with pytest.warns(RuntimeWarning, match="plans for less than 128 blocks at once"):
            got, counted = launches(lambda: cuda.forward_both(CELLS["lstm"], both, "auto", True, True))
    assert counted == 2
    monkeypatch.setattr(cuda, "_resident", {})
    want = cuda.forward_both(CELLS["lstm"], both, "auto", True, True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a[0], b[0])
