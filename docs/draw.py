"""Draws the pictures of the documentation that need no model: `make pictures` (docs/images/*.svg).

The speed charts come from benchmarks/history, the drawings of the kernels from the sizes in docs/kernels.md.
"""

import io
import re
import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fusedrnn.benchmarks import charts, keep
from fusedrnn.benchmarks.charts import Chart, Look, Panel, Series
from fusedrnn.benchmarks.report import BASELINE, MODE_NAMES, OURS, TIMED, titled

IMAGES = Path(__file__).with_name("images")
# One colour for each thread, block or gate.
BLUE, ORANGE, GREEN, PINK, GREY, INK = "#9ecbf0", "#f5b98a", "#8fd6bd", "#eabfd6", "#e4e4e4", "#222222"


def speed(kept: list[keep.Kept]) -> str:
    """Who is faster where, of the last release."""
    last = keep.last_release(kept)
    rows = [k for k in kept if k.release == last and k.provider != BASELINE and k.dtype == "float32"]
    looks = {OURS: Look(0), "onnxruntime": Look(1), "openvino": Look(2)}
    panels = []
    for mode in TIMED:
        here = [k for k in rows if k.mode == mode]
        ours = {titled(k.problem): k.ratio for k in here if k.provider == OURS}
        series = []
        for provider, look in looks.items():
            own = [k for k in here if k.provider == provider and titled(k.problem) in ours]
            if own:
                series.append(Series(provider, look, [k.ratio for k in own], [titled(k.problem) for k in own]))
        order = sorted(ours, key=ours.get, reverse=True)
        panels.append(Panel(MODE_NAMES[mode], series, f"times as fast as {BASELINE} →", rows=order, line_at=1.0))
    return charts.alone(charts.svg(Chart("speed", "", panels)))


def history(kept: list[keep.Kept]) -> str:
    """Geometric means over the problems, by release, machine and dtype; bars are the middle half of the problems."""
    panels = []
    for machine, dtype in dict.fromkeys((k.machine, k.dtype) for k in kept):
        here = [k for k in kept if (k.machine, k.dtype, k.provider) == (machine, dtype, OURS)]
        rows, mean, low, high = [], [], [], []
        for mode in TIMED:
            for release in sorted({k.release for k in here if k.mode == mode}, key=version):
                ratios = sorted(k.ratio for k in here if (k.release, k.mode) == (release, mode))
                rows.append(f"{MODE_NAMES[mode]}, {release}")
                mean.append(statistics.geometric_mean(ratios))
                low.append(ratios[round(0.25 * (len(ratios) - 1))])
                high.append(ratios[round(0.75 * (len(ratios) - 1))])
        series = [Series(OURS, Look(0), mean, rows, low, high)]
        title = f"{machine}, {dtype}"
        panels.append(Panel(title, series, f"times as fast as {BASELINE} →", rows=rows, line_at=1.0))
    return charts.alone(charts.svg(Chart("history", "", panels)))


def version(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release)]


class Drawing:
    """A picture in its own units, x to the right and y down; text in points."""

    def __init__(self, name: str, width: float, height: float, scale: float = 0.62):
        self.name = name
        self.figure = Figure(figsize=(width * scale, height * scale))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def box(self, x, y, width, height, text="", colour=GREY, size=8.5, edge=INK) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))
        if text:
            self.text(x + width / 2, y + height / 2, text, size, ha="center")

    def text(self, x, y, text, size=8.5, ha="left", bold=False) -> None:
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, text, fontsize=size, ha=ha, va="center", color=INK, fontweight=weight, linespacing=1.35)

    def arrow(self, x, y, to_x, to_y, colour=INK) -> None:
        style = {
            "arrowstyle": "-|>",
            "mutation_scale": 9,
            "color": colour,
            "linewidth": 0.9,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        self.axes.add_patch(FancyArrowPatch((x, y), (to_x, to_y), **style))

    def svg(self) -> str:
        written = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        return charts.tidied(written.getvalue(), self.name)


def tile() -> str:
    """The product of a CUDA block: which rows of the weights meet which rows of the batch, and who holds what."""
    d = Drawing("tile", 16, 10.6)
    d.text(0.3, 0.4, "Forward: a block owns 8 units. Their rows of W_hh are two tiles of 16 rows.", bold=True, size=9.5)
    for k, (name, colour) in enumerate((("i", BLUE), ("f", ORANGE), ("g", GREEN), ("o", PINK))):
        y = 1.1 + k * 1.1 + (k // 2) * 0.5
        d.box(0.9, y, 8, 1.1, colour=colour)
        d.text(4.9, y + 0.55, f"8 rows of W_hh: gate {name} of the block's 8 units", ha="center")
    d.text(0.45, 2.2, "tile 0", ha="center", size=8)
    d.text(0.45, 4.9, "tile 1", ha="center", size=8)
    d.text(9.3, 2.2, "×", size=15)
    d.box(10, 1.1, 5, 2.2, "8 rows of the batch:\nh of the step before", GREY)
    d.text(10, 3.75, "The product's lane ends with i, f, g and o\nof ONE unit, for two rows of the batch:\n"
           "it applies the cell by itself.", size=8)  # fmt: skip
    d.text(0.9, 6.4, "k runs over the columns of W_hh, which are the units of h: eight warps share it", size=8.5)
    for warp in range(8):
        d.box(0.9 + warp, 6.7, 1, 0.7, f"warp {warp}", BLUE if warp == 2 else GREY, 7.5)
    d.text(9.3, 7.05, "their partial sums meet in shared memory:\none block barrier a step", size=8)
    d.arrow(3.4, 7.4, 3.4, 8.0)
    d.text(
        0.9, 8.3, "a row, 64 bytes of a warp's share: four pieces of 16 bytes, each read at once by one lane", size=8.5
    )
    for piece in range(4):
        d.box(0.9 + piece * 2, 8.6, 2, 0.8, f"lane 4·row + {piece}", BLUE, 8)
    words = (
        "The order of the terms of a sum is free, so the four words of a piece are just what two mma.sync",
        "want: nothing passes through shared memory on its way into the product.",
    )
    d.text(0.9, 9.9, "\n".join(words), size=8)
    return d.svg()


def units() -> str:
    """How the persistent kernel lays the recurrent weights over the blocks."""
    d = Drawing("units", 16, 8.4)
    title = "Persistent, forward: W_hh stays in registers for the whole sequence (H = 768: 96 blocks)"
    d.text(0.3, 0.4, title, bold=True, size=9.5)
    colours, names = (BLUE, ORANGE, GREEN, PINK), ("block 0\nunits 0-7", "block 1\nunits 8-15", "block 2\nunits 16-23",
                                                  "block 95\nunits 760-767")  # fmt: skip
    for k, (name, colour) in enumerate(zip(names, colours)):
        x = 0.4 + k * 3.3 + (2 if k == 3 else 0)
        d.box(x, 1.2, 3, 3.9, colour="#ffffff")
        d.text(x + 1.5, 1.65, name, ha="center")
        for warp in range(8):
            d.box(x + 0.15 + warp * 0.3375, 2.2, 0.3375, 0.7, colour=colour)
        d.text(x + 1.5, 3.5, "32 rows of W_hh\nin the registers\nof its 8 warps", ha="center", size=7.5)
        d.text(x + 1.5, 4.6, "c of its units\nin registers", ha="center", size=7.5)
        d.arrow(x + 1.1, 5.1, x + 1.1, 6.0)
        d.arrow(x + 1.9, 6.0, x + 1.9, 5.1)
        d.box(x, 6.0, 3, 0.8, "8 units of h", colour, 8)
    d.text(10.9, 3.1, "· · ·", size=12)
    d.text(10.9, 6.4, "· · ·", size=12)
    d.text(0.5, 7.4, "y [T, B, H] in global memory is the mailbox: every block writes its 8 units of a step (down)\n"
           "and reads all units of the step before (up). One launch for the sequence, one block for a multiprocessor.",
           size=8.5)  # fmt: skip
    return d.svg()


def mailbox() -> str:
    """A step of three blocks in time."""
    d = Drawing("mailbox", 16, 8.6)
    d.text(0.3, 0.4, "The mailbox in time: three blocks, steps t and t + 1", bold=True, size=9.5)
    d.arrow(1.6, 7.0, 15.6, 7.0)
    d.text(15.5, 7.35, "time", ha="right", size=8)
    lanes = {0: 1.2, 1: 3.0, 2: 4.8}
    for k, y in lanes.items():
        d.text(0.3, y + 0.5, f"block {k}", size=9)
    starts = {0: 1.8, 1: 2.1, 2: 4.6}
    for k, y in lanes.items():
        x = starts[k]
        d.box(x, y, 2.4, 1, "product\nof h[t-1]", BLUE, 8)
        d.box(x + 2.4, y, 1.4, 1, "cell", GREEN, 8)
        d.box(x + 3.8, y, 1.0, 1, "store", ORANGE, 8)
    ends = {k: start + 4.8 for k, start in starts.items()}
    for k in (0, 1):
        y, x = lanes[k], ends[k]
        d.box(x, y, 1.6, 1, "product\nof h[t]", BLUE, 8)
        d.box(x + 1.6, y, ends[2] - x - 1.4, 1, "NaN:\npoll", PINK, 7)
        d.box(ends[2] + 0.2, y, 2.4, 1, "product again", BLUE, 8)
        d.box(ends[2] + 2.6, y, 1.4, 1, "cell", GREEN, 8)
        d.box(ends[2] + 4.0, y, 1.0, 1, "store", ORANGE, 8)
        d.arrow(ends[2], lanes[2] + 0.1, ends[2] + 0.2, y + 1.0)
    y, x = lanes[2], ends[2] + 0.2
    d.box(x, y, 2.4, 1, "product of h[t]", BLUE, 8)
    d.box(x + 2.4, y, 1.4, 1, "cell", GREEN, 8)
    d.box(x + 3.8, y, 1.0, 1, "store", ORANGE, 8)
    words = (
        "y is filled with NaN before the launch, so a packet that has not arrived makes the sum NaN. A block",
        "multiplies first and looks only then: what has arrived costs no comparison. No barrier between blocks.",
    )
    d.text(0.3, 8.0, "\n".join(words))
    return d.svg()


def cpu() -> str:
    """The two ways in which threads share a sequence."""
    d = Drawing("cpu", 16, 9.4)
    d.text(0.3, 0.4, "By rows: large batches, W_hh small enough for a core's cache", bold=True, size=9.5)
    colours = (BLUE, ORANGE)
    for thread, colour in enumerate(colours):
        y = 1.0 + thread * 1.3
        d.text(0.3, y + 0.5, f"thread {thread}", size=9)
        for t in range(5):
            d.box(2.2 + t * 2.1, y, 2.1, 1, f"step {t}, its rows", colour, 8)
        d.text(13.0, y + 0.5, "all of W_hh", size=8.5)
    d.text(2.2, 3.75, "each thread runs its rows of the batch through all steps: no barrier", size=8.5)
    d.text(0.3, 4.9, "By units: everything else", bold=True, size=9.5)
    for thread, colour in enumerate(colours):
        y = 5.5 + thread * 1.3
        d.text(0.3, y + 0.5, f"thread {thread}", size=9)
        for t in range(5):
            d.box(2.2 + t * 2.1, y, 1.8, 1, f"step {t},\nits units", colour, 8)
        d.text(13.0, y + 0.5, "half of W_hh", size=8.5)
    for t in range(5):
        d.box(4.0 + t * 2.1, 5.4, 0.3, 2.5, "", "#666666")
    words = (
        "each thread keeps its panels of W_hh in its own cache and does all rows; a barrier (grey) ends",
        "every step, since the next one needs the h of all units",
    )
    d.text(2.2, 8.3, "\n".join(words))
    return d.svg()


def drawn() -> dict[str, str]:
    """All pictures by file name."""
    kept = keep.read()
    return {"speed.svg": speed(kept), "history.svg": history(kept), "tile.svg": tile(), "units.svg": units(),
            "mailbox.svg": mailbox(), "cpu.svg": cpu()}  # fmt: skip


def main(folder: Path = IMAGES) -> int:
    for name, text in drawn().items():
        (folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
