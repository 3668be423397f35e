"""How it is measured: a correctness gate, rounds in which everybody takes turns, and the peak of memory.

On a CPU a sample is wall-clock time; on a GPU it is the time between two CUDA events around the replay of a CUDA
graph, so that it holds what the device does and not what Python does.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import mkldnn

from .problems import Problem
from .providers import PROVIDERS, Given, Runnable, draw, loop_call

# A right answer is at most twice as far from float64 as plain torch operations in the same dtype are, plus some units
# of roundoff (32 in float32, where sums over all steps run in another order; 8 else); a wrong one is off by thousands.
FACTOR = 2.0
LEAST_ALLOWED = {
    "float64": 1e-12,
    "float32": 32 * 2.0**-24,
    "tf32": 8 * 2.0**-10,
    "bfloat16": 2.0**-5,
    "float16": 2.0**-8,
}
# The float64 answer of a longer problem would take minutes on a CPU: it is checked over fewer steps.
MOST_CHECKED_FLOPS = 10e9
SHORTEST_SAMPLE, WARM_UP, MOST_WARM_UPS = 1e-3, 5e-3, 4
PAUSE, MOST_PAUSES = 0.01, 20
CHILD_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Check:
    """The largest error of a provider (by the largest entry of the tensor) and what is allowed."""

    error: float
    allowed: float
    steps: int

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


class Gate:
    """The float64 answers of one problem in one mode, and how far off plain operations in its dtype are."""

    def __init__(self, problem: Problem, mode: str, device: torch.device):
        steps = max(1, int(problem.T * min(1.0, MOST_CHECKED_FLOPS / problem.flops(mode))))
        self.mode, self.problem = mode, replace(problem, T=steps)
        self.given = draw(self.problem, device)
        wide = Given(self.problem, *(_double(v) for v in (self.given.state, self.given.x, self.given.dy)))
        self.exact = _answer(loop_call(wide, mode))
        self.errors = self._errors(_answer(loop_call(self.given, mode)))
        tf32 = device.type == "cuda" and problem.dtype == "float32" and torch.backends.cudnn.allow_tf32
        self.least = LEAST_ALLOWED["tf32" if tf32 else problem.dtype]

    def _errors(self, got: list[Tensor | None]) -> list[float | None]:
        """None for a tensor that cannot be compared."""
        if len(got) != len(self.exact):
            raise ValueError(f"{len(self.exact)} tensors are compared, got {len(got)}")
        errors = []
        for a, b in zip(got, self.exact):
            if a is not None and a.shape != b.shape:
                raise ValueError(f"a tensor must be {list(b.shape)}, got {list(a.shape)}")
            error = None if a is None else ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
            errors.append(float("inf") if error is not None and not a.isfinite().all() else error)
        return errors

    def check(self, runnable: Runnable) -> Check:
        """The tensor that comes nearest to its limit, or passes it furthest."""
        errors = self._errors(_answer(runnable.run))
        pairs = [(e, FACTOR * base + self.least) for e, base in zip(errors, self.errors) if e is not None]
        error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
        return Check(error, allowed, self.problem.T)


def _double(value):
    return {k: w.double() for k, w in value.items()} if isinstance(value, dict) else value.double()


def _answer(run: Callable[[], list]) -> list[Tensor | None]:
    return [None if t is None else torch.as_tensor(t).detach().double().cpu() for t in run()]


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, a number a round; ``how`` they were taken."""

    seconds: list[float]
    how: str

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)


def _wall_clock(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_events(run: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def captured(run: Callable, pool=None) -> tuple[Callable, str]:
    """(the replay of a CUDA graph of a call, how it is timed); the call itself where it cannot be captured. Graphs of
    one pool share what they need while they run: they take turns.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            kept = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, f"CUDA events, not captured: {str(error).splitlines()[0]}"

    def replay():
        graph.replay()
        return kept

    return replay, "CUDA graph"


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def give_memory_back(device: torch.device) -> None:
    """What a call that failed held is free for the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rest() -> None:
    """Sleeps until this process's threads do."""
    for _ in range(MOST_PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 5:
            return


def interleaved(
    runs: dict[str, Callable], rounds: int, budget: float, device: torch.device
) -> dict[str, Samples | str]:
    """Times every call once a round, in an order that turns from round to round; what a call failed with, in words.

    Calls shorter than 1 ms are repeated within a sample. At least 3 rounds, at most ``rounds``, and no more than
    fit in ``budget`` seconds. Before a sample on a CPU there is a pause, in which the threads of the one before (every
    library has its own, and they spin for a while when they have nothing to do, ONNX Runtime's for 40 ms) fall asleep,
    and calls to warm up, for 5 ms or 4 of them: on a virtual machine threads that slept take some calls to be back.
    Caches, a GPU's L2 among them, are as the call before and the warm-up left them.
    """
    cuda = device.type == "cuda"
    timer = _on_events if cuda else _wall_clock
    calls, how, seconds, failed = {}, {}, {}, {}
    pool = torch.cuda.graph_pool_handle() if cuda else None

    def sample(name: str, count: int, warm_ups: int = 1) -> float:
        run = calls[name]
        if not cuda:
            rest()
        for _ in range(warm_ups):
            run()
        return timer(run if count == 1 else lambda: [run() for _ in range(count)]) / count

    def attempt(name: str, action: Callable):
        """What it returns; None, and the call takes no part any more, where it fails."""
        try:
            return action()
        except Exception as error:  # a row like any other, above all where memory runs out
            failed[name] = in_words(error)
        calls.pop(name, None)
        give_memory_back(device)
        return None

    first, paused = {}, 0.0
    for name, run in runs.items():
        made = attempt(name, lambda run=run: captured(run, pool) if cuda else (run, "wall clock"))
        if made is not None:
            calls[name], how[name] = made
            first[name] = attempt(name, lambda name=name: min(sample(name, 1) for _ in range(2)))
            start = time.perf_counter()
            if not cuda:
                rest()
            paused += time.perf_counter() - start
    first = {name: took for name, took in first.items() if took is not None}
    repeats = {name: max(1, math.ceil(SHORTEST_SAMPLE / max(t, 1e-7))) for name, t in first.items()}
    warm_ups = {name: min(max(1, math.ceil(WARM_UP / max(t, 1e-7))), MOST_WARM_UPS) for name, t in first.items()}
    cost = sum(t * (warm_ups[name] + repeats[name]) for name, t in first.items()) + paused
    rounds = max(3, min(rounds, int(budget / max(cost, 1e-6))))
    seconds = {name: [] for name in first}
    for k in range(rounds):
        names = list(calls)
        turn = k % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(attempt(name, lambda name=name: sample(name, repeats[name], warm_ups[name])))
    return {name: failed.get(name) or Samples(seconds[name], how[name]) for name in runs}


class Ratio(NamedTuple):
    """How many times as fast as the baseline: the baseline's median by the other's, so it never contradicts the times.

    ``low`` and ``high`` are the quartiles over rounds of the quotient of the two times of a round.
    """

    value: float
    low: float
    high: float


def speedup(baseline: Samples, other: Samples) -> Ratio:
    rounds = Samples([a / b for a, b in zip(baseline.seconds, other.seconds)], "")
    return Ratio(baseline.quantile(0.5) / other.quantile(0.5), rounds.quantile(0.25), rounds.quantile(0.75))


# The middle half of the rounds of a quiet machine lies within some percent of the median.
MOST_SPREAD, MOST_OTHERS = 0.3, 0.15


def spoiled(own: Samples, baseline: Samples | None, ratio: Ratio | None, others: float | None, free: int) -> str:
    """Why a time, or its ratio to the baseline, is not to be trusted; empty where nothing speaks against it.

    ``others``: CPUs that other programs took meanwhile; ``free``: CPUs that the measured calls leave to them.
    """
    reasons = []
    if others is not None and others > free + MOST_OTHERS:
        reasons.append(f"other programs took {others:.1f} CPUs, {free} were free")
    for name, samples in {"": own, "of torch.nn ": baseline or own}.items():
        spread = (samples.quantile(0.75) - samples.quantile(0.25)) / samples.quantile(0.5)
        if spread > MOST_SPREAD and (not name or samples is not own):
            reasons.append(f"the middle half of the rounds {name}spreads over {spread:.0%} of the median")
    if ratio is not None and not ratio.low * 0.98 <= ratio.value <= ratio.high * 1.02:
        reasons.append(f"the ratio within the rounds is {ratio.low:.2f} to {ratio.high:.2f}")
    return "; ".join(reasons)


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Others:
    """CPUs that other programs took since this was made, of those that this process may run on (Linux's /proc/stat)."""

    def __init__(self):
        self.start = time.perf_counter(), self._busy(), time.process_time()

    @staticmethod
    def _busy() -> float | None:
        path = Path("/proc/stat")
        if not path.exists():
            return None
        mine, total = {f"cpu{k}" for k in os.sched_getaffinity(0)}, 0
        for line in path.read_text().splitlines():
            name, *fields = line.split()
            if name in mine:
                user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
                total += user + nice + system + irq + softirq + steal
        return total / os.sysconf("SC_CLK_TCK")

    def took(self) -> float | None:
        """None where it is not known."""
        wall, busy, own = self.start
        now = self._busy()
        if busy is None or now is None:
            return None
        # The kernel counts in hundredths of a second.
        return max(0.0, (now - busy - (time.process_time() - own) - 0.02) / max(time.perf_counter() - wall, 0.05))


def peak_on_gpu(run: Callable, device: torch.device) -> int:
    """Bytes that torch's allocator held at most during a call, above what it held before."""
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def why_no_resident_peak() -> str | None:
    """Why the peak of resident memory cannot be read here; None where it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "the peak of resident memory is read from Linux's /proc, which is not here"
    return None


def peak_in_child(problem: Problem, provider: str, threads: int) -> int:
    """Bytes by which the resident memory of a process of its own grows at most during a training step.

    The process has run the step once before, and its allocator gives memory back at once, so the peak holds what the
    step itself needs, in whatever library.
    """
    about = json.dumps({"problem": asdict(problem), "provider": provider, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "fusedrnn.benchmarks.measure", about],
        capture_output=True,
        text=True,
        env=os.environ | CHILD_SETTINGS,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _child(about: dict) -> int:
    torch.set_num_threads(about["threads"])
    problem = Problem(**about["problem"] | {"modes": tuple(about["problem"]["modes"])})
    run = PROVIDERS[about["provider"]].make(draw(problem, torch.device("cpu")), "memory").run
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


@contextlib.contextmanager
def settings(threads: int, tf32: bool):
    """Threads of torch, and whether float32 products may be tf32, for everybody; restored afterwards."""
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[1:]


def cpu_peaks(dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second of a large matrix product in ``dtype``, bytes a second of a large copy), both measured."""
    a, b = (torch.rand(1536, 1536).to(dtype) for _ in range(2))
    products = [lambda: nn.functional.linear(a, b)]
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch.mm is MKL's, which on an AMD processor is behind oneDNN's, which torch.nn's layers use.
        layer = mkldnn.to_mkldnn(nn.Linear(1536, 1536, bias=False))
        given = a.to_mkldnn()
        products.append(lambda: layer(given))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        product = min(_wall_clock(one) for _ in range(10) for one in products)
    source = torch.zeros(64 << 20)
    target = torch.empty_like(source)
    copy = min(_wall_clock(lambda: target.copy_(source)) for _ in range(10))
    return 2 * 1536**3 / product, 2 * source.numel() * 4 / copy


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _child(json.loads(sys.argv[1]))}))
