"""Learning curves, and plots as SVG elements whose colors and font are set by the page.

User text never passes through matplotlib: names go into the page's legends, where every script has glyphs and `$` is not markup.
Colors are CSS variables of the page (`--line`, `--c0` ... `--c9`), so that one plot serves the light and the dark style.
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

COLORS = 10  # number of page colors; they repeat after that

# Placeholder colors that matplotlib can parse; as_svg replaces them with CSS.
INK, LINE = "#010203", "#010204"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "reslearn",  # the same run gives the same bytes
    "svg.fonttype": "none",  # keeps text selectable, searchable and in the page's font
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
"""Steps, values, color, and whether it is bold (validation) or dashed (training)."""


def thinned(step: np.ndarray, value: np.ndarray, limit: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Returns the finite points of a curve, averaged over neighbors if there are more than `limit`.

    step, value: float64 (n,).
    """
    finite = np.isfinite(step) & np.isfinite(value)
    step, value = step[finite], value[finite]
    if len(step) <= limit:
        return step, value
    starts = np.arange(limit) * len(step) // limit
    size = np.diff(np.append(starts, len(step)))
    return np.add.reduceat(step, starts) / size, np.add.reduceat(value, starts) / size


def curves(runs: Sequence[AnyRecord], measure: Measure) -> str:
    """The task's metric, loss and learning rate by iteration as SVG, run i in page color i; "" without measurements.

    Dashed lines are training values and bold lines validation values, as in Figure 6 of He et al. 2016. A comparison shows only the
    first metric.
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
        return as_svg(figure, "curves", f"{measure.title}, loss and learning rate by iteration")


def losses(run: AnyRecord, color: int, name: str) -> str:
    """The loss terms of a run as SVG, one panel each (dashed training, bold validation); "" if none was logged.

    name: alphanumeric prefix for SVG ids, unique on the page.
    """
    train, evals = ([{"step": line["step"], **line["losses"]} for line in lines] for lines in (run.train, run.evals))
    terms = {term: _lines(replace(run, train=train, evals=evals), color, [term], [term]) for term in run.loss_terms}
    if not any(terms.values()):
        return ""
    with style():
        columns = min(len(terms), 3 if len(terms) in (3, 5, 6) else 2)
        rows = -(-len(terms) // columns)
        height = 0.55 + 1.95 * rows
        figure = Figure(figsize=(9.6, height))
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, gridspec_kw={"hspace": 0.32, "wspace": 0.14}).ravel()
        figure.subplots_adjust(left=0.055, right=0.97, top=1 - 0.3 / height, bottom=0.45 / height)
        for panel, (term, lines) in zip(panels, terms.items(), strict=False):
            _draw(panel, term_name(term) if term.isascii() and term.isidentifier() else "", lines)
        for panel in panels[len(terms) :]:
            panel.set_axis_off()
        for panel in panels[max(0, len(terms) - columns) : len(terms)]:
            iterations(panel, [panel for panel in panels if panel.lines])
            panel.xaxis.set_tick_params(labelbottom=True)
        return as_svg(figure, name, "Loss terms by iteration")


def term_name(term: str) -> str:
    """`"rpn box reg"` for `loss_rpn_box_reg`."""
    return term.removeprefix("loss_").replace("_", " ")


def _lines(run: AnyRecord, color: int, train: Sequence[str], evals: Sequence[str]) -> list[Line]:
    """Returns the non-empty curves of a run. Eval keys after the first have the colors that follow."""
    lines = [(*thinned(column(run.train, "step"), column(run.train, key)), hue(color), False) for key in train]
    lines += [
        (*thinned(column(run.evals, "step"), column(run.evals, key), 600), hue(color + j), True) for j, key in enumerate(evals)
    ]
    return [line for line in lines if len(line[0])]


def _draw(panel: Axes, title: str, lines: Sequence[Line]) -> None:
    """Draws training curves dashed and validation curves bold, with markers if they have few points."""
    for step, value, color, bold in lines:
        marker = "o" if len(step) == 1 or (bold and len(step) <= 40) else None
        kind: dict[str, Any] = {"lw": 2, "zorder": 3} if bold else {"lw": 1, "ls": (0, (3, 1.6))}
        panel.plot(step, value, color=color, marker=marker, ms=3.4, **kind)
    panel.set_title(title)
    values(panel)
    if lines:
        panel.set_ylim(0, settled_top(panel))


def iterations(panel: Axes, panels: Sequence[Axes]) -> None:
    """Formats the x axis that `panels` share with this panel, slightly wider than the curves so that no marker is cut."""
    last = max(np.asarray(line.get_xdata())[-1] for panel in panels for line in panel.lines)
    panel.set_xlabel("iteration")
    panel.set_xlim(0, 1.006 * max(1, last))
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def values(panel: Axes) -> None:
    """Formats the y axis of a panel with a few round values."""
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def style():
    """A context manager with the plot style of the pages."""
    # Starts from the defaults, so that the user's matplotlibrc (usetex, a dark style) does not change the page.
    return matplotlib.style.context(["default", _STYLE])


def hue(i: int) -> str:
    """The placeholder for page color i."""
    return f"#0a0b{i % COLORS:02x}"


def settled_top(panel: Axes) -> float:
    """Returns an upper limit that fits all but the first tenth of each curve, as Figure 6's axis ends at 20%."""
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
    low = max(float(positive.min()), high / 1000)  # a cosine schedule ends near 0; its last steps need no decades
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
    """Returns the figure as an SVG element. name: prefix that keeps its ids apart from those of other plots on the page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Keep the size and drop the font family: matplotlib before 3.11 writes "font: 9px 'DejaVu Sans', ...".
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda m: f"var(--c{int(m[1], 16)})", svg)
    # All matplotlib figures use the same ids: prefix those that are referenced and remove the others.
    used = set(re.findall(r"[\"(]#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"([\"(]#)([\w-]+)", rf"\g<1>{name}-\2", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
