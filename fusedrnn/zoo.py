"""Recurrent cells, each a definition (:func:`fusedrnn.cell`) and nothing else.

``fusedrnn.Layer(fusedrnn.zoo.mgu, input_size, hidden_size)`` is a layer of one. In the equations W x stands for
W_ih x + b_ih and U h for W_hh h + b_hh, of the gate that is named; h, c are the states before the step, h', c' after;
σ is the sigmoid, products of vectors are elementwise.

Layer normalisation inside the step is not among them: it needs a sum over all units in every step, and a cell is
pointwise. Nor is a GRU whose reset gate comes before the product, U (r h), Cho's first form: it needs a second product
in every step, after the gates. With heads of one unit (U diagonal) the two are the same; that is :func:`gru`, with
n = tanh(W_n x + r (U_n h)).
"""

import torch

from fusedrnn.definition import cell


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def lstm(x, u, s):
    """Long short-term memory, torch.nn.LSTM's.

    i = σ(W_i x + U_i h)   f = σ(W_f x + U_f h)   g = tanh(W_g x + U_g h)   o = σ(W_o x + U_o h)
    c' = f c + i g         h' = o tanh(c')

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; the gate f: Gers, Schmidhuber and Cummins, "Learning to
    forget", 2000.
    """
    i = torch.sigmoid(x.i + u.i)
    f = torch.sigmoid(x.f + u.f)
    g = torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o)
    c = f * s.c + i * g
    return o * torch.tanh(c), c


@cell(gates=("r", "z", "n"))
def gru(x, u, s):
    """Gated recurrent unit in torch.nn.GRU's form, where r multiplies the product.

    r = σ(W_r x + U_r h)   z = σ(W_z x + U_z h)   n = tanh(W_n x + r (U_n h))
    h' = n + z (h - n)

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """
    r = torch.sigmoid(x.r + u.r)
    z = torch.sigmoid(x.z + u.z)
    n = torch.tanh(x.n + r * u.n)
    return n + z * (s.h - n)


@cell(gates=("h",))
def rnn_tanh(x, u, s):
    """Elman's network, torch.nn.RNN: h' = tanh(W x + U h).

    Elman, "Finding structure in time", 1990.
    """
    return torch.tanh(x.h + u.h)


@cell(gates=("h",))
def rnn_relu(x, u, s):
    """Elman's network with a rectifier, torch.nn.RNN(nonlinearity="relu"): h' = max(W x + U h, 0).

    Elman, "Finding structure in time", 1990.
    """
    return torch.relu(x.h + u.h)


@cell(gates=("f", "n"))
def mgu(x, u, s):
    """Minimal gated unit, with the gate on the product as in torch's GRU.

    f = σ(W_f x + U_f h)   n = tanh(W_n x + f (U_n h))
    h' = (1 - f) h + f n

    Zhou, Wu, Zhang and Zhou, "Minimal gated unit for recurrent neural networks", arXiv 1603.09420 (there U_n (f h)).
    """
    f = torch.sigmoid(x.f + u.f)
    n = torch.tanh(x.n + f * u.n)
    return s.h + f * (n - s.h)


@cell(gates=("f", "g", "o"), states=("h", "c"))
def cifg(x, u, s):
    """LSTM with coupled input and forget gate.

    f = σ(W_f x + U_f h)   g = tanh(W_g x + U_g h)   o = σ(W_o x + U_o h)
    c' = f c + (1 - f) g   h' = o tanh(c')

    Greff, Srivastava, Koutník, Steunebrink and Schmidhuber, "LSTM: a search space odyssey", arXiv 1503.04069.
    """
    f = torch.sigmoid(x.f + u.f)
    g = torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o)
    c = g + f * (s.c - g)
    return o * torch.tanh(c), c


@cell(gates=("s", "n"))
def janet(x, u, s):
    """Just another network: an LSTM with the forget gate alone.

    a = W_s x + U_s h      n = tanh(W_n x + U_n h)
    h' = σ(a) h + (1 - σ(a - 1)) n

    van der Westhuizen and Lasenby, "The unreasonable effectiveness of the forget gate", arXiv 1804.04849 (β = 1).
    """
    a = x.s + u.s
    n = torch.tanh(x.n + u.n)
    f = torch.sigmoid(a)
    k = torch.sigmoid(1 - a)
    return f * s.h + k * n


@cell(gates=("z", "n"))
def ligru(x, u, s):
    """Light GRU: no reset gate, a rectifier for tanh. Its batch normalisation of W x is the caller's.

    z = σ(W_z x + U_z h)   n = max(W_n x + U_n h, 0)
    h' = z h + (1 - z) n

    Ravanelli, Brakel, Omologo and Bengio, "Light gated recurrent units for speech recognition", arXiv 1803.10225.
    """
    z = torch.sigmoid(x.z + u.z)
    n = torch.relu(x.n + u.n)
    return n + z * (s.h - n)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), parameters=("p_i", "p_f", "p_o"))
def peephole_lstm(x, u, s, p_i, p_f, p_o):
    """LSTM whose gates see the cell state, each unit its own.

    i = σ(W_i x + U_i h + p_i c)   f = σ(W_f x + U_f h + p_f c)   g = tanh(W_g x + U_g h)
    c' = f c + i g                 o = σ(W_o x + U_o h + p_o c')  h' = o tanh(c')

    Gers and Schmidhuber, "Recurrent nets that time and count", 2000.
    """
    i = torch.sigmoid(x.i + u.i + p_i * s.c)
    f = torch.sigmoid(x.f + u.f + p_f * s.c)
    g = torch.tanh(x.g + u.g)
    c = f * s.c + i * g
    o = torch.sigmoid(x.o + u.o + p_o * c)
    return o * torch.tanh(c), c


@cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def slstm(x, u, s):
    """sLSTM of xLSTM: exponential input gate, normaliser n, stabiliser m (which has no gradient).

    a_k = W_k x + U_k h    l = m + log σ(a_f)
    m' = a_i where n = 0, else max(a_i, l)
    i = exp(a_i - m')      f = exp(l - m')    z = tanh(a_z)    o = σ(a_o)
    c' = f c + i z         n' = f n + i       h' = o c' / n'

    h and c / n are what is meant: (c, n, m) and (c exp(-k), n exp(-k), m + k) are one state. The gradient is exact for
    what depends on h alone.

    Beck et al., "xLSTM: extended long short-term memory", arXiv 2405.04517; m' where n = 0 as in their code.
    """
    a = x.i + u.i
    l = s.m + torch.nn.functional.logsigmoid(x.f + u.f)
    m = torch.where(s.n == 0, a, torch.maximum(a, l)).detach()
    i = torch.exp(a - m)
    # Greater than 1 only where n is 0: the limit keeps infinity from a c of 0.
    f = torch.exp((l - m).clamp(max=80))
    z = torch.tanh(x.z + u.z)
    o = torch.sigmoid(x.o + u.o)
    c = f * s.c + i * z
    n = f * s.n + i
    return o * c / n, c, n, m


@cell(gates=("r", "z", "n"), states=("d", "h"), inputs=("decay",))
def grud(x, u, s, decay):
    """GRU-D's decay of the hidden state: a GRU that starts each step from γ h, γ = exp(-max(W_γ δ + b_γ, 0)) of the
    time δ since the last observation. Inputs that are missing are the caller's to fill in.

    r = σ(W_r x + U_r d)   z = σ(W_z x + U_z d)   n = tanh(W_n x + r (U_n d))
    h' = n + z (d - n)     d' = decay h'

    ``decay`` of a step is γ of the step after it (1 in the last): d is the output, which U multiplies; h without
    decay is the second state, of every step with ``return_all_states``.

    Che, Purushotham, Cho, Sontag and Liu, "Recurrent neural networks for multivariate time series with missing values",
    arXiv 1606.01865.
    """
    r = torch.sigmoid(x.r + u.r)
    z = torch.sigmoid(x.z + u.z)
    n = torch.tanh(x.n + r * u.n)
    h = n + z * (s.d - n)
    return decay * h, h


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), inputs=("keep_h", "keep_c"))
def zoneout_lstm(x, u, s, keep_h, keep_c):
    """LSTM with zoneout: a unit keeps its state where the mask is 1. In evaluation the masks are its probability.

    i, f, g, o as in :func:`lstm`
    c~ = f c + i g         c' = keep_c c + (1 - keep_c) c~
    h' = keep_h h + (1 - keep_h) o tanh(c~)

    Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", arXiv 1606.01305.
    """
    i = torch.sigmoid(x.i + u.i)
    f = torch.sigmoid(x.f + u.f)
    g = torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o)
    new_c = f * s.c + i * g
    new_h = o * torch.tanh(new_c)
    return new_h + keep_h * (s.h - new_h), new_c + keep_c * (s.c - new_c)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), inputs=("mask",))
def recurrent_dropout_lstm(x, u, s, mask):
    """LSTM with dropout of the candidate, which loses no memory. The mask is 0 or 1 / (1 - p); 1 in evaluation.

    i, f, g, o as in :func:`lstm`
    c' = f c + i (mask g)  h' = o tanh(c')

    Semeniuta, Severyn and Barth, "Recurrent dropout without memory loss", arXiv 1603.05118.
    """
    i = torch.sigmoid(x.i + u.i)
    f = torch.sigmoid(x.f + u.f)
    g = torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o)
    c = f * s.c + i * (mask * g)
    return o * torch.tanh(c), c


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def hard_lstm(x, u, s):
    """LSTM with hard sigmoids, as Keras and ONNX have it among their activations.

    i = hard(W_i x + U_i h), f and o alike, hard(a) = min(max(a / 6 + 1/2, 0), 1)
    g, c', h' as in :func:`lstm`

    Courbariaux, Bengio and David, "BinaryConnect", arXiv 1511.00363; the slope is torch.nn.functional.hardsigmoid's.
    """
    i = torch.clamp((x.i + u.i) / 6 + 0.5, 0, 1)
    f = torch.clamp((x.f + u.f) / 6 + 0.5, 0, 1)
    g = torch.tanh(x.g + u.g)
    o = torch.clamp((x.o + u.o) / 6 + 0.5, 0, 1)
    c = f * s.c + i * g
    return o * torch.tanh(c), c
