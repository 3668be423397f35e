"""The command line: ``python -m fusedrnn info`` and ``python -m fusedrnn selftest``."""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from fusedrnn import build_info
from fusedrnn.selftest import selftest


def info(arguments: argparse.Namespace) -> int:
    """What was built and what runs here."""
    found = build_info() | {"gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]}
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:<24}{', '.join(value) if isinstance(value, list) else value}")
    return 0


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description="Recurrent layers with fused kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run in (("info", info), ("selftest", run_selftest)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
