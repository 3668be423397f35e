"""What the compilers make of the CUDA kernels for real chips: registers, spills, instructions. Nothing is run."""

import re
import subprocess
from pathlib import Path

import pytest
from ptxsim import build

from fusedrnn.backends import cuda

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
        if arch == FROM_SM_80:  # the PTX that is simulated
            return build.assemble((cuda._simulated().folder / f"{name}.compute_80.ptx").read_text(), 90)
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


COUNTS = {
    "step_forward": 72,
    "step_backward": 80,
    "step_linear": 20,
    "persistent_forward": 128,
    "persistent_backward": 94,
}
ALL = [case for name in COUNTS for case in slow_unless_simulated(name)]


@pytest.mark.parametrize("name, arch", ALL)
def test_no_spills_no_stack(compiled, name, arch):
    kernels = KERNEL.findall(compiled(name, arch)[0])
    assert len(kernels) == COUNTS[name]
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
        if "float16" not in symbol:
            continue
        seen += 1
        assert re.search(r"\bHMMA\.16816\.F32", kernel), symbol
        if name.startswith("persistent"):
            assert "LDG.E.128.STRONG.GPU" in kernel, symbol
            assert "STG.E.128.STRONG.GPU" in kernel, symbol
        elif symbol.strip().endswith("whole"):
            assert re.search(r"LDG\.E\.128", kernel), symbol
    assert seen >= 8
