"""Printed by `make cells` from fusedrnn/zoo.py, which is what to edit."""
# fmt: off

import triton
import triton.language as tl

from .pointwise import log1p, number, relu, sigmoid, tanh


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
    b_t0 = tanh(b_next[1])
    b_t1 = b_d[1] + b_d[0] * b_o * (1.0 - b_t0 * b_t0)
    return (
        (
            b_t1 * b_g * (b_i * (1.0 - b_i)),
            b_t1 * b_prev[1] * (b_f * (1.0 - b_f)),
            b_t1 * b_i * (1.0 - b_g * b_g),
            b_d[0] * b_t0 * (b_o * (1.0 - b_o)),
        ),
        (number(0.0, b_d[0]), b_t1 * b_f),
        (),
        (),
    )


@triton.jit
def gru_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_r = sigmoid(b_acc[0])
    b_z = sigmoid(b_acc[1])
    b_n = tanh(b_acc[2] + b_r * b_acc[3])
    return (b_n + b_z * (b_prev[0] - b_n),), (b_r, b_z, b_n, b_acc[3])


@triton.jit
def gru_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_r, b_z, b_n, b_nh = b_saved
    b_t0 = 1.0 - b_z
    b_t1 = b_d[0] * b_t0 * (1.0 - b_n * b_n)
    return (
        (b_t1 * b_nh * (b_r * (1.0 - b_r)), b_d[0] * (b_prev[0] - b_n) * (b_z * b_t0), b_t1, b_t1 * b_r),
        (b_d[0] * b_z,),
        (),
        (),
    )


@triton.jit
def rnn_tanh_forward(b_acc, b_prev, b_parameters, b_inputs):
    return (tanh(b_acc[0]),), ()


@triton.jit
def rnn_tanh_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    return (b_d[0] * (1.0 - b_next[0] * b_next[0]),), (number(0.0, b_d[0]),), (), ()


@triton.jit
def rnn_relu_forward(b_acc, b_prev, b_parameters, b_inputs):
    return (relu(b_acc[0]),), ()


@triton.jit
def rnn_relu_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    return (tl.where(b_next[0] <= 0.0, 0.0, b_d[0]),), (number(0.0, b_d[0]),), (), ()


@triton.jit
def slstm_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_l = b_prev[3] + (tl.minimum(0.0, b_acc[1], propagate_nan=tl.PropagateNan.ALL) - log1p(tl.exp(-tl.abs(b_acc[1]))))
    b_m = tl.where(b_prev[2] == 0.0, b_acc[0], tl.maximum(b_acc[0], b_l, propagate_nan=tl.PropagateNan.ALL))
    b_i = tl.exp(b_acc[0] - b_m)
    b_z = tanh(b_acc[2])
    b_o = sigmoid(b_acc[3])
    b_f = tl.exp(tl.minimum(b_l - b_m, 80.0, propagate_nan=tl.PropagateNan.ALL))
    b_c = b_f * b_prev[1] + b_i * b_z
    b_n = b_f * b_prev[2] + b_i
    return (b_o * b_c / b_n, b_c, b_n, b_m), (b_i, b_z, b_o, b_acc[1])


@triton.jit
def slstm_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_i, b_z, b_o, b_a_f = b_saved
    b_t0 = b_d[2] - b_d[0] * (b_o * b_next[1] / b_next[2] / b_next[2])
    b_t1 = b_d[0] / b_next[2]
    b_t2 = b_d[1] + b_t1 * b_o
    b_t3 = tl.exp(-tl.abs(b_a_f))
    b_l = b_prev[3] + (tl.minimum(0.0, b_a_f, propagate_nan=tl.PropagateNan.ALL) - log1p(b_t3))
    b_t4 = b_l - b_next[3]
    b_f = tl.exp(tl.minimum(b_t4, 80.0, propagate_nan=tl.PropagateNan.ALL))
    b_t5 = tl.where(b_t4 < 80.0, (b_t0 * b_prev[2] + b_t2 * b_prev[1]) * b_f, 0.0)
    b_t6 = b_a_f < 0.0
    return (
        (
            (b_t0 + b_t2 * b_z) * b_i,
            b_t5 * (tl.where(b_t6, number(1.0, b_d[0]), number(0.0, b_d[0])) - tl.where(b_t6, number(1.0, b_d[0]),
                number(-1.0, b_d[0])) * (b_t3 / (b_t3 + 1.0))),
            b_t2 * b_i * (1.0 - b_z * b_z),
            b_t1 * b_next[1] * (b_o * (1.0 - b_o)),
        ),
        (number(0.0, b_d[0]), b_t2 * b_f, b_t0 * b_f, b_t5),
        (),
        (),
    )


# fusedrnn.kernels.cells.CellKernels of each.
KERNELS = {
    "lstm": {
        "forward": lstm_forward,
        "backward": lstm_backward,
        "backward_uses_h": False,
        "has_direct": False,
    },
    "gru": {
        "forward": gru_forward,
        "backward": gru_backward,
        "backward_uses_h": True,
        "has_direct": True,
    },
    "rnn_tanh": {
        "forward": rnn_tanh_forward,
        "backward": rnn_tanh_backward,
        "backward_uses_h": True,
        "has_direct": False,
    },
    "rnn_relu": {
        "forward": rnn_relu_forward,
        "backward": rnn_relu_backward,
        "backward_uses_h": True,
        "has_direct": False,
    },
    "slstm": {
        "forward": slstm_forward,
        "backward": slstm_backward,
        "backward_uses_h": False,
        "has_direct": False,
    },
}
