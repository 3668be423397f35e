"""ptxsim: Triton kernels through the bridge, compiled for sm_80 and sm_90."""

import ptxsim
import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton: the bridge from Triton kernels is not tested")
import ptxsim.triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + i[:, None] * K + k[None, :], mask=(i < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * N + j[None, :], mask=(k < K)[:, None] & (j < N)[None, :], other=0.0)
        total = tl.dot(x, y, total)
    total = tl.sigmoid(total)
    tl.store(c + i[:, None] * N + j[None, :], total.to(c.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])


def launch_product(dtype, M, N, K, **options):
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype) for shape in ((M, K), (K, N)))
    c = torch.full((M, N), float("nan"), dtype=dtype)
    blocks = {"BM": 16, "BN": 32, "BK": 32}
    grid = lambda meta: (-(-M // meta["BM"]), -(-N // meta["BN"]))
    arguments = {"a": a, "b": b, "c": c, "M": M, "N": N, "K": K}
    counts = ptxsim.triton.launch(
        product, grid, arguments, blocks, num_warps=4, num_stages=2, enable_fp_fusion=True, **options
    )
    return counts, c, torch.sigmoid(a.double() @ b.double())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4), (torch.float32, 6e-3)])
def test_triton_dot(dtype, tolerance, arch):
    for seed in (0, 1):
        counts, got, want = launch_product(dtype, 40, 70, 100, arch=arch, seed=seed)
        assert (got.double() - want).abs().max() < tolerance
    assert counts["blocks"] == 9
    assert counts["mma"] > 0
    assert counts["by_arg"]["c"]["st_bytes"] == 40 * 70 * dtype.itemsize
    assert counts["by_arg"]["a"]["ld_bytes"] == 3 * 40 * 100 * dtype.itemsize


@triton.jit
def reductions(x, y, n, ONE, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i * ONE, mask=i < n, other=-float("inf"))
    top = tl.max(v, 0)
    e = tl.exp(v - top)
    tl.store(y + i, e / tl.sum(e, 0), mask=i < n)
    if ONE == 1:
        tl.store(y + n, tl.sum(tl.cumsum(e, 0), 0))


def test_triton_reductions_and_specialisation():
    x, y = torch.randn(100), torch.zeros(101)
    ptxsim.triton.launch(reductions, (1,), {"x": x, "y": y, "n": 100, "ONE": 1}, {"BLOCK": 128}, num_warps=2)
    torch.testing.assert_close(y[:100], x.softmax(0))
    assert y[100] > 0


def test_triton_out_of_bounds():
    x, y = torch.randn(99), torch.zeros(101)
    with pytest.raises(ptxsim.SimulationError, match="outside every allocation"):
        ptxsim.triton.launch(reductions, (1,), {"x": x, "y": y, "n": 100, "ONE": 1}, {"BLOCK": 128}, num_warps=2)
