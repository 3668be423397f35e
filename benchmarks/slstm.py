"""``python -m fusedrnn bench --suite slstm``: sLSTM, 4 heads of 128 units, 64 steps, beside the package flashrnn.

torch.nn has no sLSTM. The peer is flashrnn 1.0.8's vanilla backend, a loop of torch's operations, as it is and under
torch.compile (only if asked for by --peers: the loop is unrolled, and each batch and mode compiles for one to three
minutes, in which nothing is measured). Everybody starts from one x
[T, B, 512] and includes its product with W_ih; a training step gives the gradients of x and of all weights. Nobody is
timed before its results agreed with float64.

Beside the ratios stands the share of the roof: the products alone, which nobody can avoid, each at the rate of a large
one, or, where that takes longer, its weights read at the rate that all threads read as many bytes. And torch's own
products of these shapes take turns with everybody, under the name "products of torch".
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fusedrnn
from fusedrnn.compat.flashrnn import flashrnn as ours

from . import measure
from .results import environment
from .roof import kept_rate

HEADS, UNITS, STEPS, BATCHES = 4, 128, 64, (1, 16, 64)
HIDDEN = HEADS * UNITS
MODES = ("forward", "train")
# Times as fast as the faster of the peers.
GOALS = {1: 4.0, 16: 4.0, 64: 2.0}
COMPILED = "flashrnn:vanilla compiled"
PEERS = ("flashrnn:vanilla", COMPILED)
NAMES = ("fusedrnn", "fusedrnn.compat", *PEERS)
PRODUCTS = "products of torch"
MEASURED_IN = {
    "ms": "milliseconds a call, median of the rounds",
    "error": "of the largest entry of the tensor",
    "roof_ms": "milliseconds that the products alone take at least",
    "of the roof": "roof_ms by ms",
    "times as fast as": "that provider's ms by ms, in the same rounds; low and high: quartiles of a round's quotient",
}


@dataclass(frozen=True)
class Given:
    x: Tensor  # [T, B, H]
    weights: tuple[Tensor, ...]  # W_ih [4 H, H], R [4, N, D, D], b [4, N, D]
    dy: Tensor  # [T, B, H]


def draw(batch: int, dtype: torch.dtype = torch.float32) -> Given:
    generator = torch.Generator().manual_seed(0)

    def t(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    weights = (
        t(4 * HIDDEN, HIDDEN, scale=HIDDEN**-0.5),
        t(4, HEADS, UNITS, UNITS, scale=UNITS**-0.5),
        t(4, HEADS, UNITS),
    )
    return Given(t(STEPS, batch, HIDDEN), weights, t(STEPS, batch, HIDDEN))


def by_function(function: Callable, **options) -> Callable:
    """y for x and the weights, by a function with flashrnn's interface."""

    def y(x, w_ih, r, b):
        gates = torch.nn.functional.linear(x, w_ih).unflatten(-1, (4, HEADS, UNITS)).transpose(0, 1)
        states, _ = function(gates, r, b, function="slstm", backend="vanilla", **options)
        return states[0].transpose(0, 1).flatten(2)

    return y


def why_not(name: str) -> str:
    if name in PEERS and importlib.util.find_spec("flashrnn") is None:
        return "not installed: flashrnn (pip install flashrnn==1.0.8)"
    return ""


def make(name: str, batch: int) -> Callable:
    """y for x and the weights, of whoever has no module."""
    if name == "fusedrnn.compat":
        return by_function(ours)
    from flashrnn import FlashRNNConfig, flashrnn

    config = FlashRNNConfig(
        num_heads=HEADS, head_dim=UNITS, function="slstm", backend="vanilla", dtype="float32", batch_size=batch
    )
    y = by_function(flashrnn, config=config)
    return torch.compile(y, dynamic=False) if name == COMPILED else y


def call(y: Callable, given: Given, mode: str) -> Callable[[], list[Tensor]]:
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return [y(given.x, *given.weights)]

        return forward
    leaves = [t.detach().requires_grad_() for t in (given.x, *given.weights)]

    def train():
        out = y(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, given.dy)]

    return train


def call_of_layer(given: Given, mode: str) -> Callable[[], list[Tensor]]:
    """The same of a Layer that holds the weights."""
    layer = fusedrnn.Layer(fusedrnn.zoo.slstm, HIDDEN, HIDDEN, heads=HEADS)
    held = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0
    with torch.no_grad():
        for parameter, weight in zip(held, given.weights):
            parameter.copy_(weight.view_as(parameter))
        layer.bias_hh_l0.zero_().requires_grad_(False)
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return [layer(given.x)[0]]

        return forward
    x = given.x.detach().requires_grad_()

    def train():
        out, _ = layer(x)
        dx, *dweights = torch.autograd.grad(out, (x, *held), given.dy)
        return [out.detach(), dx, *(d.view_as(w) for d, w in zip(dweights, given.weights))]

    return train


def exact(batch: int, mode: str) -> list[Tensor]:
    """In float64, by the cell's function in a loop."""
    given = draw(batch, torch.float64)

    def y(x, w_ih, r, b):
        zero, out = torch.zeros(batch, HIDDEN, dtype=x.dtype), []
        states = [zero] * 4
        for step in torch.nn.functional.linear(x, w_ih).unbind(0):
            h = states[0].view(batch, HEADS, UNITS)
            u = (torch.einsum("bnp,gndp->gbnd", h, r) + b.unsqueeze(1)).flatten(2)
            states = fusedrnn.zoo.slstm.step(step.split(HIDDEN, 1), [*u], states)
            out.append(states[0])
        return torch.stack(out)

    return call(y, given, mode)()


def products(given: Given, mode: str) -> Callable:
    """The matrix products of a call by torch, from operands that lie as they suit it best."""
    (steps, batch, _), (w_ih, r, _) = given.x.shape, given.weights
    rows = given.x.flatten(0, 1)
    h = given.dy[0].view(batch, HEADS, UNITS).transpose(0, 1).contiguous()
    w_hh = r.transpose(0, 1).flatten(1, 2)  # [N, 4 D, D]
    transposed = w_hh.mT.contiguous()
    dgates = torch.ones(steps * batch, 4 * HIDDEN)
    of_step = torch.ones(HEADS, batch, 4 * UNITS)
    of_heads = torch.ones(HEADS, 4 * UNITS, steps * batch), torch.ones(HEADS, steps * batch, UNITS)

    def forward():
        torch.mm(rows, w_ih.t())
        for _ in range(steps):
            torch.bmm(h, transposed)

    def train():
        forward()
        for _ in range(steps):
            torch.bmm(of_step, w_hh)
        torch.mm(dgates, w_ih)
        torch.mm(dgates.t(), rows)
        torch.bmm(*of_heads)

    return forward if mode == "forward" else train


@dataclass(frozen=True)
class Machine:
    """What this machine does at most with so many threads, measured."""

    flops: float  # a second, of a large product
    read_ih: float  # bytes a second, of as many as W_ih has
    read_hh: float

    @staticmethod
    def measured(threads: int) -> "Machine":
        return Machine(
            measure.cpu_peaks(torch.float32)[0],
            kept_rate(16 * HIDDEN * HIDDEN, threads),
            kept_rate(16 * HIDDEN * UNITS, threads),
        )

    def roof(self, batch: int, mode: str) -> float:
        """Seconds that the products of a call take at least."""
        w_ih, w_hh, rows = 4 * HIDDEN * HIDDEN, 4 * HIDDEN * UNITS, STEPS * batch
        of_x = max(2 * rows * w_ih / self.flops, 4 * w_ih / self.read_ih)
        of_h = STEPS * max(2 * batch * w_hh / self.flops, 4 * w_hh / self.read_hh)
        if mode == "forward":
            return of_x + of_h
        return 3 * of_x + 2 * of_h + 2 * rows * w_hh / self.flops


def title(batch: int) -> str:
    return f"slstm {HEADS}x{UNITS} T={STEPS} B={batch}"


def measured(batch: int, mode: str, names: list[str], rounds: int, seconds: float, machine: Machine) -> dict[str, dict]:
    """Name -> its row: milliseconds, error of the largest entry, times as fast as each peer, or why there is none."""
    given, want, calls, rows = draw(batch), exact(batch, mode), {}, {}
    for name in names:
        if name == COMPILED:
            print(f"{title(batch)} {mode}: {name} compiles, which takes minutes", file=sys.stderr, flush=True)
        try:
            run = call_of_layer(given, mode) if name == "fusedrnn" else call(make(name, batch), given, mode)
            error = max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(run(), want, strict=True))
        except Exception as failed:  # whatever a peer raises is its row
            rows[name] = {"why": measure.in_words(failed)}
            continue
        rows[name] = {"error": error}
        if error < 1e-3:
            calls[name] = run
        else:
            rows[name]["why"] = f"wrong: off by {error:.1e}"
    rows[PRODUCTS], calls[PRODUCTS] = {}, products(given, mode)
    samples = measure.interleaved(calls, rounds, seconds, torch.device("cpu"))
    roof = machine.roof(batch, mode) * 1e3
    for name, s in samples.items():
        if isinstance(s, str):
            rows[name]["why"] = s
            continue
        ms = s.quantile(0.5) * 1e3
        rows[name] |= {"ms": ms, "rounds": len(s.seconds), "roof_ms": roof, "of the roof": roof / ms}
        for peer in PEERS:
            if isinstance(samples.get(peer), measure.Samples) and name.startswith("fusedrnn"):
                rows[name][f"times as fast as {peer}"] = measure.speedup(samples[peer], s)._asdict()
    return rows


class Kept:
    """A folder's slstm.json: whole after every batch and mode, whenever a run is killed.

    Raises:
        RuntimeError: the file is of something else.
    """

    def __init__(self, folder: Path, about: dict):
        self.path, self.about, self.rows = folder / "slstm.json", about, []
        if self.path.exists():
            try:
                self.rows = json.loads(self.path.read_text())["rows"]
            except (KeyError, TypeError, ValueError) as error:
                raise RuntimeError(f"{self.path} has no rows of this suite. Take another folder (--out)") from error

    def of(self, batch: int, mode: str, names: list[str]) -> list[dict] | None:
        """The rows of this machine and version; None where one of ``names`` has none."""
        mine = {**self.about, "T": STEPS, "B": batch, "mode": mode}
        found = [row for row in self.rows if mine.items() <= row.items()]
        return found if {*names} <= {row["provider"] for row in found} else None

    def put(self, batch: int, mode: str, rows: dict[str, dict]) -> list[dict]:
        """Writes them in the place of those that were there; returns them as they stand in the file."""
        mine = {**self.about, "T": STEPS, "B": batch, "mode": mode}
        new = [{**mine, "provider": name, **row} for name, row in rows.items()]
        self.rows = [row for row in self.rows if not mine.items() <= row.items()] + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"units": MEASURED_IN, "rows": self.rows}, indent=1))
        os.replace(beside, self.path)
        return new


def in_words(row: dict) -> str:
    text = f"{title(row['B']):<26}{row['mode']:<10}{row['provider']:<28}"
    if "ms" not in row:
        return f"{text}{row['why']}"
    text = f"{text}{row['ms']:10.2f} ms  {row['of the roof']:4.0%} of the roof"
    what = "times as fast as "
    ratios = {k.removeprefix(what): v for k, v in row.items() if k.startswith(what)}
    if not ratios:
        return text
    peer = min(ratios, key=lambda name: ratios[name]["value"])  # the faster one
    value, low, high = (ratios[peer][key] for key in ("value", "low", "high"))
    return f"{text}  {value:.2f} ({low:.2f} to {high:.2f}) times as fast as {peer}, goal {GOALS[row['B']]:g}"


def run(arguments: argparse.Namespace, seconds: float) -> int:
    """What bench does for this suite."""
    names = arguments.peers or [name for name in NAMES if name != COMPILED]
    names = list(dict.fromkeys(["fusedrnn", *names]))
    unknown = [name for name in names if name not in NAMES]
    modes = arguments.modes or list(MODES)
    problem = ""
    if unknown:
        problem = f"peers of suite slstm must be of {', '.join(NAMES)}, got {', '.join(unknown)}"
    elif set(modes) - set(MODES):
        problem = f"modes of suite slstm must be of {', '.join(MODES)}, got {', '.join(modes)}"
    elif arguments.dtype != "float32" or (arguments.device or "cpu") != "cpu":
        problem = f"suite slstm measures float32 on the CPU, got {arguments.dtype} on {arguments.device or 'cpu'}"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    left_out = {name: why_not(name) for name in names if why_not(name)}
    names = [name for name in names if name not in left_out]
    batches = [b for b in BATCHES if arguments.only in f"{title(b)} "]  # "B=1 " is not B=16
    if arguments.list:
        for b in batches:
            print(f"  {title(b)}: {', '.join(modes)} of {', '.join(names)}")
        return 0
    about = asdict(environment(torch.device("cpu"), arguments.threads, arguments.tf32))
    about["flashrnn"] = importlib.metadata.version("flashrnn") if not why_not(PEERS[0]) else ""
    try:
        kept = Kept(arguments.out, about)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, machine = [], None
    with measure.settings(arguments.threads, arguments.tf32):
        for batch in batches:
            for mode in modes:
                found = kept.of(batch, mode, names)
                if found is None:
                    machine = machine or Machine.measured(arguments.threads)
                    found = kept.put(batch, mode, measured(batch, mode, names, arguments.rounds, seconds, machine))
                rows += found
                if not arguments.json:
                    print("\n".join(in_words(row) for row in found), flush=True)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"units": MEASURED_IN, "rows": rows}, indent=1))
    else:
        print(f"{len(rows)} rows in {kept.path}")
    return 1 if any("ms" not in row and row["provider"].startswith("fusedrnn") for row in rows) else 0
