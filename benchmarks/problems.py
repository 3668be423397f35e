"""What is measured: problems as frozen data, and the suites that they come in."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

MODES = ("forward", "train", "latency", "memory")
DTYPES = ("float32", "float64", "bfloat16", "float16")
SUITES = ("deepbench", "flashrnn", "fastrnns", "sweep")
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
        return f"{self.cell} H={self.H}{inputs} B={self.B} T={self.T}{depth}"

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
    problems = {"deepbench": deepbench, "flashrnn": flashrnn, "fastrnns": fastrnns, "sweep": sweep}[name]()
    problems = list(dict.fromkeys(problems))
    if quick:
        small = {
            "deepbench": lambda p: (p.cell, p.H, p.B, p.T) in DEEPBENCH_QUICK,
            "flashrnn": lambda p: p.H <= 128,
            "fastrnns": lambda p: p.cell in ("lstm", "gru"),
            "sweep": lambda p: p.L == p.D == 1 and (p.T, p.B, p.H) in SWEEP_QUICK,
        }[name]
        problems = [p for p in problems if small(p)]
    return [replace(p, dtype=dtype) for p in problems]
