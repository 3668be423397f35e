"""Both directions of a layer in one launch of the backend cuda: the bits of two launches, and where it is one."""

import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_cuda_kernels import SEEDS, draw, problem
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import functional, ops, pair, planning
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


def test_an_explanation_says_it():
    layer = fusedrnn.LSTM(8, 512, bidirectional=True, dtype=torch.bfloat16)
    text = str(fusedrnn.explain(layer, steps=100, batch=16, chip="h100-sxm"))
    assert "1 launch of 32 x 2 x 2 blocks of 256 threads, the third number are directions" in text
    recomputing = fusedrnn.LSTM(8, 512, bidirectional=True, dtype=torch.bfloat16, recompute=True)
    text = str(fusedrnn.explain(recomputing, steps=100, batch=16, chip="h100-sxm"))
    assert "1 launch of 64 x 2 blocks" in text


@simulated
def test_a_plan_of_a_layer_says_it():
    def why(layer, **options):
        with fusedrnn.backend("cuda", "auto"):
            return fusedrnn.plan(layer, 4, **options).why

    assert "x 2 directions in one launch" in why(fusedrnn.GRU(4, 40, bidirectional=True))
    assert "x 2 directions in one launch" in why(fusedrnn.GRU(4, 40, bidirectional=True), backward=True)
    assert "directions" not in why(fusedrnn.GRU(4, 40))
    assert why(fusedrnn.GRU(4, 40, bidirectional=True, recompute=True)).endswith("after the other: recompute")
    heads = fusedrnn.Layer(fusedrnn.zoo.gru, 4, 40, bidirectional=True, heads=2)
    assert why(heads).endswith("one direction after the other: gru with heads=2")


def run(layer, given, backend, gradients=True, **options):
    """Outputs, gradients, and the launches of forward and of backward."""
    given = given if not gradients or not isinstance(given, torch.Tensor) else given.detach().requires_grad_()
    with fusedrnn.backend(*backend), torch.set_grad_enabled(gradients):
        found, forward = launches(lambda: layer(given, **options))
    outputs = [t for t in tree_leaves(found) if t is not None and t.is_floating_point()]
    if not gradients:
        return outputs, (forward, 0)
    wanted = [*([given] if isinstance(given, torch.Tensor) else []), *layer.parameters()]
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs)
    grads, backward = launches(lambda: torch.autograd.grad(loss, wanted))
    return [*outputs, *grads], (forward, backward)


CASES = {
    "dense": {},
    "packed": {"packed": True},
    "resets": {"resets": True},
    "lengths": {"lengths": torch.tensor([4, 0, 2, 1, 3])},
    "states": {"return_all_states": True},
    "everything": {"lengths": torch.tensor([4, 3, 2, 1, 3]), "return_all_states": True, "resets": True},
    "inference": {"gradients": False},
}


@simulated
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "Layer"])
def test_a_layer_is_one_launch_a_pass(kind, case, poisoned):
    made = {"num_layers": 2, "bidirectional": True}
    layer = getattr(fusedrnn, kind)(*([fusedrnn.zoo.lstm] if kind == "Layer" else []), 5, 12, **made)
    options, given = dict(CASES[case]), torch.randn(4, 5, 5)
    if options.pop("packed", False):
        given = torch.nn.utils.rnn.pack_padded_sequence(given, [4, 4, 2, 1, 1])
    if options.get("resets"):
        options["resets"] = torch.rand(4, 5) < 0.4
    got, counted = run(layer, given, ("cuda", "persistent"), **options)
    want, _ = run(layer, given, ("reference", None), **options)
    assert counted == (2, 2 if options.get("gradients", True) else 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@simulated
def test_gates_are_recorded_of_both(poisoned):
    layer, x, seen = fusedrnn.LSTM(5, 12, bidirectional=True), torch.randn(4, 3, 5), {"cuda": [], "reference": []}
    for backend, rows in seen.items():
        with fusedrnn.backend(backend), torch.no_grad(), functional.recording(lambda *told, to=rows: to.append(told)):
            layer(x)
    assert [told[2] for told in seen["cuda"]] == [0, 1]
    for got, want in zip(seen["cuda"], seen["reference"], strict=True):
        for a, b in zip(got[3:6], want[3:6], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


# Where it is two


@simulated
@pytest.mark.parametrize(
    "options, backend, counted",
    [
        ({"recompute": True}, ("cuda", "persistent"), 2),
        ({"proj_size": 5}, ("cuda", "auto"), None),
        ({}, ("cuda", "step"), 8),
    ],
    ids=["recompute", "projection", "step"],
)
def test_these_are_one_after_the_other(options, backend, counted, poisoned):
    layer, x = fusedrnn.LSTM(5, 12, bidirectional=True, **options), torch.randn(4, 3, 5)
    got, found = run(layer, x, backend)
    want, _ = run(layer, x, ("reference", None))
    assert counted in (None, found[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@simulated
def test_a_gradient_that_is_differentiated_is_two_launches(poisoned):
    layer, found = fusedrnn.GRU(5, 12, bidirectional=True), []
    x = torch.randn(4, 3, 5)
    for backend in (("cuda", "persistent"), ("reference", None)):
        with fusedrnn.backend(*backend):
            given = x.clone().requires_grad_()
            y = layer(given)[0]
            call = functools.partial(torch.autograd.grad, y.sin().sum(), given, create_graph=True)
            (grad,), counted = launches(call)
            found.append([grad, *torch.autograd.grad(grad.square().sum(), [given, *layer.parameters()])])
            assert counted == (2 if backend[0] == "cuda" else 0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@simulated
def test_a_direction_that_nobody_uses_has_no_gradient():
    layer, x = fusedrnn.LSTM(5, 12, bidirectional=True), torch.randn(4, 3, 5)
    with fusedrnn.backend("cuda", "persistent"):
        y = layer(x)[0]
        grads, counted = launches(
            lambda: torch.autograd.grad(y[..., :12].sum(), [*layer.parameters()], allow_unused=True)
        )
    assert counted == 1
    reverse = [name.endswith("_reverse") for name, _ in layer.named_parameters()]
    # torch.cat hands the other direction zeros.
    assert all(not g.any() for g, r in zip(grads, reverse) if r and g is not None)


@simulated
def test_transforms_take_one_direction_after_the_other(poisoned):
    layer, x = fusedrnn.LSTM(5, 12, bidirectional=True), torch.randn(2, 4, 3, 5)

    def loss(x):
        return layer(x)[0].sin().sum()

    with fusedrnn.backend("reference"):
        want = [torch.func.grad(loss)(x[0]), torch.func.vmap(loss)(x), torch.func.jvp(loss, (x[0],), (x[1],))[1]]
    with fusedrnn.backend("cuda", "persistent"):
        got = [torch.func.grad(loss)(x[0]), torch.func.vmap(loss)(x), torch.func.jvp(loss, (x[0],), (x[1],))[1]]
        given = x[0].clone().requires_grad_()
        y = layer(given)[0]
        seeds = torch.eye(2).repeat_interleave(y.numel() // 2, 1).view(2, *y.shape)
        each = [torch.autograd.grad(y, given, seed, retain_graph=True)[0] for seed in seeds]
        batched = torch.autograd.grad(y, given, seeds, retain_graph=True, is_grads_batched=True)[0]
        mapped = torch.func.vmap(lambda seed: torch.autograd.grad(y, given, seed, retain_graph=True)[0])(seeds)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    for found in (batched, mapped):
        torch.testing.assert_close(found, torch.stack(each), atol=2e-5, rtol=2e-5)


# The op


def arguments(keep=True, sizes=None, requires_grad=False):
    given = directions("lstm", torch.float32, sizes, True, hidden=8, batch=9 if sizes else 3)
    tensors = [t for inputs, _ in given for t in ops.packed(inputs)]
    if requires_grad:
        tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    return "lstm", tensors, [False, True], "persistent", keep, keep


@simulated
@pytest.mark.parametrize("sizes", [None, (9, 9, 3, 1)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(keep, sizes, requires_grad):
    torch.library.opcheck(pair._op, arguments(keep, sizes, requires_grad))


@simulated
@pytest.mark.parametrize("sizes", [None, (9, 9, 3, 1)])
def test_opcheck_of_the_gradient(sizes):
    given = directions("lstm", torch.float32, sizes, True, hidden=8, batch=9 if sizes else 3)
    outputs = pair.run("lstm", [inputs for inputs, _ in given], "persistent", True, True)
    tensors = [
        t
        for (inputs, grads), (y, _, _, gates, cells) in zip(given, outputs)
        for t in (*grads[:4], *ops.packed(inputs), y, gates, cells)
    ]
    torch.library.opcheck(pair._backward_op, ("lstm", tensors, [False, True], "persistent", NEEDS * 2))


@simulated
def test_vmap_of_the_op():
    given = arguments()
    more = [None if t is None or not t.is_floating_point() else torch.stack([t, 2 * t]) for t in given[1]]
    dims = [None if t is None else 0 for t in more]
    tensors = [t if m is None else m for t, m in zip(given[1], more)]

    def call(*tensors):
        return pair._op(given[0], list(tensors), *given[2:])

    got = torch.func.vmap(call, in_dims=tuple(dims))(*tensors)
    for k in range(2):
        want = call(*(t if m is None else m[k] for t, m in zip(given[1], more)))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[k], b)


@simulated
def test_the_op_says_what_it_cannot():
    cell, tensors, *rest = arguments()
    with pytest.raises(RuntimeError, match="two directions are 20 of them, got 19"):
        pair._op(cell, tensors[:-1], *rest)
    other = list(tensors)
    other[11] = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match=r"c0 must have shape \[4, 8\], got \[3, 8\]"):
        pair._op(cell, other, *rest)
    narrow = [*tensors[:10], *(t[..., :3].contiguous() if k in (0, 3) else t for k, t in enumerate(tensors[10:]))]
    with pytest.raises(RuntimeError, match="both directions must have the same shapes"):
        pair._op(cell, narrow, *rest)


@simulated
@pytest.mark.parametrize("options", [{}, {"return_all_states": True}])
def test_a_compiled_layer_is_one_launch_a_pass(options, poisoned):
    pytest.importorskip("torch._dynamo.testing", reason="torch.compile is not tested: no Dynamo")
    layer, x = fusedrnn.LSTM(5, 12, bidirectional=True), torch.randn(4, 3, 5)
    want, _ = run(layer, x, ("cuda", "persistent"), **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run(compiled, x, ("cuda", "persistent"), **options)
    got, counted = run(compiled, x, ("cuda", "persistent"), **options)
    assert counted == (1, 1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


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
