// A parsed PTX module: functions, decoded instructions, module variables.
#pragma once

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace ptxsim {

struct Warp;
struct Instruction;

// Executes one instruction for the lanes of `mask`.
using Handler = void (*)(Warp&, const Instruction&, u32 mask);

enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

enum class Special : u8 {
  None,
  TidX,
  TidY,
  TidZ,
  NTidX,
  NTidY,
  NTidZ,
  CtaX,
  CtaY,
  CtaZ,
  NCtaX,
  NCtaY,
  NCtaZ,
  Lane,
  WarpId,
  NWarp,
  SmId,
  NSm,
  Clock,
  LaneEq,
  LaneLe,
  LaneLt,
  LaneGe,
  LaneGt,
  DynamicShared,
  TotalShared,
  GridSyncHigh,
  GridSyncLow,
  Zero,
  One
};

struct Operand {
  enum Kind : u8 { None, Register, Immediate, SpecialRegister, Vector, Memory, Function, Sink };
  Kind kind = None;
  bool negated = false;          // predicate operands: !%p
  bool has_base = false;         // Memory: [register + immediate], else an absolute address
  bool function_param = false;   // Memory: a parameter of a device function or call, one copy per thread
  u8 width = 0;                  // bytes per lane of the register, or of the immediate
  Space space = Space::Generic;  // Memory, Immediate: the space a symbol lives in
  Special special = Special::None;
  u16 first = 0, count = 0;   // Vector: its elements in Instruction::parts
  u32 offset = 0;             // Register: byte offset in the warp's register file
  u64 immediate = 0;          // value; Memory: displacement or address; Function: index
  const u8* lanes = nullptr;  // Immediate: its value once per lane, so that it reads like a register
};

// How an instruction moves the program counter. Anything but Next is handled by the executor itself.
enum class Flow : u8 { Next, Branch, BranchTable, Exit, Return, Call, Barrier, WarpSync, Yield, Trap };

enum class Order : u8 { Weak, Relaxed, Acquire, Release, AcqRel };

struct Entry;

struct Instruction {
  Handler run = nullptr;
  Flow flow = Flow::Next;
  bool predicate_negated = false;
  bool ftz = false, saturate = false;
  bool has_member_mask = false;  // WarpSync: member_mask_operand says which lanes must arrive
  bool polls = false;            // a loop around this may wait for another block: a backward branch after it yields
  u8 member_mask_operand = 0;
  Type type = Type::None, type2 = Type::None;
  Space space = Space::Generic;
  Order order = Order::Weak;
  bool wide_scope = false;        // gpu or sys: visible to other blocks
  bool read_only = false;         // ld.global.nc
  u8 vector = 1;                  // elements per lane of ld and st
  u8 element = 0;                 // bytes of one element of ld and st
  u8 rounding = 0;                // Rounding
  u8 a = 0, b = 0, c = 0, d = 0;  // meaning is the handler's own
  u8 operand_count = 0;
  int predicate = -1;  // byte offset of the guard predicate in the register file
  int target = -1;     // Branch: instruction index
  int line = 0;
  u8 unit = 0;         // of the clock: Unit
  int poll_slot = -1;  // strong loads: where the warp remembers which addresses it read here last
  const Entry* entry = nullptr;
  Operand op[6];
  std::vector<Operand> parts;
  std::vector<int> targets;  // BranchTable

  const Operand& part(const Operand& o, int i) const { return o.kind == Operand::Vector ? parts[o.first + i] : o; }
  int part_count(const Operand& o) const { return o.kind == Operand::Vector ? o.count : 1; }
};

struct Parameter {
  std::string name;
  u32 offset, size, align;
};

struct Function {
  std::string name;
  bool entry = false, defined = false, parsed = false;
  size_t body = 0;  // where its text starts, after the opening brace
  int body_line = 0;
  int start = -1;  // first instruction
  std::vector<Parameter> parameters, results;
  u32 parameter_bytes = 0;                                                  // kernels: size of the parameter block
  u32 register_bytes = 0, local_bytes = 0, call_bytes = 0, poll_slots = 0;  // what a warp needs to run it
  u32 static_shared = 0, dynamic_shared_start = 0;
  u32 max_threads = 1024;  // .maxntid or .reqntid
  u32 max_registers = 0;   // .maxnreg
};

struct Variable {
  Space space;
  u64 address, size;
};

struct Program {
  explicit Program(std::string text);
  ~Program();
  Program(const Program&) = delete;

  int find(const std::string& kernel) const;  // -1: no such entry
  void prepare(int kernel);                   // parses its body, at first use
  const std::string& line(int number) const;

  std::string text;
  std::vector<std::string> lines;
  std::vector<Instruction> code;
  std::vector<Function> functions;
  std::unordered_map<std::string, int> function_index;
  std::unordered_map<std::string, Variable> variables;
  std::vector<std::unique_ptr<u8[]>> constants;  // broadcast immediates
  std::vector<void*> blocks;                     // memory of module variables

 private:
  friend struct Parser;
  std::unique_ptr<struct Parser> parser_;
};

// One row of the instruction table (instructions_*.cpp).
struct Decoder;
struct Entry {
  const char* opcode;     // leading dotted words: "cp.async.commit_group"
  const char* types;      // allowed first types, "" if it has none; several rows may share an opcode
  const char* modifiers;  // every other dotted word it may carry; anything else is an error
  const char* section;    // of the PTX ISA document
  void (*decode)(Decoder&);
};

const Entry* find_entry(const std::vector<std::string>& words, Type first_type, std::string& why);

}  // namespace ptxsim
