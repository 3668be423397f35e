"""The cells: pointwise forward and backward on float32 (float64 for float64) blocks of any one shape."""

from typing import NamedTuple

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
def lstm_forward(b_acc, b_h_prev, b_c_prev):
    b_i = sigmoid(b_acc[0])
    b_f = sigmoid(b_acc[1])
    b_g = tanh(b_acc[2])
    b_o = sigmoid(b_acc[3])
    b_c = b_f * b_c_prev + b_i * b_g
    return b_o * tanh(b_c), b_c, (b_i, b_f, b_g, b_o)


@triton.jit
def lstm_backward(b_dh, b_dc, b_saved, b_h, b_h_prev, b_c_prev, b_c):
    b_i, b_f, b_g, b_o = b_saved
    b_tanh_c = tanh(b_c)
    b_dc += b_dh * b_o * (1.0 - b_tanh_c * b_tanh_c)
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_df = b_dc * b_c_prev * b_f * (1.0 - b_f)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_do = b_dh * b_tanh_c * b_o * (1.0 - b_o)
    return (b_di, b_df, b_dg, b_do), b_dh, b_dc * b_f


@triton.jit
def gru_forward(b_acc, b_h_prev, b_c_prev):
    b_r = sigmoid(b_acc[0])
    b_z = sigmoid(b_acc[1])
    b_n = tanh(b_acc[2] + b_r * b_acc[3])
    return b_n + b_z * (b_h_prev - b_n), b_c_prev, (b_r, b_z, b_n, b_acc[3])


@triton.jit
def gru_backward(b_dh, b_dc, b_saved, b_h, b_h_prev, b_c_prev, b_c):
    b_r, b_z, b_n, b_nh = b_saved
    b_dn = b_dh * (1.0 - b_z) * (1.0 - b_n * b_n)
    b_dz = b_dh * (b_h_prev - b_n) * b_z * (1.0 - b_z)
    b_dr = b_dn * b_nh * b_r * (1.0 - b_r)
    return (b_dr, b_dz, b_dn, b_dn * b_r), b_dh * b_z, b_dc


@triton.jit
def rnn_tanh_forward(b_acc, b_h_prev, b_c_prev):
    return tanh(b_acc[0]), b_c_prev, ()


@triton.jit
def rnn_tanh_backward(b_dh, b_dc, b_saved, b_h, b_h_prev, b_c_prev, b_c):
    return (b_dh * (1.0 - b_h * b_h),), b_dh, b_dc


@triton.jit
def rnn_relu_forward(b_acc, b_h_prev, b_c_prev):
    return tl.where(b_acc[0] < 0, 0.0, b_acc[0]), b_c_prev, ()


@triton.jit
def rnn_relu_backward(b_dh, b_dc, b_saved, b_h, b_h_prev, b_c_prev, b_c):
    return (tl.where(b_h <= 0, 0.0, b_dh),), b_dh, b_dc


class CellKernels(NamedTuple):
    """A cell's pointwise functions; its sizes are in fusedrnn.cells.

    forward: (accumulators, h_prev, c_prev) -> h, c, saved.
    backward: (dh, dc, saved, h, h_prev, c_prev, c) -> gradients of the accumulators, dh_prev past the matmul, dc_prev.
    """

    forward: object
    backward: object
    backward_uses_h: bool  # or h_prev
    has_direct: bool  # h_prev has a gradient past the matmul


KERNELS = {
    "lstm": CellKernels(lstm_forward, lstm_backward, backward_uses_h=False, has_direct=False),
    "gru": CellKernels(gru_forward, gru_backward, backward_uses_h=True, has_direct=True),
    "rnn_tanh": CellKernels(rnn_tanh_forward, rnn_tanh_backward, backward_uses_h=True, has_direct=False),
    "rnn_relu": CellKernels(rnn_relu_forward, rnn_relu_backward, backward_uses_h=True, has_direct=False),
}
