"""Triton kernels of the recurrent layers: a skeleton per algorithm, a cell per pair of functions.

Letters: T steps, B batch, N rows (sum of batch sizes), I input, H hidden, P projected (P = H without projection),
G gates, A accumulators (pre-activation sums), S arrays saved for backward.
Prefixes: i_ index, o_ offsets, p_ pointers, b_ block in registers, m_ mask; capitals are constexpr.
"""
