"""What nvcc makes of the CUDA kernels for real chips: registers, spills, instructions. Nothing is run."""

import re
import subprocess
from pathlib import Path

import pytest
from ptxsim import build

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(
    build.cuda_home() is None, reason="no nvcc: registers, spills and instructions of the CUDA kernels are not checked"
)
KERNEL = re.compile(
    r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s*: Used (\d+) registers"
)


FROM_SM_80 = "90-from-80"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(what ptxas says, path of the code) of a source for an architecture, compiled once."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def get(name: str, arch: str):
        if arch == FROM_SM_80:  # with the library that is simulated
            found = build.compile_simulated([SOURCES / f"{name}.cu"], include_dirs=[SOURCES.parent])
            return found[0][1], found[0][0]
        if (name, arch) not in done:
            cubin = folder / f"{name}-{arch}.cubin"
            command = [build.nvcc(), "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
            ran = subprocess.run(
                [*command, str(SOURCES / f"{name}.cu"), "-o", str(cubin)], capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stderr
            done[name, arch] = ran.stdout + ran.stderr, cubin
        return done[name, arch]

    return get


def slow_unless_simulated(name):
    yield pytest.param(name, FROM_SM_80)
    yield from (pytest.param(name, arch, marks=pytest.mark.slow) for arch in ("80", "90", "100"))


ALL = [*slow_unless_simulated("persistent"), *slow_unless_simulated("step")]


@pytest.mark.parametrize("name, arch", ALL)
def test_no_spills_no_stack(compiled, name, arch):
    kernels = KERNEL.findall(compiled(name, arch)[0])
    assert len(kernels) > 20
    assert [k for k in kernels if k[1:4] != ("0", "0", "0")] == []
    assert [k for k in kernels if int(k[4]) > 255] == []


@pytest.mark.parametrize("name, arch", ALL)
def test_instructions(compiled, name, arch):
    cuobjdump = build.tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump")
    text = subprocess.run(
        [cuobjdump, "-sass", str(compiled(name, arch)[1])], capture_output=True, text=True, check=True
    ).stdout
    seen = 0
    for kernel in text.split("Function : ")[1:]:
        symbol = kernel.split("\n", 1)[0]
        if "bfloat16" not in symbol and "__half" not in symbol:
            continue
        seen += 1
        assert re.search(r"\bHMMA\.16816\.F32", kernel), symbol
        whole = re.search(r"Li\d+ELb1EEEv", symbol)
        if name == "persistent":
            assert "LDG.E.128.STRONG.GPU" in kernel, symbol
            assert "STG.E.128.STRONG.GPU" in kernel, symbol
        elif whole:
            assert re.search(r"LDG\.E\.128", kernel), symbol
    assert seen >= 8
