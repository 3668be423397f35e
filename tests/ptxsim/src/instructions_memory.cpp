// Loads, stores, atomics, asynchronous copies, fences, address conversion.

#include <algorithm>

#include "clock.h"
#include "values.h"

namespace ptxsim {
namespace {

// ---- ld and st

void decode_memory_words(Decoder& d) {
  Instruction& I = d.I;
  for (const std::string& word : d.words) {
    if (word == "global")
      I.space = Space::Global;
    else if (word == "shared" || word == "shared::cta")
      I.space = Space::Shared;
    else if (word == "local")
      I.space = Space::Local;
    else if (word.rfind("param", 0) == 0)
      I.space = Space::Param;
    else if (word == "const")
      I.space = Space::Const;
    else if (word == "v2" || word == "v4" || word == "v8")
      I.vector = word[1] - '0';
    else if (word == "relaxed")
      I.order = Order::Relaxed;
    else if (word == "acquire")
      I.order = Order::Acquire;
    else if (word == "release")
      I.order = Order::Release;
    else if (word == "acq_rel")
      I.order = Order::AcqRel;
    else if (word == "nc")
      I.read_only = true;
    if (word == "gpu" || word == "sys") I.wide_scope = true;
    if (word == "volatile") I.order = Order::Relaxed, I.wide_scope = true;  // 8.4: as relaxed at system scope
  }
}

// An absolute address has the space of its symbol.
void adopt_space(Instruction& I, const Operand& o) {
  if (I.space == Space::Generic && !o.has_base && o.space != Space::Generic) I.space = o.space;
}

bool tears(Warp& w, const Instruction& I, u32 bytes, const Lanes& lanes, u32 mask) {
  return w.launch->simulator->options.torn && bytes == 16 && I.space != Space::Shared && I.space != Space::Local &&
         I.space != Space::Param && I.space != Space::Const &&
         space_of(I.space, lanes.address[__builtin_ctz(mask)]) == Space::Global;
}

template <class T>
void load(Warp& w, const Instruction& I, u32 mask) {
  const Operand &target = I.op[0], &source = I.op[1];
  const int n = I.vector;
  constexpr int kMost = 32 / (sizeof(T) < 4 ? 4 : sizeof(T));
  T value[kMost][kLanes];
  Lanes lanes;
  addresses(w, source, lanes.address);
  if (source.function_param) {
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      lanes.pointer[lane] = call_parameter(w, lane, lanes.address[lane]);
    }
    lanes.contiguous = false;
  } else if (w.load_half_done) {
    for (int i = 0; i < kLanes; i++) lanes.pointer[i] = reinterpret_cast<u8*>(lanes.address[i]);
    lanes.contiguous = false;
  } else {
    access(w, I, Access::Load, I.space, mask, n * sizeof(T), I.element, lanes, "load");
  }
  if (I.order != Order::Weak && !source.function_param && tears(w, I, n * sizeof(T), lanes, mask)) {
    if (!w.load_half_done) {
      w.late_half = w.launch->simulator->random() >> 13 & 1;
      for (u32 m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        memcpy(&w.early[lane], lanes.pointer[lane] + 8 * !w.late_half, 8);
      }
      w.load_half_done = w.suspend = true;
      return;
    }
    w.load_half_done = false;
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      u64 halves[2];
      halves[!w.late_half] = w.early[lane];
      memcpy(&halves[w.late_half], lanes.pointer[lane] + 8 * w.late_half, 8);
      for (int k = 0; k < n; k++) memcpy(&value[k][lane], reinterpret_cast<u8*>(halves) + k * sizeof(T), sizeof(T));
    }
  } else if (lanes.contiguous && n == 1) {
    memcpy(value[0], lanes.pointer[0], sizeof value[0]);
  } else {
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      for (int k = 0; k < n; k++) memcpy(&value[k][lane], lanes.pointer[lane] + k * sizeof(T), sizeof(T));
    }
  }
  for (int k = 0; k < n; k++) write(w, I.part(target, k), mask, value[k], is_signed(I.type));
}

template <class T>
void store(Warp& w, const Instruction& I, u32 mask) {
  const Operand &target = I.op[0], &source = I.op[1];
  const int n = I.vector;
  constexpr int kMost = 32 / (sizeof(T) < 4 ? 4 : sizeof(T));
  T space[kMost][kLanes];
  const T* value[kMost];
  for (int k = 0; k < n; k++) value[k] = read(w, I.part(source, k), space[k]);
  Lanes lanes;
  addresses(w, target, lanes.address);
  if (target.function_param) {
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      memcpy(call_parameter(w, lane, lanes.address[lane]), &value[0][lane], sizeof(T));
      for (int k = 1; k < n; k++)
        memcpy(call_parameter(w, lane, lanes.address[lane]) + k * sizeof(T), &value[k][lane], sizeof(T));
    }
    return;
  }
  access(w, I, Access::Store, I.space, mask, n * sizeof(T), I.element, lanes, "store");
  if (w.launch->timing && I.order != Order::Weak &&
      space_of(I.space, lanes.address[__builtin_ctz(mask)]) == Space::Global) {
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      T values[kMost];
      for (int k = 0; k < n; k++) values[k] = value[k][lane];
      w.launch->timing->strong_store(w, lanes.pointer[lane], values, n * sizeof(T));
    }
    return;
  }
  if (tears(w, I, n * sizeof(T), lanes, mask) && (w.launch->simulator->random() >> 17 & 3)) {
    const int late = w.launch->simulator->random() >> 13 & 1;
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      u64 halves[2];
      for (int k = 0; k < n; k++) memcpy(reinterpret_cast<u8*>(halves) + k * sizeof(T), &value[k][lane], sizeof(T));
      memcpy(lanes.pointer[lane] + 8 * !late, &halves[!late], 8);
      w.late_stores.push_back({reinterpret_cast<u64*>(lanes.pointer[lane] + 8 * late), halves[late]});
    }
    w.suspend = true;
    return;
  }
  if (lanes.contiguous && n == 1) {
    memcpy(lanes.pointer[0], value[0], sizeof(T) * kLanes);
    return;
  }
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    for (int k = 0; k < n; k++) memcpy(lanes.pointer[lane] + k * sizeof(T), &value[k][lane], sizeof(T));
  }
}

void decode_ld(Decoder& d) {
  Instruction& I = d.I;
  decode_memory_words(d);
  I.type = d.types[0];
  if (I.type == Type::B128) I.type = Type::B64, I.vector = 2;  // the register is a pair
  I.element = size_of(I.type);
  d.operand(0, d.operands[0], I.type);
  d.operand(1, d.operands[1], I.type);
  adopt_space(I, I.op[1]);
  I.polls = I.order != Order::Weak;
  switch (I.element) {
    case 1:
      return d.run(load<u8>);
    case 2:
      return d.run(load<u16>);
    case 4:
      return d.run(load<u32>);
    default:
      return d.run(load<u64>);
  }
}

void decode_st(Decoder& d) {
  Instruction& I = d.I;
  decode_memory_words(d);
  I.type = d.types[0];
  if (I.type == Type::B128) I.type = Type::B64, I.vector = 2;
  I.element = size_of(I.type);
  d.operand(0, d.operands[0], I.type);
  d.operand(1, d.operands[1], I.type);
  adopt_space(I, I.op[0]);
  switch (I.element) {
    case 1:
      return d.run(store<u8>);
    case 2:
      return d.run(store<u16>);
    case 4:
      return d.run(store<u32>);
    default:
      return d.run(store<u64>);
  }
}

// ---- atom and red

enum AtomicOp : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareSwap, kIncrement, kDecrement };
const char* const kAtomicNames[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

template <class T>
T combine(u8 op, T old, T b, T c) {
  if constexpr (is_half<T>) {
    switch (op) {
      case kAdd:
        return T(widen(old) + widen(b));
      case kMin:
        return widen(b) < widen(old) ? b : old;
      case kMax:
        return widen(b) > widen(old) ? b : old;
      case kExchange:
        return b;
      default:
        return old.bits == b.bits ? c : old;
    }
  } else {
    switch (op) {
      case kAdd:
        return old + b;
      case kMin:
        return std::min(old, b);
      case kMax:
        return std::max(old, b);
      case kExchange:
        return b;
      case kCompareSwap:
        return old == b ? c : old;
      case kIncrement:
        return old >= b ? T(0) : static_cast<T>(old + 1);
      case kDecrement:
        return old == 0 || old > b ? b : static_cast<T>(old - 1);
      default:
        break;
    }
    if constexpr (std::is_integral_v<T>) {
      if (op == kAnd) return old & b;
      if (op == kOr) return old | b;
      return old ^ b;
    }
    return old;
  }
}

// kPairs: T is one half of a 32-bit element. c: 1 if there is a result (atom), 0 for red
template <class T, bool kPairs = false>
void atomic(Warp& w, const Instruction& I, u32 mask) {
  using E = std::conditional_t<kPairs, u32, T>;
  const Operand &where = I.op[I.c], &value = I.op[I.c + 1];
  E sb[kLanes], sc[kLanes], r[kLanes];
  const E *b = read(w, value, sb), *c = I.a == kCompareSwap ? read(w, I.op[I.c + 2], sc) : sc;
  Lanes lanes;
  addresses(w, where, lanes.address);
  access(w, I, Access::Atomic, I.space, mask, sizeof(E), sizeof(E), lanes, "atomic");
  Simulator& s = *w.launch->simulator;
  for (u32 m = mask; m; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    E old, fresh;
    memcpy(&old, lanes.pointer[lane], sizeof(E));
    if constexpr (kPairs) {
      fresh = combine<T>(I.a, T::raw(old), T::raw(b[lane]), T::raw(0)).bits |
              u32(combine<T>(I.a, T::raw(old >> 16), T::raw(b[lane] >> 16), T::raw(0)).bits) << 16;
    } else {
      fresh = combine<T>(I.a, old, b[lane], c[lane]);
    }
    memcpy(lanes.pointer[lane], &fresh, sizeof(E));
    s.progress += memcmp(&old, &fresh, sizeof(E)) != 0;
    r[lane] = old;
    const u64 address = lanes.address[lane];
    const Space space = space_of(I.space, address);
    if (space == Space::Shared) {
      s.counters.atom_shared++;
    } else if (space == Space::Global) {
      s.counters.atom_global++;
      if (Allocation* a = s.memory.find(address)) a->traffic->atomics++;
      if (w.launch->grid_sync && address - w.launch->grid_sync < 256) s.counters.grid_arrive++;
      atomic_order(w, I, address);
    }
  }
  if (I.c) write(w, I.op[0], mask, r);
}

void decode_atomic(Decoder& d) {
  Instruction& I = d.I;
  decode_memory_words(d);
  if (I.order == Order::Weak) I.order = Order::Relaxed;  // 9.7.13: the default of atom and red
  I.wide_scope = !d.has("cta") && !d.has("cluster");     // gpu scope is the default
  if (I.vector > 1) d.unsupported("vector atomics");
  I.a = 255;
  for (int k = 0; k < 10; k++)
    if (d.has(kAtomicNames[k])) I.a = k;
  if (I.a == 255) d.unsupported("atomic operation");
  I.c = d.words[0] == "atom";
  d.all(d.types[0]);
  adopt_space(I, I.op[I.c]);
  I.polls = I.c;
  switch (d.types[0]) {
    case Type::U32:
    case Type::B32:
      return d.run(atomic<u32>);
    case Type::S32:
      return d.run(atomic<s32>);
    case Type::U64:
    case Type::B64:
      return d.run(atomic<u64>);
    case Type::S64:
      return d.run(atomic<s64>);
    case Type::B16:
      return d.run(atomic<u16>);
    case Type::F32:
      return d.run(atomic<float>);
    case Type::F64:
      return d.run(atomic<double>);
    case Type::F16:
      return d.run(atomic<f16>);
    case Type::BF16:
      return d.run(atomic<bf16>);
    case Type::F16X2:
      return d.run(atomic<f16, true>);
    case Type::BF16X2:
      return d.run(atomic<bf16, true>);
    default:
      d.unsupported("type");
  }
}

// ---- cp.async. With the option `defer` a copy lands when its group is waited for, and its target is NaN
// until then.

void land(Warp& w, const AsyncCopy& copy, int lane) {
  const Instruction& I = w.launch->program->code[copy.pc];
  u8* target = &w.block->shared[copy.target];
  shared_write_lands(w, copy.target, copy.bytes, lane);
  if (copy.source_bytes) {
    check_late_read(w, I, copy.source, copy.source_bytes);
    memcpy(target, reinterpret_cast<const u8*>(copy.source), copy.source_bytes);
  }
  memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void copy_async(Warp& w, const Instruction& I,
                u32 mask) {  // a: operand 3 is 1 a source size, 2 a predicate to ignore the source
  const u32 bytes = static_cast<u32>(I.op[2].immediate);
  Simulator& s = *w.launch->simulator;
  Lanes target, source;
  addresses(w, I.op[0], target.address);
  addresses(w, I.op[1], source.address);
  u32 size[kLanes], space[kLanes], partial = 0, full = mask;
  for (u32& n : size) n = bytes;
  if (I.a == 1) {
    const u32* p = read(w, I.op[3], space);
    for (int i = 0; i < kLanes; i++) size[i] = std::min(p[i], bytes);
  } else if (I.a == 2) {
    u32 ignore = read_mask(w, I.op[3]);
    for (int i = 0; i < kLanes; i++)
      if (ignore >> i & 1) size[i] = 0;
  }
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    if (size[lane] == bytes) continue;
    full &= ~(1u << lane);
    if (size[lane]) partial |= 1u << lane;
    if (source.address[lane] & (bytes - 1))
      fail("misaligned cp.async source 0x%llx for %u bytes", (unsigned long long)source.address[lane], bytes);
  }
  access(w, I, Access::Load, Space::Global, full, bytes, 4, source, "cp.async load");
  s.counters.cp_async_bytes += u64(bytes) * __builtin_popcount(full);
  for (u32 m = partial; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    for (u32 k = 0; k < size[lane]; k++)
      access_one(w, I, Access::Load, Space::Global, source.address[lane] + k, 1, lane, "cp.async load");
    s.counters.cp_async_bytes += size[lane];
  }
  access(w, I, Access::Store, Space::Shared, mask, bytes, 4, target, "cp.async store");
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    AsyncCopy copy{u64(target.pointer[lane] - w.block->shared.data()), source.address[lane], bytes, size[lane], w.pc};
    if (s.options.defer) {
      memset(target.pointer[lane], 0xff, bytes);
      w.pending[lane].push_back(copy);
    } else {
      land(w, copy, lane);
    }
  }
}

void commit_group(Warp& w, const Instruction&, u32 mask) {
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    w.groups[lane].push_back(std::move(w.pending[lane]));
    w.pending[lane].clear();
  }
}

void wait_group(Warp& w, const Instruction& I, u32 mask) {  // a: wait_all
  const size_t leave = I.a ? 0 : I.op[0].immediate;
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    auto& groups = w.groups[lane];
    while (groups.size() > leave) {
      for (const AsyncCopy& copy : groups.front()) land(w, copy, lane);
      groups.pop_front();
    }
    if (!I.a) continue;
    for (const AsyncCopy& copy : w.pending[lane]) land(w, copy, lane);
    w.pending[lane].clear();
  }
}

void decode_cp_async(Decoder& d) {
  d.operand(0, d.operands[0], Type::B32);
  d.operand(1, d.operands[1], Type::B64);
  d.operand(2, d.operands[2], Type::B32);
  size_t extra = d.operands.size() - 3 - (d.has("L2::cache_hint") ? 1 : 0);
  if (extra > 0 && d.operands.size() > 3) {
    d.operand(3, d.operands[3], Type::U32);
    const Operand& o = d.I.op[3];
    d.I.a = o.kind == Operand::Register && o.width == 1 ? 2 : 1;
  }
  d.run(copy_async);
}

// ---- the rest

void do_fence(Warp& w, const Instruction&, u32 mask) {
  if (mask) fence(w);
}
void nothing(Warp&, const Instruction&, u32) {}

void zero_result(Warp& w, const Instruction& I, u32 mask) {
  u64 r[kLanes] = {};
  write(w, I.op[0], mask, r);
}

u64 window(Space s) {
  return s == Space::Shared ? kSharedWindow : s == Space::Local ? kLocalWindow : s == Space::Param ? kParamWindow : 0;
}

void convert_address(Warp& w, const Instruction& I, u32 mask) {  // a: from generic
  u64 s[kLanes], r[kLanes];
  const u64* a = read(w, I.op[1], s);
  const u64 base = window(I.space);
  for (int i = 0; i < kLanes; i++) r[i] = !base ? a[i] : I.a ? a[i] & ~kWindowMask : (a[i] & ~kWindowMask) | base;
  write(w, I.op[0], mask, r);
}

void is_space(Warp& w, const Instruction& I, u32 mask) {
  u64 s[kLanes];
  u8 r[kLanes];
  const u64* a = read(w, I.op[1], s);
  for (int i = 0; i < kLanes; i++) r[i] = space_of(Space::Generic, a[i]) == I.space;
  write(w, I.op[0], mask, r);
}

constexpr const char* kMemoryTypes = "b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64 f16 bf16";

}  // namespace

extern const Entry kMemoryTable[];
const Entry kMemoryTable[] = {
    // opcode, types, modifiers, section of the PTX ISA, meaning
    {"ld", kMemoryTypes,
     "weak relaxed acquire volatile cta gpu sys global shared shared::cta local param param::entry "
     "param::func const nc v2 v4 v8 ca cg cs lu cv L1::* L2::*",
     "Data Movement and Conversion: ld, ld.global.nc", decode_ld},
    {"ldu", kMemoryTypes, "global v2 v4", "Data Movement and Conversion", decode_ld},
    {"st", kMemoryTypes,
     "weak relaxed release volatile cta gpu sys global shared shared::cta local param param::func v2 v4 v8 "
     "wb cg cs wt L1::* L2::*",
     "Data Movement and Conversion: st", decode_st},
    {"atom", "b16 b32 b64 u32 u64 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64",
     "relaxed acquire release acq_rel cta gpu sys global shared shared::cta noftz add min max and or xor "
     "exch cas inc dec",
     "Parallel Synchronization and Communication: atom", decode_atomic},
    {"red", "b32 b64 u32 u64 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64",
     "relaxed release cta gpu sys global shared shared::cta noftz add min max and or xor inc dec",
     "Parallel Synchronization and Communication: red", decode_atomic},
    {"cp.async", "", "ca cg shared shared::cta global L2::*",
     "Data Movement and Conversion: non-bulk asynchronous copy", decode_cp_async},
    {"cp.async.commit_group", "", "", "Data Movement and Conversion: non-bulk asynchronous copy",
     [](Decoder& d) { d.run(commit_group); }},
    {"cp.async.wait_group", "", "", "Data Movement and Conversion: non-bulk asynchronous copy",
     [](Decoder& d) {
       d.all(Type::U32);
       d.run(wait_group);
     }},
    {"cp.async.wait_all", "", "", "Data Movement and Conversion: non-bulk asynchronous copy",
     [](Decoder& d) {
       d.I.a = 1;
       d.run(wait_group);
     }},
    {"fence", "", "sc acq_rel acquire release cta gpu sys", "Parallel Synchronization and Communication: membar, fence",
     [](Decoder& d) { d.run(d.has("cta") ? nothing : do_fence); }},
    {"membar", "", "cta gl sys", "Parallel Synchronization and Communication: membar, fence",
     [](Decoder& d) { d.run(d.has("cta") ? nothing : do_fence); }},
    {"prefetch", "", "global local L1 L2 L2::*", "Data Movement and Conversion", [](Decoder& d) { d.run(nothing); }},
    {"prefetchu", "", "L1", "Data Movement and Conversion", [](Decoder& d) { d.run(nothing); }},
    {"applypriority", "", "global L2::*", "Data Movement and Conversion", [](Decoder& d) { d.run(nothing); }},
    {"createpolicy", "b64", "fractional range global L2::*", "Data Movement and Conversion",
     [](Decoder& d) {
       d.operand(0, d.operands[0], Type::B64);
       d.run(zero_result);
     }},
    {"cvta", "u64", "to global shared shared::cta local const param", "Data Movement and Conversion",
     [](Decoder& d) {
       decode_memory_words(d);
       d.all(Type::B64);
       d.I.a = d.has("to");
       d.run(convert_address);
     }},
    {"isspacep", "", "global shared shared::cta local const param", "Data Movement and Conversion",
     [](Decoder& d) {
       decode_memory_words(d);
       d.all(Type::B64);
       d.run(is_space);
     }},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace ptxsim
