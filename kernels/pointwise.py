"""Functions of a block that cells are made of, beside Triton's own; exact about infinities and NaN, as torch's."""

import triton
import triton.language as tl

from .cells import sigmoid, tanh

__all__ = ["expm1", "log1p", "number", "sigmoid", "tanh"]


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
