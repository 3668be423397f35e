"""One time step in one launch: both matmuls of all gates and the cell update, or their backward.

Loads beyond the last unit or row of a tile repeat that one, which needs no mask; only stores are masked.
"""

import triton
import triton.language as tl

from .tile import dot_rows, dot_rows_twice, unstack, weight_rows

FORWARD_RUNTIME = [
    *("n", "n_prev", "n_next", "i_row", "i_prev", "i_h", "i_cell", "i_cell_prev"),
    *("s_state", "s_cells", "s_rows"),
]


@triton.jit
def per_unit(parameters, o_u, m_u, H, COUNT: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr, ACC: tl.constexpr):
    """The cell's parameters [COUNT, H] of units o_u [BU, 1], as blocks."""
    b_all = ()
    for k in tl.static_range(COUNT):
        b_one = tl.load(parameters + k * H + o_u, mask=m_u, other=0.0).to(ACC)
        b_all = b_all + (tl.broadcast_to(b_one, (BU, BB)),)
    return b_all


@triton.jit
def per_row(p, stride, mask, COUNT: tl.constexpr, ACC: tl.constexpr):
    """A block of each of COUNT arrays that begin ``stride`` elements apart."""
    b_all = ()
    for k in tl.static_range(COUNT):
        b_all = b_all + (tl.load(p + tl.cast(stride, tl.int64) * k, mask=mask, other=0.0).to(ACC),)
    return b_all


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def step_forward_kernel(
    x,  # [N, I]; None where the products are there
    x_product,  # [n, G*H], x W_ih^T in the dtype of the sums, or None; x and the weights are None then
    h_product,  # [n, G*H]
    h0,  # [B, P]
    c0,  # [K, B, H]: the states beside h; None without
    w_ih,  # [G*H, I]
    w_hh,  # [G*H, D]
    b_ih,  # [G*H] or None
    b_hh,  # [G*H] or None
    zeros,  # [max(I, P)]: the weight row of an accumulator without a gate, the h of a reset; None without either
    y,  # [N, P], read: h of the previous step
    h,  # [N, H], written; y itself without projection
    h_n,  # [B, H] or None
    c_n,  # [K, B, H] or None
    gates,  # [N, S*H] or None
    cells,  # [K, N, H], or [K, 2 B, H] when only carried; None without, or where nobody asks for those of one step
    parameters,  # [PARAMETERS, H] or None
    inputs,  # [INPUTS, N, H] or None
    resets,  # [N] or None: not 0 where a row's step starts from zeros
    n,  # rows of this step
    n_prev,  # of these, the first n_prev have a previous step; the others start from h0, c0
    n_next,  # and the first n_next have a next step; the others end here
    i_row,  # first row of this step in x and gates
    i_prev,  # first row of the previous step in y
    i_h,  # first row of this step in h
    i_cell,  # first row of this step in cells
    i_cell_prev,
    s_state,  # elements from a state to the next in c0 and c_n
    s_cells,  # in cells
    s_rows,  # in inputs
    I,
    H,
    P,
    D,  # columns of w_hh: P, of several heads H / HEADS
    K: tl.constexpr,
    PARAMETERS: tl.constexpr,
    INPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    FORWARD: tl.constexpr,
    X_GATE: tl.constexpr,
    H_GATE: tl.constexpr,
    TOGETHER: tl.constexpr,  # every accumulator has both gates
    BU: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
    SAME_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    A: tl.constexpr = len(X_GATE)
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    i_u = tl.program_id(0) * BU
    i_end = H
    n_h = P
    if HEADS > 1:
        # A program's units are of one head.
        i_head = tl.program_id(0) // tl.cdiv(D, BU)
        i_u = i_head * D + tl.program_id(0) % tl.cdiv(D, BU) * BU
        i_end = i_head * D + D
        n_h = D
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    i_b = tl.minimum(o_b, n - 1).to(tl.int64)
    p_h = tl.where(o_b < n_prev, y + (i_prev + i_b) * P, h0 + i_b * P)
    if resets is not None:
        p_h = tl.where(tl.load(resets + i_row + i_b) != 0, zeros, p_h)
    if x_product is None:
        o_a = tl.arange(0, A * BU)
        i_unit = tl.minimum(i_u + o_a % BU, i_end - 1)
        p_w_ih = weight_rows(w_ih, o_a // BU, i_unit, zeros, I, H, X_GATE)
        p_w_hh = weight_rows(w_hh, o_a // BU, i_unit, zeros, n_h, H, H_GATE)
        p_x = x + (i_row + i_b) * I
        p_h_k = p_h
        if HEADS > 1:
            p_h_k = p_h + i_head * D
        b_acc = tl.zeros((A * BU, BB), ACC)
        if b_ih is not None:
            b_bias = tl.load(weight_rows(b_ih, o_a // BU, i_unit, zeros, 1, H, X_GATE)).to(ACC)
            b_bias += tl.load(weight_rows(b_hh, o_a // BU, i_unit, zeros, 1, H, H_GATE)).to(ACC)
            b_acc += b_bias[:, None]
        if TOGETHER:
            b_acc = dot_rows_twice(b_acc, p_w_ih, p_x, I, p_w_hh, p_h_k, n_h, SAME_K, BK, EVEN_K, PRECISION)
        else:
            b_part_x = dot_rows(tl.zeros((A * BU, BB), ACC), p_w_ih, p_x, 0, I, BK, EVEN_K, PRECISION)
            b_part_h = dot_rows(tl.zeros((A * BU, BB), ACC), p_w_hh, p_h_k, 0, n_h, BK, EVEN_K, PRECISION)
            # Zeros times an infinite x or h are NaN, but some sums have no such part.
            for a in tl.static_range(A):
                if X_GATE[a] < 0:
                    b_part_x = tl.where((o_a // BU == a)[:, None], 0.0, b_part_x)
                if H_GATE[a] < 0:
                    b_part_h = tl.where((o_a // BU == a)[:, None], 0.0, b_part_h)
            b_acc += b_part_x + b_part_h
        b_accs = unstack(b_acc, A, BU, BB)
    else:
        b_accs = ()
        o_unit = tl.minimum(i_u + tl.arange(0, BU), i_end - 1)[:, None]
        o_row = i_b[None, :] * (G * H) + o_unit
        for a in tl.static_range(A):
            b_one = tl.zeros((BU, BB), ACC)
            if X_GATE[a] >= 0:
                if b_ih is not None:
                    b_one += tl.load(b_ih + X_GATE[a] * H + o_unit).to(ACC)
                b_one += tl.load(x_product + X_GATE[a] * H + o_row)
            if H_GATE[a] >= 0:
                if b_ih is not None:
                    b_one += tl.load(b_hh + H_GATE[a] * H + o_unit).to(ACC)
                b_one += tl.load(h_product + H_GATE[a] * H + o_row)
            b_accs = b_accs + (b_one,)

    o_u = (i_u + tl.arange(0, BU))[:, None]
    o_b = o_b[None, :]
    m_out = (o_u < i_end) & (o_b < n)
    m_last = m_out & (o_b >= n_next)
    m_kept = m_out
    if resets is not None:
        m_kept = m_out & (tl.load(resets + i_row + o_b, mask=o_b < n, other=0) == 0)
    o_out = o_b.to(tl.int64) * H + o_u
    b_h_prev = tl.load(p_h[None, :] + o_u, mask=m_out & (o_u < P), other=0.0).to(ACC)
    b_prev = (b_h_prev,)
    for k in tl.static_range(K):
        p_c0 = c0 + tl.cast(s_state, tl.int64) * k + o_out
        b_c_prev = tl.load(p_c0, mask=m_kept & (o_b >= n_prev), other=0.0).to(ACC)
        if cells is not None:
            p_c_prev = cells + tl.cast(s_cells, tl.int64) * k + tl.cast(i_cell_prev, tl.int64) * H + o_out
            b_c_prev += tl.load(p_c_prev, mask=m_kept & (o_b < n_prev), other=0.0)
        b_prev = b_prev + (b_c_prev,)
    b_parameters = per_unit(parameters, o_u, o_u < i_end, H, PARAMETERS, BU, BB, ACC)
    b_inputs = ()
    if INPUTS > 0:
        b_inputs = per_row(inputs + tl.cast(i_row, tl.int64) * H + o_out, s_rows, m_out, INPUTS, ACC)

    b_next, b_saved = FORWARD(b_accs, b_prev, b_parameters, b_inputs)

    b_h = b_next[0].to(h.dtype.element_ty)
    tl.store(h + tl.cast(i_h, tl.int64) * H + o_out, b_h, mask=m_out)
    if cells is not None:
        for k in tl.static_range(K):
            p_c = cells + tl.cast(s_cells, tl.int64) * k + tl.cast(i_cell, tl.int64) * H + o_out
            tl.store(p_c, b_next[k + 1], mask=m_out)
    if n_next < n:
        if h_n is not None:
            tl.store(h_n + o_out, b_h, mask=m_last)
        for k in tl.static_range(K):
            p_c_n = c_n + tl.cast(s_state, tl.int64) * k + o_out
            tl.store(p_c_n, b_next[k + 1].to(c_n.dtype.element_ty), mask=m_last)
    if gates is not None:
        S: tl.constexpr = len(b_saved)
        p_gates = gates + tl.cast(i_row, tl.int64) * (S * H) + o_b.to(tl.int64) * (S * H) + o_u
        for s in tl.static_range(S):
            tl.store(p_gates, b_saved[s].to(gates.dtype.element_ty), mask=m_out)
            p_gates += H


BACKWARD_RUNTIME = [
    *("n", "n_d", "n_prev", "n_next", "i_row", "i_prev", "i_d", "i_dc", "i_dc_next"),
    *("s_state", "s_rows"),
]


@triton.jit(do_not_specialize=BACKWARD_RUNTIME)
def step_backward_kernel(
    d,  # [N, LD]: dgates, read at the next step; with projection the whole gradient of y, read at this step
    w_t,  # [H, LW]: W_hh^T, of several heads each one's; with projection W_hr^T
    dy,  # [N, H] or None
    dh_n,  # [B, H] or None
    dc_n,  # [K, B, H] or None
    dcells,  # [K, N, H] or None: gradient of every state beside h
    h0,  # [B, H], read only with USE_H, as y
    c0,  # [K, B, H] or None
    y,  # [N, H]
    gates,  # [N, S*H] or None
    cells,  # [K, N, H] or None
    parameters,  # [PARAMETERS, H] or None
    inputs,  # [INPUTS, N, H] or None
    dgates,  # [N, A*H]
    dc,  # [K, 2, B, H]: dc of the previous step; two, since blocks read one while they write the other
    dh,  # [2, B, H]: what reaches h of the previous step past the matmul; None without
    dparameters,  # [PARAMETERS, N, H] or None
    dinputs,  # [INPUTS, N, H] or None
    dc0,  # [K, B, H] or None
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
    s_state,  # elements from a state to the next in c0, dc_n and dc0, half of that in dc
    s_rows,  # in cells, dcells, inputs, dparameters and dinputs
    H,
    LW,
    LD,
    D,  # columns of a gate in w_t and of an accumulator in d, where those of each head follow each other
    K: tl.constexpr,
    PARAMETERS: tl.constexpr,
    INPUTS: tl.constexpr,
    HEADS: tl.constexpr,
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
    i_end = H
    if HEADS > 1:
        i_head = tl.program_id(0) // tl.cdiv(D, BU)
        i_u = i_head * D + tl.program_id(0) % tl.cdiv(D, BU) * BU
        i_end = i_head * D + D
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    i_b = tl.maximum(tl.minimum(o_b, n_d - 1), 0).to(tl.int64)
    i_unit = tl.minimum(i_u + tl.arange(0, BU), i_end - 1).to(tl.int64)
    n_k = tl.where(n_d > 0, D, 0)
    b_dh = tl.zeros((BU, BB), ACC)
    for r in tl.static_range(len(RUNS)):
        p_w = w_t + i_unit * LW + RUNS[r][1] * D
        if HEADS > 1:
            p_d = d + (i_d + i_b) * LD + RUNS[r][0] * H + i_head * D
        else:
            p_d = d + (i_d + i_b) * LD + RUNS[r][0] * D
        b_dh = dot_rows(b_dh, p_w, p_d, 0, RUNS[r][2] * n_k, BK, EVEN_K, PRECISION)

    o_u = (i_u + tl.arange(0, BU))[:, None]
    o_b = o_b[None, :]
    m_out = (o_u < i_end) & (o_b < n)
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
    for k in tl.static_range(K):
        i_state = tl.cast(s_state, tl.int64) * k
        i_rows = tl.cast(s_rows, tl.int64) * k
        b_dc = tl.zeros((BU, BB), ACC)
        b_dc += tl.load(dc + 2 * i_state + tl.cast(i_dc_next, tl.int64) * H + o_out, mask=m_next, other=0.0)
        if dc_n is not None:
            b_dc += tl.load(dc_n + i_state + o_out, mask=m_last, other=0.0).to(ACC)
        if dcells is not None:
            b_dc += tl.load(dcells + i_rows + o_row, mask=m_out, other=0.0)
        b_c_prev = tl.load(c0 + i_state + o_out, mask=m_first & m_kept, other=0.0).to(ACC)
        b_c_prev += tl.load(cells + i_rows + o_prev, mask=m_prev & m_kept, other=0.0)
        b_d = b_d + (b_dc,)
        b_next = b_next + (tl.load(cells + i_rows + o_row, mask=m_out, other=0.0),)
        b_prev = b_prev + (b_c_prev,)
    b_saved = ()
    for s in tl.static_range(S):
        p_gate = gates + (i_row + i_b) * (S * H) + s * H + o_u
        b_saved = b_saved + (tl.load(p_gate, mask=m_out, other=0.0).to(ACC),)

    b_parameters = per_unit(parameters, o_u, o_u < i_end, H, PARAMETERS, BU, BB, ACC)
    b_inputs = ()
    if INPUTS > 0:
        b_inputs = per_row(inputs + o_row, s_rows, m_out, INPUTS, ACC)
    b_dacc, b_dprev, b_dparameters, b_dinputs = BACKWARD(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs)

    for a in tl.static_range(A):
        p_dgate = dgates + (i_row + i_b) * (A * H) + a * H + o_u
        tl.store(p_dgate, b_dacc[a].to(dgates.dtype.element_ty), mask=m_out)
    for k in tl.static_range(PARAMETERS):
        p_d = dparameters + tl.cast(s_rows, tl.int64) * k + o_row
        tl.store(p_d, b_dparameters[k].to(dgates.dtype.element_ty), mask=m_out)
    for k in tl.static_range(INPUTS):
        p_d = dinputs + tl.cast(s_rows, tl.int64) * k + o_row
        tl.store(p_d, b_dinputs[k].to(dgates.dtype.element_ty), mask=m_out)
    for k in tl.static_range(K):
        b_dc = b_dprev[k + 1]
        if resets is not None:
            b_dc = tl.where(m_kept, b_dc, 0.0)
        i_state = tl.cast(s_state, tl.int64) * k
        tl.store(dc + 2 * i_state + tl.cast(i_dc, tl.int64) * H + o_out, b_dc, mask=m_prev)
        tl.store(dc0 + i_state + o_out, b_dc.to(dc0.dtype.element_ty), mask=m_first)
    if dh is not None:
        b_dh = b_dprev[0]
        if resets is not None:
            b_dh = tl.where(m_kept, b_dh, 0.0)
        tl.store(dh + tl.cast(i_dc, tl.int64) * H + o_out, b_dh, mask=m_prev)
        tl.store(dh0 + o_out, b_dh.to(dh0.dtype.element_ty), mask=m_first)
