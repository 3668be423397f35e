"""The command line: info and selftest, and that the selftest notices a wrong kernel."""

import json
import subprocess
import sys

import pytest
import torch

from fusedrnn import __main__ as command
from fusedrnn import planning, selftest


def test_selftest_runs_every_kernel_that_can_run(capsys):
    assert command.main(["selftest", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    agree = {(r["backend"], r["algorithm"], r["math"]) for r in results if r["verdict"] == "agrees"}
    for backend, algorithms in selftest.BACKEND_ALGORITHMS.items():
        runs = planning.machine().reason(backend) is None
        for algorithm in algorithms[1:] or algorithms:
            assert ((backend, algorithm, "bfloat16") in agree) == runs, (backend, algorithm)


@pytest.mark.parametrize("wrong", ["y", "dw_hh", "nan"])
def test_selftest_notices_a_wrong_kernel(wrong, monkeypatch, capsys):
    honest = selftest._run

    def dishonest(cell, tensors, sizes, reverse, backend, algorithm):
        found = honest(cell, tensors, sizes, reverse, backend, algorithm)
        if backend == "reference" and tensors[0].dtype == torch.float32:
            if wrong == "nan":
                found[0][0] = float("nan")
            else:
                place = found[0 if wrong == "y" else 7].view(-1)
                place[0] += 1e-3 * place.abs().max()
        return found

    monkeypatch.setattr(selftest, "_run", dishonest)
    monkeypatch.setattr(selftest, "BACKEND_ALGORITHMS", {"reference": ("auto",)})
    monkeypatch.setattr(selftest, "BUILT_IN", ("lstm",))
    assert command.main(["selftest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines if "DIFFERS" in line] == ["float32"]
    assert lines[-1].endswith("1 wrong")


def test_info_from_a_shell():
    done = subprocess.run([sys.executable, "-m", "fusedrnn", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch_running"] == torch.__version__
    assert found["gpus"] == [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    done = subprocess.run([sys.executable, "-m", "fusedrnn", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_what_cannot_run_here_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "BUILT_IN", ("gru",))
    why = lambda backend, problem, machine: None if backend == "reference" else f"{backend} is not here"
    monkeypatch.setattr(planning, "unsupported", why)
    assert command.main(["selftest"]) == 0
    *lines, left_out, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("agrees" in line for line in lines)
    assert left_out.startswith("left out: 24 checks that cannot run here (")
    assert "triton: triton is not here" in left_out
    assert last.startswith("4 agree with float64 on ")


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-m", "fusedrnn", "bench", "--list", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.read(1)
    running.stdout.close()
    assert running.stderr.read() == b""
    running.wait()
