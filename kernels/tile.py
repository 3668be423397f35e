"""Pieces that every skeleton shares."""

import triton
import triton.language as tl


@triton.jit
def weight_rows(w, i_acc, i_unit, zeros, K, H, GATE: tl.constexpr):
    """First elements of the rows of w [G*H, K] that accumulators i_acc of units i_unit sum; zeros without a gate."""
    i_gate = i_acc
    for a in tl.static_range(len(GATE)):
        if GATE[a] != a:
            i_gate = tl.where(i_acc == a, GATE[a], i_gate)
    p_w = w + (i_gate * H + i_unit).to(tl.int64) * K
    for a in tl.static_range(len(GATE)):
        if GATE[a] < 0:
            p_w = tl.where(i_acc == a, zeros, p_w)
    return p_w


@triton.jit
def load_rows(p, i_k, n_k, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[R, BK] from i_k on, of rows that begin at p [R]; zeros from n_k on."""
    o_k = i_k + tl.arange(0, BK)[None, :]
    if EVEN_K:
        # A select between two pointers forgets their alignment.
        return tl.load(tl.multiple_of(p[:, None], [16, 16]) + o_k)
    else:
        return tl.load(p[:, None] + o_k, mask=o_k < n_k, other=0.0)


@triton.jit
def dot_rows(
    b_acc,  # [R, BB]
    p_w,  # [R]: first elements of rows of w
    p_x,  # [BB]: first elements of rows of x
    i_k,  # columns from here
    n_k,  # to here
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,  # BK divides i_k and n_k, and rows begin at 16 bytes
    PRECISION: tl.constexpr,
):
    """b_acc += w x^T."""
    for i in range(i_k, n_k, BK):
        b_w = load_rows(p_w, i, n_k, BK, EVEN_K)
        b_x = load_rows(p_x, i, n_k, BK, EVEN_K)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)
    return b_acc


@triton.jit
def dot_rows_twice(
    b_acc,
    p_w,
    p_x,
    n_k,
    p_w2,
    p_x2,
    n_k2,
    SAME_K: tl.constexpr,  # n_k == n_k2
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_acc += w x^T + w2 x2^T: side by side over the columns that both have, then the rest of the longer one."""
    n_both = tl.minimum(tl.cdiv(n_k, BK), tl.cdiv(n_k2, BK)) * BK
    for i in range(0, n_both, BK):
        b_w = load_rows(p_w, i, n_k, BK, EVEN_K)
        b_x = load_rows(p_x, i, n_k, BK, EVEN_K)
        b_w2 = load_rows(p_w2, i, n_k2, BK, EVEN_K)
        b_x2 = load_rows(p_x2, i, n_k2, BK, EVEN_K)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)
        b_acc = tl.dot(b_w2, tl.trans(b_x2), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)
    if not SAME_K:
        p_w = tl.where(n_k > n_k2, p_w, p_w2)
        p_x = tl.where(n_k > n_k2, p_x, p_x2)
        b_acc = dot_rows(b_acc, p_w, p_x, n_both, tl.maximum(n_k, n_k2), BK, EVEN_K, PRECISION)
    return b_acc


@triton.jit
def unstack(b_acc, A: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr):
    """[A * BU, BB] as a tuple of A blocks [BU, BB]."""
    if A == 1:
        return (b_acc,)
    elif A == 2:
        return tl.split(tl.permute(tl.reshape(b_acc, (2, BU, BB)), (1, 2, 0)))
    else:
        tl.static_assert(A == 4)
        b_even, b_odd = tl.split(tl.permute(tl.reshape(b_acc, (2, 2, BU, BB)), (2, 3, 0, 1)))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        return (b_0, b_1, b_2, b_3)
