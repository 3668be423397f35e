"""Fixtures that every test shares."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # The GPU kernels run in tests/ptxsim, from their compiled code, on CPU tensors.
    os.environ.setdefault("FUSEDRNN_SIMULATE", str(Path(__file__).with_name("ptxsim")))


@pytest.fixture(autouse=True)
def _defaults(monkeypatch):
    """One seed, and float32 products in float32 unless a test asks for tf32."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    # What Dynamo gives up on (a layer compiled inside vmap) it never traces again in this process; and its limits of
    # recompilations add up.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN, in C++ too, so an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def checkout(tmp_path_factory) -> Path:
    """A copy of the project without what was built in it, to build and to change."""
    root, copy = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("checkout")
    built = shutil.ignore_patterns("*.so", "device", "*.egg-info", "__pycache__", "_facts.json", "_build")
    for name in ("benchmarks", "csrc", "docs", "examples", "fusedrnn", "kernels", "tests"):
        shutil.copytree(root / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".clang-format"):
        shutil.copy(root / name, copy)
    for path in root.glob("*.md"):
        shutil.copy(path, copy)
    shutil.copy(root / "LICENSE", copy)
    return copy


# Each has a test that takes longest; the CUDA kernels are compiled first, which other tests wait for.
FIRST = ("test_cuda_cost.py", "test_triton_interpret.py", "test_selftest.py")


def pytest_collection_modifyitems(items):
    """Tests of the interpreter are run by one test, in a process of their own; elsewhere they are no tests."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        items[:] = [item for item in items if not item.get_closest_marker("interpreted")]
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture
def many_rows(monkeypatch):
    """Every call of one step is taken for one of many rows, of which two or three are multiplied at a time; gives the
    parts that there were."""
    from fusedrnn.backends import common, cuda, cuda_plan, triton

    parts, made = [], common.products_of_rows

    def counted(inputs):
        for part in made(inputs):
            parts.append(part[0])
            yield part

    for module in (cuda, triton):
        monkeypatch.setattr(module, "products_of_rows", counted)
    for module in (cuda_plan, triton):
        monkeypatch.setattr(module, "MANY_ROWS", 1)
    monkeypatch.setattr(common, "PRODUCT_BYTES", 2048)
    return parts
