// State of a running kernel: grid, blocks, warps; memory and its checks; counters.
#pragma once

#include <array>
#include <deque>

#include "program.h"

namespace ptxsim {

// ---- counters: what launches did, summed over all warps. Exact for the PTX; no cache is modelled.
// Bytes are active lanes x access size; sectors the distinct aligned 32-byte pieces one warp access touches.
// clang-format off
#define PTXSIM_COUNTERS(X)                                                                              \
  X(launches) X(blocks) X(warp_instr)                                                                   \
  X(global_ld) X(global_ld_bytes) X(global_ld_sectors) X(global_st) X(global_st_bytes) X(global_st_sectors) \
  X(cp_async_bytes) X(strong_ld) X(polls) X(poll_bytes) X(poll_sectors)                                 \
  X(shared_ld_bytes) X(shared_st_bytes) X(local_ld_bytes) X(local_st_bytes)                             \
  X(mma) X(mma_flops) X(bar_block) X(bar_warp) X(grid_arrive) X(atom_global) X(atom_shared)             \
  X(ex2) X(tanh) X(rcp) X(div) X(sfu_other) X(shfl)
// clang-format on

struct Counters {
#define X(name) u64 name = 0;
  PTXSIM_COUNTERS(X)
#undef X
};

// Global traffic of one allocation.
struct Traffic {
  u64 ld_bytes = 0, ld_sectors = 0, st_bytes = 0, st_sectors = 0, atomics = 0, poll_bytes = 0;
};

// ---- who wrote what in this launch, for the cross-block check (memory.cpp)
constexpr int kPageShift = 12;
constexpr int kCellShift = 1;  // one cell per 2 bytes

struct ShadowPage {
  u64 cells[(1 << kPageShift) >> kCellShift];
};

struct Allocation {
  u64 begin = 0, end = 0;
  int references = 0;
  Traffic* traffic = nullptr;
  std::vector<ShadowPage*> pages;  // empty until a kernel of this launch writes here
};

using Clock = std::vector<u32>;  // per block: everything it did up to this time is known

struct Memory {
  Allocation* find(u64 address);
  void add(u64 address, u64 bytes);
  void remove(u64 address);
  Traffic& traffic(u64 base) { return traffic_[base]; }
  void reset_traffic();
  u64* cell(Allocation&, u64 address);  // makes the page
  void forget_writes();                 // between launches

  std::map<u64, Allocation> allocations;
  std::vector<std::pair<Allocation*, size_t>> touched;
  std::vector<ShadowPage*> free_pages;
  std::map<u64, Traffic> traffic_;
  Allocation* last = nullptr;
};

struct Chip {
  const char* name;
  int sm;  // compute capability x 10
  int sms, threads_per_sm, blocks_per_sm, registers_per_sm;
  int shared_per_sm, shared_per_block, reserved_shared_per_block;  // bytes; per block: opt-in limit
  const char* source;
};

const Chip* find_chip(const std::string& name);
extern const Chip kChips[];
extern const int kChipCount;

struct Resources {    // of a compiled kernel
  int registers = 0;  // 0: not known
};

// Blocks of this kernel that fit on one SM at a time; 0 if not even one does, and then `why` says what is
// short.
int blocks_per_sm(const Chip&, int threads, int registers, u64 shared_bytes, std::string* why);

struct Options {
  u64 seed = 0;                       // 0: warps and blocks in order; else random
  bool torn = false;                  // 16-byte global accesses arrive in two halves
  bool check = true;                  // bounds of global memory
  bool races = true;                  // cross-block check
  bool shared_races = true;           // the same in shared memory, among the warps of a block and the lanes of a warp
  bool defer = true;                  // cp.async lands at its wait
  u64 limit = 0;                      // warp instructions before a launch is given up
  u64 resident = 264;                 // blocks simulated at a time in an ordinary launch
  bool clock = false;                 // the warp with the least time runs (clock.h)
  u64 load_ns = 200, store_ns = 250;  // R and S
  const Chip* chip = nullptr;
};

struct Fragment {  // lanes of a warp that share a program counter
  enum Wait : u8 { Running, AtWarpSync, AtBarrier };
  u32 mask;
  int pc;
  Wait wait = Running;
  int barrier = 0;
};

struct CallFrame {
  int function, call;  // called function; the call instruction
};

struct AsyncCopy {
  u64 target, source;
  u32 bytes, source_bytes;
  int pc;
};

struct Block;
struct Launch;

struct Warp {
  u8* registers = nullptr;
  Block* block = nullptr;
  Launch* launch = nullptr;
  int index = 0;
  u32 live = 0;
  std::vector<Fragment> fragments;
  std::vector<u8> local, call;  // .local and call parameters, per lane
  std::vector<std::vector<CallFrame>> stack;
  std::vector<AsyncCopy> pending[kLanes];
  std::deque<std::vector<AsyncCopy>> groups[kLanes];
  std::vector<std::array<u64, kLanes>> polled;  // by poll slot: addresses of the last read
  int pc = -1;                                  // of the instruction in progress, for messages
  u32 mask = 0;
  u32 carry = 0;
  u32 syncs = 0;  // bar.warp.sync passed
  struct WarpClock* clock = nullptr;
  bool yielded = false, alternate = false;

  // Torn accesses. A store leaves its second halves here; a load is run twice, the second time for the other
  // half.
  bool suspend = false;
  std::vector<std::pair<u64*, u64>> late_stores;
  bool load_half_done = false;
  int late_half = 0;
  u64 early[kLanes];
};

// 4 bytes of shared memory: which lanes of the warp that was there last touched it since those lanes synchronised.
struct LaneCell {
  u32 since = 0, readers = 0;
  u8 warp = 0, writer = 0;  // lane + 1, or more than that: several
};

struct NamedBarrier {
  u32 arrived = 0, expected = 0;
  u32 any = 0, all = 1, population = 0;
  double latest = 0;  // arrival, by the clock
};

struct Block {
  u32 x, y, z;
  u64 id;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<u64> shared_cells;  // who touched it since the last barrier; empty: not followed
  std::vector<LaneCell> lane_cells;
  u32 barriers_opened = 1;
  NamedBarrier barriers[16];
  u32 live = 0;
  std::shared_ptr<struct BlockClock> clock;
  // cross-block order
  u32 time = 1;                         // own component of the vector clock
  Clock known;                          // empty: only itself
  std::shared_ptr<const Clock> fenced;  // what its last fence made releasable
  Clock observed;                       // what strong reads saw since the last fence
};

struct Launch {
  struct Simulator* simulator = nullptr;
  Program* program = nullptr;
  Function* function = nullptr;
  u32 grid[3], block[3];
  u32 threads = 0, dynamic_shared = 0;
  std::vector<u8> parameters;
  u64 grid_sync = 0;  // cooperative launches: the word that cooperative groups count on
  u64 total_blocks = 0;
  bool check_races = false;
  struct Timing* timing = nullptr;                                 // with the option clock
  std::unordered_map<u64, std::shared_ptr<const Clock>> releases;  // location -> what reading it makes known
};

struct Simulator {
  Options options;
  Counters counters;
  Memory memory;
  std::unordered_map<std::string, Resources> resources;
  std::string error;
  std::string clock_report;  // of the last launch with the option clock
  u64 clock = 0;             // warp instructions ever run
  u64 progress = 0;          // changes of memory, barriers passed, lanes gone
  u64 rng = 88172645463325252ull;

  u64 random() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
  }
  void launch(Program&, int kernel, const u32 grid[3], const u32 block[3], u32 shared, void** arguments,
              bool cooperative);
};

Simulator& simulator();

// ---- memory access by a warp (memory.cpp)
constexpr u64 kWindowMask = 0xff00000000000000ull;
constexpr u64 kSharedWindow = 0x0100000000000000ull;
constexpr u64 kLocalWindow = 0x0200000000000000ull;
constexpr u64 kParamWindow = 0x0300000000000000ull;
constexpr u64 kFunctionWindow = 0x0f00000000000000ull;

Space space_of(Space declared, u64 address);

enum class Access : u8 { Load, Store, Atomic };

struct Lanes {
  u64 address[kLanes];
  u8* pointer[kLanes];
  bool contiguous = false;  // all lanes active, one after the other
};

void addresses(Warp&, const Operand&, u64* out);
// Checks alignment, bounds and cross-block order, counts, and fills lanes.pointer. `bytes` per lane.
void access(Warp&, const Instruction&, Access, Space, u32 mask, u32 bytes, u32 element, Lanes&, const char* what);
u8* access_one(Warp&, const Instruction&, Access, Space, u64 address, u32 bytes, int lane, const char* what);
void shared_write_lands(Warp&, u64 offset, u32 bytes, int lane);  // a copy that lands in shared memory
void check_late_read(Warp&, const Instruction&, u64 address,
                     u32 bytes);  // cross-block check alone: a copy that lands
void fence(Warp&);
void atomic_order(Warp&, const Instruction&,
                  u64 address);  // release and acquire of an atomic on global memory
u8* call_parameter(Warp&, int lane, u64 offset);

}  // namespace ptxsim
