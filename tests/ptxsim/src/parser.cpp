#include "parser.h"
#include "clock.h"

#include <algorithm>
#include <cstdlib>

#include "values.h"

namespace ptxsim {

// ---- names

Type type_named(const std::string& name) {
  static const std::unordered_map<std::string, Type> kTypes = {
      {"u8", Type::U8},       {"u16", Type::U16},       {"u32", Type::U32},   {"u64", Type::U64}, {"s8", Type::S8},
      {"s16", Type::S16},     {"s32", Type::S32},       {"s64", Type::S64},   {"b8", Type::B8},   {"b16", Type::B16},
      {"b32", Type::B32},     {"b64", Type::B64},       {"b128", Type::B128}, {"f16", Type::F16}, {"bf16", Type::BF16},
      {"f16x2", Type::F16X2}, {"bf16x2", Type::BF16X2}, {"f32", Type::F32},   {"f64", Type::F64}, {"tf32", Type::TF32},
      {"pred", Type::Pred}};
  auto it = kTypes.find(name);
  return it == kTypes.end() ? Type::None : it->second;
}

namespace {

Special special_named(const std::string& name) {
  static const std::unordered_map<std::string, Special> kNames = {{"%tid.x", Special::TidX},
                                                                  {"%tid.y", Special::TidY},
                                                                  {"%tid.z", Special::TidZ},
                                                                  {"%ntid.x", Special::NTidX},
                                                                  {"%ntid.y", Special::NTidY},
                                                                  {"%ntid.z", Special::NTidZ},
                                                                  {"%ctaid.x", Special::CtaX},
                                                                  {"%ctaid.y", Special::CtaY},
                                                                  {"%ctaid.z", Special::CtaZ},
                                                                  {"%nctaid.x", Special::NCtaX},
                                                                  {"%nctaid.y", Special::NCtaY},
                                                                  {"%nctaid.z", Special::NCtaZ},
                                                                  {"%laneid", Special::Lane},
                                                                  {"%warpid", Special::WarpId},
                                                                  {"%nwarpid", Special::NWarp},
                                                                  {"%smid", Special::SmId},
                                                                  {"%nsmid", Special::NSm},
                                                                  {"%gridid", Special::Zero},
                                                                  {"%clock", Special::Clock},
                                                                  {"%clock64", Special::Clock},
                                                                  {"%clock_hi", Special::Zero},
                                                                  {"%globaltimer", Special::Clock},
                                                                  {"%globaltimer_lo", Special::Clock},
                                                                  {"%globaltimer_hi", Special::Zero},
                                                                  {"%lanemask_eq", Special::LaneEq},
                                                                  {"%lanemask_le", Special::LaneLe},
                                                                  {"%lanemask_lt", Special::LaneLt},
                                                                  {"%lanemask_ge", Special::LaneGe},
                                                                  {"%lanemask_gt", Special::LaneGt},
                                                                  {"%dynamic_smem_size", Special::DynamicShared},
                                                                  {"%total_smem_size", Special::TotalShared},
                                                                  {"%envreg1", Special::GridSyncHigh},
                                                                  {"%envreg2", Special::GridSyncLow},
                                                                  {"%cluster_ctarank", Special::Zero},
                                                                  {"%cluster_nctarank", Special::One},
                                                                  {"%cluster_ctaid.x", Special::Zero},
                                                                  {"%cluster_nctaid.x", Special::One},
                                                                  {"%clusterid.x", Special::CtaX},
                                                                  {"%nclusterid.x", Special::NCtaX}};
  auto it = kNames.find(name);
  if (it != kNames.end()) return it->second;
  return name.rfind("%envreg", 0) == 0 ? Special::Zero : Special::None;
}

// ---- text

bool word_character(char c) { return isalnum(static_cast<u8>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool starts(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

std::string strip(std::string s) {
  for (size_t c; (c = s.find("//")) != std::string::npos;) {
    size_t end = s.find('\n', c);
    s.erase(c, end == std::string::npos ? std::string::npos : end - c);
  }
  for (size_t c; (c = s.find("/*")) != std::string::npos;) {
    size_t end = s.find("*/", c);
    s.erase(c, end == std::string::npos ? std::string::npos : end + 2 - c);
  }
  size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

// At commas outside of brackets.
std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> out;
  std::string piece;
  int depth = 0;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == ',' && depth == 0) {
      out.push_back(strip(piece));
      piece.clear();
    } else {
      piece += c;
    }
  }
  piece = strip(piece);
  if (!piece.empty()) out.push_back(piece);
  return out;
}

std::vector<std::string> split_dots(const std::string& s) {
  std::vector<std::string> out;
  for (size_t i = 0; i <= s.size();) {
    size_t end = std::min(s.find('.', i), s.size());
    out.push_back(s.substr(i, end - i));
    i = end + 1;
  }
  return out;
}

std::string inside(const std::string& s) { return s.substr(1, s.size() - 2); }

// A literal of PTX (4.5) as the bits of type t.
bool literal(const std::string& s, Type t, u64& out) {
  if (s.empty()) return false;
  const bool negative = s[0] == '-';
  const std::string x = s.substr(s[0] == '-' || s[0] == '+');
  if (x.empty() || !(isdigit(static_cast<u8>(x[0])) || x[0] == '.')) return false;
  const char kind = x.size() > 2 && x[0] == '0' ? tolower(x[1]) : 0;
  auto from_double = [&](double d) {
    if (negative) d = -d;
    out = t == Type::F32 ? std::bit_cast<u32>(static_cast<float>(d)) : std::bit_cast<u64>(d);
  };
  if (kind == 'f' && x.size() == 10) {
    float f = std::bit_cast<float>(static_cast<u32>(strtoul(x.c_str() + 2, nullptr, 16)));
    if (t == Type::F64)
      from_double(f);
    else
      out = std::bit_cast<u32>(f) ^ (negative ? 0x80000000u : 0);
    return true;
  }
  if (kind == 'd' && x.size() == 18) {
    from_double(std::bit_cast<double>(static_cast<u64>(strtoull(x.c_str() + 2, nullptr, 16))));
    return true;
  }
  if (kind != 'x' && x.find_first_of(".eE") != std::string::npos) {
    from_double(strtod(x.c_str(), nullptr));
    return true;
  }
  out = kind == 'b' ? strtoull(x.c_str() + 2, nullptr, 2) : strtoull(x.c_str(), nullptr, 0);
  if (negative) out = -out;
  return true;
}

u32 align_up(u32 x, u32 to) { return (x + to - 1) / to * to; }

}  // namespace

// ---- the instruction table

extern const Entry kIntegerTable[], kFloatTable[], kLogicTable[], kMoveTable[], kMemoryTable[], kWarpTable[];

namespace {

bool listed(const char* list, const std::string& word) {
  for (const char* p = list; *p;) {
    const char* end = p;
    while (*end && *end != ' ') end++;
    size_t n = end - p;
    if (n && end[-1] == '*' ? word.compare(0, n - 1, p, n - 1) == 0 : word.size() == n && word.compare(0, n, p, n) == 0)
      return true;
    p = *end ? end + 1 : end;
  }
  return false;
}

struct Row {
  const Entry* entry;
  std::vector<std::string> words;
};

const std::unordered_map<std::string, std::vector<Row>>& table() {
  static const auto* rows = [] {
    auto* all = new std::unordered_map<std::string, std::vector<Row>>;
    for (const Entry* t : {kIntegerTable, kFloatTable, kLogicTable, kMoveTable, kMemoryTable, kWarpTable})
      for (const Entry* e = t; e->opcode; e++) {
        Row row{e, split_dots(e->opcode)};
        (*all)[row.words[0]].push_back(row);
      }
    for (auto& [name, list] : *all)
      std::stable_sort(list.begin(), list.end(),
                       [](const Row& a, const Row& b) { return a.words.size() > b.words.size(); });
    return all;
  }();
  return *rows;
}

}  // namespace

// The row with the longest opcode that fits words, takes the first type, and knows every other word.
const Entry* find_entry(const std::vector<std::string>& words, Type first, std::string& why) {
  auto it = table().find(words[0]);
  why = "unknown instruction";
  if (it == table().end()) return nullptr;
  for (const Row& row : it->second) {
    if (row.words.size() > words.size() || !std::equal(row.words.begin(), row.words.end(), words.begin())) continue;
    const Entry& e = *row.entry;
    bool type_fits = first == Type::None ? !*e.types : false;
    std::string unknown;
    for (size_t k = row.words.size(); k < words.size(); k++) {
      Type t = type_named(words[k]);
      if (t != Type::None) {
        if (t == first) type_fits |= listed(e.types, words[k]);
      } else if (!listed(e.modifiers, words[k]) && unknown.empty()) {
        unknown = words[k];
      }
    }
    if (first != Type::None && !*e.types) type_fits = false;
    if (type_fits && unknown.empty()) return &e;
    why = unknown.empty() ? "unsupported type" : "unsupported modifier ." + unknown;
  }
  return nullptr;
}

bool Decoder::has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }
const std::string* Decoder::word_starting(const char* prefix) const {
  for (const std::string& w : words)
    if (starts(w, prefix)) return &w;
  return nullptr;
}
void Decoder::operand(int slot, const std::string& text, Type t) { parser.operand(I, slot, text, t); }
void Decoder::all(Type t) {
  for (size_t k = 0; k < operands.size(); k++) operand(k, operands[k], t);
}
void Decoder::unsupported(const char* why) const {
  std::string opcode;
  for (const std::string& w : words) opcode += (opcode.empty() ? "" : ".") + w;
  fail("PTX line %d: unsupported instruction %s: %s", I.line, opcode.c_str(), why);
}

// ---- scanning

void Parser::skip_space() {
  for (;;) {
    while (at < text.size() && isspace(static_cast<u8>(text[at])))
      if (text[at++] == '\n') line++;
    if (text.compare(at, 2, "//") == 0) {
      while (at < text.size() && text[at] != '\n') at++;
    } else if (text.compare(at, 2, "/*") == 0) {
      size_t end = std::min(text.find("*/", at), text.size() - 2) + 2;
      line += std::count(text.begin() + at, text.begin() + end, '\n');
      at = end;
    } else {
      return;
    }
  }
}

std::string Parser::peek_word() {
  skip_space();
  size_t end = at;
  while (end < text.size() && word_character(text[end])) end++;
  return text.substr(at, end - at);
}

std::string Parser::word() {
  std::string w = peek_word();
  at += w.size();
  return w;
}

std::string Parser::until(char end) {
  size_t q = at;
  bool quoted = false;
  for (; q < text.size() && (quoted || text[q] != end); q++) {
    if (text[q] == '"') quoted = !quoted;
    if (text[q] == '\n') line++;
  }
  std::string out = text.substr(at, q - at);
  at = q + 1;
  return out;
}

void Parser::skip_line() {
  while (at < text.size() && text[at] != '\n') at++;
}

std::string Parser::parenthesised() {
  skip_space();
  if (at >= text.size() || text[at] != '(') fail("PTX line %d: expected (", line);
  size_t q = at;
  for (int depth = 0; q < text.size(); q++) {
    if (text[q] == '\n') line++;
    if (text[q] == '(') depth++;
    if (text[q] == ')' && --depth == 0) break;
  }
  std::string out = strip(text.substr(at + 1, q - at - 1));
  at = q + 1;
  return out;
}

// From after an opening brace to after the closing one.
void Parser::skip_body() {
  for (int depth = 1; depth; at++) {
    if (at >= text.size()) fail("PTX line %d: end of text in a function", line);
    char c = text[at];
    if (c == '\n')
      line++;
    else if (c == '{')
      depth++;
    else if (c == '}')
      depth--;
    else if (c == '/' && text[at + 1] == '/') {
      skip_line();
      at--;
    } else if (c == '"') {
      while (text[++at] != '"') {
      }
    }
  }
}

const Symbol* Parser::find(const std::string& name) const {
  for (size_t i = scopes_.size(); i-- > 0;)
    if (auto it = scopes_[i].find(name); it != scopes_[i].end()) return &it->second;
  auto it = module_symbols_.find(name);
  return it == module_symbols_.end() ? nullptr : &it->second;
}

// ---- declarations

void Parser::module() {
  bool external = false;
  for (;;) {
    skip_space();
    if (at >= text.size()) return;
    std::string w = word();
    if (w.empty()) {
      if (text[at] != ';') fail("PTX line %d: cannot parse '%.20s'", line, text.c_str() + at);
      at++;
    } else if (w == ".version" || w == ".address_size" || w == ".target" || w == ".file" || w == ".loc") {
      skip_line();
    } else if (w == ".visible" || w == ".weak" || w == ".common") {
    } else if (w == ".extern") {
      external = true;
    } else if (w == ".section") {
      until('{');
      until('}');
    } else if (w == ".global" || w == ".const" || w == ".shared") {
      current_ = nullptr;
      variable(w, strip(until(';')), external);
      external = false;
    } else if (w == ".entry" || w == ".func") {
      function(w == ".entry");
      external = false;
    } else if (w == ".alias" || w == ".pragma") {
      until(';');
    } else {
      fail("PTX line %d: unknown directive %s", line, w.c_str());
    }
  }
}

void Parser::function(bool entry) {
  skip_space();
  std::string results;
  if (text[at] == '(') results = parenthesised();
  while (starts(peek_word(), ".attribute") || peek_word() == ".noreturn") {
    word();
    skip_space();
    if (text[at] == '(') parenthesised();
  }
  const std::string name = word();
  auto [it, fresh] = program.function_index.try_emplace(name, program.functions.size());
  if (fresh) program.functions.emplace_back();
  Function& f = program.functions[it->second];
  f.name = name;
  f.entry = entry;
  f.parameters.clear();
  f.results.clear();
  f.parameter_bytes = 0;
  if (!results.empty()) parameters(f, true, results);
  skip_space();
  if (text[at] == '(') parameters(f, false, parenthesised());
  for (;;) {
    skip_space();
    if (text[at] == ';') {
      at++;
      return;
    }
    if (text[at] == '{') break;
    std::string w = word();
    if (w == ".maxntid" || w == ".reqntid") {
      size_t end = std::min(text.find_first_of("\n.{", at), text.size());
      u32 threads = 1;
      for (const std::string& n : split(strip(text.substr(at, end - at)))) threads *= std::max(1, atoi(n.c_str()));
      f.max_threads = std::min(threads, 1024u);
      at = end;
    } else if (w == ".maxnreg") {
      skip_space();
      f.max_registers = atoi(word().c_str());
    } else if (w == ".minnctapersm" || w == ".maxnctapersm" || w == ".maxclusterrank") {
      skip_space();
      word();
    } else if (w == ".noreturn") {
    } else if (starts(w, ".pragma")) {
      until(';');
    } else {
      fail("PTX line %d: unsupported function directive '%s'", line, w.c_str());
    }
  }
  at++;
  f.defined = true;
  f.body = at;
  f.body_line = line;
  skip_body();
}

void Parser::parameters(Function& f, bool results, const std::string& list) {
  for (std::string p : split(list)) {
    if (starts(p, ".param"))
      p = strip(p.substr(6));
    else if (starts(p, ".reg"))
      fail("PTX line %d: register parameters are not supported", line);
    if (p.empty()) continue;
    Function* outer = current_;
    current_ = &f;
    scopes_.emplace_back();
    const u32 before = call_bytes_;
    const u32 align = variable(".param", p, false);
    const auto& [name, symbol] = *scopes_.back().begin();
    const u32 size = symbol.size;
    u32 offset = symbol.address;
    if (f.entry) {
      call_bytes_ = before;
      offset = align_up(f.parameter_bytes, align);
      f.parameter_bytes = offset + size;
    }
    (results ? f.results : f.parameters).push_back({name, offset, size, align});
    scopes_.pop_back();
    current_ = outer;
  }
}

void Parser::registers(const std::string& declaration) {
  size_t end = declaration.find_first_of(" \t\n");
  const std::string type_name = declaration.substr(1, end - 1);
  const Type t = type_named(type_name);
  if (t == Type::None) fail("PTX line %d: registers of type .%s are not supported", line, type_name.c_str());
  const int width = size_of(t);
  auto add = [&](const std::string& name) {
    Symbol s;
    s.is_register = true;
    s.address = register_bytes_;
    s.size = width;
    s.type = t;
    register_bytes_ += width * kLanes;
    scopes_.back()[name] = s;
  };
  for (const std::string& n : split(declaration.substr(end))) {
    size_t open = n.find('<');
    if (open == std::string::npos) {
      add(n);
      continue;
    }
    const std::string stem = strip(n.substr(0, open));
    for (int k = 0, count = atoi(n.c_str() + open + 1); k < count; k++) add(stem + std::to_string(k));
  }
}

// [.align n] .type name[n] [= initial value]. Returns the alignment.
u32 Parser::variable(const std::string& directive, std::string declaration, bool external) {
  std::string initial, name;
  if (size_t eq = declaration.find('='); eq != std::string::npos) {
    initial = strip(declaration.substr(eq + 1));
    declaration = declaration.substr(0, eq);
  }
  Type t = Type::B8;
  u32 align = 1;
  int vector = 1;
  size_t i = 0;
  auto space = [&] {
    while (i < declaration.size() && isspace(static_cast<u8>(declaration[i]))) i++;
  };
  for (space(); i < declaration.size(); space()) {
    size_t end = i;
    while (end < declaration.size() && word_character(declaration[end])) end++;
    const std::string w = declaration.substr(i, end - i);
    i = end;
    if (w == ".align") {
      space();
      align = atoi(declaration.c_str() + i);
      while (isdigit(static_cast<u8>(declaration[i]))) i++;
    } else if (w == ".attribute") {
      i = declaration.find(')', i) + 1;
    } else if (w == ".v2" || w == ".v4") {
      vector = w[2] - '0';
    } else if (w == ".ptr" || w == ".global" || w == ".const" || w == ".shared" || w == ".local") {
    } else if (starts(w, ".")) {
      t = type_named(w.substr(1));
      if (t == Type::None) fail("PTX line %d: variable type %s", line, w.c_str());
    } else {
      name = w;
      break;
    }
    if (w.empty()) fail("PTX line %d: cannot parse declaration '%s'", line, declaration.c_str());
  }
  u64 count = 1;
  bool array = false;
  for (size_t open; (open = declaration.find('[', i)) != std::string::npos;) {
    array = true;
    i = declaration.find(']', open);
    count *= strtoull(declaration.c_str() + open + 1, nullptr, 0);
  }
  const u32 element = size_of(t);
  std::vector<std::string> values;
  if (!initial.empty()) {
    for (char& c : initial)
      if (c == '{' || c == '}') c = ' ';
    values = split(initial);
    if (array && !count) count = values.size();
  }
  Symbol s;
  s.type = t;
  s.size = count * element * vector;
  align = std::max(align, element * vector);
  auto place = [&](u32& end) {
    u32 offset = align_up(end, align);
    end = offset + s.size;
    return offset;
  };
  if (directive == ".shared") {
    s.space = Space::Shared;
    if (external && !s.size)
      s.address = current_ ? current_->dynamic_shared_start : ~0ull;  // resolved per kernel
    else
      s.address = current_ ? place(current_->static_shared) : place(module_shared_);
  } else if (directive == ".local") {
    s.space = Space::Local;
    s.address = place(local_bytes_);
  } else if (directive == ".param") {
    s.space = Space::Param;
    s.call_parameter = true;
    s.address = place(call_bytes_);
  } else {
    if (external) fail("PTX line %d: extern .global %s: link the modules first", line, name.c_str());
    s.space = directive == ".const" ? Space::Const : Space::Global;
    const size_t bytes = std::max<u64>(s.size, 1);
    u8* memory = static_cast<u8*>(aligned_alloc(256, align_up(bytes, 256)));
    memset(memory, 0, bytes);
    program.blocks.push_back(memory);
    simulator().memory.add(reinterpret_cast<u64>(memory), bytes);
    s.address = reinterpret_cast<u64>(memory);
    for (size_t k = 0; k < values.size(); k++) {
      std::string v = values[k];
      u64 bits = 0;
      if (!literal(v, t, bits)) {
        if (starts(v, "generic(")) v = inside(v.substr(7));
        const Symbol* other = find(v);
        auto f = program.function_index.find(v);
        if (other)
          bits = other->address;
        else if (f != program.function_index.end())
          bits = kFunctionWindow | f->second;
        else
          fail("PTX line %d: initial value '%s'", line, v.c_str());
      }
      memcpy(memory + k * element, &bits, element);
    }
    program.variables[name] = {s.space, s.address, s.size};
  }
  if (current_ || directive == ".param")
    scopes_.back()[name] = s;
  else
    module_symbols_[name] = s;
  return align;
}

// ---- functions

void Parser::device_functions() {
  if (device_functions_parsed_) return;
  device_call_ = call_bytes_;  // parameters of declarations
  for (size_t i = 0; i < program.functions.size(); i++)
    if (!program.functions[i].entry && program.functions[i].defined) {
      register_bytes_ = device_registers_;
      local_bytes_ = device_local_;
      call_bytes_ = device_call_;
      poll_slots_ = device_polls_;
      body(i);
      device_registers_ = register_bytes_;
      device_local_ = local_bytes_;
      device_call_ = call_bytes_;
      device_polls_ = poll_slots_;
    }
  device_functions_parsed_ = true;
}

// Device functions share one frame each for the whole module (there is no recursion); a kernel's own comes
// after them.
void Parser::body(int index) {
  Function& f = program.functions[index];
  if (f.entry) {
    register_bytes_ = device_registers_;
    local_bytes_ = device_local_;
    call_bytes_ = device_call_;
    poll_slots_ = device_polls_;
  }
  current_ = &f;
  at = f.body;
  line = f.body_line;
  f.start = program.code.size();
  f.static_shared = module_shared_;
  // Dynamic shared memory follows the static one: declarations may come anywhere, so look ahead.
  {
    u32 end = module_shared_;
    const size_t body_end = [&] {
      size_t saved_at = at;
      int saved_line = line;
      skip_body();
      size_t e = at;
      at = saved_at, line = saved_line;
      return e;
    }();
    for (size_t q = text.find(".shared ", at); q < body_end; q = text.find(".shared ", q + 1)) {
      if (!isspace(static_cast<u8>(text[q - 1]))) continue;
      Function dummy;
      Function* outer = current_;
      dummy.static_shared = end;
      current_ = &dummy;
      scopes_.emplace_back();
      const size_t stop = text.find(';', q);
      if (text.compare(q - 8, 8, ".extern ") != 0) variable(".shared", strip(text.substr(q + 8, stop - q - 8)), false);
      scopes_.pop_back();
      current_ = outer;
      end = dummy.static_shared;
    }
    f.dynamic_shared_start = align_up(end, 128);
    for (auto& [name, s] : module_symbols_)
      if (s.space == Space::Shared && !s.size) s.address = f.dynamic_shared_start;
  }
  scopes_.assign(2, Scope());
  for (const auto* list : {&f.parameters, &f.results})
    for (const Parameter& p : *list) {
      Symbol s;
      s.space = Space::Param;
      s.call_parameter = !f.entry;
      s.address = p.offset;
      s.size = p.size;
      scopes_[0][p.name] = s;
    }
  labels_.clear();
  tables_.clear();
  fixups_.clear();
  for (int depth = 1; depth;) {
    skip_space();
    if (at >= text.size()) fail("PTX: end of text in %s", f.name.c_str());
    const char c = text[at];
    if (c == '{') {
      depth++;
      scopes_.emplace_back();
      at++;
    } else if (c == '}') {
      depth--;
      scopes_.pop_back();
      at++;
    } else if (c == ';') {
      at++;
    } else {
      const int here = line;
      const std::string w = peek_word();
      size_t after = at + w.size();
      while (text[after] == ' ' || text[after] == '\t') after++;
      if (!w.empty() && w[0] != '.' && text[after] == ':' && text[after + 1] != ':') {
        at = after + 1;
        const std::string next = peek_word();
        if (next == ".branchtargets") {
          word();
          tables_[w] = split(strip(until(';')));
        } else if (next == ".callprototype" || next == ".calltargets") {
          until(';');
        } else {
          labels_[w] = program.code.size();
        }
      } else if (w == ".loc") {
        skip_line();
      } else {
        statement(strip(until(';')), here);
      }
    }
  }
  Instruction end;
  end.flow = Flow::Return;
  program.code.push_back(end);
  for (const Fixup& fix : fixups_) {
    auto it = labels_.find(fix.label);
    if (it == labels_.end()) fail("PTX: label %s of %s is nowhere", fix.label.c_str(), f.name.c_str());
    Instruction& I = program.code[fix.instruction];
    (fix.slot < 0 ? I.target : I.targets[fix.slot]) = it->second;
  }
  scopes_.clear();
  current_ = nullptr;
  f.register_bytes = register_bytes_;
  f.local_bytes = align_up(local_bytes_, 16);
  f.call_bytes = align_up(call_bytes_, 16);
  f.poll_slots = poll_slots_;
  for (size_t i = f.start; i < program.code.size(); i++) program.code[i].unit = unit_number(program.code[i]);
  f.parsed = true;
}

void Parser::statement(std::string s, int here) {
  if (starts(s, ".reg") && (isspace(static_cast<u8>(s[4])) || s[4] == '.')) return registers(strip(s.substr(4)));
  if (starts(s, ".pragma")) return;
  for (const char* directive : {".shared", ".local", ".param", ".global", ".const"})
    if (starts(s, directive)) {
      variable(directive, strip(s.substr(strlen(directive))), false);
      return;
    }
  if (starts(s, ".extern")) {
    s = strip(s.substr(7));
    if (!starts(s, ".shared")) fail("PTX line %d: extern variable in a function", here);
    variable(".shared", strip(s.substr(7)), true);
    return;
  }
  instruction(s, here);
}

void Parser::instruction(std::string s, int here) {
  Instruction I;
  I.line = here;
  if (s[0] == '@') {
    size_t end = std::min(s.find_first_of(" \t\n"), s.size());
    std::string name = s.substr(1, end - 1);
    if (!name.empty() && name[0] == '!') {
      I.predicate_negated = true;
      name = name.substr(1);
    }
    const Symbol* p = find(name);
    if (!p || !p->is_register || p->size != 1) fail("PTX line %d: predicate %s", here, name.c_str());
    I.predicate = p->address;
    s = strip(s.substr(end));
  }
  size_t end = 0;
  while (end < s.size() && (word_character(s[end]) || s[end] == ':')) end++;
  const std::vector<std::string> words = split_dots(s.substr(0, end));
  const std::vector<std::string> operands = split(strip(s.substr(end)));
  std::vector<Type> types;
  for (size_t k = 1; k < words.size(); k++)
    if (Type t = type_named(words[k]); t != Type::None) types.push_back(t);
  if (!types.empty()) I.type = types[0];
  if (types.size() > 1) I.type2 = types[1];
  std::string why;
  const Entry* entry = find_entry(words, types.empty() ? Type::None : types[0], why);
  if (!entry) fail("PTX line %d: %s: %s", here, why.c_str(), s.c_str());
  I.entry = entry;
  for (const std::string& w : words) {
    if (w == "rz" || w == "rzi")
      I.rounding = kZero;
    else if (w == "rm" || w == "rmi")
      I.rounding = kDown;
    else if (w == "rp" || w == "rpi")
      I.rounding = kUp;
    else if (w == "rna")
      I.rounding = kAway;
    else if (w == "ftz")
      I.ftz = true;
    else if (w == "sat")
      I.saturate = true;
  }
  Decoder d{*this, I, *entry, words, operands, types};
  try {
    entry->decode(d);
  } catch (const std::out_of_range&) {
    fail("PTX line %d: too few operands or types: %s", here, s.c_str());
  }
  if (!I.run) d.unsupported("type");
  if (I.polls && words[0] == "ld" && (I.space == Space::Global || I.space == Space::Generic))
    I.poll_slot = poll_slots_++;
  program.code.push_back(std::move(I));
}

// ---- operands

const u8* Parser::constant(u64 value, int width) {
  const u8*& lanes = constants_[{value, width}];
  if (!lanes) {
    program.constants.push_back(std::make_unique<u8[]>(width * kLanes + 64));
    u8* memory = program.constants.back().get();
    memory += -reinterpret_cast<uintptr_t>(memory) & 63;
    for (int i = 0; i < kLanes; i++) memcpy(memory + i * width, &value, width);
    lanes = memory;
  }
  return lanes;
}

void Parser::place_vector(Instruction& I, Operand& o, const std::vector<Operand>& parts) {
  o.kind = Operand::Vector;
  o.first = I.parts.size();
  o.count = parts.size();
  I.parts.insert(I.parts.end(), parts.begin(), parts.end());
}

void Parser::operand(Instruction& I, int slot, const std::string& s, Type t) {
  if (slot >= 6) fail("PTX line %d: too many operands", I.line);
  I.op[slot] = parse_operand(I, s, t);
  I.operand_count = std::max<int>(I.operand_count, slot + 1);
}

Operand Parser::parse_operand(Instruction& I, std::string s, Type t) {
  Operand o;
  s = strip(s);
  if (s.empty()) return o;
  if (s == "_") {
    o.kind = Operand::Sink;
    return o;
  }
  if (s[0] == '!') {
    o = parse_operand(I, s.substr(1), t);
    o.negated = !o.negated;
    return o;
  }
  if (s[0] == '{') {
    std::vector<Operand> parts;
    for (const std::string& p : split(inside(s))) parts.push_back(parse_operand(I, p, t));
    place_vector(I, o, parts);
    return o;
  }
  if (size_t bar = s.find('|'); bar != std::string::npos) {
    std::vector<Operand> parts = {parse_operand(I, s.substr(0, bar), t), parse_operand(I, s.substr(bar + 1), t)};
    place_vector(I, o, parts);
    return o;
  }
  if (s[0] == '[') {
    o.kind = Operand::Memory;
    std::string base = strip(inside(s));
    if (base.find(',') != std::string::npos)
      fail("PTX line %d: tensor addresses are not supported: %s", I.line, s.c_str());
    u64 displacement = 0;
    if (size_t sign = base.find_first_of("+-", 1); sign != std::string::npos) {
      std::string number = base.substr(sign);
      base = strip(base.substr(0, sign));
      number.erase(std::remove_if(number.begin(), number.end(), [](char c) { return isspace(static_cast<u8>(c)); }),
                   number.end());
      if (number.size() > 1 && number[0] == '+' && (number[1] == '-' || number[1] == '+')) number = number.substr(1);
      if (!literal(number, Type::B64, displacement)) fail("PTX line %d: address %s", I.line, s.c_str());
    }
    u64 absolute;
    if (literal(base, Type::B64, absolute)) {
      o.immediate = absolute + displacement;
      return o;
    }
    const Symbol* symbol = find(base);
    if (!symbol) fail("PTX line %d: unknown name in address %s", I.line, s.c_str());
    if (symbol->is_register) {
      o.has_base = true;
      o.offset = symbol->address;
      o.width = symbol->size;
      o.immediate = displacement;
    } else {
      o.immediate = symbol->address + displacement;
      o.space = symbol->space;
      o.function_param = symbol->call_parameter;
    }
    return o;
  }
  const int width = std::min(size_of(t), 8);
  u64 value;
  auto immediate = [&](u64 v) {
    o.kind = Operand::Immediate;
    o.immediate = v;
    o.width = t == Type::None ? 4 : width;
    o.lanes = constant(v, o.width);
    return o;
  };
  if (literal(s, t, value)) return immediate(t == Type::Pred ? value & 1 : value);
  if (Special special = special_named(s); special != Special::None) {
    o.kind = Operand::SpecialRegister;
    o.special = special;
    return o;
  }
  if (s == "WARP_SZ") return immediate(kLanes);
  const Symbol* symbol = find(s);
  u64 displacement = 0;
  if (!symbol)
    if (size_t sign = s.find_first_of("+-", 1);
        sign != std::string::npos && literal(strip(s.substr(sign)), Type::B64, displacement))
      symbol = find(strip(s.substr(0, sign)));
  if (symbol && symbol->is_register) {
    if (symbol->size == 16) {  // a .b128 register is a pair of 64-bit ones
      std::vector<Operand> halves(2);
      for (int h = 0; h < 2; h++) {
        halves[h].kind = Operand::Register;
        halves[h].width = 8;
        halves[h].offset = symbol->address + 8 * kLanes * h;
      }
      place_vector(I, o, halves);
      return o;
    }
    o.kind = Operand::Register;
    o.offset = symbol->address;
    o.width = symbol->size;
    return o;
  }
  if (symbol) {
    immediate(symbol->address + displacement);
    o.space = symbol->space;
    return o;
  }
  if (auto f = program.function_index.find(s); f != program.function_index.end())
    return immediate(kFunctionWindow | f->second);
  fail("PTX line %d: unknown name '%s'", I.line, s.c_str());
}

void Parser::branch(Instruction& I, const std::string& label) {
  fixups_.push_back({program.code.size(), -1, label});
  (void)I;
}

void Parser::branch_table(Instruction& I, const std::string& name) {
  auto it = tables_.find(name);
  if (it == tables_.end()) fail("PTX line %d: branch table %s", I.line, name.c_str());
  I.targets.resize(it->second.size());
  for (size_t k = 0; k < it->second.size(); k++) fixups_.push_back({program.code.size(), int(k), it->second[k]});
}

// op[0]: where results go, op[1]: the function, op[2]: arguments. Each result and argument is a .param
// variable.
void Parser::call(Instruction& I, const std::vector<std::string>& operands) {
  size_t k = 0;
  auto list = [&](int slot) {
    std::vector<Operand> parts;
    if (k < operands.size() && operands[k][0] == '(')
      for (const std::string& name : split(inside(operands[k++]))) {
        const Symbol* s = find(name);
        if (!s) fail("PTX line %d: call argument %s", I.line, name.c_str());
        Operand o;
        o.kind = Operand::Memory;
        o.function_param = true;
        o.immediate = s->address;
        o.offset = s->size;
        parts.push_back(o);
      }
    place_vector(I, I.op[slot], parts);
  };
  list(0);
  const std::string& name = operands.at(k++);
  if (auto f = program.function_index.find(name); f != program.function_index.end()) {
    I.op[1].kind = Operand::Function;
    I.op[1].immediate = f->second;
  } else {
    I.op[1] = parse_operand(I, name, Type::B64);
  }
  list(2);
}

// ---- Program

Program::Program(std::string source) : text(std::move(source)) {
  for (size_t i = 0; i < text.size();) {
    size_t end = std::min(text.find('\n', i), text.size());
    lines.push_back(text.substr(i, end - i));
    i = end + 1;
  }
  parser_ = std::make_unique<Parser>(*this);
  parser_->module();
}

Program::~Program() {
  for (void* b : blocks) {
    simulator().memory.remove(reinterpret_cast<u64>(b));
    free(b);
  }
}

int Program::find(const std::string& name) const {
  auto it = function_index.find(name);
  return it != function_index.end() && functions[it->second].entry && functions[it->second].defined ? it->second : -1;
}

void Program::prepare(int kernel) {
  if (functions[kernel].parsed) return;
  parser_->device_functions();
  parser_->body(kernel);
}

const std::string& Program::line(int number) const {
  static const std::string kNone;
  return number > 0 && number <= int(lines.size()) ? lines[number - 1] : kNone;
}

}  // namespace ptxsim
