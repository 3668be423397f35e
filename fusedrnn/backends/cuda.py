"""The backend "cuda": the kernels of csrc/cuda, reached through ctypes.

The launchers (libfusedrnn_cuda.so) take raw pointers and a stream; outputs and scratch memory are made here, with
torch, so a launch allocates nothing and waits for nothing. They load the device code (fusedrnn/device) through the
CUDA driver, or through that of tests/ptxsim, which takes CPU tensors (FUSEDRNN_SIMULATE=1 in a checkout, or the path of
tests/ptxsim).

Saved gates have a layout of their own: [rows, H, S], the S values of a unit side by side; see ops.gates_in_torch_order.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import itertools
import sys
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrnn._build import build_info
from fusedrnn.backends.common import (
    Gradients,
    Inputs,
    Saved,
    allow_tf32,
    apart,
    check_kernels,
    dense,
    empty_stack,
    gate_columns,
    last_rows,
    product,
    products_of_rows,
    recurrent_product,
    rows_of,
    simulator,
    simulator_folder,
    sizes_on,
    stacked,
    weight_gradients,
)
from fusedrnn.backends.cuda_plan import CHIP_LIMITS, Chip, Plan, Problem, plan
from fusedrnn.cells import BUILT_IN, Cell, accumulation_dtype

_FLOAT64, _FLOAT32, _TF32, _BFLOAT16, _FLOAT16 = range(5)
_DTYPE_IDS = {
    torch.float64: _FLOAT64,
    torch.float32: _FLOAT32,
    torch.bfloat16: _BFLOAT16,
    torch.float16: _FLOAT16,
}
# A poll takes about half a microsecond on a GPU: some seconds.
_POLL_LIMIT = 1 << 23
# CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, CUDA_ERROR_NOT_SUPPORTED.
_REFUSALS = (720, 801)
# FUSEDRNN_NO_CODE of csrc/cuda/launcher.h.
_NO_CODE = 998
_POLL_LIMIT_SIMULATED = 20_000


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def _integers(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_EXCHANGE = [
    *_integers("slice_rows groups", ctypes.c_int32),
    ("poll_limit", ctypes.c_uint32),
    ("units", ctypes.c_int32),
    ("fault", ctypes.c_void_p),
]


class _Forward(ctypes.Structure):
    """FusedrnnForward of csrc/cuda/params.h, where the fields are explained."""

    _fields_ = [
        *_integers("cell dtype reverse reserved", ctypes.c_int32),
        *_integers("steps batch input hidden out", ctypes.c_int64),
        *_pointers("offsets_host offsets_device x h0 c0 w_ih w_hh b_ih b_hh w_hr resets zeros"),
        *_pointers("y h_n c_n gates cells state unprojected"),
        *_EXCHANGE,
    ]


class _Backward(ctypes.Structure):
    """FusedrnnBackward of csrc/cuda/params.h."""

    _fields_ = [
        *_integers("cell dtype reverse reserved", ctypes.c_int32),
        *_integers("steps batch hidden out", ctypes.c_int64),
        *_pointers("offsets_host offsets_device dy dh_n dc_n w_hh_t w_hr_t gates cells c0 h0 y resets dcells"),
        *_pointers("dgates dc0 dh_direct state dy_total"),
        *_EXCHANGE,
    ]


class _OwnForward(_Forward):
    """FusedrnnOwnForward of csrc/cuda/params.h."""

    _fields_ = [*_pointers("parameters inputs"), *_integers("rows heads", ctypes.c_int64)]


class _CellStep(_OwnForward):
    """FusedrnnCellStep of csrc/cuda/params.h."""

    _fields_ = [*_pointers("x_product h_product"), *_integers("first count", ctypes.c_int64)]


class _OwnBackward(_Backward):
    """FusedrnnOwnBackward of csrc/cuda/params.h."""

    _fields_ = [*_pointers("parameters inputs dparameters dinputs"), *_integers("rows heads", ctypes.c_int64)]


class _OwnCell(ctypes.Structure):
    """FusedrnnOwnCell of csrc/cuda/params.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *_integers("gates accumulators saved states gap reserved", ctypes.c_int32),
    ]


class _RefusedError(RuntimeError):
    """The device does not hold so many blocks at once, or launches none that wait for each other."""


class _Kernels:
    """The launchers, with the device code of a folder and a driver, real or simulated. Raises RuntimeError."""

    def __init__(self, library: Path, driver: str, folder: Path, simulator=None):
        self.dll = _launchers(library)
        self.folder, self.simulator = folder, simulator
        self._handle = self.dll.fusedrnn_open(driver.encode(), str(folder).encode())
        if not self._handle:
            raise RuntimeError(f"backend 'cuda' cannot run: {self.dll.fusedrnn_error().decode()}")
        names = itertools.takewhile(bool, map(self.dll.fusedrnn_cell_name, itertools.count()))
        self._cells = [name.decode() for name in names]
        self._own: dict[str, int] = {}
        self._lock = threading.Lock()
        if simulator is None:
            atexit.register(self.tell_fault)

    def number_of(self, cell: Cell) -> int:
        return self._cells.index(cell.name)

    def number_of_own(self, cell: Cell) -> int:
        """The number of a cell that is compiled at its first use, kernel by kernel."""
        with self._lock:
            if cell.name not in self._own:
                gap = cell.h_acc != tuple(range(len(cell.gates)))
                counts = (len(names) for names in (cell.gates, cell.accumulators, cell.saved, cell.states))
                facts = _OwnCell(cell.name.encode(), *counts, gap)
                number = self.dll.fusedrnn_add_cell(self._handle, ctypes.byref(facts))
                if number < 0:
                    raise RuntimeError(f"backend 'cuda' cannot run: {self.dll.fusedrnn_error().decode()}")
                self._own[cell.name] = number
            return self._own[cell.name]

    def _compile(self, number: int, kernel: str, device: torch.device) -> None:
        """Makes the code of a kernel of a cell of one's own, for a device."""
        from fusedrnn import compiled

        image = "compute_80.ptx"
        if device.type == "cuda":
            image = "sm_{}{}.cubin".format(*torch.cuda.get_device_capability(device))
        with self._lock:
            name = next(name for name, n in self._own.items() if n == number)
            path = compiled.device_code(name, kernel, image)
            if self.simulator is not None and kernel.startswith("persistent"):
                self.simulator.set_registers(simulator(".build").registers_of(path.read_text(), 90))
            self.dll.fusedrnn_add_code(self._handle, number, kernel.encode(), str(path).encode())

    def launch(self, name: str, *calls: tuple[ctypes.Structure, dict[str, Tensor | None]]) -> None:
        """Fills in the pointers and launches on the current stream of the tensors' device: one direction of a layer, of
        persistent perhaps both.
        """
        for params, tensors in calls:
            for field, tensor in tensors.items():
                setattr(params, field, None if tensor is None or tensor.numel() == 0 else tensor.data_ptr())
        params, tensors = calls[0]
        arguments = [ctypes.byref(params)]
        if name.startswith("persistent"):
            arguments = [(type(params) * len(calls))(*(each for each, _ in calls)), len(calls)]
        function = functools.partial(getattr(self.dll, f"fusedrnn_{name}"), self._handle, *arguments)
        device = tensors["y" if "y" in tensors and tensors["y"] is not None else "dgates"].device
        used = [t for _, tensors in calls for t in tensors.values() if t is not None and t.numel() > 0]
        while True:
            if self.simulator is not None:
                with self.simulator.registered(*used):
                    error = function(0, None)
            else:
                error = function(device.index, torch.cuda.current_stream(device).cuda_stream)
            if error != _NO_CODE:
                break
            self._compile(params.cell, self.dll.fusedrnn_error().decode(), device)
        if error:
            kind = _RefusedError if error in _REFUSALS else RuntimeError
            raise kind(f"fusedrnn: the launch of {name} failed: {self.dll.fusedrnn_error().decode()}")

    def tell_fault(self) -> None:
        """At the end of the process: which packet never came, where a persistent kernel gave up. Its trap kills the
        context, so that torch raises at whatever call comes next, and knows only that a kernel failed.
        """
        if words := self.dll.fusedrnn_fault(self._handle).decode():
            print(f"fusedrnn: {words}", file=sys.stderr)


@functools.cache
def _launchers(path: Path) -> ctypes.CDLL:
    dll = ctypes.CDLL(str(path))
    text, pointer, integer = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("open", pointer, [text, text]),
        ("error", text, []),
        ("images", text, [text, integer, integer]),
        ("cell_name", text, [integer]),
        ("add_cell", integer, [pointer, pointer]),
        ("add_code", integer, [pointer, integer, text, text]),
        ("cooperative", integer, [pointer, integer]),
        ("fault", text, [pointer]),
        *((f"step_{what}", integer, [pointer, pointer, integer, pointer]) for what in ("forward", "backward", "cell")),
        *((f"persistent_{what}", integer, [pointer, pointer, integer, integer, pointer])
          for what in ("forward", "backward")),
    ):  # fmt: skip
        function = getattr(dll, f"fusedrnn_{name}")
        function.restype, function.argtypes = result, arguments
    return dll


def _simulate(sources: Path, only: Sequence[str] | None = None) -> _Kernels:
    """The kernels of a folder (of some files only) and their launcher, compiled in the simulator's cache."""
    ptxsim = simulator()
    cache, library = ptxsim.build, ptxsim.default_library()
    spec = importlib.util.spec_from_file_location("fusedrnn_device_code", sources / "device_code.py")
    device_code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device_code)
    compiler = device_code.find_compiler()

    def compile_one(source: Path) -> tuple[Path, dict[str, int]]:
        with cache.folder_of("kernel", *cache.dependencies([source]), compiler) as folder:
            path = folder / f"{source.stem}.compute_80.ptx"
            if not (folder / device_code.RECORD).exists():
                device_code.compile_images(folder, ["compute_80.ptx"], 1, compiler, [source])
        return path, ptxsim.registers_of(path.read_text(), 90)

    with cache.folder_of("launcher", *cache.dependencies([sources / "launcher.cpp"])) as folder:
        launcher = folder / device_code.LAUNCHER
        if not launcher.exists():
            device_code.compile_launcher(launcher)
    chosen = sources.glob("*.cu") if only is None else [sources / f"{name}.cu" for name in only]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sorted(chosen, key=lambda path: -path.stat().st_size)))
    with cache.folder_of("kernels", *(path.parent.name for path, _ in compiled)) as folder:
        for path, registers in compiled:
            library.set_registers(registers)  # on an H100: how many blocks are resident depends on them
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return _Kernels(launcher, str(library.path), folder, library)


@functools.cache
def _simulated(built_in: bool = True) -> _Kernels:
    """Without those of built-in cells, which take long to compile, if only a cell of one's own is called."""
    return _simulate(simulator_folder().parents[1] / "csrc" / "cuda", None if built_in else ())


_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY, DEVICE_CODE = _PACKAGE / "libfusedrnn_cuda.so", _PACKAGE / "device"


def missing() -> str:
    """Why there are no kernels for CUDA tensors; empty where there are. Opens nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if _LIBRARY.exists() and any(DEVICE_CODE.glob("*.*")):
        return ""
    info = build_info()
    if info["cuda_built"]:
        return "they were built, but fusedrnn/device or fusedrnn/libfusedrnn_cuda.so is missing: install again"
    return info["cuda_why"]


def images(capability: tuple[int, int]) -> list[str]:
    """The device code that a card of this compute capability may take, the best first; the driver has the last word."""
    if missing():
        return []
    return _launchers(_LIBRARY).fusedrnn_images(str(DEVICE_CODE).encode(), *capability).decode().split()


@functools.cache
def _compiled() -> _Kernels:
    if why := missing():
        raise RuntimeError(f"backend 'cuda' cannot run: {why}")
    return _Kernels(_LIBRARY, "libcuda.so.1", DEVICE_CODE)


def _kernels(device: torch.device, built_in: bool = True) -> _Kernels:
    if device.type == "cuda":
        return _compiled()
    if device.type == "cpu" and simulator_folder() is not None:
        return _simulated() if built_in else _simulated(False)
    raise RuntimeError(
        f"backend 'cuda' takes CUDA tensors (or CPU tensors with FUSEDRNN_SIMULATE=1), got {device.type}"
    )


@functools.cache
def why_not(index: int | None) -> str:
    """Why there are no kernels for a CUDA device; empty where there are. Opens the driver."""
    if why := missing():
        return why
    try:
        _compiled()
    except RuntimeError as error:
        return str(error).removeprefix("backend 'cuda' cannot run: ")
    major, minor = torch.cuda.get_device_capability(index)
    built = sorted({path.name.split(".", 1)[1] for path in DEVICE_CODE.glob("*.*")})
    return "" if images((major, minor)) else f"compute capability {major}.{minor} takes none of {', '.join(built)}"


@functools.cache
def _chip(index: int | None) -> Chip:
    p = torch.cuda.get_device_properties(index)
    cooperative = True
    if not why_not(index):
        kernels, number = _compiled(), torch.cuda.current_device() if index is None else index
        cooperative = bool(kernels.dll.fusedrnn_cooperative(kernels._handle, number))
    return Chip(p.name, p.multi_processor_count, p.shared_memory_per_block_optin, cooperative)


# (device type, index) -> as many blocks as it holds at once, where it holds fewer than it has multiprocessors.
_resident: dict[tuple[str, int | None], int] = {}


def chip(device: torch.device) -> Chip:
    """The limits of a device; the simulator stands for an H100."""
    found = _chip(device.index) if device.type == "cuda" else CHIP_LIMITS["h100-sxm"]
    most = _resident.get((device.type, device.index), found.multiprocessors)
    if most >= found.multiprocessors:
        return found
    return replace(found, name=f"{found.name}, of which this process gets a part,", multiprocessors=most)


def _refused(device: torch.device, chosen: Plan, error: _RefusedError) -> None:
    """A launch of the plan was refused: the next one is made for a device that holds fewer blocks."""
    blocks = chosen.grid[0] * chosen.grid[1] * chosen.directions
    _resident[device.type, device.index] = blocks - 1
    warnings.warn(
        f"{error}. fusedrnn plans for less than {blocks} blocks at once from now on, or one launch a step, which "
        "is slower (a share of a GPU, of MPS or of a virtual one, has fewer multiprocessors than the GPU says)",
        RuntimeWarning,
        stacklevel=2,
    )


def _dtype_id(dtype: torch.dtype) -> int:
    if dtype == torch.float32 and allow_tf32():
        return _TF32
    return _DTYPE_IDS[dtype]


def _per_packet(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _is_own(cell: Cell, heads: int) -> bool:
    """Whether the kernels are compiled at their first use: those of built-in cells have one head."""
    return cell.name not in BUILT_IN or heads != 1


def _kernels_for(cell: Cell, inputs: Inputs) -> tuple[_Kernels, int]:
    """What launches, and the cell's number there."""
    if _is_own(cell, inputs.heads):
        kernels = _kernels(inputs.x.device, False)
        return kernels, kernels.number_of_own(cell)
    kernels = _kernels(inputs.x.device)
    return kernels, kernels.number_of(cell)


def _of_own(cell: Cell, inputs: Inputs, rows: int) -> tuple[dict[str, int], dict[str, Tensor | None]]:
    """Fields and tensors that calls of a cell of one's own have beside the others."""
    if not _is_own(cell, inputs.heads):
        return {}, {}
    tensors = {"parameters": stacked(inputs.parameters), "inputs": stacked([rows_of(t) for t in inputs.inputs])}
    return {"rows": rows, "heads": inputs.heads}, tensors


def _padded_heads(t: Tensor, heads: int, length: int) -> Tensor:
    """[..., H], each head's units padded with zeros to ``length``; as ``_padded``."""
    if heads == 1:
        return _padded(t, length)
    return _padded(t.unflatten(-1, (heads, -1)), length).flatten(-2)


def _padded(t: Tensor, columns: int) -> Tensor:
    """``t`` with zeros up to ``columns``; contiguous and at a multiple of 16 bytes."""
    if t.shape[-1] == columns:
        t = t.contiguous()
        return t if t.data_ptr() % 16 == 0 else t.clone()
    return torch.nn.functional.pad(t, (0, columns - t.shape[-1]))


def _mailbox(like: Tensor, *shape: int) -> Tensor:
    """An output with the sentinel in every packet."""
    box = like.new_empty(shape)
    box.view(torch.uint8).fill_(0xFF)
    return box


def _offsets(batch_sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """[T + 1] first row of every step; None when every step has B rows."""
    if batch_sizes is None:
        return None
    return torch.nn.functional.pad(sizes_on(batch_sizes, device).cumsum(0), (1, 0))


def _check(algorithm: str) -> None:
    if algorithm not in ("auto", "step", "persistent"):
        raise RuntimeError(f"backend 'cuda' has the algorithms step and persistent, got {algorithm!r}")


def plan_for(
    cell: Cell,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    dtype: torch.dtype,
    device: torch.device,
    algorithm: str,
    backward: bool,
    steps: int | None = None,
    heads: int = 1,
    directions: int = 1,
) -> Plan:
    """The plan on a device of this machine. Raises RuntimeError if the algorithm asked for cannot run."""
    problem = Problem(
        cell=cell.name,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        hidden=hidden_size,
        projected=proj_size > 0,
        backward=backward,
        tf32=_dtype_id(dtype) == _TF32,
        steps=steps,
        heads=heads,
        directions=directions,
    )
    return plan(problem, chip(device), algorithm)


def _plan_of(cell: Cell, inputs: Inputs, algorithm: str, backward: bool, directions: int = 1) -> Plan:
    x, h0, heads = inputs.x, inputs.h0, inputs.heads
    hidden, proj = inputs.w_hh.shape[0] // len(cell.gates), 0 if inputs.w_hr is None else h0.shape[1]
    return plan_for(
        cell, h0.shape[0], x.shape[-1], hidden, proj, x.dtype, x.device, algorithm, backward, _steps(inputs), heads,
        directions,
    )  # fmt: skip


def _steps(inputs: Inputs) -> int:
    return inputs.x.shape[0] if inputs.batch_sizes is None else inputs.batch_sizes.shape[0]


def _fields(cell: Cell, inputs: Inputs, chosen: Plan) -> tuple[_Kernels, dict[str, int], dict[str, Tensor | None]]:
    """What launches, the fields of a call that are no pointers, and the tensors of a cell of one's own."""
    x, h0 = inputs.x, inputs.h0
    kernels, number = _kernels_for(cell, inputs)
    own_fields, own_tensors = _of_own(cell, inputs, x.shape[:-1].numel())
    fields = own_fields | {
        "cell": number, "dtype": _dtype_id(x.dtype), "reverse": inputs.reverse, "steps": _steps(inputs),
        "batch": h0.shape[0], "hidden": inputs.w_hh.shape[0] // len(cell.gates), "out": h0.shape[1],
        "slice_rows": chosen.slice_rows, "groups": chosen.groups, "units": chosen.units,
        "poll_limit": _POLL_LIMIT if kernels.simulator is None else _POLL_LIMIT_SIMULATED,
    }  # fmt: skip
    return kernels, fields, own_tensors


class _Outputs(NamedTuple):
    """What forward writes beside y; of several states c_n and cells are stacks."""

    h_n: Tensor
    c_n: Tensor
    gates: Tensor
    cells: Tensor


def _forward_outputs(cell: Cell, inputs: Inputs, keep_gates: bool, keep_cells: bool) -> _Outputs:
    x, h0, others = inputs.x, inputs.h0, len(cell.states) - 1
    rows, hidden = x.shape[:-1].numel(), inputs.w_hh.shape[0] // len(cell.gates)
    return _Outputs(
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        empty_stack(x, others, h0.shape[0], hidden),
        x.new_empty((rows, hidden * len(cell.saved)) if keep_gates and cell.saved else (0,)),
        empty_stack(x, others * keep_cells, rows, hidden, dtype=accumulation_dtype(x.dtype)),
    )


def _forward_results(cell: Cell, inputs: Inputs, y: Tensor, outputs: _Outputs, keep_cells: bool) -> tuple[Tensor, ...]:
    """What forward returns."""
    lead, others = inputs.x.shape[:-1], max(len(cell.states) - 1, 1)
    hidden, (h_n, c_n, gates, cells) = inputs.w_hh.shape[0] // len(cell.gates), outputs
    finals = apart(c_n, others)
    every = [t.view(*lead, hidden) if t.dim() == 2 else t for t in (apart(cells, others) if keep_cells else [cells])]
    gates = gates.view(*lead, gates.shape[1]) if gates.dim() == 2 else gates
    return y.view(*lead, inputs.h0.shape[1]), h_n, finals[0], gates, every[0], *finals[1:], *every[1:]


def forward(cell: Cell, inputs: Inputs, algorithm: str, keep_gates: bool, keep_cells: bool) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence``."""
    _check(algorithm)
    check_kernels("cuda", cell)
    x, h0, _, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, _ = inputs.plain
    batch, out = h0.shape
    hidden, others = w_hh.shape[0] // len(cell.gates), len(cell.states) - 1
    x_rows = rows_of(x)
    if batch == 0:
        outputs = _forward_outputs(cell, inputs, keep_gates, keep_cells)
        return _forward_results(cell, inputs, x.new_empty(x_rows.shape[0], out), outputs, keep_cells)
    chosen = _plan_of(cell, inputs, algorithm, False)
    if chosen.algorithm == "persistent":
        try:
            return _persistent_forward(cell, [inputs], chosen, keep_gates, keep_cells)[0]
        except _RefusedError as error:
            if algorithm != "auto":
                raise
            _refused(x.device, chosen, error)
            return forward(cell, inputs, algorithm, keep_gates, keep_cells)
    outputs = _forward_outputs(cell, inputs, keep_gates, keep_cells)
    kernels, fields, own_tensors = _fields(cell, inputs, chosen)
    tensors = {
        **outputs._asdict(), **own_tensors, "c0": stacked(inputs.states0),
        "resets": None if resets is None else resets.contiguous(),
        "b_ih": None if b_ih is None else b_ih.contiguous(), "b_hh": None if b_hh is None else b_hh.contiguous(),
    }  # fmt: skip
    if chosen.products:
        fields = {name: fields[name] for name in ("cell", "dtype", "hidden")}
        y = _step_of_many_rows(kernels, fields, inputs, tensors)
        if w_hr is not None:
            outputs.h_n.copy_(y)
    else:
        y = x.new_empty(x_rows.shape[0], out)
        tensors |= {
            "x": x_rows.contiguous(), "h0": h0.contiguous(), "w_ih": w_ih.contiguous(), "w_hh": w_hh.contiguous(),
            "w_hr": None if w_hr is None else w_hr.contiguous(), "y": y,
            "offsets_host": _offsets(batch_sizes, torch.device("cpu")),
            "zeros": None if resets is None else x.new_zeros(out),
            "state": None if keep_cells else empty_stack(x, others, batch, hidden, dtype=accumulation_dtype(x.dtype)),
            "unprojected": None if w_hr is None else x.new_empty(batch, hidden),
        }  # fmt: skip
        params = (_OwnForward if "heads" in fields else _Forward)(**fields, input=x_rows.shape[1])
        kernels.launch("step_forward", (params, tensors))
    return _forward_results(cell, inputs, y, outputs, keep_cells)


def forward_both(
    cell: Cell, both: Sequence[Inputs], algorithm: str, keep_gates: bool, keep_cells: bool
) -> list[tuple[Tensor, ...]]:
    """``forward`` of both directions of a layer, whose sizes are equal: in one launch where the plan has it so."""
    x, batch = both[0].x, both[0].h0.shape[0]
    chosen = _plan_of(cell, both[0], algorithm, False, len(both)) if batch > 0 else None
    if chosen is None or chosen.directions == 1:
        return [forward(cell, inputs, algorithm, keep_gates, keep_cells) for inputs in both]
    try:
        return _persistent_forward(cell, both, chosen, keep_gates, keep_cells)
    except _RefusedError as error:
        if algorithm != "auto":
            raise
        _refused(x.device, chosen, error)
        return forward_both(cell, both, algorithm, keep_gates, keep_cells)


def _persistent_forward(
    cell: Cell, directions: Sequence[Inputs], chosen: Plan, keep_gates: bool, keep_cells: bool
) -> list[tuple[Tensor, ...]]:
    """What forward returns, of directions that are launched together."""
    calls, written = [], []
    for inputs in directions:
        x, h0, _, w_ih, w_hh, b_ih, b_hh, _, batch_sizes, resets, _ = inputs.plain
        kernels, fields, own_tensors = _fields(cell, inputs, chosen)
        outputs = _forward_outputs(cell, inputs, keep_gates, keep_cells)
        x_rows, hidden, heads = rows_of(x), fields["hidden"], inputs.heads
        length = _round_up(hidden // heads, _per_packet(x.dtype))  # of a head
        pitch = heads * length
        y = _mailbox(x, x_rows.shape[0], pitch)
        w_in, b_in, gates_of = w_ih, b_ih, (-1, hidden)
        if pitch != hidden:
            w_in = _padded_heads(w_ih.unflatten(0, gates_of).mT, heads, length).mT.flatten(0, 1)
            b_in = None if b_ih is None else _padded_heads(b_ih.unflatten(0, gates_of), heads, length).flatten()
        tensors = {
            "x": product(x_rows, w_in.t(), b_in), "h0": _padded_heads(h0, heads, length),
            "c0": stacked(inputs.states0), "w_hh": _padded(w_hh, length),
            "b_hh": None if b_hh is None else b_hh.contiguous(),
            "resets": None if resets is None else resets.to(torch.int32).contiguous(), "y": y, **outputs._asdict(),
            **own_tensors, "offsets_device": _offsets(batch_sizes, x.device),
        }  # fmt: skip
        calls.append(((_OwnForward if "heads" in fields else _Forward)(**fields, input=x_rows.shape[1]), tensors))
        written.append((y, outputs))
    kernels.launch("persistent_forward", *calls)
    found = []
    for inputs, (y, outputs) in zip(directions, written):
        if pitch != hidden:
            y = y.view(-1, heads, length)[:, :, : hidden // heads].reshape(-1, hidden).contiguous()
        found.append(_forward_results(cell, inputs, y, outputs, keep_cells))
    return found


def _step_of_many_rows(
    kernels: _Kernels, fields: dict[str, int], inputs: Inputs, tensors: dict[str, Tensor | None]
) -> Tensor:
    """y of a call of one step, its products by torch; ``tensors`` are what the cell reads beside them, and writes."""
    x, h0, w_hr = inputs.x, inputs.h0, inputs.w_hr
    y = x.new_empty(h0.shape[0], fields["hidden"])
    tensors = tensors | {"h0": h0.contiguous(), "y": y}
    if w_hr is not None:
        tensors["h_n"] = None
    params = _CellStep(**fields, steps=1, batch=h0.shape[0], out=h0.shape[1], rows=h0.shape[0], heads=inputs.heads)
    for rows, of_x, of_h in products_of_rows(inputs):
        params.first, params.count = rows.start, rows.stop - rows.start
        kernels.launch("step_cell", (params, tensors | {"x_product": of_x, "h_product": of_h}))
    return y if w_hr is None else product(y, w_hr.t())


def _started(t: Tensor, batch: int, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The B rows of ``t`` [N, K] in which each sequence begins."""
    return t[last_rows(t.shape[0], batch, batch_sizes, t.device) if reverse else slice(0, batch)]


def _transposed(w_hh: Tensor, hidden: int, heads: int) -> Tensor:
    """[H, G, H / heads] (with a projection [P, G, H]): of each unit what its column of W_hh holds, gate after gate."""
    if heads == 1:
        return w_hh.unflatten(0, (-1, hidden)).permute(2, 0, 1)
    units = hidden // heads
    return w_hh.view(-1, heads, units, units).permute(1, 3, 0, 2).reshape(hidden, -1, units)


class _BackwardOutputs(NamedTuple):
    """What backward writes beside dgates; of several states dc0 is a stack."""

    dc0: Tensor
    dparameters: Tensor
    dinputs: Tensor
    dh_direct: Tensor | None


def _backward_outputs(cell: Cell, inputs: Inputs) -> _BackwardOutputs:
    x, batch, hidden = inputs.x, inputs.h0.shape[0], inputs.w_hh.shape[0] // len(cell.gates)
    rows = x.shape[:-1].numel()
    return _BackwardOutputs(
        empty_stack(x, len(cell.states) - 1, batch, hidden),
        x.new_empty(len(cell.parameters), rows, hidden),
        x.new_empty(len(cell.inputs), rows, hidden),
        x.new_empty(batch, hidden, dtype=accumulation_dtype(x.dtype)) if cell.has_direct else None,
    )


def _backward_call(
    cell: Cell, grads: Gradients, inputs: Inputs, saved: Saved, chosen: Plan, outputs: _BackwardOutputs
) -> tuple[_Kernels, ctypes.Structure, dict[str, Tensor | None]]:
    """What launches, and what step and persistent are given alike."""
    kernels, fields, own_tensors = _fields(cell, inputs, chosen)
    tensors = {
        "dh_n": None if grads.dh_n is None else grads.dh_n.contiguous(),
        "dc_n": stacked((grads.dc_n, *grads.dothers_n)), "gates": saved.gates.contiguous(),
        "cells": stacked((saved.cells, *saved.others)), "c0": stacked(inputs.states0), "h0": inputs.h0.contiguous(),
        "dc0": outputs.dc0, "dh_direct": outputs.dh_direct, "dcells": stacked((grads.dcells, *grads.dothers)),
        **own_tensors,
    }  # fmt: skip
    if own_tensors:
        tensors |= {"dparameters": outputs.dparameters, "dinputs": outputs.dinputs}
    return kernels, (_OwnBackward if own_tensors else _Backward)(**fields), tensors


def backward(
    cell: Cell, grads: Gradients, inputs: Inputs, saved: Saved, algorithm: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """See the op ``fusedrnn::sequence_backward``."""
    _check(algorithm)
    check_kernels("cuda", cell)
    x, w_hh, w_hr, heads = inputs.x, inputs.w_hh, inputs.w_hr, inputs.heads
    batch, out = inputs.h0.shape
    rows, hidden = x.shape[:-1].numel(), w_hh.shape[0] // len(cell.gates)
    chosen = _plan_of(cell, inputs, algorithm, True) if batch > 0 else None
    if chosen is not None and chosen.algorithm == "persistent":
        try:
            return _persistent_backward(cell, [(grads, inputs, saved, needs)], chosen)[0]
        except _RefusedError as error:
            if algorithm != "auto":
                raise
            _refused(x.device, chosen, error)
            return backward(cell, grads, inputs, saved, algorithm, needs)
    outputs = _backward_outputs(cell, inputs)
    dgates = x.new_empty(rows, len(cell.accumulators) * hidden)
    dy_total = None if w_hr is None else x.new_empty(rows, out)
    if chosen is not None:
        kernels, params, tensors = _backward_call(cell, grads, inputs, saved, chosen, outputs)
        dy, resets = grads.dy, inputs.resets
        tensors |= {
            "dy": None if dy is None else rows_of(dy).contiguous(), "y": rows_of(saved.y).contiguous(),
            "resets": None if resets is None else resets.contiguous(),
            "w_hh_t": dense(_transposed(w_hh, hidden, heads)), "dgates": dgates, "dy_total": dy_total,
            "w_hr_t": None if w_hr is None else w_hr.t().contiguous(),
            "offsets_host": _offsets(inputs.batch_sizes, torch.device("cpu")),
            "state": empty_stack(x, len(cell.states) - 1, batch, hidden, dtype=accumulation_dtype(x.dtype)),
        }  # fmt: skip
        kernels.launch("step_backward", (params, tensors))
    return _backward_results(cell, inputs, saved, dgates, dy_total, outputs, needs)


# What backward is given of a direction.
_Backwards = tuple[Gradients, Inputs, Saved, Sequence[bool]]


def backward_both(cell: Cell, both: Sequence[_Backwards], algorithm: str) -> list[tuple[Tensor, ...]]:
    """``backward`` of both directions of a layer, whose sizes are equal: in one launch where the plan has it so."""
    inputs = both[0][1]
    chosen = _plan_of(cell, inputs, algorithm, True, len(both)) if inputs.h0.shape[0] > 0 else None
    if chosen is None or chosen.directions == 1:
        return [backward(cell, *given, algorithm, needs) for *given, needs in both]
    try:
        return _persistent_backward(cell, both, chosen)
    except _RefusedError as error:
        if algorithm != "auto":
            raise
        _refused(inputs.x.device, chosen, error)
        return backward_both(cell, both, algorithm)


def _persistent_backward(cell: Cell, directions: Sequence[_Backwards], chosen: Plan) -> list[tuple[Tensor, ...]]:
    """What backward returns, of directions that are launched together."""
    calls, written = [], []
    for grads, inputs, saved, _ in directions:
        x, w_hh, heads, count = inputs.x, inputs.w_hh, inputs.heads, len(cell.accumulators)
        rows, hidden = x.shape[:-1].numel(), w_hh.shape[0] // len(cell.gates)
        length = _round_up(hidden // heads, _per_packet(x.dtype))  # of a head
        outputs = _backward_outputs(cell, inputs)
        kernels, params, tensors = _backward_call(cell, grads, inputs, saved, chosen, outputs)
        box = _mailbox(x, rows, count * heads * length)
        tensors |= {
            "dy": None if grads.dy is None else _padded_heads(rows_of(grads.dy), heads, length),
            "y": _padded_heads(rows_of(saved.y), heads, length),
            "resets": None if inputs.resets is None else inputs.resets.to(torch.int32).contiguous(),
            "w_hh_t": _padded(_transposed(w_hh, hidden, heads), length), "dgates": box,
            "offsets_device": _offsets(inputs.batch_sizes, x.device),
        }  # fmt: skip
        calls.append((params, tensors))
        written.append((box, outputs))
    kernels.launch("persistent_backward", *calls)
    found = []
    for (_, inputs, saved, needs), (dgates, outputs) in zip(directions, written):
        if heads * length != hidden or heads > 1:
            of_heads = dgates.view(rows, heads, count, length)[..., : hidden // heads]
            dgates = of_heads.transpose(1, 2).reshape(rows, -1)
        found.append(_backward_results(cell, inputs, saved, dgates, None, outputs, needs))
    return found


def _backward_results(
    cell: Cell,
    inputs: Inputs,
    saved: Saved,
    dgates: Tensor,
    dy_total: Tensor | None,
    outputs: _BackwardOutputs,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients, from those of the gates."""
    x, w_hh, batch_sizes, resets, reverse = inputs.x, inputs.w_hh, inputs.batch_sizes, inputs.resets, inputs.reverse
    batch, rows, hidden = inputs.h0.shape[0], dgates.shape[0], w_hh.shape[0] // len(cell.gates)
    dh0 = x.new_empty(0)
    if needs[1]:
        start = _started(dgates, batch, batch_sizes, reverse)
        dh0 = recurrent_product(gate_columns(start, cell.h_acc, hidden), w_hh, inputs.heads)
        if resets is not None:
            dh0 = dh0.masked_fill(_started(resets.reshape(-1, 1), batch, batch_sizes, reverse), 0)
        if outputs.dh_direct is not None:
            dh0 = (dh0 + outputs.dh_direct).to(x.dtype)
    h = None
    if dy_total is not None and needs[7]:
        saved_o = saved.gates.reshape(rows, hidden, len(cell.saved))[..., -1]  # only the LSTM projects
        saved_o = saved_o.to(accumulation_dtype(x.dtype))
        h = (saved_o * rows_of(saved.cells).tanh()).to(x.dtype)
    dc0, *dothers = apart(outputs.dc0, max(len(cell.states) - 1, 1))
    more = dothers, [*outputs.dparameters], [t.clone() for t in outputs.dinputs]
    return weight_gradients(cell, inputs, saved.y, dgates, h, dy_total, needs, dh0, dc0, *more)


@contextlib.contextmanager
def simulator_options(**options):
    """Options of the simulator (seed, torn, ...) for the length of a with block."""
    _simulated()
    with sys.modules["ptxsim"].options(**options):
        yield
