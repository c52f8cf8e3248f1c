"""Plots of localizers' runs, drawn as those of plots.py are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reslearn.report.localizer_runs import LocalizationRun
from reslearn.report.plots import INK, as_svg, draw_line, hue, iterations, rate_scale, settled_top, style, thinned, values

PARTS = ("scores", "boxes")  # of the loss
HALF = 10  # of the 21 overlaps that are asked: 0.5, from which a box is right


def curves(runs: Sequence[LocalizationRun]) -> str:
    """The parts of the loss and the learning rate over the iterations, run i in the page's color i; "" where nothing is logged."""
    with style():
        figure = Figure(figsize=(9.6, 5.2))
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[4, 4, 1.2], gridspec_kw={"hspace": 0.3})
        figure.subplots_adjust(left=0.055, right=0.97, top=0.945, bottom=0.085)
        *losses, rate = panels
        for i, run in enumerate(runs):
            for panel, part in zip(losses, PARTS, strict=True):
                if part in run.parts:
                    draw_line(panel, *thinned(run.train["step"], run.train[part], 150), hue(i), bold=True)
            step, lr = thinned(run.train["step"], run.train["lr"], 600)
            rate.plot(step, lr, color=hue(i), lw=1.2)
        if not all(panel.lines for panel in losses):
            return ""
        for panel, part in zip(losses, PARTS, strict=True):
            panel.set_title(f"loss of {part}")
            panel.set_ylim(0, settled_top(panel))
            values(panel)
        rate.set_title("learning rate")
        rate_scale(rate)
        iterations(rate, losses)
        return as_svg(figure, "curves", "The parts of the loss and the learning rate over the iterations")


def overlaps(lines: Sequence[tuple[int, Sequence[float]]], shares: Sequence[float], name: str) -> str:
    """The share of images that are right over the overlap that is asked, and beside it a histogram of the overlaps themselves.

    lines: the page's color and the percentages at overlaps of 0, 0.05, ... 1. shares: those whose images the histogram counts; ()
    for none. name: letters and digits that no other drawing of the page has. Gives "" where there are no lines.
    """
    lines = [(color, percent) for color, percent in lines if len(percent) == 2 * HALF + 1]
    if not lines:
        return ""
    with style():
        figure = Figure(figsize=(9.6, 3.5))
        right, *bars = figure.subplots(1, 2 if len(shares) else 1, squeeze=False, gridspec_kw={"wspace": 0.14}).ravel()
        figure.subplots_adjust(left=0.055, right=0.98, top=0.91, bottom=0.135)
        asked = np.linspace(0, 1, 2 * HALF + 1)
        for color, percent in lines:
            right.plot(asked, percent, color=hue(color), lw=1.8, marker="o", ms=2.8)
        right.set_title("images that are right, %")
        right.set_xlabel("overlap (IoU) that is asked")
        right.set_ylim(0, 101)
        _half(right)
        for panel in bars:
            share = -np.diff(np.asarray(shares))
            share[-1] += shares[-1]
            for some, color in ((slice(0, HALF), hue(1)), (slice(HALF, None), hue(0))):
                panel.bar(asked[:-1][some], share[some], width=0.045, align="edge", color=color, alpha=0.75)
            panel.set_title("images, %, by the overlap of the guess")
            panel.set_xlabel("overlap (IoU) of the guess with the object")
            panel.set_ylim(0, 1.08 * float(share.max()) or 1)
            _half(panel)
        return as_svg(figure, name, "Right images over the overlap that is asked, and images by overlap")


def _half(panel: Axes) -> None:
    """From 0 to 1, with a mark where a box begins to be right."""
    panel.axvline(HALF / 20, color=INK, lw=1, ls=(0, (3, 2)), zorder=1)
    panel.set_xlim(0, 1.006)
    values(panel)
