"""The Triton kernels' sm_80 code, run by ptxsim on CPU tensors: every dtype against float64, seeds, and what they cost.

The simulator is chosen by an environment variable that planning reads once, so the tests run in a process of their own.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from problems import CASES, Case, assert_close, make, models, run, widened

from fusedrnn.backends import triton as backend

pytest.importorskip("triton")
SIMULATED = bool(os.environ.get("FUSEDRNN_SIMULATE")) and not os.environ.get("TRITON_INTERPRET")
inside = pytest.mark.skipif(not SIMULATED, reason="runs inside test_in_the_simulator")

WIDE = [
    Case(T=3, B=16, I=96, H=64),
    Case(T=3, B=66, I=48, H=80, reverse=True),
    Case(T=2, B=40, I=16, H=32),
    Case(T=2, B=9, I=130, H=40, proj=33),
]
ALL = CASES + WIDE
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _ieee(monkeypatch):
    monkeypatch.setattr(backend, "allow_tf32", lambda: False)


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
@pytest.mark.skipif(shutil.which("g++") is None, reason="ptxsim is built with g++")
def test_in_the_simulator():
    env = os.environ | {"FUSEDRNN_SIMULATE": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def fits(case: Case, algorithm: str, math: str) -> bool:
    return algorithm == "step" or (not case.proj and backend.SEQUENCE_MAX_HIDDEN[math] >= case.H)


@inside
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_agrees_with_float64(algorithm, dtype, poisoned):
    # Of a dtype that shares its code with another, every third case.
    for case in ALL if dtype in (torch.bfloat16, torch.float32) else ALL[2::3]:
        if not fits(case, algorithm, backend.math_of(dtype, tf32=False)):
            continue
        given = make(case, dtype)
        backend.launches.clear()
        found = run(case, given, "triton", algorithm)
        count = case.T if algorithm == "step" else 1
        assert backend.launches == {f"{algorithm}_forward_kernel": count, f"{algorithm}_backward_kernel": count}, case
        try:
            assert_close(found, run(case, widened(given), "reference"), models(case, given))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


def tf32(t: torch.Tensor) -> torch.Tensor:
    """As a tensor core reads a float32: ten bits of mantissa, the rest ignored."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_model(case: Case, given, algorithm: str):
    """An LSTM in float32 whose recurrent products, and a step's input product, take tf32 operands."""
    x, h, c, dh, dc = (given[name] for name in ("x", "h0", "c0", "dh_n", "dc_n"))
    w_ih, w_hh, bias = given["w_ih"], given["w_hh"], given["b_ih"] + given["b_hh"]
    order = list(range(case.T))[:: -1 if case.reverse else 1]
    before, after, saved, dgates = {}, {}, {}, {}
    for t in order:
        before[t] = h, c
        gates = tf32(x[t]) @ tf32(w_ih).t() if algorithm == "step" else x[t] @ w_ih.t()
        i, f, g, o = (gates + tf32(h) @ tf32(w_hh).t() + bias).chunk(4, 1)
        i, f, g, o = saved[t] = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        after[t] = h, c
    for t in reversed(order):
        i, f, g, o = saved[t]
        tanh_c = after[t][1].tanh()
        dh = dh + given["dy"][t]
        dc = dc + dh * o * (1 - tanh_c**2)
        di, df = dc * g * i * (1 - i), dc * before[t][1] * f * (1 - f)
        dgates[t] = torch.cat([di, df, dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)], 1)
        exact_at_the_end = algorithm == "step" and t == order[0]  # a GEMM of its own
        dh = dgates[t] @ w_hh if exact_at_the_end else tf32(dgates[t]) @ tf32(w_hh)
        dc = dc * f
    d = torch.cat([dgates[t] for t in range(case.T)])
    h_prev = torch.cat([before[t][0] for t in range(case.T)])
    return {
        "y": torch.stack([after[t][0] for t in range(case.T)]),
        "h_n": h,
        "c_n": c,
        "dx": (d @ w_ih).view(x.shape),
        "dh0": dh,
        "dc0": dc,
        "dw_ih": d.t() @ x.flatten(0, 1),
        "dw_hh": d.t() @ h_prev,
        "db_ih": d.sum(0),
        "db_hh": d.sum(0),
    }


@inside
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_tf32_agrees_with_float64(algorithm, monkeypatch):
    monkeypatch.setattr(backend, "allow_tf32", lambda: True)
    for case in (Case(T=6, B=16, I=32, H=64), Case(T=5, B=5, I=33, H=29, reverse=True)):
        given = make(case, torch.float32)
        found = run(case, given, "triton", algorithm)
        exact = run(case, widened(given), "reference")
        assert_close(found, exact, [tf32_model(case, given, algorithm)])
        assert (found["y"].double() - exact["y"]).abs().max() > 1e-5, "no product was in tf32"


@inside
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_the_order_of_warps_and_blocks_does_not_matter(algorithm):
    import ptxsim

    for dtype in (torch.bfloat16, torch.float32):
        case = Case(T=3, B=18, I=24, H=48, lengths=(3,) * 7 + (2,) * 11, reverse=True)
        given = make(case, dtype)
        first = run(case, given, "triton", algorithm)
        for seed in range(1, 6):
            with ptxsim.options(seed=seed):
                for name, t in run(case, given, "triton", algorithm).items():
                    assert torch.equal(t, first[name]), (dtype, seed, name)


@inside
def test_a_step_reads_the_weights_once(monkeypatch):
    """Bytes: each weight once in the whole grid, x and h once in each block of units."""
    simulator = backend._simulator()
    counted = {}

    def launch(kernel, grid, *rest, **options):
        counted[kernel.__name__] = grid, simulator_launch(kernel, grid, *rest, **options)

    simulator_launch = simulator.launch
    monkeypatch.setattr(simulator, "launch", launch)
    case = Case(T=1, B=16, I=768, H=768)
    run(case, make(case, torch.bfloat16), "triton", "step")
    (units, rows), forward = counted["step_forward_kernel"]
    assert units * rows >= 90
    for weight in ("w_ih", "w_hh"):
        assert forward["by_arg"][weight]["ld_bytes"] == 4 * 768 * 768 * 2
    assert forward["by_arg"]["x"]["ld_bytes"] == units * 16 * 768 * 2
    assert forward["global_ld_bytes"] <= 14.5e6
    assert forward["warp_instr"] <= 340_000
    assert forward["mma"] == 2 * 4 * 768 * 768 * 16 // (16 * 8 * 16)
