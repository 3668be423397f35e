"""Forecast the next day's temperatures, hour by hour, and hold the LSTM against seasonal-naive forecasts.

The data are the hourly temperatures of Seattle and San Francisco in 2010 (NOAA, public domain) that the package
vega_datasets ships. One baseline says that tomorrow will be as today, hour by hour; a harder one adds the change from
yesterday to today once more, for both series are smooth: weather is averaged out of them, seasons are not. The LSTM
reads the last --days days, a day a step, as changes from day to day. Training ends where the held-out part, the last
quarter of the year, begins; nothing of it is seen before.

    python examples/forecast_temperature.py
    python examples/forecast_temperature.py --backend reference --days 28
"""

import argparse
import csv
import importlib.util
import math
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedrnn

CITIES = {"Seattle": "seattle-temps.csv", "San Francisco": "sf-temps.csv"}
DAY = 24  # hours


def read(file: str) -> Tensor:
    """Temperatures of all hours of 2010 in degrees Fahrenheit: [8760], float32. An hour left out is interpolated."""
    package = importlib.util.find_spec("vega_datasets")  # only its files are needed, not pandas
    if package is None:
        sys.exit("the data come with the package vega_datasets: pip install --no-deps vega_datasets")
    path = Path(package.origin).parent / "_data" / file
    with path.open(newline="") as lines:
        rows = {row["date"][:16]: float(row["temp"]) for row in csv.DictReader(lines)}
    hours = [datetime(2010, 1, 1) + timedelta(hours=k) for k in range(365 * 24)]
    found = [rows.get(f"{hour:%Y/%m/%d %H:%M}", math.nan) for hour in hours]
    for k, value in enumerate(found):
        if math.isnan(value):
            found[k] = (found[k - 1] + found[k + 1]) / 2
    return torch.tensor(found)


class Forecaster(nn.Module):
    """Days [T, B, 24] to the next day [B, 24]: as the last one, and a change that an LSTM makes of those before."""

    def __init__(self, hidden: int, scale: float):
        super().__init__()
        self.scale = scale  # of a change from day to day
        self.lstm = fusedrnn.LSTM(DAY, hidden)
        self.head = nn.Linear(hidden, DAY)
        self.again = nn.Parameter(torch.zeros(()))  # how much of the last change comes once more
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, days: Tensor) -> Tensor:
        changes = days.diff(dim=0)
        _, (h, _) = self.lstm(changes / self.scale)
        return days[-1] + self.again * changes[-1] + self.scale * self.head(h[0])


def windows(series: Tensor, days: int) -> tuple[Tensor, Tensor]:
    """Every stretch of so many days, beginning at any hour, and the day after it: [T, N, 24] and [N, 24]."""
    both = series.unfold(0, (days + 1) * DAY, 1).unflatten(1, (days + 1, DAY)).transpose(0, 1)
    return both[:-1], both[-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--days", type=int, default=14, help="days that the LSTM reads (default: %(default)s)")
    add("--hidden", type=int, default=64, help="default: %(default)s")
    add("--steps", type=int, default=800, help="training steps of 64 windows (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--backend", help="reference, cpu, triton or cuda (default: planning decides)")
    add("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.days < 3:
        parser.error(f"--days must be at least 3, got {args.days}")
    steps = 60 if args.quick else args.steps
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    cities = {city: read(file) for city, file in CITIES.items()}
    begin = 8760 * 3 // 4  # of the held-out part
    parts = [windows(series[:begin], args.days) for series in cities.values()]
    x, y = torch.cat([x for x, _ in parts], 1).to(device), torch.cat([y for _, y in parts]).to(device)
    model = Forecaster(args.hidden, x.diff(dim=0).std().item()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    with fusedrnn.backend(args.backend):
        choice = fusedrnn.plan(model.lstm, 64)
        print(f"{x.shape[1]:,} stretches of {args.days} days to learn from; backend {choice.backend} ({choice.why})")
        start = time.perf_counter()
        for step in range(steps):
            chosen = torch.randint(x.shape[1], (64,), device=device)
            # Autumn, which is never seen, is spring upside down.
            sign = torch.randint(2, (64, 1), device=device) * 2.0 - 1
            loss = nn.functional.l1_loss(model(sign * x[:, chosen]), sign * y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // 5) == 0 or step == steps - 1:
                print(f"step {step:>5}  mean absolute error {loss.item():.3f} °F in the batch", flush=True)
        print(f"{steps} steps took {time.perf_counter() - start:.0f} s\n")

        print("mean absolute error on the held-out last quarter, °F, hours 1 to 24 ahead")
        print(f"{'city':<16}{'seasonal naive':>16}{'with its change':>17}{'LSTM':>8}")
        beaten = True
        for city, series in cities.items():
            # The first stretch reaches back into what was seen; no hour that is forecast does.
            x, y = windows(series[begin - args.days * DAY :], args.days)
            with torch.no_grad():
                forecast = model(x.to(device)).cpu()
            naive, drift, ours = ((f - y).abs().mean().item() for f in (x[-1], 2 * x[-1] - x[-2], forecast))
            beaten &= ours < naive
            print(f"{city:<16}{naive:>16.3f}{drift:>17.3f}{ours:>8.3f}")
    if not beaten:
        print("the LSTM does not beat the seasonal-naive forecast in every city")
    return 0 if beaten or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
