"""Train in several processes: gradients of DistributedDataParallel and FSDP2 against those of a single process.

Each process sees its part of the batch; the mean of their gradients is the gradient of the whole batch. The processes
are started here, or by torchrun; the gloo backend needs no GPU. The text is the source of Python's argparse, character
by character, the model an embedding, two layers of LSTM and a linear layer.

    python examples/distributed.py
    torchrun --standalone --nproc-per-node 4 examples/distributed.py --mode fsdp
"""

import argparse
import inspect
import os
import socket
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

MODES = ("ddp", "fsdp")


class Model(nn.Module):
    """Characters [T, B] to scores of the next one [T * B, characters]."""

    def __init__(self, characters: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.lstm = fusedrnn.LSTM(hidden, hidden, num_layers=2)
        self.head = nn.Linear(hidden, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(text))[0].flatten(0, 1))


def batches(steps: int, length: int, batch: int) -> tuple[Tensor, int]:
    """Text [steps, length + 1, batch], int64, and the number of characters."""
    text = inspect.getsource(argparse)
    token = {c: k for k, c in enumerate(sorted(set(text)))}
    size = steps * batch * (length + 1)
    tokens = torch.tensor([token[c] for c in text[:size]])
    return tokens.view(steps, batch, length + 1).transpose(1, 2), len(token)


def train(model: nn.Module, parts: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the gradients of the first one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, first = [], {}
    for text in parts:
        loss = nn.functional.cross_entropy(model(text[:-1]), text[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if not first:
            first = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
            first = {k: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for k, g in first.items()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def work(rank: int, world: int, args: argparse.Namespace) -> bool:
    """One process. Whether its gradients are those of a single process, to rounding."""
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    # float64 tells a wrong gradient from a rounded one.
    text, characters = batches(args.steps, args.length, args.batch * world)

    def fresh() -> Model:
        torch.manual_seed(0)
        return Model(characters, args.hidden).double()

    right = True
    with fusedrnn.backend(args.backend):
        alone, wanted = train(fresh(), text)
        for mode in args.mode:
            model = fresh()
            if mode == "ddp":
                model = DistributedDataParallel(model)
            else:
                mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
                for part in (model.lstm, model):
                    fully_shard(part, mesh=mesh)
            losses, found = train(model, text[..., rank * args.batch : (rank + 1) * args.batch])
            mean = torch.tensor(losses, dtype=torch.float64)
            dist.all_reduce(mean)
            worst = max((found[name] - g).abs().max().item() / g.abs().max().item() for name, g in wanted.items())
            apart = (mean / world - torch.tensor(alone, dtype=torch.float64)).abs().max().item()
            right &= worst < 1e-10 and apart < 1e-8
            if rank == 0:
                first, last = mean[0] / world, mean[-1] / world
                print(f"{mode:<6}{world:>10}{first:>12.4f}{last:>10.4f}{worst:>12.1e}{apart:>10.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return right


def spawned(rank: int, args: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not work(rank, args.processes, args):
        sys.exit(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--processes", type=int, default=2, help="without torchrun (default: %(default)s)")
    add("--hidden", type=int, default=64, help="default: %(default)s")
    add("--batch", type=int, default=4, help="of each process (default: %(default)s)")
    add("--length", type=int, default=32, help="characters of a step (default: %(default)s)")
    add("--steps", type=int, default=20, help="default: %(default)s")
    add("--backend", help="reference or cpu (default: planning decides)")
    add("--quick", action="store_true", help="two small steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.hidden = 2, 8
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        print("against a single process: largest relative difference of a gradient, largest difference of a loss")
        print(f"{'mode':<6}{'processes':>10}{'first loss':>12}{'last':>10}{'gradients':>12}{'losses':>10}", flush=True)
    if "RANK" in os.environ:  # torchrun started us
        return 0 if work(rank, int(os.environ["WORLD_SIZE"]), args) else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(spawned, (args, port), args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
