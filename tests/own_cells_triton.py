"""The cells of own_cells.py for Triton."""

import triton
import triton.language as tl

from fusedrnn.kernels.cells import KERNELS, CellKernels
from fusedrnn.kernels.pointwise import sigmoid, tanh


@triton.jit
def slstm_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_m = tl.maximum(b_acc[1] + b_prev[3], b_acc[0])
    b_i = tl.exp(b_acc[0] - b_m)
    b_f = tl.exp(b_acc[1] + b_prev[3] - b_m)
    b_z = tanh(b_acc[2])
    b_o = sigmoid(b_acc[3])
    b_c = b_f * b_prev[1] + b_i * b_z
    b_n = b_f * b_prev[2] + b_i
    return (b_o * b_c / b_n, b_c, b_n, b_m), (b_i, b_f, b_z, b_o)


@triton.jit
def slstm_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_i, b_f, b_z, b_o = b_saved
    # Where a lane has no unit or no row n is 0, and nothing is stored.
    b_n = b_next[2]
    b_dc = b_d[1] + b_d[0] * b_o / b_n
    b_dn = b_d[2] - b_d[0] * b_o * b_next[1] / (b_n * b_n)
    b_di = (b_dc * b_z + b_dn) * b_i
    b_df = (b_dc * b_prev[1] + b_dn * b_prev[2]) * b_f
    b_dz = b_dc * b_i * (1.0 - b_z * b_z)
    b_do = b_d[0] * b_next[1] / b_n * b_o * (1.0 - b_o)
    return (b_di, b_df, b_dz, b_do), (b_d[0], b_dc * b_f, b_dn * b_f, tl.zeros_like(b_dc)), (), ()


@triton.jit
def zoneout_forward(b_acc, b_prev, b_parameters, b_inputs):
    b_c = b_prev[1]
    b_i = sigmoid(b_acc[0] + b_parameters[0] * b_c)
    b_f = sigmoid(b_acc[1] + b_parameters[1] * b_c)
    b_g = tanh(b_acc[2])
    b_c = b_c + b_inputs[0] * (b_f * b_c + b_i * b_g - b_c)
    b_o = sigmoid(b_acc[3] + b_parameters[2] * b_c)
    return (b_o * tanh(b_c), b_c), (b_i, b_f, b_g, b_o)


@triton.jit
def zoneout_backward(b_d, b_saved, b_next, b_prev, b_parameters, b_inputs):
    b_i, b_f, b_g, b_o = b_saved
    b_c = b_prev[1]
    b_t = tanh(b_next[1])
    b_do = b_d[0] * b_t * b_o * (1.0 - b_o)
    b_dc = b_d[1] + b_d[0] * b_o * (1.0 - b_t * b_t) + b_do * b_parameters[2]
    b_dnew = b_inputs[0] * b_dc
    b_di = b_dnew * b_g * b_i * (1.0 - b_i)
    b_df = b_dnew * b_c * b_f * (1.0 - b_f)
    b_dg = b_dnew * b_i * (1.0 - b_g * b_g)
    b_dprev = b_dc - b_dnew + b_dnew * b_f + b_di * b_parameters[0] + b_df * b_parameters[1]
    b_dkeep = b_dc * (b_f * b_c + b_i * b_g - b_c)
    return (b_di, b_df, b_dg, b_do), (b_d[0], b_dprev), (b_di * b_c, b_df * b_c, b_do * b_next[1]), (b_dkeep,)


KERNELS["test_slstm"] = CellKernels(slstm_forward, slstm_backward, backward_uses_h=False, has_direct=False)
KERNELS["test_zoneout"] = CellKernels(zoneout_forward, zoneout_backward, backward_uses_h=False, has_direct=False)
