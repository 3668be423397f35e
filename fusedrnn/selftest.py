"""Whether every kernel that this machine can run agrees with the reference: ``python -m fusedrnn selftest``."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrnn import planning
from fusedrnn.backends.common import Inputs
from fusedrnn.cells import BUILT_IN, CELLS
from fusedrnn.functional import recurrence
from fusedrnn.ops import BACKEND_ALGORITHMS

# T, B, I, H, packed lengths
SIZES = ((3, 2, 5, 9, None), (4, 3, 8, 32, (4, 4, 1)))
MATHS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Largest error by the largest entry, over the unit roundoff of what is stored or multiplied: a wrong kernel is off by
# thousands of these, rounding over a few steps by some.
ULPS = 32
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "tf32": 2.0**-10, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Result:
    """One kernel family at one math; ``error`` in units of roundoff, ``why`` when it did not run."""

    cell: str
    backend: str
    algorithm: str
    math: str
    verdict: str
    error: float | None
    seconds: float
    why: str = ""


def _tensors(cell: str, size: tuple, dtype: torch.dtype, device: str) -> tuple[list[Tensor | None], Tensor | None]:
    spec = CELLS[cell]
    steps, batch, inputs, hidden, lengths = size
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    sizes = None if lengths is None else torch.tensor([sum(n > t for n in lengths) for t in range(steps)])
    rows = (steps, batch) if lengths is None else (sum(lengths),)
    gates, scale = len(spec.gates) * hidden, hidden**-0.5
    tensors = [
        draw(*rows, inputs),
        draw(batch, hidden),
        draw(batch, hidden) if spec.has_cell_state else None,
        draw(gates, inputs, scale=scale),
        draw(gates, hidden, scale=scale),
        draw(gates, scale=scale),
        draw(gates, scale=scale),
        None,
    ]
    if cell == "rnn_relu":
        # Sums away from 0, on both sides: a sum that rounds across the kink has another slope, and no kernel is wrong.
        for weight in tensors[3:5]:
            weight.mul_(0.125)
        tensors[5].copy_(torch.arange(gates) % 2 * 2.0 - 1.0)
    return tensors, sizes


def _run(cell: str, tensors, sizes, reverse: bool, backend: str, algorithm: str) -> list[Tensor]:
    """Outputs and all gradients."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = recurrence(CELLS[cell], Inputs(*inputs, sizes, None, reverse), backend, algorithm)[:3]
    outputs = [t for t in outputs if t.numel()]
    leaves = [t for t in inputs if t is not None]
    grads = torch.autograd.grad(outputs, leaves, [torch.cos(t.detach()) for t in outputs])
    return [t.detach().double().cpu() for t in (*outputs, *grads)]


def _error(cell: str, size: tuple, reverse: bool, backend: str, algorithm: str, dtype: torch.dtype, device: str):
    tensors, sizes = _tensors(cell, size, dtype, device)
    exact = [None if t is None else t.double().cpu() for t in tensors]
    got = _run(cell, tensors, sizes, reverse, backend, algorithm)
    want = _run(cell, exact, sizes, reverse, "reference", "auto")
    if not all(t.isfinite().all() for t in got):
        return float("inf")
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(got, want))


def selftest(report=lambda result: None) -> list[Result]:
    """Runs every kernel that can run here, forward and backward, against float64; takes less than a minute.

    Without a GPU, "triton" and "cuda" run only in the simulator (FUSEDRNN_SIMULATE) and are left out otherwise.
    """
    results = []
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    for backend, algorithms in BACKEND_ALGORITHMS.items():
        device = gpu if backend in ("triton", "cuda") else "cpu"
        on_gpu = backend in ("triton", "cuda")
        capability = torch.cuda.get_device_capability() if device == "cuda" and torch.version.cuda else None
        for cell in BUILT_IN:
            for algorithm in algorithms[1:] or algorithms:
                for math, dtype in MATHS.items():
                    if math == "tf32" and not on_gpu:
                        continue
                    problem = planning.Problem(cell, 8, 8, 0, dtype, device, capability)
                    why = planning.unsupported(backend, problem, planning.machine())
                    start, error, verdict = time.perf_counter(), None, "left out"
                    if why is None:
                        verdict, error, why = _check(cell, backend, algorithm, math, dtype, device)
                    seconds = time.perf_counter() - start
                    results.append(Result(cell, backend, algorithm, math, verdict, error, seconds, why or ""))
                    report(results[-1])
    return results


def _check(cell, backend, algorithm, math, dtype, device) -> tuple[str, float | None, str | None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = math == "tf32"
    try:
        errors = [
            _error(cell, size, reverse, backend, algorithm, dtype, device) / ROUNDOFF[math]
            for size, reverse in zip(SIZES, (False, True))
        ]
    except (RuntimeError, ValueError) as problem:
        text = str(problem).splitlines()[0]
        return ("left out" if f"algorithm '{algorithm}'" in text else "FAILED"), None, text
    finally:
        torch.backends.cudnn.allow_tf32 = before
    worst = max(errors)
    return ("agrees" if worst <= ULPS else "DIFFERS"), worst, None
