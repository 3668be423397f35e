"""Inference beside the best other library, and beside what the machine allows: ``python -m fusedrnn.benchmarks.roof
results.csv``, of a run such as ``bench --modes forward --peers fusedrnn:frozen,onnxruntime,openvino``.

Of every problem: our time, frozen or as a stream, the least of the others', their quotient, and the share of the roof.
The roof is the larger of two times: the matrix products at the rate that the run measured for large ones, and W_hh read
once a step, and W_ih once, at a rate that is measured here for as many bytes. A problem holds where we take at most
1/0.97 of the best peer's time, or 1/0.85 of the roof's.
"""

import argparse
import functools
import math
import time
from pathlib import Path

import torch

from .problems import GATES
from .results import Row, parse

OURS = ("fusedrnn:frozen", "fusedrnn:stream", "fusedrnn")
LEAST_RATIO, LEAST_SHARE = 0.97, 0.85


@functools.cache
def read_rate(size: int) -> float:
    """Bytes a second that all threads read of so many, again and again: the best of a sum, a dot product, and a
    product with a vector.
    """
    count = max(size // 4, 1024)
    matrix = torch.ones(max(count // 256, 4), 256)
    flat, vector = matrix.flatten(), torch.ones(256)
    best = math.inf
    for read in (flat.sum, lambda: torch.dot(flat, flat), lambda: torch.mv(matrix, vector)):
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(20):
                read()
            best = min(best, (time.perf_counter() - start) / 20)
    return flat.nbytes / best


@functools.cache
def kept_rate(size: int, threads: int) -> float:
    """Bytes a second that so many threads read of so many, each its part of them again and again: by sums over parts
    that are repeated within one call, so that the call itself counts for nothing.
    """
    part = max(size // 4 // threads, 1024)
    again = max((1 << 24) // (part * threads), 1)
    parts, best = torch.ones(threads, 1, part).expand(threads, again, part), math.inf
    for _ in range(20):
        start = time.perf_counter()
        parts.sum((1, 2))
        best = min(best, time.perf_counter() - start)
    return 4 * parts.numel() / best


def roof(row: Row) -> float:
    """Seconds that the problem takes at least."""
    p, size = row.problem, 4 if row.dtype == "float32" else 2
    hidden = GATES[p.cell] * p.H * p.H * size
    inputs = GATES[p.cell] * p.H * (p.I + (p.L - 1) * p.D * p.H) * size * p.D
    each = hidden * p.L * p.D if p.T == 1 else hidden  # of what is read again and again
    read = (hidden * p.L * p.D * p.T + inputs) / read_rate(each)
    return max(p.flops("forward") / row.peak_flops, read)


def rows_by_problem(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    found = {}
    for row in rows:
        if row.status == "ok" and row.mode in ("forward", "latency"):
            found.setdefault((row.problem, row.mode), {})[row.provider] = row
    return found


def table(rows: list[Row]) -> tuple[list[str], list[float], int]:
    """(lines in Markdown, the quotients, how many problems do not hold)."""
    lines = [
        "| problem | ours, ms | | best other, ms | | other / ours | of the roof | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    quotients, failed = [], 0
    for (problem, mode), by in rows_by_problem(rows).items():
        mine = min((by[name] for name in OURS if name in by), key=lambda r: r.median, default=None)
        peers = [r for name, r in by.items() if not name.startswith(("fusedrnn", "torch"))]
        if mine is None or not peers:
            continue
        best = min(peers, key=lambda r: r.median)
        quotient, share = best.median / mine.median, roof(mine) / mine.median
        holds = quotient >= LEAST_RATIO or share >= LEAST_SHARE
        quotients.append(quotient)
        failed += not holds
        remarks = ["noisy"] * bool(mine.spoiled or best.spoiled) + ["behind"] * (not holds)
        lines.append(
            f"| {problem.name}{', a step' * (mode == 'latency')} | {mine.median * 1e3:.3f} | "
            f"{mine.provider.removeprefix('fusedrnn:')} | {best.median * 1e3:.3f} | {best.provider} | {quotient:.2f} | "
            f"{min(share, 1):.0%} | {', '.join(remarks)} |"
        )
    return lines, quotients, failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusedrnn.benchmarks.roof", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.csv of a bench with frozen layers on a CPU")
    options = parser.parse_args(arguments)
    rows = [row for path in options.results for row in parse(path.read_text(), path)]
    if rows:
        torch.set_num_threads(rows[0].threads)
    lines, quotients, failed = table(rows)
    if not quotients:
        parser.error("there is no problem that ours and another library took")
    print("\n".join(lines))
    mean = math.exp(sum(map(math.log, quotients)) / len(quotients))
    print(f"\n{len(quotients)} problems: {mean:.2f} in the geometric mean; {failed} are behind, that is at less than")
    print(f"{LEAST_RATIO} of the best other and below {LEAST_SHARE:.0%} of the roof.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
