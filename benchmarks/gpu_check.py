"""First contact with a GPU: ``python -m fusedrnn.benchmarks.gpu_check`` runs what there is to learn on one, without a
network, and writes one file to send back.

Its parts, each in a process of its own, so that a kernel that fails costs its part alone:
    about     versions, cards, drivers, device code, what would run and why
    selftest  every kernel against float64
    tests     the kernels' tests, in a checkout with pytest
    exchange  R, a strong load from L2, and S, from a strong store to where another block can see it
    model     what the simulator's clock says of a step, with the R and S that were measured (a checkout with an nvcc)
    steps     time of a step, T = 1024 less T = 512: the kernels alone, the layers, cuDNN's
    bench     the quick benchmark
Without a GPU it goes as far as the simulator does (FUSEDRNN_SIMULATE=1), at sizes that fit it; those are no times.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import fusedrnn
from fusedrnn import planning
from fusedrnn.backends import triton
from fusedrnn.backends.common import Gradients, Inputs, Saved, simulator
from fusedrnn.cells import CELLS

from . import measure, problems, providers, results, runner
from .problems import Problem

PARTS = ("about", "selftest", "tests", "exchange", "model", "steps", "bench")
SECONDS = {"about": 300, "selftest": 900, "tests": 3600, "exchange": 300, "model": 3600, "steps": 1800, "bench": 3600}
ROOT = Path(fusedrnn.__file__).resolve().parents[1]
TESTS = ("test_cuda_kernels.py", "test_recurrence.py", "test_cuda_launcher.py", "test_transforms.py")

# R and S in us where none were measured: those that docs/kernels.md expects of an H100.
EXPECTED = (0.20, 0.25)

# One thread of two blocks. exchange: they send each other a packet of 16 bytes in turn, and each waits for the other's;
# a word that is all ones has not come. chase: loads of which each says where the next one is, as the sum of its words.
KERNELS = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry exchange(.param .u64 boxes, .param .u32 rounds, .param .u32 partner)
{
.reg .pred %p<4>; .reg .b32 %r<12>; .reg .b64 %d<5>;
mov.u32 %r0, %tid.x;
setp.ne.u32 %p0, %r0, 0;
@%p0 bra DONE;
ld.param.u64 %d0, [boxes];
cvta.to.global.u64 %d0, %d0;
ld.param.u32 %r1, [rounds];
ld.param.u32 %r2, [partner];
mov.u32 %r3, %ctaid.x;
setp.eq.u32 %p1, %r3, 0;
setp.eq.u32 %p2, %r3, %r2;
or.pred %p3, %p1, %p2;
@!%p3 bra DONE;
mul.wide.u32 %d1, %r1, 16;
add.u64 %d1, %d0, %d1;
selp.b64 %d2, %d0, %d1, %p1;
selp.b64 %d3, %d1, %d0, %p1;
mov.u32 %r4, 0;
TOP:
@!%p1 bra WAIT;
PUT:
st.relaxed.gpu.global.v4.b32 [%d2], {%r4, %r4, %r4, %r4};
add.u64 %d2, %d2, 16;
@!%p1 bra NEXT;
WAIT:
ld.relaxed.gpu.global.v4.b32 {%r5, %r6, %r7, %r8}, [%d3];
max.u32 %r5, %r5, %r6;
max.u32 %r7, %r7, %r8;
max.u32 %r5, %r5, %r7;
setp.eq.u32 %p0, %r5, 0xFFFFFFFF;
@%p0 bra WAIT;
add.u64 %d3, %d3, 16;
@!%p1 bra PUT;
NEXT:
add.u32 %r4, %r4, 1;
setp.lt.u32 %p0, %r4, %r1;
@%p0 bra TOP;
DONE:
ret;
}
.visible .entry chase(.param .u64 links, .param .u32 count, .param .u32 unused)
{
.reg .pred %p<2>; .reg .b32 %r<10>; .reg .b64 %d<5>;
mov.u32 %r0, %tid.x;
setp.ne.u32 %p0, %r0, 0;
@%p0 bra DONE;
ld.param.u64 %d0, [links];
cvta.to.global.u64 %d0, %d0;
ld.param.u32 %r1, [count];
mov.u64 %d1, %d0;
mov.u32 %r2, 0;
TOP:
ld.relaxed.gpu.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1];
add.u32 %r4, %r4, %r5;
add.u32 %r6, %r6, %r7;
add.u32 %r4, %r4, %r6;
cvt.u64.u32 %d2, %r4;
add.u64 %d1, %d0, %d2;
add.u32 %r2, %r2, 1;
setp.lt.u32 %p0, %r2, %r1;
@%p0 bra TOP;
st.global.b32 [%d0+16], %r4;
DONE:
ret;
}
"""


class Driver:
    """The CUDA driver, or the simulator's stand-in, for kernels that are PTX text."""

    def __init__(self, device: torch.device):
        self.device, self.library = device, None
        if device.type == "cuda":
            self.dll = ctypes.CDLL("libcuda.so.1")
        else:
            self.library = simulator().default_library()
            self.dll = self.library.dll
        self.module = ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(self.module), KERNELS.encode())

    def _check(self, name: str, *arguments) -> None:
        if error := getattr(self.dll, name)(*arguments):
            raise RuntimeError(f"{name} failed: CUDA error {error}")

    def seconds(self, kernel: str, blocks: int, memory: torch.Tensor, count: int, other: int) -> float:
        """Wall-clock time of a launch of blocks of a warp, until it ends."""
        function = ctypes.c_void_p()
        self._check("cuModuleGetFunction", ctypes.byref(function), self.module, kernel.encode())
        values = ctypes.c_uint64(memory.data_ptr()), ctypes.c_uint32(count), ctypes.c_uint32(other)
        arguments = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values))
        registered = contextlib.nullcontext() if self.library is None else self.library.registered(memory)
        with registered:
            self._synchronize()
            start = time.perf_counter()
            self._check("cuLaunchKernel", function, blocks, 1, 1, 32, 1, 1, 0, None, arguments, None)
            self._synchronize()
            return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def difference(run, few: int, many: int, repeats: int) -> float:
    """Microseconds that one more takes: the least of several, of many less few."""
    least = {n: min(run(n) for _ in range(repeats)) for n in (few, many)}
    return (least[many] - least[few]) / (many - few) * 1e6


def exchange(device: torch.device) -> dict:
    driver, on_gpu = Driver(device), device.type == "cuda"
    few, many, repeats = (20_000, 60_000, 5) if on_gpu else (4, 12, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 8

    def links(bytes_each: int, count: int) -> torch.Tensor:
        """A ring through ``count`` packets, ``bytes_each`` apart, in a shuffled order."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        order = torch.cat([order[order == 0], order[order != 0]])
        ring = torch.zeros(count, bytes_each // 4, dtype=torch.int32)
        ring[order, 0] = (order.roll(-1) * bytes_each).int()
        return ring.to(device)

    ring = links(128, 4096 if on_gpu else 16)
    driver.seconds("chase", 1, ring, ring.shape[0], 0)
    load = difference(lambda n: driver.seconds("chase", 1, ring, n, 0), few, many, repeats)

    def rounds(partner: int) -> float:
        def run(count: int) -> float:
            boxes = torch.full((2 * count, 4), -1, dtype=torch.int32, device=device)
            took = driver.seconds("exchange", partner + 1, boxes, count, partner)
            if not torch.equal(boxes[:, 0].cpu(), torch.arange(count, dtype=torch.int32).repeat(2)):
                raise RuntimeError(f"the packets exchanged with block {partner} are not those that were sent")
            return took

        return difference(run, few, many, repeats)

    partners = sorted({1, 2, processors // 4, processors // 2, processors - 1})
    took = {partner: rounds(partner) for partner in partners}
    ways = [t / 2 for t in took.values()]
    if not on_gpu:
        return {"packets": "arrived", "partners": partners, "why_no_time": "simulated"}
    # Who polls sees the packet R after it is visible, on average: half a load late, half a load back.
    stores = [way - load for way in ways]
    return {
        "R_us": load,
        "S_us": {"least": min(stores), "median": sorted(stores)[len(stores) // 2], "most": max(stores)},
        "round_us_by_partner": took,
        "how": "R: strong loads that depend on each other, in L2; S: half of a round of two blocks, less R",
    }


def alone(backend: str, algorithm: str, backward: bool, problem: Problem, device: torch.device):
    """A call of one pass of a kernel, with as little around it as there can be: I = 8, no weight gradients."""
    module, cell = importlib.import_module(f"fusedrnn.backends.{backend}"), CELLS[problem.cell]
    dtype, scale = getattr(torch, problem.dtype), problem.H**-0.5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * by).to(dtype).to(device)

    T, B, H, gates = problem.T, problem.B, problem.H, len(cell.gates) * problem.H
    given = Inputs(
        draw(T, B, 8), draw(B, H), draw(B, H), draw(gates, 8, by=scale), draw(gates, H, by=scale), draw(gates),
        draw(gates), None, None, None, False,
    )  # fmt: skip
    if not backward:
        return lambda: module.forward(cell, given, algorithm, True, True)
    y, _, _, kept, cells = module.forward(cell, given, algorithm, True, True)
    grads, saved = Gradients(draw(T, B, H), None, None, None), Saved(y, kept, cells)
    return lambda: module.backward(cell, grads, given, saved, algorithm, [False] * 8)


# Backend, algorithm, warps of a program where not the plan's.
ALONE = (("cuda", "persistent", ""), ("cuda", "step", ""), ("triton", "step", ""),
         ("triton", "step", "1"), ("triton", "step", "2"), ("triton", "step", "4"))  # fmt: skip


def with_warps(warps: str, run):
    """``run`` with so many warps in a program of Triton's step."""

    def set_and_run():
        before = os.environ.get(triton.WARPS_VARIABLE)
        os.environ[triton.WARPS_VARIABLE] = warps
        try:
            return run()
        finally:
            os.environ.pop(triton.WARPS_VARIABLE)
            if before is not None:
                os.environ[triton.WARPS_VARIABLE] = before

    return set_and_run if warps else run


LAYERS = ("torch.nn", "torch.nn:flattened", "torch.nn:float16", "fusedrnn", "fusedrnn:cuda:step",
          "fusedrnn:cuda:persistent", "fusedrnn:triton:step")  # fmt: skip


def steps(device: torch.device) -> list[dict]:
    """Microseconds of a step: of T = 1024 less T = 512, so that launches and what is done once fall out."""
    on_gpu = device.type == "cuda"
    sizes = ((16, 768), (64, 1024)) if on_gpu else ((2, 32),)
    few, many = (512, 1024) if on_gpu else (2, 4)
    found = []
    for batch, hidden in sizes:
        by_length = {t: Problem("check", "lstm", t, batch, hidden, hidden, dtype="bfloat16") for t in (few, many)}
        makers = {
            ("kernel", f"{backend}:{algorithm}" + (warps and f" {warps} warps"), mode): (
                lambda p, b=backend, a=algorithm, m=mode, w=warps: with_warps(
                    w, alone(b, a, m == "backward", p, device)
                )
            )
            for backend, algorithm, warps in (ALONE if on_gpu else ALONE[:4])
            for mode in ("forward", "backward")
        }
        for name in LAYERS:
            if providers.PROVIDERS[name].why_not(device) is None:
                for mode in ("forward", "train"):
                    makers["layer", name, mode] = lambda p, n=name, m=mode: (
                        providers.PROVIDERS[n].make(providers.draw(p, device), m).run
                    )
        for (what, name, mode), make in makers.items():
            row = {"what": what, "name": name, "mode": mode, "B": batch, "H": hidden, "dtype": "bfloat16"}
            try:
                runs = {str(t): make(p) for t, p in by_length.items()}
                timed = measure.interleaved(runs, 21 if on_gpu else 3, 10.0, device)
                errors = [s for s in timed.values() if isinstance(s, str)]
                if errors:
                    row["why"] = errors[0]
                elif on_gpu:
                    took = timed[str(many)].quantile(0.5) - timed[str(few)].quantile(0.5)
                    row |= {"us_per_step": took / (many - few) * 1e6, "how": timed[str(many)].how}
                else:
                    row["why"] = "ran; simulated: no time"
            except Exception as error:  # as much as can be had of a card that nobody has seen
                row["why"] = measure.in_words(error)
            measure.give_memory_back(device)
            found.append(row)
    # A plan that a card has no room for is no failure, and a peer's failure is not ours.
    bad = [r for r in found if ("cuda" in r["name"] or "fusedrnn" in r["name"] or "triton" in r["name"])
           and "us_per_step" not in r and "cannot run" not in r["why"] and "simulated" not in r["why"]]  # fmt: skip
    if bad:
        raise PartError(f"{len(bad)} rows of ours have no time, the first: {bad[0]}", found)
    return found


def model(device: torch.device, load: float = EXPECTED[0], store: float = EXPECTED[1]) -> dict:
    """Microseconds of a step of the persistent kernels by the simulator's virtual clock: a model of an H100."""
    from . import gpu_cost

    if simulator(".build") is None or simulator(".build").cuda_home() is None:
        return {"left_out": "there is no simulator (a checkout) or no nvcc"}
    kernels = [k for k in gpu_cost.GOALS if k.algorithm == "persistent"]
    if device.type != "cuda":
        kernels = kernels[:2]  # B=16 H=768, a few seconds each
    said = {}
    for kernel in kernels:
        nanoseconds = gpu_cost.by_the_clock(kernel, round(load * 1e3), round(store * 1e3))["ns"]
        said[f"{'backward' if kernel.backward else 'forward'} B={kernel.batch} H={kernel.hidden}"] = nanoseconds / 1e3
    return {"R_us": load, "S_us": store, "us_per_step": said, "how": "a model of an H100, nothing measured but R and S"}


def about(device: torch.device) -> dict:
    info = subprocess.run(
        [sys.executable, "-m", "fusedrnn", "info", "--json"], capture_output=True, text=True, check=True
    )
    said = {"info": json.loads(info.stdout), "environment": asdict(results.environment(device, 1, False))}
    said["triton"] = getattr(importlib.import_module("triton"), "__version__", "") if _has("triton") else "none"
    said["python"] = sys.version
    said["nvidia_smi"] = results._output("nvidia-smi", "-q") if device.type == "cuda" else ""
    if device.type == "cuda":
        said["properties"] = str(torch.cuda.get_device_properties(device))
    layer = fusedrnn.LSTM(768, 768, device=device, dtype=torch.bfloat16, backend="cuda")
    said["plans"] = {f"backward={b}": fusedrnn.plan(layer, 16, backward=b).why for b in (False, True)}
    return said


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def selftest(device: torch.device) -> list[dict]:
    from fusedrnn.selftest import selftest

    found = [asdict(result) for result in selftest()]
    wrong = [r for r in found if r["verdict"] in ("DIFFERS", "FAILED")]
    if wrong:
        raise PartError(f"{len(wrong)} kernels are wrong or fail, the first: {wrong[0]}", found)
    return found


def tests(device: torch.device) -> dict:
    folder = ROOT / "tests"
    if not folder.exists() or not _has("pytest"):
        return {"left_out": "there is no checkout with tests, or no pytest"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "-p", "no:cacheprovider", "-k",
               "cuda or triton or kernels or graph", *(str(folder / name) for name in TESTS)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = {"command": " ".join(command), "rc": done.returncode, "output": done.stdout[-20_000:]}
    if done.returncode:
        raise PartError(f"pytest ended with {done.returncode}", said)
    return said


def bench(device: torch.device) -> list[dict]:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    given = ["--quick", "--dtype", "bfloat16"]
    arguments = parser.parse_args(given if device.type == "cuda" else [*given, "--rounds", "3"])
    chosen = problems.suite(arguments.suite, True, arguments.dtype)
    found, _ = providers.choose(None, device, True)
    with tempfile.TemporaryDirectory() as folder, results.Results(Path(folder)) as written:
        with measure.settings(arguments.threads, False):
            suite = runner.Suite(arguments, written, device, found)
            for problem, mode in suite.todo(chosen if device.type == "cuda" else chosen[:1]):
                suite.measure(problem, mode)
        return [asdict(row) for row in written.rows]


class PartError(Exception):
    """A part found something wrong; what it found nevertheless comes with it."""

    def __init__(self, words: str, found):
        super().__init__(words)
        self.found = found


def run_part(name: str, device: torch.device, *given: float) -> dict:
    start, said = time.perf_counter(), {"status": "ok"}
    try:
        said["found"] = globals()[name](device, *given)
    except PartError as error:
        said |= {"status": "failed", "why": str(error), "found": error.found}
    except Exception as error:  # goes into the file, with the others' results
        said |= {"status": "failed", "why": measure.in_words(error)}
    return said | {"seconds": round(time.perf_counter() - start, 1)}


def in_a_process(name: str, device: torch.device, given: tuple[float, ...] = ()) -> dict:
    """A part's result, from a process of its own; the model's runs in the simulator."""
    environment = dict(os.environ)
    if name == "model" and (ROOT / "tests" / "ptxsim").exists():
        environment.setdefault("FUSEDRNN_SIMULATE", str(ROOT / "tests" / "ptxsim"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, "-m", "fusedrnn.benchmarks.gpu_check", "--part", name, "--device", str(device),
                   "--out", str(path), "--given", *map(str, given)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS[name], env=environment)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"it took more than {SECONDS[name]} s"}
        if path.exists():
            return json.loads(path.read_text())
        return {"status": "failed", "why": f"its process ended with {done.returncode}", "stderr": done.stderr[-4000:]}


def lines(report: dict) -> list[str]:
    """The report for the console."""
    said = []
    for name, part in report["parts"].items():
        said.append(f"{name:<10}{part['status']}  {part.get('why', '')}")
        found = part.get("found")
        if name == "exchange" and found and "R_us" in found:
            said.append(f"          R {found['R_us']:.3f} us, S {found['S_us']['median']:.3f} us")
        for what, us in found.get("us_per_step", {}).items() if name == "model" and found else ():
            said.append(
                f"          persistent {what}: {us:.2f} us by a model, R {found['R_us']:.3f} S {found['S_us']:.3f}"
            )
        for row in found if name == "steps" and found else ():
            value = f"{row['us_per_step']:8.2f} us" if "us_per_step" in row else row["why"]
            what = f"{row['what']:<7}{row['name']:<26}{row['mode']:<9}B={row['B']} H={row['H']}"
            said.append(f"          {what}  {value}")
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[3:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process; used by the others")
    parser.add_argument("--given", nargs="*", type=float, default=[], help=argparse.SUPPRESS)
    parser.add_argument("--device", help="cuda[:n], or cpu for the simulator; default: a GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        device = runner.chosen_device(arguments.device)
        unknown = set(arguments.parts.split(",")) - set(PARTS)
        if unknown:
            raise ValueError(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        if device.type == "cpu" and "cuda" not in planning.machine().on_cpu:
            raise ValueError("there is no GPU, and no simulator (FUSEDRNN_SIMULATE=1 in a checkout, with an nvcc)")
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.part:
        arguments.out.write_text(json.dumps(run_part(arguments.part, device, *arguments.given)))
        return 0
    report = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fusedrnn": fusedrnn.__version__,
        "commit": results.commit(),
        "measured_on_a_gpu": device.type == "cuda",
        "parts": {},
    }
    for name in arguments.parts.split(","):
        print(f"{name} ...", flush=True)
        measured = report["parts"].get("exchange", {}).get("found", {}) if name == "model" else {}
        given = (measured["R_us"], max(measured["S_us"]["median"], 0.0)) if "R_us" in measured else ()
        report["parts"][name] = in_a_process(name, device, given)
        partial = arguments.out.with_suffix(".part")
        partial.write_text(json.dumps(report, indent=1) + "\n")  # a run that is cut off leaves what it found
        os.replace(partial, arguments.out)
    print("\n".join(lines(report)))
    print(f"{arguments.out}: the file to send back")
    return 1 if any(part["status"] != "ok" for part in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
