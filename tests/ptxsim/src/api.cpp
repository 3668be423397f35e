// The C interface that Python (ctypes) and the stand-in for the driver use.

#include "api.h"

#include <mutex>

#include "clock.h"

using namespace ptxsim;

namespace {
// One launch at a time: Python threads may come from anywhere.
std::recursive_mutex& lock() {
  static auto* m = new std::recursive_mutex;
  return *m;
}

template <class F>
auto guarded(F f, decltype(f()) failed) {
  std::lock_guard held(lock());
  try {
    return f();
  } catch (const std::exception& e) {
    simulator().error = e.what();
    return failed;
  }
}
Program& program(void* handle) { return *static_cast<Program*>(handle); }
}  // namespace

const char* ps_error() { return simulator().error.c_str(); }

void* ps_load(const char* ptx) {
  return guarded([&]() -> void* { return new Program(ptx); }, nullptr);
}
void ps_unload(void* handle) {
  std::lock_guard held(lock());
  delete static_cast<Program*>(handle);
}

int ps_kernel(void* handle, const char* name) { return program(handle).find(name); }
int ps_kernel_count(void* handle) { return program(handle).functions.size(); }
const char* ps_kernel_name(void* handle, int i) {
  const Function& f = program(handle).functions[i];
  return f.entry && f.defined ? f.name.c_str() : nullptr;
}
int ps_nparams(void* handle, int kernel) { return program(handle).functions[kernel].parameters.size(); }
int ps_param_size(void* handle, int kernel, int i) { return program(handle).functions[kernel].parameters[i].size; }
int ps_static_shared(void* handle, int kernel) {
  return guarded(
      [&] {
        program(handle).prepare(kernel);
        return int(program(handle).functions[kernel].static_shared);
      },
      -1);
}
int ps_max_threads(void* handle, int kernel) { return program(handle).functions[kernel].max_threads; }
uint64_t ps_symbol(void* handle, const char* name, uint64_t* bytes) {
  auto& variables = program(handle).variables;
  auto it = variables.find(name);
  if (it == variables.end()) return 0;
  if (bytes) *bytes = it->second.size;
  return it->second.address;
}

void ps_register(uint64_t address, uint64_t bytes) {
  std::lock_guard held(lock());
  simulator().memory.add(address, bytes);
}
void ps_unregister(uint64_t address) {
  std::lock_guard held(lock());
  simulator().memory.remove(address);
}

int ps_option(const char* key, uint64_t value) {
  Options& o = simulator().options;
  const std::string k = key;
  if (k == "seed")
    o.seed = value;
  else if (k == "torn")
    o.torn = value;
  else if (k == "check")
    o.check = value;
  else if (k == "races")
    o.races = value;
  else if (k == "shared_races")
    o.shared_races = value;
  else if (k == "defer")
    o.defer = value;
  else if (k == "limit")
    o.limit = value;
  else if (k == "resident")
    o.resident = value;
  else if (k == "clock")
    o.clock = value;
  else if (k == "load_ns")
    o.load_ns = value;
  else if (k == "store_ns")
    o.store_ns = value;
  else
    return 1;
  return 0;
}
int ps_chip(const char* name) {
  const Chip* c = find_chip(name);
  if (c) simulator().options.chip = c;
  return !c;
}
int ps_chip_info(int i, const char** name, int* values, const char** source) {
  if (i >= kChipCount) return 0;
  const Chip& c = kChips[i];
  const int v[] = {c.sm,
                   c.sms,
                   c.threads_per_sm,
                   c.blocks_per_sm,
                   c.registers_per_sm,
                   c.shared_per_sm,
                   c.shared_per_block,
                   c.reserved_shared_per_block};
  std::copy(v, v + 8, values);
  *name = c.name;
  *source = c.source;
  return 1;
}
int ps_occupancy(int threads, int registers, uint64_t shared) {
  if (!simulator().options.chip) ps_chip("h100-sxm");
  return blocks_per_sm(*simulator().options.chip, threads, registers, shared, nullptr);
}
int ps_chip_value(const char* what) {
  if (!simulator().options.chip) ps_chip("h100-sxm");
  const Chip& c = *simulator().options.chip;
  const std::string w = what;
  return w == "sm"                          ? c.sm
         : w == "sms"                       ? c.sms
         : w == "threads_per_sm"            ? c.threads_per_sm
         : w == "blocks_per_sm"             ? c.blocks_per_sm
         : w == "registers_per_sm"          ? c.registers_per_sm
         : w == "shared_per_sm"             ? c.shared_per_sm
         : w == "shared_per_block"          ? c.shared_per_block
         : w == "reserved_shared_per_block" ? c.reserved_shared_per_block
                                            : -1;
}
void ps_registers(const char* kernel, int registers) { simulator().resources[kernel].registers = registers; }
int ps_registers_of(const char* kernel) {
  auto it = simulator().resources.find(kernel);
  return it == simulator().resources.end() ? 0 : it->second.registers;
}

#define X(name) #name " "
const char* ps_count_names() { return PTXSIM_COUNTERS(X); }
#undef X
void ps_counts(uint64_t* out) { memcpy(out, &simulator().counters, sizeof(Counters)); }
void ps_count_reset() {
  simulator().counters = Counters();
  simulator().memory.reset_traffic();
}
void ps_count_alloc(uint64_t base, uint64_t* out) {
  Traffic& t = simulator().memory.traffic(base);
  memcpy(out, &t, sizeof t);
}

const char* ps_clock_report() { return simulator().clock_report.c_str(); }
int ps_clock_cost(int i, const char** name, double* latency, double* issue, const char** source) {
  if (i < kUnits) {
    const UnitCost& u = kUnitCosts[i];
    *name = u.name, *latency = u.latency, *issue = u.issue, *source = u.source;
    return 1;
  }
  if (i - kUnits >= kThroughputCount) return 0;
  const Throughput& t = kThroughputs[i - kUnits];
  *name = t.name, *latency = 0, *issue = t.value, *source = t.source;
  return 1;
}

int ps_launch(void* handle, int kernel, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz,
              uint32_t shared, void** arguments, int cooperative) {
  const u32 grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return guarded(
      [&] {
        simulator().launch(program(handle), kernel, grid, block, shared, arguments, cooperative);
        return 0;
      },
      1);
}
