"""What the compilers make of the CUDA kernels for real chips: registers, spills, instructions, and what waits for what.
Nothing is run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sass
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
    yield from (pytest.param(name, arch, marks=pytest.mark.slow) for arch in ("80", "90", "100", "120"))


COUNTS = {
    "step_forward": 72,
    "step_backward": 80,
    "step_linear": 20,
    "step_cell": 16,
    "persistent_forward": 128,
    "persistent_forward_wide": 80,
    "persistent_backward": 94,
}
ALL = [case for name in COUNTS for case in slow_unless_simulated(name)]


# (bytes of stack, stored, loaded) of the kernels that spill, on no other architecture. Of GRU it is one value, the way
# that t goes, read once a step; of the LSTM in tf32 it is addresses and the number of groups.
SPILLS = {
    ("persistent_backward_Gru_float32_12_ragged", "100"): (8, 4, 4),
    ("persistent_backward_Gru_float32_12_ragged", "120"): (8, 4, 4),
    ("persistent_backward_Gru_float32_9_whole", "100"): (8, 4, 4),
    ("persistent_backward_Gru_float32_9_whole", "120"): (8, 4, 4),
    ("persistent_forward_wide_Lstm_tf32_4_whole", "100"): (16, 16, 32),
    ("persistent_forward_wide_Lstm_tf32_4_whole", "120"): (48, 48, 80),
}


@pytest.mark.parametrize("name, arch", ALL)
def test_no_spills_no_stack(compiled, name, arch):
    kernels = KERNEL.findall(compiled(name, arch)[0])
    assert len(kernels) == COUNTS[name]
    assert [k for k in kernels if any(int(n) > m for n, m in zip(k[1:4], SPILLS.get((k[0], arch), (0, 0, 0))))] == []
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
        if name == "step_cell":  # the products are made before
            assert "HMMA" not in kernel, symbol
            continue
        assert re.search(r"\bHMMA\.16816\.F32", kernel), symbol
        if name.startswith("persistent"):
            assert "LDG.E.128.STRONG.GPU" in kernel, symbol
            assert "STG.E.128.STRONG.GPU" in kernel, symbol
        elif symbol.strip().endswith("whole"):
            assert re.search(r"LDG\.E\.128", kernel), symbol
    assert seen >= 8


# The step loop of persistent, of LSTM in bfloat16 with H = 768 and 1024: chunks of a row of weights.
CHUNKS = {"persistent_forward": (3, 4), "persistent_forward_wide": (3, 4), "persistent_backward": (12, 16)}


def step_loops(folder, name, arch, edit=None):
    """{chunks: the code before the first product of a step} of those kernels alone, with one edit of the sources."""
    nvdisasm = build.tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("there is no nvdisasm: scoreboards are not checked")
    shutil.copytree(SOURCES.parent, folder / "csrc")
    sources = folder / "csrc" / "cuda"
    instances = sources / "instances.h"
    a, b = CHUNKS[name]
    kept = f"FUSEDRNN_SIZES_2(X, {a}, {b}, Lstm, bfloat16)"
    macro = "FUSEDRNN_" + name.upper()
    text, count = re.subn(rf"#define {macro}\(X\) .*", f"#define {macro}(X) {kept}", instances.read_text())
    assert count == 1
    instances.write_text(text)
    source = sources / f"{name}.cu"
    if edit:
        changed = source if "backward" in name else sources / "persistent_forward.cuh"
        old, new = edit
        assert old in changed.read_text(), "the planted bug has lost its place"
        changed.write_text(changed.read_text().replace(old, new, 1))
    cubin = folder / "kernel.cubin"
    command = [build.nvcc(), "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True)
    kernels = sass.read(cubin, nvdisasm)
    return {size: sass.before_the_product(kernels[f"{name}_Lstm_bfloat16_{size}_whole"]) for size in (a, b)}


@pytest.mark.parametrize("arch", ["90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100", "120"))])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_step_waits_for_packets_alone_and_asks_for_all_at_once(name, arch, tmp_path):
    for chunks, code in step_loops(tmp_path, name, arch).items():
        assert sass.waits_for_plain_loads(code) == []
        # One packet is polled. The others of two tiles of rows (wide with 4 chunks: of one; backward: of one, or half
        # of 16) follow in one flight.
        flight = 2 * chunks - 1
        if name == "persistent_backward":
            flight = min(chunks, 8 if chunks > 12 else 12) - 1
        elif name == "persistent_forward_wide" and chunks == 4:
            flight = chunks - 1
        assert sass.flights(code)[:2] == [1, flight], chunks
        assert any("LDGSTS" in one.text for one in code)


LATE_LOADS = {
    "persistent_forward": "        inbox.first(flights[0], p, step);\n",
    "persistent_forward_wide": "        inbox.first(flights[0], p, step);\n",
    "persistent_backward": "        inbox.first(flight, p, t - direction);\n",
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_plain_load_in_front_of_the_exchange_is_seen(name, tmp_path):
    load = '        if (static_cast<const int32_t*>(p.h0)[now.offset + lane] == 12345) asm volatile("trap;");\n'
    for code in step_loops(tmp_path, name, "90", (LATE_LOADS[name], load + LATE_LOADS[name])).values():
        assert len(sass.waits_for_plain_loads(code)) == 1
