"""The suite's one runner: ``python -m fusedrnn bench``."""

import argparse
import importlib.util
import itertools
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import measure, problems, providers
from .problems import Problem
from .results import UNITS, Results, Row, clocks, environment, parse

QUICK_SECONDS, SECONDS = 3.0, 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    split = lambda text: [part for part in text.split(",") if part]
    add = parser.add_argument
    add("--suite", choices=(*problems.SUITES, "slstm"), default="deepbench",
        help="the problems: deepbench (Baidu's list of sizes), users (layers of popular projects), flashrnn (that "
        "paper's figure), fastrnns (PyTorch's own benchmark), sweep (one size after another around H=256), "
        "slstm (beside flashrnn); default: %(default)s")  # fmt: skip
    add("--quick", action="store_true", help="the part of the suite that two cores measure in minutes (default: all)")
    add("--peers", type=split, metavar="A,B", help="who runs beside torch.nn, see --list (default: all that can)")
    add("--modes", type=split, metavar="A,B", help=f"of {', '.join(problems.MODES)} (default: the suite's own)")
    add(
        "--dtype", choices=problems.DTYPES, default="float32", help="of weights, input and output; default: %(default)s"
    )
    add("--device", help="cpu or cuda[:n] (default: a GPU where there is one)")
    add("--rounds", type=int, default=31, help="at most so many turns of everybody (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        help=f"for the rounds of a problem (default: {SECONDS:g}, {QUICK_SECONDS:g} if --quick)",
    )
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, for everybody (default: %(default)s)")
    add("--tf32", action="store_true", help="float32 products may be tf32, for everybody (GPU; default: they may not)")
    add("--out", type=Path, default=Path("bench-out"), metavar="DIR",
        help="for results.csv and report.html; a second start there resumes (default: %(default)s)")  # fmt: skip
    add("--only", default="", metavar="TEXT", help="problems whose name (see --list) contains it (default: all)")
    add("--list", action="store_true", help="print what a run with the same options measures, and stop")
    add("--compare", nargs=2, type=Path, metavar=("A.csv", "B.csv"),
        help="measure nothing: set two results.csv side by side, of two commits or machines")  # fmt: skip
    add("--json", action="store_true", help="print rows and their units as JSON")


def peaks(device: torch.device, dtype: str, tf32: bool) -> tuple[float | None, float | None, str]:
    """Peak operations and bytes a second, and where they come from: measured on a CPU, published for a known GPU."""
    if device.type == "cpu":
        return *measure.cpu_peaks(getattr(torch, dtype)), "measured: a matrix product of 1536, a copy of 256 MiB"
    from fusedrnn.explain import PEAKS

    name = torch.cuda.get_device_name(device)
    found = next((chip for chip in PEAKS.values() if any(part in name for part in chip.devices)), None)
    if found is None:
        return None, None, "no published peak is known for this GPU"
    rate = {"float64": found.float64, "float32": found.tf32 if tf32 else found.float32}.get(dtype, found.half)
    return rate * 1e12, found.bandwidth * 1e12, "published by the vendor, not measured"


class Suite:
    """One run: what is still to be measured, and the rows that come of it."""

    def __init__(self, arguments: argparse.Namespace, results: Results, device: torch.device, found: list):
        self.arguments, self.results, self.device, self.providers = arguments, results, device, found
        self.environment = environment(device, arguments.threads, arguments.tf32)
        self.seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
        self.peaks = None

    def todo(self, chosen: list[Problem]) -> list[tuple[Problem, str]]:
        """(problem, mode) with something left to measure."""
        jobs = []
        for problem, mode in itertools.product(chosen, problems.MODES):
            if mode in (self.arguments.modes or problem.modes):
                jobs.append((problem.one_step() if mode == "latency" else problem, mode))
        return [job for job in dict.fromkeys(jobs) if self.missing(*job)]

    def row(self, problem: Problem, mode: str, provider, **values) -> Row:
        about = {name: getattr(problem, name) for name in ("suite", "cell", "T", "B", "I", "H", "L", "D", "dtype")}
        about |= {"mode": mode, "provider": provider.name, "version": provider.version(), "branch": ""}
        return Row(**asdict(self.environment) | about | values)

    def missing(self, problem: Problem, mode: str) -> list:
        """Providers without a row."""
        keys = self.results.keys
        return [p for p in self.providers if self.row(problem, mode, p, status="").key not in keys]

    def measure(self, problem: Problem, mode: str) -> list[Row]:
        """Checks and times everybody who has no row yet, beside the baseline; the rows are on disk when it returns."""
        if self.peaks is None:
            self.peaks = peaks(self.device, self.arguments.dtype, self.arguments.tf32)
        missing = self.missing(problem, mode)
        if mode == "memory":
            rows = [self.peak(problem, provider) for provider in missing]
        else:
            rows = self.timed(problem, mode, missing)
        self.results.append(rows)
        return rows

    def stamp(self) -> dict:
        load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        flops, bandwidth, source = self.peaks
        return {"time": now, "load": load, "peak_flops": flops,
                "peak_bandwidth": bandwidth, "peaks_from": source}  # fmt: skip

    def checked(self, gate, given, problem, mode, provider) -> tuple[Row, object]:
        """(a row without times, the call to time): a provider that fails or gives wrong answers has no call."""
        row = lambda status, **values: self.row(problem, mode, provider, status=status, **values, **self.stamp())
        try:
            runnable = provider.make(gate.given, mode)
            check = gate.check(runnable)
            values = {"branch": runnable.branch, "error": check.error, "allowed": check.allowed,
                      "checked_steps": check.steps}  # fmt: skip
            if not check.right:
                return row("wrong", why=f"off by {check.error:.2e}, allowed {check.allowed:.2e}", **values), None
            if gate.problem != problem:
                runnable = provider.make(given, mode)
            return row("ok", **values | {"branch": runnable.branch}), runnable.run
        except providers.UnavailableError as error:
            return row("unavailable", why=str(error)), None
        except Exception as error:  # whatever a peer raises is its row
            measure.give_memory_back(self.device)
            return row("failed", why=measure.in_words(error)), None

    def timed(self, problem: Problem, mode: str, missing: list) -> list[Row]:
        try:
            gate, given = measure.Gate(problem, mode, self.device), providers.draw(problem, self.device)
        except torch.OutOfMemoryError as error:
            measure.give_memory_back(self.device)
            why = f"of the float64 answer: {measure.in_words(error)}"
            return [self.row(problem, mode, p, status="failed", why=why, **self.stamp()) for p in missing]
        baseline = self.providers[0]
        rows, calls = {}, {}
        # On a resumed run the baseline is timed again, so that everybody has a ratio within the same rounds.
        for provider in [baseline, *(p for p in missing if p is not baseline)]:
            rows[provider.name], call = self.checked(gate, given, problem, mode, provider)
            if call is not None:
                calls[provider.name] = call
        watch = measure.Others()
        samples = measure.interleaved(calls, self.arguments.rounds, self.seconds, self.device)
        # What the CPU does beside a GPU's kernels is not their time.
        others = watch.took() if self.device.type == "cpu" else None
        free = max(0, measure.cpus() - self.arguments.threads)
        right = {name: s for name, s in samples.items() if isinstance(s, measure.Samples)}
        # Under load: an idle GPU lowers its clocks.
        clock = clocks(self.device, calls[next(iter(right))]) if right else ""
        for name, s in samples.items():
            row = asdict(rows[name])
            if isinstance(s, str):
                rows[name] = Row(**row | {"status": "failed", "why": s})
                continue
            base = right.get(baseline.name)
            # The time of what could not be captured holds its Python: no ratio to one that does not.
            ratio = measure.speedup(base, s) if base is not None and base.how == s.how else None
            value, low, high = ratio or (None, None, None)
            times = {"median": s.quantile(0.5), "least": min(s.seconds), "quartile1": s.quantile(0.25),
                     "quartile3": s.quantile(0.75), "rounds": len(s.seconds), "how": s.how, "clocks": clock,
                     "speedup": value, "ratio1": low, "ratio3": high, "others": others,
                     "baseline": base.quantile(0.5) if ratio else None,
                     "spoiled": measure.spoiled(s, base if ratio else None, ratio, others, free)}  # fmt: skip
            rows[name] = Row(**row | times)
        return [rows[p.name] for p in missing]

    def peak(self, problem: Problem, provider) -> Row:
        row = lambda status, **values: self.row(problem, "memory", provider, status=status, **values, **self.stamp())
        try:
            runnable = provider.make(providers.draw(problem, self.device), "memory")
            if self.device.type == "cuda":
                peak, how = measure.peak_on_gpu(runnable.run, self.device), "torch.cuda.max_memory_allocated"
            else:
                peak = measure.peak_in_child(problem, provider.name, self.arguments.threads)
                how = "growth of resident memory, in a process of its own"
            return row("ok", peak_bytes=peak, how=how, branch=runnable.branch)
        except providers.UnavailableError as error:
            return row("unavailable", why=str(error))
        except Exception as error:  # whatever a peer raises is its row
            measure.give_memory_back(self.device)
            return row("failed", why=measure.in_words(error))


WIDTHS = (10, 44, 10, 26)
HEADER = "".join(f"{head:<{width}}" for head, width in zip(("done", "problem", "mode", "provider"), WIDTHS)) + (
    f"{'time of a call':>15}  {'times as fast as torch.nn':<36}what ran"
)


def line(row: Row, done: str = "") -> str:
    """A row for the console, under HEADER."""
    words = (done, row.problem.name, row.mode, row.provider)
    text = "".join(f"{word:<{width}}" for word, width in zip(words, WIDTHS))
    if row.status != "ok":
        return f"{text}{row.status.upper()}: {row.why}"
    if row.mode == "memory":
        return f"{text}{row.peak_bytes / 2**20:11.1f} MiB"
    ratio = "" if row.speedup is None else f"{row.speedup:.2f} ({row.ratio1:.2f} to {row.ratio3:.2f})"
    text = f"{text}{row.median * 1e3:12.3f} ms  {ratio:<36}{row.branch}"
    return f"{text}  SPOILED: {row.spoiled.split('; ')[0]}" if row.spoiled else text


def needed() -> None:
    """Raises ImportError, with the extra that installs it, where the progress bar or the report have no package."""
    missing = [name for name in ("matplotlib", "plotly", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"bench needs {', '.join(missing)}: pip install 'fusedrnn[bench]'")


def overview(arguments, chosen: list[Problem], found: list, left_out: dict[str, str]) -> None:
    """What a run with the same options would measure."""
    if arguments.json:
        about = {"problems": [asdict(p) for p in chosen], "measured": [p.name for p in found], "left_out": left_out}
        print(json.dumps(about, indent=1))
        return
    modes = [[m for m in problems.MODES if m in (arguments.modes or p.modes)] for p in chosen]
    quick = " --quick" if arguments.quick else ""
    print(f"bench --suite {arguments.suite}{quick} measures {len(chosen)} problems, {sum(map(len, modes))} with modes:")
    for problem, taken in zip(chosen, modes):
        print(f"  {problem.name:<62} {', '.join(taken)}")
    print("\nand takes turns among:")
    for provider in found:
        print(f"  {provider.name}")
    print("\nleft out:")
    for name, why in left_out.items():
        print(f"  {name:<26}{why}")


def chosen_device(name: str | None) -> torch.device:
    """The device that is measured: a card is made the current one, to which streams, graphs and events belong.

    Raises:
        ValueError: it is not here.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"--device must be cpu or one of the {count} GPUs that are here (cuda:0, ...), got {name}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def bench(arguments: argparse.Namespace) -> int:
    """Measures fusedrnn against torch.nn and others; writes results.csv, plots and report.html, and resumes them."""
    if arguments.compare:
        return compared(arguments)
    if arguments.suite == "slstm":
        from . import slstm

        return slstm.run(arguments, arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS))
    try:
        device = chosen_device(arguments.device)
        wrong = [mode for mode in arguments.modes or [] if mode not in problems.MODES]
        if wrong:
            raise ValueError(f"modes must be of {', '.join(problems.MODES)}, got {', '.join(wrong)}")
        if min(arguments.rounds, arguments.threads) < 1:
            raise ValueError(f"rounds and threads must be at least 1, got {arguments.rounds} and {arguments.threads}")
        found, left_out = providers.choose(arguments.peers, device, arguments.quick)
        chosen = problems.suite(arguments.suite, arguments.quick, arguments.dtype)
        chosen = [problem for problem in chosen if arguments.only in problem.name]
        if not chosen:
            raise ValueError(f"--only {arguments.only!r}: no problem of suite {arguments.suite} has it in its name")
        if not arguments.list:
            needed()
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        overview(arguments, chosen, found, left_out)
        return 0
    from tqdm import tqdm

    from .report import in_words, write_report

    with Results(arguments.out) as results, measure.settings(arguments.threads, arguments.tf32):
        suite = Suite(arguments, results, device, found)
        jobs = suite.todo(chosen)
        say = (lambda text: None) if arguments.json else (lambda text: tqdm.write(text, file=sys.stdout))
        if jobs:
            say(f"{len(jobs)} measurements with {suite.seconds:g} s of rounds each at most, {len(found)} providers, "
                f"{arguments.threads} threads, on {suite.environment.device}")  # fmt: skip
            say(HEADER)
        told, start = set(), time.monotonic()
        # On a terminal tqdm says the time left, elsewhere the column "done" has it.
        with tqdm(jobs, unit="problem", disable=None, file=sys.stderr) as progress:
            for number, (problem, mode) in enumerate(progress, 1):
                progress.set_description(f"{problem.name} {mode}")
                rows = suite.measure(problem, mode)
                left = (time.monotonic() - start) / number * (len(jobs) - number)
                done = f"{number}/{len(jobs)} {left / 60:.0f}m" if left > 90 else f"{number}/{len(jobs)} {left:.0f}s"
                for row in rows:
                    # What a provider cannot do is said once.
                    if row.status != "unavailable" or (row.provider, row.why) not in told:
                        say(line(row, done))
                        told.add((row.provider, row.why))
                        done = ""
        pages = write_report(results.rows, left_out, arguments.out)
        rows = [row for row in results.rows if row.environment == suite.environment]
    if arguments.json:
        print(json.dumps({"units": UNITS, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(f"{len(rows)} rows of this machine and version in {arguments.out / 'results.csv'}; {pages}")
        print("\n".join(in_words([row for row in rows if row.suite == arguments.suite])))
    return 1 if any(row.status in ("wrong", "failed") and row.provider.startswith("fusedrnn") for row in rows) else 0


def compared(arguments) -> int:
    """bench --compare: two results.csv, of two commits or machines, side by side."""
    from .report import write_comparison

    try:
        needed()
        first, second = (parse(path.read_text(), path) for path in arguments.compare)
        lines, page = write_comparison(first, second, [str(path) for path in arguments.compare], arguments.out)
    except (ImportError, OSError, RuntimeError, UnicodeDecodeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"page: {page}")
    return 0
