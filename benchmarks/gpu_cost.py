"""What the CUDA kernels cost, counted in the simulator (tests/ptxsim) from their sm_80 PTX: no GPU, no drift.

    python benchmarks/gpu_cost.py            the tables of docs/kernels.md
    python benchmarks/gpu_cost.py --quick    without the large batch
    python benchmarks/gpu_cost.py --waits    and, for each warp of a block, what it waited for in which PTX line

First table, per step and whole grid: (launch with T = 4 - launch with T = 2) / 2, while training (gates and c are
saved), net of polling: the persistent kernels are launched again on a mailbox that is already filled, so every wait
succeeds at once.

Second table, of an ordinary launch (the blocks fill the mailbox themselves): the time of a step by the simulator's
virtual clock. That is a model of an H100 (tests/ptxsim/src/clock.cpp has its latencies and their sources), not a
measurement; R is the latency of a strong load from L2, S the time until a strong store is seen there.
"""

import argparse
import contextlib
import importlib
import math
import os
import sys
import unittest.mock
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.cells import CELLS

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Kernel:
    """A kernel at one size, and what it may cost: warp instructions, bytes read; of persistent the time by the model. I
    = H in a step."""

    algorithm: str
    backward: bool
    batch: int
    hidden: int
    instructions: float
    read: float
    dtype: torch.dtype = torch.bfloat16
    backend: str = "cuda"
    nanoseconds: float = 0
    directions: int = 1  # of a launch

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        both = ", both directions" if self.directions == 2 else ""
        return f"{self.backend} {self.algorithm} {direction} {str(self.dtype)[6:]} B={self.batch} H={self.hidden}{both}"


GOALS = [
    Kernel("persistent", False, 16, 768, 225e3, 1.32e6, nanoseconds=1400),
    Kernel("persistent", True, 16, 768, 220e3, 4.92e6, nanoseconds=2000),
    Kernel("persistent", False, 16, 768, 350e3, 2.64e6, nanoseconds=1700, directions=2),
    Kernel("persistent", True, 16, 768, 375e3, 9.84e6, nanoseconds=2700, directions=2),
    Kernel("step", False, 16, 768, 300e3, 14.5e6),
    Kernel("step", False, 16, 768, 300e3, 14.5e6, backend="triton"),
    Kernel("persistent", False, 64, 1024, 0.9e6, 9.1e6, nanoseconds=3010),
    Kernel("persistent", True, 64, 1024, 1.04e6, 68.16e6, nanoseconds=7400),
]


def floor_bytes(kernel: Kernel, blocks: int) -> tuple[int, int]:
    """Bytes read and written by a persistent step that moves everything once (docs/kernels.md)."""
    units, size = kernel.directions * kernel.batch * kernel.hidden, kernel.dtype.itemsize
    if kernel.backward:
        return blocks * 4 * units * size + 4 * units * size + units * size + units * 4, 4 * units * size
    return blocks * units * size + 4 * units * size, units * size + 4 * units * size + units * 4


@contextlib.contextmanager
def _counting(name: str):
    """The counters of what backend ``name`` launches inside: of all launches (persistent: of the last one)."""
    found = {}
    if name == "triton":
        from fusedrnn.backends import triton

        simulator = triton._simulator()
        launch = simulator.launch

        def counted_kernel(kernel, grid, *rest, **options):
            counters = launch(kernel, grid, *rest, **options)
            counters = {"launches": 1, "blocks": math.prod(grid), **counters}
            for key, value in counters.items():
                if not isinstance(value, dict):
                    found[key] = found.get(key, 0) + value

        with unittest.mock.patch.object(simulator, "launch", counted_kernel):
            yield found
        return
    from fusedrnn.backends import cuda

    kernels = cuda._simulated()
    library = kernels.simulator
    launch = kernels.launch

    def counted(name, *calls):
        if name.startswith("persistent"):
            launch(name, *calls)
        library.reset_counters()
        launch(name, *calls)
        found.update(library.counters())

    with unittest.mock.patch.object(kernels, "launch", counted):
        yield found


def _launches(kernel: Kernel, steps: int) -> dict[str, float]:
    """Counters of the one launch (step: of all) that runs `kernel` for `steps` steps."""
    backend = importlib.import_module(f"fusedrnn.backends.{kernel.backend}")
    batch, hidden, inputs = kernel.batch, kernel.hidden, kernel.hidden if kernel.algorithm == "step" else 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(kernel.dtype)

    scale = hidden**-0.5
    given = [
        draw(steps, batch, inputs), draw(batch, hidden), draw(batch, hidden), draw(4 * hidden, inputs, scale=scale),
        draw(4 * hidden, hidden, scale=scale), draw(4 * hidden), draw(4 * hidden), None,
    ]  # fmt: skip
    with _counting(kernel.backend) as found:
        directions = [Inputs(*given, None, None, reverse) for reverse in (False, True)[: kernel.directions]]
        cell, options = CELLS["lstm"], (kernel.algorithm, True, True)
        if kernel.directions == 2:
            outputs = backend.forward_both(cell, directions, *options)
        else:
            outputs = [backend.forward(cell, inputs, *options) for inputs in directions]
        if kernel.backward:
            found.clear()
            upstream = Gradients(draw(steps, batch, hidden), draw(batch, hidden), draw(batch, hidden), None)
            kept = [Saved(y, gates, cells) for y, _, _, gates, cells in outputs]
            if kernel.directions == 2:
                both = [(upstream, inputs, saved, [False] * 8) for inputs, saved in zip(directions, kept)]
                backend.backward_both(cell, both, kernel.algorithm)
            else:
                backend.backward(cell, upstream, directions[0], kept[0], kernel.algorithm, [False] * 8)
    return found


def per_step(kernel: Kernel) -> dict[str, float]:
    """Counters per time step; "blocks" and "launches" are those of the whole sequence of T = 4."""
    two, four = _launches(kernel, 2), _launches(kernel, 4)
    result = {name: (four[name] - two[name]) / 2 for name in four}
    result["launches"] = four["launches"]
    result["blocks"] = four["blocks"] / four["launches"]
    result["reads_once"] = two["global_ld_bytes"] - result["global_ld_bytes"] * 2
    moved = result["global_ld_bytes"] + result["global_st_bytes"]
    result["sector_ratio"] = 32 * (result["global_ld_sectors"] + result["global_st_sectors"]) / moved
    return result


# R and S in ns: low, expected, high.
SETTINGS = [(150, 200), (200, 250), (275, 275)]


@contextlib.contextmanager
def _clocked(load_ns: int, store_ns: int):
    """Counters and clock of the persistent launches inside: of the last one, on its own fresh mailbox."""
    from fusedrnn.backends import cuda

    kernels, found = cuda._simulated(), {}
    library, launch = kernels.simulator, kernels.launch

    def clocked(name, *calls):
        with cuda.simulator_options(clock=1, load_ns=load_ns, store_ns=store_ns):
            library.reset_counters()
            launch(name, *calls)
        found.clear()
        found.update(library.counters() | library.clock())

    with unittest.mock.patch.object(kernels, "launch", clocked):
        yield found


def by_the_clock(kernel: Kernel, load_ns: int, store_ns: int) -> dict[str, float]:
    """Counters of a step of an ordinary launch, and what the virtual clock says: "ns", "rounds" of strong loads of a
    warp, "most_rounds", "mma_chain", "mma_ideal", and "waits" of a block in ns by (warp, PTX line, for what)."""
    few, more = (2, 4) if kernel.batch > 16 else (3, 6)
    with unittest.mock.patch.dict(globals(), _counting=lambda name: _clocked(load_ns, store_ns)):
        first, second = _launches(kernel, few), _launches(kernel, more)
    steps = more - few
    result = {key: (second[key] - first[key]) / steps for key in second if key != "waits"}
    result["mma_chain"] = second["mma_chain"]
    result["mma_ideal"] = kernel.directions * -(-kernel.batch // 8) * 4 * kernel.hidden**2 / 256
    share = steps * second["blocks"]
    result["waits"] = {key: (ns - first["waits"].get(key, 0)) / share for key, ns in second["waits"].items()}
    return result


def print_model(kernels: list[Kernel], with_waits: bool) -> None:
    settings = " | ".join(f"R {load / 1e3:.3f}, S {store / 1e3:.3f} us" for load, store in SETTINGS)
    print("\nTime of a step on an H100 by a MODEL (nothing was measured); ordinary launches\n")
    print(
        f"| kernel | {settings} | mma/step | ideal | chain of mma | strong loads/step | rounds of them a warp, most |"
    )
    print("|---|" + "---|" * (len(SETTINGS) + 5))
    for kernel in kernels:
        costs = [by_the_clock(kernel, *setting) for setting in SETTINGS]
        cost = costs[1]
        times = " | ".join(f"{c['ns'] / 1e3:.2f} us" for c in costs)
        print(
            f"| {kernel} | {times} | {cost['mma'] / 1e3:.1f}k | "
            f"{cost['mma_ideal'] / 1e3:.1f}k | {cost['mma_chain']} | {cost['strong_ld'] / 1e3:.1f}k | "
            f"{cost['rounds']:.1f}, {cost['most_rounds']:.1f} |",
            flush=True,
        )
        if with_waits:
            for (warp, line, reason), ns in sorted(cost["waits"].items()):
                if ns >= 5:
                    print(f"  warp {warp}, PTX line {line}: {ns:.0f} ns for {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the large batch")
    parser.add_argument("--waits", action="store_true", help="what each warp of a block waits for, by the model")
    arguments = parser.parse_args()
    os.environ.setdefault("FUSEDRNN_SIMULATE", "1")
    print("| kernel | launches | blocks | warp instr/step | goal | read/step | goal | written/step | sectors/bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    kernels = [kernel for kernel in GOALS if kernel.batch <= 16 or not arguments.quick]
    for kernel in kernels:
        cost = per_step(kernel)
        ok = cost["warp_instr"] <= kernel.instructions and cost["global_ld_bytes"] <= kernel.read
        failed += not ok
        print(
            f"| {kernel} | {cost['launches']:.0f} | {cost['blocks']:.0f} | {cost['warp_instr'] / 1e3:.1f}k | "
            f"{kernel.instructions / 1e3:.1f}k | {cost['global_ld_bytes'] / 1e6:.3f}M | {kernel.read / 1e6:.2f}M | "
            f"{cost['global_st_bytes'] / 1e3:.1f}k | {cost['sector_ratio']:.2f} |{'' if ok else ' TOO DEAR'}",
            flush=True,
        )
    print_model([kernel for kernel in kernels if kernel.algorithm == "persistent"], arguments.waits)
    return failed


if __name__ == "__main__":
    sys.exit(main())
