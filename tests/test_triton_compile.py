"""The Triton kernels compiled ahead of time, no GPU needed: what the compilers for each chip make of the plans."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from fusedrnn.backends import triton as backend
from fusedrnn.backends.common import Gradients, Inputs, Saved
from fusedrnn.backends.triton import Chip
from fusedrnn.cells import CELLS

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CHIPS = {
    80: Chip("sm_80", 108, 166912, 8),
    90: Chip("sm_90", 132, 232448, 8, True),
    100: Chip("sm_100", 148, 232448, 16, True),
    "gfx942": Chip("gfx942", 304, 65536, 16),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def launches_of(monkeypatch, arch, algorithm, dtype, B, I, H, tf32=False, resets=False):
    """The two launches, forward's and backward's, that the backend would make for a sequence of one step.

    With ``resets`` every c has a gradient as well.
    """
    seen = []
    monkeypatch.setattr(backend, "launch", lambda *launch: seen.append(launch))
    monkeypatch.setattr(backend, "_check", lambda *args: None)
    monkeypatch.setattr(backend, "_chip", lambda device: CHIPS[arch])
    monkeypatch.setattr(backend, "allow_tf32", lambda: tf32)
    x, h0, c0 = (torch.zeros(*shape, dtype=dtype) for shape in ((1, B, I), (B, H), (B, H)))
    w_ih, w_hh, b = (torch.zeros(*shape, dtype=dtype) for shape in ((4 * H, I), (4 * H, H), (4 * H,)))
    inputs = (x, h0, c0, w_ih, w_hh, b, b, None)
    inputs = Inputs(*inputs, None, torch.zeros(1, B, dtype=torch.bool) if resets else None, False)
    y, h_n, c_n, gates, cells = backend.forward(CELLS["lstm"], inputs, algorithm, True, True)
    needs = [True] * 7 + [False]
    upstream, saved = Gradients(y, h_n, c_n, cells if resets else None), Saved(y, gates, cells)
    backend.backward(CELLS["lstm"], upstream, inputs, saved, algorithm, needs)
    assert len(seen) == 2
    return seen


def compiled(arch, kernel, grid, args, constants, num_warps, num_stages):
    """As the launch would compile it: with Triton's specialisation on alignment and on the value 1."""
    signature, constexprs, attrs = {}, dict(constants), {}
    varying = kernel.do_not_specialize
    for i, name in enumerate(kernel.arg_names):
        value = args.get(name)
        one = isinstance(value, int) and value == 1 and name not in varying
        if name in constants or value is None or one:
            constexprs.setdefault(name, value)
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES.get(value.dtype, "i64")
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name not in varying and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    target = ("hip", arch, 64) if isinstance(arch, str) else ("cuda", arch, 32)
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(*target), options=options)


def cuobjdump(tmp_path, built, flag):
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NVIDIA = [
    # chip, algorithm, dtype, B, I, H, tf32, matrix instruction
    (80, "step", BF16, 16, 768, 768, False, "HMMA.16816.F32.BF16"),
    (80, "step", F16, 64, 512, 1024, False, "HMMA.16816.F32"),
    (80, "step", F32, 16, 256, 256, True, "HMMA.1688.F32.TF32"),
    (80, "step", F32, 16, 256, 256, False, "FFMA"),
    (80, "step", F64, 16, 64, 64, False, "DMMA"),
    (80, "sequence", BF16, 16, 128, 128, False, "HMMA.16816.F32.BF16"),
    (80, "sequence", F32, 16, 64, 64, False, "FFMA"),
    (90, "step", BF16, 16, 768, 768, False, "HMMA.16816.F32.BF16"),
    (90, "step", BF16, 64, 1024, 1024, False, "HGMMA|HMMA"),
    (90, "sequence", BF16, 16, 128, 128, False, "HGMMA"),
    (90, "sequence", F32, 16, 64, 64, True, "HGMMA"),
    (100, "step", BF16, 16, 768, 768, False, "HMMA.16816.F32.BF16"),
    (100, "sequence", F16, 16, 64, 64, False, "UTCHMMA"),
]
RESETS = [NVIDIA[k] for k in (0, 4, 5, 9, 12)]


@pytest.mark.parametrize(
    "arch, algorithm, dtype, B, I, H, tf32, instruction, resets",
    [(*problem, resets) for resets, problems in ((False, NVIDIA), (True, RESETS)) for problem in problems],
    ids=str,
)
def test_nvidia(arch, algorithm, dtype, B, I, H, tf32, instruction, resets, monkeypatch, tmp_path):
    for launch in launches_of(monkeypatch, arch, algorithm, dtype, B, I, H, tf32, resets):
        built = compiled(arch, *launch)
        name = f"{launch[0].__name__} sm_{arch}"
        assert built.metadata.shared <= CHIPS[arch].shared_bytes, name
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump(tmp_path, built, "-res-usage"))
        registers, stack, local = map(int, usage.groups())
        assert (stack, local) == (0, 0), f"{name} spills"
        assert registers * launch[4] * 32 <= 65536, name
        sass = cuobjdump(tmp_path, built, "-sass")
        # Triton 3.6 has Hopper's products of a group of warps for wider ones only.
        expected = instruction.replace("HGMMA", "HG?MMA") if triton.__version__.startswith("3.6.") else instruction
        assert re.search(rf"\b({expected})\b", sass), name
        if algorithm == "step":
            assert "LDGSTS.E.BYPASS.128" in sass, f"{name} loads weights in pieces smaller than 16 bytes"
            assert not re.search(r"LDGSTS\.E(\.64)? ", sass), name


@pytest.mark.parametrize(
    "algorithm, dtype, H",
    [("step", BF16, 768), ("step", F32, 96), ("sequence", BF16, 64), ("sequence", F64, 16)],
    ids=str,
)
def test_amd(algorithm, dtype, H, monkeypatch):
    for launch in launches_of(monkeypatch, "gfx942", algorithm, dtype, 16, H, H):
        built = compiled("gfx942", *launch)
        assembly = built.asm["amdgcn"]
        assert "v_mfma" in assembly
        assert built.metadata.shared <= 65536
        assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)) == {"0"}


def test_a_new_length_or_batch_size_does_not_recompile(monkeypatch):
    """What changes from step to step, or from batch to batch of one shape class, is not specialised on."""
    first, _ = launches_of(monkeypatch, 80, "step", BF16, 16, 32, 32)
    second, _ = launches_of(monkeypatch, 80, "step", BF16, 13, 32, 32)
    assert first[3] == second[3]
    varying = [n for n, v in first[2].items() if isinstance(v, int) and n not in ("I", "H", "P", "D")]
    assert set(varying) <= set(first[0].do_not_specialize)
    first, back = launches_of(monkeypatch, 80, "sequence", BF16, 16, 32, 32)
    for launch in (first, back):
        varying = [n for n, v in launch[2].items() if isinstance(v, int) and n not in ("H", "D")]
        assert {"T", "B"} <= set(varying) <= set(launch[0].do_not_specialize)
