"""Choices of backend and algorithm, from frozen data: no GPU is needed to ask what a GPU would run."""

import functools
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fusedrnn
from fusedrnn import _build, functional, planning
from fusedrnn.backends import common
from fusedrnn.cells import CELLS
from fusedrnn.planning import Choice, Machine, Problem, check_choice, choose, decide, unsupported

EVERYTHING = Machine()
NOTHING_BUILT = Machine(
    unavailable=(("cpu", "not built"), ("triton", "triton is not installed"), ("cuda", "no nvcc was found"))
)


def problem(device: str = "cuda", dtype=torch.float32, capability=(9, 0)) -> Problem:
    return Problem("lstm", 64, 64, 0, dtype, device, capability if device == "cuda" else None)


def test_first_choices():
    assert decide(problem("cpu"), EVERYTHING).backend == "cpu"
    assert decide(problem("cuda"), EVERYTHING).backend == "cuda"
    no_cuda = Machine(unavailable=(("cuda", "no nvcc was found"),))
    choice = decide(problem("cuda"), no_cuda)
    assert choice.backend == "triton"
    assert "no nvcc was found" in choice.why


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_devices_without_a_kernel_take_torchs_op(device):
    choice = decide(problem(device), EVERYTHING)
    assert choice.backend == "torch"
    assert f"no kernel for device '{device}'" in choice.why


def test_old_gpu_takes_torchs_op_and_says_why():
    choice = decide(problem(capability=(7, 5)), EVERYTHING)
    assert choice.backend == "torch"
    assert "compute capability 8.0 or newer, got 7.5" in choice.why


def test_without_extension_the_cpu_takes_torchs_op():
    choice = decide(problem("cpu"), NOTHING_BUILT)
    why = f"torch's own op runs: cpu cannot: not built. {planning.LOST}"
    assert choice == Choice("torch", "auto", why, instead="reference")
    choice = decide(problem("cpu"), NOTHING_BUILT, None, "persistent")
    assert choice.why == f"{why}; algorithm 'persistent' of backend 'torch' cannot run: it has auto"
    assert decide(problem("cpu", torch.complex64), NOTHING_BUILT).instead is None


def test_gpu_backends_on_cpu_tensors_only_where_simulated():
    assert "CUDA tensors" in unsupported("triton", problem("cpu"), EVERYTHING)
    assert unsupported("triton", problem("cpu"), Machine(on_cpu=("triton",))) is None
    # Simulation must never be the default: it is thousands of times slower.
    assert decide(problem("cpu"), Machine(on_cpu=("triton", "cuda"))).backend == "cpu"


def test_forced_backend_that_cannot_run_raises_with_the_reason():
    with pytest.raises(RuntimeError, match="'triton' was asked for but cannot run: triton is not installed"):
        decide(problem(), NOTHING_BUILT, "triton")
    with pytest.raises(RuntimeError, match="it takes CPU tensors, got cuda"):
        decide(problem(), EVERYTHING, "cpu")


@pytest.mark.parametrize("backend, algorithm", [("cudnn", None), (None, "fast"), ("Triton", "step")])
def test_unknown_names(backend, algorithm):
    with pytest.raises(ValueError, match="must be one of"):
        check_choice(backend, algorithm)
    with pytest.raises(ValueError, match="must be one of"):
        fusedrnn.backend(backend, algorithm)


def chosen(**override) -> str:
    device = torch.device("cpu")
    return choose(
        "lstm", input_size=4, hidden_size=4, proj_size=0, dtype=torch.float32, device=device, **override
    ).backend


def test_precedence_context_then_module_then_environment(monkeypatch):
    default = chosen()
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference:auto")
    assert chosen() == "reference"
    if default == "cpu":
        assert chosen(backend="cpu") == "cpu"
        with fusedrnn.backend("cpu"):
            assert chosen() == chosen(backend="reference") == "cpu"
            with fusedrnn.backend("reference"):
                assert chosen() == "reference"
            assert chosen() == "cpu"
    monkeypatch.setenv("FUSEDRNN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend must be one of"):
        chosen()


def test_module_argument():
    lstm = fusedrnn.LSTM(3, 4, backend="reference", algorithm="auto")
    assert (lstm.backend, lstm.algorithm) == ("reference", "auto")
    assert fusedrnn.plan(lstm, 2).backend == "reference"
    x = torch.randn(2, 2, 3)
    torch.testing.assert_close(lstm(x)[0], fusedrnn.convert(fusedrnn.revert(lstm))(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torchs_own_op_can_be_asked_for(kind, monkeypatch):
    """By the module, a block and the environment; equal bits, its gradients, what it has not raises."""
    options = {"num_layers": 2, "bidirectional": True, **({"proj_size": 3} if kind == "LSTM" else {})}
    ours = getattr(fusedrnn, kind)(3, 4, backend="torch", **options)
    theirs = getattr(torch.nn, kind)(3, 4, **options)
    theirs.load_state_dict(ours.state_dict())
    free = getattr(fusedrnn, kind)(3, 4, **options)
    free.load_state_dict(ours.state_dict())
    assert fusedrnn.plan(ours, 2) == Choice("torch", "auto", "backend 'torch' was asked for", asked=True)
    x = torch.randn(5, 2, 3, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.detach(), [5, 2])
    want, want_packed = theirs(x)[0], theirs(packed)[0].data
    (gradient,) = torch.autograd.grad(want.sum(), x)
    with fusedrnn.backend("torch"):
        assert torch.equal(free(x)[0], want)
    monkeypatch.setenv("FUSEDRNN_BACKEND", "torch")
    for layer in (ours, free):
        assert torch.equal(layer(x)[0], want)
        assert torch.equal(layer(packed)[0].data, want_packed)
        assert torch.equal(torch.autograd.grad(layer(x)[0].sum(), x)[0], gradient)
    cell, twin = getattr(fusedrnn, f"{kind}Cell")(3, 4, backend="torch"), getattr(torch.nn, f"{kind}Cell")(3, 4)
    twin.load_state_dict(cell.state_dict())
    got, want = cell(x[0]), twin(x[0])
    assert torch.equal(got[0] if kind == "LSTM" else got, want[0] if kind == "LSTM" else want)
    for option in ({"resets": torch.zeros(5, 2, dtype=torch.bool)}, {"return_all_states": True}):
        with pytest.raises(RuntimeError, match=f"{next(iter(option))} needs a kernel of fusedrnn: backend 'torch' was"):
            ours(x, **option)
    with pytest.raises(RuntimeError, match="record_gates needs a kernel"):
        fusedrnn.record_gates(ours, x)
    with pytest.raises(RuntimeError, match="record_gates needs a kernel"):
        fusedrnn.record_gates(cell, x[0])
    ours.recompute = True
    with pytest.raises(RuntimeError, match="recompute needs a kernel"):
        ours(x)
    with pytest.raises(RuntimeError, match="'step' of backend 'torch' cannot run: it has auto"):
        getattr(fusedrnn, kind)(3, 4, backend="torch", algorithm="step")(x)


@pytest.mark.parametrize("calls", ["_small_calls", "_calls"])
def test_calls_past_the_dispatcher_obey_the_environment(calls, monkeypatch):
    """Torch's own op in bfloat16 rounds at every step, which tells it from ours."""
    if getattr(_build, calls) is None:
        pytest.skip(f"{calls} is not there with this torch: only the way through Python is checked")
    monkeypatch.setattr(_build, "_calls", getattr(_build, calls))
    layer = fusedrnn.LSTM(3, 16).bfloat16()
    x = torch.randn(20, 2, 3).bfloat16()
    with torch.no_grad():
        zeros = x.new_zeros(1, 2, 16)
        theirs = torch.lstm(x, (zeros, zeros), layer._weights(), True, 1, 0.0, False, False, False)[0]
        ours = layer(x)[0]
        assert not torch.equal(ours, theirs)
        monkeypatch.setenv("FUSEDRNN_BACKEND", "torch")
        assert torch.equal(layer(x)[0], theirs)


@pytest.fixture
def nothing_built(monkeypatch):
    """As in an installation without compiled code."""
    monkeypatch.setattr(planning, "machine", lambda: NOTHING_BUILT)
    monkeypatch.setattr(functional, "direct", lambda *arguments: None)
    monkeypatch.setattr(planning, "_told", set())
    planning._cached_choice.cache_clear()
    yield
    planning._cached_choice.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """What computed: "torch" or the op's backend."""
    found, recurrence, theirs = [], functional.recurrence_of_states, functional._torch_layers
    run = lambda cell, inputs, backend, *rest: (found.append(backend), recurrence(cell, inputs, backend, *rest))[1]
    monkeypatch.setattr(functional, "recurrence_of_states", run)
    monkeypatch.setattr(functional, "_torch_layers", lambda *a: (found.append("torch"), theirs(*a))[1])
    return found


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_without_compiled_code(kind, nothing_built, ran):
    """Torch's op wherever it can do what is asked, else the reference; told once."""
    ours, theirs = (
        getattr(fusedrnn, kind)(3, 4, 2, batch_first=True),
        getattr(torch.nn, kind)(3, 4, 2, batch_first=True),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 3, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.detach(), [5, 2], batch_first=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            y, twin = ours(x)[0], theirs(x)[0]
            assert torch.equal(y, twin)
            assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, twin)))
        assert torch.equal(ours(packed)[0].data, theirs(packed)[0].data)
        with torch.autocast("cpu", torch.bfloat16):
            try:
                twin = theirs(x)[0]
            except RuntimeError:  # torch 2.14's LSTM without AVX-512: oneDNN has no such primitive
                if kind != "LSTM":
                    raise
                with pytest.raises(RuntimeError, match="primitive descriptor"):
                    ours(x)
            else:
                y = ours(x)[0]
                assert y.dtype == twin.dtype
                assert torch.equal(y, twin)
        padded = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
        assert torch.equal(ours(x, lengths=torch.tensor([5, 2]))[0], padded)
        assert ran == ["torch"] * 5
        cell, single = getattr(fusedrnn, f"{kind}Cell")(3, 4), getattr(torch.nn, f"{kind}Cell")(3, 4)
        single.load_state_dict(cell.state_dict())
        got, want = cell(x[:, 0]), single(x[:, 0])
        assert torch.equal(got[0] if kind == "LSTM" else got, want[0] if kind == "LSTM" else want)
        assert ran == ["torch"] * 5
    assert [str(w.message) for w in warned] == [f"fusedrnn: {fusedrnn.plan(ours, 2).why}"]

    ran.clear()
    want = theirs(x)[0]
    lengths = torch.tensor([5, 0])
    resets = torch.zeros(2, 5, dtype=torch.bool)
    for got in (
        ours(x, resets=resets)[0],
        ours(x, return_all_states=True)[0],
        fusedrnn.record_gates(ours, x)[0][0],
        torch.func.vmap(lambda x: ours(x)[0])(x.detach().unsqueeze(0))[0],
        torch.func.jvp(lambda x: ours(x)[0], (x,), (x,))[0],
        torch.compile(ours, backend="eager", fullgraph=True)(x)[0],
    ):
        torch.testing.assert_close(got, want)
    assert set(ran) == {"reference"}
    assert torch.equal(ours(x, lengths=lengths)[0][1], torch.zeros(5, 4))
    ours.recompute = True
    torch.testing.assert_close(ours(x)[0], want)
    assert set(ran) == {"reference"}
    with (
        pytest.raises(RuntimeError, match="backend 'cpu' was asked for but cannot run: not built"),
        fusedrnn.backend("cpu"),
    ):
        ours(x)
    explained = fusedrnn.explain(
        kind.lower() if kind != "RNN" else "rnn_tanh", steps=5, batch=2, input_size=3, hidden_size=4, device="cpu"
    )
    assert (explained.backend, explained.why) == ("torch", fusedrnn.plan(ours, 2).why)


def test_lengths_that_torchs_op_cannot_take():
    layer = fusedrnn.GRU(3, 4, backend="torch")
    with pytest.raises(RuntimeError, match="a length of 0 needs a kernel of fusedrnn: backend 'torch' was asked for"):
        layer(torch.randn(5, 2, 3), lengths=torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match="lengths under a transform or a trace needs a kernel"):
        torch.func.vmap(lambda n: layer(torch.ones(5, 2, 3), lengths=n)[0])(torch.tensor([[5, 1]]))


def test_cudnn_has_gradients_in_training_only(monkeypatch):
    """A layer in eval whose gradient is wanted: the flag is set, dropout stays off."""
    calls = []
    monkeypatch.setattr(torch._VF, "lstm", lambda *arguments: calls.append(arguments) or arguments[1])

    class OnCuda:
        device, requires_grad = torch.device("cuda", 0), True

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            functional._torch_layers(
                CELLS["lstm"], OnCuda(), None, 0, [], True, 2, 0.5, False, False, False, None, None, 0.0
            )
    assert [(dropout, training) for *_, dropout, training, _, _ in calls] == [(0.0, True), (0.5, False)]


def test_a_fallback_to_torch_is_told_once_and_works():
    code = """
import warnings, torch, fusedrnn
from fusedrnn import functional, planning
functional.direct = lambda *arguments: None  # a plain call on the CPU does not ask
planning._cached_choice.cache_clear()
planning.decide = lambda *a, **k: planning.Choice("torch", "auto", "torch's own op runs: a test")
lstm = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True)
theirs = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
theirs.load_state_dict(lstm.state_dict())
x = torch.randn(5, 2, 3)
packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 2])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        assert torch.equal(lstm(x)[0], theirs(x)[0])
    assert torch.equal(lstm(packed)[0].data, theirs(packed)[0].data)
messages = [str(w.message) for w in seen if "fusedrnn" in str(w.message)]
assert messages == ["fusedrnn: torch's own op runs: a test"], messages
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_an_algorithm_that_the_backend_has_not():
    with pytest.raises(RuntimeError, match="'step' of backend 'cpu' cannot run: it has auto, persistent"):
        decide(problem("cpu"), EVERYTHING, "cpu", "step")
    choice = decide(problem("cpu"), EVERYTHING, None, "step")
    assert (choice.backend, choice.algorithm) == ("cpu", "auto")
    assert "'step' of backend 'cpu' cannot run" in choice.why
    with pytest.raises(RuntimeError, match="'step' of backend 'reference' cannot run"):
        fusedrnn.LSTM(3, 4, backend="reference", algorithm="step")(torch.zeros(2, 2, 3))


def test_a_block_in_one_thread_leaves_other_threads_alone():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with fusedrnn.backend("reference"):
            inside.set()
            leave.wait(10)
        seen.append(chosen(backend="reference"))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    default = chosen()
    with fusedrnn.backend("reference"):
        leave.set()
        thread.join()
        assert chosen() == "reference"
    assert chosen() == default
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_plan_says_what_a_gpu_backend_would_do(name, monkeypatch):
    reason = unsupported(name, problem("cpu"), planning.machine())
    if reason:
        pytest.skip(f"plans of {name} through the module are not tested here: {reason}")
    lstm = fusedrnn.LSTM(32, 64, backend=name)
    found = fusedrnn.plan(lstm, batch=8)
    assert found.backend == name
    assert found.algorithm == found.details.algorithm != "auto"
    assert found.why.startswith(f"backend '{name}' was asked for; ")
    assert fusedrnn.plan(fusedrnn.LSTM(32, 64, proj_size=4, backend=name), 8, backward=True).algorithm == "step"


@pytest.mark.skipif(not _build.loaded(), reason="no C++ extension: plans of the CPU are not tested")
def test_plan_says_what_the_cpu_does(request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)

    def found(layer, batch, **options):
        choice = fusedrnn.plan(layer, batch, **options)
        assert (choice.backend, choice.algorithm) == ("cpu", "persistent")
        assert choice.details.why in choice.why
        return choice.details

    small, large = fusedrnn.LSTM(8, 64), fusedrnn.LSTM(8, 512)
    step = found(small, 1, steps=1)
    assert (step.direct, step.threads, step.panel_bytes, step.input_product) == (True, 1, 0, "kernel")
    assert "one thread of 2, a step is too small to share; W_hh read where it lies" in step.why
    assert found(fusedrnn.LSTMCell(8, 64), 1) == step
    long = found(small, 1)
    assert (long.direct, long.threads) == (False, 1)
    assert long.panel_bytes >= 4 * 64 * 64 * 4
    assert "planned for a long sequence, steps= was not given" in long.why
    assert "planned for" not in found(small, 1, steps=70).why
    units = found(large, 1, steps=100)
    assert (units.threads, units.by_rows, units.direct) == (2, False, False)
    assert "2 threads take units each; W_hh packed at each call (" in units.why
    # 64 KiB fit every core's cache.
    rows = found(small, 64, steps=100)
    assert (rows.threads, rows.by_rows) == (2, True)
    assert "2 threads take rows of the batch each" in rows.why
    gemms = found(small, 100, steps=1)
    assert gemms.state_product == gemms.input_product != "kernel"
    assert found(fusedrnn.GRU(8, 64, dtype=torch.bfloat16), 1).panel_bytes < 3 * 64 * 64 * 4
    back = found(small, 2, steps=50, backward=True)
    assert back.direct is False
    assert "dx and dW_ih by" in back.why
    assert found(fusedrnn.LSTM(8, 64, proj_size=5), 3, backward=True).threads == 1
    if _build._small_calls is not None:
        kept = found(fusedrnn.freeze(fusedrnn.LSTM(8, 64)), 1, steps=1)
        assert (kept.kept, kept.direct) == (True, False)
        assert "W_hh packed once, by freeze (" in kept.why


def test_plan_of_a_layer_of_ones_own_cell():
    found = fusedrnn.plan(fusedrnn.Layer(fusedrnn.zoo.slstm, 8, 16, heads=2), 3, steps=40)
    assert found.backend in ("cpu", "reference")
    if found.backend == "cpu":
        assert found.details.panel_bytes > 0


@pytest.mark.parametrize("setting, message", [("/nowhere", "got '/nowhere'"), ("2", "got '2'")])
def test_simulator_that_is_not_there(setting, message, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_SIMULATE", setting)
    with pytest.raises(RuntimeError, match=f"FUSEDRNN_SIMULATE must be 1 in a checkout.*{message}"):
        common.simulator_folder()
    monkeypatch.setenv("FUSEDRNN_SIMULATE", "0")
    assert common.simulator_folder() is None


@pytest.mark.parametrize(
    "layer, batch, error, message",
    [
        (torch.nn.LSTM(8, 16), 8, TypeError, "got torch.nn's LSTM: call fusedrnn.convert on it first"),
        (
            torch.nn.Sequential(fusedrnn.GRU(3, 4)),
            8,
            TypeError,
            "got Sequential: pass one of the layers that it holds, 0",
        ),
        (torch.nn.Linear(3, 4), 8, TypeError, "got Linear, which is none"),
        ("lstm", 8, TypeError, "plan takes a recurrent layer or cell of fusedrnn, got str"),
        (fusedrnn.LSTM(3, 4), "8", TypeError, "batch must be an int, got str"),
        (fusedrnn.LSTM(3, 4), 8.0, TypeError, "batch must be an int, got float"),
        (fusedrnn.GRUCell(3, 4), -1, ValueError, "batch must be at least 1, got -1"),
        (fusedrnn.GRUCell(3, 4), 0, ValueError, "batch must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_planned(layer, batch, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.plan(layer, batch)


def test_a_backend_without_with_warns():
    with pytest.warns(
        RuntimeWarning, match=r"fusedrnn.backend\('cpu', 'persistent'\) did nothing: write `with fusedrnn"
    ):
        fusedrnn.backend("cpu", "persistent")
    with pytest.raises(ValueError, match="backend must be one of"):
        fusedrnn.backend("cudnn")

    @fusedrnn.backend("reference")
    def decorated():
        return chosen()

    assert (decorated(), decorated(), chosen(backend="cpu") if chosen() == "cpu" else "cpu") == (
        "reference",
        "reference",
        "cpu",
    )
    block = fusedrnn.backend("reference")
    with block, block:
        assert chosen() == "reference"
    assert planning._forced == []


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_messages_name_public_classes(name):
    for package in (torch.nn, fusedrnn):
        with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) got an unexpected keyword argument 'h0'"):
            getattr(package, name)(3, 4)(torch.zeros(2, 3), h0=None)
