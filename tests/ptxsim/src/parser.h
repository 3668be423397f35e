// PTX text to a Program. Module-level declarations are read at once, the body of a kernel at its first
// launch.
#pragma once

#include "program.h"

namespace ptxsim {

struct Symbol {
  bool is_register = false;
  bool call_parameter = false;  // .param inside a function, or a parameter of a device function
  Space space = Space::Generic;
  u64 address = 0;  // Register: byte offset in the file
  u64 size = 0;
  Type type = Type::None;
};

struct Parser {
  explicit Parser(Program& program) : program(program), text(program.text) {}

  void module();
  void body(int function);

  // used while an instruction is decoded
  void operand(Instruction& I, int slot, const std::string& text, Type t);
  void branch(Instruction& I, const std::string& label);
  void branch_table(Instruction& I, const std::string& name);
  void call(Instruction& I, const std::vector<std::string>& operands);

  Program& program;
  const std::string& text;
  size_t at = 0;
  int line = 1;

 private:
  struct Fixup {
    size_t instruction;
    int slot;  // -1: target, else targets[slot]
    std::string label;
  };
  using Scope = std::unordered_map<std::string, Symbol>;

  void skip_space();
  std::string peek_word();
  std::string word();
  std::string until(char end);
  std::string parenthesised();
  void skip_line();
  void skip_body();
  void function(bool entry);
  void parameters(Function& f, bool results, const std::string& list);
  void registers(const std::string& declaration);
  u32 variable(const std::string& directive, std::string declaration, bool external);
  void statement(std::string text, int line);
  void instruction(std::string text, int line);
  Operand parse_operand(Instruction& I, std::string text, Type t);
  void place_vector(Instruction& I, Operand& o, const std::vector<Operand>& parts);
  const Symbol* find(const std::string& name) const;
  const u8* constant(u64 value, int width);

  std::vector<Scope> scopes_;
  std::unordered_map<std::string, int> labels_;
  std::unordered_map<std::string, std::vector<std::string>> tables_;
  std::vector<Fixup> fixups_;
  std::unordered_map<std::string, Symbol> module_symbols_;
  std::map<std::pair<u64, int>, const u8*> constants_;
  Function* current_ = nullptr;
  u32 module_shared_ = 0;
  u32 register_bytes_ = 0, local_bytes_ = 0, call_bytes_ = 0, poll_slots_ = 0;
  u32 device_registers_ = 0, device_local_ = 0, device_call_ = 0, device_polls_ = 0;
  bool device_functions_parsed_ = false;

 public:
  void device_functions();
};

}  // namespace ptxsim
