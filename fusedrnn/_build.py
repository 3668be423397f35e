"""Loads the C++ extension when the package is imported, and remembers why it could not."""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import platform
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PYTHON_MIN = (3, 10)
TORCH_MIN = (2, 11)
TORCH_RANGE = f">={TORCH_MIN[0]}.{TORCH_MIN[1]}"
# What the tests have run with; a newer torch is expected to work: what is compiled uses its stable ABI only.
TORCH_TESTED = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
PYTHON_RANGE = f">={PYTHON_MIN[0]}.{PYTHON_MIN[1]}"

HOW_TO_BUILD = "install torch and setuptools>=77, then run `pip install --no-build-isolation .` in the checkout"


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import Dynamo: 1.2 s that only who compiles should pay."""
    function._dynamo_marked_constant = True
    return function


def check_versions(python: tuple[int, ...], torch_version: str) -> None:
    """Raises ImportError outside the supported ranges of Python and torch."""
    if python[:2] < PYTHON_MIN:
        raise ImportError(f"fusedrnn needs Python {PYTHON_RANGE}, this is {python[0]}.{python[1]}")
    release = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    if release < TORCH_MIN:
        raise ImportError(f"fusedrnn needs torch {TORCH_RANGE}, this is torch {torch_version}")


def _facts() -> dict[str, Any]:
    """What setup.py wrote down; empty when nothing was ever built here."""
    path = Path(__file__).with_name("_facts.json")
    return json.loads(path.read_text()) if path.exists() else {}


def why_nothing_compiled(system: str, free_threaded: bool) -> str:
    """Of the wheel that holds no compiled code, which pip takes where no other fits."""
    if system != "Linux":
        return f"there are kernels for Linux only, and this is {system}"
    if free_threaded:
        return "there are no kernels for the free-threaded Python"
    return f"nothing was compiled (FUSEDRNN_BUILD=0, or the wheel without kernels): {HOW_TO_BUILD}"


def hidden() -> str:
    """Of a checkout that is not built, while fusedrnn is installed elsewhere: what to do, in words; else empty."""
    here = Path(__file__).resolve()
    try:
        there = Path(importlib.metadata.distribution("fusedrnn").locate_file("fusedrnn/_build.py")).resolve()
    except importlib.metadata.PackageNotFoundError:
        return ""
    if there == here or not there.exists():
        return ""
    return (
        f"this is the checkout {here.parents[1]}, which is not built, and hides the installed fusedrnn in "
        f"{there.parents[1]}: start Python in another folder, or install with `pip install --no-build-isolation -e .`"
    )


def _load() -> tuple[Any, str]:
    """(fusedrnn._C, "") or (None, why not). libfusedrnn.so, which it needs, registers the ops."""
    if FACTS.get("extension") is False:
        return None, why_nothing_compiled(platform.system(), bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
    try:
        return importlib.import_module("fusedrnn._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "fusedrnn._C":
            raise
        version = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.machine()}"
        return None, hidden() or f"not built for {version}: {HOW_TO_BUILD}"
    except ImportError as error:
        return None, f"{error}: {HOW_TO_BUILD}"


def _load_calls() -> Any:
    """What computes whole calls of modules: fusedrnn._direct where it fits this torch, with gradients; else fusedrnn._C
    where this torch hands its tensors to C (from 2.14 on), without, or of one sequence; else nothing.
    """
    if _extension is None:
        return None
    if FACTS.get("direct") and FACTS.get("torch") == torch.__version__:
        with contextlib.suppress(ModuleNotFoundError):  # of another Python
            return importlib.import_module("fusedrnn._direct")
    return _small_calls


check_versions(sys.version_info, torch.__version__)
FACTS = _facts()
_extension, _why_not = _load()
# Where it can, the kernels below torch's dispatcher: a call takes 10 us less.
_small_calls = _extension if _extension is not None and _extension.small_calls() else None
_calls = _load_calls()


def loaded() -> bool:
    """Whether the C++ extension is there, and with it the backend "cpu"."""
    return _extension is not None


def add_cell(path: Path) -> str:
    """Makes the cell of a compiled file (csrc/cpu/recurrence.h, OwnCell) known to backend "cpu"; returns its name.

    Raises:
        RuntimeError: there is no C++ extension, the file holds no cell, or one that does not fit.
    """
    if _extension is None:
        raise RuntimeError(f"backend 'cpu' has no cells: {_why_not}")
    library = ctypes.CDLL(str(Path(__file__).with_name("libfusedrnn.so")))
    try:
        table = ctypes.CDLL(str(path)).fusedrnn_cell
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} holds no cell: {error}") from None
    table.restype, table.argtypes = ctypes.c_void_p, []
    library.fusedrnn_add_cell.restype, library.fusedrnn_add_cell.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    cell = table()
    why = library.fusedrnn_add_cell(cell)
    if why is not None:
        raise RuntimeError(f"the cell of {path} cannot be used: {why.decode()}")
    return ctypes.cast(cell, ctypes.POINTER(ctypes.c_char_p))[1].decode()


def why_not_loaded() -> str:
    """Why the extension is not there; empty when it is."""
    return _why_not


def _untried(version: str) -> str:
    release = version.split("+")[0].split(".")[:2]
    newest = TORCH_TESTED[-1].split(".")[:2]
    return "" if [*map(int, release)] <= [*map(int, newest)] else f" (this torch, {version}, is newer and untried)"


def build_info() -> dict[str, Any]:
    """What was built, for which torch, and what runs here; for bug reports and for the curious.

    ``extension`` tells whether the C++ extension is loaded, ``extension_why`` why it is not.
    ``cpu_capability`` is the instruction set in use, one of ``cpu_capabilities_built``; the environment
    variable FUSEDRNN_CPU_CAPABILITY lowers it. ``cpu_products`` tells who multiplies the matrices of a dtype on the
    CPU: "host" (torch's GEMM: float32 on Intel's processors, bfloat16 where there are units for it) or "panels" of
    ours; FUSEDRNN_CPU_PRODUCTS forces one.
    ``small_calls`` names what takes the calls of modules past torch's dispatcher: "fusedrnn._direct", of a source build
    for this very torch; "fusedrnn._C" (torch 2.14 and later), with gradients where there is one sequence; or nothing.
    ``cuda_why`` is what the build decided on CUDA.
    """
    info = {
        "extension": loaded(),
        "extension_why": _why_not,
        "torch_built": FACTS.get("torch", ""),
        "torch_running": torch.__version__,
        "python_supported": PYTHON_RANGE,
        "torch_supported": TORCH_RANGE,
        "torch_tested": ", ".join(TORCH_TESTED) + _untried(torch.__version__),
        "machine": platform.machine(),
        "cpu_capabilities_built": [],
        "cpu_capability": "",
        "cpu_products": {},
        "small_calls": "",
        "compiler": "",
        "flags": FACTS.get("flags", ""),
        "cuda_built": bool(FACTS.get("cuda", False)),
        "cuda_why": FACTS.get("cuda_why", "nothing was built"),
    }
    if _extension is not None:
        info |= _extension.facts()
        info["cpu_capabilities_built"] = info["cpu_capabilities_built"].split()
        info["small_calls"] = "" if _calls is None else _calls.__name__
    return info
