// A virtual clock: every warp has a time, every register the time at which it is ready. A model of dependences between
// PTX instructions and of what they share, for one chip; it says nothing of what ptxas does with them. Times are
// cycles.
#pragma once

#include <deque>
#include <unordered_set>

#include "machine.h"

namespace ptxsim {

// What a warp waits for: the unit that makes a value or that an instruction needs.
enum class Unit : u8 {
  Free,  // no instruction of the machine: moves between registers, kernel parameters
  Alu,
  Wide,
  Predicate,
  Branch,
  Special,
  Shuffle,
  Matrix,
  Shared,
  Load,
  Strong,
  Hbm,
  Store,
  Barrier,
  Count
};
constexpr int kUnits = int(Unit::Count);

struct UnitCost {
  const char* name;
  double latency, issue;  // until its result can be used; until its unit takes the next one of the same kind
  const char* source;
};
extern const UnitCost kUnitCosts[kUnits];

struct Throughput {
  const char* name;
  double value;
  const char* unit;
  const char* source;
};
extern const Throughput kThroughputs[];
extern const int kThroughputCount;
constexpr double kCyclesPerNs = 1.755;

// What is known of a register.
struct Ready {
  double at = 0;
  u32 round = 0, chain = 0;  // of strong loads that it depends on; of mma before it
  Unit unit = Unit::Free;
};

struct WarpClock {
  double time = 0;        // its next instruction cannot be issued before
  bool queued = false;    // it has a turn
  double start = 0;       // of the instruction at hand
  Unit why = Unit::Free;  // it waits until then
  std::vector<Ready> registers;
  std::deque<double> groups;  // cp.async: when a group has landed
  double pending = 0;         // of the group not yet committed
  u32 round = 0, decided = 0;
  bool again = false;  // the strong load just run read what it read before
  u32 sectors = 0, wavefronts = 1;
  bool first_touch = false;
  u32 rounds = 0;
};

// What the warps of a block share. One block on each multiprocessor.
struct BlockClock {
  double issue[4] = {}, matrix[4] = {}, special[4] = {}, shuffle = 0, shared = 0, port = 0;
  std::vector<WarpClock> warps;
};

struct LateStore {
  double seen;
  u8* where;
  u8 bytes;
  u8 value[32];
};

// A cp.async instruction, if it is one.
enum class CopyStep : u8 { None, Copy, Commit, WaitGroup, WaitAll };
u8 unit_number(const Instruction&);  // the unit, and the copy step in the upper bits

struct Timing {
  Timing(double load_ns, double store_ns);
  void start_block(Block&, double time);
  void stop_block(Block&);

  // When this instruction can start; charges the wait. The warp's time is then that.
  double start(Warp&, const Instruction&);
  void before(Warp&, const Instruction&);             // the stores that it can see are made
  void after(Warp&, const Instruction&, u32 mask);    // its results, what it keeps busy
  void wake(Warp&, const Instruction&, double time);  // from a barrier
  void global_access(Warp&, u32 mask, u32 bytes, const u64* address, u32 sectors, bool store, bool again);
  void shared_access(Warp&, u32 mask, u32 bytes, const u64* address);
  void strong_store(Warp&, u8* where, const void* value, u32 bytes);
  void finish();  // every store is made
  std::string report() const;

  double load, store, horizon = 0, now = 0;
  Warp* running = nullptr;
  std::vector<Warp*> woken;

 private:
  void charge(Warp&, const Instruction&, double until, Unit);
  double memory_delay(double& free, double at, double amount, double rate);

  double l2 = 0, hbm = 0, last_seen = 0, end = 0;
  std::deque<LateStore> late;
  std::unordered_set<u64> touched;
  std::unordered_map<u64, double> waits;  // by line, warp of its block, unit
  double rounds = 0;
  u32 most_rounds = 0, chain = 0;
  u64 warps = 0;
};

}  // namespace ptxsim
