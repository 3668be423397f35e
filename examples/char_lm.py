"""Train a character-level language model twice, with torch.nn.LSTM and with fusedrnn.LSTM, side by side.

Both models start from the same seed and see the same batches, so their loss curves should be one curve. Table and
picture: the speed of both, and how far the curves are from each other.

Training is chaotic, though: it amplifies the rounding of a single sum until it shows in the loss. With --ulp, how much
of a difference that makes is measured in the same run: of --ulp-weights weights drawn at random, each is moved by one
ulp (the smallest step that a float can take) or not, torch.nn.LSTM is trained from all these starts, and any two that
differ in one weight are compared. The measure is the largest difference of two loss curves over all steps. It is a
draw of chance: now and then even one more torch.nn.LSTM would exceed the largest of them. It takes nine times as long.

    python examples/char_lm.py
    python examples/char_lm.py --text poems.txt --steps 300
    python examples/char_lm.py --ulp
    python examples/char_lm.py --cell GRU --checkpoint gru.pt
    python examples/char_lm.py --steps 1000 --quantize
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn

try:
    import matplotlib
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error}: the demo needs the extra 'demo' (pip install --no-build-isolation -e '.[demo]')")

UNKNOWN = "\ufffd"

# Modules of the standard library that are plain Python in every supported version.
LIBRARY = (
    "argparse ast bdb calendar cmd codeop configparser contextlib copy csv dataclasses difflib dis doctest enum "
    "filecmp fileinput fractions ftplib functools getopt getpass gettext glob gzip heapq imaplib inspect ipaddress "
    "locale mailbox nturl2path numbers optparse pdb pickle pickletools platform plistlib poplib pprint profile "
    "pstats pyclbr queue random reprlib sched selectors shelve shlex shutil smtplib socket socketserver ssl "
    "statistics string subprocess tabnanny tarfile tempfile textwrap threading timeit tokenize trace traceback "
    "turtle types typing uuid warnings wave weakref webbrowser"
).split()


@dataclass
class Corpus:
    name: str
    characters: list[str]  # position = token; the first stands for every character that is not in the vocabulary
    tokens: Tensor  # [characters in the text], int64

    @staticmethod
    def read(path: Path | None, vocabulary: int) -> Corpus:
        if path is None:
            name, text = "the standard library's source", library_source()
        else:
            name, text = str(path), path.read_text(encoding="utf-8")
        counted = Counter(text.replace(UNKNOWN, ""))
        most_common = sorted(counted, key=lambda c: (-counted[c], c))[: vocabulary - 1]
        characters = [UNKNOWN, *sorted(most_common)]
        token = {c: i for i, c in enumerate(characters)}
        return Corpus(name, characters, torch.tensor([token.get(c, 0) for c in text]))

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the text: inputs and targets, (length, size) each."""
        start = torch.randint(len(self.tokens) - length, (size,), generator=generator)
        window = self.tokens[start + torch.arange(length + 1)[:, None]]
        return window[:-1], window[1:]


def library_source() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in (folder / f"{name}.py" for name in LIBRARY) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no source of the standard library in {folder}: please pass --text FILE")
    return "".join(path.read_text(encoding="utf-8") for path in files)


class CharLM(nn.Module):
    def __init__(self, layer: type[nn.Module], characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.rnn = layer(hidden, hidden, layers)
        self.head = nn.Linear(hidden, characters)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | Tensor | None = None):
        """tokens: (length, batch) -> scores: (length, batch, characters), state"""
        y, state = self.rnn(self.embedding(tokens), state)
        return self.head(y), state


@dataclass
class Run:
    name: str
    model: CharLM
    optimizer: torch.optim.Optimizer
    moved: frozenset[str] = frozenset()  # the weights that were moved by one ulp
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step

    def step(self, inputs: Tensor, targets: Tensor, clip: float) -> None:
        start = time.perf_counter()
        scores, _ = self.model(inputs)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device as well
        self.seconds.append(time.perf_counter() - start)

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps: one batch alone says little."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    def difference(self, other: Run) -> tuple[float, int]:
        """The largest difference of the two loss curves, and the step where it is."""
        differences = [abs(a - b) for a, b in zip(self.losses, other.losses)]
        largest = max(differences)
        return largest, 1 + differences.index(largest)


def draw_weight(rnn: nn.Module, generator: torch.Generator) -> str:
    """A weight, such as weight_hh_l0[17]: every single number is as likely as any other."""
    names, weights = zip(*rnn.named_parameters())
    position = int(torch.randint(sum(w.numel() for w in weights), (), generator=generator))
    for name, weight in zip(names, weights):
        if position < weight.numel():
            return f"{name}[{position}]"
        position -= weight.numel()
    raise AssertionError("the position lies behind the last weight")


def move_by_one_ulp(rnn: nn.Module, weight: str) -> None:
    name, _, position = weight.removesuffix("]").partition("[")
    flat = rnn.get_parameter(name).data.view(-1)
    flat[int(position)] = torch.nextafter(flat[int(position)], torch.tensor(torch.inf, device=flat.device))


def neighbours(runs: list[Run]) -> list[tuple[Run, Run, str]]:
    """Pairs of runs whose starts differ by one ulp of one weight, and that weight."""
    pairs = [(a, b, b.moved - a.moved) for a in runs for b in runs if a.moved < b.moved]
    return [(a, b, *more) for a, b, more in pairs if len(more) == 1]


def train(args: argparse.Namespace, corpus: Corpus, device: torch.device) -> tuple[Run, Run, list[Run]]:
    def new_run(package: str, moved: frozenset[str] = frozenset()) -> Run:
        torch.manual_seed(args.seed)
        layer = getattr(nn if package == "torch.nn" else fusedrnn, args.cell)
        model = CharLM(layer, len(corpus.characters), args.hidden, args.layers)
        for weight in moved:
            move_by_one_ulp(model.rnn, weight)
        model.to(device)
        return Run(f"{package}.{args.cell}", model, torch.optim.Adam(model.parameters(), lr=args.lr), moved)

    # Two generators, so that the batches do not depend on how many weights are moved.
    batches, moves = (torch.Generator().manual_seed(args.seed + i) for i in range(2))
    plain, fused = new_run("torch.nn"), new_run("fusedrnn")
    weights: set[str] = set()
    while args.ulp and len(weights) < args.ulp_weights:
        weights.add(draw_weight(plain.model.rnn, moves))
    starts = [frozenset(some) for n in range(1, len(weights) + 1) for some in combinations(sorted(weights), n)]
    moved = [new_run("torch.nn", start) for start in starts]
    given = plain.model.state_dict()
    for name, weight in fused.model.state_dict().items():
        if not torch.equal(weight, given[name]):
            raise AssertionError(f"the two models do not start from the same {name}")

    # The runs take turns, step by step and in changing order, so that whatever else the machine does slows all alike.
    runs = [plain, fused, *moved]
    with tqdm(total=args.steps, unit="step", disable=not sys.stderr.isatty()) as progress:
        for step in range(args.steps):
            inputs, targets = corpus.batch(args.batch, args.length, batches)
            inputs, targets = inputs.to(device), targets.to(device)
            for i in range(len(runs)):
                runs[(i + step) % len(runs)].step(inputs, targets, args.clip)
            progress.set_postfix(torch=f"{plain.losses[-1]:.3f}", fusedrnn=f"{fused.losses[-1]:.3f}", refresh=False)
            progress.update()
    return plain, fused, moved


def save(path: Path, args: argparse.Namespace, corpus: Corpus, model: CharLM) -> None:
    """What `python -m fusedrnn gates` reads; torch.load takes it with weights_only."""
    config = {"cell": args.cell, "hidden": args.hidden, "layers": args.layers, "characters": corpus.characters}
    torch.save(config | {"state_dict": model.state_dict()}, path)


@torch.no_grad()
def generate(model: CharLM, corpus: Corpus, length: int, seed: int, temperature: float = 0.7) -> str:
    """Sample one character after the other, carrying the state."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lines = [i for i, c in enumerate(corpus.characters) if c == "\n"]
    token = torch.tensor([[lines[0] if lines else int(corpus.tokens[0])]])
    state, text = None, []
    for _ in range(length):
        scores, state = model(token.to(device), state)
        chances = (scores[-1].float().cpu() / temperature).softmax(-1)
        chances[:, 0] = 0  # the stand-in for unknown characters is no character
        token = torch.multinomial(chances, 1, generator=generator)
        text.append(corpus.characters[int(token)])
    return "".join(text)


def plot(path: Path, plain: Run, fused: Run, moved: list[Run]) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(plain.losses) + 1)
    figure, (curves, differences) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    curves.plot(steps, plain.losses, label=plain.name, linewidth=3, color="tab:orange", alpha=0.6)
    curves.plot(steps, fused.losses, label=fused.name, linewidth=1, color="tab:blue")
    curves.set_ylabel("loss (nats per character)")
    curves.legend()
    # Equal losses have no place on a logarithmic axis: the floor stands for 0.
    visible = 1e-8
    for run, other, _ in neighbours([plain, *moved]):
        values = [max(visible, abs(a - b)) for a, b in zip(run.losses, other.losses)]
        differences.plot(steps, values, color="tab:orange", alpha=0.4, linewidth=0.5)
    if moved:
        differences.plot([], [], color="tab:orange", alpha=0.6, label="torch.nn after one ulp - torch.nn")
    values = [max(visible, abs(a - b)) for a, b in zip(fused.losses, plain.losses)]
    differences.plot(steps, values, color="tab:blue", linewidth=1, label="fusedrnn - torch.nn")
    if min(values) == visible:  # where the curves are equal
        differences.axhline(visible, color="#999999", linewidth=0.6, linestyle=":")
        differences.annotate("equal (0)", (1, visible), (0, 3), textcoords="offset points", fontsize=8, color="#666666")
    differences.set_ylim(visible / 2, max(differences.get_ylim()[1], 10 * visible))
    differences.set(yscale="log", xlabel="step", ylabel="difference of the losses")
    differences.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(args: argparse.Namespace, plain: Run, fused: Run, moved: list[Run]) -> dict:
    characters = args.batch * args.length
    speed = {run.name: characters / statistics.median(run.seconds) for run in (plain, fused)}
    ratio = speed[fused.name] / speed[plain.name]
    between, between_step = fused.difference(plain)
    print(f"\n{'layer':<16}{'first loss':>12}{'final loss':>12}{'characters/s':>15}")
    for run in (plain, fused):
        print(f"{run.name:<16}{run.losses[0]:>12.4f}{run.final_loss:>12.4f}{speed[run.name]:>15,.0f}")
    print(f"fusedrnn trains {ratio:.2f}x as fast as torch.nn (median of {args.steps} steps, taken in turns)\n")
    print("Largest difference of two loss curves:")
    print(f"  {f'{fused.name} from {plain.name}':<45}{between:.3e}  (step {between_step})")
    ulp = judged_by_ulps(plain, fused, moved, between) if moved else {}
    if not moved:
        print(
            "  (rounding that training amplifies; --ulp measures how far torch.nn gets from itself, nine times as long)"
        )
    return {
        "torch": torch.__version__,
        "fusedrnn": fusedrnn.__version__,
        "device": str(next(fused.model.parameters()).device),
        "threads": torch.get_num_threads(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "characters_per_second": speed,
        "speed_ratio": ratio,
        "largest_difference": between,
        **ulp,
        "losses": {run.name: run.losses for run in (plain, fused)},
        "losses_after_ulps": {" ".join(sorted(run.moved)): run.losses for run in moved},
    }


def judged_by_ulps(plain: Run, fused: Run, moved: list[Run], between: float) -> dict:
    """How far torch.nn gets from itself after one ulp, and whether fusedrnn stays within that."""
    by_ulp = [(*a.difference(b), weight) for a, b, weight in neighbours([plain, *moved])]
    itself, itself_step, weight = max(by_ulp)
    smallest, middle = min(by_ulp)[0], statistics.median(difference for difference, *_ in by_ulp)
    agrees = between <= itself
    print(f"  {f'{plain.name} from itself, one ulp moved':<45}{itself:.3e}  (step {itself_step}; {weight})")
    print(f"    the same over all {len(by_ulp)} pairs of runs: {smallest:.3e} to {itself:.3e}, median {middle:.3e}")
    print(
        f"fusedrnn differs from torch.nn {'no more than' if agrees else 'MORE than'} torch.nn differs from itself "
        f"after one ulp: {between:.3e} {'<=' if agrees else '>'} {itself:.3e}"
    )
    return {"largest_difference_after_one_ulp": itself, "agrees": agrees}


@torch.no_grad()
def loss_of(model: CharLM, batches: list[tuple[Tensor, Tensor]]) -> float:
    losses = [nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()) for x, y in batches]
    return torch.stack(losses).double().mean().item()


def quantized(args: argparse.Namespace, corpus: Corpus, model: CharLM, windows: int = 64) -> dict[str, float]:
    """The loss of the trained model, on the same windows of text, with weights of the layer in fewer bits."""
    generator = torch.Generator().manual_seed(args.seed + 2)
    device = next(model.parameters()).device
    batches = [corpus.batch(args.batch, args.length, generator) for _ in range(max(1, windows // args.batch))]
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    losses = {"float32": loss_of(model, batches)}
    for dtypes in ((torch.bfloat16,), (torch.int8,), (torch.int8, torch.int8)):  # of weights, and of x and h
        name = " x ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        losses[name] = loss_of(fusedrnn.quantize(copy.deepcopy(model), *dtypes), batches)
    print(f"\n{'weights':<16}{'loss':>12}{'bits/character':>17}")
    for name, loss in losses.items():
        print(f"{name:<16}{loss:>12.5f}{loss / math.log(2):>17.5f}")
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="any UTF-8 text (default: the standard library's own source)")
    add("--steps", type=positive, default=200, help="training steps of every run (default: %(default)s)")
    add("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM", help="the layer (default: %(default)s)")
    add("--hidden", type=positive, default=256, help="hidden size and size of the embedding (default: %(default)s)")
    add("--layers", type=positive, default=1, help="layers on each other (default: %(default)s)")
    add("--batch", type=positive, default=16, help="windows of text in a batch (default: %(default)s)")
    add("--length", type=positive, default=128, help="characters in a window (default: %(default)s)")
    add("--lr", type=float, default=4e-3, help="Adam's learning rate (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches, moved weights and generated text (default: 0)")
    add("--ulp", action="store_true", help="train from starts that differ by one ulp as well (nine times as long)")
    add("--ulp-weights", type=positive, default=4, help="of --ulp: weights moved or not (default: %(default)s)")
    add("--quantize", action="store_true", help="print the loss with weights, and x and h, in fewer bits as well")
    add("--vocabulary", type=positive, default=2048, help="most characters told apart (default: %(default)s)")
    add("--generate", type=positive, default=300, help="characters to generate (default: %(default)s)")
    add("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the results (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FILE", help="for the model trained with fusedrnn (default: not saved)")
    add("--device", help="torch device (default: the GPU if there is one, else the CPU)")
    args = parser.parse_args(argv)
    if args.vocabulary < 2:
        parser.error("--vocabulary must be at least 2")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        corpus = Corpus.read(args.text, args.vocabulary)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.checkpoint:
            args.checkpoint.open("ab").close()  # a path that cannot be written is better known before the training
    except UnicodeDecodeError as error:
        print(f"error: {args.text} is not UTF-8 text: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(corpus.tokens) <= args.length:
        print(
            f"error: {corpus.name} has {len(corpus.tokens)} characters, but a window needs --length + 1 = "
            f"{args.length + 1}",
            file=sys.stderr,
        )
        return 2

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"error: --device {args.device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    # Both layers shall compute in float32, not one of them in TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    kinds = len(corpus.characters)
    print(f"text    {corpus.name}: {len(corpus.tokens):,} characters, {kinds} different ones")
    print(f"model   embedding {args.hidden} -> {args.layers} x {args.cell} {args.hidden} -> linear {kinds}")
    print(f"runs    {args.steps} steps of {args.batch} x {args.length} characters on {device}", end="")
    print(f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else "", flush=True)

    plain, fused, moved = train(args, corpus, device)
    results = report(args, plain, fused, moved)
    if args.quantize:
        results["losses_of_weights"] = quantized(args, corpus, fused.model)
    text = generate(fused.model, corpus, args.generate, args.seed)
    print(f"\nWhat the model trained with fusedrnn writes:\n{text}\n")

    if args.checkpoint:
        save(args.checkpoint, args, corpus, fused.model)
    picture, numbers = args.out / "char_lm.png", args.out / "char_lm.json"
    plot(picture, plain, fused, moved)
    results["text"] = text
    numbers.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"curves: {picture}    numbers: {numbers}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every character of the text
    sys.exit(main())
