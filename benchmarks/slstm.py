"""``python -m fusedrnn bench --suite slstm``: sLSTM, 4 heads of 128 units, 64 steps, beside the package flashrnn.

torch.nn has no sLSTM. The peer is flashrnn 1.0.8's vanilla backend, a loop of torch's operations, as it is and under
torch.compile (only if asked for by --peers: the loop is unrolled, and each batch and mode compiles for one to three
minutes, in which nothing is measured). Everybody starts from one x
[T, B, 512] and includes its product with W_ih; a training step gives the gradients of x and of all weights. Nobody is
timed before its results agreed with float64.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fusedrnn
from fusedrnn.compat.flashrnn import flashrnn as ours

from . import measure

HEADS, UNITS, STEPS, BATCHES = 4, 128, 64, (1, 16, 64)
HIDDEN = HEADS * UNITS
MODES = ("forward", "train")
# Times as fast as the faster of the peers.
GOALS = {1: 4.0, 16: 4.0, 64: 2.0}
COMPILED = "flashrnn:vanilla compiled"
PEERS = ("flashrnn:vanilla", COMPILED)
NAMES = ("fusedrnn", "fusedrnn.compat", *PEERS)


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


def by_layer() -> Callable:
    layer = fusedrnn.Layer(fusedrnn.zoo.slstm, HIDDEN, HIDDEN, heads=HEADS)

    def y(x, w_ih, r, b):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weights = w_ih, r.flatten(0, 2), b.flatten(), torch.zeros_like(b).flatten()
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,))[0]

    return y


def why_not(name: str) -> str:
    if name in PEERS and importlib.util.find_spec("flashrnn") is None:
        return "not installed: flashrnn (pip install flashrnn==1.0.8)"
    return ""


def make(name: str, batch: int) -> Callable:
    if name == "fusedrnn":
        return by_layer()
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


def title(batch: int) -> str:
    return f"slstm {HEADS}x{UNITS} T={STEPS} B={batch}"


def measured(batch: int, mode: str, names: list[str], rounds: int, seconds: float) -> dict[str, dict]:
    """Name -> its row: milliseconds, error of the largest entry, times as fast as each peer, or why there is none."""
    given, want, calls, rows = draw(batch), exact(batch, mode), {}, {}
    for name in names:
        if name == COMPILED:
            print(f"{title(batch)} {mode}: {name} compiles, which takes minutes", file=sys.stderr, flush=True)
        try:
            run = call(make(name, batch), given, mode)
            error = max(((g.double() - w).abs().max() / w.abs().max()).item() for g, w in zip(run(), want, strict=True))
        except Exception as failed:  # whatever a peer raises is its row
            rows[name] = {"why": measure.in_words(failed)}
            continue
        rows[name] = {"error": error}
        if error < 1e-3:
            calls[name] = run
        else:
            rows[name]["why"] = f"wrong: off by {error:.1e}"
    samples = measure.interleaved(calls, rounds, seconds, torch.device("cpu"))
    for name, s in samples.items():
        if isinstance(s, str):
            rows[name]["why"] = s
            continue
        rows[name] |= {"ms": s.quantile(0.5) * 1e3, "rounds": len(s.seconds)}
        for peer in PEERS:
            if isinstance(samples.get(peer), measure.Samples) and name not in PEERS:
                rows[name][f"times as fast as {peer}"] = measure.speedup(samples[peer], s)._asdict()
    return rows


def in_words(batch: int, mode: str, name: str, row: dict) -> str:
    text = f"{title(batch):<26}{mode:<10}{name:<28}"
    if "ms" not in row:
        return f"{text}{row['why']}"
    ratios = [v for k, v in row.items() if k.startswith("times as fast")]
    if not ratios:
        return f"{text}{row['ms']:10.2f} ms"
    least = min(ratios, key=lambda ratio: ratio["value"])
    return (
        f"{text}{row['ms']:10.2f} ms  {least['value']:.2f} ({least['low']:.2f} to {least['high']:.2f}) times as fast "
        f"as the faster peer, goal {GOALS[batch]:g}"
    )


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
    rows = []
    with measure.settings(arguments.threads, arguments.tf32):
        for batch in batches:
            for mode in modes:
                for name, row in measured(batch, mode, names, arguments.rounds, seconds).items():
                    rows.append({"B": batch, "mode": mode, "provider": name} | row)
                    if not arguments.json:
                        print(in_words(batch, mode, name, row), flush=True)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return 1 if any("ms" not in row and row["provider"].startswith("fusedrnn") for row in rows) else 0
