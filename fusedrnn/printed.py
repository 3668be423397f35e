"""Printed by `make cells` from fusedrnn/zoo.py, which is what to edit."""
# fmt: off

import torch


def number(value, like):
    return torch.full_like(like, value)


def lstm_forward(acc, prev, parameters, inputs):
    i = torch.sigmoid(acc[0])
    f = torch.sigmoid(acc[1])
    g = torch.tanh(acc[2])
    o = torch.sigmoid(acc[3])
    c = f * prev[1] + i * g
    return (o * torch.tanh(c), c), (i, f, g, o)


def lstm_backward(d, saved, next, prev, parameters, inputs):
    i, f, g, o = saved
    t0 = torch.tanh(next[1])
    t1 = d[1] + d[0] * o * (1.0 - t0 * t0)
    return (
        (t1 * g * (i * (1.0 - i)), t1 * prev[1] * (f * (1.0 - f)), t1 * i * (1.0 - g * g), d[0] * t0 * (o * (1.0 - o))),
        (number(0.0, d[0]), t1 * f),
        (),
        (),
    )


def gru_forward(acc, prev, parameters, inputs):
    r = torch.sigmoid(acc[0])
    z = torch.sigmoid(acc[1])
    n = torch.tanh(acc[2] + r * acc[3])
    return (n + z * (prev[0] - n),), (r, z, n, acc[3])


def gru_backward(d, saved, next, prev, parameters, inputs):
    r, z, n, nh = saved
    t0 = 1.0 - z
    t1 = d[0] * t0 * (1.0 - n * n)
    return (t1 * nh * (r * (1.0 - r)), d[0] * (prev[0] - n) * (z * t0), t1, t1 * r), (d[0] * z,), (), ()


def rnn_tanh_forward(acc, prev, parameters, inputs):
    return (torch.tanh(acc[0]),), ()


def rnn_tanh_backward(d, saved, next, prev, parameters, inputs):
    return (d[0] * (1.0 - next[0] * next[0]),), (number(0.0, d[0]),), (), ()


def rnn_relu_forward(acc, prev, parameters, inputs):
    return (torch.relu(acc[0]),), ()


def rnn_relu_backward(d, saved, next, prev, parameters, inputs):
    return (torch.where(next[0] <= 0.0, 0.0, d[0]),), (number(0.0, d[0]),), (), ()


def slstm_forward(acc, prev, parameters, inputs):
    l = prev[3] + (torch.clamp(acc[1], max=0.0) - torch.log1p(torch.exp(-torch.abs(acc[1]))))
    m = torch.where(prev[2] == 0.0, acc[0], torch.maximum(acc[0], l))
    i = torch.exp(acc[0] - m)
    z = torch.tanh(acc[2])
    o = torch.sigmoid(acc[3])
    f = torch.exp(torch.clamp(l - m, max=80.0))
    c = f * prev[1] + i * z
    n = f * prev[2] + i
    return (o * c / n, c, n, m), (i, z, o, acc[1])


def slstm_backward(d, saved, next, prev, parameters, inputs):
    i, z, o, a_f = saved
    t0 = d[2] - d[0] * (o * next[1] / next[2] / next[2])
    t1 = d[0] / next[2]
    t2 = d[1] + t1 * o
    t3 = torch.exp(-torch.abs(a_f))
    l = prev[3] + (torch.clamp(a_f, max=0.0) - torch.log1p(t3))
    t4 = l - next[3]
    f = torch.exp(torch.clamp(t4, max=80.0))
    t5 = torch.where(t4 < 80.0, (t0 * prev[2] + t2 * prev[1]) * f, 0.0)
    t6 = a_f < 0.0
    return (
        (
            (t0 + t2 * z) * i,
            t5 * (torch.where(t6, number(1.0, d[0]), number(0.0, d[0])) - torch.where(t6, number(1.0, d[0]),
                number(-1.0, d[0])) * (t3 / (t3 + 1.0))),
            t2 * i * (1.0 - z * z),
            t1 * next[1] * (o * (1.0 - o)),
        ),
        (number(0.0, d[0]), t2 * f, t0 * f, t5),
        (),
        (),
    )


# fusedrnn.cells.Cell of each.
CELLS = {
    "lstm": {
        "gates": ("i", "f", "g", "o"),
        "accumulators": ("i", "f", "g", "o"),
        "x_acc": (0, 1, 2, 3),
        "h_acc": (0, 1, 2, 3),
        "saved": ("i", "f", "g", "o"),
        "states": ("h", "c"),
        "parameters": (),
        "inputs": (),
        "has_direct": False,
        "forward": lstm_forward,
        "backward": lstm_backward,
    },
    "gru": {
        "gates": ("r", "z", "n"),
        "accumulators": ("r", "z", "nx", "nh"),
        "x_acc": (0, 1, 2),
        "h_acc": (0, 1, 3),
        "saved": ("r", "z", "n", "nh"),
        "states": ("h",),
        "parameters": (),
        "inputs": (),
        "has_direct": True,
        "forward": gru_forward,
        "backward": gru_backward,
    },
    "rnn_tanh": {
        "gates": ("h",),
        "accumulators": ("h",),
        "x_acc": (0,),
        "h_acc": (0,),
        "saved": (),
        "states": ("h",),
        "parameters": (),
        "inputs": (),
        "has_direct": False,
        "forward": rnn_tanh_forward,
        "backward": rnn_tanh_backward,
    },
    "rnn_relu": {
        "gates": ("h",),
        "accumulators": ("h",),
        "x_acc": (0,),
        "h_acc": (0,),
        "saved": (),
        "states": ("h",),
        "parameters": (),
        "inputs": (),
        "has_direct": False,
        "forward": rnn_relu_forward,
        "backward": rnn_relu_backward,
    },
    "slstm": {
        "gates": ("i", "f", "z", "o"),
        "accumulators": ("i", "f", "z", "o"),
        "x_acc": (0, 1, 2, 3),
        "h_acc": (0, 1, 2, 3),
        "saved": ("i", "z", "o", "a_f"),
        "states": ("h", "c", "n", "m"),
        "parameters": (),
        "inputs": (),
        "has_direct": False,
        "forward": slstm_forward,
        "backward": slstm_backward,
    },
}
