"""Convert a model written for torch.nn, without touching its code: the same outputs, and how long each takes.

The model is of the kind that people publish: sequence to sequence, nested, with an LSTM in both directions that reads
packed sequences, a GRU above it, an LSTMCell that writes with attention, and one embedding that three parts share. It
knows nothing of fusedrnn. It reads this file's lines and writes them backwards. ``convert`` swaps its three recurrent
parts in place, ``revert`` swaps them back.

    python examples/convert_model.py
    python examples/convert_model.py --hidden 512 --rounds 3
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

PAD = 0


class Encoder(nn.Module):
    def __init__(self, embedding: nn.Embedding, hidden: int):
        super().__init__()
        self.embedding = embedding
        self.rnn = nn.LSTM(embedding.embedding_dim, hidden // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.top = nn.GRU(hidden, hidden, batch_first=True)

    def forward(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(self.embedding(text), lengths, batch_first=True, enforce_sorted=False)
        memory, last = self.top(self.rnn(packed)[0])
        return pad_packed_sequence(memory, batch_first=True)[0], last[0]


class Decoder(nn.Module):
    def __init__(self, embedding: nn.Embedding, hidden: int):
        super().__init__()
        self.embedding = embedding
        self.cell = nn.LSTMCell(embedding.embedding_dim + hidden, hidden)
        self.out = nn.Linear(hidden, embedding.embedding_dim)
        self.head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        self.head.weight = embedding.weight

    def forward(self, text: Tensor, memory: Tensor, h: Tensor) -> Tensor:
        c, scores = torch.zeros_like(h), []
        for character in self.embedding(text).unbind(1):
            attention = torch.softmax(memory @ h.unsqueeze(2), 1)
            seen = (attention * memory).sum(1)
            h, c = self.cell(torch.cat((character, seen), 1), (h, c))
            scores.append(self.head(self.out(h)))
        return torch.stack(scores, 1)


class Seq2Seq(nn.Module):
    def __init__(self, characters: int, hidden: int):
        super().__init__()
        embedding = nn.Embedding(characters, 64, padding_idx=PAD)
        self.encoder = Encoder(embedding, hidden)
        self.decoder = Decoder(embedding, hidden)

    def forward(self, text: Tensor, lengths: Tensor, written: Tensor) -> Tensor:
        return self.decoder(written, *self.encoder(text, lengths))


def sentences(count: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lines of this file and the same backwards [B, T] int64, their lengths [B], and the number of characters."""
    lines = [line for line in Path(__file__).read_text(encoding="utf-8").splitlines() if line][:count]
    token = {c: k + 1 for k, c in enumerate(sorted(set("".join(lines))))}
    rows = [torch.tensor([token[c] for c in line]) for line in lines]
    text, backwards = (
        nn.utils.rnn.pad_sequence(list(some), batch_first=True, padding_value=PAD)
        for some in (rows, [row.flip(0) for row in rows])
    )
    return text, backwards, torch.tensor([len(row) for row in rows]), len(token) + 1


def training_step(model: Seq2Seq, text: Tensor, lengths: Tensor, backwards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of all parameters."""
    model.zero_grad()
    scores = model(text, lengths, nn.functional.pad(backwards, (1, -1)))
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), backwards.flatten(), ignore_index=PAD)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=256, help="an even number (default: %(default)s)")
    add("--batch", type=int, default=16, help="lines (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of each model, in turns (default: %(default)s)")
    add("--backend", help="reference, cpu, triton or cuda (default: planning decides)")
    add("--quick", action="store_true", help="small and short, to see that it runs")
    args = parser.parse_args(argv)
    hidden, rounds = (32, 1) if args.quick else (args.hidden, args.rounds)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # both shall compute in float32

    text, backwards, lengths, characters = sentences(args.batch)
    batch = text.to(device), lengths, backwards.to(device)
    model = Seq2Seq(characters, hidden).to(device)
    before, parameters = training_step(model, *batch), dict(model.named_parameters())

    with fusedrnn.backend(args.backend):
        fusedrnn.convert(model)
        after = training_step(model, *batch)
        print(*fusedrnn.conversion_report(model), sep="\n")
        same = dict(model.named_parameters())
        assert same.keys() == parameters.keys()
        assert all(same[name] is p for name, p in parameters.items()), "the parameters are the same objects"
        assert model.decoder.head.weight is model.encoder.embedding.weight, "what was tied stays tied"

        def synchronized() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        seconds = {"torch.nn": [], "fusedrnn": []}
        for _ in range(rounds):
            for name, swap in (("torch.nn", fusedrnn.revert), ("fusedrnn", fusedrnn.convert)):
                swap(model)
                start = synchronized()
                training_step(model, *batch)
                seconds[name].append(synchronized() - start)

    worst = max((after[1][name] - g).abs().max().item() / g.abs().max().item() for name, g in before[1].items())
    loss = abs(after[0] - before[0]).item() / before[0].item()
    print(f"\nrelative difference after convert: loss {loss:.1e}, gradients at most {worst:.1e} of the largest entry")
    ratio = statistics.median(a / b for a, b in zip(seconds["torch.nn"], seconds["fusedrnn"]))
    print(f"a training step of the whole model on this {device}: {ratio:.2f} times as fast (median of {rounds} rounds)")
    return 0 if max(loss, worst) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
