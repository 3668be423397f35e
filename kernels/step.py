"""One time step in one launch: both matmuls of all gates and the cell update, or their backward.

Loads beyond the last unit or row of a tile repeat that one, which needs no mask; only stores are masked.
"""

import triton
import triton.language as tl

from .tile import dot_rows, dot_rows_twice, unstack, weight_rows

FORWARD_RUNTIME = ["n", "n_prev", "n_next", "i_row", "i_prev", "i_h", "i_cell", "i_cell_prev"]


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def step_forward_kernel(
    x,  # [N, I]
    h0,  # [B, P]
    c0,  # [B, H] or None
    w_ih,  # [G*H, I]
    w_hh,  # [G*H, P]
    b_ih,  # [G*H] or None
    b_hh,  # [G*H] or None
    zeros,  # [max(I, P)]: the weight row of an accumulator without a gate, the h of a reset; None without either
    y,  # [N, P], read: h of the previous step
    h,  # [N, H], written; y itself without projection
    h_n,  # [B, H] or None
    c_n,  # [B, H] or None
    gates,  # [N, S*H] or None
    cells,  # [N, H], or [B, H] when only carried; None without c
    resets,  # [N] or None: not 0 where a row's step starts from zeros
    n,  # rows of this step
    n_prev,  # of these, the first n_prev have a previous step; the others start from h0, c0
    n_next,  # and the first n_next have a next step; the others end here
    i_row,  # first row of this step in x and gates
    i_prev,  # first row of the previous step in y
    i_h,  # first row of this step in h
    i_cell,  # first row of this step in cells
    i_cell_prev,
    I,
    H,
    P,
    FORWARD: tl.constexpr,
    X_GATE: tl.constexpr,
    H_GATE: tl.constexpr,
    TOGETHER: tl.constexpr,  # every accumulator has both gates
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SAME_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    A: tl.constexpr = len(X_GATE)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_u = tl.program_id(0) * BU
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    i_b = tl.minimum(o_b, n - 1).to(tl.int64)
    o_a = tl.arange(0, A * BU)
    i_unit = tl.minimum(i_u + o_a % BU, H - 1)
    p_w_ih = weight_rows(w_ih, o_a // BU, i_unit, zeros, I, H, X_GATE)
    p_w_hh = weight_rows(w_hh, o_a // BU, i_unit, zeros, P, H, H_GATE)
    p_x = x + (i_row + i_b) * I
    p_h = tl.where(o_b < n_prev, y + (i_prev + i_b) * P, h0 + i_b * P)
    if resets is not None:
        p_h = tl.where(tl.load(resets + i_row + i_b) != 0, zeros, p_h)
    b_acc = tl.zeros((A * BU, BB), ACC)
    if b_ih is not None:
        b_bias = tl.load(weight_rows(b_ih, o_a // BU, i_unit, zeros, 1, H, X_GATE)).to(ACC)
        b_bias += tl.load(weight_rows(b_hh, o_a // BU, i_unit, zeros, 1, H, H_GATE)).to(ACC)
        b_acc += b_bias[:, None]
    if TOGETHER:
        b_acc = dot_rows_twice(b_acc, p_w_ih, p_x, I, p_w_hh, p_h, P, SAME_K, BK, EVEN_K, PRECISION)
    else:
        b_part_x = dot_rows(tl.zeros((A * BU, BB), ACC), p_w_ih, p_x, 0, I, BK, EVEN_K, PRECISION)
        b_part_h = dot_rows(tl.zeros((A * BU, BB), ACC), p_w_hh, p_h, 0, P, BK, EVEN_K, PRECISION)
        # Zeros times an infinite x or h are NaN, but some sums have no such part.
        for a in tl.static_range(A):
            if X_GATE[a] < 0:
                b_part_x = tl.where((o_a // BU == a)[:, None], 0.0, b_part_x)
            if H_GATE[a] < 0:
                b_part_h = tl.where((o_a // BU == a)[:, None], 0.0, b_part_h)
        b_acc += b_part_x + b_part_h

    o_u = (i_u + tl.arange(0, BU))[:, None]
    o_b = o_b[None, :]
    m_out = (o_u < H) & (o_b < n)
    m_last = m_out & (o_b >= n_next)
    m_kept = m_out
    if resets is not None:
        m_kept = m_out & (tl.load(resets + i_row + o_b, mask=o_b < n, other=0) == 0)
    o_out = o_b.to(tl.int64) * H + o_u
    b_h_prev = tl.load(p_h[None, :] + o_u, mask=m_out & (o_u < P), other=0.0).to(ACC)
    b_prev = (b_h_prev,)
    if cells is not None:
        b_c_prev = tl.load(c0 + o_out, mask=m_kept & (o_b >= n_prev), other=0.0).to(ACC)
        p_c_prev = cells + tl.cast(i_cell_prev, tl.int64) * H + o_out
        b_c_prev += tl.load(p_c_prev, mask=m_kept & (o_b < n_prev), other=0.0)
        b_prev = (b_h_prev, b_c_prev)

    b_next, b_saved = FORWARD(unstack(b_acc, A, BU, BB), b_prev, (), ())

    b_h = b_next[0].to(h.dtype.element_ty)
    tl.store(h + tl.cast(i_h, tl.int64) * H + o_out, b_h, mask=m_out)
    if cells is not None:
        tl.store(cells + tl.cast(i_cell, tl.int64) * H + o_out, b_next[1], mask=m_out)
    if n_next < n:
        if h_n is not None:
            tl.store(h_n + o_out, b_h, mask=m_last)
        if cells is not None:
            tl.store(c_n + o_out, b_next[1].to(c_n.dtype.element_ty), mask=m_last)
    if gates is not None:
        S: tl.constexpr = len(b_saved)
        p_gates = gates + tl.cast(i_row, tl.int64) * (S * H) + o_b.to(tl.int64) * (S * H) + o_u
        for s in tl.static_range(S):
            tl.store(p_gates, b_saved[s].to(gates.dtype.element_ty), mask=m_out)
            p_gates += H


BACKWARD_RUNTIME = ["n", "n_d", "n_prev", "n_next", "i_row", "i_prev", "i_d", "i_dc", "i_dc_next"]


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def step_backward_kernel(
    d,  # [N, LD]: dgates, read at the next step; with projection the whole gradient of y, read at this step
    w_t,  # [H, LW]: W_hh^T; with projection W_hr^T
    dy,  # [N, H] or None
    dh_n,  # [B, H] or None
    dc_n,  # [B, H] or None
    dcells,  # [N, H] or None: gradient of every c
    h0,  # [B, H], read only with USE_H, as y
    c0,  # [B, H] or None
    y,  # [N, H]
    gates,  # [N, S*H] or None
    cells,  # [N, H] or None
    dgates,  # [N, A*H]
    dc,  # [2, B, H]: dc of the previous step; two, since blocks read one while they write the other
    dh,  # [2, B, H]: what reaches h of the previous step past the matmul; None without
    dc0,  # [B, H] or None
    dh0,  # [B, H] or None: only the part past the matmul
    resets,  # [N] or None
    resets_d,  # the same, None with projection: a row of d whose step starts from zeros does not reach this step
    n,  # rows of this step
    n_d,  # of these, the first n_d have rows in d
    n_prev,  # the first n_prev have a previous step; the others start from h0, c0
    n_next,  # the first n_next have a next step; the others end here
    i_row,  # first row of this step
    i_prev,  # first row of the previous step
    i_d,  # first row in d
    i_dc,  # first row in dc and dh to write
    i_dc_next,  # first row in dc and dh to read
    H,
    LW,
    LD,
    K,  # columns of a gate in w_t and of an accumulator in d
    BACKWARD: tl.constexpr,
    RUNS: tl.constexpr,
    A: tl.constexpr,
    S: tl.constexpr,
    USE_H: tl.constexpr,
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if d.dtype.element_ty == tl.float64 else tl.float32
    i_u = tl.program_id(0) * BU
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    i_b = tl.maximum(tl.minimum(o_b, n_d - 1), 0).to(tl.int64)
    i_unit = tl.minimum(i_u + tl.arange(0, BU), H - 1).to(tl.int64)
    n_k = tl.where(n_d > 0, K, 0)
    b_dh = tl.zeros((BU, BB), ACC)
    for r in tl.static_range(len(RUNS)):
        p_w = w_t + i_unit * LW + RUNS[r][1] * K
        p_d = d + (i_d + i_b) * LD + RUNS[r][0] * K
        b_dh = dot_rows(b_dh, p_w, p_d, 0, RUNS[r][2] * n_k, BK, EVEN_K, PRECISION)

    o_u = (i_u + tl.arange(0, BU))[:, None]
    o_b = o_b[None, :]
    m_out = (o_u < H) & (o_b < n)
    m_prev = m_out & (o_b < n_prev)
    m_first = m_out & (o_b >= n_prev)
    m_next = m_out & (o_b < n_next)
    m_last = m_out & (o_b >= n_next)
    m_kept = m_out
    if resets is not None:
        m_kept = m_out & (tl.load(resets + i_row + o_b, mask=o_b < n, other=0) == 0)
    i_b = o_b.to(tl.int64)
    o_out = i_b * H + o_u
    o_row = tl.cast(i_row, tl.int64) * H + o_out
    o_prev = tl.cast(i_prev, tl.int64) * H + o_out
    m_d = o_b < n_d
    if resets_d is not None:
        m_d = m_d & (tl.load(resets_d + i_d + o_b, mask=m_d, other=0) == 0)
    b_dh = tl.where(m_d, b_dh, 0.0)
    if dy is not None:
        b_dh += tl.load(dy + o_row, mask=m_out, other=0.0).to(ACC)
    if dh_n is not None:
        b_dh += tl.load(dh_n + o_out, mask=m_last, other=0.0).to(ACC)
    if dh is not None:
        b_dh += tl.load(dh + tl.cast(i_dc_next, tl.int64) * H + o_out, mask=m_next, other=0.0)
    b_h = b_dh
    b_h_prev = b_dh
    if USE_H:
        b_h = tl.load(y + o_row, mask=m_out, other=0.0).to(ACC)
        b_h_prev = tl.load(h0 + o_out, mask=m_first & m_kept, other=0.0).to(ACC)
        b_h_prev += tl.load(y + o_prev, mask=m_prev & m_kept, other=0.0).to(ACC)
    b_d = (b_dh,)
    b_next = (b_h,)
    b_prev = (b_h_prev,)
    if cells is not None:
        b_dc = tl.zeros((BU, BB), ACC)
        b_dc += tl.load(dc + tl.cast(i_dc_next, tl.int64) * H + o_out, mask=m_next, other=0.0)
        if dc_n is not None:
            b_dc += tl.load(dc_n + o_out, mask=m_last, other=0.0).to(ACC)
        if dcells is not None:
            b_dc += tl.load(dcells + o_row, mask=m_out, other=0.0)
        b_c = tl.load(cells + o_row, mask=m_out, other=0.0)
        b_c_prev = tl.load(c0 + o_out, mask=m_first & m_kept, other=0.0).to(ACC)
        b_c_prev += tl.load(cells + o_prev, mask=m_prev & m_kept, other=0.0)
        b_d = (b_dh, b_dc)
        b_next = (b_h, b_c)
        b_prev = (b_h_prev, b_c_prev)
    b_saved = ()
    for s in tl.static_range(S):
        p_gate = gates + (i_row + i_b) * (S * H) + s * H + o_u
        b_saved = b_saved + (tl.load(p_gate, mask=m_out, other=0.0).to(ACC),)

    b_dacc, b_dprev, _, _ = BACKWARD(b_d, b_saved, b_next, b_prev, (), ())

    for a in tl.static_range(A):
        p_dgate = dgates + (i_row + i_b) * (A * H) + a * H + o_u
        tl.store(p_dgate, b_dacc[a].to(dgates.dtype.element_ty), mask=m_out)
    if cells is not None:
        b_dc = b_dprev[1]
        if resets is not None:
            b_dc = tl.where(m_kept, b_dc, 0.0)
        tl.store(dc + tl.cast(i_dc, tl.int64) * H + o_out, b_dc, mask=m_prev)
        tl.store(dc0 + o_out, b_dc.to(dc0.dtype.element_ty), mask=m_first)
    if dh is not None:
        b_dh = b_dprev[0]
        if resets is not None:
            b_dh = tl.where(m_kept, b_dh, 0.0)
        tl.store(dh + tl.cast(i_dc, tl.int64) * H + o_out, b_dh, mask=m_prev)
        tl.store(dh0 + o_out, b_dh.to(dh0.dtype.element_ty), mask=m_first)
