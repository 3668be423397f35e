"""What the CUDA kernels cost, counted in the simulator (tests/ptxsim) from their sm_80 PTX: no GPU, no time, no drift.

    python benchmarks/gpu_cost.py            the table of docs/kernels.md
    python benchmarks/gpu_cost.py --quick    without the large batch

Per step and whole grid: (launch with T = 4 - launch with T = 2) / 2, while training (gates and c are saved), net of
polling: the persistent kernels are launched again on a mailbox that is already filled, so every wait succeeds at once.
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
    """A kernel at one size, and what it may cost: warp instructions and bytes read. I = H in a step."""

    algorithm: str
    backward: bool
    batch: int
    hidden: int
    instructions: float
    read: float
    dtype: torch.dtype = torch.bfloat16
    backend: str = "cuda"

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        return f"{self.backend} {self.algorithm} {direction} {str(self.dtype)[6:]} B={self.batch} H={self.hidden}"


GOALS = [
    Kernel("persistent", False, 16, 768, 190e3, 2.5e6),
    Kernel("persistent", True, 16, 768, 0.8 * 151_046, 4.92e6),
    Kernel("step", False, 16, 768, 300e3, 14.5e6),
    Kernel("step", False, 16, 768, 300e3, 14.5e6, backend="triton"),
    Kernel("persistent", False, 64, 1024, 850e3, 17.5e6),
    Kernel("persistent", True, 64, 1024, 0.8 * 884_100, 68.16e6),
]


def floor_bytes(kernel: Kernel, blocks: int) -> tuple[int, int]:
    """Bytes read and written by a persistent step that moves everything once (docs/kernels.md)."""
    units, size = kernel.batch * kernel.hidden, kernel.dtype.itemsize
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

    def counted(name, params, tensors):
        if name.startswith("persistent"):
            launch(name, params, tensors)
        library.reset_counters()
        launch(name, params, tensors)
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
        inputs = Inputs(*given, None, None, False)
        y, _, _, gates, cells = backend.forward(CELLS["lstm"], inputs, kernel.algorithm, True, True)
        if kernel.backward:
            found.clear()
            upstream = Gradients(draw(steps, batch, hidden), draw(batch, hidden), draw(batch, hidden), None)
            saved = Saved(y, gates, cells)
            backend.backward(CELLS["lstm"], upstream, inputs, saved, kernel.algorithm, [False] * 8)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the large batch")
    arguments = parser.parse_args()
    os.environ.setdefault("FUSEDRNN_SIMULATE", "1")
    print("| kernel | launches | blocks | warp instr/step | goal | read/step | goal | written/step | sectors/bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for kernel in GOALS:
        if arguments.quick and kernel.batch > 16:
            continue
        cost = per_step(kernel)
        ok = cost["warp_instr"] <= kernel.instructions and cost["global_ld_bytes"] <= kernel.read
        failed += not ok
        print(
            f"| {kernel} | {cost['launches']:.0f} | {cost['blocks']:.0f} | {cost['warp_instr'] / 1e3:.1f}k | "
            f"{kernel.instructions / 1e3:.1f}k | {cost['global_ld_bytes'] / 1e6:.3f}M | {kernel.read / 1e6:.2f}M | "
            f"{cost['global_st_bytes'] / 1e3:.1f}k | {cost['sector_ratio']:.2f} |{'' if ok else ' TOO DEAR'}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
