"""Loads the C++ extension when the package is imported, and remembers why it could not."""

import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

PYTHON_MIN = (3, 10)
TORCH_MIN = (2, 13)
TORCH_BEYOND = (2, 15)
TORCH_RANGE = f">={TORCH_MIN[0]}.{TORCH_MIN[1]},<{TORCH_BEYOND[0]}.{TORCH_BEYOND[1]}"
PYTHON_RANGE = f">={PYTHON_MIN[0]}.{PYTHON_MIN[1]}"

HOW_TO_BUILD = "install torch and setuptools>=77, then run `pip install --no-build-isolation .` in the checkout"


def check_versions(python: tuple[int, ...], torch_version: str) -> None:
    """Raises ImportError outside the supported ranges of Python and torch."""
    if python[:2] < PYTHON_MIN:
        raise ImportError(f"fusedrnn needs Python {PYTHON_RANGE}, this is {python[0]}.{python[1]}")
    release = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    if not TORCH_MIN <= release < TORCH_BEYOND:
        raise ImportError(f"fusedrnn needs torch {TORCH_RANGE}, this is torch {torch_version}")


def _facts() -> dict[str, Any]:
    """What setup.py wrote down; empty when nothing was ever built here."""
    path = Path(__file__).with_name("_facts.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load() -> tuple[Any, str]:
    """(the extension, "") or (None, why not)."""
    built_for = FACTS.get("torch")
    if FACTS.get("extension") is False:
        return None, f"not built: {FACTS.get('why', 'no reason was recorded')}"
    if built_for is not None and built_for != torch.__version__:
        return None, f"built for torch {built_for}, but this is torch {torch.__version__}: {HOW_TO_BUILD}"
    try:
        return importlib.import_module("fusedrnn._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "fusedrnn._C":
            raise
        version = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.machine()}"
        return None, f"not built for {version}: {HOW_TO_BUILD}"
    except ImportError as error:
        return None, f"{error}: {HOW_TO_BUILD}"


check_versions(sys.version_info, torch.__version__)
FACTS = _facts()
_extension, _why_not = _load()


def loaded() -> bool:
    """Whether the C++ extension is there, and with it the backend "cpu"."""
    return _extension is not None


def why_not_loaded() -> str:
    """Why the extension is not there; empty when it is."""
    return _why_not


def build_info() -> dict[str, Any]:
    """What was built, for which torch, and what runs here; for bug reports and for the curious.

    ``extension`` tells whether the C++ extension is loaded, ``extension_why`` why it is not.
    ``cpu_capability`` is the instruction set in use, one of ``cpu_capabilities_built``; the environment
    variable FUSEDRNN_CPU_CAPABILITY lowers it. ``cpu_products`` tells who multiplies 16-bit matrices on the CPU: "host"
    (torch's GEMM, where the processor has bfloat16 units) or "panels" of ours; FUSEDRNN_CPU_PRODUCTS forces one.
    ``cuda_why`` is what the build decided on CUDA.
    """
    info = {
        "extension": loaded(),
        "extension_why": _why_not,
        "torch_built": FACTS.get("torch", ""),
        "torch_running": torch.__version__,
        "python_supported": PYTHON_RANGE,
        "torch_supported": TORCH_RANGE,
        "machine": platform.machine(),
        "cpu_capabilities_built": [],
        "cpu_capability": "",
        "cpu_products": {},
        "compiler": "",
        "flags": FACTS.get("flags", ""),
        "cuda_built": bool(FACTS.get("cuda", False)),
        "cuda_why": FACTS.get("cuda_why", "nothing was built"),
    }
    if _extension is not None:
        info |= _extension.facts()
    return info
