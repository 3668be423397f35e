"""Trains a tagger, a bidirectional LSTM of two layers, and writes it for use without Python.

    python examples/aoti/export.py tagger.pt2 [tagger.onnx] [--sequences "3 1 4 1 5" "2 7 2"]

A token's tag is 1 where the same token stands elsewhere in its sequence, so both directions are needed. The package
is AOTInductor's: main.cpp beside this file runs it. Prints a tag for each token of --sequences.
"""

import argparse

import torch
from torch import Tensor, nn

import fusedrnn

TOKENS, LONGEST = 10, 12


class Tagger(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.lstm = fusedrnn.LSTM(16, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, T, 2] of tokens [B, T], of which the first ``lengths`` [B] of each row count."""
        y, _ = self.lstm(self.embedding(tokens), lengths=lengths)
        return self.head(y)


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], lengths [B], tags [B, T] (-100 past an end)."""
    tokens = torch.randint(TOKENS, (size, LONGEST), generator=generator)
    lengths = torch.randint(1, LONGEST + 1, (size,), generator=generator)
    inside = torch.arange(LONGEST) < lengths[:, None]
    same = (tokens[:, :, None] == tokens[:, None, :]) & inside[:, None, :]
    tags = (same.sum(-1) > 1).long()
    return tokens, lengths, tags.masked_fill(~inside, -100)


def train(model: Tagger, steps: int) -> float:
    """The share of right tags on sequences that were not trained on."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens, lengths, tags = batch(64, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens, lengths).flatten(0, 1), tags.flatten()).backward()
        optimizer.step()
    tokens, lengths, tags = batch(512, generator)
    with torch.no_grad():
        right = model(tokens, lengths).argmax(-1) == tags
    return float(right[tags >= 0].double().mean())


def padded(sequences: list[str]) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor([int(token) for token in sequence.split()]) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", help="where to write AOTInductor's package, ending in .pt2")
    parser.add_argument("onnx", nargs="?", help="where to write an ONNX model as well")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--sequences", nargs="+", default=["3 1 4 1 5 9 2 6 5", "2 7", "8 8 8"])
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Tagger()
    print(f"tags right on new sequences: {train(model, chosen.steps):.1%}")
    model.eval().requires_grad_(False)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 1: dynamic}, {0: dynamic})
    example = batch(3, torch.Generator().manual_seed(1))[:2]
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=chosen.package)
    print(f"wrote {chosen.package}")
    if chosen.onnx:
        options = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False, "verbose": False}
        torch.onnx.export(model, example, chosen.onnx, **options)
        print(f"wrote {chosen.onnx}")
    tokens, lengths = padded(chosen.sequences)
    for row, length in zip(model(tokens, lengths).argmax(-1), lengths):
        print(*row[:length].tolist())


if __name__ == "__main__":
    main()
