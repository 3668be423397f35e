"""What would run for a problem and why, what it moves, and the bound that a chip's published peaks set: ``explain``.

Nothing is computed and no GPU is needed: a chip that is not here is explained from its data sheet. No number in here is
a measurement.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedrnn import _build, planning
from fusedrnn.backends import cuda, cuda_plan, triton
from fusedrnn.cells import BUILT_IN, CELL_OF_MODE, CELLS, Cell, accumulation_dtype
from fusedrnn.ops import BACKEND_ALGORITHMS, DTYPES

BOUND = (
    "A bound follows from the chip's published peaks and is no measurement. Launches, latency and the exchange between "
    "blocks are not in it: small problems take many times as long."
)


@dataclass(frozen=True)
class Peaks:
    """A chip's compute capability, published peaks (TFLOP/s without sparsity, TB/s) and memory (GB).

    ``devices`` are what torch may call it, in part. A number without a source is None, and no bound rests on it.
    """

    capability: tuple[int, int]
    float64: float
    float32: float
    tf32: float
    half: float  # 16-bit operands, float32 sums
    bandwidth: float
    l2_bytes: int | None
    memory_gb: int
    devices: tuple[str, ...]


# NVIDIA's own numbers, the highest of a chip's variants, so that the bound holds for all of them; float64 is the tensor
# cores' rate, where there is one. Rates given with sparsity are halved.
PEAKS = {
    # NVIDIA A100 data sheet (80 GB SXM); L2: NVIDIA A100 Tensor Core GPU Architecture (whitepaper).
    "a100": Peaks((8, 0), 19.5, 19.5, 156.0, 312.0, 2.039, 40 << 20, 80, ("A100",)),
    # NVIDIA H100 data sheet; L2: NVIDIA H100 Tensor Core GPU Architecture (whitepaper).
    "h100-sxm": Peaks((9, 0), 67.0, 67.0, 494.7, 989.5, 3.35, 50 << 20, 80, ("H100 80GB HBM3",)),
    "h100-pcie": Peaks((9, 0), 51.2, 51.2, 378.0, 756.5, 2.0, 50 << 20, 80, ("H100 PCIe",)),
    # NVIDIA H200 data sheet: the rates of the H100 SXM. It does not give the size of L2, which is all of GH100's at
    # most: NVIDIA H100 Tensor Core GPU Architecture (whitepaper). Not GH200, whose memory is another.
    "h200": Peaks((9, 0), 67.0, 67.0, 494.7, 989.5, 4.8, 60 << 20, 141, ("NVIDIA H200",)),
    # NVIDIA Blackwell Architecture Technical Brief, HGX B200; tf32 as half of 16 bits, of which it gives two digits. It
    # does not give the size of L2. Not GB200, whose rates are higher.
    "b200": Peaks((10, 0), 40.0, 80.0, 1125.0, 2250.0, 8.0, None, 192, ("NVIDIA B200",)),
    # NVIDIA Ada GPU Architecture (whitepaper); its float64 runs at 1/64 of float32.
    "rtx-4090": Peaks((8, 9), 1.29, 82.6, 82.6, 165.2, 1.008, 72 << 20, 24, ("RTX 4090",)),
}


@dataclass(frozen=True)
class Pass:
    """Forward or backward of one sequence (one layer, one direction) on one backend.

    Fields that do not apply, or are not known, are None. Bytes and FLOPs are those of one step, in the kernels of the
    loop: bytes as asked of the caches by all blocks (docs/kernels.md), FLOPs of the matrix products alone.
    ``outside_flops`` are those of the matrix products before or after the loop, a step's share of them.

    Attributes:
        backend: "reference", "cpu", "triton" or "cuda".
        backward: the gradient.
        algorithm: None if the backend cannot run; ``why`` is then the reason.
        why: what led to the algorithm.
        others: (algorithm, why it is not taken) for the others of this backend.
        grid: blocks (Triton: programs) of a launch, where both directions of a layer are one launch the third number is
            2; threads: of a block, on a CPU those of the team.
        registers: of a thread, read from the compiled kernel; registers_why: where from, or why it is not known.
        shared_bytes: shared memory of a block; Triton's is planning's estimate.
        launches: of our kernels and of torch's, in a sequence, without matrix products outside of the loop.
        panel_bytes: recurrent weights, repacked, that are one CPU core's own.
        bound_us: no implementation of this plan on this chip can be faster for a sequence, matrix products outside of
            the loop included: the chip's published peaks allow no less. Microseconds. Launches, the exchange between
            blocks and latency, which no vendor publishes, are not in it: small problems take many times as long.
        bound_why: what sets the bound, or why there is none.
    """

    backend: str
    backward: bool
    algorithm: str | None
    why: str
    others: tuple[tuple[str, str], ...] = ()
    grid: tuple[int, ...] | None = None
    threads: int | None = None
    registers: int | None = None
    registers_why: str | None = None
    shared_bytes: int | None = None
    launches: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    flops: int | None = None
    outside_flops: int | None = None
    panel_bytes: int | None = None
    bound_us: float | None = None
    bound_why: str | None = None


@dataclass(frozen=True)
class Sequence:
    """``count`` sequences of equal sizes (layers and directions) and how each backend runs one."""

    layers: str
    count: int
    input_size: int
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Explanation:
    """See ``explain``. ``str()`` of it is the text that ``python -m fusedrnn explain`` prints."""

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    dtype: str
    tf32: bool
    training: bool
    device: str
    backend: str
    why: str
    sequences: tuple[Sequence, ...]
    warnings: tuple[str, ...] = ()  # what the numbers alone would not say: it does not fit, the bound is out of reach

    def __str__(self) -> str:
        sizes = f"T {self.steps}, B {self.batch}, I {self.input_size}, H {self.hidden_size}"
        if self.proj_size:
            sizes += f", P {self.proj_size}"
        math = "float32 in tf32" if self.tf32 else self.dtype
        lines = [
            f"{self.cell}, {sizes}, {math}, {'training' if self.training else 'inference'}, on {self.device}",
            f"runs: {self.backend} ({self.why})",
            *(f"warning: {text}" for text in self.warnings),
        ]
        for sequence in self.sequences:
            lines += ["", f"{sequence.layers}: {sequence.count} x (T {self.steps}, I {sequence.input_size})"]
            for one in sequence.passes:
                lines += _lines(one)
        if any(one.bound_us is not None for sequence in self.sequences for one in sequence.passes):
            lines += ["", BOUND]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Sizes:
    """One sequence. s: bytes of an element, acc: of a float of the carried state."""

    cell: Cell
    T: int
    B: int
    I: int
    H: int
    P: int
    dtype: torch.dtype
    tf32: bool
    training: bool

    @property
    def projected(self) -> bool:
        return self.P != self.H

    @property
    def s(self) -> int:
        return self.dtype.itemsize

    @property
    def acc(self) -> int:
        return accumulation_dtype(self.dtype).itemsize

    @property
    def G(self) -> int:
        return len(self.cell.gates)

    @property
    def A(self) -> int:
        return len(self.cell.accumulators)

    @property
    def S(self) -> int:
        return len(self.cell.saved)

    @property
    def state(self) -> int:
        """Bytes of one step's c."""
        return self.B * self.H * self.acc if self.cell.has_cell_state else 0


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _matmul_flops(z: _Sizes, backward: bool, inside: bool) -> tuple[int, int]:
    """(in the loop, outside of it) a step. ``inside``: the input projection is part of the step."""
    recurrent, project = 2 * z.B * z.G * z.H * z.P, 2 * z.B * z.P * z.H if z.projected else 0
    inputs = 2 * z.B * z.G * z.H * z.I
    if backward:  # dx and the gradients of W_ih, W_hh, W_hr are products over all rows
        return recurrent + project, 2 * inputs + recurrent + project
    return recurrent + project + (inputs if inside else 0), 0 if inside else inputs


def _pointwise_bytes(z: _Sizes, backward: bool, in_memory: bool) -> tuple[int, int]:
    """What the cell itself reads and writes a step. ``in_memory``: carried state is, between two launches."""
    unit = z.B * z.H * z.s
    if backward:
        uses_y = z.cell.saved == () or z.cell.has_direct
        read = z.S * unit + z.B * z.P * z.s + z.state + uses_y * unit
        carried = z.state + z.cell.has_direct * z.B * z.H * z.acc if in_memory else 0
        return read + carried + (z.state if in_memory else 0), carried
    saved = z.S * unit if z.training else 0
    cells = z.state if z.training or in_memory else 0
    return (z.state if in_memory else z.G * unit), z.B * z.P * z.s + saved + cells


def _step_bytes(z: _Sizes, backward: bool, units: int, rows: int, projection: tuple[int, int]) -> tuple[int, int]:
    """A step kernel's reads and writes, projection included: every block reads its weights and its rows again.

    A block has ``units`` by ``rows``; in the product with W_hr (backward: with W_hh) ``projection`` says how many.
    """

    def product(columns: int, k: int, block: tuple[int, int], gates: int = 1) -> int:
        width, rows = block
        return _blocks(columns, width) * (z.B + width * gates * _blocks(z.B, rows)) * k * z.s

    read, written = _pointwise_bytes(z, backward, in_memory=True)
    unprojected = z.B * z.H * z.s if z.projected else 0
    if not backward:
        read += product(z.H, z.I + z.P, (units, rows), z.G)
        if z.projected:
            read, written = read + product(z.P, z.H, projection), written + unprojected
        return read, written
    written += z.A * z.B * z.H * z.s
    if not z.projected:
        return read + product(z.H, z.G * z.H, (units, rows)), written
    total = z.B * z.P * z.s
    return read + product(z.P, z.G * z.H, projection) + product(z.H, z.P, (units, rows)), written + total


def _kept_bytes(z: _Sizes, backward: bool, exchanged_by: int) -> tuple[int, int]:
    """A step of a kernel that keeps W_hh: ``exchanged_by`` blocks of a slice each read its h, or its dgates."""
    read, written = _pointwise_bytes(z, backward, in_memory=False)
    unit = z.B * z.H * z.s
    width = z.G if backward else 1
    return read + exchanged_by * width * unit, written + (z.A * unit if backward else 0)


def _bound(z: _Sizes, backward: bool, flops: int, outside: int, blocks: int, inside: bool, chip, peaks: Peaks | None):
    """(microseconds of a sequence or None, why).

    A phase (the loop, the products outside of it) cannot move less through the memory than what it reads or writes once
    and L2 cannot hold; and a block cannot use more than one multiprocessor.
    """
    if peaks is None:
        return None, "no published peaks of this chip are known here"
    kind = "tf32" if z.tf32 else {8: "float64", 4: "float32", 2: "16-bit"}[z.s]
    peak = {"tf32": peaks.tf32, "float64": peaks.float64, "float32": peaks.float32}.get(kind, peaks.half) * 1e12
    share = min(1.0, blocks / chip.multiprocessors)
    compute = z.T * (flops / (peak * share) + outside / peak)
    busy = f"{min(blocks, chip.multiprocessors)} of {chip.multiprocessors} multiprocessors"
    if peaks.l2_bytes is None:
        return compute * 1e6, f"{kind} products on {busy}; memory left out: the size of L2 is not published"
    moved = 0
    for read, written in _phases(z, backward, inside):
        moved += max(0, read - peaks.l2_bytes) + max(0, written - peaks.l2_bytes)
    memory = moved / (peaks.bandwidth * 1e12)
    if memory > compute:
        return memory * 1e6, "memory: what L2 cannot hold"
    return compute * 1e6, f"{kind} products on {busy}"


def _phases(z: _Sizes, backward: bool, inside: bool) -> list[tuple[int, int]]:
    """Distinct bytes (read, written) of the loop and of the products outside of it, in a sequence."""
    rows = z.T * z.B * z.s
    w_ih, w_hh, w_hr = z.G * z.H * z.I * z.s, z.G * z.H * z.P * z.s, z.P * z.H * z.s if z.projected else 0
    saved = z.S * z.H * rows + z.T * z.state
    if backward:
        dgates = z.A * z.H * rows
        loop = saved + z.P * rows + w_hh + w_hr, dgates
        return [loop, (dgates + (z.I + z.P) * rows + w_ih, z.I * rows + w_ih + w_hh + w_hr)]
    written = z.P * rows + (saved if z.training else 0)
    if inside:
        return [(z.I * rows + w_ih + w_hh + w_hr, written)]
    return [(z.I * rows + w_ih, z.G * z.H * rows), (z.G * z.H * rows + w_hh + w_hr, written)]


def _cuobjdump() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = importlib.util.find_spec("triton")
    folders = [Path(home) / "bin"] if home else []
    folders += [Path(p) / "backends" / "nvidia" / "bin" for p in (found.submodule_search_locations if found else ())]
    places = [shutil.which("cuobjdump"), *(str(f / "cuobjdump") for f in folders)]
    return next((p for p in places if p and Path(p).exists()), None)


@functools.cache
def _compiled(image: str) -> tuple[dict[str, int], str]:
    """Registers of the kernels of an image, such as "sm_80.cubin", and why there are none."""
    tool, found = _cuobjdump(), {}
    if tool is None:
        return {}, "not known: there is no cuobjdump (CUDA toolkit, or the package triton) to read them with"
    for path in sorted(cuda.DEVICE_CODE.glob(f"*.{image}")):
        ran = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True)
        if ran.returncode:
            return {}, f"not known: cuobjdump failed: {ran.stderr.strip()}"
        found |= {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", ran.stdout)}
    return found, f"not known: no such kernel was found in {image}"


def _registers(
    z: _Sizes, algorithm: str, backward: bool, wide: bool, capability: tuple[int, int]
) -> tuple[int | None, str]:
    """Of the instance that the launcher takes (csrc/cuda/launcher.cpp); rows are taken to be aligned."""
    image = next(iter(cuda.images(capability)), None)
    if image is None:
        return None, "not known: there is no device code to read them from"
    if image.endswith(".ptx"):
        target = 10 * capability[0] + capability[1]
        return None, f"not known: there is no code for sm_{target}, the driver compiles {image}"
    kernels, why = _compiled(image)
    kernel = f"{algorithm}_{'backward' if backward else 'forward'}{'_wide' if wide else ''}"
    cell = z.cell.name.title().replace("_", "")
    dtype = "tf32" if z.tf32 else str(z.dtype).removeprefix("torch.")
    instance = re.compile(rf"{kernel}_{cell}_{dtype}_(\d+)_(whole|ragged)")
    instances = {(int(m[1]), m[2]): registers for name, registers in kernels.items() if (m := instance.fullmatch(name))}
    sizes = sorted({size for size, _ in instances})
    if algorithm == "persistent":
        row = _blocks(z.H * z.s, 16) * 16 * (z.G if backward else 1)
        size = next((n for n in sizes if row <= n * 64 * cuda_plan.WARPS), None)
        whole = row == (size or 0) * 64 * cuda_plan.WARPS and z.H * z.s % 16 == 0
    else:
        tiles = 2 if z.B <= 16 else 4
        size = next((n for n in reversed(sizes) if n <= tiles), None)
        k = (z.P if z.projected else z.H if z.A > z.G else z.G * z.H,) if backward else (z.I, z.P)
        whole = all(n * z.s % 16 == 0 for n in k)
    registers = instances.get((size, "whole" if whole else "ragged"))
    return registers, why if registers is None else f"of {image}"


def _others(plan: Callable[[str], object], algorithms: tuple[str, ...], taken: str) -> tuple[tuple[str, str], ...]:
    found = []
    for name in algorithms:
        if name not in ("auto", taken):
            try:
                plan(name)
                found.append((name, "possible, where it is asked for"))
            except (RuntimeError, ValueError) as error:
                found.append((name, str(error).split("cannot run: ")[-1]))
    return tuple(found)


def _cuda(
    z: _Sizes, backward: bool, algorithm: str, chip: cuda_plan.Chip, peaks: Peaks | None, capability, directions: int
) -> Pass:
    dtype = str(z.dtype).removeprefix("torch.")
    problem = cuda_plan.Problem(z.cell.name, dtype, z.B, z.H, z.projected, backward, z.tf32, z.T, directions=directions)
    plan = functools.partial(cuda_plan.plan, problem, chip)
    chosen = plan(algorithm)
    step = chosen.algorithm == "step"
    grid, shared = chosen.grid, chosen.shared_bytes
    units = cuda_plan.BACKWARD_UNITS if backward else cuda_plan.FORWARD_UNITS
    if step:
        rows = 16 if z.B <= 16 else 32
        if not backward and z.s == 8:
            rows = 8  # two tiles of doubles, and the copy of them that some cells need, do not fit in the registers
        grid = _blocks(z.H, units), _blocks(z.B, rows)
        pair = z.A + z.A % 2
        forward_bytes = rows * cuda_plan.WARPS * cuda_plan.FORWARD_UNITS * pair * z.acc
        shared = cuda_plan.BACKWARD_SUMS // 2 // 4 * z.acc if backward else forward_bytes
        read, written = _step_bytes(z, backward, units, rows, (cuda_plan.BACKWARD_UNITS, rows))
    else:
        read, written = _kept_bytes(z, backward, grid[0])
    flops, outside = _matmul_flops(z, backward, inside=step)
    wide = not backward and chosen.units == cuda_plan.WIDE_UNITS
    registers, registers_why = _registers(z, chosen.algorithm, backward, wide, capability)
    bound, bound_why = _bound(z, backward, flops, outside, grid[0] * grid[1], step, chip, peaks)
    return Pass(
        "cuda", backward, chosen.algorithm, chosen.why,
        _others(plan, BACKEND_ALGORITHMS["cuda"], chosen.algorithm),
        grid if chosen.directions == 1 else (*grid, chosen.directions), 32 * cuda_plan.WARPS, registers,
        registers_why, shared, z.T * (2 if z.projected else 1) if step else 1, read, written, flops, outside, None,
        bound, bound_why,
    )  # fmt: skip


def _triton(z: _Sizes, backward: bool, algorithm: str, chip: triton.Chip, peaks: Peaks | None) -> Pass:
    plan = lambda algorithm: triton.plan(
        z.cell, z.B, z.I, z.H, z.P if z.projected else 0, z.dtype,
        algorithm=algorithm, backward=backward, tf32=z.tf32, chip=chip,
    )  # fmt: skip
    chosen = plan(algorithm)
    step = chosen.algorithm == "step"
    if step:  # the projection is torch's matmul: it reads its operands once
        read, written = _step_bytes(z, backward, chosen.BU, chosen.BB, (z.P, z.B))
    else:
        read, written = _kept_bytes(z, backward, 0)
    flops, outside = _matmul_flops(z, backward, inside=step)
    blocks = chosen.grid[0] * chosen.grid[1]
    bound, bound_why = _bound(z, backward, flops, outside, blocks, step, chip, peaks)
    return Pass(
        "triton", backward, chosen.algorithm, chosen.why,
        _others(plan, BACKEND_ALGORITHMS["triton"], chosen.algorithm), chosen.grid, 32 * chosen.num_warps, None,
        "not known: Triton compiles at the first launch", chosen.shared_bytes,
        z.T * (2 if z.projected else 1) if step else 1, read, written, flops, outside, None, bound, bound_why,
    )  # fmt: skip


def _own_cache_bytes() -> int:
    try:
        found = os.sysconf(191)  # glibc's _SC_LEVEL2_CACHE_SIZE, for which Python has no name
    except OSError:
        found = 0
    return found if found > 0 else 1 << 20


def _cpu(z: _Sizes, backward: bool) -> Pass:
    """How csrc/cpu shares a sequence among threads: Sizes in sequence.cpp, Skeleton in recurrence_kernels.h."""
    available = torch.get_num_threads()
    product = z.B * z.G * z.H * z.P
    little = 2 * available > z.B
    too_small = (65536 if z.T == 1 else 200000) if little else 32768
    threads = 1 if product < too_small else available
    info = _build.build_info()
    capability = info["cpu_capability"]
    tiles = capability == "amx" and z.dtype is torch.bfloat16
    rows = z.T * z.B
    direct = rows <= (8 if tiles else 64) and (not backward or 4 * z.B >= z.T)
    lanes = {"portable": 16, "neon": 16, "avx2": 32}.get(capability, 64) // z.acc
    if tiles and not direct:
        capability = "amx: bfloat16 tiles"
    elif capability == "avx512_bf16" and z.dtype is torch.bfloat16 and not direct:
        capability = "avx512: dot products of bfloat16"
    elif capability in ("avx512_bf16", "amx"):
        capability = "avx512"
    wide = capability == "portable" and z.dtype is torch.float16
    weights = z.G * _blocks(z.H, 2 * lanes) * 2 * lanes * z.P * (z.acc if wide else z.s)
    cache = _own_cache_bytes()
    if threads == 1:
        why = "one thread" + ("" if available == 1 else ": the product of a step is too small to share")
        panel = weights
    elif not direct and 16 * threads <= z.B and weights <= cache // 4 * 3:
        why = f"{threads} threads share the rows of the batch, each with all of W_hh: no barrier"
        panel = weights
    else:
        why = f"{threads} threads share the units: each keeps its part of W_hh, with a barrier a step"
        panel = weights // threads
    if z.T == 1 and not direct and not backward and z.s > 2:
        panel = None
        why += f"; {capability}; both products are GEMMs"
    elif direct:
        panel = None
        why += f"; {capability}; W_hh is read where it lies: for so few rows it would not pay to repack it"
    else:
        fits = "fit" if panel <= cache else "do not fit"
        why += f"; {capability}; a core's panels of W_hh {fits} in its own cache of {_si(cache)}B"
    if z.s <= 4 and (backward or panel is not None):
        by_host = info["cpu_products"][str(z.dtype).removeprefix("torch.")] == "host"
        why += f"; products outside of the loop by {'the host' if by_host else 'panels of ours'}"
    flops, outside = _matmul_flops(z, backward, inside=False)
    return Pass(
        "cpu", backward, "persistent", why, threads=threads, launches=1, flops=flops, outside_flops=outside,
        panel_bytes=panel, bound_why="no peaks are published for a CPU that shares its cores",
    )  # fmt: skip


def _check(cell, steps, batch, input_size, hidden_size, proj_size, num_layers, dtype, tf32, device, chip) -> None:
    if cell not in BUILT_IN:
        raise ValueError(f"cell must be one of {', '.join(BUILT_IN)}, got {cell!r}")
    sizes = {"steps": steps, "batch": batch, "hidden_size": hidden_size, "input_size": input_size}
    for name, value in (sizes | {"num_layers": num_layers}).items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if proj_size and cell != "lstm":
        raise ValueError(f"proj_size exists only for the lstm, got {proj_size} for {cell}")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(f"proj_size must be at least 0 and less than hidden_size={hidden_size}, got {proj_size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if tf32 and dtype != torch.float32:
        raise ValueError(f"tf32 is a way to multiply float32, got {dtype}")
    if chip is not None and chip not in cuda_plan.CHIP_LIMITS:
        raise ValueError(f"chip must be one of {', '.join(cuda_plan.CHIP_LIMITS)}, got {chip!r}")
    if chip is not None and device is not None:
        raise ValueError(f"either a chip or a device of this machine, got chip={chip!r} and device={str(device)!r}")


def _of_layer(layer: torch.nn.Module, given: dict) -> dict:
    """The arguments of explain that a layer or cell knows by itself.

    Raises:
        TypeError: it is no layer of ours, or something that it knows is given as well.
    """
    layer = planning.recurrent_layer(layer, "explain")
    if layer.mode not in CELL_OF_MODE:
        raise TypeError(f"explain knows the built-in cells, got a Layer: print its cell, {layer.cell.name}")
    twice = [name for name, (value, default) in given.items() if value != default]
    if twice:
        raise TypeError(
            f"explain takes {', '.join(twice)} from the layer: leave it out, or name a cell instead of a layer"
        )
    weight = layer._weights()[1]
    return {
        "cell": CELL_OF_MODE[layer.mode].name,
        "input_size": layer.input_size,
        "hidden_size": layer.hidden_size,
        "proj_size": getattr(layer, "proj_size", 0),
        "num_layers": getattr(layer, "num_layers", 1),
        "bidirectional": getattr(layer, "bidirectional", False),
        "dtype": weight.dtype,
        "asked": (layer.backend, layer.algorithm),
        "device": weight.device,
        "recompute": getattr(layer, "recompute", False),
    }


# Microseconds of a step below which a bound is warned of: no vendor publishes how long a launch or an exchange between
# blocks takes, and a bound of this size says nothing beside it.
LEAST_STEP_US = 1.0


def _warnings(
    sizes: "list[_Sizes]", counts: list[int], sequences, memory: int, name: str, missing: str
) -> tuple[str, ...]:
    """What the numbers alone do not say."""
    found = []
    if missing:
        found.append(f"this installation has no CUDA kernels ({missing}): the plan is that of one that has them")
    needed = 0
    for z, count in zip(sizes, counts):
        weights = (z.G * z.H * (z.I + z.P) + (z.P * z.H if z.projected else 0)) * z.s
        saved = z.T * (z.S * z.B * z.H * z.s + z.state) if z.training else 0
        rows = z.T * z.B * (z.I + z.P) * z.s
        needed += count * (weights * (2 if z.training else 1) + saved + rows)
    if memory and needed > memory:
        what = "weights, their gradients, x, y and saved gates" if sizes[0].training else "weights, x and y"
        found.append(f"it does not fit: {what} take {_si(needed)}B at least, {name} has {_si(memory)}B")
    bounds = [p.bound_us / z.T for z, sequence in zip(sizes, sequences) for p in sequence.passes if p.bound_us]
    if bounds and min(bounds) < LEAST_STEP_US:
        found.append(
            f"a bound below is {min(bounds):.2g} us a step. Steps depend on each other, and each waits for a launch or "
            "for an exchange between blocks, which a bound does not count: take it for no time"
        )
    return tuple(found)


def explain(
    cell: str | torch.nn.Module = "lstm",
    *,
    steps: int,
    batch: int,
    input_size: int | None = None,
    hidden_size: int | None = None,
    proj_size: int = 0,
    num_layers: int = 1,
    bidirectional: bool = False,
    dtype: torch.dtype = torch.float32,
    tf32: bool = False,
    training: bool = True,
    device: torch.device | str | None = None,
    chip: str | None = None,
) -> Explanation:
    """What would run for these sizes, and why: plans, grids, memory, operations, bounds. Computes nothing.

    A backend that is forced, by :class:`fusedrnn.backend` or FUSEDRNN_BACKEND, is what runs; where it cannot, none is.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu"; or a layer or cell of fusedrnn, which brings its sizes, dtype and
            device (unless a chip or device is named) and the backend that it was made with.
        steps: T, the length of a sequence.
        batch: B.
        input_size: I.
        hidden_size: H.
        proj_size: P; 0 is no projection.
        num_layers: L.
        bidirectional: D is 2.
        dtype: of the tensors: float32, float64, bfloat16 or float16.
        tf32: products of float32 are rounded to tf32, as ``torch.backends.cudnn.allow_tf32`` asks for.
        training: gates are saved, and backward is explained as well.
        device: of this machine; by default the GPU if there is one, else the CPU.
        chip: instead of a device, the name of a GPU that need not be here: a100, h100-sxm, h100-pcie, h200, b200,
            rtx-4090.

    Returns:
        The explanation, for each size of layer one ``Sequence`` with a ``Pass`` for each backend and direction. Its
        ``warnings`` say where the problem does not fit, and where a bound is far below what dependent steps can reach.

    Raises:
        TypeError: a layer that is none of fusedrnn's, a size that the layer has itself, or one that is no integer.
        ValueError: there is no such cell or chip, the sizes are wrong, the device is meta, or FUSEDRNN_BACKEND names no
            backend.
        RuntimeError: the device is not here.
    """
    asked, recompute = None, False
    if not isinstance(cell, str):
        given = {"input_size": (input_size, None), "hidden_size": (hidden_size, None), "proj_size": (proj_size, 0),
                 "num_layers": (num_layers, 1), "bidirectional": (bidirectional, False),
                 "dtype": (dtype, torch.float32)}  # fmt: skip
        own = _of_layer(cell, given)
        input_size, hidden_size, proj_size = own["input_size"], own["hidden_size"], own["proj_size"]
        num_layers, bidirectional, dtype = own["num_layers"], own["bidirectional"], own["dtype"]
        cell, asked, recompute = own["cell"], own["asked"], own["recompute"]
        device = own["device"] if device is None and chip is None else device
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
        if value is None:
            raise TypeError(f"explain needs {name}=, or a layer of fusedrnn as its first argument")
    _check(cell, steps, batch, input_size, hidden_size, proj_size, num_layers, dtype, tf32, device, chip)
    if chip is None:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise ValueError("device must be one that computes, got 'meta': its tensors have no data, nothing runs")
        torch.empty(0, device=device)
    on_gpu = chip is not None or device.type == "cuda"
    limits = peaks = gpu = capability = None
    if chip is not None:
        limits, peaks = cuda_plan.CHIP_LIMITS[chip], PEAKS[chip]
        capability = peaks.capability
        gpu = triton.chip_of(capability, limits.multiprocessors, limits.shared_per_block)
        name, machine = f"{chip} (from its data sheet)", planning.Machine()
    elif on_gpu:
        gpu, name, machine = triton._chip(device), torch.cuda.get_device_name(device), planning.machine()
        if torch.version.cuda:  # ROCm has no CUDA kernels
            limits, capability = cuda.chip(device), torch.cuda.get_device_capability(device)
        peaks = next((p for p in PEAKS.values() if any(d in name for d in p.devices)), None)
    else:
        name, machine = f"this machine's {device.type}", planning.machine()

    kind = "cuda" if on_gpu else device.type
    problem = planning.Problem(cell, input_size, hidden_size, proj_size, dtype, kind, capability)
    forced = planning.asked_for()
    if asked is not None and asked != (None, None):
        forced = planning._innermost(tuple(planning._forced), *asked)
    try:
        choice = planning.decide(problem, machine, *forced)
    except RuntimeError as error:  # what was asked for cannot run there
        choice = planning.Choice("none", "auto", str(error))

    def sizes_of(inputs: int) -> _Sizes:
        return _Sizes(CELLS[cell], steps, batch, inputs, hidden_size, proj_size or hidden_size, dtype, tf32, training)

    at_once = 2 if bidirectional and not recompute else 1

    def passes(z: _Sizes) -> tuple[Pass, ...]:
        found = []
        for backend in ("cuda", "triton", "cpu"):
            reason = planning.unsupported(backend, problem, machine)
            if reason is None and backend in machine.on_cpu and not on_gpu:
                reason = "it would run in the simulator or the interpreter, to be checked, not to be fast"
            for backward in (False, True) if training else (False,):
                algorithm = choice.algorithm if backend == choice.backend else "auto"
                try:
                    if reason is not None:
                        found.append(Pass(backend, backward, None, reason))
                    elif backend == "cuda":
                        found.append(_cuda(z, backward, algorithm, limits, peaks, capability, at_once))
                    elif backend == "triton":
                        found.append(_triton(z, backward, algorithm, gpu, peaks))
                    else:
                        found.append(_cpu(z, backward))
                except (RuntimeError, ValueError) as error:  # not the algorithm that was asked for, for these sizes
                    found.append(Pass(backend, backward, None, str(error).split("cannot run: ")[-1]))
        return tuple(found)

    directions = 2 if bidirectional else 1
    sizes = [sizes_of(input_size)]
    sequences = [Sequence("layer 0", directions, input_size, passes(sizes[0]))]
    if num_layers > 1:
        inputs = directions * (proj_size or hidden_size)
        layers = "layer 1" if num_layers == 2 else f"layers 1 to {num_layers - 1}"
        sizes.append(sizes_of(inputs))
        sequences.append(Sequence(layers, directions * (num_layers - 1), inputs, passes(sizes[1])))
    memory = peaks.memory_gb * 10**9 if chip else _memory(device)
    missing = (cuda.missing() or "") if chip else ""
    warnings = _warnings(sizes, [s.count for s in sequences], sequences, memory, name, missing)
    return Explanation(
        cell, steps, batch, input_size, hidden_size, proj_size, num_layers, bidirectional,
        str(dtype).removeprefix("torch."), tf32, training, name, choice.backend, choice.why, tuple(sequences), warnings,
    )  # fmt: skip


def _memory(device: torch.device) -> int:
    """Bytes that a device of this machine has; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else 0
    except (OSError, ValueError):
        return 0


def _si(n: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} "


def _lines(one: Pass) -> list[str]:
    """A pass as text; of a backend that cannot run one line is enough."""
    indent = " " * 18
    head = f"  {one.backend:<7}{'backward' if one.backward else 'forward':<9}"
    if one.algorithm is None:
        return [] if one.backward else [f"  {one.backend:<7}cannot run: {one.why}"]
    lines = [f"{head}{one.algorithm}: {one.why}"]
    lines += [f"{indent}not {name}: {why}" for name, why in one.others if why not in one.why]
    if one.grid is not None:
        registers = one.registers_why if one.registers is None else f"{one.registers} ({one.registers_why})"
        grid = " x ".join(map(str, one.grid))
        launches = "1 launch" if one.launches == 1 else f"{one.launches} launches"
        lines += [
            f"{indent}{launches} of {grid} blocks of {one.threads} threads"
            + (", the third number are directions; what follows is of one" if len(one.grid) == 3 else ""),
            f"{indent}{_si(one.shared_bytes)}B of shared memory a block; registers a thread: {registers}",
            f"{indent}a step reads {_si(one.read_bytes)}B and writes {_si(one.written_bytes)}B",
        ]
    if one.panel_bytes is not None:
        lines.append(f"{indent}{_si(one.panel_bytes)}B of weights a core")
    lines.append(f"{indent}{_si(one.flops)}FLOP a step; in products outside of the loop {_si(one.outside_flops)}FLOP")
    if one.bound_us is None:
        return [*lines, f"{indent}no bound: {one.bound_why}"]
    digits = 0 if one.bound_us >= 100 else 2
    return [*lines, f"{indent}bound: at least {one.bound_us:,.{digits}f} us a sequence ({one.bound_why})"]
