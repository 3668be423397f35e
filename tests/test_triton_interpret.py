"""The Triton kernels in Triton's interpreter, float32, against the reference: outputs, all gradients, launch counts.

The interpreter must be chosen before the kernels are imported, so the tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from problems import CASES, Case, assert_close, make, run, widened

from fusedrnn.backends import triton as backend

numpy = pytest.importorskip("numpy")  # of the interpreter
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pointwise = pytest.importorskip("fusedrnn.kernels.pointwise")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.interpreted
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

MORE = [
    Case(T=3, B=17, I=20, H=17, lengths=(3,) * 4 + (2,) * 9 + (1,) * 4, reverse=True),
    Case(T=3, B=18, I=40, H=8, lengths=(3, 3) + (1,) * 16),
    Case(T=2, B=9, I=3, H=40, proj=33),
    Case(T=2, B=3, I=150, H=6),
]
STEP = [(case, "step") for case in CASES + MORE]
SEQUENCE = [(case, "sequence") for case in CASES + MORE if not case.proj and case.H <= 33]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    env.pop("FUSEDRNN_SIMULATE", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    old = triton.__version__.startswith("3.6.")
    if old and "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip(
            f"Triton {triton.__version__}'s interpreter does not run on NumPy {numpy.__version__}: not interpreted"
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@inside
@pytest.mark.parametrize("case, algorithm", STEP + SEQUENCE, ids=str)
def test_agrees_with_float64(case, algorithm, poisoned):
    given = make(case, torch.float32)
    backend.launches.clear()
    found = run(case, given, "triton", algorithm)
    count = case.T if algorithm == "step" else 1
    assert backend.launches == {f"{algorithm}_forward_kernel": count, f"{algorithm}_backward_kernel": count}
    exact = run(case, widened(given), "reference")
    assert_close(found, exact, [run(case, given, "reference")])


@inside
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_without_grad_is_the_same(algorithm, poisoned):
    for case in (Case(T=4, B=3, I=5, H=9), Case(T=4, B=3, I=5, H=9, lengths=(4, 2, 1), reverse=True)):
        given = make(case, torch.float32)
        with_grad = run(case, given, "triton", algorithm)
        for name, t in run(case, given, "triton", algorithm, wrt=()).items():
            assert torch.equal(t, with_grad[name]), (case, name)


@inside
@pytest.mark.parametrize("through", ["y", "h_n", "c_n"])
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_gradient_of_one_output(algorithm, through, poisoned):
    """The other outputs' gradients are None."""
    case = Case(T=3, B=2, I=4, H=6, reverse=True)
    given = make(case, torch.float32)
    found = run(case, given, "triton", algorithm, through=(through,))
    exact = run(case, widened(given), "reference", through=(through,))
    assert_close(found, exact, [run(case, given, "reference", through=(through,))])


@inside
@pytest.mark.parametrize("bias", ["b_ih", "b_hh"])
def test_one_bias_only(bias):
    case = Case(T=2, B=2, I=3, H=4)
    given = make(case, torch.float32)
    del given[bias]
    exact = run(case, widened(given), "reference")
    for algorithm in ("step", "sequence"):
        assert_close(run(case, given, "triton", algorithm), exact, [run(case, given, "reference")])


@inside
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_empty_batch(algorithm):
    case = Case(T=3, B=0, I=4, H=5)
    found = run(case, make(case, torch.float32), "triton", algorithm)
    assert found["y"].shape == (3, 0, 5)
    assert not found["dw_hh"].any()


@inside
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30, -1e30])
@pytest.mark.parametrize("algorithm", ["step", "sequence"])
def test_special_values(algorithm, value):
    """inf saturates a gate, NaN stays in its row; nothing becomes NaN by itself."""
    case = Case(T=2, B=3, I=4, H=5)
    given = make(case, torch.float32)
    given["b_ih"][::3] = value
    given["x"][0, 1, 0] = value
    exact = run(case, given, "reference", wrt=())
    for name, t in run(case, given, "triton", algorithm, wrt=()).items():
        torch.testing.assert_close(t, exact[name], equal_nan=True)


@triton.jit
def _both(x, s, t, N: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, N))
    tl.store(s + tl.arange(0, N), pointwise.sigmoid(b_x))
    tl.store(t + tl.arange(0, N), pointwise.tanh(b_x))


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_and_tanh(dtype):
    """As accurate near zero as far from it, and never NaN."""
    x = torch.cat([torch.logspace(-30, 38, 500), torch.linspace(0, 20, 523), torch.tensor([float("inf")])]).to(dtype)
    x = torch.cat([x, -x])
    s, t = torch.empty_like(x), torch.empty_like(x)
    _both[(1,)](x, s, t, N=len(x))
    for found, exact in ((s, x.double().sigmoid()), (t, x.double().tanh())):
        relative = (found - exact).abs() / exact.abs().clamp(min=1e-30)
        if dtype == torch.float64:
            assert (found - exact).abs().max() <= 1e-15
        else:
            assert relative[exact.abs() > 1e-30].max() <= 4e-7


@inside
def test_refuses():
    case = Case(T=2, B=2, I=3, H=4)
    with pytest.raises(RuntimeError, match="float32 and float64 only, got torch"):
        run(case, make(case, torch.bfloat16), "triton")
    with pytest.raises(RuntimeError, match="'persistent' of backend 'triton' cannot run: it has auto, step, sequence"):
        run(case, make(case, torch.float32), "triton", "persistent")
