"""The CPU kernels of 64-bit Arm: cross-compiled, run by qemu-aarch64 without torch, against float64."""

import functools
import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from problems import CASES, INPUTS, Case, assert_close, at_own_kinks, make, models, run, widened
from torch import Tensor

from fusedrnn.backends import common
from fusedrnn.backends.common import Inputs
from fusedrnn.cells import BUILT_IN, CELLS, accumulation_dtype

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the enum Dtype
MORE = [Case(T=22, B=3, I=5, H=70), Case(T=2, B=70, I=5, H=37, reverse=True), Case(T=1, B=70, I=5, H=37)]
READ = ("offsets", "resets", "gates_x", *INPUTS[:1], "w_ih", "h0", "c0", "w_hh", "b_ih", "b_hh", "w_hr",
        "dy", "dh_n", "dc_n", "dcells")  # fmt: skip
WRITTEN = ("y", "h_n", "c_n", "gates", "cells", "dgates", "dh0", "dc0", "dy_total", "h")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++: the kernels of Arm are not compiled"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64: the kernels of Arm are not run"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """tests/kernels_alone.cpp with the kernels of setup.py's list for aarch64."""
    folder = tmp_path_factory.mktemp("arm")
    names = ("capability", "recurrence_portable", "recurrence_neon")
    sources = [str(ROOT / "csrc" / "cpu" / f"{name}.cpp") for name in names]
    flags = ["-std=c++20", "-O2", "-static", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    subprocess.run(
        [COMPILER, *flags, "-DFUSEDRNN_HAS_PORTABLE=1", "-DFUSEDRNN_HAS_NEON=1", "-I", ROOT / "csrc", *sources,
         ROOT / "tests" / "kernels_alone.cpp", "-o", folder / "kernels"],
        check=True,
    )  # fmt: skip
    return folder / "kernels"


def packed(t: Tensor | None) -> bytes:
    data = b"" if t is None else t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("q", len(data)) + data


def emulated(program: Path, capability: str, problems: list[tuple[list[int], dict]]) -> list[dict[str, Tensor]]:
    """What the kernels wrote for each (sizes, arrays)."""
    given = [
        struct.pack(f"{len(sizes) + 1}q", 8 * len(sizes), *sizes)
        + b"".join(packed(arrays.get(n)) for n in READ + WRITTEN)
        for sizes, arrays in problems
    ]
    done = subprocess.run(
        [EMULATOR, program], input=b"".join(given), capture_output=True,
        env={"FUSEDRNN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, capability.encode()), (done.returncode, done.stderr)
    found, at = [], 0
    for _, arrays in problems:
        found.append({})
        for name in WRITTEN:
            if (t := arrays.get(name)) is not None:
                size = t.numel() * t.element_size()
                raw = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=torch.uint8)
                found[-1][name], at = raw.view(t.dtype).view(t.shape), at + size
    assert at == len(done.stdout)
    return found


def problem_of(case: Case, given: dict[str, Tensor], cell: str, threads: int) -> tuple[list[int], dict]:
    """As csrc/cpu/sequence.cpp calls the kernels."""
    entry, dtype = CELLS[cell], given["x"].dtype
    sizes = case.batch_sizes()
    counts = torch.full((case.T,), case.B) if sizes is None else sizes
    arrays = {name: t for name, t in given.items() if name != "dcells"}
    arrays["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    rows, H, P = int(counts.sum()), case.H, case.proj or case.H
    if case.T > 1 or case.B > 64:
        arrays["gates_x"] = (given["x"].double() @ given["w_ih"].double().t()).to(dtype)
    if entry.has_cell_state and case.states:
        arrays["dcells"] = given["dcells"]
    if not entry.has_cell_state:
        arrays.pop("dc_n")

    def poison(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    lead = given["x"].shape[:-1]
    arrays |= {"y": poison(*lead, P), "h_n": poison(case.B, P), "dh0": poison(case.B, P)}
    arrays["dgates"] = poison(rows, len(entry.accumulators) * H)
    if entry.saved:
        arrays["gates"] = poison(rows, len(entry.saved) * H)
    if entry.has_cell_state:
        arrays |= {"c_n": poison(case.B, H), "dc0": poison(case.B, H)}
        arrays["cells"] = poison(*lead, H, dtype=accumulation_dtype(dtype))
    if case.proj:
        arrays |= {"dy_total": poison(rows, P), "h": poison(rows, H)}
    kind = BUILT_IN.index(cell)
    return [kind, DTYPES.index(dtype), case.T, case.B, case.I, H, P, case.reverse, threads], arrays


@pytest.mark.parametrize("capability", ["portable", "neon"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", BUILT_IN)
def test_recurrence(program, cell, dtype, capability):
    cases = [c for c in CASES + MORE if CELLS[cell].has_cell_state or not (c.proj or c.states)]
    drawn = [make(case, dtype, cell=cell) for case in cases]
    problems = [problem_of(c, given, cell, 1 + k % 2) for k, (c, given) in enumerate(zip(cases, drawn))]
    for case, given, found in zip(cases, drawn, emulated(program, capability, problems)):
        inputs = Inputs(*(given.get(name) for name in INPUTS), case.batch_sizes(), given.get("resets"), case.reverse)
        needs = [t is not None for t in inputs[:8]]
        grads = common.weight_gradients(
            CELLS[cell], inputs, found["y"], found["dgates"], found.get("h"), found.get("dy_total"), needs,
            found["dh0"], found.get("dc0"),
        )  # fmt: skip
        got = {name: found[name] for name in ("y", "h_n", "c_n") if name in found}
        if case.states and "cells" in found:
            got["cells"] = found["cells"]
        got |= {"d" + name: grad for name, grad, needed in zip(INPUTS, grads, needs) if needed}
        exact = run(case, widened(given), "reference", cell=cell)
        kinks = {"exact_for": functools.partial(at_own_kinks, case, given)} if cell == "rnn_relu" else {}
        assert_close(got, exact, models(case, given, cell=cell), **kinks)


@pytest.mark.parametrize("capability", ["portable", "neon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product(program, dtype, capability):
    """Every way round, to half a unit in the last place; what overflows is infinite, and NaN stays in its row."""
    problems, exact = [], []
    for (m, n, k), left, right in itertools.product([(1, 1, 1), (7, 5, 3), (33, 17, 129), (70, 9, 300)], "ab", "ab"):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        a[0, 0], b[0, -1] = float("nan"), torch.finfo(dtype).max
        strides = [*((k, 1) if left == "a" else (1, m)), *((n, 1) if right == "a" else (1, k))]
        given = {"x": a if left == "a" else a.t(), "w_ih": b if right == "a" else b.t()}
        given["y"] = torch.full((m, n), float("nan"), dtype=dtype)
        problems.append(([-1, DTYPES.index(dtype), m, n, k, *strides, 1 + m % 2], given))
        exact.append(a.float() @ b.float())
    for (sizes, _), want, found in zip(problems, exact, emulated(program, capability, problems)):
        got = found["y"]
        assert got[0].isnan().all()
        assert not got[1:].isnan().any(), sizes
        # float32 sums in another order may round to the other side.
        torch.testing.assert_close(got[1:], want[1:].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)
