#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef FUSEDRNN_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <string_view>

#include "recurrence.h"

namespace fusedrnn {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

#ifdef FUSEDRNN_HAS_AMX
// The processor has tiles of bfloat16, and Linux lets this process use them.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(__x86_64__)
// Clang 14 cannot be asked for it by name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool has_bfloat16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
#else
  return false;
#endif
}

// Ascending.
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef FUSEDRNN_HAS_AMX
  static const bool has_amx = has_avx512 && has_bfloat16() && has_tiles();
#endif
  static const Candidate table[] = {
      {&portable::kernels, true},
#ifdef FUSEDRNN_HAS_NEON
      {&neon::kernels, true},  // every 64-bit Arm has it
#endif
#ifdef FUSEDRNN_HAS_AVX2
      {&avx2::kernels, has_avx2},
#endif
#ifdef FUSEDRNN_HAS_AVX512
      {&avx512::kernels, has_avx512},
#endif
#ifdef FUSEDRNN_HAS_AVX512_BF16
      {&avx512_bf16::kernels, has_avx512 && has_bfloat16()},
#endif
#ifdef FUSEDRNN_HAS_AMX
      {&amx::kernels, has_amx},
#endif
  };
  *count = sizeof(table) / sizeof(table[0]);
  return table;
}

const Kernels& choose() {
  int count = 0;
  const Candidate* table = candidates(&count);
  const char* limit = getenv("FUSEDRNN_CPU_CAPABILITY");
  const bool limited = limit && *limit;
  const Kernels* best = table[0].kernels;
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (table[i].runs) best = table[i].kernels;
    if (limited && strcmp(limit, table[i].kernels->name) == 0) return *best;
    names += std::string(i ? ", " : "") + table[i].kernels->name;
  }
  if (limited) {
    throw std::runtime_error("FUSEDRNN_CPU_CAPABILITY must be one of " + names + ", got '" + limit + "'");
  }
  return *best;
}

bool is_intel() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
#else
  return false;
#endif
}

const char* environment(const char* name) {
  const char* value = getenv(name);
  return value && *value ? value : nullptr;
}

}  // namespace

bool host_multiplies(const Processor& processor, Dtype dtype, const char* forced) {
  if (forced && strcmp(forced, "host") != 0 && strcmp(forced, "panels") != 0) {
    throw std::runtime_error(std::string("FUSEDRNN_CPU_PRODUCTS must be host or panels, got '") + forced + "'");
  }
  if (forced) return strcmp(forced, "host") == 0;
  const std::string_view capability(processor.capability);
  const bool avx512 = capability.starts_with("avx512") || capability == "amx";
  if (dtype == Dtype::kFloat32) return processor.intel || !(avx512 || capability == "avx2");
  if (dtype != Dtype::kBfloat16 || !processor.bfloat16) return false;
  // Without these instructions oneDNN splits an infinity into infinity - infinity.
  const std::string limit = processor.onednn_limit ? processor.onednn_limit : "ALL";
  bool has = false;
  for (const char* name : {"ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
                           "AVX512_CORE_AMX_FP16", "AVX10_1_512", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16"}) {
    has |= limit == name;
  }
  return has && avx512;
}

bool host_multiplies(Dtype dtype) {
  struct Found {
    bool float32, bfloat16, float16;
  };
  static const Found found = [] {
    const char* limit = environment("ONEDNN_MAX_CPU_ISA");
    const char* forced = environment("FUSEDRNN_CPU_PRODUCTS");
    const Processor here{kernels().name, is_intel(), has_bfloat16(), limit ? limit : environment("DNNL_MAX_CPU_ISA")};
    return Found{host_multiplies(here, Dtype::kFloat32, forced), host_multiplies(here, Dtype::kBfloat16, forced),
                 host_multiplies(here, Dtype::kFloat16, forced)};
  }();
  return dtype == Dtype::kFloat32 ? found.float32 : dtype == Dtype::kBfloat16 ? found.bfloat16 : found.float16;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* compiled_capabilities() {
  return "portable"
#ifdef FUSEDRNN_HAS_NEON
         " neon"
#endif
#ifdef FUSEDRNN_HAS_AVX2
         " avx2"
#endif
#ifdef FUSEDRNN_HAS_AVX512
         " avx512"
#endif
#ifdef FUSEDRNN_HAS_AVX512_BF16
         " avx512_bf16"
#endif
#ifdef FUSEDRNN_HAS_AMX
         " amx"
#endif
      ;
}

void out_of_memory(int64_t bytes) {
  throw std::runtime_error("fusedrnn: can't allocate " + std::to_string(bytes) + " bytes of memory");
}

namespace {
// Until when one thread does everything, and for how long that was decided; 0: it is not.
std::atomic<int64_t> alone_until{0}, alone_for{0};
constexpr int64_t kLate = 300'000, kTimes = 4, kLongest = 400'000'000;
// When the last call of many threads ended; so long after it they may have fallen asleep, and to wake them takes some
// time where nobody else wants the core, on a virtual machine up to some milliseconds: that has to happen twice.
std::atomic<int64_t> last_end{0};
std::atomic<bool> suspected{false};
constexpr int64_t kAwake = 4'000'000;
}  // namespace

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{1'000'000'000} * now.tv_sec + now.tv_nsec;
}

bool is_crowded() {
  const int64_t until = alone_until.load(std::memory_order_relaxed);
  return until && nanoseconds() < until;
}

// To work alone costs no more than it took to wait some times over. Another try costs a time slice where another
// program still has the core: each that fails doubles the time to the next, each that does not halves it.
void late_partners(int64_t total, int64_t waited) {
  const int64_t last = alone_for.load(std::memory_order_relaxed), now = nanoseconds();
  const bool awake = now - total - last_end.exchange(now, std::memory_order_relaxed) < kAwake;
  if (waited > kLate && waited > total / 2) {
    if (!awake && !last && !suspected.exchange(true, std::memory_order_relaxed)) return;
    const int64_t next = std::min(std::max(2 * last, kTimes * waited), kLongest);
    alone_for.store(next, std::memory_order_relaxed);
    alone_until.store(now + next, std::memory_order_relaxed);
  } else {
    if (last) alone_for.store(last / 2, std::memory_order_relaxed);
    suspected.store(false, std::memory_order_relaxed);
  }
}

}  // namespace fusedrnn
