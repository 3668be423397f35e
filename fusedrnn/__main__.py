"""The command line: ``python -m fusedrnn info``, ``selftest``, ``explain``, ``gates``, ``bench``."""

import argparse
import json
import math
import pickle
import signal
import sys
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import fusedrnn
from fusedrnn import _build, build_info, planning, record_gates
from fusedrnn.backends import cuda
from fusedrnn.cells import BUILT_IN
from fusedrnn.ops import DTYPES
from fusedrnn.selftest import selftest


def info(arguments: argparse.Namespace) -> int:
    """What was built, what is here, and which backend would run for tensors on the CPU and on a GPU, and why.

    "cuda_images": the device code that a card of a compute capability takes; the driver compiles .ptx.
    """
    try:
        found = build_info() | {"threads": torch.get_num_threads(), "gpus": []}
        machine, forced = planning.machine(), planning.asked_for()
    except (RuntimeError, ValueError) as error:  # an environment variable that says nothing sensible
        print(f"error: {error}", file=sys.stderr)
        return 2
    cards = {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        cards.add((major, minor))
        found["gpus"].append(f"{torch.cuda.get_device_name(k)} ({major}.{minor})")
    cards = () if cuda.missing() else sorted(cards)
    found["cuda_images"] = {f"{c[0]}.{c[1]}": next(iter(cuda.images(c)), "none") for c in cards}
    for device in ("cpu", "cuda"):
        capability = None
        if device == "cuda" and found["gpus"] and torch.version.cuda:
            capability = torch.cuda.get_device_capability()
        problem = planning.Problem("lstm", 256, 256, 0, torch.float32, device, capability)
        nowhere = "" if device == "cpu" or found["gpus"] else "no GPU is here; with one: "
        try:
            choice = planning.decide(problem, machine, *forced)
            found[f"{device}_tensors"] = f"{choice.backend} ({nowhere}{choice.why})"
        except RuntimeError as error:
            found[f"{device}_tensors"] = f"none ({nowhere}{error})"
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            if isinstance(value, dict):
                value = [f"{key}: {each}" for key, each in value.items()]
            print(f"{name:<24}{', '.join(value) if isinstance(value, list) else value}")
    return 0


def run_explain(arguments: argparse.Namespace) -> int:
    """What would run for some sizes, here or on a named GPU, and why: plans, grids, bytes, operations, bounds."""
    try:
        found = fusedrnn.explain(
            arguments.cell,
            steps=arguments.steps,
            batch=arguments.batch,
            input_size=arguments.input or arguments.hidden,
            hidden_size=arguments.hidden,
            proj_size=arguments.proj,
            num_layers=arguments.layers,
            bidirectional=arguments.bidirectional,
            dtype=getattr(torch, arguments.dtype),
            tf32=arguments.tf32,
            training=not arguments.inference,
            device=arguments.device,
            chip=arguments.chip,
        )
    except (RuntimeError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found), indent=1) if arguments.json else found)
    return 0


def _add_explain(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("cell", nargs="?", default="lstm", type=str.lower, choices=BUILT_IN, help="default: %(default)s")
    add("-T", "--steps", type=int, default=100, help="default: %(default)s")
    add("-B", "--batch", type=int, default=16, help="default: %(default)s")
    add("-I", "--input", type=int, help="input size (default: the hidden size)")
    add("-H", "--hidden", type=int, default=512, help="hidden size (default: %(default)s)")
    add("--proj", type=int, default=0, help="projected size (default: no projection)")
    add("--layers", type=int, default=1, help="default: %(default)s")
    add("--bidirectional", action="store_true")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    add("--dtype", default="float32", choices=names, help="default: %(default)s")
    add("--tf32", action="store_true", help="products of float32 in tf32")
    add("--inference", action="store_true", help="without backward and what it needs")
    add("--device", help="of this machine (default: the GPU if there is one, else the CPU)")
    add("--chip", help="a GPU that need not be here, such as h100-sxm")


def run_selftest(arguments: argparse.Namespace) -> int:
    """Every kernel against the reference, on this machine. The exit status is 1 if one differs or fails."""

    def line(result) -> None:
        # What cannot run here would hide the rest: one line at the end.
        if not arguments.json and result.verdict != "left out":
            error = "" if result.error is None else f"{result.error:8.2f} ulp"
            name = f"{result.cell} {result.backend} {result.algorithm} {result.math}"
            print(f"{name:<40}{result.verdict:<10}{error:<14}{result.seconds:6.2f} s  {result.why}", flush=True)

    results = selftest(line)
    bad = [r for r in results if r.verdict in ("DIFFERS", "FAILED")]
    count = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("agrees", "left out")}
    if arguments.json:
        print(json.dumps([asdict(r) for r in results], indent=1))
    else:
        reasons = {}
        for r in results:
            if r.verdict == "left out":
                reasons.setdefault(r.why, {})[r.backend] = None
        if reasons:
            words = "; ".join(f"{', '.join(backends)}: {why}" for why, backends in reasons.items())
            print(f"left out: {count['left out']} checks that cannot run here ({words})")
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
        print(f"{count['agrees']} agree with float64 on {where}, {count['left out']} left out, {len(bad)} wrong")
    return 1 if bad else 0


def run_gates(arguments: argparse.Namespace) -> int:
    """What the gates of a model made by examples/char_lm.py do while it reads a text: pictures and a summary."""
    from fusedrnn import plots

    try:
        model, characters = _character_model(arguments.checkpoint)
        token = {c: k for k, c in enumerate(characters)}
        if not arguments.text:
            raise ValueError("--text must not be empty")
        unknown = "".join(dict.fromkeys(c for c in arguments.text if c not in token))
        if unknown:
            text = f"warning: the model has not seen {unknown!r}: it reads its token for unknown characters, drawn as ?"
            print(text, file=sys.stderr)
        read = "".join(c if c in token else "\ufffd" for c in arguments.text)
        with torch.no_grad():
            _, record = record_gates(model, torch.tensor([[token.get(c, 0)] for c in arguments.text]))
        if arguments.layer is not None:
            layers = {name: gates for name, gates in record.items() if gates.layer == arguments.layer}
            if not layers:
                raise ValueError(f"--layer must be in 0..{len(record) - 1}, got {arguments.layer}")
            record = type(record)(layers)
        arguments.out.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for name, gates in record.items():
            units = plots.in_order(gates, arguments.top) if arguments.units is None else arguments.units
            pictures[f"heatmap_{name}"] = plots.heatmap(gates, units=units, tokens=read)
            chosen = None if arguments.units is None else arguments.units[:4]
            pictures[f"traces_{name}"] = plots.traces(gates, chosen, tokens=read)
        if all(gates.sigmoid_names for gates in record.values()):
            pictures["openness"] = plots.openness(record.values())
        paths = [arguments.out / f"{name.replace('.', '_')}.png" for name in pictures]
        for path, picture in zip(paths, pictures.values()):
            picture.savefig(path)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = record.summary()
    if arguments.json:
        print(json.dumps({"layers": _finite(summary), "pictures": [str(path) for path in paths]}, indent=1))
        return 0
    for name, layer in summary.items():
        print(f"{name}: {layer['cell']}, {layer['hidden']} units, {layer['steps']} steps")
        for gate, found in layer["gates"].items():
            value = f"openness {found['openness']:.3f}" if "openness" in found else f"mean {found['mean']:+.3f}"
            ends = ("< 0.1", "> 0.9") if "openness" in found else ("< -0.9", "> 0.9")
            shares = (found.get("saturated_low"), found.get("saturated_high"))
            near = "".join(f"   {share:6.1%} {end}" for share, end in zip(shares, ends) if share is not None)
            print(f"  {gate}  {value:<16}{near}")
        if layer["half_life"]:
            quartiles = ", ".join(f"{steps:.2f}" for steps in layer["half_life"].values())
            print(f"  half-life of the state in steps, quartiles over the units: {quartiles}")
    print("\n".join(str(path) for path in paths))
    return 0


def _character_model(path: Path) -> tuple[nn.Module, list[str]]:
    """The embedding and the recurrent layers of a checkpoint, and its characters by token."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        characters, hidden = found["characters"], found["hidden"]
        if found["cell"] not in ("LSTM", "GRU", "RNN"):
            raise ValueError(f"its cell is {found['cell']!r}")
        rnn = getattr(fusedrnn, found["cell"])(hidden, hidden, found["layers"])
        model = nn.Sequential(OrderedDict(embedding=nn.Embedding(len(characters), hidden), rnn=rnn))
        model.load_state_dict({k: w for k, w in found["state_dict"].items() if not k.startswith("head.")})
    except (pickle.UnpicklingError, AttributeError, EOFError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of examples/char_lm.py: {error!r}") from error
    return model, characters


def _finite(value):
    """``value`` with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _units(text: str) -> list[int]:
    """The list that 0,3,8-15 stands for."""
    ranges = [part.partition("-") for part in text.split(",")]
    try:
        found = [unit for first, _, last in ranges for unit in range(int(first), int(last or first) + 1)]
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"units are numbers and ranges, such as 0,3,8-15, got {text!r}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def _add_bench(commands) -> None:
    from fusedrnn.benchmarks import runner

    command = commands.add_parser("bench", help=runner.bench.__doc__, description=runner.bench.__doc__)
    runner.add_arguments(command)
    command.set_defaults(run=runner.bench)


def main(argv: list[str] | None = None) -> int:
    why = "" if _build.loaded() else _build.hidden()
    if why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description="Recurrent layers with fused kernels.")
    parser.add_argument("--version", action="version", version=f"fusedrnn {fusedrnn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run in (("info", info), ("selftest", run_selftest), ("explain", run_explain), ("gates", run_gates)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if run is run_explain:
            _add_explain(command)
        if run is run_gates:
            add = command.add_argument
            add("--checkpoint", type=Path, required=True, metavar="FILE", help="written by char_lm.py --checkpoint")
            add("--text", required=True, help="what the model reads, from a state of zeros")
            add("--layer", type=int, metavar="K", help="one layer only (default: all)")
            add("--units", type=_units, metavar="0,3,8-15",
                help="these, in this order (default: --top in heat maps, two in traces)")  # fmt: skip
            add("--top", type=_count, default=64, metavar="N",
                help="heat maps: the N units whose output varies most, sorted (default: %(default)s)")  # fmt: skip
            add("--out", type=Path, default=Path("gates-out"), metavar="DIR", help="default: %(default)s")
    _add_bench(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        # Whoever reads may stop: `| head` ends the program and prints nothing.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
