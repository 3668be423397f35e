"""fusedrnn: recurrent layers with fused kernels, drop-ins for torch.nn's.

>>> import torch, fusedrnn
>>> layer = fusedrnn.LSTM(input_size=8, hidden_size=16)
>>> y, (h_n, c_n) = layer(torch.zeros(5, 3, 8))
>>> y.shape
torch.Size([5, 3, 16])
"""

from fusedrnn import functional, integrations, zoo
from fusedrnn._build import build_info
from fusedrnn.convert import ConversionEntry, conversion_report, convert, revert
from fusedrnn.definition import cell
from fusedrnn.explain import explain
from fusedrnn.freezing import freeze, unfreeze
from fusedrnn.gates import record_gates
from fusedrnn.layer import Layer
from fusedrnn.lowering import decompositions
from fusedrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fusedrnn.planning import backend, plan
from fusedrnn.quantizing import quantize, unquantize
from fusedrnn.trials import Timing, tune

__version__ = "0.2.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConversionEntry",
    "GRUCell",
    "LSTMCell",
    "Layer",
    "RNNCell",
    "Timing",
    "backend",
    "build_info",
    "cell",
    "conversion_report",
    "convert",
    "decompositions",
    "explain",
    "freeze",
    "functional",
    "integrations",
    "plan",
    "quantize",
    "record_gates",
    "revert",
    "tune",
    "unfreeze",
    "unquantize",
    "zoo",
]
