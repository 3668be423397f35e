// Stand-in for libcudart: what nvcc's host code and a launcher call, over the simulator. Linked statically
// into a simulated library (build.py), so it serves that library alone. Everything is synchronous; there is
// one device.

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace {

enum Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidSymbol = 13,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kInvalidPtx = 218,
  kLaunchOutOfResources = 701,
  kLaunchFailure = 719,
  kCooperativeLaunchTooLarge = 720
};

struct Dim3 {
  unsigned x, y, z;
};

struct ModuleRecord {
  std::string ptx;
  void* handle = nullptr;
};
struct KernelRecord {
  ModuleRecord* module;
  std::string name;
  int index = -1;
  int dynamic_shared_limit = 48 << 10;  // until cudaFuncSetAttribute raises it
};
struct VariableRecord {
  ModuleRecord* module;
  std::string name;
};
struct LaunchConfiguration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

// Made at first use: kernels register themselves before other statics of this library may exist.
struct State {
  std::map<const void*, KernelRecord> kernels;
  std::map<const void*, VariableRecord> variables;
  std::map<void*, size_t> allocations;
  std::vector<LaunchConfiguration> configurations;
  int error = kSuccess;
};
State& state() {
  static State* s = new State;
  return *s;
}

int failed(int status) {
  if (status) state().error = status;
  return status;
}

void* load(ModuleRecord* m) {
  if (!m->handle) {
    m->handle = ps_load(m->ptx.c_str());
    if (!m->handle) state().error = kInvalidPtx;
  }
  return m->handle;
}

KernelRecord* kernel(const void* function) {
  auto it = state().kernels.find(function);
  if (it == state().kernels.end() || !load(it->second.module)) return nullptr;
  KernelRecord& k = it->second;
  if (k.index < 0) k.index = ps_kernel(k.module->handle, k.name.c_str());
  return k.index < 0 ? nullptr : &k;
}

int launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, bool cooperative) {
  KernelRecord* k = kernel(function);
  if (!k) return failed(state().error ? state().error : kInvalidDeviceFunction);
  if (shared > size_t(k->dynamic_shared_limit)) return failed(kInvalidValue);
  const long long threads = 1ll * block.x * block.y * block.z;
  const int resident = threads > 0 && threads <= 1024
                           ? ps_occupancy(threads, ps_registers_of(k->name.c_str()),
                                          shared + ps_static_shared(k->module->handle, k->index))
                           : 0;
  int status = kLaunchFailure;
  if (!resident)
    status = kLaunchOutOfResources;
  else if (cooperative && 1ull * grid.x * grid.y * grid.z > 1ull * resident * ps_chip_value("sms"))
    status = kCooperativeLaunchTooLarge;
  if (ps_launch(k->module->handle, k->index, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, arguments,
                cooperative))
    return failed(status);
  return kSuccess;
}

void* symbol(const void* s, size_t* bytes = nullptr) {
  auto it = state().variables.find(s);
  if (it == state().variables.end() || !load(it->second.module)) return nullptr;
  uint64_t n = 0;
  void* address = reinterpret_cast<void*>(ps_symbol(it->second.module->handle, it->second.name.c_str(), &n));
  if (bytes) *bytes = n;
  return address;
}

template <class T>
T field(const uint8_t* p, size_t offset) {
  T x;
  memcpy(&x, p + offset, sizeof x);
  return x;
}

// PTX of the highest architecture in a fat binary: a header, then entries of kind 1 (PTX) and 2 (machine
// code).
std::string ptx_of(const uint8_t* p) {
  std::string best;
  unsigned best_arch = 0;
  if (field<uint32_t>(p, 0) != 0xBA55ED50) return best;
  const uint8_t* entry = p + field<uint16_t>(p, 6);
  const uint8_t* end = entry + field<uint64_t>(p, 8);
  while (entry < end) {
    const uint32_t header = field<uint32_t>(entry, 4), arch = field<uint32_t>(entry, 28);
    const uint64_t size = field<uint64_t>(entry, 8), flags = field<uint64_t>(entry, 40);
    if (field<uint16_t>(entry, 0) == 1 && arch >= best_arch) {
      if (flags & 0xa000) {
        fprintf(stderr, "[ptxsim] compressed PTX: build with --no-compress\n");
      } else {
        best.assign(reinterpret_cast<const char*>(entry + header),
                    strnlen(reinterpret_cast<const char*>(entry + header), size));
        best_arch = arch;
      }
    }
    entry += header + size;
  }
  return best;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- what nvcc's generated code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  auto* m = new ModuleRecord;
  m->ptx = ptx_of(field<const uint8_t*>(static_cast<const uint8_t*>(wrapper), 8));
  return reinterpret_cast<void**>(m);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** m, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  state().kernels[host] = {reinterpret_cast<ModuleRecord*>(m), name};
}
void __cudaRegisterVar(void** m, char* host, char*, const char* name, int, size_t, int, int) {
  state().variables[host] = {reinterpret_cast<ModuleRecord*>(m), name};
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  state().configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  const LaunchConfiguration c = state().configurations.back();
  state().configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<void**>(stream) = c.stream;
  return 0;
}
int __cudaGetKernel(void** k, const void* function) {
  *k = const_cast<void*>(function);
  return 0;
}
int cudaGetKernel(void** k, const void* function) { return __cudaGetKernel(k, function); }
int __cudaLaunchKernel(void* k, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(k, grid, block, arguments, shared, false);
}
int __cudaLaunchKernel_ptsz(void* k, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(k, grid, block, arguments, shared, false);
}

// ---- launches

int cudaLaunchKernel(const void* f, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(f, grid, block, arguments, shared, false);
}
int cudaLaunchCooperativeKernel(const void* f, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(f, grid, block, arguments, shared, true);
}

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int cooperative;
  } value;
};
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
int cudaLaunchKernelExC(const LaunchConfig* c, const void* f, void** arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < c->count; i++) {
    if (c->attributes[i].id == 2) cooperative = c->attributes[i].value.cooperative;
    if (c->attributes[i].id == 4) return failed(kInvalidValue);  // clusters
  }
  return launch(f, c->grid, c->block, arguments, c->shared, cooperative);
}

int cudaFuncSetAttribute(const void* f, int attribute, int value) {
  KernelRecord* k = kernel(f);
  if (!k) return failed(kInvalidDeviceFunction);
  if (attribute != 8) return kSuccess;  // cudaFuncAttributeMaxDynamicSharedMemorySize
  if (value < 0 || value + ps_static_shared(k->module->handle, k->index) > ps_chip_value("shared_per_block"))
    return failed(kInvalidValue);
  k->dynamic_shared_limit = value;
  return kSuccess;
}
int cudaFuncSetCacheConfig(const void*, int) { return kSuccess; }

struct FunctionAttributes {
  size_t shared, constant, local;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared, carveout, rest[16];
};
int cudaFuncGetAttributes(FunctionAttributes* a, const void* f) {
  KernelRecord* k = kernel(f);
  if (!k) return failed(kInvalidDeviceFunction);
  memset(a, 0, offsetof(FunctionAttributes, rest));
  a->shared = ps_static_shared(k->module->handle, k->index);
  a->max_threads = ps_max_threads(k->module->handle, k->index);
  a->registers = ps_registers_of(k->name.c_str());
  a->ptx_version = 80;
  a->binary_version = ps_chip_value("sm");
  a->max_dynamic_shared = k->dynamic_shared_limit;
  return kSuccess;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* f, int threads, size_t shared,
                                                           unsigned) {
  KernelRecord* k = kernel(f);
  if (!k) return failed(kInvalidDeviceFunction);
  *blocks =
      ps_occupancy(threads, ps_registers_of(k->name.c_str()), shared + ps_static_shared(k->module->handle, k->index));
  if (shared > size_t(k->dynamic_shared_limit)) *blocks = 0;
  return kSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}

// ---- memory. Fresh memory holds 0xB7: neither zero nor a NaN, so that nothing unwritten passes for a value
// or a sentinel.

int cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  if (posix_memalign(p, 512, bytes ? bytes : 1)) return failed(kMemoryAllocation);
  memset(*p, 0xB7, bytes);
  state().allocations[*p] = bytes;
  ps_register(reinterpret_cast<uint64_t>(*p), bytes);
  return kSuccess;
}
int cudaMallocAsync(void** p, size_t bytes, void*) { return cudaMalloc(p, bytes); }
int cudaMallocManaged(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
int cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
int cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
int cudaFree(void* p) {
  if (!p) return kSuccess;
  if (!state().allocations.erase(p)) return failed(kInvalidValue);
  ps_unregister(reinterpret_cast<uint64_t>(p));
  free(p);
  return kSuccess;
}
int cudaFreeAsync(void* p, void*) { return cudaFree(p); }
int cudaFreeHost(void* p) { return cudaFree(p); }
int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  memmove(to, from, bytes);
  return kSuccess;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void*) {
  return cudaMemcpy(to, from, bytes, kind);
}
int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, int,
                      void*) {
  for (size_t i = 0; i < height; i++)
    memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  return kSuccess;
}
int cudaMemset(void* p, int value, size_t bytes) {
  memset(p, value, bytes);
  return kSuccess;
}
int cudaMemsetAsync(void* p, int value, size_t bytes, void*) { return cudaMemset(p, value, bytes); }
int cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height, void*) {
  for (size_t i = 0; i < height; i++) memset(static_cast<char*>(p) + i * pitch, value, width);
  return kSuccess;
}
int cudaGetSymbolAddress(void** p, const void* s) {
  *p = symbol(s);
  return *p ? kSuccess : failed(kInvalidSymbol);
}
int cudaMemcpyToSymbol(const void* s, const void* from, size_t bytes, size_t offset, int) {
  size_t size = 0;
  char* p = static_cast<char*>(symbol(s, &size));
  if (!p || offset + bytes > size) return failed(kInvalidSymbol);
  memcpy(p + offset, from, bytes);
  return kSuccess;
}
int cudaMemcpyFromSymbol(void* to, const void* s, size_t bytes, size_t offset, int) {
  size_t size = 0;
  char* p = static_cast<char*>(symbol(s, &size));
  if (!p || offset + bytes > size) return failed(kInvalidSymbol);
  memcpy(to, p + offset, bytes);
  return kSuccess;
}

// ---- device, streams, events, errors

int cudaGetDevice(int* d) {
  *d = 0;
  return kSuccess;
}
int cudaSetDevice(int d) { return d ? failed(kInvalidDevice) : kSuccess; }
int cudaGetDeviceCount(int* n) {
  *n = 1;
  return kSuccess;
}
int cudaDeviceReset() { return kSuccess; }
int cudaDriverGetVersion(int* v) {
  *v = 13000;
  return kSuccess;
}
int cudaRuntimeGetVersion(int* v) { return cudaDriverGetVersion(v); }
int cudaDeviceGetAttribute(int* v, int attribute, int) {
  switch (attribute) {  // enum cudaDeviceAttr
    case 1:
      *v = 1024;
      break;  // threads per block
    case 8:
      *v = 48 << 10;
      break;  // shared memory per block
    case 10:
      *v = 32;
      break;  // warp size
    case 12:
      *v = ps_chip_value("registers_per_sm");
      break;  // registers per block
    case 13:
      *v = 1500000;
      break;  // clock, kHz
    case 16:
      *v = ps_chip_value("sms");
      break;
    case 39:
      *v = ps_chip_value("threads_per_sm");
      break;
    case 75:
      *v = ps_chip_value("sm") / 10;
      break;
    case 76:
      *v = ps_chip_value("sm") % 10;
      break;
    case 81:
      *v = ps_chip_value("shared_per_sm");
      break;
    case 82:
      *v = ps_chip_value("registers_per_sm");
      break;
    case 95:
      *v = 1;
      break;  // cooperative launch
    case 97:
      *v = ps_chip_value("shared_per_block");
      break;  // opt-in
    case 106:
      *v = ps_chip_value("blocks_per_sm");
      break;
    case 111:
      *v = ps_chip_value("reserved_shared_per_block");
      break;
    default:
      *v = 0;
  }
  return kSuccess;
}
int cudaDeviceSynchronize() { return state().error; }
int cudaStreamSynchronize(void*) { return state().error; }
int cudaStreamCreate(void** s) {
  *s = reinterpret_cast<void*>(1);
  return kSuccess;
}
int cudaStreamCreateWithFlags(void** s, unsigned) { return cudaStreamCreate(s); }
int cudaStreamDestroy(void*) { return kSuccess; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cudaStreamIsCapturing(void*, int* status) {
  *status = 0;
  return kSuccess;
}
using Time = std::chrono::steady_clock::time_point;
int cudaEventCreate(void** e) {
  *e = new Time;
  return kSuccess;
}
int cudaEventCreateWithFlags(void** e, unsigned) { return cudaEventCreate(e); }
int cudaEventDestroy(void* e) {
  delete static_cast<Time*>(e);
  return kSuccess;
}
int cudaEventRecord(void* e, void*) {
  *static_cast<Time*>(e) = std::chrono::steady_clock::now();
  return kSuccess;
}
int cudaEventSynchronize(void*) { return kSuccess; }
int cudaEventElapsedTime(float* ms, void* a, void* b) {
  *ms = std::chrono::duration<float, std::milli>(*static_cast<Time*>(b) - *static_cast<Time*>(a)).count();
  return kSuccess;
}
int cudaPeekAtLastError() { return state().error; }
int cudaGetLastError() {
  const int e = state().error;
  state().error = kSuccess;
  return e;
}
const char* cudaGetErrorName(int e) {
  switch (e) {
    case kSuccess:
      return "cudaSuccess";
    case kInvalidValue:
      return "cudaErrorInvalidValue";
    case kMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case kInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case kInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case kInvalidDevice:
      return "cudaErrorInvalidDevice";
    case kInvalidPtx:
      return "cudaErrorInvalidPtx";
    case kLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case kLaunchFailure:
      return "cudaErrorLaunchFailure";
    case kCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    default:
      return "cudaErrorUnknown";
  }
}
// With the simulator's own words, where it has some.
const char* cudaGetErrorString(int e) {
  static std::string text;
  text = cudaGetErrorName(e);
  if (e >= kInvalidPtx && *ps_error()) text += std::string(": ") + ps_error();
  return text.c_str();
}
}
#pragma GCC visibility pop
