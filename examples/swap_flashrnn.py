"""An sLSTM written for the package flashrnn, on fusedrnn's kernels: one import is another.

    python examples/swap_flashrnn.py                     # fusedrnn
    python examples/swap_flashrnn.py --package flashrnn  # theirs, its vanilla backend (pip install flashrnn==1.0.8)

The task: of a sequence of numbers, some of them marked, the last step has to give the sum of the marked ones.
"""

import argparse
import importlib
import time

import torch
from torch import Tensor, nn

MODULES = {"fusedrnn": "fusedrnn.compat.flashrnn", "flashrnn": "flashrnn"}


class SLSTM(nn.Module):
    """Input projection, recurrence of several heads, readout. ``flashrnn`` is the function that computes in between."""

    def __init__(self, flashrnn, inputs: int, heads: int, units: int) -> None:
        super().__init__()
        self.flashrnn, self.shape = flashrnn, (4, heads, units)
        self.gates = nn.Linear(inputs, 4 * heads * units, bias=False)
        self.recurrent = nn.Parameter(torch.zeros(4, heads, units, units))
        self.bias = nn.Parameter(torch.zeros(4, heads, units))
        self.readout = nn.Linear(heads * units, 1)
        nn.init.constant_(self.bias[1], 3.0)  # remember at first

    def forward(self, x: Tensor) -> Tensor:  # [B, T, inputs] -> [B, 1]
        gates = self.gates(x).unflatten(-1, self.shape)
        states, _ = self.flashrnn(
            gates, self.recurrent, self.bias, function="slstm", backend="vanilla", dtype="float32"
        )
        return self.readout(states[0, :, -1].flatten(1))


def batch(rows: int, steps: int) -> tuple[Tensor, Tensor]:
    numbers, marked = torch.rand(rows, steps), torch.rand(rows, steps) < 4 / steps
    return torch.stack([numbers, marked.float()], -1), (numbers * marked).sum(1, keepdim=True)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=MODULES, default="fusedrnn")
    parser.add_argument("--quick", action="store_true", help="20 training steps (default: 300)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = SLSTM(importlib.import_module(MODULES[options.package]).flashrnn, 2, heads=4, units=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    count, loss, took = 20 if options.quick else 300, float("nan"), []
    for step in range(count):
        x, want = batch(32, 40)
        begin = time.perf_counter()
        error = (model(x) - want).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        took.append(time.perf_counter() - begin)
        loss = error.item()
        if step % (count // 5) == 0:
            print(f"step {step:3}  loss {loss:.4f}")
    print(f"{options.package}: loss {loss:.4f}, {sorted(took)[count // 2] * 1e3:.1f} ms a training step")
    return loss


if __name__ == "__main__":
    main()
