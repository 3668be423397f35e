"""Results that are kept: a small CSV in benchmarks/history for each release and class of machine.

    python -m fusedrnn.benchmarks.keep bench-out/results.csv --machine xeon-amx-2

takes what was measured of torch.nn, fusedrnn and other libraries, without what a busy machine spoiled.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .problems import Problem
from .results import Row, parse

FOLDER = Path(__file__).with_name("history")


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


def sentence(kept: list[Kept], provider: str = "fusedrnn") -> str:
    """The result of the last release in float32, for the landing page and the README."""
    last = last_release(kept)
    ratios = [k.ratio for k in kept if (k.release, k.dtype, k.provider) == (last, "float32", provider)]
    faster, mean = sum(r > 1 for r in ratios), statistics.geometric_mean(ratios)
    return (
        f"On 2 cores of a Xeon it is faster than torch.nn in {faster} of {len(ratios)} problems of DeepBench: "
        f"{mean:.2f} times as fast in the geometric mean, {min(ratios):.2f} to {max(ratios):.2f}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.benchmarks.keep", description=__doc__)
    parser.add_argument("results", type=Path, help="a results.csv that bench wrote on a quiet machine")
    parser.add_argument("--machine", required=True, help="a short name for its class, such as xeon-amx-2")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    arguments = parser.parse_args(argv)
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
