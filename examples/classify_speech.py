"""Tell nine speakers apart by how they say two vowels: utterances of different lengths, as a PackedSequence.

The data are the Japanese Vowels of Kudo, Toyama and Shimbo (1999), which the package aeon ships: 270 utterances to
learn from, 370 to be tested with, the official split; 7 to 29 frames of 12 coefficients each. A packed sequence takes
the same kernel as a dense one: rows that have ended cost nothing.

    python examples/classify_speech.py
    python examples/classify_speech.py --cell LSTM --backend reference
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fusedrnn

SPEAKERS = 9


def read(split: str) -> tuple[list[Tensor], Tensor]:
    """Utterances [T, 12] and speakers 0..8 [N] of "TRAIN" or "TEST"."""
    package = importlib.util.find_spec("aeon")  # only its files are needed, not scikit-learn, scipy, numba
    if package is None:
        sys.exit("the data come with the package aeon: pip install --no-deps aeon")
    path = Path(package.origin).parent / "datasets" / "data" / "JapaneseVowels" / f"JapaneseVowels_{split}.ts"
    _, _, data = path.read_text().partition("@data\n")
    utterances, speakers = [], []
    for line in data.splitlines():
        *dimensions, speaker = line.split(":")  # one list of numbers for each of the 12 coefficients
        utterances.append(torch.tensor([[float(v) for v in values.split(",")] for values in dimensions]).t())
        speakers.append(int(speaker) - 1)
    return utterances, torch.tensor(speakers)


class Classifier(nn.Module):
    """A recurrent layer in both directions; the last states of both are read by one linear layer."""

    def __init__(self, cell: str, hidden: int):
        super().__init__()
        self.rnn = getattr(fusedrnn, cell)(12, hidden, bidirectional=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * hidden, SPEAKERS)

    def forward(self, x: PackedSequence) -> Tensor:
        _, state = self.rnn(x)
        h = state[0] if isinstance(state, tuple) else state  # [2, B, hidden]
        return self.head(self.drop(torch.cat((h[0], h[1]), 1)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cell", default="GRU", choices=("LSTM", "GRU", "RNN"), help="default: %(default)s")
    add("--hidden", type=int, default=64, help="default: %(default)s")
    add("--epochs", type=int, default=30, help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--backend", help="reference, cpu, triton or cuda (default: planning decides)")
    add("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args(argv)
    epochs = 5 if args.quick else args.epochs
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    (train, speaker), (test, tested) = read("TRAIN"), read("TEST")
    frames = torch.cat(train)
    mean, std = frames.mean(0), frames.std(0)

    def pack(utterances: list[Tensor]) -> PackedSequence:
        return pack_sequence([(u - mean) / std for u in utterances], enforce_sorted=False).to(device)

    model = Classifier(args.cell, args.hidden).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    print(f"{'epoch':>5}{'loss':>10}{'right on the test split':>26}")
    start = time.perf_counter()
    with fusedrnn.backend(args.backend):
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for batch in torch.randperm(len(train)).split(30):
                noisy = [train[k] + 0.1 * std * torch.randn_like(train[k]) for k in batch]
                loss = nn.functional.cross_entropy(model(pack(noisy)), speaker[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            if epoch % max(1, epochs // 5) == 0:
                model.eval()
                with torch.no_grad():
                    right = (model(pack(test)).argmax(1).cpu() == tested).sum().item()
                share = right / len(test)
                print(f"{epoch:>5}{total / len(train):>10.4f}{right:>13} of {len(test)} ({share:.1%})", flush=True)
    often = tested.bincount().max().item() / len(test)
    print(f"{epochs} epochs took {time.perf_counter() - start:.0f} s; to guess the commonest speaker: {often:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
