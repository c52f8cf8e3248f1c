"""Plots as SVG elements of an HTML page, which sets their colors and font; learning curves.

User text never passes through matplotlib: names belong in the page's legends, where every script has a glyph and a `$` is a
dollar. Colors are CSS variables of the page (`--line`, `--c0` ... `--c9`), so that one plot serves light and dark pages.
matplotlib's global state is unchanged after a call.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reslearn.report.runs import column
from reslearn.report.task import Measure
from reslearn.report.text import AnyRecord

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


Line = tuple[np.ndarray, np.ndarray, str, bool]
"""Steps, values, color, and whether it is bold (held-out) or dashed (training)."""


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


def curves(runs: Sequence[AnyRecord], measure: Measure) -> str:
    """The task's measure, loss and learning rate over the iterations, run i in the page's color i; "" where nothing was measured.

    As in Figure 6 of He et al. 2016, dashed lines are training, bold lines held-out images. Of several runs, only the first of
    the measures is shown.
    """
    evals = [*measure.evals][: 1 if len(runs) > 1 else None]
    error = [line for i, run in enumerate(runs) for line in _lines(run, i, [*measure.train], evals)]
    loss = [line for i, run in enumerate(runs) for line in _lines(run, i, ["loss"], ["loss"])]
    shown = {title: lines for title, lines in ((measure.title, error), ("loss", loss)) if lines}
    if not shown:
        return ""
    with style():
        figure = Figure(figsize=(9.6, 1.4 + 2.5 * len(shown)))
        heights = [5, 4][-len(shown) :]
        *panels, rate = figure.subplots(1 + len(shown), 1, sharex=True, height_ratios=[*heights, 1], gridspec_kw={"hspace": 0.24})
        figure.subplots_adjust(left=0.055, right=0.97, top=0.955, bottom=0.07)
        for panel, (title, lines) in zip(panels, shown.items(), strict=True):
            _draw(panel, title, lines)
            if title == measure.title:
                highest = max(float(value.max()) for _, value, *_ in lines)
                panel.set_ylim(0, min(100, settled_top(panel) if measure.falls else 1.08 * highest or 1))
        for i, run in enumerate(runs):
            rate.plot(*thinned(column(run.train, "step"), column(run.train, "lr"), 600), color=hue(i), lw=1.2)
        rate.set_title("learning rate")
        rate_scale(rate)
        iterations(rate, panels)
        return as_svg(figure, "curves", f"{measure.title}, loss and learning rate over the iterations")


def losses(run: AnyRecord, color: int, name: str) -> str:
    """The parts of a run's loss, a panel each (dashed training, bold held-out); "" where none was logged.

    name: letters and digits that no other plot of the page has.
    """
    train, evals = ([{"step": line["step"], **line["losses"]} for line in lines] for lines in (run.train, run.evals))
    parts = {part: _lines(replace(run, train=train, evals=evals), color, [part], [part]) for part in run.parts}
    if not any(parts.values()):
        return ""
    with style():
        across = min(len(parts), 3 if len(parts) in (3, 5, 6) else 2)
        down = -(-len(parts) // across)
        height = 0.55 + 1.95 * down
        figure = Figure(figsize=(9.6, height))
        panels = figure.subplots(down, across, squeeze=False, sharex=True, gridspec_kw={"hspace": 0.32, "wspace": 0.14}).ravel()
        figure.subplots_adjust(left=0.055, right=0.97, top=1 - 0.3 / height, bottom=0.45 / height)
        for panel, (part, lines) in zip(panels, parts.items(), strict=False):
            _draw(panel, part_name(part) if part.isascii() and part.isidentifier() else "", lines)
        for panel in panels[len(parts) :]:
            panel.set_axis_off()
        for panel in panels[max(0, len(parts) - across) : len(parts)]:
            iterations(panel, [panel for panel in panels if panel.lines])
            panel.xaxis.set_tick_params(labelbottom=True)
        return as_svg(figure, name, "The parts of the loss over the iterations")


def part_name(part: str) -> str:
    """`"rpn box reg"` of `loss_rpn_box_reg`."""
    return part.removeprefix("loss_").replace("_", " ")


def _lines(run: AnyRecord, color: int, train: Sequence[str], evals: Sequence[str]) -> list[Line]:
    """The curves of a run that have points; those of further eval keys in the colors that follow."""
    found = [(*thinned(column(run.train, "step"), column(run.train, key)), hue(color), False) for key in train]
    found += [
        (*thinned(column(run.evals, "step"), column(run.evals, key), 600), hue(color + j), True) for j, key in enumerate(evals)
    ]
    return [line for line in found if len(line[0])]


def _draw(panel: Axes, title: str, lines: Sequence[Line]) -> None:
    """Training dashed; held-out bold, with dots where they are few."""
    for step, value, color, bold in lines:
        dots = "o" if len(step) == 1 or (bold and len(step) <= 40) else None
        kind: dict[str, Any] = {"lw": 2, "zorder": 3} if bold else {"lw": 1, "ls": (0, (3, 1.6))}
        panel.plot(step, value, color=color, marker=dots, ms=3.4, **kind)
    panel.set_title(title)
    values(panel)
    if lines:
        panel.set_ylim(0, settled_top(panel))


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


def style():
    """The pages' own style of drawing, for a `with`."""
    # Starting from matplotlib's defaults, a matplotlibrc of the user (usetex, a dark style) cannot change the page.
    return matplotlib.style.context(["default", _STYLE])


def hue(i: int) -> str:
    """What stands for the page's color i in a drawing."""
    return f"#0a0b{i % COLORS:02x}"


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
