"""Results that are kept: a small CSV in benchmarks/history for each release and class of machine.

    python -m fusedrnn.benchmarks.keep bench-out/results.csv --machine xeon-amx-2

takes what was measured of torch.nn, fusedrnn and other libraries, without what a busy machine spoiled. Without a file
of results it prints the last release's table for docs/benchmarks.md.
"""

import argparse
import csv
import math
import statistics
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .problems import Problem
from .results import Row, parse

FOLDER = Path(__file__).with_name("history")
# What the classes of machines are.
MACHINES = {
    "xeon-amx-2": "2 cores of an Intel Xeon with AVX-512 and AMX",
    "epyc-avx512-2": "2 cores of an AMD EPYC with AVX-512 and AVX512-BF16",
}
CELL_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "RNN relu"}
MODE_NAMES = {"forward": "inference", "latency": "one step (Cell)", "train": "training step"}


@dataclass(frozen=True)
class Kept:
    """A median time of a call in seconds, None where only the ratio was kept; ``ratio`` is torch.nn's time by it."""

    release: str
    machine: str
    device: str
    torch: str
    threads: int
    suite: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    L: int
    D: int
    dtype: str
    mode: str
    provider: str
    version: str
    seconds: float | None
    ratio: float

    @property
    def problem(self) -> Problem:
        return Problem(self.suite, self.cell, self.T, self.B, self.I, self.H, self.L, self.D, self.dtype)


def of_row(row: Row, machine: str) -> Kept:
    about = {f.name: getattr(row, f.name, None) for f in fields(Kept)}
    return Kept(**about | {"release": row.fusedrnn, "machine": machine, "seconds": float(f"{row.median:.4g}"),
                           "ratio": round(row.speedup, 3)})  # fmt: skip


def read(folder: Path = FOLDER) -> list[Kept]:
    """All files, in the order of their names."""
    kinds = {f.name: f.type for f in fields(Kept)}
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                values = {n: int(v) if kinds[n] is int else v for n, v in line.items()}
                seconds = float(line["seconds"]) if line["seconds"] else None
                found.append(Kept(**values | {"seconds": seconds, "ratio": float(line["ratio"])}))
    return found


def write(kept: list[Kept], folder: Path = FOLDER) -> Path:
    """The file of a release on a machine. Raises ValueError where there is nothing, or more than one of either."""
    names = {f"{k.release}-{k.machine}" for k in kept}
    if len(names) != 1:
        raise ValueError(f"one release on one machine makes a file, got {', '.join(sorted(names)) or 'no times'}")
    path = folder / f"{names.pop()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Kept)])
        writer.writerows([["" if v is None else v for v in astuple(k)] for k in kept])
    return path


def last_release(kept: list[Kept]) -> str:
    return max(
        (k.release for k in kept), key=lambda release: [int(part) for part in release.split(".") if part.isdigit()]
    )


def of_last_release(kept: list[Kept]) -> list[Kept]:
    """Its times on one machine, of several the first by name."""
    last = last_release(kept)
    machine = min(k.machine for k in kept if k.release == last)
    return [k for k in kept if (k.release, k.machine) == (last, machine)]


def machine_of(kept: list[Kept]) -> str:
    return MACHINES.get(kept[0].machine, kept[0].machine)


def caption(kept: list[Kept]) -> str:
    """What the chart of the last release was measured on."""
    last = of_last_release(kept)
    return f"float32, {machine_of(last)}, release {last[0].release}"


def sentence(kept: list[Kept], provider: str = "fusedrnn") -> str:
    """The result of the last release in float32, for the landing page and the README."""
    last = of_last_release(kept)
    ratios = [k.ratio for k in last if (k.dtype, k.provider) == ("float32", provider)]
    faster, mean = sum(r > 1 for r in ratios), statistics.geometric_mean(ratios)
    return (
        f"On {machine_of(last)} it is faster than torch.nn in {faster} of {len(ratios)} problems of DeepBench: "
        f"{mean:.2f} times as fast in the geometric mean, {min(ratios):.2f} to {max(ratios):.2f}."
    )


def table(kept: list[Kept]) -> list[str]:
    """The lines of the last release, of inference by cell and size, then of steps, then of training."""
    last = of_last_release(kept)
    found = {}
    for k in last:
        found.setdefault((k.mode, k.cell, k.H, k.B, k.T), {})[k.provider, k.dtype] = k
    modes, cells = list(MODE_NAMES), list(CELL_NAMES)
    lines = [
        "| problem (H/B/T) | torch.nn | fusedrnn | fusedrnn, times as fast | ONNX Runtime | OpenVINO "
        "| fusedrnn in bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for at, of in sorted(
        found.items(), key=lambda item: (modes.index(item[0][0]), cells.index(item[0][1]), item[0][2:])
    ):
        mode, cell, *sizes = at
        base, ours = of.get(("torch.nn", "float32")), of.get(("fusedrnn", "float32"))
        if base is None or ours is None:  # spoiled
            continue
        others = [
            of.get(key) for key in (("onnxruntime", "float32"), ("openvino", "float32"), ("fusedrnn", "bfloat16"))
        ]
        cells_of_line = [
            f"{CELL_NAMES[cell]} {MODE_NAMES[mode]} {'/'.join(map(str, sizes))}",
            in_words(base.seconds), in_words(ours.seconds), f"**{ours.ratio:.2f}**",
            *("" if k is None else f"{k.ratio:.2f}" for k in others),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells_of_line)} |")
    return lines


def in_words(seconds: float) -> str:
    """Three digits, in us below a millisecond."""
    value, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.benchmarks.keep", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="a results.csv that bench wrote on a quiet machine")
    parser.add_argument("--machine", help="a short name for its class, such as xeon-amx-2; keep.MACHINES explains it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.results is None:
        print("\n".join(table(read(arguments.folder))))
        return 0
    if arguments.machine is None:
        parser.error("the following arguments are required: --machine")
    try:
        rows = parse(arguments.results.read_text(), arguments.results)
        good = [row for row in rows if row.speedup is not None and not row.spoiled]
        print(write([of_row(row, arguments.machine) for row in good], arguments.folder))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
