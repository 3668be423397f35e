#include "clock.h"

#include <algorithm>

namespace ptxsim {

// R and S, of strong loads and stores, are options (load_ns, store_ns): nobody has measured them.
const UnitCost kUnitCosts[kUnits] = {
    {"free", 0, 0, "moves and parameters are operands of other instructions in SASS"},
    {"alu", 5, 1, "stall counts that ptxas 13.0 puts between dependent IADD3, LOP3 and FFMA for sm_90: 4 to 5"},
    {"wide integer", 10, 2, "two dependent 32-bit instructions"},
    {"predicate", 12, 1, "stall count of ISETP before a BRA on its predicate, ptxas 13.0 for sm_90"},
    {"branch", 10, 10, "guess: a polling loop of LDG, VIMNMX, ISETP, BRA has 51 cycles beside its load (ptxas 13.0)"},
    {"special function", 23, 8, "arXiv 2501.12084 (latency of MUFU); CUDA C++ Programming Guide: 16 lanes a cycle"},
    {"shuffle", 24, 1, "arXiv 1804.06826 (Volta, 22 to 24); CUDA C++ Programming Guide: 32 lanes a cycle"},
    {"mma", 24, 6, "stall counts between dependent HMMA.16816, and between independent ones, ptxas 13.0 for sm_90"},
    {"shared memory", 33, 1, "arXiv 2402.13499 (29 to 33 cycles); 128 bytes a cycle"},
    {"plain load", 273, 1, "L2 hit near the SM: arXiv 2402.13499, 2501.12084 (260 to 280 cycles)"},
    {"strong load", 0, 1, "option load_ns: R"},
    {"first touch of HBM", 1053, 1, "0.6 us: arXiv 2402.13499 (over 480 ns without load)"},
    {"store", 0, 1, "option store_ns: S, from a strong store to the load that sees it in L2"},
    {"barrier", 20, 1, "arXiv 1804.06826 (a bar.sync of warps that have all come)"},
};

const Throughput kThroughputs[] = {
    {"L2, all SMs together", 5.5e3 / kCyclesPerNs, "bytes a cycle", "5.5 to 7 TB/s: arXiv 2501.12084, 2606.22588"},
    {"HBM", 3.35e3 / kCyclesPerNs, "bytes a cycle", "3.35 TB/s: NVIDIA H100 data sheet"},
    {"one SM and L2", 64, "bytes a cycle", "arXiv 1804.06826"},
    {"clock", kCyclesPerNs, "cycles a ns", "H100 SXM under load: 1.755 GHz"},
};
const int kThroughputCount = sizeof kThroughputs / sizeof *kThroughputs;
constexpr int kL2 = 0, kHbm = 1, kPort = 2;

namespace {

const UnitCost& cost(Unit u) { return kUnitCosts[int(u)]; }
bool is_real(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F16X2 || t == Type::BF16X2 || t == Type::F32 ||
         t == Type::F64 || t == Type::TF32;
}

Unit find_unit(const Instruction& I) {
  if (!I.entry) return Unit::Branch;
  const std::string op = I.entry->opcode;
  const auto is = [&](const char* start) { return op.rfind(start, 0) == 0; };
  switch (I.flow) {
    case Flow::Branch:
    case Flow::BranchTable:
    case Flow::Call:
    case Flow::Return:
    case Flow::Exit:
    case Flow::Trap:
      return Unit::Branch;
    case Flow::Barrier:
      return Unit::Barrier;
    default:
      break;
  }
  if (op == "mov") return Unit::Free;
  if (op == "ld" || op == "ldu") {
    if (I.space == Space::Param || I.space == Space::Const) return Unit::Free;
    if (I.space == Space::Shared) return Unit::Shared;
    return I.order == Order::Weak ? Unit::Load : Unit::Strong;
  }
  if (op == "st") return I.space == Space::Shared ? Unit::Shared : Unit::Store;
  if (is("atom") || is("red")) return I.space == Space::Shared ? Unit::Shared : Unit::Strong;
  if (is("ldmatrix") || is("stmatrix")) return Unit::Shared;
  if (is("mma") || is("wmma.mma")) return Unit::Matrix;
  if (is("wmma.load")) return Unit::Load;
  if (is("wmma.store")) return Unit::Store;
  if (is("shfl")) return Unit::Shuffle;
  if (is("setp") || is("vote") || is("bar.warp")) return Unit::Predicate;
  for (const char* name : {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"})
    if (op == name && is_real(I.type)) return Unit::Special;
  return size_of(I.type) == 8 && !is_real(I.type) ? Unit::Wide : Unit::Alu;
}

Unit unit_of(const Instruction& I) { return Unit(I.unit & 15); }
CopyStep copy_of(const Instruction& I) { return CopyStep(I.unit >> 4 & 7); }
bool is_movable(const Instruction& I) { return I.unit >> 7; }

bool writes_first(const Instruction& I) {
  const Operand::Kind kind = I.op[0].kind;
  return (kind == Operand::Register || kind == Operand::Vector || kind == Operand::Sink) &&
         I.flow != Flow::BranchTable && I.flow != Flow::Yield && I.flow != Flow::Call;
}

template <class F>
void registers_in(const Instruction& I, const Operand& o, const F& f) {
  if (o.kind == Operand::Vector) {
    for (int i = 0; i < o.count; i++) registers_in(I, I.parts[o.first + i], f);
  } else if (o.kind == Operand::Register || (o.kind == Operand::Memory && o.has_base)) {
    f(o.offset / kLanes);
  }
}

template <class F>
void sources(const Instruction& I, const F& f) {
  if (I.predicate >= 0) f(u32(I.predicate) / kLanes);
  for (int k = writes_first(I) ? 1 : 0; k < 6; k++) registers_in(I, I.op[k], f);
}

}  // namespace

u8 unit_number(const Instruction& I) {
  static const char* const kSteps[] = {"", "cp.async", "cp.async.commit_group", "cp.async.wait_group",
                                       "cp.async.wait_all"};
  int step = 0;
  for (int k = 1; k < 5; k++)
    if (I.entry && !strcmp(I.entry->opcode, kSteps[k])) step = k;
  const Unit unit = find_unit(I);
  bool movable = false;  // ptxas may start it anywhere in its basic block
  switch (unit) {
    case Unit::Free:
    case Unit::Alu:
    case Unit::Wide:
    case Unit::Predicate:
    case Unit::Special:
    case Unit::Shuffle:
    case Unit::Matrix:
    case Unit::Shared:
    case Unit::Load:
      movable = !step && writes_first(I);
      break;
    default:
      break;
  }
  return int(unit) | step << 4 | int(movable) << 7;
}

Timing::Timing(double load_ns, double store_ns) : load(load_ns * kCyclesPerNs), store(store_ns * kCyclesPerNs) {}

void Timing::start_block(Block& b, double time) {
  b.clock = std::make_shared<BlockClock>();
  b.clock->warps.resize(b.warps.size());
  for (size_t i = 0; i < b.warps.size(); i++) {
    b.warps[i].clock = &b.clock->warps[i];
    b.clock->warps[i].time = time;
    b.clock->warps[i].registers.resize(b.warps[i].launch->function->register_bytes / kLanes + 8);
  }
}

void Timing::stop_block(Block& b) {
  for (const WarpClock& c : b.clock->warps) {
    end = std::max(end, c.time);
    for (const Ready& r : c.registers) end = std::max(end, r.at);  // what nobody used
    rounds += c.rounds;
    most_rounds = std::max(most_rounds, c.rounds);
    warps++;
  }
}

void Timing::charge(Warp& w, const Instruction& I, double until, Unit unit) {
  WarpClock& c = *w.clock;
  if (until <= c.time) return;
  waits[u64(I.line) << 12 | w.index << 4 | int(unit)] += until - c.time;
  c.time = until;
}

double Timing::start(Warp& w, const Instruction& I) {
  WarpClock& c = *w.clock;
  double at = c.time;
  Unit why = Unit::Free;
  sources(I, [&](u32 r) {
    if (c.registers[r].at > at) at = c.registers[r].at, why = c.registers[r].unit;
  });
  const Unit unit = unit_of(I);
  BlockClock& b = *w.block->clock;
  const auto busy = [&](double until, Unit u) {
    if (until > at) at = until, why = u;
  };
  const CopyStep copy = copy_of(I);
  if (copy == CopyStep::WaitGroup) {
    const size_t leave = I.op[0].immediate;
    if (c.groups.size() > leave) busy(c.groups[c.groups.size() - leave - 1], Unit::Hbm);
  } else if (copy == CopyStep::WaitAll) {
    for (double landed : c.groups) busy(landed, Unit::Hbm);
    busy(c.pending, Unit::Hbm);
  }
  if (unit != Unit::Free && b.issue[w.index % 4] > c.time)
    charge(w, I, b.issue[w.index % 4], Unit::Alu), busy(c.time, Unit::Alu);
  if (unit == Unit::Matrix) busy(b.matrix[w.index % 4], Unit::Matrix);
  if (unit == Unit::Special) busy(b.special[w.index % 4], Unit::Special);
  if (unit == Unit::Shuffle) busy(b.shuffle, Unit::Shuffle);
  if (unit == Unit::Shared) busy(b.shared, Unit::Shared);
  c.start = at;
  c.why = why;
  if (is_movable(I)) return c.time;
  charge(w, I, at, why);
  return at;
}

void Timing::before(Warp& w, const Instruction& I) {
  WarpClock& c = *w.clock;
  now = c.time;
  c.sectors = 0, c.wavefronts = 1, c.first_touch = c.again = false;
  const Unit unit = unit_of(I);
  if (unit != Unit::Strong) return;
  // A load samples L2 half of its latency later, or after its turn; never later than stores not yet run could show.
  const double queue = std::max(0.0, l2 - now), sampled = now + std::min(load / 2 + queue, store);
  for (; !late.empty() && late.front().seen <= sampled; late.pop_front()) {
    memcpy(late.front().where, late.front().value, late.front().bytes);
    w.launch->simulator->progress++;
  }
}

double Timing::memory_delay(double& free, double at, double amount, double rate) {
  const double begin = std::max(free, at);
  free = begin + amount / rate;
  return free - at;
}

void Timing::after(Warp& w, const Instruction& I, u32 mask) {
  WarpClock& c = *w.clock;
  BlockClock& b = *w.block->clock;
  const Unit unit = unit_of(I);
  const double at = std::max(c.start, c.time);
  Ready result{at + cost(unit).latency, 0, 0, unit};
  sources(I, [&](u32 r) { result.round = std::max(result.round, c.registers[r].round); });
  const bool is_copy = copy_of(I) == CopyStep::Copy;
  // Of what came late, the cause is what it waited for.
  if (at > c.time && (unit == Unit::Alu || unit == Unit::Wide || unit == Unit::Predicate)) result.unit = c.why;
  if (unit != Unit::Free) {
    b.issue[w.index % 4] = c.time + 1;
    c.time++;
  }
  switch (unit) {
    case Unit::Branch:
      c.time = at + cost(unit).issue;
      if (I.predicate >= 0) c.decided = std::max(c.decided, result.round);
      break;
    case Unit::Matrix:
      b.matrix[w.index % 4] = at + cost(unit).issue;
      registers_in(I, I.op[3], [&](u32 r) { result.chain = std::max(result.chain, c.registers[r].chain); });
      result.chain++;
      chain = std::max(chain, result.chain);
      break;
    case Unit::Special:
      b.special[w.index % 4] = at + cost(unit).issue;
      break;
    case Unit::Shuffle:
      b.shuffle = at + cost(unit).issue;
      break;
    case Unit::Shared:
      b.shared = at + c.wavefronts * cost(unit).issue;
      result.at += c.wavefronts - 1;
      break;
    default:
      break;
  }
  if ((unit == Unit::Load || unit == Unit::Strong || unit == Unit::Store || is_copy) && c.sectors) {
    const double bytes = 32.0 * c.sectors;
    double delay = memory_delay(b.port, at, bytes, kThroughputs[kPort].value);
    delay = std::max(delay, memory_delay(l2, at, bytes, kThroughputs[kL2].value));
    double latency = unit == Unit::Strong ? load : cost(Unit::Load).latency;
    if (c.first_touch && unit != Unit::Strong && unit != Unit::Store) {
      delay = std::max(delay, memory_delay(hbm, at, bytes, kThroughputs[kHbm].value));
      latency = cost(Unit::Hbm).latency;
      result.unit = Unit::Hbm;
    }
    result.at = at + latency + delay;
    if (is_copy) c.pending = std::max(c.pending, result.at);
    if (unit == Unit::Strong) {
      if (c.decided == c.round) {
        c.round++;
        c.rounds += !c.again;
      }
      result.round = c.round;
    }
  }
  if (copy_of(I) == CopyStep::Commit) {
    c.groups.push_back(c.pending);
    c.pending = 0;
    if (c.groups.size() > 16) c.groups.pop_front();
  }
  if (!mask || !writes_first(I)) return;
  if (unit == Unit::Free) {  // as ready as what it moves
    result = Ready{at, result.round, 0, Unit::Free};
    sources(I, [&](u32 r) {
      if (c.registers[r].at > result.at) result.at = c.registers[r].at, result.unit = c.registers[r].unit;
      result.chain = std::max(result.chain, c.registers[r].chain);
    });
  }
  registers_in(I, I.op[0], [&](u32 r) { c.registers[r] = result; });
}

void Timing::wake(Warp& w, const Instruction& I, double time) {
  WarpClock& c = *w.clock;
  charge(w, I, time + cost(Unit::Barrier).latency, Unit::Barrier);
  c.time = std::max(c.time, time + cost(Unit::Barrier).latency);
  woken.push_back(&w);
}

void Timing::global_access(Warp& w, u32 mask, u32 bytes, const u64* address, u32 sectors, bool store, bool again) {
  WarpClock& c = *w.clock;
  c.sectors += sectors;
  c.again |= again;
  for (u32 m = mask; m; m &= m - 1) {  // DRAM is read 64 bytes at a time
    const u64 begin = address[__builtin_ctz(m)];
    for (u64 line = begin >> 6; line <= (begin + bytes - 1) >> 6; line++)
      if (touched.insert(line).second && !store) c.first_touch = true;
  }
}

void Timing::shared_access(Warp& w, u32 mask, u32 bytes, const u64* address) {
  // Each bank gives a word a cycle; lanes that ask for the same word share it.
  u64 seen[32][8 * kLanes / 4];
  int count[32] = {}, most = 1;
  for (u32 m = mask; m; m &= m - 1) {
    const u64 first = (address[__builtin_ctz(m)] & 0xffffffffull) >> 2;
    for (u64 word = first; word < first + std::max(1u, bytes / 4); word++) {
      const int bank = word % 32;
      if (count[bank] < 64 && std::find(seen[bank], seen[bank] + count[bank], word) == seen[bank] + count[bank])
        seen[bank][count[bank]++] = word;
      most = std::max(most, count[bank]);
    }
  }
  w.clock->wavefronts = most;
}

void Timing::strong_store(Warp& w, u8* where, const void* value, u32 bytes) {
  last_seen = std::max(last_seen, w.clock->time + store + std::max(0.0, l2 - w.clock->time));
  LateStore s{last_seen, where, u8(bytes), {}};
  memcpy(s.value, value, bytes);
  late.push_back(s);
}

void Timing::finish() {
  for (const LateStore& s : late) memcpy(s.where, s.value, s.bytes);
  late.clear();
}

// "total cycles, rounds of a warp on average, of the one with most, longest chain of mma", then a line for each wait:
// warp of its block, PTX line, unit, cycles of all blocks.
std::string Timing::report() const {
  char line[160];
  snprintf(line, sizeof line, "total %.1f %.4f %u %u\n", end, warps ? rounds / warps : 0, most_rounds, chain);
  std::string text = line;
  for (const auto& [key, cycles] : waits) {
    snprintf(line, sizeof line, "wait %d %d %s:%.1f\n", int(key >> 4 & 255), int(key >> 12), kUnitCosts[key & 15].name,
             cycles);
    text += line;
  }
  return text;
}

}  // namespace ptxsim
