"""A chart as data, and its two forms: an SVG that needs no script (matplotlib), and a specification for plotly.js.

Both have a transparent ground and take the colour of the text from the page, so that they fit a light and a dark one.
"""

import io
import math
import re
from dataclasses import dataclass, field

# Colours that differ for the colour-blind as well (Okabe and Ito, the blue a little lighter for dark pages), and a
# marker each: names of matplotlib and of plotly.js.
COLOURS = ("#1f83d6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00", "#7B61C9")
MARKERS = ("oosDv^PX", ("circle", "circle", "square", "diamond", "triangle-down", "triangle-up", "cross", "x"))
# Stands for the colour of the page's text.
TEXT, GRID = "#010203", "#8a8a8a"


@dataclass(frozen=True)
class Look:
    """``number`` picks colour and marker; None is the colour of the text. ``hollow`` marks are not filled."""

    number: int | None
    hollow: bool = False
    line: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Series:
    """Points of one name in one panel; ``low`` and ``high`` are the ends of the bars, ``hover`` what is said of each.

    ``labels`` are written beside the points; "" leaves one out.
    """

    name: str
    look: Look
    x: list
    y: list
    low: list | None = None
    high: list | None = None
    hover: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """``rows`` names the lines of a dot plot from top to bottom; its values run along x, else along y.

    ``line_at`` is where a dot plot has its line; ``orders`` are other orders of the rows by name.
    """

    title: str
    series: list[Series]
    x_title: str
    y_title: str = ""
    rows: list[str] | None = None
    x_log: bool = True
    y_log: bool = True
    x_ticks: list | None = None
    line_at: float | None = None
    orders: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels side by side, ``columns`` in a row; one legend for all."""

    name: str
    caption: str
    panels: list[Panel]
    columns: int = 1

    def names(self) -> dict[str, Look]:
        found = {}
        for panel in self.panels:
            for series in panel.series:
                found.setdefault(series.name, series.look)
        return found


def _colour(look: Look) -> str:
    return TEXT if look.number is None else COLOURS[look.number % len(COLOURS)]


def _marker(look: Look, language: int) -> str:
    return MARKERS[language][0 if look.number is None else look.number % len(MARKERS[language])]


def ratio_ticks(low: float, high: float) -> list[float]:
    """Ticks that one reads on a logarithmic axis of ratios."""
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
    fine = (0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.7) if high / low < 4 else ()
    return sorted(tick for tick in (*steps, *fine) if low <= tick <= high)


def _thinned(values: list[float]) -> list[float]:
    """As many of the sizes as can be read as ticks."""
    ticks = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] > (max(values) / min(values)) ** 0.07:
            ticks.append(value)
    return ticks


def decade_ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where these are enough."""
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1,) if high - low > 2.5 else (1, 2, 5) if high - low > 0.5 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    ticks = [step * 10.0**k for k in range(math.floor(low) - 1, math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if 10 ** (low - 0.2) <= tick <= 10 ** (high + 0.2)]


def span(panels: list[Panel]) -> tuple[float, float]:
    """The range of values of dot plots, so that all have one scale."""
    values = [v for p in panels for s in p.series for some in (s.x, s.low or [], s.high or []) for v in some if v]
    values += [p.line_at for p in panels if p.line_at]
    low, high = min(values), max(values)
    if all(p.line_at for p in panels):
        low, high = min(low, 0.8), max(high, 1.25)
    return low / (high / low) ** 0.04, high * (high / low) ** 0.04


def svg(chart: Chart) -> str:
    """The chart as an inline SVG; text is text, in the colour and the font of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT)
    style = ink | {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 9, "axes.linewidth": 0.6}
    rows = -(-len(chart.panels) // chart.columns)
    with matplotlib.rc_context(style):
        if chart.panels[0].rows is not None:
            counts = [len(panel.rows) for panel in chart.panels]
            height = sum(0.21 * n + 0.75 for n in counts) + 0.5
            figure = Figure(figsize=(8.6, height), layout="constrained")
            grid = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=[n + 1.5 for n in counts])
        else:
            width = 3.1 * chart.columns if chart.columns > 1 else 8.2
            figure = Figure(
                figsize=(width + 0.3, (2.5 if chart.columns > 1 else 5.2) * rows + 0.6), layout="constrained"
            )
            grid = figure.subplots(rows, chart.columns, squeeze=False)
        axes = list(grid.flat)
        for empty in axes[len(chart.panels) :]:
            empty.set_axis_off()
        for panel, axis in zip(chart.panels, axes):
            _draw(panel, axis, chart)
        _legend(figure, chart)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return tidied(written.getvalue(), chart.name).replace(TEXT, "currentColor")


def tidied(text: str, name: str) -> str:
    """matplotlib's SVG for a page: without a header, ids of its own, the font of the page."""
    text = text[text.index("<svg") :]
    # Several drawings share a page: their ids must differ.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: (?:bold )?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def alone(text: str) -> str:
    """An SVG as a file of its own, which has no page to take a colour from."""
    return text.replace("<svg ", '<svg color="#222" style="background:#fff" ', 1)


def _draw(panel: Panel, axis, chart: Chart) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    along = "y" if panel.rows is None else "x"
    place = {} if panel.rows is None else {name: k for k, name in enumerate(panel.rows)}
    for series in panel.series:
        look = series.look
        y = [place[name] for name in series.y] if place else series.y
        value = y if along == "y" else series.x
        bars = None
        if series.low is not None:
            bars = [
                [max(0, v - a) for v, a in zip(value, series.low)],
                [max(0, b - v) for v, b in zip(value, series.high)],
            ]
        colour = _colour(look)
        axis.errorbar(
            series.x, y, **{f"{along}err": bars}, color=colour, elinewidth=1, linewidth=1.2,
            linestyle="-" if look.line else "none", marker=_marker(look, 0) if look.marks else "", markersize=5,
            markerfacecolor="none" if look.hollow else colour, zorder=3 if look.number == 0 else 2,
        )  # fmt: skip
        for a, b, label in zip(series.x, y, series.labels):
            axis.annotate(label, (a, b), (4, 3), textcoords="offset points", fontsize=7.5, color=colour)
    axis.grid(True, axis="x" if place else "both", which="major", color=GRID, alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if panel.x_log:
        axis.set_xscale("log")
    if place:
        axis.set_yticks(range(len(place)), list(place))
        axis.set_ylim(len(place) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        low, high = span(chart.panels)
        if panel.x_log:
            axis.set_xlim(low, high)
            ticks = ratio_ticks(low, high)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.xaxis.set_tick_params(labelbottom=True)
    else:
        if panel.y_log:
            axis.set_yscale("log")
            ticks = decade_ticks([v for series in panel.series for v in series.y])
            axis.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        ticks = _thinned(panel.x_ticks) if panel.x_ticks else decade_ticks([v for s in panel.series for v in s.x])
        if panel.x_log:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    if panel.line_at is not None:
        axis.axvline(panel.line_at, color=TEXT, linewidth=1, linestyle="--", zorder=1)
    axis.set_xlabel(panel.x_title)
    axis.set_ylabel(panel.y_title)
    if panel.note:
        axis.text(0.01, 0.99, panel.note, transform=axis.transAxes, va="top", fontsize=8)


def _legend(figure, chart: Chart) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name, look in chart.names().items():
        colour, marker = _colour(look), _marker(look, 0) if look.marks else ""
        face = "none" if look.hollow else colour
        style = "-" if look.line else "none"
        handles.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=style, label=name))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4), frameon=False)


def _axis_name(letter: str, number: int) -> str:
    return letter if number == 1 else f"{letter}{number}"


def plotly(chart: Chart) -> dict:
    """The chart for plotly.js: {"data", "layout", "columns"}; the page adds the colour of its text (``TEXT``)."""
    data, layout, seen = [], {"annotations": [], "shapes": []}, set()
    rows = -(-len(chart.panels) // chart.columns)
    dots = chart.panels[0].rows is not None
    counts = [len(p.rows) + 3.2 for p in chart.panels] if dots else [1.0] * rows
    # Pixels of a line of a dot plot, of a small panel, of a large one.
    height = 17 * sum(counts) + 150 if dots else (250 if chart.columns > 1 else 430) * rows + 130
    gap, top = (66 / height if dots else 70 / height), 1.0
    for number, panel in enumerate(chart.panels, 1):
        row, column = divmod(number - 1, chart.columns)
        share = (1 - gap * (rows - 1)) * (counts[number - 1] / sum(counts) if dots else 1 / rows)
        high = top if dots else 1 - row * (share + gap)
        width = 1 / chart.columns
        x, y = _axis_name("x", number), _axis_name("y", number)
        left, right = (
            column * width + (0.02 if column else 0),
            (column + 1) * width - (0.03 if chart.columns > 1 else 0),
        )
        common = {"gridcolor": GRID + "44", "zeroline": False, "automargin": True}
        x_axis = common | {
            "domain": [left, right],
            "anchor": y,
            "tickangle": 0,
            "title": {"text": panel.x_title, "standoff": 4},
        }
        y_axis = common | {"domain": [high - share, high], "anchor": x, "title": {"text": panel.y_title}}
        if panel.x_log:
            ticks = decade_ticks([v for series in panel.series for v in series.x])
            x_axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{t:,g}" for t in ticks]}
        if dots:
            y_axis |= {"type": "category", "categoryorder": "array", "categoryarray": panel.rows[::-1],
                       "range": [-0.7, len(panel.rows) - 0.3], "tickfont": {"size": 11}}  # fmt: skip
            if panel.x_log:
                low, end = span(chart.panels)
                ticks = ratio_ticks(low, end)
                x_axis |= {"range": [math.log10(low), math.log10(end)], "tickvals": ticks,
                           "ticktext": [f"{t:g}" for t in ticks]}  # fmt: skip
            top = high - share - gap
        elif panel.y_log:
            ticks = decade_ticks([v for series in panel.series for v in series.y])
            y_axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{t:,g}" for t in ticks]}
        if panel.x_ticks:
            ticks = _thinned(panel.x_ticks)
            x_axis |= {"tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
        for letter, axis in (("x", x_axis), ("y", y_axis)):
            layout[f"{letter}axis{'' if number == 1 else number}"] = axis
        title = {"text": f"<b>{panel.title}</b>", "xref": f"{x} domain", "yref": f"{y} domain", "x": 0, "y": 1}
        layout["annotations"].append(title | {"yanchor": "bottom", "xanchor": "left", "showarrow": False})
        if panel.note:
            note = {"text": panel.note.replace("\n", "<br>"), "align": "left", "font": {"size": 11}, "showarrow": False}
            place = {"xref": f"{x} domain", "yref": f"{y} domain", "x": 0.01, "y": 0.98}
            layout["annotations"].append(note | place | {"xanchor": "left", "yanchor": "top"})
        if panel.line_at is not None:
            line = {"type": "line", "xref": x, "yref": f"{y} domain", "x0": panel.line_at, "x1": panel.line_at, "y0": 0}
            layout["shapes"].append(
                line | {"y1": 1, "layer": "below", "line": {"color": TEXT, "width": 1, "dash": "dash"}}
            )
        for series in panel.series:
            data.append(_trace(series, x, y, dots) | {"showlegend": series.name not in seen})
            seen.add(series.name)
    orders = chart.panels[0].orders
    if orders:
        buttons = []
        for name in orders:
            change = {}
            for number, panel in enumerate(chart.panels, 1):
                change[f"yaxis{'' if number == 1 else number}.categoryarray"] = panel.orders[name][::-1]
            buttons.append({"label": name, "method": "relayout", "args": [change]})
        menu = {"buttons": buttons, "direction": "down", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
        layout["updatemenus"] = [menu | {"pad": {"b": 18}, "showactive": True}]
    legend = {"orientation": "h", "x": 0, "y": 0, "xref": "container", "yref": "container", "xanchor": "left"}
    layout |= {"height": round(height), "margin": {"l": 10, "r": 14, "t": 76, "b": 84}, "hovermode": "closest",
               "legend": legend | {"yanchor": "bottom", "itemsizing": "constant", "font": {"size": 12}}}  # fmt: skip
    return {"data": data, "layout": layout, "columns": chart.columns}


def _trace(series: Series, x: str, y: str, dots: bool) -> dict:
    look, colour = series.look, _colour(series.look)
    mode = "+".join(part for part, on in (("lines", look.line), ("markers", look.marks)) if on)
    if any(series.labels):
        mode += "+text"
    symbol = _marker(look, 1) + ("-open" if look.hollow else "")
    trace = {"type": "scatter", "mode": mode, "name": series.name, "legendgroup": series.name, "x": series.x,
             "y": series.y, "xaxis": x, "yaxis": y, "marker": {"color": colour, "symbol": symbol, "size": 8},
             "line": {"color": colour, "width": 1.5}}  # fmt: skip
    if series.hover:
        trace |= {"hovertext": series.hover, "hoverinfo": "text"}
    elif not look.marks:
        trace["hoverinfo"] = "skip"
    if any(series.labels):
        trace |= {"text": series.labels, "textposition": "top right", "textfont": {"size": 10, "color": colour}}
    if series.low is not None:
        value = series.x if dots else series.y
        bars = {"type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": colour}
        bars["array"] = [max(0, b - v) for v, b in zip(value, series.high)]
        bars["arrayminus"] = [max(0, v - a) for v, a in zip(value, series.low)]
        trace["error_x" if dots else "error_y"] = bars
    return trace
