// Runs a launch: blocks become resident, warps take turns, lanes diverge and meet again, barriers open.
//
// A warp is a list of fragments: sets of lanes with a program counter each. The fragment furthest behind runs
// first and stops where another one waits, so lanes reconverge as early as they can. A warp gives up its turn
// after a quantum, at a backward branch after a strong load (it may be waiting for another block), and in the
// middle of a torn access.

#include <immintrin.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <queue>

#include "clock.h"
#include "values.h"

namespace ptxsim {

Simulator& simulator() {
  static Simulator* one = new Simulator;  // never destroyed: kernels may be registered until the process ends
  return *one;
}

u64 special_value(const Warp& w, Special s, int lane) {
  const Launch& l = *w.launch;
  const Block& b = *w.block;
  const u32 thread = w.index * kLanes + lane;
  switch (s) {
    case Special::TidX:
      return thread % l.block[0];
    case Special::TidY:
      return thread / l.block[0] % l.block[1];
    case Special::TidZ:
      return thread / (l.block[0] * l.block[1]);
    case Special::NTidX:
      return l.block[0];
    case Special::NTidY:
      return l.block[1];
    case Special::NTidZ:
      return l.block[2];
    case Special::CtaX:
      return b.x;
    case Special::CtaY:
      return b.y;
    case Special::CtaZ:
      return b.z;
    case Special::NCtaX:
      return l.grid[0];
    case Special::NCtaY:
      return l.grid[1];
    case Special::NCtaZ:
      return l.grid[2];
    case Special::Lane:
      return lane;
    case Special::WarpId:
      return w.index;
    case Special::NWarp:
      return 64;
    case Special::SmId:
      return b.id % l.simulator->options.chip->sms;
    case Special::NSm:
      return l.simulator->options.chip->sms;
    case Special::Clock:
      return l.simulator->clock;
    case Special::LaneEq:
      return 1u << lane;
    case Special::LaneLt:
      return (1u << lane) - 1;
    case Special::LaneLe:
      return (2u << lane) - 1;
    case Special::LaneGe:
      return ~((1u << lane) - 1);
    case Special::LaneGt:
      return ~((2u << lane) - 1);
    case Special::DynamicShared:
      return l.dynamic_shared;
    case Special::TotalShared:
      return b.shared.size();
    case Special::GridSyncHigh:
      return l.grid_sync >> 32;
    case Special::GridSyncLow:
      return l.grid_sync & 0xffffffffu;
    case Special::One:
      return 1;
    default:
      return 0;
  }
}

namespace {

constexpr u8 kSharedPoison = 0xff;  // NaN in every float type: shared memory that nobody wrote
constexpr u8 kRegisterPoison = 0xcd;
constexpr int kIdleRounds = 50000;  // rounds in which all warps only polled before a launch counts as hung

struct Executor {
  Simulator& simulator;
  Program& program;
  Launch& launch;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<u8*> register_files;  // to use again
  Timing* timing = nullptr;

  ~Executor() {
    for (u8* p : register_files) free(p);
    for (auto& b : resident)
      for (Warp& w : b->warps) free(w.registers);
  }

  std::string where(const Warp& w) const {
    const Instruction* I = w.pc >= 0 && w.pc < int(program.code.size()) ? &program.code[w.pc] : nullptr;
    char head[200];
    snprintf(head, sizeof head,
             "kernel %.80s, block (%u,%u,%u), warp %d, lanes %08x, PTX line %d: ", launch.function->name.c_str(),
             w.block->x, w.block->y, w.block->z, w.index, w.mask, I ? I->line : -1);
    std::string text = I ? program.line(I->line) : "";
    text.erase(0, std::min(text.find_first_not_of(" \t"), text.size()));
    return head + text;
  }

  std::unique_ptr<Block> start_block(u64 id) {
    auto b = std::make_unique<Block>();
    const Function& f = *launch.function;
    b->id = id;
    b->x = id % launch.grid[0];
    b->y = id / launch.grid[0] % launch.grid[1];
    b->z = id / (u64(launch.grid[0]) * launch.grid[1]);
    b->shared.assign(launch.dynamic_shared ? f.dynamic_shared_start + launch.dynamic_shared : f.static_shared,
                     kSharedPoison);
    if (simulator.options.shared_races && launch.threads > kLanes)
      b->shared_cells.assign((b->shared.size() + 3) / 4, 0);
    if (simulator.options.shared_races && launch.threads > 1) b->lane_cells.assign((b->shared.size() + 3) / 4, {});
    b->live = launch.threads;
    b->warps.resize((launch.threads + kLanes - 1) / kLanes);
    const size_t bytes = (f.register_bytes + 255) / 256 * 256 + 256;
    for (size_t i = 0; i < b->warps.size(); i++) {
      Warp& w = b->warps[i];
      if (register_files.empty()) {
        w.registers = static_cast<u8*>(aligned_alloc(256, bytes));
      } else {
        w.registers = register_files.back();
        register_files.pop_back();
      }
      memset(w.registers, kRegisterPoison, bytes);
      w.block = b.get();
      w.launch = &launch;
      w.index = i;
      const u32 lanes = std::min<u32>(kLanes, launch.threads - i * kLanes);
      w.live = lanes == kLanes ? kFullMask : (1u << lanes) - 1;
      w.fragments.push_back({w.live, f.start});
      w.local.assign(size_t(f.local_bytes) * kLanes, kRegisterPoison);
      w.call.assign(size_t(f.call_bytes) * kLanes, 0);
      w.stack.resize(kLanes);
      w.polled.resize(f.poll_slots);
      for (auto& slot : w.polled) slot.fill(~0ull);
    }
    return b;
  }

  // ---- fragments

  static bool same_return(const Warp& w, u32 a, u32 b) {
    const auto &x = w.stack[__builtin_ctz(a)], &y = w.stack[__builtin_ctz(b)];
    return x.size() == y.size() && (x.empty() || x.back().call == y.back().call);
  }

  static void merge(Warp& w) {
    auto& f = w.fragments;
    for (size_t i = 0; i < f.size(); i++)
      for (size_t j = i + 1; j < f.size();) {
        if (f[i].pc == f[j].pc && f[i].wait != Fragment::AtBarrier && f[j].wait != Fragment::AtBarrier &&
            same_return(w, f[i].mask, f[j].mask)) {
          f[i].mask |= f[j].mask;
          f[i].wait = Fragment::Running;
          f.erase(f.begin() + j);
        } else {
          j++;
        }
      }
  }

  // Index of the runnable fragment furthest behind, other than `except`; -1 if there is none.
  static int furthest_behind(const Warp& w, int except) {
    int best = -1;
    for (size_t i = 0; i < w.fragments.size(); i++)
      if (w.fragments[i].wait == Fragment::Running && int(i) != except &&
          (best < 0 || w.fragments[i].pc < w.fragments[best].pc))
        best = i;
    return best;
  }

  void leave(Warp& w, int index, u32 lanes) {
    Fragment& f = w.fragments[index];
    f.mask &= ~lanes;
    w.live &= ~lanes;
    w.block->live -= __builtin_popcount(lanes);
    simulator.progress++;
    if (!f.mask) w.fragments.erase(w.fragments.begin() + index);
    for (Fragment& other : w.fragments)
      if (other.wait == Fragment::AtWarpSync) other.wait = Fragment::Running;
    for (int id = 0; id < 16; id++) open_barrier(*w.block, id);
  }

  // ---- barriers of a block

  void open_barrier(Block& block, int id) {
    NamedBarrier& bar = block.barriers[id];
    if (!bar.arrived || bar.arrived < (bar.expected ? bar.expected : block.live)) return;
    simulator.counters.bar_block++;
    block.barriers_opened++;
    simulator.progress++;
    for (Warp& w : block.warps)
      for (Fragment& f : w.fragments) {
        if (f.wait != Fragment::AtBarrier || f.barrier != id) continue;
        const Instruction& I = program.code[f.pc];
        if (I.a == 2) {
          u32 r[kLanes];
          std::fill(r, r + kLanes, I.b == 0 ? bar.population : I.b == 1 ? bar.all : bar.any);
          write(w, I.op[0], f.mask, r);
        }
        f.wait = Fragment::Running;
        f.pc++;
        if (timing) timing->wake(w, I, bar.latest);
      }
    bar = NamedBarrier();
    for (Warp& w : block.warps) merge(w);
  }

  void barrier(Warp& w, int index, const Instruction& I, u32 mask) {
    simulator.counters.bar_warp++;
    if (mask != w.fragments[index].mask) {
      w.fragments.push_back({w.fragments[index].mask & ~mask, w.fragments[index].pc + 1});
      w.fragments[index].mask = mask;
    }
    Fragment& f = w.fragments[index];
    u32 s[kLanes];
    const int lane = __builtin_ctz(mask), id = read(w, I.op[1], s)[lane] & 15;
    NamedBarrier& bar = w.block->barriers[id];
    if (I.op[2].kind != Operand::None) {
      const u32 expected = read(w, I.op[2], s)[lane];
      if (bar.arrived && bar.expected != expected)
        fail("barrier %d is used with %u and with %u threads at once", id, bar.expected, expected);
      bar.expected = expected;
    }
    bar.arrived += __builtin_popcount(mask);
    if (timing) bar.latest = std::max(bar.latest, w.clock->time);
    if (I.a == 2) {
      const u32 p = read_mask(w, I.op[3]) & mask;
      bar.population += __builtin_popcount(p);
      bar.any |= p != 0;
      bar.all &= p == mask;
    }
    if (I.a == 1) {
      f.pc++;
    } else {
      f.wait = Fragment::AtBarrier;
      f.barrier = id;
    }
    open_barrier(*w.block, id);
  }

  // ---- calls

  void device_print(Warp& w, const Instruction& I, u32 mask) {
    for (u32 m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      u64 format, values;
      memcpy(&format, call_parameter(w, lane, I.parts[I.op[2].first].immediate), 8);
      memcpy(&values, call_parameter(w, lane, I.parts[I.op[2].first + 1].immediate), 8);
      std::string out;
      u64 offset = 0;
      for (const char* p = reinterpret_cast<const char*>(format & ~kWindowMask); *p;) {
        if (*p != '%') {
          out += *p++;
          continue;
        }
        std::string spec = "%";
        for (p++; *p && !strchr("diouxXfFeEgGaAcsp%", *p); p++) spec += *p;
        const char kind = *p++;
        spec += kind;
        if (kind == '%') {
          out += '%';
          continue;
        }
        const bool real = strchr("fFeEgGaA", kind),
                   wide = real || kind == 's' || kind == 'p' || spec.find_first_of("lz") != std::string::npos;
        const u32 bytes = wide ? 8 : 4;
        offset = (offset + bytes - 1) / bytes * bytes;
        u64 v = 0;
        memcpy(&v, access_one(w, I, Access::Load, Space::Generic, values + offset, bytes, lane, "printf argument"),
               bytes);
        offset += bytes;
        char text[256];
        if (real)
          snprintf(text, sizeof text, spec.c_str(), std::bit_cast<double>(v));
        else if (kind == 's')
          snprintf(text, sizeof text, spec.c_str(), reinterpret_cast<const char*>(v));
        else if (wide)
          snprintf(text, sizeof text, spec.c_str(), v);
        else
          snprintf(text, sizeof text, spec.c_str(), u32(v));
        out += text;
      }
      fputs(out.c_str(), stdout);
    }
    fflush(stdout);
  }

  void call(Warp& w, int index, const Instruction& I, u32 mask) {
    u64 s[kLanes];
    int callee = I.op[1].immediate;
    if (I.op[1].kind != Operand::Function) {
      const u64* p = read(w, I.op[1], s);
      callee = p[__builtin_ctz(mask)] & 0xffff;
      for (u32 m = mask; m; m &= m - 1)
        if (int(p[__builtin_ctz(m)] & 0xffff) != callee) fail("lanes call different functions");
    }
    const Function& f = program.functions.at(callee);
    Fragment& fragment = w.fragments[index];
    if (!f.defined) {
      if (f.name == "vprintf")
        device_print(w, I, mask);
      else if (f.name == "__assertfail") {
        u64 text;
        memcpy(&text, call_parameter(w, __builtin_ctz(mask), I.parts[I.op[2].first].immediate), 8);
        fail("device assert failed: %s", reinterpret_cast<const char*>(text & ~kWindowMask));
      } else {
        fail("call of %s, which has no body", f.name.c_str());
      }
      fragment.pc++;
      return;
    }
    const int pc = fragment.pc;
    for (u32 m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      for (size_t k = 0; k < std::min<size_t>(I.op[2].count, f.parameters.size()); k++)
        memcpy(call_parameter(w, lane, f.parameters[k].offset),
               call_parameter(w, lane, I.parts[I.op[2].first + k].immediate), f.parameters[k].size);
      for (const CallFrame& frame : w.stack[lane])
        if (frame.function == callee) fail("recursion in %s is not supported", f.name.c_str());
      w.stack[lane].push_back({callee, pc});
    }
    const u32 rest = fragment.mask & ~mask;
    fragment.mask = mask;
    fragment.pc = f.start;
    if (rest) w.fragments.push_back({rest, pc + 1});
  }

  // True if these lanes return from a device function; false if they leave the kernel.
  bool return_from_call(Warp& w, int index, u32 mask) {
    u32 inside = 0;
    for (u32 m = mask; m; m &= m - 1)
      if (!w.stack[__builtin_ctz(m)].empty()) inside |= 1u << __builtin_ctz(m);
    if (!inside) return false;
    const u32 rest = w.fragments[index].mask & ~mask;
    const int pc = w.fragments[index].pc;
    w.fragments.erase(w.fragments.begin() + index);
    if (rest) w.fragments.push_back({rest, pc + 1});
    std::map<int, u32> targets;
    for (u32 m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      const CallFrame frame = w.stack[lane].back();
      w.stack[lane].pop_back();
      const Instruction& site = program.code[frame.call];
      const Function& f = program.functions[frame.function];
      for (size_t k = 0; k < std::min<size_t>(site.op[0].count, f.results.size()); k++)
        memcpy(call_parameter(w, lane, site.parts[site.op[0].first + k].immediate),
               call_parameter(w, lane, f.results[k].offset), f.results[k].size);
      targets[frame.call + 1] |= 1u << lane;
    }
    for (auto [to, lanes] : targets) w.fragments.push_back({lanes, to});
    merge(w);
    return true;
  }

  // ---- one warp's turn

  static u32 guard(const Warp& w, const Instruction& I, u32 mask) {
    if (I.predicate < 0) return mask;
    const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.registers + I.predicate));
    const u32 bits = _mm256_movemask_epi8(_mm256_slli_epi16(p, 7));
    return mask & (I.predicate_negated ? ~bits : bits);
  }

  // Lanes of a warp-level instruction must come together. True: they have; false: this fragment waits.
  bool gathered(Warp& w, Fragment& f, const Instruction& I, u32 mask, bool alone) {
    u32 need = w.live;
    if (I.has_member_mask) {
      u32 s[kLanes];
      need = read(w, I.op[I.member_mask_operand], s)[__builtin_ctz(mask)];
      if (!(need >> __builtin_ctz(mask) & 1)) fail("the executing lane is not in the member mask %08x", need);
      need &= w.live;
    }
    if (!(need & ~mask)) return true;
    if (I.predicate >= 0 && (f.mask & need & ~mask))
      fail("a warp-level instruction with lanes of its member mask predicated off");
    if (alone) fail("lanes %08x of the member mask %08x never arrive", need & ~mask, need);
    f.wait = Fragment::AtWarpSync;
    return false;
  }

  void report_stuck(const Warp& w) const {
    std::string text;
    for (const Fragment& f : w.fragments) {
      char one[120];
      snprintf(one, sizeof one, " [lanes %08x at line %d%s]", f.mask, program.code[f.pc].line,
               f.wait == Fragment::AtBarrier ? ", at a block barrier" : "");
      text += one;
    }
    fail("DEADLOCK in a warp: a warp-level instruction waits for lanes that are elsewhere:%s", text.c_str());
  }

  // Runs until the quantum is used up, the warp waits, or it yields. True if anything ran.
  bool run(Warp& w, u64 quantum) {
    w.yielded = false;
    if (!w.late_stores.empty()) {
      for (auto [where, value] : w.late_stores) memcpy(where, &value, 8);
      w.late_stores.clear();
      simulator.progress++;
    }
    bool any = false, polled = false;
    u64 n = 0;
    struct Tally {
      Simulator& s;
      u64& n;
      ~Tally() {
        s.clock += n;
        s.counters.warp_instr += n;
      }
    } tally{simulator, n};
    while (n < quantum && !w.fragments.empty()) {
      int index = -1;
      if (w.load_half_done) {  // the second half of a torn load comes before anything else
        for (size_t i = 0; i < w.fragments.size(); i++)
          if (w.fragments[i].pc == w.pc && w.fragments[i].wait == Fragment::Running) index = i;
      } else {
        index = furthest_behind(w, -1);
        if (w.alternate && w.fragments.size() > 1) {
          if (int other = furthest_behind(w, index); other >= 0) index = other;
          w.alternate = false;
        }
      }
      if (index < 0) break;
      const bool alone = w.fragments.size() == 1;
      int meeting = INT_MAX;
      if (!alone)
        for (size_t i = 0; i < w.fragments.size(); i++)
          if (int(i) != index && w.fragments[i].wait != Fragment::AtBarrier &&
              w.fragments[i].pc > w.fragments[index].pc)
            meeting = std::min(meeting, w.fragments[i].pc);
      const u64 start = n;
      any = true;
      for (bool choose = false; !choose;) {
        Fragment& f = w.fragments[index];
        const int pc = f.pc;
        if (n >= quantum) break;
        if (pc == meeting) {
          merge(w);
          break;
        }
        const Instruction& I = program.code[pc];
        if (timing) {
          if (timing->start(w, I) > timing->horizon) return any;  // another warp comes first
          timing->before(w, I);
        }
        const u32 mask = guard(w, I, f.mask);
        w.pc = pc;
        w.mask = mask;
        n++;
        if (timing && I.flow != Flow::Next && I.flow != Flow::WarpSync) timing->after(w, I, mask);
        if (I.flow == Flow::Next) {
          if (mask) {
            I.run(w, I, mask);
            if (timing) timing->after(w, I, mask);
            polled |= I.polls;
            if (w.suspend) {
              w.suspend = false;
              if (w.load_half_done)
                n--;
              else
                f.pc++;
              w.yielded = true;
              return true;
            }
          }
          f.pc++;
          continue;
        }
        if (!mask && I.flow != Flow::Yield) {
          f.pc++;
          continue;
        }
        switch (I.flow) {
          case Flow::Branch: {
            const bool back = I.target <= pc;
            if (mask != f.mask) {
              const u32 rest = f.mask & ~mask;
              f.mask = mask;
              f.pc = I.target;
              w.fragments.push_back({rest, pc + 1});
              merge(w);
              choose = true;
              if (back && polled) polled = false, w.yielded = w.alternate = true;
              break;
            }
            f.pc = I.target;
            if (back && polled) {
              w.yielded = true;
              w.alternate = !alone;
              return true;
            }
            if (back && !alone && n - start > 20000) w.alternate = true;
            choose = !alone;
            break;
          }
          case Flow::BranchTable: {
            u32 s[kLanes];
            const u32* which = read(w, I.op[0], s);
            const u32 rest = f.mask & ~mask;
            std::map<u32, u32> targets;
            for (u32 m = mask; m; m &= m - 1) targets[which[__builtin_ctz(m)]] |= 1u << __builtin_ctz(m);
            w.fragments.erase(w.fragments.begin() + index);
            for (auto [k, lanes] : targets) {
              if (k >= I.targets.size()) fail("brx.idx index %u of %zu", k, I.targets.size());
              w.fragments.push_back({lanes, I.targets[k]});
            }
            if (rest) w.fragments.push_back({rest, pc + 1});
            merge(w);
            choose = true;
            break;
          }
          case Flow::Return:
            if (return_from_call(w, index, mask)) {
              choose = true;
              break;
            }
            [[fallthrough]];
          case Flow::Exit:
            if (f.mask & ~mask) f.pc++;
            leave(w, index, mask);
            choose = true;
            break;
          case Flow::Call:
            call(w, index, I, mask);
            choose = true;
            break;
          case Flow::Barrier:
            barrier(w, index, I, mask);
            choose = true;
            break;
          case Flow::WarpSync:
            if (gathered(w, f, I, mask, alone)) {
              I.run(w, I, mask);
              if (timing) timing->after(w, I, mask);
              f.pc++;
            } else {
              n--;
              choose = true;
            }
            break;
          case Flow::Yield:
            f.pc++;
            w.yielded = true;
            return true;
          default:
            fail("trap: the kernel stopped itself");
        }
      }
      bool waiting = true, at_warp_sync = false;
      for (const Fragment& f : w.fragments) {
        waiting &= f.wait != Fragment::Running;
        at_warp_sync |= f.wait == Fragment::AtWarpSync;
      }
      if (waiting) {
        if (!at_warp_sync) break;
        merge(w);
        if (furthest_behind(w, -1) < 0) report_stuck(w);
        continue;
      }
      if (w.yielded) break;
    }
    return any;
  }

  // ---- the grid

  std::string describe(const char* head) const {
    std::string text = head;
    int shown = 0;
    for (const auto& b : resident)
      for (const Warp& w : b->warps)
        for (const Fragment& f : w.fragments) {
          if (shown++ >= 6) continue;
          const Instruction& I = program.code[f.pc];
          std::string line = program.line(I.line);
          line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
          char one[300];
          snprintf(one, sizeof one, "\n  block (%u,%u,%u) warp %d lanes %08x %s, PTX line %d: %.120s", b->x, b->y, b->z,
                   w.index, f.mask,
                   f.wait == Fragment::AtBarrier    ? "at a barrier"
                   : f.wait == Fragment::AtWarpSync ? "at a warp sync"
                                                    : "running",
                   I.line, line.c_str());
          text += one;
        }
    if (shown > 6) text += "\n  and " + std::to_string(shown - 6) + " more";
    return text;
  }

  void release(size_t i) {
    for (Warp& w : resident[i]->warps) {
      register_files.push_back(w.registers);
      w.registers = nullptr;
    }
    resident.erase(resident.begin() + i);
  }

  // By the clock: the warp with the least time runs, until it would be later than the next one.
  void go_by_time(u64 most_resident) {
    const Options& o = simulator.options;
    const u64 total = launch.total_blocks, begin = simulator.clock;
    u64 next = 0, count = 0, progress = simulator.progress;
    double idle_since = 0;
    using Turn = std::tuple<double, u64, Warp*>;
    std::priority_queue<Turn, std::vector<Turn>, std::greater<Turn>> turns;
    const auto push = [&](Warp& w) {
      if (w.clock->queued) return;  // it may both run on and be woken, by itself
      w.clock->queued = true;
      turns.push({w.clock->time, count++, &w});
    };
    const auto fill = [&](double time) {
      while (resident.size() < most_resident && next < total) {
        resident.push_back(start_block(next++));
        timing->start_block(*resident.back(), time);
        for (Warp& w : resident.back()->warps) push(w);
      }
    };
    fill(0);
    while (!turns.empty()) {
      Warp& w = *std::get<2>(turns.top());
      turns.pop();
      w.clock->queued = false;
      timing->horizon = turns.empty() ? HUGE_VAL : std::get<0>(turns.top());
      timing->running = &w;
      try {
        run(w, 50000);
      } catch (const Error& e) {
        throw Error(std::string(e.what()) + "\n  at " + where(w));
      }
      const double time = w.clock->time;
      if (furthest_behind(w, -1) >= 0) push(w);
      for (Warp* other : timing->woken) push(*other);
      timing->woken.clear();
      if (!w.block->live) {
        timing->stop_block(*w.block);
        for (size_t i = 0; i < resident.size(); i++)
          if (resident[i].get() == w.block) {
            release(i);
            break;
          }
        fill(time);
      }
      if (simulator.progress != progress) progress = simulator.progress, idle_since = time;
      if (time > idle_since + 1e6 * kCyclesPerNs) throw Error(describe("LIVELOCK: nothing changes for a millisecond"));
      if (o.limit && simulator.clock - begin > o.limit) throw Error(describe("instruction limit reached"));
    }
    timing->finish();
    if (!resident.empty()) throw Error(describe("DEADLOCK: no warp can run"));
    simulator.clock_report = timing->report();
  }

  void go(u64 most_resident) {
    const Options& o = simulator.options;
    const u64 total = launch.total_blocks, begin = simulator.clock;
    u64 next = 0;
    int idle = 0;
    std::vector<size_t> order;
    while (next < total || !resident.empty()) {
      while (resident.size() < most_resident && next < total) resident.push_back(start_block(next++));
      order.resize(resident.size());
      for (size_t i = 0; i < order.size(); i++) order[i] = i;
      if (o.seed)
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[simulator.random() % i]);
      bool any = false, all_yielded = true;
      const u64 progress = simulator.progress;
      for (size_t b : order) {
        Block& block = *resident[b];
        const u64 quantum = o.seed ? 50 + simulator.random() % 3000 : 50000;
        const size_t n = block.warps.size(), first = o.seed ? simulator.random() % n : 0;
        for (int pass = 0; pass < 64; pass++) {
          bool ran = false, yielded = true;
          for (size_t k = 0; k < n; k++) {
            Warp& w = block.warps[(k + first) % n];
            if (furthest_behind(w, -1) < 0) continue;
            try {
              ran |= run(w, quantum);
            } catch (const Error& e) {
              throw Error(std::string(e.what()) + "\n  at " + where(w));
            }
            yielded &= w.yielded;
          }
          any |= ran;
          if (ran) all_yielded &= yielded;
          if (!ran || yielded || o.seed) break;
        }
      }
      for (size_t i = 0; i < resident.size();) {
        if (resident[i]->live) {
          i++;
          continue;
        }
        release(i);
      }
      if (!any && !resident.empty()) throw Error(describe("DEADLOCK: no warp can run"));
      idle = all_yielded && simulator.progress == progress ? idle + 1 : 0;
      if (idle > kIdleRounds) throw Error(describe("LIVELOCK: every warp only polls and nothing changes"));
      if (o.limit && simulator.clock - begin > o.limit) throw Error(describe("instruction limit reached"));
    }
  }
};

}  // namespace

void Simulator::launch(Program& program, int kernel, const u32 grid[3], const u32 block[3], u32 shared,
                       void** arguments, bool cooperative) {
  program.prepare(kernel);
  const Function& f = program.functions[kernel];
  if (!options.chip) options.chip = find_chip("h100-sxm");
  const Chip& chip = *options.chip;
  Launch l;
  l.simulator = this;
  l.program = &program;
  l.function = &program.functions[kernel];
  std::copy(grid, grid + 3, l.grid);
  std::copy(block, block + 3, l.block);
  l.threads = block[0] * block[1] * block[2];
  l.dynamic_shared = shared;
  l.total_blocks = u64(grid[0]) * grid[1] * grid[2];
  if (!l.total_blocks) fail("kernel %s: empty grid %ux%ux%u", f.name.c_str(), grid[0], grid[1], grid[2]);
  if (!l.threads || l.threads > f.max_threads)
    fail("kernel %s: blocks of %u threads, the limit is %u", f.name.c_str(), l.threads, f.max_threads);
  if (grid[1] > 65535 || grid[2] > 65535)
    fail("kernel %s: grid %ux%ux%u, y and z go up to 65535", f.name.c_str(), grid[0], grid[1], grid[2]);

  auto known = resources.find(f.name);
  int registers = known == resources.end() ? 0 : known->second.registers;
  const u64 shared_bytes = shared ? f.dynamic_shared_start + shared : f.static_shared;
  std::string why;
  const int per_sm = blocks_per_sm(chip, l.threads, registers, shared_bytes, &why);
  if (!per_sm) fail("kernel %s cannot run on %s: %s", f.name.c_str(), chip.name, why.c_str());
  const u64 fits = u64(per_sm) * chip.sms;
  if (cooperative && l.total_blocks > fits)
    fail(
        "cooperative launch of kernel %s: %llu blocks of %u threads, %d registers a thread and %llu bytes of "
        "shared memory, but %s holds %llu "
        "at a time (%d on each of %d SMs)",
        f.name.c_str(), (unsigned long long)l.total_blocks, l.threads, registers, (unsigned long long)shared_bytes,
        chip.name, (unsigned long long)fits, per_sm, chip.sms);

  l.parameters.assign(f.parameter_bytes + 16, 0);
  for (size_t i = 0; i < f.parameters.size(); i++)
    memcpy(&l.parameters[f.parameters[i].offset], arguments[i], f.parameters[i].size);
  l.check_races = options.races && l.total_blocks > 1;
  rng = options.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  counters.launches++;
  counters.blocks += l.total_blocks;
  struct GridSync {  // the barrier of a cooperative grid lives in memory of its own
    Memory& memory;
    alignas(64) u64 word[32] = {};
    bool on;
    GridSync(Memory& m, bool on) : memory(m), on(on) {
      if (on) memory.add(reinterpret_cast<u64>(word), sizeof word);
    }
    ~GridSync() {
      memory.forget_writes();
      if (on) memory.remove(reinterpret_cast<u64>(word));
    }
  } grid_sync(memory, cooperative);
  if (cooperative) l.grid_sync = reinterpret_cast<u64>(grid_sync.word);
  Executor executor{*this, program, l, {}, {}};
  if (!options.clock) return executor.go(cooperative ? l.total_blocks : std::min(fits, options.resident));
  if (options.torn || options.seed) fail("the option clock decides on the order of warps: no seed, nothing torn");
  Timing timing(options.load_ns, options.store_ns);
  l.timing = executor.timing = &timing;
  executor.go_by_time(cooperative ? l.total_blocks : std::min<u64>(fits, chip.sms));
}

}  // namespace ptxsim
