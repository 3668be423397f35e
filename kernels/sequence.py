"""A whole sequence in one launch: a program owns a slice of the batch, and keeps all of W_hh for every step."""

import triton
import triton.language as tl

from .step import per_row, per_unit

RUNTIME = ["T", "B", "s_state", "s_rows"]


@triton.jit
def step_rows(t, T, B, sizes, offsets):
    """First row and number of rows of time step t; no rows outside 0..T-1."""
    if sizes is None:
        i_row = tl.cast(t, tl.int64) * B
        n = B
    else:
        m_t = (t >= 0) & (t < T)
        i_row = tl.load(offsets + t, mask=m_t, other=0)
        n = tl.load(sizes + t, mask=m_t, other=0)
    return i_row, tl.where((t >= 0) & (t < T), n, 0)


@triton.jit(do_not_specialize=RUNTIME)
def sequence_forward_kernel(
    gates_x,  # [N, G*H]: x W_ih^T and the biases, but for b_hh where it cannot be added there
    h0,  # [B, H]
    c0,  # [K, B, H]: the states beside h; None without
    w_hh,  # [G*H, D]
    b_hh,  # [G*H] or None
    y,  # [N, H]
    h_n,  # [B, H]
    c_n,  # [K, B, H] or None
    gates,  # [N, S*H] or None
    cells,  # [K, N, H] or None
    parameters,  # [PARAMETERS, H] or None
    inputs,  # [INPUTS, N, H] or None
    resets,  # [N] or None: not 0 where a row's step starts from zeros
    sizes,  # [T] or None when dense
    offsets,  # [T] or None
    T,
    B,
    s_state,  # elements from a state to the next in c0 and c_n
    s_rows,  # in cells and inputs
    H,
    D,  # units of a head, which a program owns: H of a single one
    K: tl.constexpr,
    PARAMETERS: tl.constexpr,
    INPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    FORWARD: tl.constexpr,
    X_GATE: tl.constexpr,
    H_GATE: tl.constexpr,
    G: tl.constexpr,
    REVERSE: tl.constexpr,
    BU: tl.constexpr,  # at least D
    BB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    A: tl.constexpr = len(X_GATE)
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    o_u = tl.arange(0, BU)[:, None]
    o_k = tl.arange(0, BU)[None, :]
    o_b = (tl.program_id(0) * BB + tl.arange(0, BB))[None, :]
    i_b = o_b.to(tl.int64)
    m_u = o_u < D
    m_k = o_k < D
    m_state = m_u & (o_b < B)
    if HEADS > 1:
        # From here on units of the program's head.
        o_u = o_u + tl.program_id(1) * D
    o_state = i_b * H + o_u

    b_w = ()
    b_bias = ()
    for a in tl.static_range(A):
        if H_GATE[a] >= 0:
            p_w = w_hh + (H_GATE[a] * H + o_u) * D + o_k
            b_w = b_w + (tl.load(p_w, mask=m_u & m_k, other=0.0),)
            if b_hh is not None:
                b_bias = b_bias + (tl.load(b_hh + H_GATE[a] * H + o_u, mask=m_u, other=0.0).to(ACC),)
            else:
                b_bias = b_bias + (0.0,)
        else:
            b_w = b_w + (0.0,)
            b_bias = b_bias + (0.0,)

    b_h = tl.load(h0 + o_state, mask=m_state, other=0.0)
    b_others = per_row(c0 + o_state if K > 0 else None, s_state, m_state, K, ACC)
    b_parameters = per_unit(parameters, o_u, m_u, H, PARAMETERS, BU, BB, ACC)
    for i in range(0, T):
        t = T - 1 - i if REVERSE else i
        i_row, n = step_rows(t, T, B, sizes, offsets)
        m_row = m_u & (o_b < n)
        if resets is not None:
            m_reset = tl.load(resets + i_row + i_b, mask=o_b < n, other=0) != 0
            b_h = tl.where(m_reset, 0.0, b_h)
            b_kept = ()
            for k in tl.static_range(K):
                b_kept = b_kept + (tl.where(m_reset, 0.0, b_others[k]),)
            b_others = b_kept
        b_accs = ()
        for a in tl.static_range(A):
            b_acc = tl.zeros((BU, BB), ACC)
            if X_GATE[a] >= 0:
                p_gate = gates_x + (i_row + i_b) * (G * H) + X_GATE[a] * H + o_u
                b_acc += tl.load(p_gate, mask=m_row, other=0.0).to(ACC)
            if H_GATE[a] >= 0:
                b_acc = tl.dot(b_w[a], b_h, b_acc, input_precision=PRECISION, out_dtype=ACC)
                if b_hh is not None:
                    b_acc += b_bias[a]
            b_accs = b_accs + (b_acc,)
        b_inputs = ()
        if INPUTS > 0:
            b_inputs = per_row(inputs + i_row * H + o_state, s_rows, m_row, INPUTS, ACC)
        b_next, b_saved = FORWARD(b_accs, (b_h.to(ACC),) + b_others, b_parameters, b_inputs)
        b_h_new = b_next[0].to(y.dtype.element_ty)
        b_h = tl.where(m_row, b_h_new, b_h)
        tl.store(y + i_row * H + o_state, b_h_new, mask=m_row)
        b_kept = ()
        for k in tl.static_range(K):
            b_kept = b_kept + (tl.where(m_row, b_next[k + 1], b_others[k]),)
            if cells is not None:
                p_c = cells + tl.cast(s_rows, tl.int64) * k + i_row * H + o_state
                tl.store(p_c, b_next[k + 1], mask=m_row)
        b_others = b_kept
        if gates is not None:
            S: tl.constexpr = len(b_saved)
            for s in tl.static_range(S):
                p_gate = gates + (i_row + i_b) * (S * H) + s * H + o_u
                tl.store(p_gate, b_saved[s].to(gates.dtype.element_ty), mask=m_row)
    tl.store(h_n + o_state, b_h, mask=m_state)
    for k in tl.static_range(K):
        p_c_n = c_n + tl.cast(s_state, tl.int64) * k + o_state
        tl.store(p_c_n, b_others[k].to(c_n.dtype.element_ty), mask=m_state)


@triton.jit(do_not_specialize=RUNTIME)
def sequence_backward_kernel(
    w_hh,  # [G*H, D]
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
    dparameters,  # [PARAMETERS, N, H] or None
    dinputs,  # [INPUTS, N, H] or None
    dh0,  # [B, H]
    dc0,  # [K, B, H] or None
    resets,  # [N] or None
    sizes,  # [T] or None when dense
    offsets,  # [T] or None
    T,
    B,
    s_state,  # elements from a state to the next in c0, dc_n and dc0
    s_rows,  # in cells, dcells, inputs, dparameters and dinputs
    H,
    D,  # units of a head, which a program owns: H of a single one
    K: tl.constexpr,
    PARAMETERS: tl.constexpr,
    INPUTS: tl.constexpr,
    HEADS: tl.constexpr,
    CLEAR: tl.constexpr,  # what the cell makes of a unit or row that there is not may be NaN
    BACKWARD: tl.constexpr,
    H_GATE: tl.constexpr,
    S: tl.constexpr,
    USE_H: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    REVERSE: tl.constexpr,
    BU: tl.constexpr,  # at least D
    BB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    A: tl.constexpr = len(H_GATE)
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    o_u = tl.arange(0, BU)[:, None]
    o_k = tl.arange(0, BU)[None, :]
    o_b = (tl.program_id(0) * BB + tl.arange(0, BB))[None, :]
    i_b = o_b.to(tl.int64)
    m_u = o_u < D
    m_k = o_k < D
    m_state = m_u & (o_b < B)
    if HEADS > 1:
        # From here on units of the program's head.
        o_in_head = o_u
        o_u = o_u + tl.program_id(1) * D
    o_state = i_b * H + o_u

    b_w = ()
    for a in tl.static_range(A):
        if H_GATE[a] >= 0:
            if HEADS > 1:
                p_w = w_hh + (H_GATE[a] * H + tl.program_id(1) * D + o_k) * D + o_in_head
            else:
                p_w = w_hh + (H_GATE[a] * H + o_k) * D + o_u
            b_w = b_w + (tl.load(p_w, mask=m_u & m_k, other=0.0),)
        else:
            b_w = b_w + (0.0,)

    b_dh = tl.zeros((BU, BB), ACC)
    if dh_n is not None:
        b_dh += tl.load(dh_n + o_state, mask=m_state, other=0.0).to(ACC)
    b_dothers = ()
    for k in tl.static_range(K):
        b_dc = tl.zeros((BU, BB), ACC)
        if dc_n is not None:
            b_dc += tl.load(dc_n + tl.cast(s_state, tl.int64) * k + o_state, mask=m_state, other=0.0).to(ACC)
        b_dothers = b_dothers + (b_dc,)
    b_parameters = per_unit(parameters, o_u, m_u, H, PARAMETERS, BU, BB, ACC)
    for i in range(0, T):
        t = i if REVERSE else T - 1 - i
        i_row, n = step_rows(t, T, B, sizes, offsets)
        i_prev, n_prev = step_rows(t + 1 if REVERSE else t - 1, T, B, sizes, offsets)
        m_row = m_u & (o_b < n)
        m_kept = m_row
        if resets is not None:
            m_kept = m_row & (tl.load(resets + i_row + i_b, mask=o_b < n, other=0) == 0)
        m_prev = m_kept & (o_b < n_prev)
        m_first = m_kept & (o_b >= n_prev)
        b_dh_all = b_dh
        if dy is not None:
            b_dh_all += tl.load(dy + i_row * H + o_state, mask=m_row, other=0.0).to(ACC)
        b_h = b_dh_all
        b_h_prev = b_dh_all
        if USE_H:
            b_h = tl.load(y + i_row * H + o_state, mask=m_row, other=0.0).to(ACC)
            b_h_prev = tl.load(h0 + o_state, mask=m_first, other=0.0).to(ACC)
            b_h_prev += tl.load(y + i_prev * H + o_state, mask=m_prev, other=0.0).to(ACC)
        b_d = (b_dh_all,)
        b_next = (b_h,)
        b_prev = (b_h_prev,)
        for k in tl.static_range(K):
            i_rows = tl.cast(s_rows, tl.int64) * k
            b_dc = b_dothers[k]
            if dcells is not None:
                b_dc += tl.load(dcells + i_rows + i_row * H + o_state, mask=m_row, other=0.0)
            b_c_prev = tl.load(c0 + tl.cast(s_state, tl.int64) * k + o_state, mask=m_first, other=0.0).to(ACC)
            b_c_prev += tl.load(cells + i_rows + i_prev * H + o_state, mask=m_prev, other=0.0)
            b_d = b_d + (b_dc,)
            b_next = b_next + (tl.load(cells + i_rows + i_row * H + o_state, mask=m_row, other=0.0),)
            b_prev = b_prev + (b_c_prev,)
        b_saved = ()
        for s in tl.static_range(S):
            p_gate = gates + (i_row + i_b) * (S * H) + s * H + o_u
            b_saved = b_saved + (tl.load(p_gate, mask=m_row, other=0.0).to(ACC),)

        b_inputs = ()
        if INPUTS > 0:
            b_inputs = per_row(inputs + i_row * H + o_state, s_rows, m_row, INPUTS, ACC)
        b_dacc, b_dprev, b_dparameters, b_dinputs = BACKWARD(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs)
        for k in tl.static_range(PARAMETERS):
            p_d = dparameters + tl.cast(s_rows, tl.int64) * k + i_row * H + o_state
            tl.store(p_d, b_dparameters[k].to(dgates.dtype.element_ty), mask=m_row)
        for k in tl.static_range(INPUTS):
            p_d = dinputs + tl.cast(s_rows, tl.int64) * k + i_row * H + o_state
            tl.store(p_d, b_dinputs[k].to(dgates.dtype.element_ty), mask=m_row)

        b_dh_prev = tl.zeros((BU, BB), ACC)
        if HAS_DIRECT:
            b_dh_prev += b_dprev[0]
        for a in tl.static_range(A):
            b_da = b_dacc[a].to(dgates.dtype.element_ty)
            if CLEAR:
                b_da = tl.where(m_row, b_da, 0.0)
            tl.store(dgates + (i_row + i_b) * (A * H) + a * H + o_u, b_da, mask=m_row)
            if H_GATE[a] >= 0:
                b_dh_prev = tl.dot(b_w[a], b_da, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        if resets is not None:
            b_dh_prev = tl.where(m_kept, b_dh_prev, 0.0)
        b_dh = tl.where(m_row, b_dh_prev, b_dh)
        b_kept = ()
        for k in tl.static_range(K):
            b_dc_prev = b_dprev[k + 1]
            if resets is not None:
                b_dc_prev = tl.where(m_kept, b_dc_prev, 0.0)
            b_kept = b_kept + (tl.where(m_row, b_dc_prev, b_dothers[k]),)
        b_dothers = b_kept
    tl.store(dh0 + o_state, b_dh.to(dh0.dtype.element_ty), mask=m_state)
    for k in tl.static_range(K):
        p_dc0 = dc0 + tl.cast(s_state, tl.int64) * k + o_state
        tl.store(p_dc0, b_dothers[k].to(dc0.dtype.element_ty), mask=m_state)
