"""Pictures of recorded gates: heat maps, traces and distributions. Needs the extra "plots" (matplotlib).

Every function returns a matplotlib Figure, which ``figure.savefig(path)`` writes; pyplot and its state are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedrnn.gates import Gates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = {
    "i": "#0072B2", "f": "#D55E00", "o": "#009E73", "g": "#CC79A7", "c": "#000000", "h": "#E69F00",
    "r": "#0072B2", "z": "#D55E00", "n": "#CC79A7",
}  # fmt: skip
TITLES = {
    "i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o", "c": "cell state c",
    "h": "output h", "r": "reset gate r", "z": "update gate z", "n": "candidate n",
}  # fmt: skip
# Characters that would leave a gap on the axis.
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥", "\ufffd": "?"})
MOST_LABELS = 120


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{error}: plots need the extra 'plots' (pip install --no-build-isolation '.[plots]')"
        ) from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _title(gates: Gates) -> str:
    kind, _, nonlinearity = gates.cell.partition("_")
    return f"{kind.upper()}{f' ({nonlinearity})' if nonlinearity else ''}, layer {gates.name}"


def _values(gates: Gates, name: str, sample: int) -> Tensor:
    """[T, H] of one sample, on the CPU."""
    batch = gates["h"].shape[1]
    if not 0 <= sample < batch:
        raise ValueError(f"sample must be in 0..{batch - 1}, got {sample}")
    steps = slice(None) if gates.valid is None else gates.valid[:, sample]
    return gates[name][steps, sample].float().cpu()


def _units(gates: Gates, units: Iterable[int]) -> list[int]:
    units, hidden = list(units), min(gates[name].shape[-1] for name in gates.names)
    if not units or any(not 0 <= unit < hidden for unit in units):
        raise ValueError(f"units must be in 0..{hidden - 1}, got {units}")
    return units


def most_varying(gates: Gates, count: int, sample: int = 0) -> list[int]:
    """The units whose h varies most over the steps of a sample, the most varying first."""
    return _values(gates, "h", sample).var(0, correction=0).argsort(descending=True)[:count].tolist()


def in_order(gates: Gates, count: int, sample: int = 0) -> list[int]:
    """``most_varying`` units, so ordered that units whose h goes up and down together stand side by side.

    The order is that of the second eigenvector of the Laplacian of the units' correlations (Fiedler's), with which
    spectral seriation sorts (Atkins, Boman and Hendrickson, "A spectral algorithm for seriation", 1998).
    """
    units = most_varying(gates, count, sample)
    values = _values(gates, "h", sample)[:, units].double()
    centred = values - values.mean(0)
    scaled = centred / centred.norm(dim=0).clamp_min(1e-12)
    alike = (1 + scaled.T @ scaled) / 2
    vectors = torch.linalg.eigh(alike.sum(0).diag() - alike).eigenvectors
    order = vectors[:, min(1, len(units) - 1)].argsort(stable=True).tolist()
    return [units[k] for k in order]


def _name_steps(axis: Axes, tokens: Sequence[str] | None, steps: int) -> None:
    if tokens is None or steps > MOST_LABELS:
        axis.set_xlabel("step")
    else:
        # A dollar sign is a character here, not the beginning of mathematics.
        axis.set_xticks(range(steps), [token.translate(VISIBLE) for token in tokens], parse_math=False)
        axis.tick_params(axis="x", labelsize=8, length=2)
        axis.set_xlabel("input, one token a step")


def _check_tokens(tokens: Sequence[str] | None, steps: int) -> None:
    if tokens is not None and len(tokens) != steps:
        raise ValueError(f"tokens must name the {steps} steps of the sample, got {len(tokens)}")


def _width(steps: int) -> float:
    return min(14, max(6, 0.13 * steps + 1.5))


def heatmap(
    gates: Gates,
    names: Sequence[str] | None = None,
    *,
    sample: int = 0,
    units: Iterable[int] | None = None,
    tokens: Sequence[str] | None = None,
) -> Figure:
    """One map for each of ``names`` (default: all), steps from left to right and units from top to bottom.

    Sigmoid gates are drawn from 0 to 1; what has a sign is drawn around 0, c as far as it goes.

    Args:
        gates: an entry of :func:`fusedrnn.record_gates`.
        sample: which sequence of the batch.
        units: which units, in the order given (default: all).
        tokens: a text for each step of the sample (default: steps are numbered).

    Raises:
        KeyError, ValueError: no such gate, sample or unit; or not one token for each step.
        ImportError: matplotlib is missing.
    """
    names = gates.names if names is None else tuple(names)
    maps = {name: _values(gates, name, sample) for name in names}
    steps = len(maps[names[0]])
    _check_tokens(tokens, steps)
    chosen = None if units is None else _units(gates, units)
    rows = max(v.shape[1] for v in maps.values()) if chosen is None else len(chosen)
    figure = _figure(_width(steps), 0.7 + (0.3 + min(2.4, max(1.1, 0.03 * rows))) * len(names))
    figure.suptitle(_title(gates), fontsize=11)
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for panel, (name, values) in zip(panels, maps.items()):
        values = values if chosen is None else values[:, chosen]
        low, high, colours = _range(gates, name, values)
        image = panel.imshow(
            values.T.numpy(), aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high, rasterized=True
        )
        panel.set_title(TITLES[name], fontsize=9, loc="left")
        panel.set_ylabel("unit")
        if chosen is not None:
            # As many numbers as can be read.
            shown = range(0, len(chosen), 1 if len(chosen) <= 16 else -(-len(chosen) // 12))
            panel.set_yticks(shown, [str(chosen[k]) for k in shown], fontsize=7)
        figure.colorbar(image, ax=panel, pad=0.01, aspect=12)
    _name_steps(panels[-1], tokens, steps)
    return figure


def _range(gates: Gates, name: str, values: Tensor) -> tuple[float, float, str]:
    """Limits and colour map: a sequential one from 0, or a diverging one around 0."""
    if name in gates.sigmoid_names:
        return 0.0, 1.0, "cividis"
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 1.0
    if gates.cell == "rnn_relu":
        return 0.0, largest or 1.0, "cividis"
    bound = largest if name == "c" else max(1.0, largest)
    return -(bound or 1.0), bound or 1.0, "RdBu_r"


def traces(
    gates: Gates,
    units: Iterable[int] | None = None,
    *,
    sample: int = 0,
    tokens: Sequence[str] | None = None,
    series: Tensor | None = None,
) -> Figure:
    """For each unit its sigmoid gates over the steps, from 0 to 1, and below them what has a sign: c, and g, h or n, h.

    Args:
        gates, sample, tokens: as in :func:`heatmap`.
        units: default: the two whose h varies most.
        series: [T], drawn above all: an input that is a number and not a token.

    Raises:
        ValueError: no such sample or unit; or not one token or number for each step.
        ImportError: matplotlib is missing.
    """
    units = _units(gates, most_varying(gates, 2, sample) if units is None else units)
    values = {name: _values(gates, name, sample) for name in gates.names}
    steps = len(values["h"])
    _check_tokens(tokens, steps)
    if series is not None and series.shape != (steps,):
        raise ValueError(f"series must have shape [{steps}], got {list(series.shape)}")
    # c has a scale of its own.
    signed = tuple(name for name in gates.names if name not in (*gates.sigmoid_names, "c"))
    groups = [group for group in (gates.sigmoid_names, ("c",) if "c" in gates.names else (), signed) if group]
    count = len(units) * len(groups) + (series is not None)
    figure = _figure(_width(steps), 0.9 + 1.3 * count)
    figure.suptitle(_title(gates), fontsize=11)
    panels = list(figure.subplots(count, sharex=True, squeeze=False)[:, 0])
    last = panels[-1]
    if series is not None:
        panel = panels.pop(0)
        panel.plot(series.detach().float().cpu().numpy(), color="#555555", linewidth=1)
        panel.set_ylabel("input")
    for unit in units:
        for group in groups:
            panel = panels.pop(0)
            for name in group:
                value, style = values[name][:, unit].numpy(), {"color": COLOURS[name], "linewidth": 1.4}
                panel.step(range(steps), value, where="mid", label=name, **style)
            if group == gates.sigmoid_names:
                panel.set(ylim=(-0.03, 1.03), ylabel="gate, 0 to 1")
            else:
                panel.axhline(0, color="#888888", linewidth=0.6)
                panel.set_ylabel("value")
            panel.set_title(f"unit {unit}: {', '.join(group)}", fontsize=9, loc="left")
            panel.grid(axis="x", color="#dddddd", linewidth=0.4)
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    last.set_xlim(-0.5, steps - 0.5)
    _name_steps(last, tokens, steps)
    return figure


def openness(layers: Gates | Iterable[Gates], *, low: float = 0.1, high: float = 0.9) -> Figure:
    """How the values of the sigmoid gates are distributed, one panel for each layer, over all steps, samples and units.

    Values below ``low`` and above ``high`` lie in the grey parts.

    Raises:
        ValueError: a layer has no sigmoid gate (an RNN).
        ImportError: matplotlib is missing.
    """
    layers = [layers] if isinstance(layers, Gates) else list(layers)
    for gates in layers:
        if not gates.sigmoid_names:
            raise ValueError(f"openness is drawn of sigmoid gates, {gates.name} ({gates.cell}) has none")
    figure = _figure(1.0 + 4.2 * len(layers), 3.0)
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    bins = 40
    for panel, gates in zip(panels, layers):
        panel.axvspan(0, low, color="#eeeeee")
        panel.axvspan(high, 1, color="#eeeeee")
        for name in gates.sigmoid_names:
            values = gates[name].float().cpu().flatten()
            shares = torch.histc(values[~values.isnan()], bins, 0, 1)
            panel.stairs(
                (shares / shares.sum()).numpy(), torch.linspace(0, 1, bins + 1).numpy(), color=COLOURS[name],
                label=TITLES[name], linewidth=1.5,
            )  # fmt: skip
        panel.set_title(_title(gates), fontsize=10)
        panel.set(xlim=(0, 1), xlabel="value of the gate (0 closed, 1 open)")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(f"share of values, per {1 / bins:g}")
    return figure
