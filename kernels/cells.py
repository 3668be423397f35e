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
def lstm_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_i = sigmoid(b_acc[0])
    b_f = sigmoid(b_acc[1])
    b_g = tanh(b_acc[2])
    b_o = sigmoid(b_acc[3])
    b_c = b_f * b_prev[1] + b_i * b_g
    return (b_o * tanh(b_c), b_c), (b_i, b_f, b_g, b_o)


@triton.jit
def lstm_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_i, b_f, b_g, b_o = b_saved
    b_tanh_c = tanh(b_next[1])
    b_dc = b_d[1] + b_d[0] * b_o * (1.0 - b_tanh_c * b_tanh_c)
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_df = b_dc * b_prev[1] * b_f * (1.0 - b_f)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_do = b_d[0] * b_tanh_c * b_o * (1.0 - b_o)
    return (b_di, b_df, b_dg, b_do), (b_d[0], b_dc * b_f), (), ()


@triton.jit
def gru_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_r = sigmoid(b_acc[0])
    b_z = sigmoid(b_acc[1])
    b_n = tanh(b_acc[2] + b_r * b_acc[3])
    return (b_n + b_z * (b_prev[0] - b_n),), (b_r, b_z, b_n, b_acc[3])


@triton.jit
def gru_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_r, b_z, b_n, b_nh = b_saved
    b_dn = b_d[0] * (1.0 - b_z) * (1.0 - b_n * b_n)
    b_dz = b_d[0] * (b_prev[0] - b_n) * b_z * (1.0 - b_z)
    b_dr = b_dn * b_nh * b_r * (1.0 - b_r)
    return (b_dr, b_dz, b_dn, b_dn * b_r), (b_d[0] * b_z,), (), ()


@triton.jit
def rnn_tanh_forward(b_acc, b_prev, b_parameters, b_inputs):
    return (tanh(b_acc[0]),), ()


@triton.jit
def rnn_tanh_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    return (b_d[0] * (1.0 - b_next[0] * b_next[0]),), (b_d[0],), (), ()


@triton.jit
def rnn_relu_forward(b_acc, b_prev, b_parameters, b_inputs):
    return (tl.where(b_acc[0] < 0, 0.0, b_acc[0]),), ()


@triton.jit
def rnn_relu_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    return (tl.where(b_next[0] <= 0, 0.0, b_d[0]),), (b_d[0],), (), ()


class CellKernels(NamedTuple):
    """A cell's pointwise functions; its sizes are in fusedrnn.cells.

    forward: (accumulators, states before, parameters, inputs) -> states, saved.
    backward: (gradients of the states, saved, states, states before, parameters, inputs) -> gradients of the
    accumulators, of the states before (of h only what does not pass the matmul), of parameters and inputs.
    All of these are tuples of blocks; the states begin with h.
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
