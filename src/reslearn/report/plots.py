"""Plots as SVG elements to stand inside an HTML page, which gives them their colors and their font.

No text of the user passes through matplotlib: names belong in the page's own legends, where every script has a glyph
and a `$` is a dollar. Colors are CSS variables of the page (`--line`, `--c0` ... `--c9`), so that one drawing serves
light and dark; nothing of matplotlib's global state is changed beyond a call.
"""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reslearn.report.runs import Bin, Run

COLORS = 10  # the page defines so many; more runs begin again

# Stand-ins that matplotlib can parse, replaced in the finished drawing by what it cannot.
INK, LINE = "#010203", "#010204"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "reslearn",  # without it every drawing of the same run would differ
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def thinned(step: np.ndarray, value: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a curve, at most `most` of them: where there are more, means of neighbors.

    step, value: (n,) float64. The mean of a group of mini-batch errors is what a moving average would show there.
    """
    finite = np.isfinite(step) & np.isfinite(value)
    step, value = step[finite], value[finite]
    if len(step) <= most:
        return step, value
    starts = np.arange(most) * len(step) // most
    size = np.diff(np.append(starts, len(step)))
    return np.add.reduceat(step, starts) / size, np.add.reduceat(value, starts) / size


def curves(runs: Sequence[Run]) -> str:
    """Error, loss and learning rate over the iterations, run i in the page's color i; "" where nothing was measured.

    Drawn as Figure 6 of He et al. 2016: dashed lines are training error, bold lines held-out error.
    """
    with style():
        figure = Figure(figsize=(9.6, 6.4))
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[5, 3, 1], gridspec_kw={"hspace": 0.24})
        figure.subplots_adjust(left=0.055, right=0.97, top=0.955, bottom=0.07)
        error, loss, rate = panels
        for i, run in enumerate(runs):
            for panel, key in ((error, "error"), (loss, "loss")):
                draw_line(panel, *thinned(run.train.step, getattr(run.train, key)), hue(i), bold=False)
                draw_line(panel, *thinned(run.held_out.step, getattr(run.held_out, key), 600), hue(i), bold=True)
            step, lr = thinned(run.train.step, run.train.lr, 600)
            rate.plot(step, lr, color=hue(i), lw=1.2)
        if not any(panel.lines for panel in (error, loss)):
            return ""
        for panel in (error, loss):
            values(panel)
        error.set_title("error, %")
        error.set_ylim(0, min(100, settled_top(error)))
        loss.set_title("loss")
        loss.set_ylim(0, settled_top(loss))
        rate.set_title("learning rate")
        rate_scale(rate)
        iterations(rate, [error, loss])
        return as_svg(figure, "curves", "Error, loss and learning rate over the iterations")


def iterations(panel: Axes, panels: Sequence[Axes]) -> None:
    """The iterations below a panel whose axis `panels` share: a little wider than the curves, so that their last dots are whole."""
    last = max(np.asarray(line.get_xdata())[-1] for panel in panels for line in panel.lines)
    panel.set_xlabel("iteration")
    panel.set_xlim(0, 1.006 * max(1, last))
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def values(panel: Axes) -> None:
    """Few round values at a panel's side."""
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def reliability(bins: Sequence[Bin], name: str) -> str:
    """Accuracy over confidence in equal bins, the diagonal being perfect calibration (Guo et al. 2017, figure 1).

    name: letters and digits that no other drawing of the page has. Gives "" where all bins are empty.
    """
    filled = [(bin.low, bin.high, bin.n, bin.accuracy) for bin in bins if bin.n and bin.accuracy is not None]
    if not filled:
        return ""
    low, high, n, accuracy = (np.array(column) for column in zip(*filled, strict=True))
    with style():
        figure = Figure(figsize=(4.2, 3.9))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1], gridspec_kw={"hspace": 0.28})
        figure.subplots_adjust(left=0.1, right=0.96, top=0.93, bottom=0.115)
        upper.bar(low, accuracy, width=0.9 * (high - low), align="edge", color=hue(0), alpha=0.6)
        upper.plot([0, 100], [0, 100], color=INK, lw=1.3, ls=(0, (3, 2)), zorder=3)
        upper.set_title("accuracy, %")
        upper.set_ylim(0, 100)
        lower.bar(low, 100 * n / n.sum(), width=0.9 * (high - low), align="edge", color=INK, alpha=0.45)
        lower.set_title("share of the images, %")
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.set_xlim(0, 100)
        lower.set_xlabel("confidence, %")
        return as_svg(figure, name, "Accuracy by confidence")


def style():
    """The pages' own style of drawing, for a `with`."""
    # Starting from matplotlib's defaults, a matplotlibrc of the user (usetex, a dark style) cannot change the page.
    return matplotlib.style.context(["default", _STYLE])


def hue(i: int) -> str:
    """What stands for the page's color i in a drawing."""
    return f"#0a0b{i % COLORS:02x}"


def draw_line(panel: Axes, step: np.ndarray, value: np.ndarray, color: str, *, bold: bool) -> None:
    if len(step) == 0:
        return
    dots = "o" if len(step) == 1 or (bold and len(step) <= 40) else None
    kind: dict[str, Any] = {"lw": 2, "zorder": 3} if bold else {"lw": 1, "ls": (0, (3, 1.6))}
    panel.plot(step, value, color=color, marker=dots, ms=3.4, **kind)


def settled_top(panel: Axes) -> float:
    """A top that shows where the curves end rather than where they begin, as Figure 6's axis ends at 20%.

    The first tenth of each curve does not count; the lines may leave the panel there.
    """
    highest = 0.0
    for line in panel.lines:
        step, value = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        settled = value[step >= 0.1 * step[-1]]
        highest = max(highest, float(settled.max()))
    return 1.08 * highest or 1.0


def rate_scale(panel: Axes) -> None:
    rates = np.concatenate([np.asarray(line.get_ydata()) for line in panel.lines] or [np.zeros(0)])
    positive = rates[rates > 0]
    if len(positive) == 0:
        panel.set_yticks([])
        return
    high = float(positive.max())
    low = max(float(positive.min()), high / 1000)  # a cosine ends near 0; its last steps need no decades of their own
    if high / low <= 10:
        panel.set_ylim(0, 1.15 * high)
        panel.set_yticks([0, high])
    else:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.5, 1.6 * high)
        panel.set_yticks([10.0**power for power in range(int(np.ceil(np.log10(low))), 1 + int(np.log10(high) // 1))])
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def as_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element that can stand beside others in one page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # matplotlib before 3.11 writes "font: 9px 'DejaVu Sans', ..."; the page's own font is wanted, the size is kept.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda m: f"var(--c{int(m[1], 16)})", svg)
    # Every drawing numbers its ids alike: those referred to get the drawing's name, the others go.
    used = set(re.findall(r"[\"(]#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"([\"(]#)([\w-]+)", rf"\g<1>{name}-\2", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
