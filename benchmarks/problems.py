"""What is measured: problems as frozen data, and the suites that they come in."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

MODES = ("forward", "train", "latency", "memory")
DTYPES = ("float32", "float64", "bfloat16", "float16")
SUITES = ("deepbench", "users", "flashrnn", "fastrnns", "sweep")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
DEEPBENCH = Path(__file__).with_name("data") / "deepbench_rnn.csv"


@dataclass(frozen=True)
class Problem:
    """A recurrent layer and its input: x is [T, B, I], y is [T, B, D*H].

    ``modes`` says what its suite measures: forward (inference), train (forward, backward and all gradients),
    latency (one step) and memory (the peak of a training step).
    """

    suite: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    dtype: str = "float32"
    modes: tuple[str, ...] = ("forward", "train", "memory")

    @property
    def name(self) -> str:
        depth = (f" L={self.L}" if self.L > 1 else "") + (" both directions" if self.D > 1 else "")
        inputs = f" I={self.I}" if self.I != self.H else ""
        of = f"{project}: " if (project := self.project) else ""
        return f"{of}{self.cell} H={self.H}{inputs} B={self.B} T={self.T}{depth}"

    @property
    def project(self) -> str:
        """Of the suite `users`: who runs the layer, else nothing. One step of it belongs to the same."""
        if self.suite != "users":
            return ""
        return USERS.get((self.cell, self.I, self.H, self.L, self.D, self.B), ("",))[0]

    def one_step(self) -> "Problem":
        return replace(self, T=1, modes=("latency",))

    def flops(self, mode: str) -> float:
        """Operations of the matrix products alone; a training step has three of each."""
        inputs = self.I + (self.L - 1) * self.D * self.H
        products = GATES[self.cell] * self.H * (inputs + self.L * self.H) * self.D
        return 2.0 * products * self.T * self.B * (3 if mode == "train" else 1)

    def bytes(self, mode: str) -> float:
        """What has to move at least: weights, x and y once; a training step reads them again and writes gradients."""
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        inputs = self.I + (self.L - 1) * self.D * self.H
        weights = GATES[self.cell] * self.H * (inputs + self.L * self.H) * self.D
        data = self.T * self.B * (self.I + self.D * self.H)
        return float(size) * (weights + data) * (3 if mode == "train" else 1)


def deepbench() -> list[Problem]:
    """DeepBench's recurrent problems: its training list, its server list and its device list (I = H).

    Source: https://github.com/baidu-research/DeepBench, code/kernels/rnn_problems.h and the inference lists beside it;
    sizes only, kept in data/deepbench_rnn.csv.
    """
    with DEEPBENCH.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        hidden = int(row["hidden"])
        modes = ("forward", "train", "memory") if row["set"] == "training" else ("forward", "latency")
        sizes = {"T": int(row["steps"]), "B": int(row["batch"]), "I": hidden, "H": hidden}
        found.append(Problem("deepbench", row["cell"], **sizes, modes=modes))
    return found


# cell, H, B, T of the part of DeepBench that two cores measure in minutes.
DEEPBENCH_QUICK = {
    ("lstm", 256, 1, 150), ("lstm", 512, 1, 25), ("lstm", 1024, 1, 25), ("lstm", 1024, 4, 25), ("lstm", 256, 4, 150),
    ("gru", 512, 1, 1), ("gru", 512, 32, 1), ("gru", 1536, 1, 187), ("rnn_relu", 64, 1, 96),
    ("lstm", 512, 16, 25), ("lstm", 256, 16, 150), ("lstm", 512, 32, 25), ("rnn_relu", 1760, 16, 50),
}  # fmt: skip


# Layers of popular projects: cell, I, H, L, D, B to the project, T, what they do with it, and whether two cores measure
# it in minutes. Sizes are those of the projects' own code or defaults; batches of training are their defaults.
_SPEECH, _STREAM, _TRAINED = ("forward",), ("latency",), ("forward", "train")
USERS = {
    ("lstm", 128, 128, 1, 1, 1): ("silero-vad", 512, (*_SPEECH, *_STREAM), True),
    ("lstm", 640, 256, 1, 2, 1): ("Kokoro", 300, _SPEECH, True),
    ("lstm", 60, 128, 4, 2, 32): ("pyannote", 589, _TRAINED, False),
    ("gru", 256, 256, 3, 1, 1): ("RNNoise", 500, (*_SPEECH, *_STREAM), True),
    ("gru", 256, 256, 3, 1, 128): ("RNNoise", 2000, ("train",), False),
    ("lstm", 48, 256, 1, 1, 4096): ("rsl_rl", 24, (*_TRAINED, *_STREAM), False),
    ("lstm", 64, 256, 1, 1, 8): ("RecurrentPPO", 128, (*_TRAINED, *_STREAM), True),
    ("lstm", 512, 128, 2, 2, 128): ("docTR", 32, _SPEECH, True),
    ("lstm", 256, 256, 2, 2, 1): ("EasyOCR", 64, _SPEECH, True),
    ("lstm", 640, 640, 2, 1, 1): ("NeMo RNN-T", 64, _STREAM, True),
    ("lstm", 640, 640, 2, 1, 64): ("NeMo RNN-T", 64, _STREAM, True),
    ("lstm", 1, 16, 1, 1, 16): ("Neural Amp Modeler", 8192, ("train",), False),
    ("lstm", 1, 16, 1, 1, 1): ("Neural Amp Modeler", 70_000, _SPEECH, True),
    ("lstm", 8, 128, 2, 1, 32): ("neuralforecast", 48, _TRAINED, True),
}


def users(quick: bool = False) -> list[Problem]:
    """The layers that popular projects run, each under the project's name."""
    found = []
    for (cell, inputs, hidden, layers, directions, batch), (_, steps, modes, small) in USERS.items():
        if small or not quick:
            sizes = {"T": steps, "B": batch, "I": inputs, "H": hidden, "L": layers, "D": directions}
            found.append(Problem("users", cell, **sizes, modes=modes))
    return found


def flashrnn() -> list[Problem]:
    """FlashRNN's figure: B=16, T=1024, H=768, and a sweep of H (https://arxiv.org/abs/2412.07752)."""
    return [Problem("flashrnn", "lstm", 1024, 16, h, h) for h in (768, 64, 128, 256, 512, 1024, 1536, 2048)]


def fastrnns() -> list[Problem]:
    """The default of PyTorch's benchmarks/fastrnns: T=100, B=64, H=512, for every cell."""
    return [Problem("fastrnns", cell, 100, 64, 512, 512) for cell in GATES]


def sweep() -> list[Problem]:
    """One size after another around T=64, B=16, H=256, for LSTM and GRU; then depth and both directions."""
    base = Problem("sweep", "lstm", 64, 16, 256, 256, modes=MODES)
    found = [base]
    found += [replace(base, H=h, I=h) for h in (64, 96, 128, 192, 384, 512, 768, 1024)]
    found += [replace(base, B=b) for b in (1, 2, 4, 8, 32, 64, 128, 17)]
    found += [replace(base, T=t) for t in (8, 16, 32, 128, 256, 512)]
    found += [replace(base, L=2), replace(base, L=4), replace(base, D=2), replace(base, L=2, D=2)]
    return found + [replace(p, cell="gru") for p in found]


SWEEP_QUICK = ((64, 16, 256), (64, 16, 128), (64, 16, 512), (64, 1, 256), (64, 4, 256), (16, 16, 256), (128, 16, 256))


def suite(name: str, quick: bool = False, dtype: str = "float32") -> list[Problem]:
    """The problems of a suite, all in ``dtype``; ``quick`` takes those that two cores measure in minutes."""
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    suites = {"deepbench": deepbench, "users": users, "flashrnn": flashrnn, "fastrnns": fastrnns, "sweep": sweep}
    problems = suites[name]()
    problems = list(dict.fromkeys(problems))
    if quick:
        small = {
            "deepbench": lambda p: (p.cell, p.H, p.B, p.T) in DEEPBENCH_QUICK,
            "users": lambda p: p in users(True),
            "flashrnn": lambda p: p.H <= 128,
            "fastrnns": lambda p: p.cell in ("lstm", "gru"),
            "sweep": lambda p: p.L == p.D == 1 and (p.T, p.B, p.H) in SWEEP_QUICK,
        }[name]
        problems = [p for p in problems if small(p)]
    return [replace(p, dtype=dtype) for p in problems]
