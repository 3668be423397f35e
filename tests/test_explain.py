"""fusedrnn.explain and its command: plans, bytes, operations and bounds of chips that are not here."""

import functools
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptxsim import build

import fusedrnn
from fusedrnn import planning
from fusedrnn.__main__ import main
from fusedrnn.backends import cuda
from fusedrnn.backends.cuda_plan import CHIP_LIMITS
from fusedrnn.ops import BACKEND_ALGORITHMS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_cost

explain = importlib.import_module("fusedrnn.explain")
CPU = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
BF16 = torch.bfloat16


STEP = {"algorithm": "step"}


def one(backend, *, backward=False, cell="lstm", sequence=0, **sizes):
    """The pass of one backend."""
    sizes = {"steps": 10, "batch": 16, "input_size": 64, "hidden_size": 64, "chip": "h100-sxm"} | sizes
    found = fusedrnn.explain(cell, **sizes).sequences[sequence].passes
    (only,) = [p for p in found if p.backend == backend and p.backward == backward]
    return only


def test_every_chip_has_peaks():
    assert explain.PEAKS.keys() == CHIP_LIMITS.keys()


@pytest.mark.parametrize("chip", CHIP_LIMITS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [7, 128, 2000])
def test_everything_is_explained(chip, cell, dtype, hidden):
    sizes = {"steps": 5, "batch": 3, "input_size": 10, "hidden_size": hidden, "num_layers": 3, "bidirectional": True}
    found = fusedrnn.explain(cell, **sizes, dtype=dtype, chip=chip)
    assert found.backend == "cuda"
    assert [(s.layers, s.count, s.input_size) for s in found.sequences] == [
        ("layer 0", 2, 10),
        ("layers 1 to 2", 4, 2 * hidden),
    ]
    for sequence in found.sequences:
        for p in sequence.passes:
            if p.backend == "cpu":
                assert p.algorithm is None
                assert p.why == "it takes CPU tensors, got cuda"
                continue
            assert {p.algorithm, *dict(p.others)} == set(BACKEND_ALGORITHMS[p.backend]) - {"auto"}
            assert p.launches == (5 if p.algorithm == "step" else 1)
            assert min(*p.grid, p.threads, p.shared_bytes, p.read_bytes, p.written_bytes, p.flops) > 0
            assert p.shared_bytes <= CHIP_LIMITS[chip].shared_per_block
            assert p.bound_us > 0
            assert p.registers_why
            assert p.registers is None or 16 <= p.registers <= 255


@pytest.mark.parametrize(
    "kernel", [k for k in gpu_cost.GOALS if k.algorithm == "persistent" and k.directions == 1], ids=str
)
def test_bytes_of_persistent_steps_are_those_of_the_docs(kernel):
    found = one("cuda", backward=kernel.backward, batch=kernel.batch, hidden_size=kernel.hidden, dtype=kernel.dtype)
    assert found.algorithm == "persistent"
    assert (found.read_bytes, found.written_bytes) == gpu_cost.floor_bytes(kernel, found.grid[0])


@pytest.mark.parametrize("backend, backward", [("cuda", False), ("cuda", True), ("triton", False)])
def test_bytes_of_a_step_are_those_counted(backend, backward, monkeypatch):
    """The formulas leave out the biases, 4 % here."""
    if backend not in planning.machine().on_cpu:
        pytest.skip(f"bytes of {backend} are counted by the simulator, where its compiler is and no GPU")
    monkeypatch.setenv("FUSEDRNN_SIMULATE", "1")
    kernel = gpu_cost.Kernel("step", backward, 16, 256, 0, 0, backend=backend)
    counted = gpu_cost.per_step(kernel)
    plan = explain.cuda_plan.plan if backend == "cuda" else explain.triton.plan
    step = lambda *args, **kwargs: plan(*args[:2], "step") if backend == "cuda" else plan(*args, **kwargs | STEP)
    monkeypatch.setattr(explain.cuda_plan if backend == "cuda" else explain.triton, "plan", step)
    found = one(backend, backward=backward, input_size=256, hidden_size=256, dtype=BF16)
    assert found.algorithm == "step"
    assert found.read_bytes == pytest.approx(counted["global_ld_bytes"], rel=0.05)
    assert found.written_bytes == pytest.approx(counted["global_st_bytes"], rel=0.05)


def test_flops():
    sizes = {"batch": 2, "input_size": 3, "hidden_size": 5, "dtype": torch.float64}  # float64 has step only
    step = one("cuda", **sizes)
    assert (step.algorithm, step.flops, step.outside_flops) == ("step", 2 * 2 * 20 * (5 + 3), 0)
    gradient = one("cuda", backward=True, **sizes)
    assert (gradient.flops, gradient.outside_flops) == (2 * 2 * 20 * 5, 2 * 2 * 20 * (5 + 2 * 3))
    sizes["dtype"] = torch.float32
    kept = one("cuda", cell="gru", **sizes)
    assert (kept.algorithm, kept.flops, kept.outside_flops) == ("persistent", 2 * 2 * 15 * 5, 2 * 2 * 15 * 3)
    projected = one("cuda", proj_size=4, **sizes)
    assert projected.flops == 2 * 2 * 20 * (4 + 3) + 2 * 2 * 4 * 5
    assert projected.launches == 20


def test_bound_by_arithmetic():
    """T steps of h W_hh^T on the multiprocessors that have a block, and x W_ih^T on all of them."""
    found = one("cuda", steps=100, batch=16, input_size=768, hidden_size=768, dtype=BF16)
    product = 2 * 16 * 4 * 768 * 768
    assert found.grid == (48, 2)
    assert found.bound_us == pytest.approx(100 * product * (132 / 96 + 1) / 989.5e12 * 1e6)
    assert found.bound_why == "16-bit products on 96 of 132 multiprocessors"
    tf32 = one("cuda", steps=100, batch=16, input_size=768, hidden_size=768, tf32=True)
    assert tf32.bound_us == pytest.approx(2 * found.bound_us, rel=1e-3)


def test_bound_by_memory():
    """What the sequence reads and writes once, less what L2 holds."""
    sizes = {"steps": 100_000, "batch": 32, "input_size": 8, "hidden_size": 8, "dtype": BF16, "training": False}
    found = one("cuda", **sizes)
    rows, l2 = 100_000 * 32 * 2, 50 << 20
    x, gates, y = 8 * rows, 32 * rows, 8 * rows
    moved = (gates - l2) + (gates + 512 - l2)
    assert max(x + 512, y) < l2
    assert found.bound_why == "memory: what L2 cannot hold"
    assert found.bound_us == pytest.approx(moved / 3.35e12 * 1e6)
    assert "L2 is not published" in one("cuda", chip="b200", **sizes).bound_why


def test_inference_saves_nothing():
    training, inference = (one("cuda", hidden_size=768, dtype=BF16, training=t) for t in (True, False))
    assert inference.written_bytes == 16 * 768 * 2
    assert training.written_bytes == 16 * 768 * (2 + 4 * 2 + 4)
    passes = fusedrnn.explain(steps=1, batch=1, input_size=1, hidden_size=1, training=False).sequences[0].passes
    assert not any(p.backward for p in passes)


def test_registers_are_those_of_the_instance_that_is_launched(monkeypatch):
    kernels = {
        "sm_80.cubin": {"persistent_forward_wide_Lstm_bfloat16_3_whole": 1},
        "sm_90.cubin": {
            "persistent_forward_wide_Lstm_bfloat16_3_whole": 2,
            "persistent_forward_wide_Lstm_bfloat16_4_whole": 3,
            "persistent_forward_wide_Lstm_bfloat16_4_ragged": 4,
            "persistent_forward_Lstm_bfloat16_3_whole": 8,
            "persistent_backward_RnnTanh_tf32_4_whole": 5,
            "step_forward_Gru_float64_1_whole": 6,
            "step_forward_Lstm_float64_1_ragged": 7,
        },
    }
    images = lambda capability: [n for n in (f"sm_{capability[0]}0.cubin",) if n in kernels] + ["compute_80.ptx"]
    monkeypatch.setattr(cuda, "images", images)
    monkeypatch.setattr(explain, "_compiled", lambda image: (kernels[image], "not known: not there"))

    def registers(*args, **sizes):
        return one("cuda", *args, **sizes).registers

    assert registers(hidden_size=768, dtype=BF16) == 2
    assert registers(batch=8, hidden_size=768, dtype=BF16) == 8
    assert registers(hidden_size=1024, dtype=BF16) == 3
    assert registers(hidden_size=1000, dtype=BF16) == 4
    assert registers(hidden_size=768, dtype=BF16, chip="a100") == 1
    assert registers(cell="rnn_tanh", backward=True, hidden_size=512, tf32=True) == 5
    assert registers(cell="gru", dtype=torch.float64) == 6
    assert registers(batch=32, input_size=63, dtype=torch.float64) == 7
    assert one("cuda", cell="gru").registers_why == "not known: not there"
    unknown = one("cuda", chip="b200")
    assert unknown.registers is None
    assert unknown.registers_why == "not known: there is no code for sm_100, the driver compiles compute_80.ptx"
    monkeypatch.setattr(cuda, "images", lambda capability: [])
    assert one("cuda").registers_why == "not known: there is no device code to read them from"


def test_registers_of_compiled_code(tmp_path, monkeypatch):
    if "cuda" not in planning.machine().on_cpu:
        pytest.skip("no simulator, whose machine code is read: the registers that explain reads are not checked")
    ptx = (cuda._simulated().folder / "persistent_forward_wide.compute_80.ptx").read_text()
    assembled = build.assemble(ptx, 90)
    if assembled is None or explain._cuobjdump() is None:
        pytest.skip("no ptxas or no cuobjdump: the registers that explain reads are not checked")
    (tmp_path / "persistent_forward_wide.sm_90.cubin").symlink_to(assembled[1])
    monkeypatch.setattr(cuda, "DEVICE_CODE", tmp_path)
    monkeypatch.setattr(cuda, "images", lambda capability: ["sm_90.cubin"])
    monkeypatch.setattr(explain, "_compiled", functools.cache(explain._compiled.__wrapped__))
    found = one("cuda", hidden_size=768, dtype=BF16)
    assert 64 <= found.registers <= 255
    assert found.registers_why == "of sm_90.cubin"
    assert one("cuda", backward=True, hidden_size=768, dtype=BF16).registers_why.startswith("not known: no such kernel")


@pytest.mark.parametrize("name, known", [("NVIDIA H100 80GB HBM3", True), ("NVIDIA Thor", False)])
def test_a_gpu_of_this_machine(name, known, monkeypatch):
    properties = SimpleNamespace(
        total_memory=80 * 10**9,
        name=name,
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232_448,
    )
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(planning, "machine", planning.Machine)
    index = 6 + known  # no device of these numbers is in the caches
    found = fusedrnn.explain(steps=10, batch=16, input_size=64, hidden_size=64, device=f"cuda:{index}")
    assert (found.device, found.backend) == (name, "cuda")
    for p in found.sequences[0].passes:
        sheet = one(p.backend, backward=p.backward)
        if not known and p.algorithm is not None:
            sheet = replace(sheet, bound_us=None, bound_why="no published peaks of this chip are known here")
        named = replace(p, why=p.why.replace(name, "h100-sxm"))
        assert replace(named, others=sheet.others) == sheet


@pytest.mark.parametrize(
    "threads, batch, hidden, text",
    [
        (1, 64, 512, "one thread;"),
        (2, 1, 64, "one thread: the product of a step is too small to share;"),
        (2, 32, 128, "2 threads share the rows of the batch"),
        (2, 8, 1024, "2 threads share the units"),
        (2, 64, 2048, "2 threads share the units"),
    ],
)
def test_cpu(threads, batch, hidden, text, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(explain, "_own_cache_bytes", lambda: 2 << 20)
    monkeypatch.setattr(planning, "machine", planning.Machine)
    sizes = {"batch": batch, "hidden_size": hidden, "chip": None, "device": "cpu"}
    found = one("cpu", steps=100, **sizes)
    assert found.why.startswith(text)
    short = one("cpu", steps=64 // batch, **sizes)
    assert short.panel_bytes is None
    assert "W_hh is read where it lies" in short.why
    assert one("cpu", steps=100, **sizes | {"batch": 1}, backward=True).panel_bytes
    share = threads if "units" in text else 1
    assert found.panel_bytes == 4 * hidden * hidden * 4 // share
    products = {"float32": "panels", "bfloat16": "host", "float16": "panels"}
    monkeypatch.setattr(explain._build, "build_info", lambda: {"cpu_capability": "amx", "cpu_products": products})
    for dtype, texts in (
        (torch.bfloat16, ("amx: bfloat16 tiles", "products outside of the loop by the host")),
        (torch.float16, ("avx512;", "products outside of the loop by panels of ours")),
    ):
        half = one("cpu", steps=100, **sizes, dtype=dtype)
        assert all(each in half.why for each in texts)
        assert half.panel_bytes in (found.panel_bytes // 2, 4 * hidden * hidden * 2)  # half may fit where all did not
    step = one("cpu", steps=1, **sizes | {"batch": 65})
    assert "both products are GEMMs" in step.why
    assert step.panel_bytes is None
    assert found.bound_us is None
    assert "no peaks" in found.bound_why
    assert one("cuda", chip=None, device="cpu").why == "it takes CUDA tensors, got cpu"


def test_cpu_rules_are_those_of_the_kernels():
    """explain._cpu repeats what these lines of C++ decide: change them together."""
    text = "".join((CPU / name).read_text() for name in ("sequence.cpp", "recurrence.h", "recurrence_kernels.h"))
    for line in (
        "const double step = static_cast<double>(batch) * cell.gates * hidden * out / heads;",
        "if (step < (batch >= 2 * threads ? 32768.0 : (steps == 1 ? 65536.0 : 200000.0))) threads = 1;",
        "constexpr int64_t kFewRows = 64, kFewRowsOfTiles = 8;",
        "return s.steps * s.batch * s.heads <= (kTiles ? kFewRowsOfTiles : kFewRows);",
        "two_products = s.steps == 1 && !one_kernel && !by_panels && !s.multiplied && bytes_of(in.x.dtype()) > 2 &&",
        "return is_short(problem.shape) && problem.shape.steps <= 4 * problem.shape.batch && problem.shape.heads == 1;",
        "#if FUSEDRNN_VECTOR_BYTES > 16 || defined(FUSEDRNN_NEON)\nconstexpr bool kWidensHalf = true;",
        "by_rows = !direct && s.threads > 1 && s.batch >= 16 * s.threads && weight_bytes <= s.cache_bytes / 4 * 3;",
    ):
        assert line in text


def test_own_cache_is_the_second_level():
    index = Path("/sys/devices/system/cpu/cpu0/cache/index2")
    if not (index / "size").exists() or (index / "level").read_text().strip() != "2":
        pytest.skip("the kernel does not say how large the second-level cache is")
    assert explain._own_cache_bytes() == int((index / "size").read_text().strip().removesuffix("K")) << 10


@pytest.mark.parametrize(
    "given, message",
    [
        ({"chip": "h100"}, "chip must be one of a100, h100-sxm, h100-pcie, h200, b200, rtx-4090, got 'h100'"),
        ({"cell": "qrnn"}, "cell must be one of lstm, gru, rnn_tanh, rnn_relu.*, got 'qrnn'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
        ({"cell": "gru", "proj_size": 3}, "proj_size exists only for the lstm, got 3 for gru"),
        ({"proj_size": 64}, "proj_size must be at least 0 and less than hidden_size=64, got 64"),
        ({"dtype": torch.int64}, "dtype must be one of .*, got torch.int64"),
        ({"dtype": BF16, "tf32": True}, "tf32 is a way to multiply float32, got torch.bfloat16"),
        ({"device": "meta", "chip": None}, "device must be one that computes, got 'meta'"),
        ({"device": "cpu"}, "either a chip or a device of this machine, got chip='h100-sxm' and device='cpu'"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        one("cuda", **given)


def test_command(capsys):
    arguments = "explain gru -T 1024 -B 16 -I 100 -H 768 --dtype bfloat16 --layers 2 --chip h100-sxm".split()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("gru, T 1024, B 16, I 100, H 768, bfloat16, training, on h100-sxm (from its data sheet)\n")
    assert "1 launch of 48 x 2 blocks of 256 threads" in text
    assert "1024 launches of" in text
    assert explain.BOUND in text
    assert "measurement" in explain.BOUND
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sequences"][0]["passes"][0]["grid"] == [48, 2]
    assert main(["explain", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "no bound" in text
    assert explain.BOUND not in text


def test_command_says_what_is_wrong(capsys):
    assert main(["explain", "--chip", "gtx-1080"]) == 2
    assert capsys.readouterr().err == (
        "error: chip must be one of a100, h100-sxm, h100-pcie, h200, b200, rtx-4090, got 'gtx-1080'\n"
    )
    with pytest.raises(SystemExit):
        main(["explain", "qrnn"])
    assert "invalid choice: 'qrnn'" in capsys.readouterr().err


def test_info_says_what_would_run(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_tensors"].startswith("cpu (") == found["extension"]
    assert found["threads"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert bool(found["cuda_images"]) != bool(cuda.missing())
    assert not found["cuda_images"] or found["cuda_images"]["8.6"] == found["cuda_images"]["8.0"]
    assert found["gpus"] or "no GPU is here; with one: " in found["cuda_tensors"]


@pytest.mark.parametrize(
    "setting, code, text",
    [
        ("reference", 0, "reference (backend 'reference' was asked for)"),
        ("torch", 0, "torch (backend 'torch' was asked for)"),
        ("cuda:sequence", 0, "none (backend 'cuda' was asked for but cannot run"),
        ("cudnn", 2, "error: backend must be one of reference, cpu, triton, cuda, torch, got 'cudnn'"),
    ],
)
def test_info_obeys_the_environment(setting, code, text, capsys, monkeypatch):
    monkeypatch.setattr(planning, "machine", lambda: planning.Machine())
    monkeypatch.setenv("FUSEDRNN_BACKEND", setting)
    assert main(["info"]) == code
    printed = capsys.readouterr()
    assert text in (printed.err if code else printed.out.split("cpu_tensors")[1].splitlines()[0])


@pytest.mark.parametrize(
    "setting, code, runs, algorithms",
    [
        ("", 0, "cuda (cuda is the first choice for cuda tensors)", {"cuda": "persistent", "triton": "step"}),
        ("cuda:step", 0, "cuda (backend 'cuda' was asked for)", {"cuda": "step", "triton": "step"}),
        ("triton:sequence", 0, "triton (backend 'triton' was asked for)", {"cuda": "persistent", "triton": None}),
        ("reference", 0, "reference (backend 'reference' was asked for)", {"cuda": "persistent", "triton": "step"}),
        ("torch", 0, "torch (backend 'torch' was asked for)", {"cuda": "persistent", "triton": "step"}),
        ("cpu", 0, "none (backend 'cpu' was asked for but cannot run", {"cuda": "persistent", "triton": "step"}),
        ("cudnn", 2, "error: backend must be one of reference, cpu, triton, cuda, torch, got 'cudnn'", {}),
    ],
)
def test_explain_obeys_the_environment(setting, code, runs, algorithms, capsys, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", setting)
    arguments = ["explain", "--chip", "h200", "-H", "768", "--dtype", "float16"]
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert runs in (printed.err if code else printed.out.splitlines()[1])
    if algorithms:
        assert main([*arguments, "--json"]) == 0
        passes = json.loads(capsys.readouterr().out)["sequences"][0]["passes"]
        assert {p["backend"]: p["algorithm"] for p in passes if p["backend"] != "cpu"} == algorithms


def test_explain_obeys_a_block():
    with fusedrnn.backend("triton"):
        found = fusedrnn.explain(steps=2, batch=2, input_size=4, hidden_size=8, chip="a100")
    assert (found.backend, found.why) == ("triton", "backend 'triton' was asked for")


@pytest.mark.parametrize("name, chip", [("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA GH200 480GB", None)])
def test_a_chip_is_known_by_its_name(name, chip):
    assert [key for key, p in explain.PEAKS.items() if any(d in name for d in p.devices)] == [chip] * (chip is not None)


def test_a_layer_brings_its_sizes():
    layer = fusedrnn.LSTM(8, 16, 2, bidirectional=True, proj_size=4, dtype=torch.float64)
    found = fusedrnn.explain(layer, steps=3, batch=2, chip="h100-sxm")
    named = fusedrnn.explain(
        "lstm", steps=3, batch=2, input_size=8, hidden_size=16, num_layers=2, bidirectional=True, proj_size=4,
        dtype=torch.float64, chip="h100-sxm",
    )  # fmt: skip
    assert found == named
    assert fusedrnn.explain(layer, steps=3, batch=2).device == "this machine's cpu"
    cell = fusedrnn.explain(fusedrnn.RNNCell(3, 4, nonlinearity="relu", backend="reference"), steps=1, batch=2)
    assert (cell.cell, cell.hidden_size, cell.backend) == ("rnn_relu", 4, "reference")
    with fusedrnn.backend("cpu"):
        assert fusedrnn.explain(fusedrnn.RNN(3, 4, backend="reference"), steps=1, batch=2).backend == "cpu"
    with pytest.raises(TypeError, match="explain takes hidden_size, dtype from the layer: leave it out"):
        fusedrnn.explain(layer, steps=3, batch=2, hidden_size=16, dtype=BF16)
    with pytest.raises(TypeError, match=r"got torch\.nn's GRU: call fusedrnn.convert on it first"):
        fusedrnn.explain(torch.nn.GRU(3, 4), steps=3, batch=2)
    with pytest.raises(TypeError, match="explain needs input_size=, or a layer of fusedrnn"):
        fusedrnn.explain(steps=3, batch=2)
    with pytest.raises(TypeError, match="steps must be an int, got str"):
        fusedrnn.explain(layer, steps="3", batch=2)


def test_what_does_not_fit_is_said():
    """The weights of 100,000 units alone take 160 GB, their gradients as much."""
    sizes = {"steps": 1, "batch": 1, "input_size": 100_000, "hidden_size": 100_000, "chip": "a100"}
    warnings = fusedrnn.explain("lstm", **sizes).warnings
    assert any("it does not fit: weights, their gradients" in w and "take 640 GB at least, a100" in w for w in warnings)
    found = fusedrnn.explain("lstm", **sizes, training=False).warnings
    assert any("it does not fit: weights, x and y take 320 GB at least" in w for w in found)
    small = fusedrnn.explain("lstm", steps=10, batch=64, input_size=512, hidden_size=512, chip="a100")
    assert not any("does not fit" in w for w in small.warnings)


def test_a_bound_that_nobody_reaches_is_said():
    found = fusedrnn.explain("lstm", steps=1024, batch=16, input_size=768, hidden_size=768, dtype=BF16, chip="h100-sxm")
    (warning,) = [w for w in found.warnings if "us a step" in w]
    assert "take it for no time" in warning
    assert f"warning: {warning}" in str(found)
    large = fusedrnn.explain("lstm", steps=8, batch=2048, input_size=4096, hidden_size=4096, chip="h100-sxm")
    assert not any("us a step" in w for w in large.warnings)


def test_a_plan_for_kernels_that_are_not_here(monkeypatch):
    sizes = {"steps": 3, "batch": 2, "input_size": 8, "hidden_size": 8}
    monkeypatch.setattr(cuda, "missing", lambda: "a test")
    assert "no CUDA kernels (a test): the plan is that of one" in fusedrnn.explain(**sizes, chip="a100").warnings[0]
    monkeypatch.setattr(cuda, "missing", lambda: "")
    assert not any("no CUDA kernels" in w for w in fusedrnn.explain(**sizes, chip="a100").warnings)
    assert fusedrnn.explain(**sizes).warnings == ()


def test_the_command_takes_names_as_torch_writes_them(capsys):
    assert main(["explain", "LSTM", "--device", "cpu", "-H", "8"]) == 0
    assert capsys.readouterr().out.startswith("lstm, ")
    assert main(["explain", "-H", "0"]) == 2
    assert "hidden_size must be at least 1, got 0" in capsys.readouterr().err
