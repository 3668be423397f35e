"""Cells of one's own, compiled at first use and kept on disk by content.

A file in the cache is code that will run, so the folder has to be the user's own and nobody else's to write to, and a
file is taken only where it has the digest that was written down with it. The name of a file is that of everything it
was made from: source, headers, compiler, flags.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from fusedrnn import _build, printing, trials
from fusedrnn.cells import kernels_of, register
from fusedrnn.definition import DEFINITIONS, Definition

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_VECTOR_BYTES = {"portable": 16, "neon": 16, "avx2": 32, "avx512": 64}
# As in setup.py.
_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"
_QUIET = ("-w",)
_OF_SET = {"avx2": ("-mavx2", "-mfma", "-mf16c")}
_OF_SET["avx512"] = (*_OF_SET["avx2"], "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")

_lock = threading.RLock()
# (cell, backend) that was tried without success: why.
_failed: dict[tuple[str, str], str] = {}


def _private(folder: Path) -> str:
    """Makes the folder where it is not there; empty where it is the user's alone, else why it cannot be used."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True, mode=0o700)
        found = os.lstat(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"{folder} belongs to another user"
    if found.st_mode & 0o022:
        return f"others may write to {folder}"
    for above in folder.absolute().parents:
        mode = os.stat(above).st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:  # they could put another folder in its place
            return f"others may write to {above}"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"


@functools.cache
def cache_folder() -> Path:
    """Where compiled cells are kept: "cells" in FUSEDRNN_CACHE, or in fusedrnn in XDG_CACHE_HOME or ~/.cache, readable
    and writable for this user alone. Where that cannot be, a folder of this user in the folder for temporary files.
    """
    first = trials.cache_folder() / "cells"
    why = _private(first)
    if not why:
        return first
    second = Path(tempfile.gettempdir()) / f"fusedrnn-{os.geteuid() if hasattr(os, 'geteuid') else 'cache'}"
    if _private(second):
        second = Path(tempfile.mkdtemp(prefix="fusedrnn-"))
    if os.environ.get("FUSEDRNN_CACHE") or "others may" in why or "another user" in why:
        warnings.warn(f"fusedrnn: compiled cells are kept in {second}, for {why}", stacklevel=2)
    return second


@contextlib.contextmanager
def _alone(path: Path):
    """One process at a time; where files cannot be locked several may do the same work, and none harm."""
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(path: Path) -> bool:
    try:
        return path.with_suffix(path.suffix + ".sha256").read_text().strip() == _digest(path)
    except OSError:
        return False


def kept(name: str, suffix: str, key: str, make) -> Path:
    """The file of that name and key, made by ``make(path)`` where it is not in the cache or is broken there."""
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"
    if _intact(path):
        return path
    with _alone(path.with_suffix(".lock")):
        if not _intact(path):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=path.parent))
            try:
                new = folder / path.name
                make(new)
                note = new.with_suffix(new.suffix + ".sha256")
                note.write_text(_digest(new))
                # A file that is loaded somewhere stays as it is: the name gets another one.
                os.replace(new, path)
                os.replace(note, path.with_suffix(path.suffix + ".sha256"))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return path


def headers() -> Path:
    """The folder of the C++ skeletons: in an installation beside this file, in a checkout csrc."""
    inside = Path(__file__).with_name("csrc")
    return inside if inside.exists() else Path(__file__).resolve().parents[1] / "csrc"


@functools.cache
def _of_headers(folder: str) -> str:
    root = headers()
    found = hashlib.sha256()
    for path in sorted([*root.glob("*.h"), *(root / folder).glob("*.[hc]*")]):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@functools.cache
def compiler() -> tuple[str, str]:
    """The C++ compiler, CXX or g++, and its version.

    Raises:
        RuntimeError: there is none.
    """
    asked = os.environ.get("CXX", "g++")
    path = shutil.which(asked)
    if path is None:
        raise RuntimeError(f"there is no C++ compiler: {asked} was not found (CXX names another one)")
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
    return path, done.stdout.strip()


def _for_cpu(definition: Definition) -> None:
    name = definition.cell.name
    if not _build.loaded():
        raise RuntimeError(_build.why_not_loaded())
    path, version = compiler()
    capability = _build.build_info()["cpu_capability"]
    # The tile registers are for the built-in cells.
    capability = capability if capability in _VECTOR_BYTES else "avx512"
    library = Path(_build.__file__).with_name("libfusedrnn.so")
    source = "\n".join(
        (
            f"#define FUSEDRNN_CAPABILITY {capability}",
            f"#define FUSEDRNN_VECTOR_BYTES {_VECTOR_BYTES[capability]}",
            "#define FUSEDRNN_TILES 0",
            *(["#define FUSEDRNN_NEON 1"] if capability == "neon" else []),
            f"#define FUSEDRNN_CELL {name}",
            '#include "pointwise.h"',
            '#include "cpu/pointwise.h"',
            "namespace fusedrnn {",
            printing.cpp(definition.traced, name) + "}",
            '#include "cpu/recurrence_kernels.h"',
            "",
        )
    )
    flags = (*_FLAGS.split(), *_OF_SET.get(capability, ()), *_QUIET, "-shared")

    def make(target: Path) -> None:
        file = target.with_suffix(".cpp")
        file.write_text(source)
        links = [str(library), f"-Wl,-rpath,{library.parent}", "-Wl,--strip-debug"]
        command = [path, *flags, f"-I{headers()}", str(file), "-o", str(target), *links]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line][:3] or done.stderr.splitlines()[-3:]
            raise RuntimeError(f"{path} could not compile it: " + "; ".join(lines))

    key = "\0".join((source, " ".join(flags), path, version, _of_headers("cpu"), str(library)))
    _build.add_cell(kept(name, ".so", key, make))
    register(definition.cell, "cpu")


def _for_triton(definition: Definition) -> None:
    t, name = definition.traced, definition.cell.name
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed")
    from fusedrnn.kernels.cells import KERNELS, CellKernels

    source = printing.TRITON_HEAD + printing.triton(t, name)
    path = kept(name, ".py", source, lambda target: target.write_text(source) and None)
    # Triton reads the source of a function from its file.
    module_name = f"fusedrnn_cells.{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    KERNELS[name] = CellKernels(
        getattr(module, f"{name}_forward"),
        getattr(module, f"{name}_backward"),
        backward_uses_h=t.uses_h or t.uses_h_prev,
        has_direct=t.direct,
    )
    register(definition.cell, "triton")


def why_no_device_code() -> str:
    """Why nothing can be compiled for CUDA at the first use of a cell; empty where it can."""
    return "" if _device_code().has_compiler() else "neither NVRTC (of torch's wheels for CUDA) nor nvcc was found"


@functools.cache
def _device_code():
    """csrc/cuda/device_code.py, which setup.py has as well."""
    path = headers() / "cuda" / "device_code.py"
    spec = importlib.util.spec_from_file_location("fusedrnn_device_code", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _device_compiler():
    return _device_code().find_compiler(torch.version.cuda or "", prefer="NVRTC")


def _device_source(name: str, kernel: str) -> str:
    """What is compiled of a cell: one instance of a kernel of csrc/cuda, "step_forward_Own4_float32_2_whole"."""
    definition = DEFINITIONS.get(name)
    struct = printing.struct_of(name) if definition is None else name
    file, own, dtype, size, rows = kernel.rsplit("_", 4)
    lines = (
        f"#define FUSEDRNN_OWN(X) X({own}, {dtype}, {size}, {rows})",
        '#include "cells.h"',
        "namespace fusedrnn {",
        *([printing.cpp(definition.traced, struct)] if definition is not None else []),
        f"using {own} = {struct};",
        "}",
        f'#include "cuda/{file}.cu"',
        "",
    )
    return "\n".join(lines)


def device_code(name: str, kernel: str, image: str) -> Path:
    """The code of one kernel of a cell, for an image ("sm_90.cubin").

    Raises:
        RuntimeError: there is no compiler, or it says no.
    """
    tool, compiler = _device_code(), _device_compiler()
    if compiler is None:
        raise RuntimeError(f"the cell {name} cannot be compiled for CUDA: {why_no_device_code()}")
    source = _device_source(name, kernel)

    def make(target: Path) -> None:
        path = target.with_suffix(".cu")
        path.write_text(source)
        tool.compile_source(compiler, path, image, target, [headers()])

    key = "\0".join((source, image, repr(compiler), _of_headers("cuda")))
    return kept(f"{name}-{kernel}", f".{image}", key, make)


def _for_cuda(definition: Definition) -> None:
    if why := why_no_device_code():
        raise RuntimeError(why)
    printing.cpp(definition.traced, definition.cell.name)
    register(definition.cell, "cuda")  # compiled for a dtype and algorithm at the first call of it


_MAKERS = {"cpu": _for_cpu, "triton": _for_triton, "cuda": _for_cuda}


@_build.constant_when_compiled
def ensure(name: str, backend: str) -> str:
    """Compiles a cell for a backend, once; empty where the backend has it now, else why not."""
    if backend in kernels_of(name):
        return ""
    definition, make = DEFINITIONS.get(name), _MAKERS.get(backend)
    if definition is None or make is None:
        return f"it has no kernels of the cell {name}"
    with _lock:
        if (name, backend) not in _failed and backend not in kernels_of(name):
            try:
                make(definition)
            except (RuntimeError, OSError) as error:
                _failed[name, backend] = str(error)
        return _failed.get((name, backend), "")
