"""Say for every 32 ms of sound whether somebody speaks, as it comes in: what one step of a stream takes, and the worst.

The sound is made here: voiced stretches (harmonics of a pitch that glides, under a formant-like envelope) in noise that
comes and goes, 16 kHz, so that what is right is known exactly. Two layers are trained on a minute of it and then get
another minute frame by frame, by torch.nn's layer, by ours, and by a stream of ours.

    python examples/voice_activity.py
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import fusedrnn

RATE, FRAME, BANDS = 16_000, 512, 24  # a frame is 32 ms


def sound(seconds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples [T * FRAME] and for each frame whether it is voiced, [T]."""
    generator = torch.Generator().manual_seed(seed)
    frames = seconds * RATE // FRAME
    voiced = torch.zeros(frames, dtype=torch.bool)
    at = 0
    while at < frames:
        silence, speech = (int(n) for n in torch.randint(8, 40, (2,), generator=generator))
        voiced[at + silence : at + silence + speech] = True
        at += silence + speech
    time_of = torch.arange(frames * FRAME) / RATE
    pitch = 140 + 40 * torch.sin(2 * math.pi * 0.7 * time_of + seed)
    phase = 2 * math.pi * torch.cumsum(pitch / RATE, 0)
    voice = sum(torch.sin(k * phase) * math.exp(-((k * 140 - 600) ** 2) / 4e5) for k in range(1, 20))
    noise = torch.randn(len(time_of), generator=generator) * (0.6 + 0.5 * torch.sin(2 * math.pi * 0.13 * time_of))
    return 0.25 * voice * voiced.repeat_interleave(FRAME) + noise, voiced


def bands(samples: Tensor) -> Tensor:
    """[T, FRAME] to the logarithms of the energies of bands, [T, BANDS]."""
    power = torch.fft.rfft(samples).abs().square()[:, 1 : 1 + 8 * BANDS]
    return power.unflatten(1, (BANDS, 8)).mean(2).log() / 4 - 1


class Detector(nn.Module):
    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(layer.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, BANDS] to [T, B]
        return self.head(self.rnn(x)[0]).squeeze(-1)


def train(model: nn.Module, steps: int) -> None:
    samples, voiced = sound(64, 1)
    x = bands(samples.view(-1, FRAME)).view(20, 100, BANDS).transpose(0, 1)
    target = voiced.float().view(20, 100).t()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def listen(samples: Tensor, step, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Whether each frame is voiced, and what the recurrent layers of each took in microseconds."""
    said, took = [], []
    for frame in samples.view(-1, 1, FRAME):
        x = bands(frame)
        begin = time.perf_counter()
        y = step(x)
        took.append(1e6 * (time.perf_counter() - begin))
        said.append(bool(head(y) > 0))
    return torch.tensor(said), torch.tensor(took)


def by_layer(layer: nn.RNNBase):
    """The same step without a stream: the states go out of one call and into the next."""
    hx = None

    def step(x: Tensor) -> Tensor:
        nonlocal hx
        y, hx = layer(x.unsqueeze(0), hx)
        return y[0]

    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--train-steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=64, help="of sound to listen to; default: %(default)s")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Detector(fusedrnn.LSTM(BANDS, args.hidden, num_layers=2))
    train(model, args.train_steps)
    samples, voiced = sound(args.seconds, 2)
    model.eval()
    theirs = torch.nn.LSTM(BANDS, args.hidden, num_layers=2).eval()
    theirs.load_state_dict(model.rnn.state_dict())
    ways = {
        "torch.nn.LSTM": by_layer(theirs),
        "fusedrnn.LSTM": by_layer(model.rnn),
        "fusedrnn stream": model.rnn.stream(),
    }
    print(f"{len(voiced)} frames of {1000 * FRAME / RATE:.0f} ms, 2 layers of {args.hidden}, one thread\n")
    print("                 right    microseconds a frame: median   95 %   99 %   worst")
    heard = {}
    for name, step in ways.items():
        heard[name], took = listen(samples, step, model.head)
        median, most, nearly, worst = torch.quantile(took, torch.tensor([0.5, 0.95, 0.99, 1.0])).tolist()
        right = (heard[name] == voiced).float().mean()
        print(f"{name:<16} {right:6.1%} {median:30.0f} {most:6.0f} {nearly:6.0f} {worst:7.0f}")
    differ = [int((heard[name] != heard["torch.nn.LSTM"]).sum()) for name in ways]
    print(f"\nframes that torch.nn hears otherwise: {max(differ)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
