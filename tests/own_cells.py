"""Two cells that the package does not ship: test_slstm, of four states, and test_zoneout, an LSTM with peepholes (three
parameters) and an input of each step, 1 where c is new and 0 where it stays.

The sLSTM: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517, 2024, with an exponential forget
gate; its stabiliser m has no gradient.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from fusedrnn import _build, cells
from fusedrnn.cells import Cell

ROOT = Path(__file__).resolve().parents[1]


def _slstm_forward(acc, prev, parameters, inputs):
    _, c, n, m = prev
    m_new = torch.maximum(acc[1] + m, acc[0]).detach()
    i, f = (acc[0] - m_new).exp(), (acc[1] + m.detach() - m_new).exp()
    z, o = acc[2].tanh(), acc[3].sigmoid()
    c, n = f * c + i * z, f * n + i
    return (o * c / n, c, n, m_new), (i, f, z, o)


def _slstm_backward(d, saved, next, prev, parameters, inputs):
    i, f, z, o = saved
    _, c, n, _ = next
    dc = d[1] + d[0] * o / n
    dn = d[2] - d[0] * o * c / (n * n)
    dacc = (
        (dc * z + dn) * i,
        (dc * prev[1] + dn * prev[2]) * f,
        dc * i * (1 - z * z),
        d[0] * c / n * o * (1 - o),
    )
    none = torch.zeros_like(dc)
    return dacc, (none, dc * f, dn * f, none), (), ()


def _zoneout_forward(acc, prev, parameters, inputs):
    (_, c), (p_i, p_f, p_o), (keep,) = prev, parameters, inputs
    i, f, g = (acc[0] + p_i * c).sigmoid(), (acc[1] + p_f * c).sigmoid(), acc[2].tanh()
    c_new = c + keep * (f * c + i * g - c)
    o = (acc[3] + p_o * c_new).sigmoid()
    return (o * c_new.tanh(), c_new), (i, f, g, o)


def _zoneout_backward(d, saved, next, prev, parameters, inputs):
    (i, f, g, o), c, (p_i, p_f, p_o), (keep,) = saved, prev[1], parameters, inputs
    t = next[1].tanh()
    da_o = d[0] * t * o * (1 - o)
    dc = d[1] + d[0] * o * (1 - t * t) + da_o * p_o
    dnew = keep * dc
    da_i, da_f, da_g = dnew * g * i * (1 - i), dnew * c * f * (1 - f), dnew * i * (1 - g * g)
    dc_prev = dc - dnew + dnew * f + da_i * p_i + da_f * p_f
    dkeep = dc * (f * c + i * g - c)
    return (da_i, da_f, da_g, da_o), (torch.zeros_like(dc), dc_prev), (da_i * c, da_f * c, da_o * next[1]), (dkeep,)


_FOUR = {"x_acc": (0, 1, 2, 3), "h_acc": (0, 1, 2, 3)}
SLSTM = Cell(
    name="test_slstm",
    mode="TEST_SLSTM",
    gates=("i", "f", "z", "o"),
    accumulators=("i", "f", "z", "o"),
    saved=("i", "f", "z", "o"),
    forward=_slstm_forward,
    backward=_slstm_backward,
    states=("h", "c", "n", "m"),
    **_FOUR,
)
ZONEOUT = Cell(
    name="test_zoneout",
    mode="TEST_ZONEOUT",
    gates=("i", "f", "g", "o"),
    accumulators=("i", "f", "g", "o"),
    saved=("i", "f", "g", "o"),
    forward=_zoneout_forward,
    backward=_zoneout_backward,
    states=("h", "c"),
    parameters=("p_i", "p_f", "p_o"),
    inputs=("keep",),
    **_FOUR,
)
OWN = {cell.name: cell for cell in (SLSTM, ZONEOUT)}
_STRUCTS = {"test_slstm": "TestSlstm", "test_zoneout": "TestZoneout"}

for _cell in OWN.values():
    cells.register(_cell)


@functools.cache
def compile_for_cpu(name: str) -> None:
    """Compiles a cell for backend "cpu", without optimisation: what is tested is the result."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("no C++ compiler was found")
    folder = Path(tempfile.mkdtemp(prefix="fusedrnn-own-"))
    library = Path(_build.__file__).with_name("libfusedrnn.so")
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w"),
            *(f"-DOWN_CELL={_STRUCTS[name]}", "-DFUSEDRNN_VECTOR_BYTES=16", f"-I{ROOT / 'csrc'}"),
            *(str(ROOT / "tests" / "own_cells.cpp"), "-o", str(folder / f"{name}.so")),
            *(str(library), f"-Wl,-rpath,{library.parent}"),
        ],
        check=True,
    )
    assert _build.add_cell(folder / f"{name}.so") == name
    shutil.rmtree(folder)
    cells.register(OWN[name], "cpu")
