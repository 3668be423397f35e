"""Functions of a block that cells are made of, beside Triton's own; exact about infinities and NaN, as torch's."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(b_x):
    # exp(-x) may be inf: 1 / inf is the right 0.
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def tanh(b_x):
    # exp of a negative number only, so never inf / inf.
    b_e = tl.exp(-2.0 * tl.abs(b_x))
    b_t = (1.0 - b_e) / (1.0 + b_e)
    b_t = tl.where(b_x < 0, -b_t, b_t)
    if b_x.dtype == tl.float32:
        # 1 - e cancels near zero; odd minimax polynomial there.
        b_z = b_x * b_x
        b_p = -5.70498872745e-3 * b_z + 2.06390887954e-2
        b_p = b_p * b_z - 5.37397155531e-2
        b_p = b_p * b_z + 1.33314422036e-1
        b_p = b_p * b_z - 3.33332819422e-1
        b_t = tl.where(tl.abs(b_x) < 0.625, b_p * b_z * b_x + b_x, b_t)
    return b_t


@triton.jit
def relu(b_x):
    return tl.where(b_x < 0, 0.0, b_x)


@triton.jit
def number(value: tl.constexpr, b_like):
    return tl.full(b_like.shape, value, b_like.dtype)


@triton.jit
def log1p(b_x):
    # The error of u, which is 1 + x rounded, is in both factors.
    b_u = 1.0 + b_x
    b_d = b_u - 1.0
    return tl.where((b_d == 0.0) | (b_x == float("inf")), b_x, tl.log(b_u) * (b_x / b_d))


@triton.jit
def expm1(b_x):
    # So is the error of u, which is exp(x) rounded.
    b_u = tl.exp(b_x)
    b_d = b_u - 1.0
    b_far = (b_x < -17.0) | (b_x > 17.0)
    if b_x.dtype == tl.float64:
        b_far = (b_x < -37.0) | (b_x > 37.0)
    return tl.where(b_u == 1.0, b_x, tl.where(b_far, b_d, b_d * (b_x / tl.log(b_u))))
