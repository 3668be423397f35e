"""fusedrnn.LSTM against torch.nn.LSTM on the CPU, over a subset of DeepBench.

Both get the same weights and inputs, results are compared before anything is timed, and the rounds of the two
alternate within one process. The ratio is the median over rounds of torch's time by ours: above 1, ours is faster.

    python benchmarks/cpu_subset.py [--rounds 15] [--threads N] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import fusedrnn

# what, hidden (and input) size, batch, steps
PROBLEMS = [
    ("inference", 512, 1, 25),
    ("inference", 1024, 1, 25),
    ("inference", 256, 1, 150),
    ("inference", 256, 16, 150),
    ("training", 512, 16, 25),
    ("training", 256, 16, 150),
]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def setup(what: str, hidden: int, batch: int, steps: int):
    """Two calls without arguments, torch's and ours; each returns the tensors to compare."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(hidden, hidden)
    ours = fusedrnn.LSTM(hidden, hidden)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(steps, batch, hidden, requires_grad=what == "training")
    dy = torch.randn(steps, batch, hidden)

    def infer(layer):
        with torch.no_grad():
            y, (h_n, c_n) = layer(x)
        return y, h_n, c_n

    def train(layer):
        y, (h_n, c_n) = layer(x)
        return y.detach(), h_n.detach(), c_n.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    call = infer if what == "inference" else train
    return lambda: call(theirs), lambda: call(ours)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(problem: tuple, rounds: int) -> dict:
    theirs, ours = setup(*problem)
    for a, b in zip(theirs(), ours()):
        # Sums over all steps: the tolerance scales with what was summed.
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * max(1.0, float(a.abs().max())))
    times = []
    for i in range(rounds + 2):
        pair = (timed(theirs), timed(ours)) if i % 2 else (timed(ours), timed(theirs))[::-1]
        times.append(pair)
    times = times[2:]
    what, hidden, batch, steps = problem
    return {
        "what": what,
        "hidden": hidden,
        "batch": batch,
        "steps": steps,
        "torch_ms": statistics.median(a for a, _ in times) * 1e3,
        "fusedrnn_ms": statistics.median(b for _, b in times) * 1e3,
        "ratio": statistics.median(a / b for a, b in times),
        "ratio_of_best": min(a for a, _ in times) / min(b for _, b in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = fusedrnn.build_info()
    if not info["extension"]:
        sys.exit(f"the C++ extension is not loaded: {info['extension_why']}")
    print(f"torch {torch.__version__}, {args.threads} threads, {cpu_model()}, {info['cpu_capability']}")
    print(f"{'':10}{'hidden':>7}{'batch':>6}{'steps':>6}{'torch ms':>10}{'ours ms':>9}{'ratio':>7}{'best/best':>11}")
    results = []
    for problem in PROBLEMS:
        r = measure(problem, args.rounds)
        results.append(r)
        print(
            f"{r['what']:10}{r['hidden']:7}{r['batch']:6}{r['steps']:6}{r['torch_ms']:10.2f}{r['fusedrnn_ms']:9.2f}"
            f"{r['ratio']:7.2f}{r['ratio_of_best']:11.2f}",
            flush=True,
        )
    if args.json:
        about = {"torch": torch.__version__, "threads": args.threads, "cpu": cpu_model(), "build": info}
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
