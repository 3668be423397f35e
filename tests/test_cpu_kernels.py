"""The C++ kernels: every instruction set and number of threads against float64, and raw calls that must raise."""

import decimal
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import _build, ops
from fusedrnn.cells import CELLS

pytestmark = pytest.mark.skipif(not _build.loaded(), reason=f"the C++ extension: {_build.why_not_loaded()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# T, B, I, H, P, lengths
SIZES = [
    (1, 1, 1, 1, 0, None),
    (4, 1, 3, 5, 0, None),
    (3, 13, 5, 129, 0, None),
    (5, 9, 6, 64, 0, None),
    (3, 4, 5, 33, 7, None),
    (3, 3, 5, 20, 40, None),
    (6, 7, 5, 40, 0, (6, 6, 5, 3, 2, 1, 1)),
    (6, 7, 5, 70, 9, (6, 6, 5, 3, 2, 1, 1)),
    (40, 16, 8, 96, 0, None),
    # One step: the kernel multiplies x by w_ih as well.
    (1, 5, 19, 40, 0, None),
    (1, 5, 19, 70, 9, None),
    # More than 64 rows: the weights are repacked; with many steps of one row in backward only.
    (6, 1, 3, 37, 0, None),
    (17, 4, 5, 33, 7, None),
    (22, 3, 5, 20, 40, None),
    (12, 7, 5, 40, 0, (12, 12, 10, 6, 2, 1, 1)),
    (12, 7, 5, 70, 9, (12, 12, 10, 6, 2, 1, 1)),
    # Products large enough for the host's GEMM, each of an odd depth.
    (3, 35, 131, 101, 0, None),
]
# Few rows and many units: threads share the units, with a barrier after every step.
SIZES_BY_UNITS = [
    (3, 2, 4, 330, 0, None),
    (3, 3, 4, 300, 140, None),
    (4, 3, 4, 200, 0, (4, 2, 1)),
    (33, 2, 4, 330, 0, None),
    (22, 3, 4, 300, 140, None),
    (22, 3, 4, 200, 0, (22, 9, 1)),
]
# More rows than one group of sums holds.
SIZES_WIDE = [
    (2, 45, 3, 1, 0, None),
    (1, 70, 5, 37, 0, None),
    (1, 70, 5, 37, 9, None),
    (2, 101, 3, 20, 0, None),
    (3, 27, 5, 33, 0, None),
    (2, 45, 5, 70, 9, None),
]
# Rounding to the dtype, a few times over: outputs are of order 1, gradients are compared relative to their largest.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# Of sigmoid and tanh, in units in the last place.
ULPS = {torch.float32: (2.5, 2.5), torch.float64: (2.5, 2.5), torch.bfloat16: (0.51, 0.51), torch.float16: (0.51, 0.51)}


def sequence(cell, *arguments):
    *inputs, reverse, backend, algorithm, save = arguments
    return ops.sequence(cell, *inputs, None, reverse, backend, algorithm, save, save)


def sequence_backward(cell, dy, dh_n, dc_n, *arguments):
    *inputs, y, gates, cells, sizes, reverse, backend, algorithm, needs = arguments
    return ops.sequence_backward(
        cell, dy, dh_n, dc_n, None, *inputs, sizes, None, reverse, y, gates, cells, backend, algorithm, needs
    )


def draw(T, B, I, H, P, lengths, dtype, bias=True, cell="lstm"):
    """(inputs of the op, batch_sizes, dy, dh_n, dc_n)"""
    generator = torch.Generator().manual_seed(0)
    P, G = P or None, len(CELLS[cell].gates)
    rows = (T, B) if lengths is None else (sum(lengths),)
    sizes = None if lengths is None else torch.tensor([sum(n > t for n in lengths) for t in range(T)])

    def uniform(*shape, bound=1.0):
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound).to(dtype)

    w = H**-0.5
    b_ih, b_hh = (uniform(G * H, bound=w), uniform(G * H, bound=w)) if bias else (None, None)
    inputs = (
        uniform(*rows, I),
        uniform(B, P or H),
        uniform(B, H) if cell == "lstm" else None,
        uniform(G * H, I, bound=w),
        uniform(G * H, P or H, bound=w),
        b_ih,
        b_hh,
        uniform(P, H, bound=w) if P else None,
    )
    return inputs, sizes, (uniform(*rows, P or H), uniform(B, P or H), uniform(B, H) if cell == "lstm" else None)


def run(inputs, sizes, gradients, reverse, backend, cell="lstm"):
    y, h_n, c_n, gates, cells = sequence(cell, *inputs, sizes, reverse, backend, "auto", True)
    needs = [t is not None for t in inputs]
    back = sequence_backward(
        cell, *gradients, *inputs, y, gates, cells, sizes, reverse, backend, "auto", needs
    )  # fmt: skip
    return [y, h_n, c_n, gates, cells, *back]


def up(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(size, dtype, reverse, bias=True, cell="lstm"):
    inputs, sizes, gradients = draw(*size, dtype, bias, cell)
    ours = run(inputs, sizes, gradients, reverse, "cpu", cell)
    exact = run(up(inputs), sizes, up(gradients), reverse, "reference", cell)
    for i, (got, want) in enumerate(zip(ours, exact)):
        assert got.shape == want.shape, (i, got.shape, want.shape)
        assert not got.isnan().any(), (i, size, dtype, reverse)
        error = (got.double() - want).abs().max() if want.numel() else 0
        bound = TOLERANCE[dtype] * max(1.0, want.abs().max() if want.numel() else 0)
        assert error <= bound, (i, size, dtype, reverse, error, bound)
    again = run(inputs, sizes, gradients, reverse, "cpu", cell)
    assert all(torch.equal(a, b) for a, b in zip(ours, again)), "not bitwise repeatable"


def exact_activations(value):
    """sigmoid and tanh of a float, to 60 digits."""
    if not math.isfinite(value):
        return [value if math.isnan(value) else decimal.Decimal(v) for v in (int(value > 0), math.copysign(1, value))]
    with decimal.localcontext(prec=60):
        e = (-decimal.Decimal(abs(value))).exp()
        tanh = ((1 - e * e) / (1 + e * e)).copy_sign(decimal.Decimal(value))
        return [(1 if value > 0 else e) / (1 + e), tanh]


def error_in_ulps(got, want, dtype):
    """0 also where both are NaN, or where subnormals of the type of the math are taken for one another."""
    if math.isnan(got) or math.isnan(want):
        return 0.0 if math.isnan(got) and math.isnan(want) else math.inf
    wide = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    narrow = torch.finfo(dtype)
    error = abs(decimal.Decimal(got) - want)
    if abs(want) < wide.tiny and error < wide.tiny:
        return 0.0
    ulp = narrow.eps * 2.0 ** (math.frexp(max(abs(float(want)), narrow.tiny))[1] - 1)
    return float(error / decimal.Decimal(ulp))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype):
    """The gates over all of the range of exp against exact values; no NaN but from NaN."""
    sweeps = [(-1, 1, 401), (-100, 100, 2001), (-720, 720, 2001), (-88.8, -88.3, 201), (-709.9, -709.4, 201)]
    special = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, math.nan], dtype=torch.float64)
    x = torch.cat([special, *(torch.linspace(*sweep, dtype=torch.float64) for sweep in sweeps)]).to(dtype)
    x = torch.cat([x, -x])
    zeros, ones = torch.zeros(len(x), 1, dtype=dtype), torch.ones(4, 1, dtype=dtype)
    y, _, c, gates, _ = sequence(
        "lstm", x.view(1, -1, 1), zeros, zeros, ones, 0 * ones, None, None, None, None, False, "cpu", "auto", True
    )  # fmt: skip
    assert torch.equal(y.isnan().view(-1), x.isnan())
    assert torch.equal(c.isnan().view(-1), x.isnan())
    worst = [0.0, 0.0]
    for value, (i, f, g, o) in zip(x.tolist(), gates[0].tolist()):
        for k, (got, want) in enumerate(zip([i, g], exact_activations(value))):
            error = error_in_ulps(got, want, dtype)
            assert error <= ULPS[dtype][k], (dtype, value, got, want, error)
            worst[k] = max(worst[k], error)
        assert math.isnan(value) or i == f == o
        if math.isinf(value):
            assert (i, g) == (int(value > 0), math.copysign(1, value)), (dtype, value, i, g)
        if value < -750:
            assert i == 0, (dtype, value, i)


@pytest.fixture
def given_threads():
    """Puts back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request, given_threads):
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(dtype, threads):
    for i, size in enumerate(SIZES + SIZES_BY_UNITS + SIZES_WIDE):
        check(size, dtype, reverse=(i + threads) % 2 == 0)
        if size[-1]:
            check(size, dtype, reverse=(i + threads) % 2 == 1)
    for cell in ("gru", "rnn_tanh"):
        for size in (
            (1, 70, 5, 37, 0, None),
            (33, 2, 4, 129, 0, None),
            (3, 27, 5, 33, 0, None),
            (2, 101, 3, 20, 0, None),
        ):
            check(size, dtype, reverse=threads == 2, cell=cell)
    check((3, 2, 4, 6, 0, None), dtype, False, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resets_with_a_wide_projection(dtype):
    """P is beyond H and its padding: a row that is reset starts from P zeros."""
    for T, B in ((3, 4), (3, 30)):  # weights as they lie, and repacked
        inputs, _, _ = draw(T, B, 3, 5, 70, None, dtype)
        mask = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.5
        ours = ops.sequence("lstm", *inputs, None, mask, False, "cpu", "auto", True, True)
        exact = ops.sequence("lstm", *up(inputs), None, mask, False, "reference", "auto", True, True)
        for got, want in zip(ours, exact):
            assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max()), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype):
    """Saturated and non-finite gates: no NaN but from NaN."""
    for value in (1e3, 3e4, float("inf")):
        x = torch.tensor([[[value]], [[-value]]], dtype=dtype)
        one = torch.ones(4, 1, dtype=dtype)
        y, *_ = sequence(
            "lstm", x, *torch.zeros(2, 1, 1, dtype=dtype), one, one, None, None, None, None, False, "cpu", "auto",
            False,
        )  # fmt: skip
        want = torch.tensor([[[1.0]], [[0.0]]]).double().tanh()
        assert torch.allclose(y.double(), want, rtol=TOLERANCE[dtype]), (dtype, value, y)
    x = torch.full((1, 1, 1), float("nan"), dtype=dtype)
    y, *_ = sequence(
        "lstm", x, *torch.zeros(2, 1, 1, dtype=dtype), one, one, None, None, None, None, False, "cpu", "auto", False
    )  # fmt: skip
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype):
    """Neither a row that is NaN nor one that fills a tile only reaches another one."""
    # Odd depths, and large enough for the host's GEMM.
    inputs, sizes, gradients = draw(3, 35, 131, 101, 0, None, dtype)
    inputs[0][2, 7], gradients[0][1, 11] = math.nan, math.inf
    y, _, _, _, _, dx, *_ = run(inputs, sizes, gradients, False, "cpu")
    assert set(torch.nonzero(y.isnan().any(2).any(0)).flatten().tolist()) == {7}
    assert set(torch.nonzero(dx.isfinite().logical_not().any(2).any(0)).flatten().tolist()) == {7, 11}


def test_other_libraries_keep_their_tiles(threads):
    """oneDNN computes bfloat16 in the tile registers of the same threads."""
    a, b = torch.randn(2, 256, 256).to(torch.bfloat16)
    want = a @ b
    inputs, sizes, gradients = draw(5, 19, 3, 40, 0, None, torch.bfloat16)
    for _ in range(3):
        run(inputs, sizes, gradients, False, "cpu")
        assert torch.equal(a @ b, want)


def long_call(way):
    layer, x = fusedrnn.LSTM(128, 128), torch.randn(1500, 16, 128)
    if way == "packed":
        x = torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:700, 1]])
    if way == "gradients":
        return lambda: torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)
    run = layer.stream(16) if way == "stream" else layer if way in ("layer", "packed") else None
    if run is None:
        inputs = (x, x[0], x[0], *(p.detach() for p in layer.parameters()), None)
        return lambda: ops.sequence("lstm", *inputs, None, None, False, "cpu", "auto", True, True)

    def call():
        with torch.no_grad():
            run(x)

    return call


@pytest.mark.parametrize("way", ["layer", "gradients", "packed", "stream", "op"])
def test_other_threads_of_python_run_during_a_call(way, given_threads):
    torch.set_num_threads(1)
    call = long_call(way)
    call()

    def longest_without_a_look() -> float:
        """As a part of the call."""
        times = []

        def work():
            times.append(time.perf_counter())
            call()
            times.append(time.perf_counter())

        worker, seen = threading.Thread(target=work), []
        worker.start()
        while worker.is_alive():
            seen.append(time.perf_counter())
            time.sleep(1e-4)
        begin, end = times
        during = [begin, *(t for t in seen if begin < t < end), end]
        return max(b - a for a, b in itertools.pairwise(during)) / (end - begin)

    # Where other programs have the cores, one look more may be late; with the lock held all are.
    assert min(longest_without_a_look() for _ in range(5)) < 0.6


# Processors as their libraries see them: the instruction sets that this package, ATen, oneDNN and MKL may use.
LOWEST = {
    "FUSEDRNN_CPU_CAPABILITY": "portable",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}
AVX2 = {
    "FUSEDRNN_CPU_CAPABILITY": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
NO_16_BIT_UNITS = {
    "FUSEDRNN_CPU_CAPABILITY": "avx512",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512",
}
ONE_BY_ONE = [
    *({"FUSEDRNN_CPU_CAPABILITY": name} for name in ("portable", "avx2", "avx512", "avx512_bf16")),
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16")),
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("SSE4_2", "AVX2", "AVX512")),
    {"FUSEDRNN_CPU_PRODUCTS": "panels"},
]
# What of the suite computes on the CPU.
SIZES_AND_VALUES = "every_size or activations or projection or special or row or infinities or subnormals"
ON_THE_CPU = f"""
    (test_cpu_kernels and ({SIZES_AND_VALUES})) or (test_recurrence and (cpu-auto or reference-auto) and not gradcheck)
    or (test_torch_modules and (16_bit or autocast)) or (test_modules and 16_bit)
"""


def run_on(processor, chosen, least):
    """At least so many tests pass in a process that sees such a processor."""
    files = ["test_cpu_kernels.py", "test_recurrence.py", "test_torch_modules.py", "test_modules.py"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", " ".join(chosen.split()),
         *(Path(__file__).with_name(name) for name in files)],
        env={**os.environ, **processor}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) >= least, ran.stdout


def name_of(processor):
    return ",".join(f"{name}={value}" for name, value in processor.items())


@pytest.mark.parametrize("processor", [LOWEST, NO_16_BIT_UNITS], ids=name_of)
def test_lesser_processor(processor):
    run_on(processor, ON_THE_CPU, 400)


@pytest.mark.slow
@pytest.mark.parametrize("processor", [AVX2, *ONE_BY_ONE], ids=name_of)
def test_every_lesser_processor(processor):
    run_on(processor, ON_THE_CPU, 400)


# Infinities may come out wrong there.
@pytest.mark.slow
def test_products_of_the_host_on_a_processor_that_would_not_take_them():
    run_on({"FUSEDRNN_CPU_PRODUCTS": "host"}, "every_size", 8)


@pytest.mark.parametrize(
    "capability, bfloat16, limit, forced, want",
    [
        # bfloat16 units: the host's products, which use them
        ("amx", True, None, None, "host"),
        ("avx512", True, None, None, "host"),
        ("avx512_bf16", True, None, None, "host"),
        ("amx", True, "ALL", None, "host"),
        ("amx", True, "AVX512_CORE_AMX", None, "host"),
        ("avx512", True, "AVX512_CORE_BF16", None, "host"),
        # no such units, or nobody who uses them
        ("avx512", False, None, None, "panels"),
        ("avx2", False, None, None, "panels"),
        ("portable", False, None, None, "panels"),
        ("avx2", True, None, None, "panels"),
        ("portable", True, None, None, "panels"),
        ("amx", True, "AVX512_CORE_VNNI", None, "panels"),
        ("avx512", True, "AVX2", None, "panels"),
        ("avx512", True, "a later name", None, "panels"),
        # forced
        ("amx", True, None, "panels", "panels"),
        ("portable", False, "SSE41", "host", "host"),
    ],
)
def test_who_multiplies_on_which_processor(capability, bfloat16, limit, forced, want):
    choose = _build._extension.cpu_products
    for intel in (True, False):
        assert choose(capability, intel, bfloat16, limit, "bfloat16", forced) == want
        # What the host makes of float16 is nowhere known to be right and fast.
        assert choose(capability, intel, bfloat16, limit, "float16", forced) == (forced or "panels")
    assert choose(capability, True, bfloat16, limit, "float32", forced) == (forced or "host")
    of_others = "host" if capability == "portable" else "panels"
    assert choose(capability, False, bfloat16, limit, "float32", forced) == (forced or of_others)


def test_products_that_were_forced():
    with pytest.raises(RuntimeError, match="FUSEDRNN_CPU_PRODUCTS must be host or panels, got 'both'"):
        _build._extension.cpu_products("avx512", True, True, None, "bfloat16", "both")
    here = _build.build_info()["cpu_products"]
    assert set(here) == {"float32", "bfloat16", "float16"}
    other = "panels" if here["bfloat16"] == "host" else "host"
    call = "import fusedrnn, torch; fusedrnn.LSTM(4, 4, dtype=torch.float16)(torch.zeros(200, 8, 4).half())"
    ran = subprocess.run(
        [sys.executable, "-c", call],
        env={**os.environ, "FUSEDRNN_CPU_PRODUCTS": "both"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "FUSEDRNN_CPU_PRODUCTS must be host or panels, got 'both'" in ran.stderr
    ran = subprocess.run(
        [sys.executable, "-m", "fusedrnn", "info"],
        env={**os.environ, "FUSEDRNN_CPU_PRODUCTS": other}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(rf"cpu_products\s+float32: {other}, bfloat16: {other}, float16: {other}\n", ran.stdout), (
        ran.stdout + ran.stderr
    )


FEATURES = (*range(1, 10), 16, 17, 33)
# Steps and rows of a step: one step and several, weights as they lie, repacked and in products; 1 to 10,000 rows.
MANY_ROWS = ((1, 1), (1, 2), (2, 5), (1, 64), (13, 5), (1, 65), (3, 40), (4, 250), (1, 4001), (4, 2500))


def same_as(model, ours, about, tolerance=None):
    """Infinities and NaN in the same places; all else as near as rounding a few times over leaves it."""
    for i, (got, want) in enumerate(zip(ours, model)):
        assert got.shape == want.shape, (i, about)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(want)), (i, kind.__name__, about)
        if not got.numel():
            continue
        got, want = got.double().nan_to_num(0, 0, 0), want.double().nan_to_num(0, 0, 0)
        bound = (tolerance or TOLERANCE[about[0]]) * max(1.0, want.abs().max().item())
        assert (got - want).abs().max().item() <= bound, (i, about)


def check_special_values(size, where, dtype, cell, several, turn):
    """Infinities and NaN in the first, middle and last row, or, unless ``several``, one of them in the last."""
    inputs, sizes, gradients = draw(*size, dtype, cell=cell)
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    target = gradients[0] if where == "dy" else inputs[names.index(where)]
    rows, values = target.view(-1, target.shape[-1]), (math.inf, -math.inf, math.nan)
    if where == "w_hh" and size[0] > 1:
        values = (math.nan,) * 3  # infinity times an h that rounds to either side of 0 has either sign
    for n, row in list(enumerate((0, len(rows) // 2, len(rows) - 1)))[0 if several else 2 :]:
        rows[row, (turn + row) % rows.shape[1]] = values[(n + turn) % 3]
    ours, model = (run(inputs, sizes, gradients, turn % 4 == 1, backend, cell) for backend in ("cpu", "reference"))
    assert any(not t.isfinite().all() for t in model)
    same_as(model, ours, (dtype, where, cell, size))


SPECIAL = pytest.mark.parametrize("where", ["x", "h0", "w_ih", "w_hh", "dy"])
IN_16_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@IN_16_BITS
@SPECIAL
def test_infinities_and_nan_in_16_bits_are_those_of_float32_math(where, dtype, given_threads):
    for k, (I, (T, B)) in enumerate(itertools.product(FEATURES, MANY_ROWS)):
        torch.set_num_threads(1 + (k % 9 == 0))
        cell = ("lstm", "gru", "rnn_tanh")[k % 3]
        check_special_values((T, B, I, 5, 0, None), where, dtype, cell, k % 2 == 0, k // 10 + k)


@IN_16_BITS
@SPECIAL
def test_infinities_and_nan_in_products_of_the_host(where, dtype):
    """Where bfloat16 goes to it: of even and of odd depths."""
    for turn, (B, I) in enumerate(((35, 131), (34, 130), (35, 130), (34, 131))):
        check_special_values((3, B, I, 101, 0, None), where, dtype, "lstm", turn % 2 == 0, turn)


@pytest.fixture
def flushed():
    """Subnormals of float32 count as zero in this thread."""
    assert torch.set_flush_denormal(True) or platform.machine() not in ("x86_64", "AMD64")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("where", ["x", "h0", "dy"])
def test_subnormals_of_float16_count(where, given_threads, flushed):
    """Times weights of 2^14 they are of order 1."""
    torch.set_num_threads(1)
    tiny = torch.finfo(torch.float16).tiny
    for I, (T, B) in itertools.product(FEATURES, MANY_ROWS):
        inputs, sizes, gradients = draw(T, B, I, 5, 0, None, torch.float16)
        x, h0, _, w_ih, w_hh, *_ = inputs
        small, weight = {"x": (x, w_ih), "h0": (h0, w_hh), "dy": (gradients[0], w_ih)}[where]
        small.mul_(tiny * 0.9)
        weight.copy_(weight.double().mul(2.0**14).half())
        if where == "dy":
            gradients = (gradients[0], None, None)
            x.zero_()
        if where == "h0":
            gradients = (None, None, None)
        ours = run(inputs, sizes, gradients, False, "cpu")
        torch.set_flush_denormal(False)
        model = run(inputs, sizes, gradients, False, "reference")
        torch.set_flush_denormal(True)
        about = (torch.float16, where, "lstm", T, B, I)
        if where == "h0":  # the h of later steps are large
            ours, model = ([t[:1] for t in o[:1]] for o in (ours, model))
        # dgates are subnormal as well, of few bits.
        same_as(model, ours, about, tolerance=0.03 if where == "dy" else None)
        small.zero_()
        without = run(inputs, sizes, gradients, False, "reference")
        seen = 5 if where == "dy" else 0
        assert (model[seen][:1].double() - without[seen][:1].double()).abs().max() > 0.01, about


def raw(**changed):
    """A raw forward call with some arguments replaced."""
    inputs, _, _ = draw(3, 2, 4, 5, 0, None, torch.float32)
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    given = {"cell": "lstm", **dict(zip(names, inputs)), "batch_sizes": None} | changed
    return sequence(*given.values(), False, "cpu", "auto", True)


MALFORMED = {
    "x 2-D": {"x": torch.zeros(3, 4)},
    "x other size": {"x": torch.zeros(3, 2, 3)},
    "x other batch": {"x": torch.zeros(3, 1, 4)},
    "x integer": {"x": torch.zeros(3, 2, 4, dtype=torch.int64)},
    "no steps": {"x": torch.zeros(0, 2, 4)},
    "h0 other size": {"h0": torch.zeros(2, 6)},
    "h0 1-D": {"h0": torch.zeros(5)},
    "h0 float64": {"h0": torch.zeros(2, 5, dtype=torch.float64)},
    "no c0": {"c0": None},
    "c0 other batch": {"c0": torch.zeros(1, 5)},
    "w_ih too small": {"w_ih": torch.zeros(19, 4)},
    "w_hh not a multiple of 4": {"w_hh": torch.zeros(19, 5)},
    "w_hh not square": {"w_hh": torch.zeros(20, 4), "h0": torch.zeros(2, 4)},
    "w_hh empty": {"w_hh": torch.zeros(0, 5)},
    "b_ih too small": {"b_ih": torch.zeros(5)},
    "b_hh 2-D": {"b_hh": torch.zeros(20, 1)},
    "w_hr other size": {"w_hr": torch.zeros(5, 4)},
    "batch_sizes of dense x": {"batch_sizes": torch.tensor([2, 2, 2])},
    "unknown cell": {"cell": "elman"},
}
PACKED = {
    "increase": [1, 2, 3],
    "zero": [3, 3, 0],
    "negative": [4, 3, -1],
    "too many": [3, 3, 3],
    "too few": [3, 2],
    "huge": [3, 2**62, 2**62],
    "other batch": [2, 2, 2],
    "none": [],
}


@pytest.mark.parametrize("changed", MALFORMED.values(), ids=MALFORMED)
def test_malformed_raw_call_raises(changed):
    with pytest.raises((RuntimeError, ValueError)):
        raw(**changed)


@pytest.mark.parametrize("sizes", PACKED.values(), ids=PACKED)
def test_malformed_batch_sizes_raise(sizes):
    with pytest.raises(RuntimeError):
        raw(x=torch.zeros(6, 4), h0=torch.zeros(3, 5), c0=torch.zeros(3, 5), batch_sizes=torch.tensor(sizes).long())
    with pytest.raises(RuntimeError):
        raw(x=torch.zeros(6, 4), h0=torch.zeros(3, 5), c0=torch.zeros(3, 5), batch_sizes=torch.tensor([3.0, 2, 1]))


@pytest.mark.parametrize("name", ["y", "gates", "cells", "dy", "dh_n", "dc_n"])
def test_malformed_backward_raises(name):
    inputs, sizes, gradients = draw(3, 2, 4, 5, 0, None, torch.float32)
    y, _, _, gates, cells = sequence("lstm", *inputs, sizes, False, "cpu", "auto", True)
    tensors = dict(zip(("dy", "dh_n", "dc_n"), gradients)) | {"y": y, "gates": gates, "cells": cells}
    for wrong in (tensors[name][..., :-1], tensors[name].int(), tensors[name].new_empty(0)):
        t = tensors | {name: wrong}
        with pytest.raises(RuntimeError):
            sequence_backward(
                "lstm", t["dy"], t["dh_n"], t["dc_n"], *inputs, t["y"], t["gates"], t["cells"], sizes, False, "cpu",
                "auto", [True] * 7 + [False],
            )  # fmt: skip


def test_outputs_not_needed_are_empty_and_do_not_alias():
    inputs, sizes, gradients = draw(3, 2, 4, 5, 0, None, torch.float32)
    *_, gates, cells = sequence("lstm", *inputs, sizes, False, "cpu", "auto", False)
    assert gates.shape == cells.shape == (0,)
    y, _, _, gates, cells = sequence("lstm", *inputs, sizes, False, "cpu", "auto", True)
    for needed in range(7):
        needs = [i == needed for i in range(8)]
        back = sequence_backward(
            "lstm", *gradients, *inputs, y, gates, cells, sizes, False, "cpu", "auto", needs
        )  # fmt: skip
        assert [t.shape != (0,) for t in back] == needs
    everything_needed = sequence_backward(
        "lstm", None, None, None, *inputs, y, gates, cells, sizes, False, "cpu", "auto", [True] * 7 + [False]
    )  # fmt: skip
    assert all(t.eq(0).all() for t in everything_needed)
    pointers = [t.data_ptr() for t in everything_needed[:-1]]
    assert len(set(pointers)) == len(pointers)


def test_calls_from_several_threads_at_once(threads):
    from concurrent.futures import ThreadPoolExecutor

    inputs, sizes, _ = draw(20, 4, 8, 128, 0, None, torch.float32)
    call = lambda: sequence("lstm", *inputs, sizes, False, "cpu", "auto", False)[0]
    want = call()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(want, f.result()) for f in [pool.submit(call) for _ in range(8)])


@pytest.mark.parametrize("name, options, lengths", [
    ("LSTM", {}, None), ("LSTM", {"proj_size": 5, "bidirectional": True}, None), ("GRU", {"num_layers": 2}, None),
    ("GRU", {"bidirectional": True}, (3001, 3000, 700, 1)), ("RNN", {}, (9000, 3000, 2999, 1)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_long_sequence_goes_in_pieces(name, options, lengths, dtype):
    """Where nothing is kept for backward; with it, all at once. Lengths: of a packed batch."""
    torch.manual_seed(0)
    layer = getattr(fusedrnn, name)(3, 129, dtype=dtype, **options)
    if lengths is None:
        x = torch.randn(2500, 4, 3).to(dtype)
        resets = torch.rand(2500, 4) < 0.01
    else:
        resets = None
        rows = [torch.randn(n, 3).to(dtype) for n in lengths]
        x = torch.nn.utils.rnn.pack_sequence(rows)
    lead = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = layer._state_sizes()
    states = tuple(torch.randn(lead, 4, size).to(dtype) for size in sizes)
    hx = states if len(states) > 1 else states[0]
    want, final = layer(x, hx, resets=resets)
    with torch.no_grad():
        got, last = layer(x, hx, resets=resets)
    if lengths is not None:
        want, got = want.data, got.data
    # Of a product the host may add in another order where it has other rows.
    limit = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 6e-2}[dtype]
    assert (want.double() - got.double()).abs().max() <= limit
    for a, b in zip(final if len(states) > 1 else [final], last if len(states) > 1 else [last], strict=True):
        assert (a.double() - b.double()).abs().max() <= limit


# The shape of x, the layer, and what plan says is done at the same time.
BESIDE = [
    ((9, 3), ("LSTM", {"bidirectional": True, "num_layers": 2}), "directions"),
    ((9, 40), ("LSTM", {"bidirectional": True, "proj_size": 7}), "directions"),
    ((1, 2), ("GRU", {"bidirectional": True, "num_layers": 3}), "directions"),
    ((9000, 1), ("RNN", {"bidirectional": True}), "directions"),
    ((9, 3), ("LSTM", {"bidirectional": True, "hidden_size": 513}), ""),
    ((70, 2), ("LSTM", {"num_layers": 2, "frozen": True}), "layers"),
    ((43, 1), ("GRU", {"num_layers": 5, "frozen": True}), "layers"),
    ((3000, 1), ("GRU", {"num_layers": 3}), "layers"),
    ((70, 2), ("LSTM", {"num_layers": 2}), ""),
    ((70, 2), ("LSTM", {"num_layers": 2, "frozen": True, "hidden_size": 513}), ""),
]  # fmt: skip


@pytest.mark.skipif(_build._small_calls is None, reason="layers side by side: calls by _C, of torch 2.14 and later")
@pytest.mark.parametrize("size, layer, beside", BESIDE, ids=lambda v: None if isinstance(v, str) else str(v))
@pytest.mark.parametrize("variant", ["dense", "packed", "resets", "crowded", "float64", "bfloat16"])
def test_directions_and_layers_side_by_side(size, layer, beside, variant, given_threads):
    """The numbers of one after the other, by one thread, but for the order of sums."""
    torch.manual_seed(0)
    name, options = layer[0], dict(layer[1])
    frozen, hidden = options.pop("frozen", False), options.pop("hidden_size", 37)
    dtype = getattr(torch, variant) if "float" in variant else torch.float32
    layer = getattr(fusedrnn, name)(5, hidden, dtype=dtype, **options).eval()
    if frozen:
        fusedrnn.freeze(layer)
    steps, batch = size
    x, resets = torch.randn(steps, batch, 5).to(dtype), None
    if variant == "packed":
        lengths = [max(1, steps - 2 * k) for k in range(batch)]
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    if variant == "resets":
        resets = torch.rand(steps, batch) < 0.1
    torch.set_num_threads(2)
    kernels = fusedrnn.plan(layer, batch, steps=steps).details
    if dtype == torch.float32:
        assert kernels.beside == beside
        assert ("at the same time" in kernels.why) == bool(beside)

    @torch.no_grad()
    def run():
        y, states = layer(x, resets=resets)
        return y.data, *(states if isinstance(states, tuple) else (states,))

    torch.set_num_threads(1)
    want = run()
    assert fusedrnn.plan(layer, batch, steps=steps).details.beside == ""
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        if variant == "crowded":
            _build._extension.crowd()
        got = run()
        if variant != "crowded":
            assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))
        limit = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
        for a, b in zip(got, want, strict=True):
            assert (a.double() - b.double()).abs().max() <= limit


# By units, by rows, by rows of a packed batch, one step, with a projection.
@pytest.mark.parametrize("steps, batch, hidden, proj, lengths", [
    (5, 3, 300, 0, None), (9, 40, 33, 0, None), (9, 40, 33, 0, (40, 39, 33, 20, 19, 3, 2, 1, 1)), (1, 2, 300, 0, None),
    (5, 3, 300, 20, None), (5, 48, 64, 20, None),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_that_works_for_all_has_the_same_numbers(steps, batch, hidden, proj, lengths, dtype, given_threads):
    """As where another program holds the other core: who waits too long for a partner goes on alone for a while."""
    torch.manual_seed(0)
    layer = fusedrnn.LSTM(8, hidden, proj_size=proj, dtype=dtype)
    sizes = None if lengths is None else torch.tensor(lengths)
    x = torch.randn((steps, batch, 8) if sizes is None else (int(sizes.sum()), 8)).to(dtype)
    x = x if sizes is None else torch.nn.utils.rnn.PackedSequence(x, sizes)

    def run():
        layer.zero_grad()
        y, (h, c) = layer(x)
        y = y if sizes is None else y.data
        y.float().square().sum().backward()
        return y, h, c, *(p.grad.clone() for p in layer.parameters())

    torch.set_num_threads(2)
    want = run()
    for _ in range(2):
        _build._extension.crowd()
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 2, 4, 5, 0, None), (3, 2, 4, 5, 3, None), (3, 2, 4, 5, 0, (3, 2))])
def test_autocast_changes_nothing(size, dtype):
    inputs, sizes, gradients = draw(*size, dtype)
    want = run(inputs, sizes, gradients, False, "cpu")
    with torch.autocast("cpu"):
        got = run(inputs, sizes, gradients, False, "cpu")
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_autocast_around_backward_only():
    torch.manual_seed(0)
    lstm = fusedrnn.LSTM(4, 5)
    x = torch.randn(3, 2, 4, requires_grad=True)
    leaves = [x, *lstm.parameters()]

    def gradients(autocast):
        total = lstm(x)[0].sum()
        with torch.autocast("cpu", enabled=autocast):
            return torch.autograd.grad(total, leaves)

    want, got = gradients(False), gradients(True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("algorithm", ["step", "sequence", "nonsense"])
def test_algorithm_that_is_not_there_raises(algorithm):
    inputs, sizes, gradients = draw(3, 2, 4, 5, 0, None, torch.float32)
    message = f"algorithm '{algorithm}' of backend 'cpu' cannot run: it has persistent only"
    with pytest.raises(RuntimeError, match=message):
        sequence("lstm", *inputs, sizes, False, "cpu", algorithm, True)
    y, _, _, gates, cells = sequence("lstm", *inputs, sizes, False, "cpu", "persistent", True)
    assert torch.equal(y, sequence("lstm", *inputs, sizes, False, "cpu", "auto", True)[0])
    with pytest.raises(RuntimeError, match=message):
        sequence_backward(
            "lstm", *gradients, *inputs, y, gates, cells, sizes, False, "cpu", algorithm, [True] * 7 + [False]
        )  # fmt: skip


@pytest.mark.parametrize("name", ["avx_2", "AVX2", "avx2 "])
def test_unknown_instruction_set_raises(name):
    call = (
        "import torch, fusedrnn; from fusedrnn.ops import sequence; z = torch.zeros\n"
        "inputs = (z(1, 1, 1), z(1, 1), z(1, 1), z(4, 1), z(4, 1), None, None, None)\n"
        "def use(): sequence('lstm', *inputs, None, None, False, 'cpu', 'auto', False, False)\n"
        "for call in (use, use, fusedrnn._build.build_info):\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    env = {**os.environ, "FUSEDRNN_CPU_CAPABILITY": name}
    ran = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    built = ", ".join(_build.build_info()["cpu_capabilities_built"])
    message = f"FUSEDRNN_CPU_CAPABILITY must be one of {built}, got '{name}'"
    assert ran.stdout.splitlines().count(message) == 3, ran.stdout


OUT_OF_MEMORY = """
import resource, sys, torch
from fusedrnn.ops import sequence, sequence_backward

torch.set_num_threads(1)
H = 2048
# More steps than a kernel takes without repacking the weights.
x, h, w_ih, w_hh = torch.ones(65, 1, 1), torch.ones(1, H), torch.ones(4 * H, 1), torch.ones(4 * H, H)
inputs = (x, h, h, w_ih, w_hh, None, None, None)
forward = lambda: sequence("lstm", *inputs, None, None, False, "cpu", "auto", True, True)
y, _, _, gates, cells = forward()
needs = [False, True] + [False] * 6
backward = lambda: sequence_backward(
    "lstm", y, h, h, None, *inputs, None, None, False, y, gates, cells, "cpu", "auto", needs)[1]
dh0 = backward()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
# A repacked weight of 64 MiB does not fit.
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), before[1]))
messages = []
for call in (forward, backward):
    try:
        call()
    except RuntimeError as error:
        messages.append(str(error))
resource.setrlimit(resource.RLIMIT_AS, before)
assert torch.equal(forward()[0], y) and torch.equal(backward(), dh0)
print(*messages)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space and reads /proc/self/statm")
def test_out_of_memory_raises():
    ran = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("fusedrnn: can't allocate 67108864 bytes of memory") == 2, ran.stdout


FORKED = """
import os, signal, sys, torch, fusedrnn
if sys.argv[1:]:
    torch.set_num_threads(2)
dtypes = (torch.float32, torch.float64, torch.bfloat16)
layers = [fusedrnn.LSTM(256, 256, dtype=dtype) for dtype in dtypes]
given = {dtype: torch.ones(20, 64, 256, dtype=dtype) for dtype in dtypes}  # large operations of torch hang as well
def run(layer):
    x = given[layer.weight_ih_l0.dtype]
    y = layer(x)[0]
    with torch.no_grad():
        layer(x)
    return y.detach(), *torch.autograd.grad(y, list(layer.parameters()), x)
for layer in layers:  # the threads are there
    run(layer)
child = os.fork()
if not child:
    signal.alarm(100)
    for layer in layers:
        for t in run(layer):
            assert t.flatten()[:100].abs().max() > 0
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert status == 0, status
for layer in layers:
    run(layer)
"""


@pytest.mark.parametrize("arguments", [[], ["2"]], ids=["", "set_num_threads"])
def test_a_forked_process_does_not_hang(arguments):
    """As torch.mm does, which waits for threads that the fork left behind."""
    subprocess.run([sys.executable, "-c", FORKED, *arguments], check=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    call = "import fusedrnn; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}
    assert len(runtimes) == 1, runtimes
