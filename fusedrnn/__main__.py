"""The command line: ``python -m fusedrnn info``, ``selftest``, ``explain``."""

import argparse
import json
import sys
from dataclasses import asdict

import torch

import fusedrnn
from fusedrnn import build_info, planning
from fusedrnn.cells import CELLS
from fusedrnn.ops import DTYPES
from fusedrnn.selftest import selftest


def info(arguments: argparse.Namespace) -> int:
    """What was built, what is here, and which backend would run for tensors on the CPU and on a GPU, and why."""
    found = build_info() | {"threads": torch.get_num_threads(), "gpus": []}
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        found["gpus"].append(f"{torch.cuda.get_device_name(k)} ({major}.{minor})")
    for device in ("cpu", "cuda"):
        capability = None
        if device == "cuda" and found["gpus"] and torch.version.cuda:
            capability = torch.cuda.get_device_capability()
        problem = planning.Problem("lstm", 256, 256, 0, torch.float32, device, capability)
        choice = planning.decide(problem, planning.machine())
        nowhere = "" if device == "cpu" or found["gpus"] else "no GPU is here; with one: "
        found[f"{device}_tensors"] = f"{choice.backend} ({nowhere}{choice.why})"
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
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
    add("cell", nargs="?", default="lstm", choices=tuple(CELLS), help="default: %(default)s")
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
        if not arguments.json:
            error = "" if result.error is None else f"{result.error:8.2f} ulp"
            name = f"{result.cell} {result.backend} {result.algorithm} {result.math}"
            print(f"{name:<40}{result.verdict:<10}{error:<14}{result.seconds:6.2f} s  {result.why}", flush=True)

    results = selftest(line)
    bad = [r for r in results if r.verdict in ("DIFFERS", "FAILED")]
    count = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("agrees", "left out")}
    if arguments.json:
        print(json.dumps([asdict(r) for r in results], indent=1))
    else:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
        print(f"{count['agrees']} agree with float64 on {where}, {count['left out']} left out, {len(bad)} wrong")
    return 1 if bad else 0


def _add_bench(commands) -> None:
    from fusedrnn.benchmarks import runner

    command = commands.add_parser("bench", help=runner.bench.__doc__, description=runner.bench.__doc__)
    runner.add_arguments(command)
    command.set_defaults(run=runner.bench)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description="Recurrent layers with fused kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run in (("info", info), ("selftest", run_selftest), ("explain", run_explain)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if run is run_explain:
            _add_explain(command)
    _add_bench(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
