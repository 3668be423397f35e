// Global allocations, bounds, alignment, traffic counts, and the check of reads across blocks.
//
// The cross-block check follows the memory consistency model of the PTX ISA (chapter 8). A pair of accesses
// to one location by two blocks, one of them a write, is in order if
//   - both are morally strong: relaxed, acquire, release, acq_rel, volatile or atomic, at gpu or sys scope,
//   and overlap
//     completely: same address, same element size (a vector access is its elements; .b128 is two 64-bit
//     elements), or
//   - a chain of release and acquire leads from the write to the read. Release: st.release, atom.release, or
//   a fence and
//     then a strong write; acquire: ld.acquire, atom.acquire, or a strong read and then a fence. grid.sync()
//     is such a chain.
// Clocks are kept per block, not per thread: barriers inside a block are taken to be right here.
// Writes over unordered writes of another block are reported as well. Byte-sized elements are not followed.

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>

#include "clock.h"

namespace ptxsim {

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(text);
}

// ---- allocations

void Memory::add(u64 address, u64 bytes) {
  if (!bytes) return;
  Allocation& a = allocations[address];
  a.begin = address;
  a.end = std::max(a.end, address + bytes);
  a.references++;
  a.traffic = &traffic_[address];
}

void Memory::remove(u64 address) {
  auto it = allocations.find(address);
  if (it == allocations.end() || --it->second.references > 0) return;
  last = nullptr;
  allocations.erase(it);
}

Allocation* Memory::find(u64 address) {
  if (last && address >= last->begin && address < last->end) return last;
  auto it = allocations.upper_bound(address);
  if (it == allocations.begin()) return nullptr;
  --it;
  if (address >= it->second.end) return nullptr;
  return last = &it->second;
}

void Memory::reset_traffic() {
  for (auto& [base, t] : traffic_) t = Traffic();
}

u64* Memory::cell(Allocation& a, u64 address) {
  u64 offset = address - a.begin;
  size_t page = offset >> kPageShift;
  if (a.pages.empty()) a.pages.resize(((a.end - a.begin) >> kPageShift) + 1);
  if (!a.pages[page]) {
    ShadowPage* fresh;
    if (free_pages.empty()) {
      fresh = new ShadowPage;
    } else {
      fresh = free_pages.back();
      free_pages.pop_back();
    }
    memset(fresh, 0, sizeof *fresh);
    a.pages[page] = fresh;
    touched.push_back({&a, page});
  }
  return &a.pages[page]->cells[(offset & ((1u << kPageShift) - 1)) >> kCellShift];
}

void Memory::forget_writes() {
  for (auto& [a, page] : touched) {
    free_pages.push_back(a->pages[page]);
    a->pages[page] = nullptr;
  }
  for (auto& [a, page] : touched) a->pages.clear();
  touched.clear();
}

// ---- order between blocks

namespace {

// A cell: who wrote this location last. 0: nobody in this launch.
constexpr int kBlockBits = 20, kTimeBits = 20, kLineBits = 20;
constexpr u32 kMaxBlocks = (1u << kBlockBits) - 2;

u64 make_cell(u64 block, u32 time, int line, bool strong, u32 element) {
  u64 size = element == 8 ? 3 : element == 4 ? 2 : element == 2 ? 1 : 0;
  return (block + 1) | u64(std::min(time, (1u << kTimeBits) - 1)) << kBlockBits |
         u64(line & ((1 << kLineBits) - 1)) << (kBlockBits + kTimeBits) | u64(strong) << 60 | size << 61;
}
u64 cell_block(u64 c) { return (c & ((1u << kBlockBits) - 1)) - 1; }
u32 cell_time(u64 c) { return (c >> kBlockBits) & ((1u << kTimeBits) - 1); }
int cell_line(u64 c) { return (c >> (kBlockBits + kTimeBits)) & ((1 << kLineBits) - 1); }
bool cell_strong(u64 c) { return c >> 60 & 1; }
u32 cell_element(u64 c) { return 1u << (c >> 61); }

bool is_strong(const Instruction& I) { return I.order != Order::Weak && I.wide_scope; }

bool ordered(const Block& b, u64 cell) {
  u64 writer = cell_block(cell);
  return writer == b.id || (writer < b.known.size() && b.known[writer] >= cell_time(cell));
}

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

std::shared_ptr<const Clock> snapshot(const Warp& w) {
  Block& b = *w.block;
  auto clock = std::make_shared<Clock>(b.known);
  clock->resize(w.launch->total_blocks);
  (*clock)[b.id] = b.time;
  b.time++;
  return clock;
}

std::string block_name(const Launch& l, u64 id) {
  char text[64];
  snprintf(text, sizeof text, "(%llu,%llu,%llu)", (unsigned long long)(id % l.grid[0]),
           (unsigned long long)(id / l.grid[0] % l.grid[1]), (unsigned long long)(id / ((u64)l.grid[0] * l.grid[1])));
  return text;
}

[[noreturn]] void report_race(const Warp& w, const Instruction& I, u64 address, u32 element, u64 cell,
                              const char* doing) {
  const char* why = !is_strong(I) && !cell_strong(cell) ? "both accesses are weak"
                    : !is_strong(I)                     ? "this access is weak"
                    : !cell_strong(cell)                ? "the write was weak"
                                                        : "their element sizes differ";
  fail(
      "RACE between blocks: block %s %s %u bytes at 0x%llx, written by block %s in this launch at PTX line "
      "%d "
      "(%u-byte elements), %s, and no release/acquire chain orders them",
      block_name(*w.launch, w.block->id).c_str(), doing, element, (unsigned long long)address,
      block_name(*w.launch, cell_block(cell)).c_str(), cell_line(cell), cell_element(cell), why);
}

void acquire_from(Warp& w, const Instruction& I, u64 address) {
  auto it = w.launch->releases.find(address);
  if (it == w.launch->releases.end()) return;
  join(w.block->observed, *it->second);
  if (I.order == Order::Acquire || I.order == Order::AcqRel) join(w.block->known, *it->second);
}

void check_read(Warp& w, const Instruction& I, Allocation& a, u64 address, u32 bytes, u32 element) {
  const bool strong = is_strong(I);
  if (strong && !w.launch->releases.empty())
    for (u32 i = 0; i < bytes; i += element) acquire_from(w, I, address + i);
  if (a.pages.empty()) return;
  u64 offset = address - a.begin;
  const ShadowPage* page = a.pages[offset >> kPageShift];
  if (!page) return;
  const u64* cells = &page->cells[(offset & ((1u << kPageShift) - 1)) >> kCellShift];
  const Block& b = *w.block;
  for (u32 i = 0; i < std::max(1u, bytes >> kCellShift); i++) {
    u64 cell = cells[i];
    if (!cell) continue;
    if (I.read_only)
      fail(
          "ld.global.nc of 0x%llx, which this launch wrote (PTX line %d): the non-coherent cache may hold "
          "old data",
          (unsigned long long)(address + (i << kCellShift)), cell_line(cell));
    if (ordered(b, cell) || element == 1 || cell_element(cell) == 1) continue;
    if (strong && cell_strong(cell) && cell_element(cell) == element) continue;
    report_race(w, I, address + (i << kCellShift), element, cell, "reads");
  }
}

void stamp_write(Warp& w, const Instruction& I, Allocation& a, u64 address, u32 bytes, u32 element) {
  const bool strong = is_strong(I);
  Block& b = *w.block;
  u64* cells = w.launch->simulator->memory.cell(a, address);
  const u64 mine = make_cell(b.id, b.time, I.line, strong, element);
  for (u32 i = 0; i < std::max(1u, bytes >> kCellShift); i++) {
    u64 cell = cells[i];
    if (cell && !ordered(b, cell) && element > 1 && cell_element(cell) > 1 &&
        !(strong && cell_strong(cell) && cell_element(cell) == element))
      report_race(w, I, address + (i << kCellShift), element, cell, "writes");
    cells[i] = mine;
  }
}

void release_to(Warp& w, const Instruction& I, u64 address, bool keep) {
  auto& releases = w.launch->releases;
  std::shared_ptr<const Clock> clock = w.block->fenced;
  if (I.order == Order::Release || I.order == Order::AcqRel) clock = snapshot(w);
  auto it = releases.find(address);
  if (!clock) {
    if (it != releases.end() && !keep) releases.erase(it);
    return;
  }
  if (it != releases.end() && keep) {  // a read-modify-write continues the release sequence it read from
    auto both = std::make_shared<Clock>(*it->second);
    join(*both, *clock);
    it->second = both;
  } else {
    releases[address] = clock;
  }
}

bool follow(const Warp& w) { return w.launch->check_races && w.launch->total_blocks <= kMaxBlocks; }

// ---- order between the warps of a block. A cell per 4 bytes of shared memory: who wrote and who read it
// since the block's last barrier. Two warps may not meet there unless both only read, or both only write
// (often the same value).

constexpr int kReaderShift = 32, kEpochShift = 6;

void shared_meet(Warp& w, u64 offset, u32 bytes, bool store) {
  Block& b = *w.block;
  const u64 epoch = u64(b.barriers_opened & 0x3ffffffu) << kEpochShift, mine = w.index + 1;
  const u64 reader = 1ull << (kReaderShift + w.index);
  for (u64 i = offset >> 2, end = (offset + bytes + 3) >> 2; i < end; i++) {
    u64& cell = b.shared_cells[i];
    if ((cell & 0xffffffc0u) != epoch) cell = epoch;
    const u64 writer = cell & 63;
    if (store) {
      const u64 others = cell >> kReaderShift << kReaderShift & ~reader;
      if (others)
        fail("RACE in a block: warp %d writes shared offset 0x%llx, which warp %d read since the last barrier", w.index,
             (unsigned long long)(i << 2), __builtin_ctzll(others) - kReaderShift);
      cell = (cell & ~63ull) | mine;
    } else {
      if (writer && writer != mine)
        fail("RACE in a block: warp %d reads shared offset 0x%llx, which warp %d wrote since the last barrier", w.index,
             (unsigned long long)(i << 2), int(writer) - 1);
      cell |= reader;
    }
  }
}

// ---- order between the lanes of a warp, which nothing but bar.warp.sync and a block's barrier makes (it is one for
// all lanes here, whatever its mask). Here lanes run side by side, so that a result never shows a missing one.

void lanes_meet(Warp& w, u64 offset, u32 bytes, bool store, int lane) {
  const u32 since = w.block->barriers_opened + w.syncs, me = 1u << lane;
  for (u64 i = offset >> 2, end = (offset + bytes + 3) >> 2; i < end; i++) {
    LaneCell& cell = w.block->lane_cells[i];
    if (cell.since != since || cell.warp != w.index) cell = {since, 0, u8(w.index), 0};
    if (store) {
      if (const u32 others = cell.readers & ~me)
        fail("RACE in a warp: lane %d writes shared offset 0x%llx, which lane %d read with no bar.warp.sync since",
             lane, (unsigned long long)(i << 2), __builtin_ctz(others));
      cell.writer = !cell.writer || cell.writer == lane + 1 ? lane + 1 : kLanes + 1;
    } else {
      if (cell.writer && cell.writer != lane + 1)
        fail("RACE in a warp: lane %d reads shared offset 0x%llx, which %s wrote with no bar.warp.sync since", lane,
             (unsigned long long)(i << 2),
             cell.writer > kLanes ? "several lanes" : ("lane " + std::to_string(cell.writer - 1)).c_str());
      cell.readers |= me;
    }
  }
}

// ---- counting

u32 count_distinct(const Lanes& lanes, u32 mask, u32 bytes) {
  u64 sector[2 * kLanes];
  int n = 0;
  bool ascending = true;
  for (u32 m = mask; m; m &= m - 1) {
    u64 begin = lanes.address[__builtin_ctz(m)];
    u64 first = begin >> 5, last = (begin + bytes - 1) >> 5;
    ascending &= !n || first >= sector[n - 1];
    sector[n++] = first;
    if (last != first) sector[n++] = last;
  }
  if (!ascending) std::sort(sector, sector + n);
  u32 distinct = n > 0;
  for (int i = 1; i < n; i++) distinct += sector[i] != sector[i - 1];
  return distinct;
}

// The lanes of a strong load that read again what they read last.
u32 count_polls(Warp& w, const Instruction& I, u32 mask, u32 bytes, const Lanes& lanes, Allocation* common) {
  Simulator& s = *w.launch->simulator;
  s.counters.strong_ld++;
  auto& before = w.polled[I.poll_slot];
  u32 again = 0;
  for (u32 m = mask; m; m &= m - 1) {
    int lane = __builtin_ctz(m);
    again |= u32(before[lane] == lanes.address[lane]) << lane;
    before[lane] = lanes.address[lane];
  }
  if (!again) return 0;
  s.counters.polls++;
  s.counters.poll_bytes += u64(bytes) * __builtin_popcount(again);
  s.counters.poll_sectors += count_distinct(lanes, again, bytes);
  if (common) common->traffic->poll_bytes += u64(bytes) * __builtin_popcount(again);
  return again;
}

void count_global(Warp& w, const Instruction& I, bool store, u32 mask, u32 bytes, const Lanes& lanes,
                  Allocation* common) {
  Simulator& s = *w.launch->simulator;
  const u64 total = u64(bytes) * __builtin_popcount(mask);
  const u64 sectors = lanes.contiguous ? ((lanes.address[0] + total - 1) >> 5) - (lanes.address[0] >> 5) + 1
                                       : count_distinct(lanes, mask, bytes);
  if (common) {
    (store ? common->traffic->st_bytes : common->traffic->ld_bytes) += total;
    (store ? common->traffic->st_sectors : common->traffic->ld_sectors) += sectors;
  } else {
    Allocation* a = nullptr;
    for (u32 m = mask; m; m &= m - 1) {
      a = s.memory.find(lanes.address[__builtin_ctz(m)]);
      if (a) (store ? a->traffic->st_bytes : a->traffic->ld_bytes) += bytes;
    }
    if (a) (store ? a->traffic->st_sectors : a->traffic->ld_sectors) += sectors;
  }
  if (store) {
    s.counters.global_st++;
    s.counters.global_st_bytes += total;
    s.counters.global_st_sectors += sectors;
    if (w.launch->timing) w.launch->timing->global_access(w, mask, bytes, lanes.address, sectors, true, false);
    return;
  }
  s.counters.global_ld++;
  s.counters.global_ld_bytes += total;
  s.counters.global_ld_sectors += sectors;
  u32 again = 0;
  if (I.poll_slot >= 0) again = count_polls(w, I, mask, bytes, lanes, common);
  if (w.launch->timing) w.launch->timing->global_access(w, mask, bytes, lanes.address, sectors, false, again != 0);
}

void global_access(Warp& w, const Instruction& I, Access kind, u32 mask, u32 bytes, u32 element, Lanes& lanes,
                   const char* what) {
  Simulator& s = *w.launch->simulator;
  const int first = __builtin_ctz(mask);
  u64 low = lanes.address[first], high = low;
  bool run = mask == kFullMask;
  if (run) {
    u64 gaps = 0;
    for (int i = 1; i < kLanes; i++) gaps |= lanes.address[i] - lanes.address[i - 1] - bytes;
    run = gaps == 0;
  }
  lanes.contiguous = run;
  if (run) {
    high = lanes.address[kLanes - 1];
  } else {
    for (u32 m = mask; m; m &= m - 1) {
      u64 a = lanes.address[__builtin_ctz(m)];
      low = std::min(low, a);
      high = std::max(high, a);
    }
  }
  Allocation* common = s.memory.find(low);
  if (common && high + bytes > common->end) common = nullptr;
  if (!common && s.options.check)
    for (u32 m = mask; m; m &= m - 1) {
      u64 a = lanes.address[__builtin_ctz(m)];
      Allocation* one = s.memory.find(a);
      if (!one || a + bytes > one->end)
        fail("%s of %u bytes at 0x%llx by lane %d is outside every allocation%s", what, bytes, (unsigned long long)a,
             __builtin_ctz(m),
             a < 4096 ? " (null pointer?)"
             : one    ? " (runs over the end of one)"
                      : "");
    }
  for (int i = 0; i < kLanes; i++) lanes.pointer[i] = reinterpret_cast<u8*>(lanes.address[i]);
  if (kind != Access::Atomic) count_global(w, I, kind == Access::Store, mask, bytes, lanes, common);
  if (kind != Access::Load) s.progress += kind == Access::Store;
  if (!follow(w)) return;
  if (kind == Access::Load && common && common->pages.empty() && (w.launch->releases.empty() || !is_strong(I))) return;
  for (u32 m = mask; m; m &= m - 1) {
    u64 address = lanes.address[__builtin_ctz(m)];
    Allocation* a = common ? common : s.memory.find(address);
    if (!a) continue;
    if (kind != Access::Store) check_read(w, I, *a, address, bytes, element);
    if (kind != Access::Load) stamp_write(w, I, *a, address, bytes, element);
    if (kind == Access::Store && is_strong(I) &&
        (I.order == Order::Release || w.block->fenced || !w.launch->releases.empty()))
      for (u32 i = 0; i < bytes; i += element) release_to(w, I, address + i, false);
  }
}

}  // namespace

void fence(Warp& w) {
  if (!follow(w)) return;
  Block& b = *w.block;
  if (!b.observed.empty()) {
    join(b.known, b.observed);
    b.observed.clear();
  }
  b.fenced = snapshot(w);
}

void atomic_order(Warp& w, const Instruction& I, u64 address) {
  if (!follow(w) || !is_strong(I)) return;
  release_to(w, I, address, true);
}

// ---- addresses

Space space_of(Space declared, u64 address) {
  if (declared != Space::Generic) return declared;
  switch (address & kWindowMask) {
    case kSharedWindow:
      return Space::Shared;
    case kLocalWindow:
      return Space::Local;
    case kParamWindow:
      return Space::Param;
    default:
      return Space::Global;
  }
}

void addresses(Warp& w, const Operand& o, u64* out) {
  if (!o.has_base) {
    for (int i = 0; i < kLanes; i++) out[i] = o.immediate;
    return;
  }
  const u8* base = w.registers + o.offset;
  if (o.width == 8) {
    const u64* p = reinterpret_cast<const u64*>(base);
    for (int i = 0; i < kLanes; i++) out[i] = p[i] + o.immediate;
  } else {
    const u32* p = reinterpret_cast<const u32*>(base);
    for (int i = 0; i < kLanes; i++) out[i] = u32(p[i] + u32(o.immediate));
  }
}

u8* call_parameter(Warp& w, int lane, u64 offset) {
  return &w.call[size_t(lane) * w.launch->function->call_bytes + offset];
}

void access(Warp& w, const Instruction& I, Access kind, Space declared, u32 mask, u32 bytes, u32 element, Lanes& lanes,
            const char* what) {
  if (!mask) return;
  u64 bits = 0;
  if (mask == kFullMask) {
    for (int i = 0; i < kLanes; i++) bits |= lanes.address[i];
  } else {
    for (u32 m = mask; m; m &= m - 1) bits |= lanes.address[__builtin_ctz(m)];
  }
  if (bits & (bytes - 1))
    for (u32 m = mask; m; m &= m - 1)
      if (u64 a = lanes.address[__builtin_ctz(m)]; a & (bytes - 1))
        fail("misaligned %s of %u bytes at 0x%llx by lane %d", what, bytes, (unsigned long long)a, __builtin_ctz(m));
  Space space = declared;
  if (space == Space::Generic) {
    space = space_of(space, lanes.address[__builtin_ctz(mask)]);
    u32 other = 0;
    for (u32 m = mask; m; m &= m - 1) {
      int lane = __builtin_ctz(m);
      if (space_of(Space::Generic, lanes.address[lane]) != space) other |= 1u << lane;
    }
    if (other) {  // lanes that point into different spaces: each group on its own
      Lanes rest = lanes;
      access(w, I, kind, declared, other, bytes, element, rest, what);
      access(w, I, kind, declared, mask & ~other, bytes, element, lanes, what);
      for (u32 m = other; m; m &= m - 1) lanes.pointer[__builtin_ctz(m)] = rest.pointer[__builtin_ctz(m)];
      lanes.contiguous = false;
      return;
    }
  }
  Counters& c = w.launch->simulator->counters;
  const u64 total = u64(bytes) * __builtin_popcount(mask);
  lanes.contiguous = false;
  switch (space) {
    case Space::Shared: {
      u8* base = w.block->shared.data();
      const u64 size = w.block->shared.size();
      u64 high = 0;
      for (int i = 0; i < kLanes; i++) {
        u64 a = lanes.address[i] & 0xffffffffull;
        lanes.pointer[i] = base + a;
        high = std::max(high, (mask >> i & 1) ? a : 0);
      }
      if (high + bytes > size)
        fail("%s of %u bytes at shared offset 0x%llx, the block has %llu bytes", what, bytes, (unsigned long long)high,
             (unsigned long long)size);
      if (!w.block->lane_cells.empty() && kind != Access::Atomic && I.order == Order::Weak && bytes >= 4)
        for (u32 m = mask; m; m &= m - 1) {
          const int lane = __builtin_ctz(m);
          const u64 offset = lanes.address[lane] & 0xffffffffull;
          if (!w.block->shared_cells.empty()) shared_meet(w, offset, bytes, kind == Access::Store);
          lanes_meet(w, offset, bytes, kind == Access::Store, lane);
        }
      if (w.launch->timing) w.launch->timing->shared_access(w, mask, bytes, lanes.address);
      if (kind == Access::Load) c.shared_ld_bytes += total;
      if (kind == Access::Store) {
        c.shared_st_bytes += total;
        w.launch->simulator->progress++;
      }
      return;
    }
    case Space::Local: {
      const u64 size = w.launch->function->local_bytes;
      for (u32 m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        u64 a = lanes.address[lane] & 0xffffffffull;
        if (a + bytes > size)
          fail("%s of %u bytes at local offset 0x%llx of %llu", what, bytes, (unsigned long long)a,
               (unsigned long long)size);
        lanes.pointer[lane] = w.local.data() + size * lane + a;
      }
      (kind == Access::Load ? c.local_ld_bytes : c.local_st_bytes) += total;
      return;
    }
    case Space::Param:
      for (u32 m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        u64 a = lanes.address[lane] & ~kWindowMask;
        if (a + bytes > w.launch->parameters.size())
          fail("%s at kernel parameter offset %llu of %zu", what, (unsigned long long)a, w.launch->parameters.size());
        lanes.pointer[lane] = &w.launch->parameters[a];
      }
      return;
    case Space::Const:
      for (u32 m = mask; m; m &= m - 1) {
        int lane = __builtin_ctz(m);
        Allocation* a = w.launch->simulator->memory.find(lanes.address[lane]);
        if (!a || lanes.address[lane] + bytes > a->end)
          fail("%s of %u bytes at 0x%llx is outside every constant", what, bytes,
               (unsigned long long)lanes.address[lane]);
        lanes.pointer[lane] = reinterpret_cast<u8*>(lanes.address[lane]);
      }
      return;
    default:
      global_access(w, I, kind, mask, bytes, element, lanes, what);
  }
}

u8* access_one(Warp& w, const Instruction& I, Access kind, Space space, u64 address, u32 bytes, int lane,
               const char* what) {
  Lanes lanes;
  lanes.address[lane] = address;
  access(w, I, kind, space, 1u << lane, bytes, std::min(bytes, 8u), lanes, what);
  return lanes.pointer[lane];
}

void shared_write_lands(Warp& w, u64 offset, u32 bytes, int lane) {
  if (!w.block->shared_cells.empty()) shared_meet(w, offset, bytes, true);
  if (!w.block->lane_cells.empty()) lanes_meet(w, offset, bytes, true, lane);
}

void check_late_read(Warp& w, const Instruction& I, u64 address, u32 bytes) {
  if (!follow(w)) return;
  if (Allocation* a = w.launch->simulator->memory.find(address)) check_read(w, I, *a, address, bytes, 4);
}

}  // namespace ptxsim
