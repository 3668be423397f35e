// What real chips hold, and how many blocks of a kernel fit.
//
// Per compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; NVIDIA's CCCL
// holds the same numbers (libcudacxx/include/cuda/__device/arch_traits.h). SM counts: NVIDIA's architecture whitepapers
// and data sheets, named in each row.

#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace ptxsim {

const Chip kChips[] = {
    // name, sm, SMs, threads/SM, blocks/SM, registers/SM, shared/SM, shared/block opt-in, reserved/block
    {"a100", 80, 108, 2048, 32, 65536, 167936, 166912, 1024, "NVIDIA A100 Tensor Core GPU Architecture whitepaper"},
    {"a10", 86, 72, 1536, 16, 65536, 102400, 101376, 1024, "NVIDIA A10 data sheet; GA102 whitepaper (9216 CUDA cores)"},
    {"rtx3090", 86, 82, 1536, 16, 65536, 102400, 101376, 1024, "NVIDIA Ampere GA102 GPU Architecture whitepaper"},
    {"rtx3060", 86, 28, 1536, 16, 65536, 102400, 101376, 1024,
     "NVIDIA GeForce RTX 3060 specifications (3584 CUDA cores)"},
    {"l4", 89, 58, 1536, 24, 65536, 102400, 101376, 1024, "NVIDIA L4 data sheet (7424 CUDA cores)"},
    {"l40s", 89, 142, 1536, 24, 65536, 102400, 101376, 1024, "NVIDIA L40S data sheet (18176 CUDA cores)"},
    {"rtx4090", 89, 128, 1536, 24, 65536, 102400, 101376, 1024, "NVIDIA Ada GPU Architecture whitepaper"},
    {"h100-sxm", 90, 132, 2048, 32, 65536, 233472, 232448, 1024, "NVIDIA H100 Tensor Core GPU Architecture whitepaper"},
    {"h100-pcie", 90, 114, 2048, 32, 65536, 233472, 232448, 1024,
     "NVIDIA H100 Tensor Core GPU Architecture whitepaper"},
    {"h200", 90, 132, 2048, 32, 65536, 233472, 232448, 1024, "NVIDIA H200 data sheet: the GH100 of the H100 SXM"},
    {"b200", 100, 148, 2048, 32, 65536, 233472, 232448, 1024,
     "74 SMs on each of two dies: Chips and Cheese, \"Nvidia's B200\""},
    {"rtx5090", 120, 170, 1536, 24, 65536, 102400, 101376, 1024, "NVIDIA RTX Blackwell GPU Architecture whitepaper"},
};
const int kChipCount = sizeof kChips / sizeof *kChips;

const Chip* find_chip(const std::string& name) {
  for (const Chip& c : kChips)
    if (name == c.name) return &c;
  return nullptr;
}

// CUDA's occupancy rules for cc 8.0 and later: registers are given out per warp in units of 256, to four
// partitions; shared memory in units of 128 bytes, plus what the driver reserves for each block.
int blocks_per_sm(const Chip& chip, int threads, int registers, u64 shared_bytes, std::string* why) {
  char text[200];
  auto none = [&](const char* format, auto... values) {
    snprintf(text, sizeof text, format, values...);
    if (why) *why = text;
    return 0;
  };
  const int warps = (threads + kLanes - 1) / kLanes;
  int blocks = std::min(chip.threads_per_sm / (warps * kLanes), chip.blocks_per_sm);
  if (!blocks) return none("%d threads a block, an SM holds %d", threads, chip.threads_per_sm);
  if (registers) {
    const int per_warp = (registers * kLanes + 255) / 256 * 256, per_partition = chip.registers_per_sm / 4;
    const int resident_warps = per_partition / per_warp * 4;
    blocks = std::min(blocks, resident_warps / warps);
    if (!blocks)
      return none("%d registers a thread x %d threads, an SM has %d", registers, threads, chip.registers_per_sm);
  }
  if (shared_bytes > u64(chip.shared_per_block))
    return none("%llu bytes of shared memory, a block may have %d", (unsigned long long)shared_bytes,
                chip.shared_per_block);
  const u64 with_reserve = (shared_bytes + 127) / 128 * 128 + chip.reserved_shared_per_block;
  blocks = std::min<u64>(blocks, chip.shared_per_sm / with_reserve);
  return blocks
             ? blocks
             : none("%llu bytes of shared memory, an SM has %d", (unsigned long long)shared_bytes, chip.shared_per_sm);
}

}  // namespace ptxsim
