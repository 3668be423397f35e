"""The CUDA kernels themselves: schedules, torn packets, NaN, batch slices, planning, and bugs planted to be caught.

tests/test_recurrence.py compares them with float64 over sizes and dtypes; here is what only they can get wrong.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch

from fusedrnn import ops, planning
from fusedrnn.backends import cuda, reference
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.backends.cuda_plan import CHIP_LIMITS, Chip, Problem, plan
from fusedrnn.cells import BUILT_IN, CELLS

LSTM = CELLS["lstm"]
ROOT = Path(__file__).resolve().parents[1]
simulated = pytest.mark.skipif(
    "cuda" not in planning.machine().on_cpu, reason="the simulator runs CUDA kernels where there is an nvcc and no GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (1, 2, 3, 4, 5)


def draw(steps, batch, inputs, hidden, dtype, sizes=None, seed=0, cell=LSTM):
    generator = torch.Generator().manual_seed(seed)
    scale = hidden**-0.5

    def t(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)

    rows, gates = (steps, batch) if sizes is None else (sum(sizes),), len(cell.gates)
    given = [
        t(*rows, inputs), t(batch, hidden), t(batch, hidden), t(gates * hidden, inputs, scale=scale),
        t(gates * hidden, hidden, scale=scale), t(gates * hidden, scale=0.1), t(gates * hidden, scale=0.1), None,
    ]  # fmt: skip
    upstream = [t(*rows, hidden), t(batch, hidden), t(batch, hidden)]
    if not cell.has_cell_state:
        given[2] = upstream[2] = None
    return given, upstream


def both(given, upstream, algorithm, sizes=None, reverse=False, module=cuda, cell=LSTM):
    """Outputs and gradients of one call."""
    sizes = None if sizes is None else torch.tensor(sizes)
    inputs = Inputs(*given, sizes, None, reverse)
    y, h_n, c_n, gates, cells = module.forward(cell, inputs, algorithm, True, True)
    saved = Saved(y, gates, cells)
    grads = module.backward(cell, Gradients(*upstream, None), inputs, saved, algorithm, [True] * 7 + [False])
    return [y, h_n, c_n, cells, *grads[:7]]


def forward(given, algorithm, module=cuda):
    return module.forward(LSTM, Inputs(*given, None, None, False), algorithm, True, True)


def assert_agree(got, given, upstream, tolerance, sizes=None, reverse=False, cell=LSTM):
    def up(ts):
        return [None if t is None else t.double() for t in ts]

    want = both(up(given), up(upstream), "auto", sizes, reverse, reference, cell)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, i
        if a.numel():
            assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max()), i


@simulated
@pytest.mark.parametrize("sizes", [None, (9, 9, 9, 5, 3, 3, 1)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("algorithm", ["persistent", "step"])
def test_bitwise_equal_under_every_schedule(algorithm, sizes, reverse, poisoned):
    given, upstream = draw(4, 9, 5, 40, torch.bfloat16, sizes)
    first = both(given, upstream, algorithm, sizes, reverse)
    assert_agree(first, given, upstream, 2e-2, sizes, reverse)
    for seed in SEEDS:
        with cuda.simulator_options(seed=seed, torn=seed % 2 == 0):
            for a, b in zip(both(given, upstream, algorithm, sizes, reverse), first, strict=True):
                assert torch.equal(a, b), seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_slices_taken_in_turn(dtype, poisoned):
    """More batch slices than groups of blocks, the last one thin."""
    given, upstream = draw(2, 200, 3, 16, dtype)
    chip = Chip("small", 4, 100_000)
    forward = plan(Problem("lstm", str(dtype)[6:], 200, 16, False, False), chip)
    assert forward.groups < -(-200 // forward.slice_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "chip", lambda device: chip)
        assert_agree(both(given, upstream, "persistent"), given, upstream, 3e-3 if dtype == torch.float16 else 1e-5)


@simulated
@pytest.mark.parametrize("hidden, dtype, left", [(512, torch.bfloat16, "persistent"), (904, torch.float32, "step")])
def test_a_refused_launch_gives_way(hidden, dtype, left, monkeypatch):
    """A process that gets 108 of the 132 multiprocessors that the device says it has: warned of once, then planned
    for; two groups of 64 blocks become one, 113 blocks one launch a step."""
    monkeypatch.setattr(cuda, "_resident", {})
    given, upstream = draw(3, 16, 3, hidden, dtype)
    with cuda.simulator_options(chip="a100"):
        with pytest.raises(RuntimeError, match=r"launch of persistent_forward failed.*COOPERATIVE_LAUNCH_TOO_LARGE"):
            forward(given, "persistent")
        with pytest.warns(RuntimeWarning, match="plans for less than (128|113) blocks at once") as warned:
            got = both(given, upstream, "auto")
        assert len(warned) == 1
        again = both(given, upstream, "auto")
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    assert_agree(got, given, upstream, 2e-2)
    chosen = cuda.plan_for(LSTM, 16, 3, hidden, 0, dtype, torch.device(DEVICE), "auto", False)
    assert chosen.algorithm == left
    assert "h100-sxm, of which this process gets a part, has" in chosen.why or left == "persistent"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tf32", [False, True])
def test_nan_of_any_bits_passes_through(dtype, tf32, monkeypatch):
    """NaN in x and h0, the sentinel's bits among them, reaches its own batch row and no other, and stops nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    given, upstream = draw(3, 4, 5, 24, dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    clean = both(given, upstream, "persistent")
    given[0].view(integer)[0, 1, 0] = -1
    given[1].view(integer)[2, 3] = -1
    dirty = both(given, upstream, "persistent")
    for a, b in zip(clean[:1], dirty[:1], strict=True):
        assert b[:, 1].isnan().all()
        assert b[:, 2].isnan().all()
        assert torch.equal(a[:, [0, 3]], b[:, [0, 3]])


@pytest.mark.parametrize("cell, hidden, limit", [("lstm", 512, 384), ("lstm", 500, 384), ("gru", 512, 512)])
def test_backward_keeps_wide_weights_in_registers(cell, hidden, limit, monkeypatch, poisoned):
    """tf32 goes as far as H = 512; float32 needs registers for its sums, a GRU has a gate less."""
    cell = CELLS[cell]
    given, upstream = draw(2, 3, 4, hidden, torch.float32, cell=cell)
    if hidden > limit:
        with pytest.raises(RuntimeError, match=f"float32 fits up to H = {limit}"):
            both(given, upstream, "persistent", cell=cell)
    else:
        assert_agree(both(given, upstream, "persistent", cell=cell), given, upstream, 1e-5, cell=cell)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert_agree(both(given, upstream, "persistent", cell=cell), given, upstream, 2e-3, cell=cell)


@pytest.mark.parametrize(
    "cell, dtype, hidden",
    [(c, torch.float32, h) for c in BUILT_IN for h in (127, 128)]
    + [(c, torch.bfloat16, h) for c in ("lstm", "gru", "rnn_tanh") for h in (250, 256)],  # relu has kinks
)
def test_rows_that_only_their_padding_makes_whole(cell, dtype, hidden, poisoned):
    """H rounded up to a packet fills the lanes' chunks exactly; H itself does not."""
    cell = CELLS[cell]
    given, upstream = draw(2, 3, 4, hidden, dtype, cell=cell)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_agree(both(given, upstream, "persistent", cell=cell), given, upstream, tolerance, cell=cell)


def pattern(t):
    """Finite 0, infinity its sign, NaN 2."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign(), 0)).to(torch.int8)


@pytest.mark.parametrize("hidden", [7, 24, 33])
@pytest.mark.parametrize("algorithm", ["step", "persistent"])
@pytest.mark.parametrize("cell", BUILT_IN)
def test_infinite_gradients_become_nan_only_where_they_must(cell, algorithm, hidden, poisoned):
    """No zero of a padded or an absent column meets an infinity, and NaN stays in its batch row."""
    cell, inf = CELLS[cell], float("inf")
    given, upstream = draw(4, 6, 3, hidden, torch.float32, cell=cell)
    upstream[0][3, 0, 2], upstream[0][2, 1, 1], upstream[0][1, 2, hidden - 1] = inf, -inf, float("nan")
    upstream[1][3, 0] = inf
    got, want = (both(given, upstream, a, module=m, cell=cell) for a, m in ((algorithm, cuda), ("auto", reference)))
    kinds = set()
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(pattern(a), pattern(b)), i
        assert torch.allclose(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-5), i
        kinds |= set(pattern(b).unique().tolist())
    # An LSTM's infinite gate gradients come in fours, of either sign: most of what they reach is NaN.
    assert kinds >= ({0, 2} if cell is LSTM else {-1, 0, 1, 2})


def test_infinite_weights_do_not_look_like_a_missing_packet():
    given, _upstream = draw(3, 4, 5, 24, torch.float32)
    given[4][0, 0], given[4][0, 1] = float("inf"), float("-inf")
    y = forward(given, "persistent")[0]
    assert y.shape == (3, 4, 24)


def test_error_of_h_is_that_of_rounding():
    """Against a model that does float32 math and rounds only what is stored: hoisted input gates and h."""
    given, _ = draw(4, 16, 768, 768, torch.bfloat16)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, _ = given
    exact = forward([None if t is None else t.double() for t in given], "auto", reference)[0]
    hoisted = torch.addmm(b_ih, x.view(-1, 768), w_ih.t()).view(4, 16, -1).float()
    h, c, model = h0, c0.float(), []
    for t in range(4):
        i, f, g, o = (hoisted[t] + h.float() @ w_hh.float().t() + b_hh.float()).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()).to(h.dtype)
        model.append(h)
    for algorithm in ("persistent", "step"):
        y = forward(given, algorithm)[0]
        error = (y.double() - exact).abs().max()
        assert error <= 1.3 * (torch.stack(model).double() - exact).abs().max(), algorithm


def test_gates_in_torch_order():
    given, _ = draw(2, 3, 4, 10, torch.float64)
    gates = forward(given, "step")[3]
    want = forward(given, "auto", reference)[3]
    torch.testing.assert_close(ops.gates_in_torch_order(gates, "lstm", "cuda"), want)


# Planning

H100, A100 = CHIP_LIMITS["h100-sxm"], CHIP_LIMITS["a100"]


def problem(**changes):
    return Problem(
        **{"cell": "lstm", "dtype": "bfloat16", "batch": 16, "hidden": 768, "projected": False, "backward": False}
        | changes
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("hidden", [1, 5, 64, 129, 512, 768, 1000, 1024])
def test_a_persistent_plan_is_resident_and_covers_the_batch(hidden, batch, backward):
    chosen = plan(problem(hidden=hidden, batch=batch, backward=backward), H100)
    assert chosen.algorithm == "persistent"
    blocks, groups = chosen.grid
    assert blocks * groups <= H100.multiprocessors
    assert chosen.units in ((16,) if backward else (8, 16))
    assert blocks * chosen.units >= hidden
    assert 1 <= chosen.slice_rows <= (32 if chosen.units == 16 else 64)
    assert chosen.shared_bytes <= H100.shared_per_block
    assert groups <= -(-batch // chosen.slice_rows)
    if hidden >= 512 and batch >= 16:
        assert blocks * groups >= (48 if backward else 64)


def test_few_steps_take_step():
    assert [plan(problem(steps=steps), H100).algorithm for steps in (1, 2, 3, None)] == [
        *("step", "step", "persistent", "persistent")
    ]
    assert plan(problem(steps=1), H100, "persistent").algorithm == "persistent"
    assert "for T = 1" in plan(problem(steps=1), H100).why


def test_one_step_of_many_rows_is_two_products_and_a_launch():
    chosen = plan(problem(steps=1, batch=512), H100)
    assert chosen.products
    assert chosen.algorithm == "step"
    assert "two products by torch" in chosen.why
    assert plan(problem(steps=1, batch=512), H100, "step").products
    others = ({"batch": 511}, {"steps": 3}, {"steps": None}, {"backward": True})
    assert not any(plan(problem(**{"steps": 1, "batch": 512, **other}), H100, "step").products for other in others)


@pytest.mark.parametrize("dtype, widest", [("bfloat16", 1024), ("float16", 1024), ("float32", 0)])
def test_blocks_of_16_units_where_they_keep_as_much_of_the_chip_at_work(dtype, widest):
    for hidden, batch, units in (
        *((768, 8, 8), (768, 16, 16), (768, 64, 16), (1024, 64, 16), (129, 64, 8), (128, 1, 8), (512, 128, 16)),
    ):
        assert plan(problem(hidden=hidden, batch=batch, dtype=dtype), H100).units == (units if hidden <= widest else 8)
    # What 8 units a block would not fit.
    assert plan(problem(hidden=1024, dtype=dtype), A100).algorithm == ("persistent" if widest else "step")


@pytest.mark.parametrize(
    "changes, chip, words",
    [
        ({"hidden": 1032}, H100, "fits up to H = 1024"),
        ({"hidden": 1024, "dtype": "float32"}, A100, "128 blocks must be resident"),
        ({"dtype": "float64"}, H100, "float64"),
        ({"projected": True}, H100, "projection"),
        ({"batch": 10_000}, H100, "rounds"),
        ({}, Chip("old", 80, 100_000, cooperative=False), "no cooperative launch"),
        ({"dtype": "float32", "hidden": 512, "backward": True}, H100, "fits up to H = 384"),
        ({"cell": "gru", "dtype": "float32", "hidden": 513, "backward": True}, H100, "fits up to H = 512"),
        ({"cell": "rnn_relu", "hidden": 2049, "backward": True}, H100, "fits up to H = 2048"),
    ],
)
def test_step_runs_otherwise_and_says_why(changes, chip, words):
    chosen = plan(problem(**changes), chip)
    assert chosen.algorithm == "step"
    assert words in chosen.why
    with pytest.raises(RuntimeError, match="algorithm 'persistent' was asked for but cannot run"):
        plan(problem(**changes), chip, "persistent")


@simulated
def test_chips_are_those_of_the_simulator():
    import ptxsim

    table = ptxsim.chips()
    for name, chip in CHIP_LIMITS.items():
        known = table[name.replace("rtx-", "rtx")]
        assert (chip.multiprocessors, chip.shared_per_block) == (known["sms"], known["shared_per_block"]), name


# Planted bugs: each edit of the source must make the check below fail.

PLANTED = {
    "a removed __syncthreads": ("persistent_forward.cuh", "      __syncthreads();\n", ""),
    "a mailbox read that does not wait": (
        "persistent.cuh",
        "return f.recurrent && any[0] ==",
        "return false && any[0] ==",
    ),
    "a look that forgets a packet": (
        "persistent.cuh",
        "any[i] = mailbox::newest(f.p[i]);",
        "any[i] = m > 1 && i == m - 1 ? 0 : mailbox::newest(f.p[i]);",
    ),
    "a cp.async group too few waited for": ("persistent_forward.cuh", "await_groups<1>();", "await_groups<2>();"),
    "a weak load of h": ("mailbox.cuh", "ld.relaxed.gpu.global", "ld.global"),
    "a sentinel that a NaN input makes": ("mailbox.cuh", "kSentinel = 0xFFFFFFFFu", "kSentinel = 0x7FFF7FFFu"),
    "an off-by-one tile edge": (
        "persistent_forward.cuh",
        "tile < now.rows; tile += 8 * kTiles",
        "tile < now.rows - 1; tile += 8 * kTiles",
    ),
    "an unwritten output": (
        "persistent_forward.cuh",
        "static_cast<Scalar*>(p.c_n)[",
        "if (row > 0) static_cast<Scalar*>(p.c_n)[",
    ),
}


def build(folder, edit=None, kept="FUSEDRNN_SIZES_2(X, 1, 4, Cell, bfloat16)"):
    """The persistent forward kernels, in bfloat16 two sizes, simulated, with one edit."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    cuda_folder = folder / "csrc" / "cuda"
    path = cuda_folder / "instances.h"
    instances = r"(#define FUSEDRNN_PERSISTENT_FORWARD(?:_WIDE)?_OF\(Cell, gates, X\)).*?float16\)\n"
    text, count = re.subn(instances, rf"\1 {kept}\n", path.read_text(), flags=re.DOTALL)
    assert count == 2
    path.write_text(text)
    if edit:
        name, old, new = edit
        target = cuda_folder / name
        source = target.read_text()
        assert old in source, "the planted bug has lost its place"
        target.write_text(source.replace(old, new, 1))
    return cuda._simulate(cuda_folder, ["persistent_forward", "persistent_forward_wide"])


def check_persistent(patch, sentinel=-1, hidden=40, units=8):
    """A small persistent run under all seeds, with a NaN row: raises if anything is off."""
    assert plan(problem(hidden=hidden, batch=17), Chip("small", -(-hidden // units), 232_448)).units == units
    patch.setattr(cuda, "_POLL_LIMIT_SIMULATED", 200)
    patch.setattr(
        cuda, "_mailbox", lambda like, *shape: like.new_empty(shape).view(torch.int16).fill_(sentinel).view(like.dtype)
    )
    patch.setattr(cuda, "chip", lambda device: Chip("small", -(-hidden // units), 232_448))
    given, _ = draw(4, 17, 5, hidden, torch.bfloat16)  # one slice: three tiles, the last of one row
    given[0][1, 2, 0] = float("nan")
    keep = [b for b in range(17) if b != 2]
    want = forward([None if t is None else t.double() for t in given], "auto", reference)
    for seed in SEEDS:
        with cuda.simulator_options(seed=seed, torn=seed % 2 == 0):
            y, h_n, c_n, _gates, _cells = forward(given, "persistent")
        assert y[1:, 2].isnan().all()
        for a, b in ((y[:, keep], want[0][:, keep]), (h_n[keep], want[1][keep]), (c_n[keep], want[2][keep])):
            torch.testing.assert_close(a.double(), b, atol=1e-2, rtol=1e-2)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("bug", ["none", *PLANTED])
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch, poisoned):
    kernels = build(tmp_path, PLANTED.get(bug))
    monkeypatch.setattr(cuda, "_kernels", lambda device: kernels)
    sentinel = 0x7FFF if "sentinel" in bug else -1
    if bug == "none":
        for hidden, units in ((40, 8), (1016, 8), (40, 16), (1024, 16)):
            check_persistent(monkeypatch, hidden=hidden, units=units)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            # Rows of that many units take several packets a lane.
            check_persistent(monkeypatch, sentinel, 1016 if "forgets" in bug else 40)


# Lanes of a warp that meet in shared memory: what a __syncwarp less does.
PLANTED_IN_A_WARP = {
    "rows staged where others are still read": (
        "persistent.cuh",
        "    const int lane = threadIdx.x & 31;\n    __syncwarp();\n",
        "    const int lane = threadIdx.x & 31;\n",
    ),
    "staged rows read before they are there": ("persistent.cuh", ") = b;\n    __syncwarp();\n", ") = b;\n"),
    "sums stored where staged rows are still read": ("persistent.cuh", "    }\n    __syncwarp();\n", "    }\n"),
    "copies of other lanes read before they are there": (
        "persistent.cuh",
        ' : "memory");\n  __syncwarp();\n',
        ' : "memory");\n',
    ),
    "a buffer filled that is still read": (
        "persistent_forward.cuh",
        "      __syncwarp();  // all lanes have read what is overwritten\n",
        "",
    ),
}


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("bug", ["none", *PLANTED_IN_A_WARP])
def test_bugs_planted_in_a_warp_are_caught(bug, tmp_path, monkeypatch):
    kernels = build(tmp_path, PLANTED_IN_A_WARP.get(bug), "FUSEDRNN_BOTH(X, 2, Cell, float32)")
    monkeypatch.setattr(cuda, "_kernels", lambda device: kernels)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given, _ = draw(7, 9, 5, 40, torch.float32, (9, 9, 9, 5, 3, 3, 1))
    inputs = Inputs(*given, torch.tensor((9, 9, 9, 5, 3, 3, 1)), None, False)
    if bug == "none":
        cuda.forward(LSTM, inputs, "persistent", True, True)
    else:
        with pytest.raises(RuntimeError, match="RACE in a warp"):
            cuda.forward(LSTM, inputs, "persistent", True, True)


@simulated
@pytest.mark.slow
def test_a_lost_packet_ends_the_launch_and_says_where(tmp_path, monkeypatch):
    edit = (
        "persistent_forward.cuh",
        "if (row < now.rows && sends) {",
        "if (row < now.rows && sends && blockIdx.x != 1) {",
    )
    kernels = build(tmp_path, edit)
    monkeypatch.setattr(cuda, "_kernels", lambda device: kernels)
    with pytest.raises(RuntimeError, match=r"packet \d+ of the step before step 1 never came to block \d+"):
        check_persistent(monkeypatch)
