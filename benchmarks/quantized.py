"""Layers in fewer bits, speed beside accuracy: ``python -m fusedrnn.benchmarks.quantized``.

Inference of one layer on the CPU, random weights of torch.nn's initialisation, x normally distributed, zero states.
The error is that against the same layer in float64 with the weights before rounding, root mean square over the output,
as a share of the root mean square of the output. Everybody takes turns, a time is the least of the rounds; with
``--threads 1`` it is the time of that thread, so that what others take of its core does not count.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn

from . import measure, providers
from .problems import Problem

CELLS = ("LSTM", "GRU")
OURS = ("float32", "bfloat16", "int8", "int8 x int8")  # weights, and x and h
LARGEST_ERROR = 0.05  # who is further off is not timed


def layer_of(cell: str, hidden: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(nn, cell)(hidden, hidden).eval()


def ours(layer: nn.Module, kind: str) -> nn.Module:
    """fusedrnn's with weights, and perhaps x and h, of these dtypes: frozen in float32, else quantized."""
    mine = fusedrnn.convert(copy.deepcopy(layer))
    if kind == "float32":
        return fusedrnn.freeze(mine)
    return fusedrnn.quantize(mine, *(getattr(torch, dtype) for dtype in kind.split(" x ")))


def has_vnni() -> bool:
    """Whether this processor multiplies bytes and adds up in 32 bits, as far as Linux says."""
    about = Path("/proc/cpuinfo")
    flags = about.read_text() if about.exists() else ""
    return any(name in flags for name in ("avx512_vnni", "avx_vnni", "asimddp"))


def torchs(layer: nn.Module) -> nn.Module:
    """torch's own layer with int8 weights, x and h quantized at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {type(layer)})[0]


def onnxruntimes(layer: nn.Module, x: Tensor, int8: bool) -> Callable[[], list[Tensor]]:
    """A session of ONNX Runtime for this shape of x; ``int8``: its dynamic quantisation, for the LSTM only."""
    import onnxruntime
    from onnxruntime import quantization

    if int8 and not isinstance(layer, nn.LSTM):
        raise NotImplementedError("ONNX Runtime quantises the LSTM only")
    steps, batch, hidden = x.shape
    problem = Problem("sweep", "lstm" if isinstance(layer, nn.LSTM) else "gru", steps, batch, hidden, hidden)
    model = providers.onnx_model(providers.Given(problem, dict(layer.state_dict()), x, x))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if int8:
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
            before.write_bytes(model)
            level = logging.root.level
            logging.root.setLevel(logging.ERROR)
            try:
                # Its sums of pairs are of 16 bits without VNNI: there its documentation advises weights of 7 bits.
                quantization.quantize_dynamic(
                    before, after, weight_type=quantization.QuantType.QInt8, reduce_range=not has_vnni()
                )
            finally:
                logging.root.setLevel(level)
            model = after.read_bytes()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: [torch.from_numpy(t) for t in session.run(["y"], feed)]


def calls_of(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """Who is measured: name -> a call that returns y first."""
    found: dict[str, Callable[[], list[Tensor]]] = {}
    modules = {"torch.nn": layer, **{f"fusedrnn {kind}": ours(layer, kind) for kind in OURS}}
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # gone, or without an engine
        modules["torch int8"] = torchs(layer)
    for name, module in modules.items():
        found[name] = lambda module=module: module(x)
    for name, int8 in (("onnxruntime float32", False), ("onnxruntime int8", True)):
        with contextlib.suppress(ImportError, NotImplementedError):
            found[name] = onnxruntimes(layer, x, int8)
    return found


def error_of(y: Tensor, exact: Tensor) -> float:
    return float(((y.double() - exact).square().mean() / exact.square().mean()).sqrt())


@torch.no_grad()
def problem(cell: str, hidden: int, batch: int, steps: int, rounds: int, seconds: float) -> dict:
    """The errors of everybody, and the least times of a call, the rounds taken in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    layer = layer_of(cell, hidden)
    x = torch.randn(steps, batch, hidden)
    exact = copy.deepcopy(layer).double()(x.double())[0]
    calls = calls_of(layer, x)
    errors = {name: error_of(call()[0], exact) for name, call in calls.items()}
    for name, error in errors.items():
        if name.startswith("fusedrnn") and not error < LARGEST_ERROR:
            raise RuntimeError(f"{name} is off by {error:.1e} of the output, {cell} H={hidden}: it is not timed")
    times: dict[str, list[float]] = {name: [] for name, error in errors.items() if error < LARGEST_ERROR}
    order, until = list(times), time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > until:
            break
        random.shuffle(order)
        for name in order:
            calls[name]()  # what others did to the caches does not count
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return {
        "cell": cell,
        "H": hidden,
        "B": batch,
        "T": steps,
        "error": errors,
        "seconds": {name: min(t) for name, t in times.items()},
    }


def is_wrong(row: dict) -> list[str]:
    """Who is too far off, a line each."""
    about = f"{row['cell']} {row['H']} / {row['B']} / {row['T']}"
    return [
        f"{about}: {name} is off by {error:.1e} of the output, and is not timed"
        for name, error in row["error"].items()
        if name not in row["seconds"]
    ]


def table(rows: list[dict], heads: list[str], cell_of: Callable[[dict, str], str]) -> str:
    lines = ["| H / B / T | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        about = f"{row['cell']} {row['H']} / {row['B']} / {row['T']}"
        lines.append(f"| {about} | " + " | ".join(cell_of(row, name) for name in heads) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn.benchmarks.quantized", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--hidden", type=int, nargs="+", default=[128, 256, 512, 1024], metavar="H", help="sizes (default: %(default)s)"
    )
    add("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="B", help="(default: %(default)s)")
    add("--steps", type=int, default=50, metavar="T", help="steps (default: %(default)s)")
    add("--cell", choices=CELLS, nargs="+", default=CELLS, help="layers (default: both)")
    add("--rounds", type=int, default=200, help="turns of everybody, at most (default: %(default)s)")
    add("--seconds", type=float, default=6, help="of a problem, at most (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--json", action="store_true", help="print rows as JSON, times in seconds")
    arguments = parser.parse_args(argv)
    numbers = (*arguments.hidden, *arguments.batch, arguments.steps, arguments.rounds, arguments.threads)
    if min(numbers) < 1:
        print("error: sizes, rounds and threads must be at least 1", file=sys.stderr)
        return 2
    rows = []
    with measure.settings(arguments.threads, False):
        for cell in arguments.cell:
            for hidden in arguments.hidden:
                for batch in arguments.batch:
                    sizes = (cell, hidden, batch, arguments.steps)
                    rows.append(problem(*sizes, arguments.rounds, arguments.seconds))
                    if not arguments.json and sys.stderr.isatty():
                        print(*sizes, file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    heads = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    base = "fusedrnn float32"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    print(f"torch {torch.__version__}, {threads}, load {load}\n")
    print(f"Time of {base} (frozen) over that of each, and its time:\n")

    def speed(row: dict, name: str) -> str:
        found = row["seconds"].get(name)
        if found is None:
            return ""
        ratio = f"{row['seconds'][base] / found:.2f}"
        return f"{1e3 * found:.3g} ms" if name == base else ratio

    print(table(rows, heads, speed))
    for line in (line for row in rows for line in is_wrong(row)):
        print(f"\n{line}")
    print("\nError of y against float64, root mean square, of the output's:\n")
    first = list({(row["cell"], row["H"]): row for row in reversed(rows)}.values())[::-1]
    print(table(first, heads, lambda row, name: f"{row['error'][name]:.1e}" if name in row["error"] else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
