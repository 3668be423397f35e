"""What a small call costs: ``python -m fusedrnn.benchmarks.calls``.

One thread, sizes whose kernels take a few microseconds, so that what is measured is the way to them: torch.nn's; ours
as the wheel has it, by the calls of ``_C``; and ours with ``_direct``, which a source build for this torch brings.
"""

import argparse
import contextlib
import copy
import json
import random
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import _build

from . import measure

WIDTHS = (8, 128)
PROBLEMS = ("LSTMCell", "LSTM T=1", "GRU T=1", "LSTM packed T=4")
BLOCK = 2e-3  # seconds that calls are timed together for


def ways() -> dict[str, object]:
    """Name -> what makes whole calls (fusedrnn._build._calls); None is torch.nn."""
    found = {"torch.nn": None, "wheel": _build._small_calls}
    if _build._calls is not None and _build._calls is not _build._small_calls:
        found["_direct"] = _build._calls
    return found


@contextlib.contextmanager
def calls_by(way):
    before = _build._calls
    _build._calls = before if way is None else way
    try:
        yield
    finally:
        _build._calls = before


def pair(problem: str, width: int) -> tuple[nn.Module, nn.Module, Tensor | PackedSequence]:
    """torch.nn's module and ours with its weights, and an input, of batch 1; packed, of lengths 4 and 2."""
    torch.manual_seed(0)
    name = problem.split()[0]
    theirs, ours = (getattr(library, name)(width, width) for library in (nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    if problem.endswith("packed T=4"):
        return theirs, ours, pack_padded_sequence(torch.randn(4, 2, width), [4, 2])
    return theirs, ours, torch.randn(*((1,) if name.endswith("Cell") else (1, 1)), width)


def first(result) -> Tensor:
    """y of a layer, h of a cell."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def call_of(module: nn.Module, x, train: bool) -> Callable[[], list[Tensor]]:
    """One call, and with ``train`` the gradients of all weights; returns what it computed."""
    if not train:

        def forward():
            with torch.no_grad():
                return [first(module(x))]

        return forward
    weights = list(module.parameters())
    ones = torch.ones_like(first(module(x)))

    def both():
        y = first(module(x))
        return [y.detach(), *torch.autograd.grad(y, weights, ones)]

    return both


def check(name: str, got: list[Tensor], exact: list[Tensor]) -> None:
    for g, e in zip(got, exact, strict=True):
        error, scale = (g.double() - e).abs().max().item(), max(1.0, e.abs().max().item())
        if not error <= 1e-5 * scale:
            raise RuntimeError(f"{name} is off by {error:.1e}: it is not timed")


def time_problem(problem: str, width: int, train: bool, rounds: int) -> dict[str, float]:
    """Seconds of a call by every way: the least of the rounds, in which all take turns.

    It is the time of this thread, in which backward runs as well: what others take of its core does not count.
    """
    theirs, ours, x = pair(problem, width)
    exact = call_of(copy.deepcopy(theirs).double(), x.to(torch.float64), train)()
    calls, counts = {}, {}
    for name, way in ways().items():
        calls[name] = way, call_of(theirs if way is None else ours, x, train)
        with calls_by(way):
            check(f"{name}, {problem}, H={width}", calls[name][1](), exact)
            for _ in range(20):
                calls[name][1]()
            start = time.thread_time()
            for _ in range(20):
                calls[name][1]()
            counts[name] = max(1, int(BLOCK / (time.thread_time() - start) * 20))
    least, order = dict.fromkeys(calls, float("inf")), list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            way, call = calls[name]
            with calls_by(way):
                start = time.thread_time()
                for _ in range(counts[name]):
                    call()
                least[name] = min(least[name], (time.thread_time() - start) / counts[name])
    return least


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.benchmarks.calls", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=100, help="turns of everybody (default: %(default)s)")
    add("--only", default="", metavar="TEXT", help=f"of {', '.join(PROBLEMS)} those that contain it (default: all)")
    add("--json", action="store_true", help="print rows as JSON, times in seconds")
    arguments = parser.parse_args(argv)
    chosen = [problem for problem in PROBLEMS if arguments.only in problem]
    if arguments.rounds < 1 or not chosen:
        print("error: --rounds must be at least 1, and --only part of a name", file=sys.stderr)
        return 2
    if _build._small_calls is None:
        print(f"error: there are no calls to time: {_build.why_not_loaded() or 'torch is too old'}", file=sys.stderr)
        return 2
    rows, names = [], list(ways())
    with measure.settings(1, False):
        if not arguments.json:
            heads = [f"{name}{of}" for of in ("", ", gradients") for name in names]
            print(f"torch {torch.__version__}, one thread, microseconds a call\n")
            print("| call | " + " | ".join(heads) + " |")
            print("|---" * (1 + len(heads)) + "|")
        for problem in chosen:
            for width in WIDTHS:
                found = [time_problem(problem, width, train, arguments.rounds) for train in (False, True)]
                rows.append({"call": problem, "H": width, "forward": found[0], "train": found[1]})
                if not arguments.json:
                    times = [f"{1e6 * times[name]:.0f}" for times in found for name in names]
                    print(f"| {problem}, H={width} | " + " | ".join(times) + " |", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
