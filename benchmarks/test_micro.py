"""The micro level, with pytest-benchmark: ``pytest benchmarks/ --benchmark-json=micro.json``.

``--benchmark-autosave`` keeps every run under .benchmarks/, ``--benchmark-compare`` sets the next one against it.
"""

import pytest
import torch

from fusedrnn.benchmarks.measure import Gate
from fusedrnn.benchmarks.problems import Problem
from fusedrnn.benchmarks.providers import PROVIDERS, draw

CASES = {
    "lstm-forward": (Problem("micro", "lstm", 25, 1, 256, 256), "forward"),
    "lstm-train": (Problem("micro", "lstm", 25, 16, 256, 256), "train"),
    "gru-forward": (Problem("micro", "gru", 25, 4, 256, 256), "forward"),
    "lstm-one-step": (Problem("micro", "lstm", 1, 1, 256, 256), "latency"),
    "gru-one-step": (Problem("micro", "gru", 1, 1, 256, 256), "latency"),
}


@pytest.mark.parametrize("provider", ["torch.nn", "fusedrnn"])
@pytest.mark.parametrize("case", CASES)
def test_micro(benchmark, case, provider):
    problem, mode = CASES[case]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gate = Gate(problem, mode, device)
    runnable = PROVIDERS[provider].make(draw(problem, device), mode)
    check = gate.check(runnable)
    assert check.right, check

    def call():
        runnable.run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case
    benchmark.extra_info |= {"branch": runnable.branch, "problem": problem.name, "torch": torch.__version__}
    benchmark(call)
