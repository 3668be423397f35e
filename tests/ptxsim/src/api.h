#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {
const char* ps_error();          // what the last call that failed said
void* ps_load(const char* ptx);  // null: see ps_error
void ps_unload(void* module);
int ps_kernel(void* module, const char* name);  // index, or -1
int ps_kernel_count(void* module);
const char* ps_kernel_name(void* module, int i);  // null: not a kernel
int ps_nparams(void* module, int kernel);
int ps_param_size(void* module, int kernel, int i);
int ps_static_shared(void* module, int kernel);
int ps_max_threads(void* module, int kernel);
uint64_t ps_symbol(void* module, const char* name, uint64_t* bytes);

void ps_register(uint64_t address, uint64_t bytes);  // memory that kernels may touch
void ps_unregister(uint64_t address);
int ps_option(const char* key, uint64_t value);
int ps_chip(const char* name);
int ps_chip_info(int i, const char** name, int* values, const char** source);
int ps_chip_value(const char* what);
int ps_occupancy(int threads, int registers, uint64_t shared);
void ps_registers(const char* kernel, int registers);
int ps_registers_of(const char* kernel);

const char* ps_count_names();
void ps_counts(uint64_t* out);
void ps_count_reset();
const char* ps_clock_report();  // of the last launch with the option clock: clock.cpp, report()
int ps_clock_cost(int i, const char** name, double* latency, double* issue, const char** source);  // 0: no more
void ps_count_alloc(uint64_t base, uint64_t* out);  // six numbers: machine.h, Traffic

int ps_launch(void* module, int kernel, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz,
              uint32_t shared, void** arguments, int cooperative);
}
#pragma GCC visibility pop
