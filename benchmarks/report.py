"""The report of a folder of results: PNG plots and one HTML page that needs nothing else."""

import base64
import html
import statistics
from collections import defaultdict
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path

from .problems import MODES
from .providers import BASELINE, PROVIDERS
from .results import Environment, Row

AXES = {"H": "hidden size H", "B": "batch size B", "T": "length T"}
TIMED = ("forward", "train", "latency")
MODE_NAMES = {
    "forward": "Forward (inference)",
    "train": "Training step",
    "latency": "One step",
    "memory": "Peak memory of a training step",
}
# Colours that differ for the colour-blind as well (Okabe and Ito), and a marker each.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00")
MARKERS = "osD^vPX*<>"
FILLS = {"lstm": "full", "gru": "none", "rnn_tanh": "left", "rnn_relu": "bottom"}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1,h2,h3{line-height:1.2}h2{border-bottom:1px solid #999;margin-top:3rem;padding-bottom:.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:1rem 0}
caption{text-align:left;font-weight:600;padding:.3rem 0;white-space:nowrap}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}
th:first-child{text-align:left}tbody th{font-weight:400}thead th{border-bottom:2px solid #555;vertical-align:bottom}
td.words{text-align:left;white-space:normal}td.best{font-weight:700}small{color:#555}
figure{margin:1.5rem 0}figure img{max-width:100%;height:auto}figcaption{color:#444;font-size:.9rem}
"""


def write_report(rows: list[Row], left_out: dict[str, str], folder: Path) -> str:
    """Writes report.html and the plots of every machine and version in ``rows``; tells what was written in words."""
    groups = {}
    for row in rows:
        group = row.environment, row.suite, row.dtype
        # What was measured last comes first: it is what one wants to see.
        groups = {group: [*groups.pop(group, []), row], **groups}
    sections, count = [], 0
    for number, (group, found) in enumerate(groups.items(), 1):
        plots = draw_plots(found, folder, f"{number}-{group[1]}-{group[2]}")
        count += len(plots)
        sections.append(section(*group, found, plots))
    page = folder / "report.html"
    page.write_text(document(sections, left_out))
    return f"report in {page} with {count} plots"


def document(sections: list[str], left_out: dict[str, str]) -> str:
    lines = [_line(name, _words(why)) for name, why in left_out.items()]
    missing = _table("Providers left out of the last run", ("provider", "why"), lines) if lines else ""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>fusedrnn: benchmark</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body><main><h1>fusedrnn: benchmark</h1>
<p>Written {now} from results.csv beside this page. Every provider gets the same weights and input, and the product of
the input with its weights is included for all. A provider is timed only after its results agreed with float64. Times
are medians; a ratio is the median over rounds of {BASELINE}'s time by the provider's own in the same round: above 1 is
faster. Machines, versions and commits never share a table or a plot.</p>
{"".join(sections)}{missing}</main></body></html>
"""


def section(environment: Environment, suite: str, dtype: str, rows: list[Row], plots: dict[str, tuple]) -> str:
    """One machine and version, one suite, one dtype."""
    about = {f.name: getattr(environment, f.name) for f in fields(Environment)}
    times = sorted(row.time for row in rows)
    loads = [float(row.load) for row in rows if row.load]
    about["measured"] = f"{times[0]} to {times[-1]}"
    about["load average"] = f"{min(loads)} to {max(loads)} meanwhile" if loads else ""
    about["providers"] = ", ".join({f"{row.provider} {row.version}": None for row in rows})
    facts = [_line(name, _words(value)) for name, value in about.items() if value != ""]
    parts = [
        f"<h2>{html.escape(suite)}, {dtype}, {html.escape(environment.device)}</h2>",
        _table("Where and with what", (), facts),
        summary(rows),
    ]
    parts += [table(mode, rows) for mode in MODES if any(r.mode == mode and r.status == "ok" for r in rows)]
    for name, (text, image) in plots.items():
        parts.append(
            f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            f"<figcaption>{html.escape(text)} ({html.escape(name)})</figcaption></figure>"
        )
    return "".join(parts) + refused(rows)


def summary(rows: list[Row]) -> str:
    """The geometric mean, least and greatest ratio of every provider in every mode."""
    lines = []
    for provider in ordered(rows):
        for mode in TIMED:
            ratios = [r.speedup for r in rows if r.provider == provider and r.mode == mode and r.speedup is not None]
            if ratios and provider != BASELINE:
                numbers = (f"{statistics.geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
                cells = [f"<td>{number}</td>" for number in (len(ratios), *numbers)]
                lines.append(_line(provider, _words(MODE_NAMES[mode]), *cells))
    if not lines:
        return ""
    heads = ("provider", "mode", "problems", "geometric mean", "least", "greatest")
    return _table(f"Times as fast as {BASELINE}", heads, lines)


def _table(caption: str, heads: tuple[str, ...], lines: list[str]) -> str:
    cells = "".join(f"<th scope=col>{html.escape(head)}</th>" for head in heads)
    head = f"<thead><tr>{cells}</tr></thead>" if heads else ""
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f"<div class=wide><table><caption>{html.escape(caption)}</caption>{head}{body}</table></div>"


def _line(head: str, *cells: str) -> str:
    return f"<tr><th scope=row>{html.escape(head)}</th>{''.join(cells)}</tr>"


def _words(text) -> str:
    return f"<td class=words>{html.escape(str(text))}</td>"


def ordered(rows: list[Row]) -> list[str]:
    """Providers in the order of their table."""
    there = {row.provider for row in rows if row.status == "ok"}
    return [name for name in PROVIDERS if name in there] + sorted(there - set(PROVIDERS))


def table(mode: str, rows: list[Row]) -> str:
    rows = [row for row in rows if row.mode == mode and row.status == "ok"]
    providers, lines = ordered(rows), []
    problems = defaultdict(dict)
    for row in rows:
        problems[row.problem][row.provider] = row
    for problem, found in problems.items():
        best = max((r.speedup or 0 for r in found.values()), default=0)
        cells = []
        for row in (found.get(provider) for provider in providers):
            if row is None:
                cells.append("<td>not taken</td>")
            elif mode == "memory":
                cells.append(f"<td>{row.peak_bytes / 2**20:.1f}</td>")
            else:
                ratio = "" if row.provider == BASELINE or row.speedup is None else f" · {row.speedup:.2f}×"
                spread = f"<br><small>{row.quartile1 * 1e3:.3g} to {row.quartile3 * 1e3:.3g}, {row.branch}</small>"
                bold = " class=best" if row.speedup == best and len(found) > 1 else ""
                cells.append(f"<td{bold}>{row.median * 1e3:.3g}{ratio}{spread}</td>")
        lines.append(_line(problem.name, *cells))
    how = ", ".join(sorted({row.how for row in rows}))
    unit = f"MiB; {how}" if mode == "memory" else f"ms; middle half of the rounds and branch below; {how}"
    if any("CUDA" in row.how for row in rows) and mode != "memory":
        unit += "; L2 is warm: a call finds in it what the call before left there, weights and inputs that fit in it"
    return _table(f"{MODE_NAMES[mode]}, {unit}", ("problem", *providers), lines)


def refused(rows: list[Row]) -> str:
    """What has no time: wrong, failed, or not taken by a provider."""
    reasons = defaultdict(list)
    for row in rows:
        if row.status != "ok":
            reasons[row.provider, row.status, row.why].append(f"{row.problem.name} {row.mode}")
    lines = []
    for (provider, status, why), where in reasons.items():
        some = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(_line(provider, *map(_words, (status, why, some))))
    return _table("Not measured, and why", ("provider", "status", "why", "problems"), lines) if lines else ""


def draw_plots(rows: list[Row], folder: Path, prefix: str) -> dict[str, tuple[str, bytes]]:
    """File name -> (what it shows, the PNG); also written to ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in rows if row.status == "ok" and row.mode in TIMED]
    memory = [row for row in rows if row.status == "ok" and row.mode == "memory"]
    plots = {}
    modes = [mode for mode in TIMED if any(row.mode == mode for row in timed)]
    if timed:
        for axis, name in AXES.items():
            text = f"Time per step, and ratio to {BASELINE}, against {name}"
            plots[f"{prefix}-{axis}.png"] = text, lambda axis=axis: against(timed, modes, axis)
        text = "Roofline: operations a second against operations for each byte that has to move"
        plots[f"{prefix}-roofline.png"] = text, lambda: roofline([r for r in timed if r.mode != "latency"] or timed)
    if memory:
        plots[f"{prefix}-memory.png"] = "Peak memory of a training step", lambda: peaks(memory)
    drawn = {}
    for name, (text, plot) in plots.items():
        path = folder / name
        figure = plot()
        figure.savefig(path, dpi=120, metadata={"Software": None})
        drawn[name] = text, path.read_bytes()
    return drawn


def _figure(*size, **options):
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", **options)


def _look(rows: list[Row]) -> dict[str, dict]:
    """A colour and a marker for every provider."""
    return {
        name: {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "label": name}
        for k, name in enumerate(ordered(rows))
    }


def _families(rows: list[Row], axis: str) -> list[list[Row]]:
    """Rows of one provider that differ in ``axis`` alone (I follows H), each sorted along it."""
    families = defaultdict(list)
    for row in rows:
        fixed = [getattr(row, name) for name in ("cell", "T", "B", "H", "L", "D") if name != axis]
        fixed += [row.I if axis != "H" else row.I - row.H]
        families[(*fixed,)].append(row)
    return [sorted(family, key=lambda row: getattr(row, axis)) for family in families.values()]


def _powers(axes, values: list[int]) -> None:
    """A logarithmic axis with the sizes themselves as ticks, as many as can be read."""
    axes.set_xscale("log", base=2)
    ticks = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] > (max(values) / min(values)) ** 0.06:
            ticks.append(value)
    axes.set_xticks(ticks, [str(v) for v in ticks])
    axes.minorticks_off()
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, ticks[0] * 2)


def against(rows: list[Row], modes: list[str], axis: str):
    """Time per step above, ratio below, a column for each mode; lines join problems that differ in ``axis`` alone."""
    modes = [mode for mode in modes if axis != "T" or mode != "latency"] or modes
    figure = _figure(1.2 + 4.4 * len(modes), 7.4)
    grid = figure.subplots(2, len(modes), squeeze=False, sharex="col")
    looks = _look(rows)
    for column, mode in enumerate(modes):
        time_axes, ratio_axes = grid[:, column]
        here = [row for row in rows if row.mode == mode]
        for provider, look in looks.items():
            own = [row for row in here if row.provider == provider]
            # A touch aside, so that providers at the same size do not hide each other.
            aside = 2 ** (0.06 * (list(looks).index(provider) - (len(looks) - 1) / 2))
            for family in _families(own, axis):
                x = [getattr(row, axis) * aside for row in family]
                style = look | {"label": None, "markersize": 5, "linewidth": 1, "fillstyle": FILLS[family[0].cell]}
                low = [(r.median - r.quartile1) / r.T * 1e6 for r in family]
                high = [(r.quartile3 - r.median) / r.T * 1e6 for r in family]
                y = [row.median / row.T * 1e6 for row in family]
                time_axes.errorbar(x, y, yerr=(low, high), elinewidth=1, **style)
                ratios = [(a, row.speedup) for a, row in zip(x, family) if row.speedup is not None]
                if provider != BASELINE and ratios:
                    ratio_axes.plot(*zip(*ratios), **style)
        time_axes.set_yscale("log")
        time_axes.set_title(MODE_NAMES[mode])
        ratio_axes.axhline(1, color=COLOURS[0], linewidth=1, linestyle="--")
        ratio_axes.set_xlabel(AXES[axis])
        _ratios(ratio_axes, [row.speedup for row in here if row.speedup is not None])
        _powers(ratio_axes, [getattr(row, axis) for row in here])
        for axes in (time_axes, ratio_axes):
            axes.grid(True, which="major", color="#ddd")
            axes.set_axisbelow(True)
    grid[0][0].set_ylabel("time per step, µs")
    grid[1][0].set_ylabel(f"times as fast as {BASELINE}")
    _legend(figure, looks, [cell for cell in FILLS if any(row.cell == cell for row in rows)])
    return figure


def _ratios(axes, values: list[float]) -> None:
    """A logarithmic axis with 1 in it, and ratios as ticks: twice as fast is as far from 1 as half as fast."""
    low, high = min([*values, 0.8]) * 0.9, max([*values, 1.25]) * 1.1
    fine = (0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.7) if high / low < 4 else ()
    steps = (*fine, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500)
    ticks = [step for step in steps if low <= step <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _legend(figure, looks: dict[str, dict], cells: list[str] = ()) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look) for look in looks.values()]
    if len(cells) > 1:
        grey = {"color": "#666", "marker": "o", "linestyle": ""}
        handles += [Line2D([], [], fillstyle=FILLS[cell], label=cell, **grey) for cell in cells]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), frameon=False)


def roofline(rows: list[Row]):
    """Achieved operations a second, under the machine's peaks where these are known."""
    figure = _figure(8.4, 5.6)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    looks = _look(rows)
    intensity = lambda row: row.problem.flops(row.mode) / row.problem.bytes(row.mode)
    for provider, look in looks.items():
        own = [row for row in rows if row.provider == provider]
        x, y = [intensity(r) for r in own], [r.problem.flops(r.mode) / r.median / 1e9 for r in own]
        axes.scatter(x, y, s=26, alpha=0.8, color=look["color"], marker=look["marker"])
    known = [row for row in rows if row.peak_flops and row.peak_bandwidth]
    if known:
        top = max(row.peak_flops for row in known) / 1e9
        slope = max(row.peak_bandwidth for row in known) / 1e9
        xs = [intensity(row) for row in rows]
        span = [min(*xs, top / slope) / 2, max(*xs, top / slope) * 2]
        curve = [span[0] * (span[1] / span[0]) ** (k / 100) for k in range(101)]
        axes.plot(curve, [min(top, slope * x) for x in curve], color="#555", linewidth=1.5)
        words = f"{top:,.0f} GFLOP/s, {slope:,.1f} GB/s\n{known[0].peaks_from}"
        axes.text(0.02, 0.97, words, transform=axes.transAxes, va="top", fontsize=9)
        axes.set_ylim(top=top * 4)
    else:
        axes.set_title(f"no roof: {rows[0].peaks_from}", fontsize=10)
    axes.set_xlabel("operations for each byte of weights, x and y, moved once")
    axes.set_ylabel("GFLOP/s of the matrix products")
    axes.grid(True, which="major", color="#ddd")
    axes.set_axisbelow(True)
    _legend(figure, looks)
    return figure


def peaks(rows: list[Row]):
    """A bar for each problem and provider."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    looks = _look(rows)
    height = 0.8 / len(looks)
    figure = _figure(8.4, 1.6 + 0.3 * len(problems) * max(1, len(looks) / 2))
    axes = figure.subplots()
    for k, (provider, look) in enumerate(looks.items()):
        found = {row.problem: row.peak_bytes / 2**20 for row in rows if row.provider == provider}
        at = [n + (k - (len(looks) - 1) / 2) * height for n, p in enumerate(problems) if p in found]
        axes.barh(at, [found[p] for p in problems if p in found], height, color=look["color"])
    axes.set_yticks(range(len(problems)), [p.name for p in problems])
    axes.invert_yaxis()
    axes.set_xlabel(f"MiB ({rows[0].how})")
    axes.grid(True, axis="x", color="#ddd")
    axes.set_axisbelow(True)
    _legend(figure, looks)
    return figure
