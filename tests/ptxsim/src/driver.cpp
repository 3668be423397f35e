// Stand-in for the CUDA driver, libcuda.so.1, over the simulator: what a launcher calls that opens its driver by name.
// Modules are PTX text. Everything is synchronous; there is one device, and its context is always current.

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

namespace {

enum Status {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kNoBinaryForGpu = 209,
  kInvalidPtx = 218,
  kNotFound = 500,
  kLaunchOutOfResources = 701,
  kLaunchFailed = 719,
  kCooperativeLaunchTooLarge = 720
};

struct Module;
struct Function {
  Module* module;
  std::string name;
  int index;
  int dynamic_shared_limit = 48 << 10;  // until cuFuncSetAttribute raises it

  int static_shared() const;
  int registers() const { return ps_registers_of(name.c_str()); }
};
struct Module {
  void* handle;
  std::map<std::string, std::unique_ptr<Function>> functions;
};
int Function::static_shared() const { return ps_static_shared(module->handle, index); }

struct State {
  std::mutex lock;
  std::map<uint64_t, size_t> allocations;
};
State& state() {
  static State* s = new State;
  return *s;
}

int launch(Function* f, const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
           bool cooperative) {
  if (shared > unsigned(f->dynamic_shared_limit)) return kInvalidValue;
  const uint64_t threads = 1ull * block[0] * block[1] * block[2], blocks = 1ull * grid[0] * grid[1] * grid[2];
  const int resident =
      threads > 0 && threads <= 1024 ? ps_occupancy(threads, f->registers(), shared + f->static_shared()) : 0;
  int status = kLaunchFailed;
  if (!resident)
    status = kLaunchOutOfResources;
  else if (cooperative && blocks > 1ull * resident * ps_chip_value("sms"))
    status = kCooperativeLaunchTooLarge;
  const int failed = ps_launch(f->module->handle, f->index, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                               shared, arguments, cooperative);
  return failed ? status : kSuccess;
}

const char* name_of(int status) {
  switch (status) {
    case kSuccess:
      return "CUDA_SUCCESS";
    case kInvalidValue:
      return "CUDA_ERROR_INVALID_VALUE";
    case kOutOfMemory:
      return "CUDA_ERROR_OUT_OF_MEMORY";
    case kInvalidDevice:
      return "CUDA_ERROR_INVALID_DEVICE";
    case kNoBinaryForGpu:
      return "CUDA_ERROR_NO_BINARY_FOR_GPU";
    case kInvalidPtx:
      return "CUDA_ERROR_INVALID_PTX";
    case kNotFound:
      return "CUDA_ERROR_NOT_FOUND";
    case kLaunchOutOfResources:
      return "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES";
    case kLaunchFailed:
      return "CUDA_ERROR_LAUNCH_FAILED";
    case kCooperativeLaunchTooLarge:
      return "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE";
    default:
      return nullptr;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- device and context

int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return ordinal ? kInvalidDevice : kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device) return kInvalidDevice;
  static const struct {
    int attribute;  // enum CUdevice_attribute
    const char* what;
  } of_chip[] = {{12, "registers_per_sm"},  // a block may have as many
                 {16, "sms"},
                 {39, "threads_per_sm"},
                 {81, "shared_per_sm"},
                 {82, "registers_per_sm"},
                 {97, "shared_per_block"},  // opt-in
                 {106, "blocks_per_sm"},
                 {111, "reserved_shared_per_block"}};
  *value = 0;
  for (const auto& known : of_chip)
    if (known.attribute == attribute) *value = ps_chip_value(known.what);
  switch (attribute) {
    case 1:
      *value = 1024;  // threads per block
      break;
    case 8:
      *value = 48 << 10;  // shared memory per block
      break;
    case 10:
      *value = 32;  // warp size
      break;
    case 75:
      *value = ps_chip_value("sm") / 10;
      break;
    case 76:
      *value = ps_chip_value("sm") % 10;
      break;
    case 95:
      *value = 1;  // cooperative launch
      break;
  }
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &state();
  return kSuccess;
}
int cuCtxGetCurrent(void** context) { return cuDevicePrimaryCtxRetain(context, 0); }
int cuCtxGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cuCtxPushCurrent_v2(void*) { return kSuccess; }
int cuCtxPopCurrent_v2(void** context) { return cuCtxGetCurrent(context); }
int cuCtxSynchronize() { return kSuccess; }
int cuStreamSynchronize(void*) { return kSuccess; }
int cuThreadExchangeStreamCaptureMode(int* mode) {
  *mode = 0;
  return kSuccess;
}

// ---- modules

int cuModuleLoadData(void** module, const void* image) {
  const char* text = static_cast<const char*>(image);
  if (!memcmp(text, "\177ELF", 4)) return kNoBinaryForGpu;  // machine code is not simulated
  const std::lock_guard held(state().lock);
  void* handle = ps_load(text);
  if (!handle) return kInvalidPtx;
  *module = new Module{handle, {}};
  return kSuccess;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  const int status = cuModuleLoadData(module, image);
  char* log = nullptr;
  size_t size = 0;
  for (unsigned i = 0; i < count; i++) {  // enum CUjit_option: the log of errors and its size
    if (options[i] == 5) log = static_cast<char*>(values[i]);
    if (options[i] == 6) size = reinterpret_cast<size_t>(values[i]);
  }
  if (status == kInvalidPtx && log && size) {
    strncpy(log, ps_error(), size - 1);
    log[size - 1] = 0;
  }
  return status;
}
int cuModuleUnload(void* module) {
  Module* m = static_cast<Module*>(module);
  ps_unload(m->handle);
  delete m;
  return kSuccess;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const std::lock_guard held(state().lock);
  Module* m = static_cast<Module*>(module);
  std::unique_ptr<Function>& found = m->functions[name];
  if (!found) {
    const int index = ps_kernel(m->handle, name);
    if (index < 0) return kNotFound;
    found.reset(new Function{m, name, index});
  }
  *function = found.get();
  return kSuccess;
}
int cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
  uint64_t size = 0;
  const uint64_t found = ps_symbol(static_cast<Module*>(module)->handle, name, &size);
  if (!found) return kNotFound;
  if (address) *address = found;
  if (bytes) *bytes = size;
  return kSuccess;
}

// ---- functions

int cuFuncSetAttribute(void* function, int attribute, int value) {
  Function* f = static_cast<Function*>(function);
  if (attribute != 8) return kSuccess;  // most dynamic shared memory
  if (value < 0 || value + f->static_shared() > ps_chip_value("shared_per_block")) return kInvalidValue;
  f->dynamic_shared_limit = value;
  return kSuccess;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  Function* f = static_cast<Function*>(function);
  switch (attribute) {  // enum CUfunction_attribute
    case 0:
      *value = ps_max_threads(f->module->handle, f->index);
      break;
    case 1:
      *value = f->static_shared();
      break;
    case 4:
      *value = f->registers();
      break;
    case 8:
      *value = f->dynamic_shared_limit;
      break;
    default:
      *value = 0;
  }
  return kSuccess;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
  Function* f = static_cast<Function*>(function);
  *blocks =
      shared > size_t(f->dynamic_shared_limit) ? 0 : ps_occupancy(threads, f->registers(), shared + f->static_shared());
  return kSuccess;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void*, void** arguments, void**) {
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return launch(static_cast<Function*>(function), grid, block, shared, arguments, false);
}
int cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, void*, void** arguments) {
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return launch(static_cast<Function*>(function), grid, block, shared, arguments, true);
}

// ---- memory. Fresh memory holds 0xB7: neither zero nor a NaN, so that nothing unwritten passes for a value
// or a sentinel.

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  void* p = nullptr;
  if (!bytes) return kInvalidValue;
  if (posix_memalign(&p, 512, bytes)) return kOutOfMemory;
  memset(p, 0xB7, bytes);
  *address = reinterpret_cast<uint64_t>(p);
  const std::lock_guard held(state().lock);
  state().allocations[*address] = bytes;
  ps_register(*address, bytes);
  return kSuccess;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  uint64_t address = 0;
  const int status = cuMemAlloc_v2(&address, bytes);
  *memory = reinterpret_cast<void*>(address);
  return status;
}
int cuMemFree_v2(uint64_t address) {
  const std::lock_guard held(state().lock);
  if (!state().allocations.erase(address)) return kInvalidValue;
  ps_unregister(address);
  free(reinterpret_cast<void*>(address));
  return kSuccess;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}
int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t count) {
  memset(reinterpret_cast<void*>(address), value, count);
  return kSuccess;
}
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void*) {
  return cuMemsetD8_v2(address, value, count);
}

// ---- errors

int cuGetErrorName(int status, const char** name) {
  *name = name_of(status);
  return *name ? kSuccess : kInvalidValue;
}
// The simulator's own words, where it has some.
int cuGetErrorString(int status, const char** text) {
  *text = status >= kInvalidPtx && *ps_error() ? ps_error() : name_of(status);
  return *text ? kSuccess : kInvalidValue;
}
}
#pragma GCC visibility pop
