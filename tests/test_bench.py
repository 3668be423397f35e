"""The benchmark suite: what it measures, that it refuses wrong answers, that a killed run loses and doubles nothing."""

import argparse
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fusedrnn import _build
from fusedrnn.__main__ import main
from fusedrnn.benchmarks import calls as small_calls
from fusedrnn.benchmarks import measure, problems, providers, quantized, results, roof, runner, slstm
from fusedrnn.benchmarks import report as report_module
from fusedrnn.benchmarks.problems import Problem
from fusedrnn.benchmarks.results import COLUMNS, Environment, Results, Row

CPU = torch.device("cpu")
TINY = [
    Problem("sweep", "lstm", 6, 2, 8, 8, modes=("forward", "train", "latency")),
    Problem("sweep", "gru", 3, 2, 8, 8, modes=("forward",)),
]
# Runs the suite over TINY with a pause after every problem, so that it can be killed in the middle.
CHILD = """
import sys, time
from fusedrnn.__main__ import main
from fusedrnn.benchmarks import measure, problems, results, runner
from fusedrnn.benchmarks.problems import Problem
problems.suite = lambda *a: [Problem("sweep", "lstm", t, 2, 8, 8, modes=("forward",)) for t in range(1, 7)]
results.commit = lambda: "test"
measure.cpu_peaks = lambda dtype: (1e11, 1e10)
append = runner.Results.append
runner.Results.append = lambda self, rows: (append(self, rows), time.sleep(0.2))
sys.exit(main(["bench", "--suite", "sweep", "--peers", "fusedrnn", "--rounds", "3", "--out", sys.argv[1]]))
"""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(problems, "suite", lambda *arguments: TINY)
    monkeypatch.setattr(results, "commit", lambda: "test")
    monkeypatch.setattr(measure, "cpu_peaks", lambda dtype: (1e11, 1e10))
    monkeypatch.setattr(report_module, "draw_charts", lambda *arguments: [])


def bench(folder: Path, *arguments: str) -> int:
    return main(["bench", "--suite", "sweep", "--peers", "fusedrnn", "--rounds", "3", "--out", str(folder), *arguments])


def rows_of(folder: Path) -> list[dict]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(rows: list[dict]) -> Counter:
    return Counter(tuple(row[c] for c in results.KEY) for row in rows)


def a_row(**values) -> Row:
    """A measurement that nobody made, for what only reads rows."""
    environment = Environment("a processor", "2.14.1", "", "", "", "0.1.0", "abc", 2, False)
    about = {"suite": "sweep", "cell": "lstm", "T": 64, "B": 16, "I": 256, "H": 256, "L": 1, "D": 1, "dtype": "float32",
             "mode": "forward", "provider": "torch.nn", "version": "2.14.1", "branch": "oneDNN", "status": "ok",
             "median": 1e-3, "least": 9e-4, "quartile1": 9.5e-4, "quartile3": 1.1e-3, "rounds": 9, "how": "wall clock",
             "speedup": 1.0, "ratio1": 0.98, "ratio3": 1.02, "baseline": 1e-3, "others": 0.0,
             "time": "2026-01-01T00:00:00+00:00", "load": "0.10", "peak_flops": 1e11,
             "peak_bandwidth": 1e10, "peaks_from": "measured"}  # fmt: skip
    return Row(**dataclasses.asdict(environment) | about | values)


def test_roof(tmp_path, capsys):
    """The best of ours by the best of the others; behind is who reaches neither that nor the roof."""
    times = {"torch.nn": 9e-3, "fusedrnn:frozen": 2e-3, "onnxruntime": 3e-3, "openvino": 2.5e-3}
    flops = a_row().problem.flops("forward")
    slow = {"provider": "fusedrnn:frozen", "B": 32, "median": 4 * flops * 2 / 1e12, "peak_flops": 1e12}
    rows = [a_row(provider=name, median=t) for name, t in times.items()] + [
        a_row(**slow), a_row(provider="openvino", B=32, median=slow["median"] * 0.5),
        a_row(provider="fusedrnn:frozen", B=64, status="unavailable"), a_row(provider="openvino", B=64),
    ]  # fmt: skip
    lines, quotients, failed = roof.table(rows)
    assert quotients == pytest.approx([1.25, 0.5])
    assert failed == 1
    assert [line.rsplit("|", 2)[1].strip() for line in lines[2:]] == ["", "behind"]
    products = roof.roof(a_row(**slow)) / slow["median"]
    assert products >= 0.25 - 1e-9  # the products alone; reading W_hh may take longer
    assert roof.read_rate(1 << 20) > 1e8
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in dataclasses.asdict(row).items()})
    assert roof.main([str(path)]) == 1
    assert "0.79 in the geometric mean; 1 are behind" in capsys.readouterr().out
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit):
        roof.main([str(path)])


def some_rows() -> list[Row]:
    found = []
    for provider, speed in (("torch.nn", 1.0), ("fusedrnn", 1.5), ("onnxruntime", 1.2)):
        for cell in ("lstm", "gru"):
            for size in ({}, {"H": 512, "I": 512}, {"B": 1}, {"B": 64}, {"T": 128}, {"T": 16}):
                for mode in ("forward", "train", "memory"):
                    row = a_row(provider=provider, cell=cell, mode=mode, **size)
                    took = row.problem.flops("forward") / 5e10 / speed
                    if mode == "memory":
                        values = {
                            "median": None,
                            "speedup": None,
                            "peak_bytes": int(row.problem.bytes("train") / speed),
                        }
                    else:
                        values = {"median": took, "quartile1": took * 0.95, "quartile3": took * 1.1, "speedup": speed,
                                  "ratio1": speed * 0.98, "ratio3": speed * 1.1, "baseline": took * speed}  # fmt: skip
                    found.append(dataclasses.replace(row, **values))
    return [*found, a_row(provider="planted", status="wrong", why="off by 1 <b>&</b>", median=None, speedup=None)]


def test_suites_hold_every_problem_once():
    sizes = {suite: len(problems.suite(suite)) for suite in problems.SUITES}
    assert sizes == {"deepbench": 124, "users": 14, "flashrnn": 8, "fastrnns": 4, "sweep": 54}
    for suite in problems.SUITES:
        for quick in (False, True):
            found = problems.suite(suite, quick, "bfloat16")
            assert len(set(found)) == len(found) > 0
            assert {p.dtype for p in found} == {"bfloat16"}
            assert set(found) <= set(problems.suite(suite, False, "bfloat16"))
    cells = Counter(p.cell for p in problems.suite("deepbench"))
    assert cells == {"gru": 73, "lstm": 37, "rnn_relu": 14}
    assert len(problems.suite("deepbench", quick=True)) == len(problems.DEEPBENCH_QUICK)
    with pytest.raises(ValueError, match=r"suite must be one of deepbench.*got 'none'"):
        problems.suite("none")


def test_users_are_named():
    found = problems.suite("users")
    assert all(p.project and p.name.startswith(f"{p.project}: {p.cell} ") for p in found)
    assert {p.one_step().project for p in found} == {p.project for p in found}
    assert {"silero-vad", "Kokoro", "docTR"} <= {p.project for p in problems.suite("users", quick=True)}
    assert not any(p.project for p in problems.suite("deepbench"))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_packed_once_gives_the_same_answers(cell, layers):
    problem = Problem("users", cell, 1, 2, 5, 7, L=layers)
    gate = measure.Gate(problem, "latency", torch.device("cpu"))
    for name in ("fusedrnn:frozen", "fusedrnn:stream"):
        assert gate.check(providers.PROVIDERS[name].make(gate.given, "latency")).right
    frozen = providers.PROVIDERS["fusedrnn:frozen"]
    gate = measure.Gate(dataclasses.replace(problem, T=9), "forward", torch.device("cpu"))
    assert gate.check(frozen.make(gate.given, "forward")).right
    with pytest.raises(providers.UnavailableError, match="inference only"):
        frozen.make(gate.given, "train")
    with pytest.raises(providers.UnavailableError, match="step by step"):
        providers.PROVIDERS["fusedrnn:stream"].make(gate.given, "forward")


def test_the_suite_of_slstm(capsys, monkeypatch, tmp_path):
    """Its providers agree with float64, and a wrong one has no time; what is on disk is not measured again."""
    monkeypatch.setattr(slstm, "BATCHES", (1,))
    monkeypatch.setattr(slstm, "STEPS", 3)
    arguments = ["bench", "--suite", "slstm", "--rounds", "3", "--seconds", "0.1", "--threads", "1", "--json"]
    arguments += ["--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "slstm.json").read_text())
    rows = found["rows"]
    assert {row["mode"] for row in rows} == {"forward", "train"}
    assert {"fusedrnn", "fusedrnn.compat", "products of torch"} <= {row["provider"] for row in rows if row["ms"] > 0}
    if "flashrnn:vanilla" in {row["provider"] for row in rows}:
        assert all("times as fast as flashrnn:vanilla" in r for r in rows if r["provider"] == "fusedrnn")
    for row in rows:
        assert row["of the roof"] == row["roof_ms"] / row["ms"]
        assert (row["T"], row["B"], row["threads"]) == (3, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(slstm, "measured", None)
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == rows
    monkeypatch.setattr(slstm, "ours", lambda gates, *rest, **options: (gates[None, :, :, 0], None))
    (tmp_path / "slstm.json").unlink()
    assert main([*arguments, "--modes", "forward"]) == 1
    wrong = next(r for r in json.loads(capsys.readouterr().out)["rows"] if r["provider"] == "fusedrnn.compat")
    assert "ms" not in wrong
    assert wrong["why"].startswith("wrong: off by")
    assert main(["bench", "--suite", "slstm", "--peers", "nobody"]) == 2
    (tmp_path / "slstm.json").write_text("[]")
    assert main(arguments) == 2
    assert "slstm.json has no rows of this suite" in capsys.readouterr().err


def test_the_roof_of_slstm():
    """Counted by hand: a product takes its operations, or the reading of its weights where that takes longer."""
    machine = slstm.Machine(flops=1e9, read_ih=1e9, read_hh=1e9)
    w_ih, w_hh = 2048 * 512, 2048 * 128
    assert machine.roof(1, "forward") == pytest.approx((2 * 64 * w_ih + 64 * 4 * w_hh) / 1e9)
    assert machine.roof(16, "forward") == pytest.approx(2 * 64 * 16 * (w_ih + w_hh) / 1e9)
    assert machine.roof(16, "train") == pytest.approx(3 * machine.roof(16, "forward"))


def test_only_names_problems(capsys):
    assert main(["bench", "--suite", "sweep", "--only", "T=64 L=4", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " L=4 " in line] == ["lstm", "gru"]
    assert main(["bench", "--only", "nothing"]) == 2
    assert "--only 'nothing': no problem of suite deepbench has it in its name" in capsys.readouterr().err


def test_flops_and_bytes_count_every_layer_and_direction():
    problem = Problem("sweep", "lstm", 3, 2, 5, 7, L=2, D=2)
    layer = torch.nn.LSTM(5, 7, 2, bidirectional=True)
    weights = sum(w.numel() for w in layer.parameters() if w.dim() == 2)
    assert problem.flops("forward") == 2 * weights * 3 * 2
    assert problem.flops("train") == 3 * problem.flops("forward")
    assert problem.bytes("forward") == 4 * (weights + 3 * 2 * (5 + 14))


A100, H100, A10, V100, T4 = ((8, 0), 108), ((9, 0), 132), ((8, 6), 72), ((7, 0), 80), ((7, 5), 40)


@pytest.mark.parametrize(
    "cell, dtype, B, H, chip, forward, backward",
    [
        ("lstm", "float16", 16, 768, H100, "persist_static", "persist_static"),
        ("lstm", "float16", 17, 768, H100, "standard", "standard"),
        ("lstm", "float16", 136, 768, H100, "standard", "standard"),
        ("lstm", "float16", 16, 760, H100, "standard", "standard"),
        ("lstm", "float16", 16, 1152, H100, "standard", "standard"),
        ("gru", "float16", 16, 768, A100, "standard", "standard"),
        ("lstm", "float16", 16, 768, A10, "standard", "standard"),
        ("lstm", "float16", 16, 768, T4, "standard", "standard"),
        ("gru", "float16", 16, 768, V100, "persist_static", "persist_static"),
        ("gru", "float16", 80, 768, V100, "standard", "standard"),
        ("rnn_relu", "float16", 96, 1024, A100, "standard", "standard"),
        ("rnn_relu", "float16", 64, 1024, A100, "persist_static", "persist_static"),
        ("lstm", "float32", 16, 192, H100, "persist_static_small_h", "standard"),
        ("lstm", "bfloat16", 16, 128, H100, "persist_static_small_h", "persist_static_small_h"),
        ("lstm", "bfloat16", 16, 193, H100, "standard", "standard"),
        ("rnn_tanh", "float32", 16, 384, H100, "persist_static_small_h", "standard"),
        ("lstm", "float64", 16, 64, H100, "standard", "standard"),
    ],
)
def test_cudnn_branch_is_what_torch_would_ask_for(cell, dtype, B, H, chip, forward, backward):
    problem = Problem("sweep", cell, 64, B, H, H, dtype=dtype)
    assert providers.cudnn_branch(problem, *chip) == f"cuDNN {forward}"
    assert providers.cudnn_branch(problem, *chip, backward=True) == f"cuDNN {backward}"
    if dtype == "bfloat16":
        assert providers.cudnn_branch(problem, *chip, version=91200) == "ATen loop"


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_torch_branch_is_what_torch_runs(mode):
    """The oneDNN layer shows in a profile exactly where it is named."""
    for cell in ("lstm", "gru"):
        for dtype in ("float32", "float64"):
            given = providers.draw(Problem("sweep", cell, 3, 2, 8, 8, dtype=dtype), CPU)
            runnable = providers.PROVIDERS["torch.nn"].make(given, mode)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                runnable.run()
            found = any("mkldnn_rnn" in event.name for event in profile.events())
            assert (runnable.branch == "oneDNN") == found == (cell == "lstm" and dtype == "float32")


@pytest.mark.parametrize("cell", problems.GATES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_gate_passes_what_is_right(cell, dtype):
    for mode, depth in (("forward", {}), ("train", {"L": 2, "D": 2}), ("latency", {"T": 1})):
        problem = dataclasses.replace(Problem("sweep", cell, 7, 3, 12, 16, dtype=dtype), **depth)
        gate, given = measure.Gate(problem, mode, CPU), providers.draw(problem, CPU)
        for name in ("torch.nn", "fusedrnn", "torch.loop"):
            check = gate.check(providers.PROVIDERS[name].make(given, mode))
            assert check.right, (name, mode, check)
            assert check.steps == problem.T


@pytest.mark.parametrize("dtype, part", [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
def test_gate_refuses_what_is_wrong(dtype, part):
    problem = Problem("sweep", "lstm", 7, 3, 12, 16, dtype=dtype)
    gate = measure.Gate(problem, "train", CPU)
    right = providers.PROVIDERS["torch.nn"].make(providers.draw(problem, CPU), "train").run()
    assert gate.check(providers.Runnable(lambda: right, "")).right
    for k in range(len(right)):
        for planted in (right[k] * (1 + part), torch.zeros_like(right[k]), right[k].flip(0), right[k] * float("nan")):
            wrong = [*right[:k], planted, *right[k + 1 :]]
            assert not gate.check(providers.Runnable(lambda wrong=wrong: wrong, "")).right
    with pytest.raises(ValueError, match="6 tensors are compared, got 5"):
        gate.check(providers.Runnable(lambda: right[1:], ""))
    with pytest.raises(ValueError, match=r"a tensor must be \[7, 3, 16\], got \[7, 3, 8\]"):
        gate.check(providers.Runnable(lambda: [right[0][..., :8], *right[1:]], ""))


@pytest.mark.parametrize("mode", ["forward", "train", "latency"])
def test_16_bits_are_compared_with_the_same_layer_in_float32(mode):
    make = providers.PROVIDERS["fusedrnn:float32"].make
    steps = 1 if mode == "latency" else 3
    gate = measure.Gate(Problem("sweep", "lstm", steps, 2, 8, 8, dtype="bfloat16"), mode, CPU)
    run = make(gate.given, mode)
    assert {t.dtype for t in run.run()} == {torch.float32}
    check = gate.check(run)
    assert check.right
    assert check.error < 1e-5
    with pytest.raises(providers.UnavailableError, match="what 16 bits are compared with, the problem is float32"):
        make(measure.Gate(Problem("sweep", "lstm", 3, 2, 8, 8), mode, CPU).given, mode)


def test_a_long_problem_is_checked_over_fewer_steps(monkeypatch):
    problem = Problem("sweep", "lstm", 1000, 2, 16, 16)
    monkeypatch.setattr(measure, "MOST_CHECKED_FLOPS", problem.flops("train") / 100)
    assert measure.Gate(problem, "train", CPU).problem.T == 10
    assert measure.Gate(problem, "forward", CPU).problem.T == 30


def test_rounds_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "_wall_clock", lambda run: run() or 0.002)
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = measure.interleaved(runs, 4, budget=10.0, device=CPU)
    assert {name: s.seconds for name, s in samples.items()} == dict.fromkeys("abc", [0.002] * 4)
    # Every sample is three calls to warm up (of the first two: one) and a call that is timed.
    rounds = ["".join(calls[k : k + 12 : 4]) for k in range(12, len(calls), 12)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert calls[:12:2] == calls[1:12:2]
    assert calls[12::4] == calls[13::4] == calls[14::4] == calls[15::4]
    few = int(0.5 / (measure.PAUSE + 4 * 0.002))
    assert few - 9 <= len(measure.interleaved({"a": lambda: None}, 100, budget=0.5, device=CPU)["a"].seconds) <= few
    slow = measure.Samples([2.0, 4.0, 9.0], "")
    assert [slow.quantile(q) for q in (0, 0.25, 0.5, 1)] == [2.0, 3.0, 4.0, 9.0]


def samples(*seconds: float) -> measure.Samples:
    return measure.Samples(list(seconds), "")


def test_the_ratio_never_contradicts_the_times():
    """The median of the quotients of a round says 2 here, though the medians are equal."""
    base, own = samples(2.0, 4.0, 6.0), samples(1.0, 2.0, 4.0)
    assert measure.speedup(base, own) == (2.0, 1.75, 2.0)
    base, own = samples(1.0, 2.0, 3.0), samples(3.0, 1.0, 2.0)
    assert measure.speedup(base, own).value == 1.0
    assert measure.speedup(samples(2.0, 4.0, 9.0), samples(1.0, 1.0, 1.0)).value == 4.0


@pytest.mark.parametrize(
    "own, others, free, reason",
    [
        ((1.0, 1.01, 1.02), 0.1, 0, ""),
        ((1.0, 1.01, 1.02), None, 0, ""),
        ((1.0, 1.01, 1.02), 1.0, 1, ""),
        ((1.0, 1.01, 1.02), 0.5, 0, "other programs took 0.5 CPUs, 0 were free"),
        ((1.0, 1.6, 2.0), 0.0, 0, "the middle half of the rounds spreads over 31% of the median"),
    ],
)
def test_what_a_busy_machine_spoiled_is_marked(own, others, free, reason):
    own, base = samples(*own), samples(2.0, 2.02, 2.04)
    assert measure.spoiled(own, own, None, others, free) == reason
    ratio = measure.speedup(base, own)
    assert measure.spoiled(own, base, ratio, others, free).startswith(reason)
    assert bool(reason) == bool(measure.spoiled(own, base, ratio, others, free))
    # A slow outlier of torch.nn would make of its peer a giant: the rounds tell.
    wild = samples(2.0, 800.0, 2.0, 900.0, 870.0)
    many = samples(2.0, 2.0, 2.0, 2.0, 2.0)
    assert "the rounds of torch.nn spreads over" in measure.spoiled(many, wild, measure.speedup(wild, many), 0.0, 0)


def test_other_programs_are_seen():
    """A process beside this one that computes all the time takes most of a CPU."""
    if measure.Others._busy() is None:
        pytest.skip("no /proc/stat: what other programs take is not known here")
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        watch = measure.Others()
        time.sleep(1.0)
        assert watch.took() > 0.3
    finally:
        beside.kill()
        beside.wait()
    assert measure.cpus() >= 1


def test_a_call_that_fails_costs_its_row(tiny, tmp_path, monkeypatch):
    """Memory that runs out while others are measured, in the rounds too."""
    honest = providers.PROVIDERS["fusedrnn"].make

    def hungry(calls):
        def make(given, mode):
            run, left = honest(given, mode).run, [calls]

            def call():
                left[0] -= 1
                if left[0] < 0:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
                return run()

            return providers.Runnable(call, "planted")

        return make

    for name, calls in (("at first", 1), ("in the rounds", 7)):
        provider = providers.Provider(name, "torch", lambda on: None, hungry(calls))
        monkeypatch.setitem(providers.PROVIDERS, name, provider)
    assert bench(tmp_path, "--peers", "at first,fusedrnn,in the rounds") == 0
    rows = rows_of(tmp_path)
    assert Counter((r["provider"], r["status"]) for r in rows) == {
        ("torch.nn", "ok"): 4, ("fusedrnn", "ok"): 4, ("at first", "failed"): 4, ("in the rounds", "failed"): 4,
    }  # fmt: skip
    for row in rows:
        if row["status"] == "failed":
            assert row["why"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB"
            assert row["median"] == row["speedup"] == ""
    monkeypatch.setattr(measure, "Gate", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("of float64")))
    assert bench(tmp_path / "gate") == 1
    assert {r["why"] for r in rows_of(tmp_path / "gate")} == {"of the float64 answer: OutOfMemoryError: of float64"}


def test_no_ratio_between_a_graph_and_a_call(tiny, tmp_path, monkeypatch):
    how = {"torch.nn": "CUDA graph", "fusedrnn": "CUDA events, not captured: planted"}
    monkeypatch.setattr(
        measure, "interleaved", lambda calls, *rest: {name: measure.Samples([0.1] * 3, how[name]) for name in calls}
    )
    assert bench(tmp_path) == 0
    assert {(r["provider"], r["speedup"]) for r in rows_of(tmp_path)} == {("torch.nn", "1.0"), ("fusedrnn", "")}
    page = (tmp_path / "report.html").read_text()
    assert "L2 is warm" in page


class Cards:
    """Two GPUs, the second of which this process sees as its first."""

    def __init__(self, monkeypatch, tmp_path):
        self.current, self.synchronized = [], []
        uuid = "0a1b-22"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronized.append)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"uuid": uuid})()
        )
        smi = tmp_path / "nvidia-smi"
        smi.write_text(
            "#!/bin/sh\n[ $1 = --id=GPU-0a1b-22 ] || exit 1\nsleep 0.1\n"
            "case $2 in *driver*) echo 580.1 ;; *) echo 1980, 2619, 1980 ;; esac\n"
        )
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_the_card_asked_for_is_the_one_measured(monkeypatch, tmp_path):
    cards = Cards(monkeypatch, tmp_path)
    for name, index in (("cuda:1", 1), ("cuda", 0), (None, 0)):
        assert runner.chosen_device(name) == torch.device("cuda", index)
    assert cards.current == [1, 0, 0]
    assert runner.chosen_device("cpu") == CPU
    for wrong in ("cuda:2", "mps"):
        with pytest.raises(ValueError, match=f"one of the . GPUs that are here.*got {wrong}"):
            runner.chosen_device(wrong)


def test_clocks_are_those_of_the_card_under_load(monkeypatch, tmp_path):
    cards, calls = Cards(monkeypatch, tmp_path), []
    device = torch.device("cuda", 1)
    assert results.clocks(device, lambda: calls.append(1)) == "sm, memory, largest sm: 1980, 2619, 1980"
    assert len(calls) == len(cards.synchronized) > 10
    assert results._of_card(device, "driver_version") == "580.1"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"uuid": "no"})())
    assert results.clocks(device) == ""


def test_a_fair_baseline_in_bfloat16(monkeypatch):
    """cuDNN as torch.nn calls it, with its weights in one buffer, and in float16."""
    monkeypatch.setattr(torch.version, "hip", None)
    for name in ("torch.nn:flattened", "torch.nn:float16"):
        assert "measured is cpu" in providers.PROVIDERS[name].why_not(CPU)
        with pytest.raises(providers.UnavailableError, match="what bfloat16 is compared with"):
            providers.PROVIDERS[name].make(providers.draw(TINY[1], CPU), "forward")
    problem = Problem("sweep", "gru", 5, 3, 8, 8, L=2, D=2, dtype="bfloat16")
    given, flattened = providers.draw(problem, CPU), []
    one_step = providers.draw(dataclasses.replace(problem, T=1, L=1, D=1), CPU)
    with pytest.raises(providers.UnavailableError, match=r"a Cell of torch\.nn does not go to cuDNN"):
        providers.PROVIDERS["torch.nn:float16"].make(one_step, "latency")
    gate = measure.Gate(problem, "train", CPU)
    run = providers.PROVIDERS["torch.nn:float16"].make(gate.given, "train")
    assert {t.dtype for t in run.run()} == {torch.float16}
    assert gate.check(run).right

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *arguments: flattened.append(arguments))
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: torch.no_grad())
    run = providers.PROVIDERS["torch.nn:flattened"].make(given, "forward")
    assert run.branch.endswith("weights in one buffer")
    ((weights, per, inputs, mode, hidden, projected, layers, batch_first, bidirectional),) = flattened
    assert [tuple(w.shape) for w in weights[:2]] == [(24, 8), (24, 8)]
    assert (per, inputs, hidden, projected, layers, batch_first, bidirectional) == (4, 8, 8, 0, 2, False, True)
    assert mode == torch.backends.cudnn.rnn.get_cudnn_mode("GRU")


def test_a_run_writes_rows_once(tiny, tmp_path, capsys, monkeypatch):
    assert bench(tmp_path) == 0
    rows = rows_of(tmp_path)
    jobs = {("lstm", "6", "forward"), ("lstm", "6", "train"), ("lstm", "1", "latency"), ("gru", "3", "forward")}
    assert {(r["cell"], r["T"], r["mode"]) for r in rows} == jobs
    assert {r["provider"] for r in rows} == {"torch.nn", "fusedrnn"}
    assert len(rows) == 8
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["least"]) <= float(row["quartile1"]) <= float(row["median"]) <= float(row["quartile3"])
        assert float(row["error"]) <= float(row["allowed"])
        assert float(row["speedup"]) == 1.0 or row["provider"] == "fusedrnn"
        assert float(row["speedup"]) == float(row["baseline"]) / float(row["median"])
        assert float(row["ratio1"]) <= float(row["ratio3"])
        assert row["torch"] == torch.__version__
        assert row["threads"] == str(torch.get_num_threads())
    printed = capsys.readouterr().out
    assert "8 rows of this machine and version" in printed
    assert "4 measurements with 20 s of rounds each at most, 2 providers" in printed
    assert printed.splitlines()[1].split("  ")[0] == "done"
    assert "time of a call" in printed.splitlines()[1]
    assert [line.split()[0] for line in printed.splitlines() if re.match(r"\d/4 ", line)] == [
        "1/4",
        "2/4",
        "3/4",
        "4/4",
    ]
    assert re.search(
        r"^fusedrnn is faster than torch.nn in \d of \d problems|^No time of fusedrnn", printed, re.MULTILINE
    )

    before = (tmp_path / "results.csv").read_bytes()
    assert bench(tmp_path, "--json") == 0
    assert (tmp_path / "results.csv").read_bytes() == before
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 8
    assert found["units"]["median"] == "seconds a call"
    assert set(found["units"]) <= set(found["rows"][0])

    monkeypatch.setattr(results, "commit", lambda: "later")
    assert bench(tmp_path) == 0
    assert Counter(r["commit"] for r in rows_of(tmp_path)) == {"test": 8, "later": 8}
    assert max(names(rows_of(tmp_path)).values()) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>sweep") == 2
    assert page.index("later") < page.index(">test<")


def test_a_wrong_or_failing_provider_is_not_timed(tiny, tmp_path, monkeypatch):
    honest = providers.PROVIDERS["fusedrnn"].make

    def wrong(given, mode):
        run = honest(given, mode).run
        return providers.Runnable(lambda: [t * 1.01 for t in run()], "planted")

    def failing(given, mode):
        raise ZeroDivisionError("planted\nin two lines")

    def inference(given, mode):
        if mode == "train":
            raise providers.UnavailableError("planted for inference only")
        return honest(given, mode)

    for name, make in (("wrong", wrong), ("failing", failing), ("inference", inference)):
        provider = providers.Provider(name, "torch", lambda on: None, make)
        monkeypatch.setitem(providers.PROVIDERS, name, provider)
    assert bench(tmp_path, "--peers", "fusedrnn,wrong,failing,inference") == 0
    rows = {(r["provider"], r["mode"]): r for r in rows_of(tmp_path) if r["cell"] == "lstm"}
    assert {rows["wrong", mode]["status"] for mode in ("forward", "train", "latency")} == {"wrong"}
    assert rows["failing", "train"]["why"] == "ZeroDivisionError: planted in two lines"
    assert rows["inference", "train"]["status"] == "unavailable"
    assert rows["inference", "forward"]["status"] == rows["fusedrnn", "train"]["status"] == "ok"
    for row in rows.values():
        assert bool(row["median"]) == bool(row["speedup"]) == (row["status"] == "ok")
    page = (tmp_path / "report.html").read_text()
    assert "planted for inference only" in page
    assert "ZeroDivisionError" in page
    count = len(rows_of(tmp_path))
    assert bench(tmp_path, "--peers", "fusedrnn,wrong,failing,inference") == 0
    assert len(rows_of(tmp_path)) == count

    # A wrong answer of our own is an exit status.
    monkeypatch.setitem(
        providers.PROVIDERS, "fusedrnn", dataclasses.replace(providers.PROVIDERS["fusedrnn"], make=wrong)
    )
    assert bench(tmp_path / "ours") == 1


def lines_of(folder: Path) -> list[str]:
    path = folder / "results.csv"
    return path.read_text().splitlines() if path.exists() else []


def test_a_killed_run_loses_and_doubles_nothing(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while len(lines_of(tmp_path)) < 5 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    kept = lines_of(tmp_path)
    assert 5 <= len(kept) < 13
    assert not (tmp_path / "report.html").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert lines_of(tmp_path)[: len(kept)] == kept
    rows = rows_of(tmp_path)
    assert len(rows) == 12
    assert set(names(rows).values()) == {1}
    assert Counter((row["T"], row["provider"]) for row in rows) == {
        (str(t), provider): 1 for t in range(1, 7) for provider in ("torch.nn", "fusedrnn")
    }
    assert (tmp_path / "report.html").exists()


def test_a_torn_line_is_repaired(tmp_path):
    whole = [a_row(T=t) for t in range(1, 4)]
    with Results(tmp_path) as written:
        written.append(whole)
    path = tmp_path / "results.csv"
    text = path.read_bytes()
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (*range(last, len(text), 37), len(text) - 1):
        path.write_bytes(text[:cut])
        with Results(tmp_path) as torn:
            assert torn.rows == whole[:2]
            torn.append(whole)
        assert path.read_bytes() == text
    for cut in (0, 10):
        path.write_bytes(text[:cut])
        with Results(tmp_path) as empty:
            empty.append(whole)
        assert path.read_bytes() == text


def test_a_results_file_is_for_one_run_and_one_version(tmp_path):
    row = a_row(why='a "quoted", text')
    with Results(tmp_path) as first:
        first.append([row, row])
        first.append([row])
        with pytest.raises(RuntimeError, match="another run is writing"):
            Results(tmp_path)
    with Results(tmp_path) as again:
        assert again.rows == [row]
    path = tmp_path / "results.csv"
    path.write_text(",".join(COLUMNS[1:]) + "\n")
    with pytest.raises(RuntimeError, match="has other columns"):
        Results(tmp_path)


def test_memory_is_that_of_a_training_step():
    why = measure.why_no_resident_peak()
    if why:
        pytest.skip(why)
    problem = Problem("sweep", "lstm", 256, 32, 128, 128)
    peak = measure.peak_in_child(problem, "fusedrnn", 1)
    gates = 256 * 32 * 4 * 128 * 4
    assert gates < peak < 6 * gates
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        measure.peak_in_child(problem, "nobody", 1)


def test_list_and_bad_arguments(capsys, monkeypatch):
    assert main(["bench", "--list", "--quick", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"][:2] == ["torch.nn", "fusedrnn"]
    assert found["left_out"]["haste"] in ("not installed: haste_pytorch", "it runs on cuda only, measured is cpu")
    assert "simulator" in found["left_out"]["fusedrnn:triton:step"]
    for arguments, message in (
        (["--peers", "nobody"], "peers must be of torch.nn, .*fusedrnn.*got nobody"),
        (["--peers", "fusedrnn:triton:step"], "was asked for but cannot run: on the CPU it runs in a simulator"),
        (["--modes", "sideways"], "modes must be of forward, train, latency, memory, got sideways"),
        (["--rounds", "0"], "must be at least 1, got 0"),
    ):
        assert main(["bench", "--device", "cpu", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--device", "cpu", "--peers", "fusedrnn"]) == 2
    assert "bench needs matplotlib, plotly, tqdm: pip install 'fusedrnn[bench]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report_module.write_report(some_rows(), {"haste": "not installed: haste_pytorch"}, folder)
    return folder


def test_report_holds_every_plot_and_number(report):
    page = (report / "report.html").read_text()
    charts = sorted(path.name for path in report.glob("*.svg"))
    assert charts == [f"1-sweep-float32-{name}.svg" for name in ("B", "T", "memory", "ratios", "roofline")]
    head = page[: page.index("plotly.js v")]  # that library names addresses of its own, and none is asked for
    assert head.count("<figure ") == head.count('<div class="still"') == head.count("<svg ") == len(charts)
    assert not re.search(r'(src|href)="(?!data:|#)', head)
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=.?http", page)
    assert "off by 1 &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "not installed: haste_pytorch" in page
    assert "<td>1.50</td><td>1.50</td><td>1.50</td>" in page
    ids = re.findall(r'\bid="([^"]+)"', head)
    assert len(ids) == len(set(ids)), "two drawings share an id"


def test_report_opens_with_the_result(report):
    """Everybody's ratio is planted; what a letter or a name means is on the page."""
    page = (report / "report.html").read_text()
    first = page.index(
        "fusedrnn is faster than torch.nn in 24 of 24 problems, 1.50 times as fast in the geometric mean"
    )
    assert first < page.index("Measured on 2 threads of a processor, float32, torch 2.14.1") < page.index("<svg ")
    assert (
        "onnxruntime: 1.20 times as fast as torch.nn in the geometric mean of the 24 problems where both have a time "
        "to trust; fusedrnn has 1.50 there." in page
    )
    for words in ("<b>H</b> is the hidden size", "<b>B</b> the batch", "<b>T</b> the steps", "<dt>oneDNN</dt>"):
        assert words in page
    assert "not to be trusted" not in page


def spoil(rows: list[Row], **where) -> list[Row]:
    """One row of ONNX Runtime 431 times as fast, in rounds that say otherwise."""
    place = {"provider": "onnxruntime", "cell": "gru", "mode": "forward", "H": 512, "B": 16} | where
    hit = lambda r: all(getattr(r, name) == value for name, value in place.items())
    assert sum(map(hit, rows)) == 1
    wild = {
        "speedup": 431.89,
        "ratio1": 0.9,
        "ratio3": 500.0,
        "spoiled": "the ratio within the rounds is 0.90 to 500.00",
    }
    return [dataclasses.replace(r, **wild) if hit(r) else r for r in rows]


def test_what_was_spoiled_is_shown_and_not_counted(tmp_path):
    report_module.write_report(spoil(some_rows()), {}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "1 of 72 times are not to be trusted (the ratio of the two times is not that within the rounds)" in page
    assert "1.20 times as fast as torch.nn in the geometric mean of the 23 problems" in page
    assert page.count('class="spoiled"') == 1
    assert '"onnxruntime, spoiled"' in page
    assert "circle-open" in page
    bold = re.findall(r'class="best"[^>]*>[^<]*', page)
    assert len(bold) == 24
    assert all("1.50" in cell for cell in bold)


def test_verdicts():
    rows = [a_row(provider="fusedrnn", H=h, I=h, speedup=s, ratio1=low, ratio3=high) for h, s, low, high in (
        (64, 2.0, 1.5, 2.5), (128, 1.1, 0.9, 1.2), (256, 0.5, 0.4, 0.6))]  # fmt: skip
    (text,) = report_module.in_words(rows)
    assert text.startswith("fusedrnn is faster than torch.nn in 1 of 3 problems, 1.03 times as fast")
    assert "Level, within the scatter of the rounds, in 1: LSTM H=128 B=16 T=64, inference (1.10)." in text
    assert text.endswith("Slower in 1: LSTM H=256 B=16 T=64, inference (0.50).")
    lost = dataclasses.replace(rows[2], spoiled="a test")
    assert report_module.in_words([*rows[:2], lost])[0].endswith(
        "Slower in none. 1 more were spoiled and are left out."
    )
    assert report_module.in_words([lost])[0].startswith("No time of fusedrnn beside torch.nn that could be judged")


def test_a_panel_has_a_line_for_each_provider():
    """Lines join problems that differ in one size alone, and the legend names every line."""
    chart = report_module.multiples([r for r in some_rows() if r.mode != "memory" and r.status == "ok"], "B", "b")
    assert [panel.title for panel in chart.panels] == [
        "LSTM, inference, H=256 T=64", "GRU, inference, H=256 T=64", "LSTM, training step, H=256 T=64",
        "GRU, training step, H=256 T=64",
    ]  # fmt: skip
    for panel in chart.panels:
        assert [series.name for series in panel.series] == ["torch.nn", "fusedrnn", "onnxruntime"]
        assert all(series.x == [1, 16, 64] for series in panel.series)
    assert list(chart.names()) == ["torch.nn", "fusedrnn", "onnxruntime"]
    assert report_module.multiples(some_rows()[:1], "H", "h") is None


def test_a_resumed_ratio_is_to_a_time_of_its_own(tmp_path):
    rows = [a_row(), a_row(provider="fusedrnn", median=5e-4, speedup=4.0, baseline=2e-3)]
    report_module.write_report(rows, {}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "torch.nn in the same rounds: 2 ms" in page
    assert "† torch.nn was timed again beside it" in page


def test_compare(tmp_path, capsys):
    first = [r for r in some_rows() if r.mode != "memory"]
    later = [
        dataclasses.replace(r, commit="later", median=r.median and r.median / 2) for r in first if r.cell == "lstm"
    ]
    for name, rows in (("a", first), ("b", spoil(later, cell="lstm")), ("c", [a_row(T=3)])):
        with Results(tmp_path / name) as written:
            written.append(rows)
    files = {name: str(tmp_path / name / "results.csv") for name in "abc"}
    assert main(["bench", "--compare", files["a"], files["b"], "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"B: {files['b']}: fusedrnn 0.1.0 (later), torch 2.14.1" in printed
    assert "fusedrnn: B is 2.00 times as fast as A in the geometric mean of 12 problems." in printed
    assert "onnxruntime: B is 2.00 times as fast as A in the geometric mean of 11 problems." in printed
    assert printed.count("SPOILED") == 1
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("B is 2.00 times as fast as A") < page.index("<svg ")
    assert main(["bench", "--compare", files["a"], files["c"], "--out", str(tmp_path / "out")]) == 2
    assert "have no problem, mode and provider in common" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    for text in ("", "a,b\n1,2\n"):
        other.write_text(text)
        assert main(["bench", "--compare", files["a"], str(other)]) == 2
        assert f"{other} has other columns than this version writes" in capsys.readouterr().err
    assert main(["bench", "--compare", files["a"], str(tmp_path / "none.csv")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_list_says_what_a_run_does(capsys):
    """The same providers and jobs as the run with the same options."""
    assert main(["bench", "--list", "--quick", "--device", "cpu", "--peers", "fusedrnn"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("bench --suite deepbench --quick measures 13 problems, ")
    count = int(re.search(r"measures 13 problems, (\d+) with modes", printed)[1])
    assert count == sum(len(p.modes) for p in problems.suite("deepbench", quick=True))
    assert re.search(r"^and takes turns among:\n  torch.nn\n  fusedrnn\n", printed, re.MULTILINE)


def test_help_describes_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    printed = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    for action in parser._actions:
        assert action.help, action.option_strings
    for name in ("--suite", "--dtype", "--rounds", "--threads", "--out", "--seconds", "--peers", "--device", "--modes"):
        part = re.split(r"\n  --", printed[printed.index(f"\n  {name} ") + 3 :])[0]
        assert "default: " in " ".join(part.split()), name


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page is not opened in a browser")
def test_report_opens_in_a_browser(report, tmp_path):
    """A copy of the page with a script that counts what was drawn and listens for errors."""
    probe = """<script>window.onerror=e=>document.body.dataset.failed=e;
    window.onload=()=>{document.body.dataset.drawn=document.querySelectorAll('figure.drawn svg.main-svg').length>4;
    document.body.dataset.points=document.querySelectorAll('figure .live .point').length;
    document.body.dataset.wide=document.documentElement.scrollWidth>innerWidth}</script></head>"""
    page = tmp_path / "report.html"
    page.write_text((report / "report.html").read_text().replace("</head>", probe, 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400", "--dump-dom"]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'data-drawn="true"' in done.stdout
    # 2 x 24 ratios, 2 charts of 3 x 12, 72 on the roofline, 36 of memory.
    assert 'data-points="228"' in done.stdout
    assert 'data-wide="false"' in done.stdout
    assert "data-failed" not in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_quantized_layers_are_checked_and_timed(capsys, monkeypatch):
    sizes = ["--hidden", "24", "16", "--batch", "2", "--steps", "5", "--rounds", "3"]
    assert quantized.main([*sizes, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["cell"], r["H"], r["B"], r["T"]) for r in rows] == [
        (c, h, 2, 5) for c in quantized.CELLS for h in (24, 16)
    ]
    for row in rows:
        assert row["error"].keys() >= row["seconds"].keys() >= {"torch.nn", *(f"fusedrnn {d}" for d in quantized.OURS)}
        exact, *fewer_bits = (row["error"][f"fusedrnn {kind}"] for kind in quantized.OURS)
        assert exact < 1e-6 < fewer_bits[0]
        assert fewer_bits == sorted(fewer_bits)
        assert all(t > 0 for t in row["seconds"].values())
    assert quantized.main([*sizes, "--cell", "GRU"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| GRU 24 / 2 / 5 |") == printed.count("| GRU 16 / 2 / 5 |") == 2
    assert quantized.main(["--rounds", "0"]) == 2
    # Who is wrong is not timed; we must not be.
    monkeypatch.setattr(quantized, "torchs", lambda layer: lambda x: (torch.zeros_like(x),))
    row = quantized.problem("GRU", 8, 1, 2, 1, 1.0)
    assert "torch int8" not in row["seconds"]
    assert quantized.is_wrong(row) == ["GRU 8 / 1 / 2: torch int8 is off by 1.0e+00 of the output, and is not timed"]
    monkeypatch.setattr(quantized, "ours", lambda layer, kind: lambda x: (torch.zeros_like(x),))
    with pytest.raises(RuntimeError, match=r"fusedrnn float32 is off by 1\.0e\+00 of the output, GRU H=8"):
        quantized.problem("GRU", 8, 1, 2, 1, 1.0)


@pytest.mark.skipif(_build._small_calls is None, reason="small calls: not built, or not for this torch")
def test_small_calls_are_checked_and_timed(capsys, monkeypatch):
    before = _build._calls
    assert small_calls.main(["--rounds", "1", "--only", "T=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["call"], r["H"]) for r in rows] == [(c, h) for c in ("LSTM T=1", "GRU T=1") for h in small_calls.WIDTHS]
    for row in rows:
        assert row["forward"].keys() == row["train"].keys() == small_calls.ways().keys() >= {"torch.nn", "wheel"}
        assert all(0 < row["forward"][name] < row["train"][name] for name in row["train"])
    assert _build._calls is before
    assert small_calls.main(["--only", "none"]) == 2
    # Who is wrong is not timed.
    monkeypatch.setattr(
        small_calls.fusedrnn.GRU, "forward", lambda self, x: (torch.zeros(1, 1, self.hidden_size), None)
    )
    with pytest.raises(RuntimeError, match="wheel, GRU T=1, H=8 is off by"):
        small_calls.time_problem("GRU T=1", 8, False, 1)
