"""What is tried on a card itself: every family of kernels once before its first use, algorithms timed where asked.

Results are kept, in this process and on disk, by card, driver and versions: $FUSEDRNN_CACHE, else
$XDG_CACHE_HOME/fusedrnn, else ~/.cache/fusedrnn. A folder that cannot be written to keeps nothing.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fusedrnn.backends import cuda
from fusedrnn.backends.common import MANY_ROWS, Inputs, allow_tf32
from fusedrnn.cells import CELL_OF_MODE, CELLS, Cell
from fusedrnn.ops import BACKEND_ALGORITHMS

TUNE_VARIABLE = "FUSEDRNN_TUNE"
ON_GPU = ("cuda", "triton")
# T, B, I, H of the problem that kernels are checked with: no size a multiple of a tile, more than one block of units.
CHECKED = (4, 5, 7, 37)
# The same of one step of so many rows that its products are torch's, and a kernel of its own the cell's.
MANY = (1, MANY_ROWS, 3, 37)


def applies(device: torch.device) -> bool:
    """Whether kernels are tried on a device: on GPUs, which may be ones that nobody has seen."""
    return device.type == "cuda"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def about(device: torch.device) -> tuple[str, ...]:
    """The card, its driver, and what computes on it: results of one never pass for another's."""
    import fusedrnn

    found = [f"fusedrnn {fusedrnn.__version__}", f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    with contextlib.suppress(ImportError):
        import triton

        found.append(f"triton {triton.__version__}")
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        words = driver.read_text().splitlines()[0] if driver.exists() else ""
        found += [torch.cuda.get_device_name(device), f"sm {torch.cuda.get_device_capability(device)}", words]
        found += [f"cuDNN {torch.backends.cudnn.version()}"]
    # Of an editable install the version stays as sources change.
    package = Path(__file__).resolve().parent
    sources = [*package.glob("**/*.py"), *(package.parent / "kernels").glob("*.py"), *cuda.DEVICE_CODE.glob("*.*")]
    stamps = sorted((path.name, path.stat().st_mtime_ns) for path in sources)
    return (*found, hashlib.sha256(repr(stamps).encode()).hexdigest()[:12])


def cache_folder() -> Path:
    """Where results are kept; nothing is made."""
    if named := os.environ.get("FUSEDRNN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedrnn"


_kept: dict[tuple, object] = {}
# (cell, dtype, backend, algorithm, device, tf32) whose kernels agree, so that a call asks one set.
_right: set[tuple] = set()


def _path(key: tuple) -> Path:
    return cache_folder() / f"{key[0]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"


def _known(key: tuple):
    """What was kept under a key; None where nothing was, which is kept too, so that the disk is asked once."""
    if key not in _kept:
        try:
            found = json.loads(_path(key).read_text())
            _kept[key] = found["value"] if found["key"] == json.loads(json.dumps(key)) else None
        except (OSError, ValueError, KeyError, RuntimeError):  # none, torn, or no home
            _kept[key] = None
    return _kept[key]


def _keep(key: tuple, value) -> None:
    _kept[key] = value
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": key, "value": value}, file, indent=1)
        os.replace(file.name, path)


# ---- is it right


def why_wrong(
    cell: str, dtype: torch.dtype, backend: str, algorithm: str, device: torch.device, try_out: bool = True
) -> str:
    """What is wrong with a backend's kernels on a device, forward or backward; empty where they agree with torch's op.

    The first call of a kind computes a small problem, of "auto" with every algorithm; not while a CUDA graph is
    recorded, and not without ``try_out``.
    """
    tf32 = dtype == torch.float32 and allow_tf32()
    asked = (cell, dtype, backend, algorithm, device, tf32)
    if asked in _right:
        return ""
    algorithms, unknown = (algorithm,) if algorithm != "auto" else BACKEND_ALGORITHMS[backend][1:], False
    for each in algorithms:
        key = ("checked", *about(device), cell, str(dtype), tf32, backend, each)
        found = _known(key)
        if found is None and (not try_out or _capturing(device)):
            unknown = True
            continue
        if found is None:
            # Grad mode, autocast, transforms, modes and streams belong to a thread: a new one has none.
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_difference, cell, dtype, backend, each, device, tf32).result()
            _keep(key, found)
        if found:
            return f"{backend} {each} in {str(dtype).removeprefix('torch.')}: {found}"
    if not unknown:
        _right.add(asked)
    return ""


def _difference(cell: str, dtype: torch.dtype, backend: str, algorithm: str, device: torch.device, tf32: bool) -> str:
    from fusedrnn import selftest

    math = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    for size in (CHECKED, MANY) if algorithm == "step" else (CHECKED,):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            tensors, _ = selftest._tensors(cell, (*size, None), dtype, device)
            try:
                got = selftest._run(cell, tensors, None, False, backend, algorithm)
                paired = backend == "cuda" and algorithm == "persistent"
                differs = paired and not _pair_agrees(cell, tensors, got, algorithm)
            except Exception as error:  # whatever a driver or a compiler says of a card that nobody has seen
                words = str(error).splitlines()[0] if str(error) else type(error).__name__
                return "" if f"algorithm '{algorithm}'" in words and "cannot run" in words else f"it fails: {words}"
            want = _by_torch(CELLS[cell], tensors)
        if not all(t.isfinite().all() for t in got):
            return "it gives NaN or infinity"
        pairs = zip(got, want, strict=True)
        worst = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
        allowed = selftest.ULPS * selftest.ROUNDOFF[math]
        if worst > allowed:
            rows = f" for {size[1]} rows of one step" if size == MANY else ""
            return f"it differs from torch's op by {worst:.2e}{rows}, {allowed:.1e} is rounding"
        if differs:
            return "both directions in one launch are not what each is alone"
    return ""


def _pair_agrees(cell: str, tensors: list[Tensor | None], forwards: list[Tensor], algorithm: str) -> bool:
    """Whether both directions of a layer at once have the bits of each alone, of which that of forwards is known."""
    from fusedrnn import pair, selftest

    want = [*forwards, *selftest._run(cell, tensors, None, True, "cuda", algorithm)]
    leaves = [[None if t is None else t.detach().requires_grad_() for t in tensors] for _ in range(2)]
    both = [Inputs(*given, None, None, reverse) for given, reverse in zip(leaves, (False, True))]
    got = []
    for outputs, given in zip(pair.recorded_pair(cell, both, algorithm, False), leaves):
        outputs = [t for t in outputs[:3] if t.numel()]
        upstream = [torch.cos(t.detach()) for t in outputs]
        got.append((outputs, [t for t in given if t is not None], upstream))
    outputs, given, upstream = ([t for one in got for t in one[k]] for k in range(3))
    grads = iter(torch.autograd.grad(outputs, given, upstream))
    got = [t for outputs, given, _ in got for t in (*outputs, *(next(grads) for _ in given))]
    return all(torch.equal(a.detach().double().cpu(), b) for a, b in zip(got, want, strict=True))


def _by_torch(cell: Cell, tensors: list[Tensor | None]) -> list[Tensor]:
    """Outputs and gradients as selftest._run gives them, of torch's own op in float64 on the same device."""
    given = [t.detach().double().requires_grad_() for t in tensors if t is not None]
    x, *states = given[: 2 + cell.has_cell_state]
    hx = tuple(s.unsqueeze(0) for s in states)
    op = getattr(torch._VF, cell.mode.lower())
    y, *finals = op(x, hx if cell.has_cell_state else hx[0], given[-4:], True, 1, 0.0, True, False, False)
    outputs = [y, *(s.squeeze(0) for s in finals)]
    grads = torch.autograd.grad(outputs, given, [torch.cos(t.detach().to(tensors[0].dtype)).double() for t in outputs])
    return [t.detach().cpu() for t in (*outputs, *grads)]


# ---- what is faster


@dataclass(frozen=True)
class Timing:
    """One way to compute a layer, and the seconds of one call: forward, in training the gradients as well. ``seconds``
    is None where it cannot run, ``why`` then says why.
    """

    backend: str
    algorithm: str
    training: bool
    seconds: float | None
    why: str = ""


# (thread, list) of every open call of ``tune``.
_tuning: list[tuple[int, list[Timing]]] = []


def tune(layer: torch.nn.Module, input, hx=None) -> list[Timing]:
    """Times every way to compute a layer on this GPU, ours and torch's own, and keeps the fastest for such sizes.

    Inference is timed, and training where the layer or the input has a gradient. What is kept is for the same card,
    driver, versions, layer and batch sizes, and lengths up to the next power of 2. FUSEDRNN_TUNE=1 does the same at the
    first call of every size.

    Args:
        layer: an LSTM, GRU or RNN of fusedrnn, without a backend or algorithm of its own.
        input, hx: what it is called with.

    Returns:
        The timings, inference first; of each kind the one with the fewest seconds is used from now on.

    Raises:
        TypeError: ``layer`` is no layer of fusedrnn.
        RuntimeError: it is not on a GPU, or a backend or algorithm was asked for, so that there is nothing to choose.
    """
    from fusedrnn import modules, planning

    if not isinstance(layer, modules.RecurrentLayer) or layer.mode not in CELL_OF_MODE:
        raise TypeError(f"tune takes an LSTM, GRU or RNN of fusedrnn, got {type(layer).__name__}")
    asked = (layer.backend, layer.algorithm, *planning.asked_for())
    if any(asked):
        name = next(filter(None, asked))
        raise RuntimeError(f"tune has nothing to choose: {name!r} was asked for")
    data = input if isinstance(input, Tensor) else input.data
    if not applies(data.device):
        raise RuntimeError(f"tune times kernels on a GPU, the input is on {data.device}")
    found: list[Timing] = []
    entry = (threading.get_ident(), found)
    _tuning.append(entry)
    try:
        with torch.no_grad():
            layer(input, hx)
        if data.requires_grad or any(p.requires_grad for p in layer.parameters()):
            with torch.enable_grad():
                layer(input, hx)
    finally:
        _tuning.remove(entry)
    return found


@dataclass(frozen=True)
class Call:
    """A call of ``functional.layers``: its arguments up to recompute, as tensors that compute."""

    cell: Cell
    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    batch_sizes: Tensor | None
    resets: Tensor | None
    return_all_states: bool
    recompute: bool

    def key(self, gradient: bool) -> tuple:
        x, packed = self.input, self.batch_sizes is not None
        steps = self.batch_sizes.shape[0] if packed else x.shape[1 if self.batch_first else 0]
        options = (packed, self.resets is not None, self.return_all_states, self.recompute)
        hidden = self.weights[1].shape[0] // len(self.cell.gates)
        sizes = (steps, self.h0.shape[1], x.shape[-1], hidden, self.h0.shape[2])
        return tuned_key(
            x.device, self.cell.name, x.dtype, *sizes, self.num_layers, self.bidirectional, options, gradient
        )


def tuned_key(device, cell, dtype, steps, batch, inputs, hidden, out, layers, bidirectional, options, gradient):
    tf32 = dtype == torch.float32 and allow_tf32()
    steps = 1 << max(steps - 1, 0).bit_length()
    sizes = (steps, batch, inputs, hidden, out, layers, bidirectional)
    return ("tuned", *about(device), cell, str(dtype), tf32, *sizes, *options, gradient)


def tuned(call: Call, chosen, gradient: bool):
    """What was found fastest for such a call, found now where somebody tunes; ``chosen`` where nothing is known."""
    setting = os.environ.get(TUNE_VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{TUNE_VARIABLE} must be 0 or 1, got {setting!r}")
    mine = [found for thread, found in _tuning if thread == threading.get_ident()]
    key = call.key(gradient)
    value = None if mine else _known(key)
    if value is None and (mine or setting == "1") and not _capturing(call.input.device):
        timings = [_timed(call, *way, gradient) for way in _ways(call)]
        for found in mine:
            found += timings
        done = [t for t in timings if t.seconds is not None]
        if done:
            best = min(done, key=lambda t: t.seconds)
            value = {"backend": best.backend, "algorithm": best.algorithm, "timings": [asdict(t) for t in timings]}
            _keep(key, value)
    return chosen if value is None else as_chosen(chosen, value)


def as_chosen(chosen, value: dict):
    name = value["backend"] + ("" if value["algorithm"] == "auto" else f" {value['algorithm']}")
    count = sum(t["seconds"] is not None for t in value["timings"])
    return replace(
        chosen, backend=value["backend"], algorithm=value["algorithm"],
        why=f"{name} was the fastest of {count} that were timed on this card", timed=True,
    )  # fmt: skip


def known_choice(key: tuple, chosen):
    value = _known(key)
    return chosen if value is None else as_chosen(chosen, value)


def _ways(call: Call) -> list[tuple[str, str]]:
    """(backend, algorithm) of everything that can compute the call rightly; torch's op without our options."""
    from fusedrnn import planning

    device = call.input.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None
    hidden = call.weights[1].shape[1]
    problem = planning.Problem(
        call.cell.name, call.input.shape[-1], hidden, 0, call.input.dtype, device.type, capability
    )
    found = []
    for backend in ON_GPU:
        if planning.unsupported(backend, problem, planning.machine_with(device)) is None:
            for algorithm in BACKEND_ALGORITHMS[backend]:
                if not why_wrong(call.cell.name, call.input.dtype, backend, algorithm, device):
                    found.append((backend, algorithm))
    if call.resets is None and not (call.return_all_states or call.recompute):
        found.append(("torch", "auto"))
    return found


def _timed(call: Call, backend: str, algorithm: str, gradient: bool) -> Timing:
    from fusedrnn import functional, planning

    tensors = [t.detach().clone() for t in (call.input, call.h0, call.c0, *call.weights) if t is not None]
    states = 1 + (call.c0 is not None)
    if gradient:
        tensors = [t.requires_grad_() for t in tensors]
    x, (h0, *c0), weights = tensors[0], tensors[1 : 1 + states], tensors[1 + states :]
    # Dropout is the same work for all, and would draw from the caller's random numbers.
    mine = replace(call, input=x, h0=h0, c0=c0[0] if c0 else None, weights=weights, dropout=0.0, training=gradient)
    arguments = [getattr(mine, name) for name in Call.__dataclass_fields__]

    def run() -> None:
        with planning.backend(backend, algorithm), torch.set_grad_enabled(gradient):
            outputs = [t for t in functional.layers(*arguments, None, None)[:3] if t is not None]
            if gradient:
                torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs])

    try:
        return Timing(backend, algorithm, gradient, seconds_of(run, x.device))
    except Exception as error:  # one way less
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Timing(backend, algorithm, gradient, None, words)


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """The least of five calls, after two that load, compile and allocate; as long as a caller waits for them."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    took = []
    for _ in range(7):
        wait()
        start = time.perf_counter()
        run()
        wait()
        took.append(time.perf_counter() - start)
    return min(took[2:])
