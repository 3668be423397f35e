// Loads the device code and launches it, through the driver API: no CUDA header, no CUDA library is linked. The driver
// is opened by name when it is first needed, so one build serves every version of it (tests/ptxsim has one as well).
#include "launcher.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "instances.h"
#include "layout.h"

namespace fusedrnn {
namespace {

// What is used of the driver, as the CUDA Driver API manual has it.
using Result = int;
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;
constexpr Result kSuccess = 0, kUnknown = 999, kNoCode = FUSEDRNN_NO_CODE;
constexpr int kMajor = 75, kMinor = 76;          // CUdevice_attribute: compute capability
constexpr int kCooperative = 95;                 // CUdevice_attribute: cooperative launches
constexpr unsigned kPortable = 1, kMapped = 2;   // CU_MEMHOSTALLOC: every context's, and the device's at that address
constexpr int kDynamicShared = 8;                // CUfunction_attribute: most dynamic shared memory of a block
constexpr int kErrorLog = 5, kErrorLogSize = 6;  // CUjit_option
constexpr int kRelaxedCapture = 2;               // CUstreamCaptureMode
constexpr int kAlwaysAllowedShared = 48 * 1024;  // more has to be asked for

#define FUSEDRNN_DRIVER(X)                                                                                    \
  X(cuInit, (unsigned))                                                                                       \
  X(cuDriverGetVersion, (int*))                                                                               \
  X(cuDeviceGet, (Device*, int))                                                                              \
  X(cuDeviceGetAttribute, (int*, int, Device))                                                                \
  X(cuDevicePrimaryCtxRetain, (Context*, Device))                                                             \
  X(cuCtxGetCurrent, (Context*))                                                                              \
  X(cuCtxGetDevice, (Device*))                                                                                \
  X(cuCtxPushCurrent_v2, (Context))                                                                           \
  X(cuCtxPopCurrent_v2, (Context*))                                                                           \
  X(cuModuleLoadDataEx, (Module*, const void*, unsigned, int*, void**))                                       \
  X(cuModuleGetFunction, (Function*, Module, const char*))                                                    \
  X(cuFuncSetAttribute, (Function, int, int))                                                                 \
  X(cuLaunchKernel,                                                                                           \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**)) \
  X(cuLaunchCooperativeKernel,                                                                                \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**))         \
  X(cuMemHostAlloc, (void**, size_t, unsigned))                                                               \
  X(cuThreadExchangeStreamCaptureMode, (int*))                                                                \
  X(cuGetErrorName, (Result, const char**))                                                                   \
  X(cuGetErrorString, (Result, const char**))

struct Driver {
#define FUSEDRNN_ENTRY(name, arguments) Result(*name) arguments;
  FUSEDRNN_DRIVER(FUSEDRNN_ENTRY)
#undef FUSEDRNN_ENTRY
};

// What a call throws; the C functions turn it into fusedrnn_error().
struct Failure {
  std::string words;
  Result result = kUnknown;  // the driver's, where it was that
};

thread_local std::string last_error;

// What is to be known of a cell; its number is its place. instances: the cell under which its kernels are listed.
struct CellFacts {
  std::string name;
  int gates, accumulators, saved;
  bool gap;
  int instances;
  int states = 2;
  bool own = false;
};
#define FUSEDRNN_FACTS(Cell, gates, _) \
  {Cell::kName, gates, Cell::kAccumulators, Cell::kSaved, Gap<Cell>::kAny, k##Cell##Cell},
const CellFacts kCells[] = {FUSEDRNN_EACH_CELL(FUSEDRNN_FACTS, )};
#undef FUSEDRNN_FACTS
constexpr int kCellCount = sizeof(kCells) / sizeof(kCells[0]);
#define FUSEDRNN_CHECK(Cell, gates, _) static_assert(Cell::kGates == gates, "cell_list.h says otherwise");
FUSEDRNN_EACH_CELL(FUSEDRNN_CHECK, )
#undef FUSEDRNN_CHECK

// Cells under which kernels of one's own are listed, by their number of gates.
#define FUSEDRNN_NUMBER(Cell, gates, _) k##Cell##Cell = kCellCount + gates,
enum { FUSEDRNN_EACH_OWN_CELL(FUSEDRNN_NUMBER, ) };
#undef FUSEDRNN_NUMBER
constexpr int kMostGates = 4;

// Bytes of an element, and of what sums are kept in.
int element_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kBfloat16 || dtype == kFloat16 ? 2 : 4; }
int accumulator_size(int dtype) { return dtype == kFloat64 ? 8 : 4; }

// One compiled kernel.
struct Instance {
  int cell, dtype, size;
  bool is_whole;
  const char* name;
};
constexpr int float64 = kFloat64, float32 = kFloat32, tf32 = kTf32, bfloat16 = kBfloat16, float16 = kFloat16;
constexpr bool whole = true, ragged = false;

// The kernels of one file, by the order of their sizes.
struct File {
  const char* name;
  std::vector<Instance> instances;
};
enum {
  kStepForward,
  kStepBackward,
  kStepLinear,
  kStepCell,
  kPersistentForward,
  kPersistentForwardWide,
  kPersistentBackward,
  kFileCount
};
#define FUSEDRNN_OF(file, Cell, dtype, size, rows) \
  {k##Cell##Cell, dtype, size, rows, file "_" #Cell "_" #dtype "_" #size "_" #rows},
#define FUSEDRNN_IN_STEP_FORWARD(...) FUSEDRNN_OF("step_forward", __VA_ARGS__)
#define FUSEDRNN_IN_STEP_CELL(...) FUSEDRNN_OF("step_cell", __VA_ARGS__)
#define FUSEDRNN_IN_STEP_BACKWARD(...) FUSEDRNN_OF("step_backward", __VA_ARGS__)
#define FUSEDRNN_IN_PERSISTENT_FORWARD(...) FUSEDRNN_OF("persistent_forward", __VA_ARGS__)
#define FUSEDRNN_IN_PERSISTENT_FORWARD_WIDE(...) FUSEDRNN_OF("persistent_forward_wide", __VA_ARGS__)
#define FUSEDRNN_IN_PERSISTENT_BACKWARD(...) FUSEDRNN_OF("persistent_backward", __VA_ARGS__)
#define FUSEDRNN_IN_STEP_LINEAR(dtype, size, rows) {0, dtype, size, rows, "step_linear_" #dtype "_" #size "_" #rows},
#define FUSEDRNN_ALL(OF, X) FUSEDRNN_EACH_CELL(OF, X) FUSEDRNN_EACH_OWN_CELL(OF, X)
const File kFiles[kFileCount] = {
    {"step_forward", {FUSEDRNN_ALL(FUSEDRNN_STEP_FORWARD_OF, FUSEDRNN_IN_STEP_FORWARD)}},
    {"step_backward", {FUSEDRNN_ALL(FUSEDRNN_STEP_BACKWARD_OF, FUSEDRNN_IN_STEP_BACKWARD)}},
    {"step_linear", {FUSEDRNN_STEP_LINEAR(FUSEDRNN_IN_STEP_LINEAR)}},
    {"step_cell", {FUSEDRNN_ALL(FUSEDRNN_STEP_CELL_OF, FUSEDRNN_IN_STEP_CELL)}},
    {"persistent_forward", {FUSEDRNN_ALL(FUSEDRNN_PERSISTENT_FORWARD_OF, FUSEDRNN_IN_PERSISTENT_FORWARD)}},
    {"persistent_forward_wide",
     {FUSEDRNN_ALL(FUSEDRNN_PERSISTENT_FORWARD_WIDE_OF, FUSEDRNN_IN_PERSISTENT_FORWARD_WIDE)}},
    {"persistent_backward", {FUSEDRNN_ALL(FUSEDRNN_PERSISTENT_BACKWARD_OF, FUSEDRNN_IN_PERSISTENT_BACKWARD)}},
};

// The place in its file of the instance with the smallest size from `size` on, or with the largest; is_whole(size) is
// asked for the one found.
template <typename Whole>
int pick(int file, const CellFacts* of, int dtype, int64_t size, const Whole& is_whole) {
  const int cell = of ? of->instances : 0;
  const std::vector<Instance>& all = kFiles[file].instances;
  int found = -1;
  for (int i = 0; i < int(all.size()); ++i) {
    if (all[i].cell != cell || all[i].dtype != dtype) continue;
    if (found >= 0 && all[found].size >= size && all[i].size != all[found].size) break;
    if (found >= 0 && all[i].size == all[found].size && all[i].is_whole != is_whole(all[i].size)) continue;
    found = i;
  }
  if (found < 0) throw Failure{std::string(kFiles[file].name) + " has no kernel for this cell and dtype"};
  return found;
}

// Names of the images that a card takes, the best first: code of its generation up to its own version, then PTX of any
// version up to it.
std::vector<std::string> images_for(int major, int minor) {
  std::vector<std::string> names;
  for (int m = minor; m >= 0; --m) names.push_back("sm_" + std::to_string(10 * major + m) + ".cubin");
  for (int n = 10 * major + minor; n >= 80; --n) names.push_back("compute_" + std::to_string(n) + ".ptx");
  return names;
}

std::string path_of(const std::string& folder, const char* file, const std::string& image) {
  return folder + "/" + file + "." + image;
}

// Empty where there is no such file.
std::string read(const std::string& path) {
  std::string text;
  FILE* file = fopen(path.c_str(), "rb");
  if (file == nullptr) return text;
  char buffer[1 << 16];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
  fclose(file);
  return text;
}

std::string version_in_words(int version) {
  return "CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace
}  // namespace fusedrnn

using namespace fusedrnn;

struct FusedrnnKernels {
  Driver driver{};
  int version = 0;
  std::string folder;

  // A cell by its number: built in, or of one's own.
  const CellFacts& facts(int cell) {
    const std::lock_guard<std::mutex> held(lock_);
    if (cell >= 0 && cell < kCellCount) return kCells[cell];
    if (cell < 0 || cell - kCellCount >= int(own_.size())) throw Failure{"there is no cell " + std::to_string(cell)};
    return own_[cell - kCellCount];
  }

  // The number of a cell of one's own.
  int add(const FusedrnnOwnCell& cell) {
    const std::lock_guard<std::mutex> held(lock_);
    if (cell.gates < 1 || cell.gates > kMostGates)
      throw Failure{"a cell has 1 to " + std::to_string(kMostGates) + " gates, got " + std::to_string(cell.gates)};
    own_.push_back({cell.name, cell.gates, cell.accumulators, cell.saved, cell.gap != 0, kCellCount + cell.gates,
                    cell.states, true});
    return kCellCount + int(own_.size()) - 1;
  }

  // One more image of a kernel of a cell of one's own.
  void add_code(int cell, const char* kernel, const char* path) {
    facts(cell);
    const std::lock_guard<std::mutex> held(lock_);
    code_[{cell, kernel}].push_back(path);
  }

  // A kernel of the context that is current; a block may have so much dynamic shared memory. own: a cell of one's own,
  // whose kernels have a file each; -1: one that is built in.
  Function function(int file, int instance, int shared, int own) {
    const std::lock_guard<std::mutex> held(lock_);
    Context context = nullptr;
    check(driver.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    const char* name = kFiles[file].instances[instance].name;
    const std::string from = own >= 0 ? name : kFiles[file].name;
    if (own >= 0 && code_[{own, from}].empty()) throw Failure{name, kNoCode};
    Loaded& loaded = contexts_[context][{own, from}];
    if (loaded.module == nullptr) {
      loaded.module = load(own, from);
      loaded.kernels.resize(kFiles[file].instances.size());
    }
    Kernel& kernel = loaded.kernels[instance];
    if (kernel.function == nullptr) check(driver.cuModuleGetFunction(&kernel.function, loaded.module, name), name);
    if (shared > kernel.allowed_shared) {
      // It belongs to the function, not to a launch: it only grows, or the larger of two launches might find it small.
      check(driver.cuFuncSetAttribute(kernel.function, kDynamicShared, shared), name);
      kernel.allowed_shared = shared;
    }
    return kernel.function;
  }

  // Four words that a kernel may write and that are read even when its context is dead: host memory.
  int32_t* fault() {
    const std::lock_guard<std::mutex> held(lock_);
    if (fault_ == nullptr) {
      void* memory = nullptr;
      const Relaxed relaxed(driver);
      check(driver.cuMemHostAlloc(&memory, 4 * sizeof(int32_t), kPortable | kMapped), "cuMemHostAlloc");
      memset(memory, 0, 4 * sizeof(int32_t));
      fault_ = static_cast<int32_t*>(memory);
    }
    return fault_;
  }

  // Empty where no kernel gave up since it was asked last.
  std::string fault_in_words() {
    const std::lock_guard<std::mutex> held(lock_);
    volatile int32_t* fault = fault_;
    if (fault == nullptr || fault[3] == 0) return "";
    fault[3] = 0;
    return "packet " + std::to_string(fault[2]) + " of the step before step " + std::to_string(fault[1]) +
           " never came to block " + std::to_string(fault[0]) + " of a persistent kernel, which gave up";
  }

  Context primary(int device) {
    const std::lock_guard<std::mutex> held(lock_);
    Context& context = primaries_[device];
    if (context == nullptr) {
      Device handle = 0;
      check(driver.cuDeviceGet(&handle, device), "cuDeviceGet");
      check(driver.cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");
    }
    return context;
  }

  void check(Result result, const char* what) const {
    if (result != kSuccess) throw Failure{std::string(what) + ": " + words(result), result};
  }

  std::string words(Result result) const {
    const char *name = nullptr, *text = nullptr;
    driver.cuGetErrorName(result, &name);
    driver.cuGetErrorString(result, &text);
    return std::string(name ? name : "CUDA_ERROR") + " (" + std::to_string(result) + (text ? "), " : ")") +
           (text ? text : "");
  }

 private:
  struct Kernel {
    Function function = nullptr;
    int allowed_shared = kAlwaysAllowedShared;
  };
  struct Loaded {
    Module module = nullptr;
    std::vector<Kernel> kernels;
  };
  // A graph may be recorded just now, which forbids some calls: allowed as long as this lives.
  struct Relaxed {
    const Driver& driver;
    int mode = kRelaxedCapture;
    explicit Relaxed(const Driver& d) : driver(d) { driver.cuThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { driver.cuThreadExchangeStreamCaptureMode(&mode); }
  };
  std::mutex lock_;
  using Code = std::pair<int, std::string>;  // a cell of one's own, and the kernel; or -1, and the file
  std::map<Context, std::map<Code, Loaded>> contexts_;
  std::map<Code, std::vector<std::string>> code_;
  std::deque<CellFacts> own_;  // they stay where they are
  std::map<int, Context> primaries_;
  int32_t* fault_ = nullptr;

  // The first image that is there and that the driver takes.
  Module load(int own, const std::string& file) {
    Device device = 0;
    int major = 0, minor = 0;
    check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
    check(driver.cuDeviceGetAttribute(&major, kMajor, device), "cuDeviceGetAttribute");
    check(driver.cuDeviceGetAttribute(&minor, kMinor, device), "cuDeviceGetAttribute");
    std::string refused;
    std::vector<std::string> paths;
    if (own >= 0) {
      paths = code_[{own, file}];
    } else {
      for (const std::string& image : images_for(major, minor)) paths.push_back(path_of(folder, file.c_str(), image));
    }
    for (const std::string& path : paths) {
      const std::string code = read(path);
      if (code.empty()) continue;
      char log[2048] = "";
      int options[] = {kErrorLog, kErrorLogSize};
      void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
      Module module = nullptr;
      Result result = kSuccess;
      {
        const Relaxed relaxed(driver);
        result = driver.cuModuleLoadDataEx(&module, code.c_str(), 2, options, values);
      }
      if (result == kSuccess) return module;
      refused +=
          (refused.empty() ? " does not take " : ", nor ") + path + ": " + words(result) + (*log ? ": " : "") + log;
    }
    const std::string card = "compute capability " + std::to_string(major) + "." + std::to_string(minor);
    if (refused.empty())
      throw Failure{"there is no code of " + file + " for " + card + (own >= 0 ? "" : " in " + folder)};
    throw Failure{"the driver (" + version_in_words(version) + ", a card of " + card + ")" + refused +
                  ". A newer driver may"};
  }
};

namespace fusedrnn {
namespace {

struct Grid {
  unsigned x, y, z = 1;
};

// Where a call's launches go: the device's context is current as long as this lives.
class Queue {
 public:
  Queue(FusedrnnKernels& kernels, int device, Stream stream) : kernels_(kernels), stream_(stream) {
    Context now = nullptr;
    Device of_now = -1;
    const Driver& driver = kernels.driver;
    kernels.check(driver.cuCtxGetCurrent(&now), "cuCtxGetCurrent");
    if (now != nullptr) kernels.check(driver.cuCtxGetDevice(&of_now), "cuCtxGetDevice");
    Device wanted = 0;
    kernels.check(driver.cuDeviceGet(&wanted, device), "cuDeviceGet");
    if (of_now != wanted) {
      kernels.check(driver.cuCtxPushCurrent_v2(kernels.primary(device)), "cuCtxPushCurrent");
      pushed_ = true;
    }
  }
  ~Queue() {
    Context popped = nullptr;
    if (pushed_) kernels_.driver.cuCtxPopCurrent_v2(&popped);
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void launch(int file, int instance, const Grid& grid, int shared, void* argument, int own = -1,
              bool cooperative = false) {
    const Driver& driver = kernels_.driver;
    const Function function = kernels_.function(file, instance, shared, own);
    const char* name = kFiles[file].instances[instance].name;
    void* arguments[] = {argument};
    kernels_.check(cooperative ? driver.cuLaunchCooperativeKernel(function, grid.x, grid.y, grid.z, kThreads, 1, 1,
                                                                  unsigned(shared), stream_, arguments)
                               : driver.cuLaunchKernel(function, grid.x, grid.y, grid.z, kThreads, 1, 1,
                                                       unsigned(shared), stream_, arguments, nullptr),
                   name);
  }

  int32_t* fault() { return kernels_.fault(); }
  const CellFacts& facts(int cell) { return kernels_.facts(cell); }

 private:
  FusedrnnKernels& kernels_;
  Stream stream_;
  bool pushed_ = false;
};

unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

// ---- step

// The rows of step t, counted from B rows a step or from offsets.
struct Timeline {
  const int64_t* offsets;
  int64_t batch, steps;
  int64_t offset(int64_t t) const { return t < 0 || t >= steps ? 0 : offsets ? offsets[t] : t * batch; }
  int rows(int64_t t) const { return t < 0 || t >= steps ? 0 : int(offsets ? offsets[t + 1] - offsets[t] : batch); }
  Rows at(int64_t t, int direction) const {
    return {offset(t), offset(t - direction), rows(t), rows(t - direction), rows(t + direction)};
  }
};

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// `count` elements further; null stays null.
const void* at(const void* array, int64_t count, int size) {
  return array ? static_cast<const char*>(array) + count * size : nullptr;
}
void* at(void* array, int64_t count, int size) { return array ? static_cast<char*>(array) + count * size : nullptr; }

// 16 or 32 rows of the batch a block.
int pick_step(int file, const CellFacts* cell, int dtype, int rows, bool is_whole) {
  return pick(file, cell, dtype, rows <= 16 ? 2 : 4, [&](int) { return is_whole; });
}

void launch_step(Queue& queue, int file, int instance, int64_t across, int rows, int shared_of_tile, int shared,
                 void* argument, int own = -1) {
  const int tiles = kFiles[file].instances[instance].size;
  // Rows are along x, which takes any number of blocks: recompute's gates are a step of all rows of a sequence.
  queue.launch(file, instance, {blocks(rows, tiles * 8), unsigned(across)}, tiles * shared_of_tile + shared, argument,
               own);
}

int backward_shared(int dtype) { return kBackwardSums * accumulator_size(dtype); }

void linear(Queue& queue, int dtype, Linear<void>& p) {
  const bool is_whole = aligned(p.a) && p.k * element_size(dtype) % 16 == 0 && aligned(p.from);
  launch_step(queue, kStepLinear, pick_step(kStepLinear, nullptr, dtype, p.rows, is_whole), blocks(p.n, kBackwardUnits),
              p.rows, 0, backward_shared(dtype), &p);
}

// What a call says beside what those of built-in cells say; one head and nothing else for these.
template <typename Own, typename Plain>
Own own_part(const CellFacts& cell, const Plain& p) {
  Own own{};
  own.heads = 1;
  return cell.own ? reinterpret_cast<const Own&>(p) : own;
}

// Blocks along the units, of every head its own.
int64_t across(int64_t hidden, int64_t heads, int units) { return heads * blocks(hidden / heads, units); }

void step_forward(Queue& queue, const FusedrnnForward& p) {
  const CellFacts& cell = queue.facts(p.cell);
  const auto own = own_part<FusedrnnOwnForward>(cell, p);
  const int size = element_size(p.dtype), wide = accumulator_size(p.dtype);
  const Timeline timeline{p.offsets_host, p.batch, p.steps};
  const bool is_whole = aligned(p.x) && p.input * size % 16 == 0 && aligned(p.w_ih) && aligned(p.w_hh) &&
                        p.out / own.heads * size % 16 == 0 && aligned(p.h0) && aligned(p.y);
  const int direction = p.reverse ? -1 : 1;
  for (int64_t s = 0, t = p.reverse ? p.steps - 1 : 0; s < p.steps; ++s, t += direction) {
    const Rows step = timeline.at(t, direction);
    OwnForwardStep<void, void> now{};
    now.x = at(p.x, step.offset * p.input, size);
    now.h_before = at(p.y, step.before_offset * p.out, size);
    now.h0 = p.h0;
    now.c0 = p.c0;
    now.resets = p.resets ? p.resets + step.offset : nullptr;
    now.zeros = p.zeros;
    now.w_ih = p.w_ih;
    now.w_hh = p.w_hh;
    now.b_ih = p.b_ih;
    now.b_hh = p.b_hh;
    now.c_before = p.cells ? at(p.cells, step.before_offset * p.hidden, wide) : p.state;
    now.c = p.cells ? at(p.cells, step.offset * p.hidden, wide) : p.state;
    now.h = p.w_hr ? p.unprojected : at(p.y, step.offset * p.out, size);
    now.gates = at(p.gates, step.offset * p.hidden * cell.saved, size);
    now.h_n = p.w_hr ? nullptr : p.h_n;
    now.c_n = p.c_n;
    now.input = int(p.input);
    now.hidden = int(p.hidden);
    now.out = int(p.out);
    now.rows = step.rows;
    now.before_rows = step.before_rows;
    now.next_rows = step.next_rows;
    if (cell.own) {
      now.parameters = own.parameters;
      now.inputs = at(own.inputs, step.offset * p.hidden, size);
      now.of_state = p.batch * p.hidden;
      now.of_rows = own.rows * p.hidden;
      now.of_cells = p.cells ? now.of_rows : now.of_state;
      now.depth = int(p.hidden / own.heads);
    }
    launch_step(queue, kStepForward, pick_step(kStepForward, &cell, p.dtype, step.rows, is_whole),
                across(p.hidden, own.heads, kForwardUnits), step.rows,
                8 * forward_bytes_per_row(cell.accumulators, wide, kForwardUnits), 0, &now, cell.own ? p.cell : -1);
    if (p.w_hr) {
      Linear<void> project{};
      project.a = p.w_hr;
      project.from = p.unprojected;
      project.to = at(p.y, step.offset * p.out, size);
      project.also_to = p.h_n;
      project.n = p.out;
      project.k = p.hidden;
      project.rows = project.matmul_rows = step.rows;
      project.also_from = step.next_rows;
      linear(queue, p.dtype, project);
    }
  }
}

void step_cell(Queue& queue, const FusedrnnCellStep& p) {
  const FusedrnnForward& step = p.step.plain;
  const CellFacts& cell = queue.facts(step.cell);
  const int size = element_size(step.dtype), wide = accumulator_size(step.dtype);
  const int64_t first = p.first * step.hidden;
  OwnForwardStep<void, void> now{};
  now.x_product = p.x_product;
  now.h_product = p.h_product;
  now.h0 = at(step.h0, p.first * step.out, size);
  now.c0 = at(step.c0, first, size);
  now.b_ih = step.b_ih;
  now.b_hh = step.b_hh;
  now.resets = step.resets ? step.resets + p.first : nullptr;
  now.h = at(step.y, first, size);
  now.gates = at(step.gates, first * cell.saved, size);
  now.c = at(step.cells, first, wide);
  now.h_n = at(step.h_n, first, size);
  now.c_n = at(step.c_n, first, size);
  now.hidden = int(step.hidden);
  now.out = int(step.out);
  now.rows = int(p.count);
  now.parameters = p.step.parameters;
  now.inputs = at(p.step.inputs, first, size);
  now.of_state = now.of_cells = now.of_rows = p.step.rows * step.hidden;
  const int dtype = step.dtype == kTf32 ? int(kFloat32) : step.dtype;
  queue.launch(kStepCell, pick(kStepCell, &cell, dtype, 1, [](int) { return false; }),
               {blocks(p.count, kWarps), blocks(step.hidden, 32)}, 0, &now, cell.own ? step.cell : -1);
}

void step_backward(Queue& queue, const FusedrnnBackward& p) {
  const CellFacts& cell = queue.facts(p.cell);
  const auto own = own_part<FusedrnnOwnBackward>(cell, p);
  const int size = element_size(p.dtype);
  const Timeline timeline{p.offsets_host, p.batch, p.steps};
  const int direction = p.reverse ? 1 : -1;
  for (int64_t s = 0, t = p.reverse ? 0 : p.steps - 1; s < p.steps; ++s, t += direction) {
    OwnBackwardStep<void> now{};
    now.call = p;
    now.step = timeline.at(t, direction);
    now.next_offset = timeline.offset(t + direction);
    const Rows& step = now.step;
    Upstream<void>& up = now.up;
    up.a = p.w_hh_t;
    up.from = at(p.dgates, step.before_offset * cell.accumulators * p.hidden, size);
    up.plus = at(p.dy, step.offset * p.out, size);
    up.start = p.dh_n;
    up.cut = p.resets ? p.resets + step.before_offset : nullptr;
    up.k = cell.gates * p.hidden;
    up.matmul_rows = step.rows < step.before_rows ? step.rows : step.before_rows;
    if (p.w_hr_t) {
      Linear<void> total{};
      total.a = up.a;
      total.from = up.from;
      total.plus = up.plus;
      total.start = up.start;
      total.cut = up.cut;
      total.to = at(p.dy_total, step.offset * p.out, size);
      total.n = p.out;
      total.k = up.k;
      total.rows = total.also_from = step.rows;
      total.matmul_rows = up.matmul_rows;
      linear(queue, p.dtype, total);
      up = Upstream<void>{};
      up.a = p.w_hr_t;
      up.from = total.to;
      up.k = p.out;
      up.matmul_rows = step.rows;
    }
    if (cell.own) {
      now.parameters = own.parameters;
      now.inputs = own.inputs;
      now.dparameters = own.dparameters;
      now.dinputs = own.dinputs;
      now.of_state = p.batch * p.hidden;
      now.of_rows = own.rows * p.hidden;
      now.depth = int(p.hidden / own.heads);
    }
    const int64_t run = cell.own ? p.hidden / own.heads : cell.gap ? p.hidden : up.k;
    const bool is_whole = aligned(up.a) && run * size % 16 == 0 && aligned(up.from);
    launch_step(queue, kStepBackward, pick_step(kStepBackward, &cell, p.dtype, step.rows, is_whole),
                across(p.hidden, own.heads, kBackwardUnits), step.rows, 0, backward_shared(p.dtype), &now,
                cell.own ? p.cell : -1);
  }
}

// ---- persistent

// The smallest instance that holds rows of weights: `parts` runs of as many elements as a head has units, each rounded
// up to whole packets.
int pick_persistent(int file, const CellFacts& cell, int dtype, int64_t hidden, int parts) {
  const int per_packet = 16 / element_size(dtype);
  const int64_t row_bytes = int64_t(blocks(hidden, per_packet)) * 16 * parts;
  const int instance = pick(file, &cell, dtype, blocks(row_bytes, kChunkBytes), [&](int chunks) {
    return hidden % per_packet == 0 && row_bytes == int64_t(chunks) * kChunkBytes;
  });
  if (row_bytes > int64_t(kFiles[file].instances[instance].size) * kChunkBytes)
    throw Failure{std::string(kFiles[file].name) + " has no kernel for H = " + std::to_string(hidden)};
  return instance;
}

// Launches a kernel for some directions, whose parameters are those of a cell of one's own or the plain ones.
template <typename Own, typename Plain>
void launch_persistent(Queue& queue, int file, const CellFacts& cell, const Plain* params, int count, int parts,
                       int shared) {
  const Plain& p = params[0];
  const int64_t heads = own_part<Own>(cell, p).heads;
  const int units = file == kPersistentBackward ? kBackwardUnits : p.units;
  Directions<Plain> plain{};
  Directions<Own> own{};
  for (int i = 0; i < count; ++i) {
    if (cell.own) {
      own.of[i] = reinterpret_cast<const Own*>(params)[i];
      own.of[i].plain.fault = queue.fault();
    } else {
      plain.of[i] = params[i];
      plain.of[i].fault = queue.fault();
    }
  }
  queue.launch(file, pick_persistent(file, cell, p.dtype, p.hidden / heads, parts),
               {unsigned(across(p.hidden, heads, units)), unsigned(p.groups), unsigned(count)}, shared,
               cell.own ? static_cast<void*>(&own) : &plain, cell.own ? p.cell : -1, true);
}

void persistent_forward(Queue& queue, const FusedrnnForward* params, int count) {
  const FusedrnnForward& p = params[0];
  const CellFacts& cell = queue.facts(p.cell);
  const int row = forward_bytes_per_row(cell.accumulators, accumulator_size(p.dtype), p.units);
  const int ahead = forward_ahead_bytes(p.slice_rows, cell.gates, element_size(p.dtype), p.units);
  launch_persistent<FusedrnnOwnForward>(queue, p.units == kWideUnits ? kPersistentForwardWide : kPersistentForward,
                                        cell, params, count, 1, 2 * forward_buffer_bytes(p.slice_rows, row) + ahead);
}

void persistent_backward(Queue& queue, const FusedrnnBackward* params, int count) {
  const FusedrnnBackward& p = params[0];
  const CellFacts& cell = queue.facts(p.cell);
  const int size = element_size(p.dtype), wide = accumulator_size(p.dtype);
  const int shared = 2 * kBackwardSums * wide + backward_stage_bytes(cell.accumulators, size) +
                     backward_ahead_bytes(cell.saved, backward_states(cell.states), size, wide);
  launch_persistent<FusedrnnOwnBackward>(queue, kPersistentBackward, cell, params, count, cell.gates, shared);
}

template <typename Call>
int run(FusedrnnKernels* kernels, int device, void* stream, const Call& call) {
  try {
    Queue queue(*kernels, device, stream);
    call(queue);
    return 0;
  } catch (const Failure& failure) {
    const std::string fault = kernels->fault_in_words();
    last_error = failure.words + (fault.empty() ? "" : ": " + fault);
    return failure.result;
  }
}

}  // namespace
}  // namespace fusedrnn

extern "C" {

FusedrnnKernels* fusedrnn_open(const char* driver, const char* folder) {
  void* library = dlopen(driver, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    last_error = std::string("there is no driver: ") + dlerror();
    return nullptr;
  }
  auto kernels = std::make_unique<FusedrnnKernels>();
  kernels->folder = folder;
#define FUSEDRNN_FIND(name, arguments)                                                 \
  kernels->driver.name = reinterpret_cast<Result(*) arguments>(dlsym(library, #name)); \
  if (kernels->driver.name == nullptr) {                                               \
    last_error = std::string(driver) + " has no " #name ": the driver is too old";     \
    return nullptr;                                                                    \
  }
  FUSEDRNN_DRIVER(FUSEDRNN_FIND)
#undef FUSEDRNN_FIND
  try {
    kernels->check(kernels->driver.cuInit(0), "cuInit");
    kernels->check(kernels->driver.cuDriverGetVersion(&kernels->version), "cuDriverGetVersion");
  } catch (const Failure& failure) {
    last_error = failure.words;
    return nullptr;
  }
  if (kernels->version < 12000) {
    last_error = "the driver is too old: it has " + version_in_words(kernels->version) + ", CUDA 12.0 is needed";
    return nullptr;
  }
  return kernels.release();
}

int fusedrnn_step_forward(FusedrnnKernels* kernels, const FusedrnnForward* params, int device, void* stream) {
  return run(kernels, device, stream, [&](Queue& queue) { step_forward(queue, *params); });
}
int fusedrnn_step_backward(FusedrnnKernels* kernels, const FusedrnnBackward* params, int device, void* stream) {
  return run(kernels, device, stream, [&](Queue& queue) { step_backward(queue, *params); });
}
int fusedrnn_step_cell(FusedrnnKernels* kernels, const FusedrnnCellStep* params, int device, void* stream) {
  return run(kernels, device, stream, [&](Queue& queue) { step_cell(queue, *params); });
}
int fusedrnn_persistent_forward(FusedrnnKernels* kernels, const FusedrnnForward* params, int count, int device,
                                void* stream) {
  return run(kernels, device, stream, [&](Queue& queue) { persistent_forward(queue, params, count); });
}
int fusedrnn_persistent_backward(FusedrnnKernels* kernels, const FusedrnnBackward* params, int count, int device,
                                 void* stream) {
  return run(kernels, device, stream, [&](Queue& queue) { persistent_backward(queue, params, count); });
}

int fusedrnn_cooperative(FusedrnnKernels* kernels, int device) {
  Device handle = 0;
  int value = 0;
  const Driver& driver = kernels->driver;
  return driver.cuDeviceGet(&handle, device) == kSuccess &&
         driver.cuDeviceGetAttribute(&value, kCooperative, handle) == kSuccess && value != 0;
}

const char* fusedrnn_fault(FusedrnnKernels* kernels) {
  static thread_local std::string words;
  words = kernels->fault_in_words();
  return words.c_str();
}

const char* fusedrnn_error() { return last_error.c_str(); }

const char* fusedrnn_cell_name(int cell) { return cell < kCellCount ? kCells[cell].name.c_str() : nullptr; }

int fusedrnn_add_cell(FusedrnnKernels* kernels, const FusedrnnOwnCell* cell) {
  try {
    return kernels->add(*cell);
  } catch (const Failure& failure) {
    last_error = failure.words;
    return -1;
  }
}

int fusedrnn_add_code(FusedrnnKernels* kernels, int cell, const char* kernel, const char* path) {
  try {
    return kernels->add_code(cell, kernel, path), 0;
  } catch (const Failure& failure) {
    last_error = failure.words;
    return failure.result;
  }
}

const char* fusedrnn_images(const char* folder, int major, int minor) {
  static thread_local std::string names;
  names.clear();
  for (const std::string& image : images_for(major, minor))
    if (FILE* file = fopen(path_of(folder, kFiles[0].name, image).c_str(), "rb")) {
      fclose(file);
      names += (names.empty() ? "" : " ") + image;
    }
  return names.c_str();
}
}
