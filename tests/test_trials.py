"""What is tried on a card: kernels checked before their first use, algorithms timed; on a simulated one."""

import json
import threading
import time
import warnings

import pytest
import torch

import fusedrnn
from fusedrnn import functional, planning, trials
from fusedrnn.backends import cuda

pytestmark = pytest.mark.skipif(
    "cuda" not in planning.machine().on_cpu, reason="the simulator runs CUDA kernels where there is an nvcc and no GPU"
)
CPU = torch.device("cpu")


class Card:
    """CPU tensors stand for those of a GPU: planning chooses "cuda" for them, and the simulator runs it."""

    def __init__(self, patch, folder):
        self.name, self.checked, self.folder = "card A", [], folder
        decide, difference = planning.decide, trials._difference

        def chosen(problem, machine, backend=None, algorithm=None):
            if backend is None:
                return planning.Choice("cuda", algorithm or "auto", "cuda is the first choice")
            return decide(problem, machine, backend, algorithm)

        def counted(cell, dtype, backend, algorithm, device, tf32):
            self.checked.append((cell, str(dtype)[6:], backend, algorithm))
            assert threading.current_thread() is not threading.main_thread()
            return difference(cell, dtype, backend, algorithm, device, tf32)

        patch.setattr(trials, "applies", lambda device: True)
        patch.setattr(trials, "about", lambda device: (self.name,))
        patch.setattr(trials, "_difference", counted)
        patch.setattr(planning, "decide", chosen)
        patch.setattr(planning, "_told", set())
        patch.setattr(functional, "direct", lambda *arguments: None)
        patch.setenv("FUSEDRNN_CACHE", str(folder))
        self.forget()

    def forget(self):
        """As a new process would begin."""
        self.checked.clear()
        trials._kept.clear()
        trials._right.clear()
        planning._cached_choice.cache_clear()


@pytest.fixture
def card(monkeypatch, tmp_path):
    made = Card(monkeypatch, tmp_path / "cache")
    yield made
    monkeypatch.undo()
    made.forget()


def plant(monkeypatch, change):
    """A kernel of "cuda" that runs ``change(name, tensors)`` after each launch, of both directions the last one's."""
    kernels = cuda._simulated()
    launch = kernels.launch

    def planted(name, *calls):
        launch(name, *calls)
        change(name + " of both" * (len(calls) == 2), calls[-1][1])

    monkeypatch.setattr(kernels, "launch", planted)


def wrong_forward(name, tensors):
    if name.endswith("forward"):
        tensors["y"].mul_(1.5)


def wrong_backward(name, tensors):
    if name == "persistent_backward":
        tensors["dgates"].mul_(1.5)


def wrong_pair(name, tensors):
    if name.endswith("of both"):
        tensors["y" if "forward" in name else "dgates"].mul_(1.5)


def wrong_cell(name, tensors):
    if name == "step_cell":
        tensors["y"].mul_(1.5)


def broken(name, tensors):
    raise RuntimeError("CUDA_ERROR_INVALID_PTX (218)\nof a driver that nobody has seen")


def not_a_number(name, tensors):
    tensors["y"].fill_(float("nan"))


def layer_and_twin(kind="LSTM", **options):
    ours = getattr(fusedrnn, kind)(6, 24, **options)
    theirs = getattr(torch.nn, kind)(6, 24)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_kernels_are_checked_once(card):
    ours, theirs = layer_and_twin()
    x = torch.randn(3, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-5)
        assert card.checked == [("lstm", "float32", "cuda", a) for a in ("step", "persistent")]
        ours(x)
        assert len(card.checked) == 2
        fusedrnn.LSTM(6, 24, backend="cuda", algorithm="step")(x)  # known by now
        assert len(card.checked) == 2
        fusedrnn.GRU(6, 24, backend="triton")(x)
        assert card.checked[2:] == [("gru", "float32", "triton", a) for a in ("step", "sequence")]
        card.forget()
        ours(x)  # another process: the disk knows
        assert card.checked == []
        card.name = "card B"
        card.forget()
        ours(x)
        assert len(card.checked) == 2
    kept = [json.loads(path.read_text()) for path in card.folder.glob("checked-*.json")]
    assert len(kept) == 6
    assert {k["value"] for k in kept} == {""}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_what_is_right_passes_in_every_dtype(card, cell, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fusedrnn, cell)(6, 24, dtype=dtype)(torch.randn(2, 2, 6, dtype=dtype))
    assert len(card.checked) == 2


@pytest.mark.parametrize(
    "planted, said",
    [
        (wrong_forward, r"cuda step in float32: it differs from torch's op by \d\.\d\de-01"),
        (wrong_backward, r"cuda persistent in float32: it differs from torch's op"),
        (wrong_pair, r"cuda persistent in float32: both directions in one launch are not what each is alone"),
        (wrong_cell, r"cuda step in float32: it differs from torch's op by \d\.\d\de-01 for 512 rows of one step"),
        (broken, r"cuda step in float32: it fails: CUDA_ERROR_INVALID_PTX \(218\) \[card A\]"),
        (not_a_number, "cuda step in float32: it gives NaN or infinity"),
    ],
)
def test_a_wrong_kernel_gives_way_to_torchs_op(card, monkeypatch, planted, said):
    plant(monkeypatch, planted)
    ours, theirs = layer_and_twin()
    x = torch.randn(3, 2, 6)
    with pytest.warns(RuntimeWarning, match=f"Please report this line: lstm {said}") as warned:
        y, (_, c) = ours(x)
    assert warned[0].filename == __file__
    assert torch.equal(y, theirs(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(ours(x)[0], y)
        # What torch's op cannot do the reference does.
        resets = torch.zeros(3, 2, dtype=torch.bool)
        resets[1] = True
        got = ours(x, resets=resets)[0]
        assert torch.allclose(got[1:], theirs(x[1:])[0], atol=1e-6)
        assert torch.allclose(ours(x, return_all_states=True)[2][1][0, -1], c[0], atol=1e-6)
        assert len(fusedrnn.record_gates(ours, x)[1]) == 1
    found = fusedrnn.plan(ours, 2)
    assert (found.backend, found.instead) == ("torch", "reference")
    assert "card A" in found.why
    with pytest.raises(RuntimeError, match=r"backend 'cuda' was asked for but is wrong on this card: lstm cuda"):
        fusedrnn.LSTM(6, 24, backend="cuda")(x)
    # A Cell is checked likewise.
    cell, twin = fusedrnn.LSTMCell(6, 24), torch.nn.LSTMCell(6, 24)
    twin.load_state_dict(cell.state_dict())
    assert torch.equal(cell(x[0])[0], twin(x[0])[0])


def test_recompute_on_a_card_with_wrong_kernels(card, monkeypatch):
    plant(monkeypatch, wrong_forward)
    ours, theirs = layer_and_twin(recompute=True)
    x = torch.randn(3, 2, 6, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="Please report"):
        y = ours(x)[0]
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(theirs(x)[0].sum(), x)
    assert torch.allclose(got, want, atol=1e-6)


def test_nothing_is_tried_while_a_graph_is_recorded(card, monkeypatch):
    monkeypatch.setattr(trials, "_capturing", lambda device: True)
    ours, _ = layer_and_twin()
    ours(torch.randn(3, 2, 6))
    fusedrnn.plan(ours, 2)
    assert card.checked == []
    monkeypatch.setattr(trials, "_capturing", lambda device: False)
    fusedrnn.plan(ours, 2)
    assert card.checked == []  # plan computes nothing
    ours(torch.randn(3, 2, 6))
    assert len(card.checked) == 2


def test_a_first_call_inside_a_transform(card):
    ours, theirs = layer_and_twin("RNN")
    x = torch.randn(3, 2, 6)
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        got = torch.func.grad(lambda x: ours(x)[0].sum())(x)
    assert len(card.checked) == 2
    assert torch.allclose(got, torch.func.grad(lambda x: theirs(x)[0].sum())(x), atol=1e-5)


def test_a_first_call_that_is_compiled(card):
    """A compiled graph is checked as it is traced; what was found fastest for some sizes is not in it."""
    ours, theirs = layer_and_twin("GRU")
    x = torch.randn(3, 2, 6)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x)[0], theirs(x)[0], atol=1e-5)
    assert len(card.checked) == 2


def test_a_kernel_with_a_wrong_instruction_gives_way(card, monkeypatch, tmp_path):
    """In the compiled code of one file: a logarithm where an exponential was."""
    right = cuda._simulated()
    for path in right.folder.glob("*.ptx"):
        text = path.read_text()
        if path.name.startswith("step_forward"):
            assert "ex2.approx.f32" in text
            text = text.replace("ex2.approx", "lg2.approx")
        (tmp_path / path.name).write_text(text)
    library = right.simulator
    wrong = cuda._Kernels(right.dll._name, str(library.path), tmp_path, library)
    monkeypatch.setattr(cuda, "_kernels", lambda device: wrong)
    ours, theirs = layer_and_twin()
    x = torch.randn(3, 2, 6)
    with pytest.warns(RuntimeWarning, match="lstm cuda step in float32: it (differs from torch's op|gives NaN)"):
        assert torch.equal(ours(x)[0], theirs(x)[0])


def test_a_folder_that_cannot_be_written_to(card, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "file" / "below"))
    ours, _ = layer_and_twin()
    for _ in range(2):
        ours(torch.randn(3, 2, 6))
    assert len(card.checked) == 2


def test_what_is_torn_on_disk_is_tried_again(card):
    ours, _ = layer_and_twin()
    ours(torch.randn(3, 2, 6))
    for path, text in zip(sorted(card.folder.glob("*.json")), ("{", json.dumps({"key": ["other"], "value": "wrong"}))):
        path.write_text(text)
    card.forget()
    ours(torch.randn(3, 2, 6))
    assert len(card.checked) == 2


# ---- tune


@pytest.fixture
def fast(card, monkeypatch):
    """Timing takes one call after one to compile; ``slow`` says which ways are slowed down, by which factor."""
    slow = {}

    def seconds_of(run, device):
        run()
        ran.clear()
        run()
        return slow.get(ran[0], 1.0)

    ran, layer, theirs = [], functional.layer_of_states, functional._torch_layers

    def ours(cell, directions, backend, algorithm, *rest):
        ran.append((backend, algorithm))
        return layer(cell, directions, backend, algorithm, *rest)

    def torchs(*arguments):
        ran.append(("torch", "auto"))
        return theirs(*arguments)

    monkeypatch.setattr(functional, "layer_of_states", ours)
    monkeypatch.setattr(functional, "_torch_layers", torchs)
    monkeypatch.setattr(trials, "seconds_of", seconds_of)
    return slow, ran


WAYS = [("cuda", "auto"), ("cuda", "step"), ("cuda", "persistent"), ("triton", "auto"), ("triton", "step"),
        ("triton", "sequence"), ("torch", "auto")]  # fmt: skip


@pytest.mark.parametrize("best", [("cuda", "step"), ("triton", "sequence"), ("torch", "auto")])
def test_the_fastest_way_is_kept(card, fast, best):
    slow, ran = fast
    slow.update(dict.fromkeys(WAYS, 2.0))
    slow[best] = 1.5
    ours, theirs = layer_and_twin()
    x = torch.randn(5, 3, 6)
    found = fusedrnn.tune(ours, x)
    assert [(t.backend, t.algorithm, t.training) for t in found] == [
        (*way, training) for training in (False, True) for way in WAYS
    ]
    assert all(t.seconds == slow[t.backend, t.algorithm] for t in found)
    for steps, batch, way in ((5, 3, best), (8, 3, best), (4, 3, ("cuda", "auto")), (5, 4, ("cuda", "auto"))):
        ran.clear()
        assert torch.allclose(ours(x.new_ones(steps, batch, 6))[0], theirs(x.new_ones(steps, batch, 6))[0], atol=1e-5)
        assert ran == [way]
        plan = fusedrnn.plan(ours, batch, steps=steps)
        assert plan.timed == (way == best)
        assert ("the fastest of 7 that were timed" if plan.timed else "a model's choice, not timed") in plan.why
    card.forget()
    ran.clear()
    with fusedrnn.backend("cuda"):  # who asks is obeyed
        ours(x)
    ours(x)
    assert ran == [("cuda", "auto"), best]


def test_what_is_asked_counts(card, fast):
    """Options that torch's op has not leave it out; inference and training are apart; packed is not dense."""
    slow, ran = fast
    slow.update(dict.fromkeys(WAYS, 2.0))
    slow["torch", "auto"] = 0.1
    slow["triton", "step"] = 1.0
    ours, _ = layer_and_twin(recompute=True)
    x = torch.randn(4, 3, 6)
    found = fusedrnn.tune(ours, x)
    assert {t.backend for t in found} == {"cuda", "triton"}
    plain, _ = layer_and_twin()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 3, 1])
    fusedrnn.tune(plain, packed)
    with torch.no_grad():
        for given, way in ((packed, ("torch", "auto")), (x, ("cuda", "auto"))):
            ran.clear()
            plain(given)
            assert ran == [way]


def test_a_way_that_fails_is_one_less(card, fast, monkeypatch):
    fast[0].update(dict.fromkeys(WAYS, 2.0))
    wide = fusedrnn.LSTM(4, 200)
    found = {(t.backend, t.algorithm): t for t in fusedrnn.tune(wide, torch.randn(2, 2, 4)) if t.training}
    failed = found["triton", "sequence"]
    assert failed.seconds is None
    assert "cannot run" in failed.why


def test_dropout_draws_nothing_from_the_caller(card, fast):
    fast[0].update(dict.fromkeys(WAYS, 2.0))
    layer = fusedrnn.GRU(3, 8, 2, dropout=0.5)
    before = torch.get_rng_state()
    with torch.no_grad():
        y = layer(torch.ones(2, 2, 3))[0]
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    fusedrnn.tune(layer.eval(), torch.ones(2, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert torch.equal(layer.train()(torch.ones(2, 2, 3))[0], y)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_tuning_by_the_environment(card, fast, monkeypatch):
    slow, ran = fast
    slow.update(dict.fromkeys(WAYS, 2.0))
    slow["cuda", "step"] = 1.0
    monkeypatch.setenv("FUSEDRNN_TUNE", "1")
    ours, _ = layer_and_twin()
    x = torch.randn(3, 2, 6)
    with torch.no_grad():
        ours(x)
        assert ran[-1] == ("cuda", "step")
        (kept,) = card.folder.glob("tuned-*.json")
        timings = json.loads(kept.read_text())["value"]["timings"]
        assert [(t["backend"], t["algorithm"]) for t in timings] == WAYS
        ran.clear()
        ours(x)
        assert ran == [("cuda", "step")]
    monkeypatch.setenv("FUSEDRNN_TUNE", "yes")
    with pytest.raises(ValueError, match="FUSEDRNN_TUNE must be 0 or 1, got 'yes'"):
        ours(x)


def test_real_times(card, monkeypatch):
    """A kernel that is planted to be slow loses, by the clock."""
    plant(monkeypatch, lambda name, tensors: time.sleep(0.05))
    ours, _ = layer_and_twin()
    with torch.no_grad():
        found = {(t.backend, t.algorithm): t.seconds for t in fusedrnn.tune(ours, torch.randn(1, 1, 6))}
    assert found["torch", "auto"] < 0.05 < found["cuda", "persistent"]
    assert fusedrnn.plan(ours, 1, steps=1).backend == "torch"


def test_what_tune_does_not_take(card, monkeypatch):
    x = torch.randn(3, 2, 6)
    with pytest.raises(TypeError, match="tune takes an LSTM, GRU or RNN of fusedrnn, got LSTM"):
        fusedrnn.tune(torch.nn.LSTM(6, 4), x)
    with pytest.raises(TypeError, match="got LSTMCell"):
        fusedrnn.tune(fusedrnn.LSTMCell(6, 4), x)
    with pytest.raises(RuntimeError, match="nothing to choose: 'cuda' was asked for"):
        fusedrnn.tune(fusedrnn.LSTM(6, 4, backend="cuda"), x)
    with fusedrnn.backend(None, "step"), pytest.raises(RuntimeError, match="'step' was asked for"):
        fusedrnn.tune(fusedrnn.LSTM(6, 4), x)
    monkeypatch.setattr(trials, "applies", lambda device: False)
    with pytest.raises(RuntimeError, match="tune times kernels on a GPU, the input is on cpu"):
        fusedrnn.tune(fusedrnn.LSTM(6, 4), x)
