# ruff: noqa: E501  (PTX and CUDA in strings)
"""ptxsim: whole programs, CUDA sources with their host code, through the stand-in for libcudart."""

import ctypes

import numpy as np
import ptxsim
import pytest
from ptxsim import build
from ptxsim.testing import aligned

needs_nvcc = pytest.mark.skipif(
    build.cuda_home() is None, reason="no nvcc: CUDA sources and their host code are not simulated"
)

PROGRAM = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>

namespace cg = cooperative_groups;

__constant__ float scale;
__device__ int calls;

__global__ void scaled(const float* x, float* y, int n) {
  extern __shared__ float row[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = row[threadIdx.x] * scale;
  if (i == 0) calls++;
}

// Every block needs what the others wrote a step ago.
__global__ void rotate(float* x, int n, int steps) {
  cg::grid_group grid = cg::this_grid();
  int i = grid.thread_rank();
  for (int t = 0; t < steps; t++) {
    float v = x[(t & 1) * n + (i + 1) % n] + 1;
    x[((t + 1) & 1) * n + i] = v;
    grid.sync();
  }
}

// The mailbox: a word is its own flag, no barrier.
__device__ uint4 load(const uint4* p) {
  uint64_t a, b;
  asm volatile("{ .reg .b128 r; ld.relaxed.gpu.global.b128 r, [%2]; mov.b128 {%0, %1}, r; }" : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return make_uint4(a, a >> 32, b, b >> 32);
}
__device__ void store(uint4* p, uint4 v) {
  uint64_t a = v.x | (uint64_t)v.y << 32, b = v.z | (uint64_t)v.w << 32;
  asm volatile("{ .reg .b128 r; mov.b128 r, {%1, %2}; st.relaxed.gpu.global.b128 [%0], r; }" ::"l"(p), "l"(a), "l"(b) : "memory");
}
template <bool kWeak>
__global__ void mailbox(uint4* y, int steps) {
  int blocks = gridDim.x, b = blockIdx.x;
  for (int t = 0; t < steps; t++) {
    uint4 v = make_uint4(b, b, b, b);
    if (t) {
      const uint4* from = y + (t - 1) * blocks + (b + 1) % blocks;
      do {
        v = load(from);
      } while (v.x == 0xffffffffu || v.z == 0xffffffffu);
      if (kWeak) v = *from;
      v = make_uint4(v.x + 1, v.y + 1, v.z + 1, v.w + 1);
    }
    store(y + t * blocks + b, v);
  }
}

extern "C" {
int run_scaled(const float* x, float* y, int n, float factor, int threads, int shared) {
  if (int e = cudaMemcpyToSymbol(scale, &factor, sizeof factor)) return e;
  scaled<<<(n + threads - 1) / threads, threads, shared>>>(x, y, n);
  return cudaGetLastError();
}
int count() {
  int n = -1;
  cudaMemcpyFromSymbol(&n, calls, sizeof n);
  return n;
}
int allow(int bytes) { return cudaFuncSetAttribute(scaled, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); }
int run_rotate(float* x, int n, int steps, int blocks) {
  void* arguments[] = {&x, &n, &steps};
  cudaLaunchCooperativeKernel((const void*)rotate, dim3(blocks), dim3(n / blocks), arguments, 0, nullptr);
  return cudaGetLastError();
}
int run_mailbox(uint4* y, int steps, int blocks, int weak) {
  cudaMemsetAsync(y, 0xff, sizeof(uint4) * steps * blocks, nullptr);
  void* arguments[] = {&y, &steps};
  auto kernel = weak ? mailbox<true> : mailbox<false>;
  cudaLaunchCooperativeKernel((const void*)kernel, dim3(blocks), dim3(1), arguments, 0, nullptr);
  return cudaGetLastError();
}
int attribute(int which) {
  int value = -1;
  cudaDeviceGetAttribute(&value, (cudaDeviceAttr)which, 0);
  return value;
}
int occupancy(int threads, int shared) {
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scaled, threads, shared);
  return blocks;
}
int registers() {
  cudaFuncAttributes a;
  cudaFuncGetAttributes(&a, (const void*)scaled);
  return a.numRegs;
}
int own_memory(int n) {
  float *x, *y;
  if (cudaMalloc(&x, 4 * n) || cudaMalloc(&y, 4 * n)) return 1;
  cudaMemset(x, 0, 4 * n);
  int e = run_scaled(x, y, n, 3, 64, 256);
  float last = -1;
  cudaMemcpy(&last, y + n - 1, 4, cudaMemcpyDeviceToHost);
  return e || last != 0 || cudaFree(x) || cudaFree(y) || cudaStreamSynchronize(nullptr);
}
const char* name(int e) { return cudaGetErrorName((cudaError_t)e); }
}
"""


def pointer(x):
    return ctypes.c_void_p(x.ctypes.data)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    source = tmp_path_factory.mktemp("program") / "program.cu"
    source.write_text(PROGRAM)
    library = ptxsim.Library(ptxsim.build_simulated_library([source]))
    library.dll.name.restype = ctypes.c_char_p
    return library


@needs_nvcc
def test_launch_with_constant_and_shared_memory(program):
    x, y = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    before = program.counters()
    with program.registered(x, y):
        assert program.dll.run_scaled(pointer(x), pointer(y), 1000, ctypes.c_float(2.5), 128, 512) == 0
    np.testing.assert_array_equal(y, x * np.float32(2.5))
    assert program.dll.count() == 1
    assert program.counters()["launches"] - before["launches"] == 1
    assert program.counters_of(x)["ld_bytes"] == 4000
    assert program.dll.own_memory(500) == 0


@needs_nvcc
def test_memory_that_is_not_registered_is_out_of_bounds(program):
    x, y = np.arange(1000, dtype=np.float32), np.zeros(999, np.float32)
    with program.registered(x, y):
        error = program.dll.run_scaled(pointer(x), pointer(y), 1000, ctypes.c_float(2.5), 128, 512)
    assert program.dll.name(error) == b"cudaErrorLaunchFailure"
    assert "outside every allocation" in program.error()
    with program.registered(x):
        assert program.dll.run_scaled(pointer(x), pointer(y), 10, ctypes.c_float(2.5), 128, 512) != 0


@needs_nvcc
def test_dynamic_shared_memory_must_be_asked_for(program):
    x = np.zeros(8, np.float32)
    with program.registered(x):
        run = lambda shared: program.dll.run_scaled(pointer(x), pointer(x), 8, ctypes.c_float(1), 32, shared)
        assert run(48 << 10) == 0
        assert program.dll.name(run((48 << 10) + 4)) == b"cudaErrorInvalidValue"
        assert program.dll.allow(100 << 10) == 0
        assert run(100 << 10) == 0
        with ptxsim.options(chip="rtx4090"):
            assert program.dll.allow(100 << 10) != 0
            assert program.dll.name(run(100 << 10)) == b"cudaErrorLaunchOutOfResources"


@needs_nvcc
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cooperative_grid_barrier(program, seed):
    n, steps, blocks = 512, 5, 16
    x, want = np.zeros(2 * n, np.float32), np.arange(n, dtype=np.float32)
    x[:n] = want
    before = program.counters()
    with program.registered(x), ptxsim.options(seed=seed):
        assert program.dll.run_rotate(pointer(x), n, steps, blocks) == 0, program.error()
    for _ in range(steps):
        want = np.roll(want, -1) + 1
    np.testing.assert_array_equal(x[n:], want)
    arrived = program.counters()["grid_arrive"] - before["grid_arrive"]
    assert arrived == blocks * steps


@needs_nvcc
def test_cooperative_grid_too_large(program):
    x = np.zeros(2 * 4096 * 32, np.float32)
    with program.registered(x), ptxsim.options(chip="a10"):
        error = program.dll.run_rotate(pointer(x), 2048 * 32, 1, 2048)
    assert program.dll.name(error) == b"cudaErrorCooperativeLaunchTooLarge"
    assert "a10 holds 1152 at a time (16 on each of 72 SMs)" in program.error()


@needs_nvcc
@pytest.mark.parametrize("torn", [False, True])
def test_mailbox_of_16_bytes(program, torn):
    steps, blocks = 6, 16
    y = aligned(np.zeros((steps, blocks, 4), np.uint32))
    for seed in range(4):
        with program.registered(y), ptxsim.options(seed=seed, torn=torn):
            assert program.dll.run_mailbox(pointer(y), steps, blocks, 0) == 0, program.error()
        want = (np.arange(blocks) + np.arange(steps)[:, None]) % blocks + np.arange(steps)[:, None]
        np.testing.assert_array_equal(y, np.broadcast_to(want[..., None], y.shape))


@needs_nvcc
def test_mailbox_with_a_weak_load_is_a_race(program):
    y = aligned(np.zeros((6, 16, 4), np.uint32))
    with program.registered(y), ptxsim.options(seed=1):
        assert program.dll.run_mailbox(pointer(y), 6, 16, 1) != 0
    assert "RACE between blocks" in program.error()


@needs_nvcc
def test_the_device_is_the_chip(program):
    for chip, sms, capability in (("a100", 108, (8, 0)), ("h100-sxm", 132, (9, 0)), ("l4", 58, (8, 9))):
        with ptxsim.options(chip=chip):
            assert program.dll.attribute(16) == sms
            assert (program.dll.attribute(75), program.dll.attribute(76)) == capability
    assert 0 < program.dll.registers() < 64
    with ptxsim.options(chip="a100"):
        assert program.dll.occupancy(1024, 0) == 2
        assert program.dll.occupancy(32, 40 << 10) == 4


@needs_nvcc
def test_registers_come_from_ptxas():
    source = 'extern "C" __global__ void k(float* x) {\n  x[threadIdx.x] *= 2;\n}\n'
    ptx = ptxsim.compile_ptx(source)
    assert 0 < build.registers_of(ptx, 80)["k"] < 32
    x = np.ones(32, np.float32)
    ptxsim.Module(ptx).launch("k", (1,), (32,), [x], cooperative=True)
    assert (x == 2).all()


WMMA = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;
template <class T, class L, class A, int K>
__device__ void multiply(const A* a, const A* b, float* c, int n) {
  wmma::fragment<wmma::matrix_a, 16, 16, K, T, L> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, K, T, wmma::row_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, K, float> fc;
  wmma::load_matrix_sync(fc, c, n, wmma::mem_row_major);
  for (int k = 0; k < n; k += K) {
    wmma::load_matrix_sync(fa, a + (std::is_same<L, wmma::row_major>::value ? k : k * n), n);
    wmma::load_matrix_sync(fb, b + k * n, n);
    wmma::mma_sync(fc, fa, fb, fc);
  }
  wmma::store_matrix_sync(c, fc, n, wmma::mem_row_major);
}
extern "C" __global__ void f16_row(const half* a, const half* b, float* c, int n) { multiply<half, wmma::row_major, half, 16>(a, b, c, n); }
extern "C" __global__ void f16_col(const half* a, const half* b, float* c, int n) { multiply<half, wmma::col_major, half, 16>(a, b, c, n); }
extern "C" __global__ void tf32_row(const float* a, const float* b, float* c, int n) {
  multiply<wmma::precision::tf32, wmma::row_major, float, 8>(a, b, c, n);
}
"""


@needs_nvcc
@pytest.mark.parametrize("name, dtype", [("f16_row", np.float16), ("f16_col", np.float16), ("tf32_row", np.float32)])
def test_wmma(name, dtype):
    rng, n = np.random.default_rng(4), 32
    a, b = (aligned(rng.integers(-8, 8, (n, n)).astype(dtype)) for _ in "ab")
    c = aligned(rng.integers(-8, 8, (16, n)).astype(np.float32))
    want = c[:, :16] + (a.T if name == "f16_col" else a)[:16].astype(float) @ b[:, :16]
    counts = ptxsim.Module(ptxsim.compile_ptx(WMMA)).launch(name, (1,), (32,), [a, b, c, n])
    np.testing.assert_array_equal(c[:, :16], want)
    k = 8 if dtype is np.float32 else 16
    assert counts["mma_flops"] == 2 * 16 * 16 * n
    assert counts["by_arg"][0]["ld_bytes"] == 16 * n * a.itemsize
    assert counts["by_arg"][0]["ld_sectors"] == 16 * n * a.itemsize // 32
    assert counts["mma"] == n // k
