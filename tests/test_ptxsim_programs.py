# ruff: noqa: E501  (PTX and CUDA in strings)
"""ptxsim: whole programs, compiled from CUDA, through the stand-in for the driver."""

import ctypes

import numpy as np
import ptxsim
import pytest
from ptxsim import build
from ptxsim.testing import aligned

needs_nvcc = pytest.mark.skipif(build.cuda_home() is None, reason="no nvcc: CUDA sources are not simulated")

PROGRAM = r"""
#include <cooperative_groups.h>
#include <cstdint>

namespace cg = cooperative_groups;

__constant__ float scale;
__device__ int calls;

extern "C" __global__ void scaled(const float* x, float* y, int n) {
  extern __shared__ float row[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = row[threadIdx.x] * scale;
  if (i == 0) calls++;
}

// Every block needs what the others wrote a step ago.
extern "C" __global__ void rotate(float* x, int n, int steps) {
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
__device__ void exchange(uint4* y, int steps) {
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

extern "C" __global__ void mailbox(uint4* y, int steps) { exchange<false>(y, steps); }
extern "C" __global__ void weak_mailbox(uint4* y, int steps) { exchange<true>(y, steps); }
"""


class Program:
    """PTX text behind the driver's functions; statuses by name."""

    def __init__(self, ptx):
        self.library = ptxsim.default_library()
        self.dll, self.module, self.functions = self.library.dll, ctypes.c_void_p(), {}
        self.library.set_registers(build.registers_of(ptx, 90))
        assert self.dll.cuInit(0) == 0
        assert self.dll.cuModuleLoadData(ctypes.byref(self.module), ptx.encode()) == 0

    def name(self, status):
        text = ctypes.c_char_p()
        assert self.dll.cuGetErrorName(status, ctypes.byref(text)) == 0
        return text.value.decode()

    def function(self, name):
        found = ctypes.c_void_p()
        status = self.dll.cuModuleGetFunction(ctypes.byref(found), self.module, name.encode())
        assert status == 0, self.name(status)
        return found

    def launch(self, name, grid, block, *arguments, shared=0, cooperative=False):
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = [ctypes.c_uint(n) for n in (grid, 1, 1, block, 1, 1, shared)]
        if cooperative:
            status = self.dll.cuLaunchCooperativeKernel(self.function(name), *sizes, None, values)
        else:
            status = self.dll.cuLaunchKernel(self.function(name), *sizes, None, values, None)
        return self.name(status)

    def scaled(self, x, y, n, factor, threads, shared):
        address, size = self.symbol("scale")
        assert size == 4
        assert self.dll.cuMemcpyHtoD_v2(address, ctypes.byref(ctypes.c_float(factor)), ctypes.c_size_t(4)) == 0
        return self.launch("scaled", -(-n // threads), threads, x, y, ctypes.c_int(n), shared=shared)

    def symbol(self, name):
        address, size = ctypes.c_uint64(), ctypes.c_size_t()
        assert self.dll.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), self.module, name.encode()) == 0
        return address, size.value

    def rotate(self, x, n, steps, blocks):
        return self.launch("rotate", blocks, n // blocks, x, ctypes.c_int(n), ctypes.c_int(steps), cooperative=True)

    def mailbox(self, y, steps, name="mailbox"):
        blocks = y.shape[1]
        assert self.dll.cuMemsetD8Async(pointer(y), ctypes.c_ubyte(255), ctypes.c_size_t(y.nbytes), None) == 0
        return self.launch(name, blocks, 1, pointer(y), ctypes.c_int(steps), cooperative=True)

    def attribute(self, which):
        value = ctypes.c_int(-1)
        assert self.dll.cuDeviceGetAttribute(ctypes.byref(value), which, 0) == 0
        return value.value

    def occupancy(self, threads, shared):
        blocks = ctypes.c_int(-1)
        of = self.function("scaled"), threads, ctypes.c_size_t(shared)
        assert self.dll.cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(blocks), *of) == 0
        return blocks.value


def pointer(x):
    return ctypes.c_void_p(x.ctypes.data)


@pytest.fixture(scope="module")
def program():
    return Program(ptxsim.compile_ptx(PROGRAM))


@needs_nvcc
def test_launch_with_constant_and_shared_memory(program):
    x, y = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    before = program.library.counters()
    with program.library.registered(x, y):
        program.library.reset_counters()
        assert program.scaled(pointer(x), pointer(y), 1000, 2.5, 128, 512) == "CUDA_SUCCESS"
        assert program.library.counters_of(x)["ld_bytes"] == 4000
    np.testing.assert_array_equal(y, x * np.float32(2.5))
    calls, (address, size) = ctypes.c_int(-1), program.symbol("calls")
    assert program.dll.cuMemcpyDtoH_v2(ctypes.byref(calls), address, ctypes.c_size_t(size)) == 0
    assert calls.value == 1
    assert program.library.counters()["launches"] == 1
    assert set(before) == set(program.library.counters())


@needs_nvcc
def test_memory_of_the_driver(program):
    x, y, last = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_float(-1)
    for p in (x, y):
        assert program.dll.cuMemAlloc_v2(ctypes.byref(p), ctypes.c_size_t(2000)) == 0
    assert program.dll.cuMemsetD8_v2(x, ctypes.c_ubyte(0), ctypes.c_size_t(2000)) == 0
    assert program.scaled(x, y, 500, 3, 64, 256) == "CUDA_SUCCESS"
    end = ctypes.c_uint64(y.value + 1996)
    assert program.dll.cuMemcpyDtoH_v2(ctypes.byref(last), end, ctypes.c_size_t(4)) == 0
    assert last.value == 0
    for p in (x, y):
        assert program.dll.cuMemFree_v2(p) == 0
        assert program.name(program.dll.cuMemFree_v2(p)) == "CUDA_ERROR_INVALID_VALUE"
    assert program.scaled(x, y, 500, 3, 64, 256) == "CUDA_ERROR_LAUNCH_FAILED"


@needs_nvcc
def test_memory_that_is_not_registered_is_out_of_bounds(program):
    x, y = np.arange(1000, dtype=np.float32), np.zeros(999, np.float32)
    with program.library.registered(x, y):
        assert program.scaled(pointer(x), pointer(y), 1000, 2.5, 128, 512) == "CUDA_ERROR_LAUNCH_FAILED"
    assert "outside every allocation" in program.library.error()
    with program.library.registered(x):
        assert program.scaled(pointer(x), pointer(y), 10, 2.5, 128, 512) != "CUDA_SUCCESS"


@needs_nvcc
def test_dynamic_shared_memory_must_be_asked_for(program):
    x = np.zeros(8, np.float32)
    allow = lambda bytes: program.name(program.dll.cuFuncSetAttribute(program.function("scaled"), 8, bytes))
    with program.library.registered(x):
        run = lambda shared: program.scaled(pointer(x), pointer(x), 8, 1, 32, shared)
        assert run(48 << 10) == "CUDA_SUCCESS"
        assert run((48 << 10) + 4) == "CUDA_ERROR_INVALID_VALUE"
        assert allow(100 << 10) == "CUDA_SUCCESS"
        assert run(100 << 10) == "CUDA_SUCCESS"
        with ptxsim.options(chip="rtx4090"):
            assert allow(100 << 10) == "CUDA_ERROR_INVALID_VALUE"
            assert run(100 << 10) == "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"


@needs_nvcc
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cooperative_grid_barrier(program, seed):
    n, steps, blocks = 512, 5, 16
    x, want = np.zeros(2 * n, np.float32), np.arange(n, dtype=np.float32)
    x[:n] = want
    before = program.library.counters()
    with program.library.registered(x), ptxsim.options(seed=seed):
        assert program.rotate(pointer(x), n, steps, blocks) == "CUDA_SUCCESS", program.library.error()
    for _ in range(steps):
        want = np.roll(want, -1) + 1
    np.testing.assert_array_equal(x[n:], want)
    assert program.library.counters()["grid_arrive"] - before["grid_arrive"] == blocks * steps


@needs_nvcc
def test_cooperative_grid_too_large(program):
    x = np.zeros(2 * 4096 * 32, np.float32)
    with program.library.registered(x), ptxsim.options(chip="a10"):
        assert program.rotate(pointer(x), 2048 * 32, 1, 2048) == "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    assert "a10 holds 1152 at a time (16 on each of 72 SMs)" in program.library.error()


@needs_nvcc
@pytest.mark.parametrize("torn", [False, True])
def test_mailbox_of_16_bytes(program, torn):
    steps, blocks = 6, 16
    y = aligned(np.zeros((steps, blocks, 4), np.uint32))
    for seed in range(4):
        with program.library.registered(y), ptxsim.options(seed=seed, torn=torn):
            assert program.mailbox(y, steps) == "CUDA_SUCCESS", program.library.error()
        want = (np.arange(blocks) + np.arange(steps)[:, None]) % blocks + np.arange(steps)[:, None]
        np.testing.assert_array_equal(y, np.broadcast_to(want[..., None], y.shape))


@needs_nvcc
def test_mailbox_with_a_weak_load_is_a_race(program):
    y = aligned(np.zeros((6, 16, 4), np.uint32))
    with program.library.registered(y), ptxsim.options(seed=1):
        assert program.mailbox(y, 6, "weak_mailbox") != "CUDA_SUCCESS"
    assert "RACE between blocks" in program.library.error()


@needs_nvcc
def test_the_device_is_the_chip(program):
    for chip, sms, capability in (("a100", 108, (8, 0)), ("h100-sxm", 132, (9, 0)), ("l4", 58, (8, 9))):
        with ptxsim.options(chip=chip):
            assert program.attribute(16) == sms
            assert (program.attribute(75), program.attribute(76)) == capability
    registers = ctypes.c_int()
    assert program.dll.cuFuncGetAttribute(ctypes.byref(registers), 4, program.function("scaled")) == 0
    assert 0 < registers.value < 64
    with ptxsim.options(chip="a100"):
        assert program.occupancy(1024, 0) == 2
        assert program.occupancy(32, 40 << 10) == 4


def test_modules_that_cannot_be_loaded():
    dll, module = ptxsim.default_library().dll, ctypes.c_void_p()
    log = ctypes.create_string_buffer(200)
    options, values = (ctypes.c_int * 2)(5, 6), (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
    load = lambda code: dll.cuModuleLoadDataEx(ctypes.byref(module), code, 2, options, values)
    assert load(b"\x7fELF machine code") == 209  # CUDA_ERROR_NO_BINARY_FOR_GPU
    assert load(b"nonsense") == 218
    assert b"nonsense" in log.value


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
