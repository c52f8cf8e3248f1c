"""Plots of detectors' runs, drawn as those of plots.py are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from reslearn.report.detector_runs import DetectionRun, Precision
from reslearn.report.plots import COLORS, LINE, as_svg, draw_line, hue, iterations, rate_scale, settled_top, style, thinned, values


def curves(runs: Sequence[DetectionRun]) -> str:
    """AP, loss and learning rate over the iterations, run i in the page's color i; "" where nothing was measured.

    One run alone has AP, AP50 and AP75 in colors 0, 1 and 2; of several the AP is shown. Dashed is training, bold held out.
    """
    with style():
        figure = Figure(figsize=(9.6, 6.4))
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[5, 4, 1], gridspec_kw={"hspace": 0.24})
        figure.subplots_adjust(left=0.055, right=0.97, top=0.955, bottom=0.07)
        ap, loss, rate = panels
        for i, run in enumerate(runs):
            for j, key in enumerate(("AP",) if len(runs) > 1 else ("AP", "AP50", "AP75")):
                draw_line(ap, *thinned(run.held_out["step"], run.held_out[key], 600), hue(i + j), bold=True)
            draw_line(loss, *thinned(run.train["step"], run.train["loss"]), hue(i), bold=False)
            draw_line(loss, *thinned(run.held_out["step"], run.held_out["loss"], 600), hue(i), bold=True)
            step, lr = thinned(run.train["step"], run.train["lr"], 600)
            rate.plot(step, lr, color=hue(i), lw=1.2)
        if not any(panel.lines for panel in (ap, loss)):
            return ""
        for panel in (ap, loss):
            values(panel)
        ap.set_title("average precision, %")
        top = max((float(np.max(line.get_ydata())) for line in ap.lines), default=0.0)
        ap.set_ylim(0, min(100, 1.08 * top) or 1)
        loss.set_title("loss")
        loss.set_ylim(0, settled_top(loss))
        rate.set_title("learning rate")
        rate_scale(rate)
        iterations(rate, [ap, loss])
        return as_svg(figure, "curves", "Average precision, loss and learning rate over the iterations")


def losses(run: DetectionRun, color: int, name: str) -> str:
    """The parts of a run's loss, a panel each (dashed training, bold held out); "" where none was logged."""
    if not run.parts:
        return ""
    with style():
        across = min(len(run.parts), 3 if len(run.parts) in (3, 5, 6) else 2)
        down = -(-len(run.parts) // across)
        figure = Figure(figsize=(9.6, 0.55 + 1.95 * down))
        panels = figure.subplots(down, across, squeeze=False, sharex=True, gridspec_kw={"hspace": 0.32, "wspace": 0.14}).ravel()
        figure.subplots_adjust(left=0.055, right=0.97, top=1 - 0.3 / (0.55 + 1.95 * down), bottom=0.45 / (0.55 + 1.95 * down))
        for panel, part in zip(panels, run.parts, strict=False):
            draw_line(panel, *thinned(run.train["step"], run.train[part], 200), hue(color), bold=False)
            draw_line(panel, *thinned(run.held_out["step"], run.held_out[part], 400), hue(color), bold=True)
            panel.set_title(part.removeprefix("loss_").replace("_", " ") if part.isascii() and part.isidentifier() else "")
            values(panel)
            if panel.lines:
                panel.set_ylim(0, settled_top(panel))
        for panel in panels[len(run.parts) :]:
            panel.set_axis_off()
        if not any(panel.lines for panel in panels):
            return ""
        for panel in panels[max(0, len(run.parts) - across) : len(run.parts)]:
            iterations(panel, [panel for panel in panels if panel.lines])
            panel.xaxis.set_tick_params(labelbottom=True)
        return as_svg(figure, name, "The parts of the loss over the iterations")


def precision_recall(lines: Sequence[tuple[int | None, Sequence[Precision]]], name: str) -> str:
    """Precision over recall, a panel for each IoU: (color of the page, or None for gray in the background; curves of one line).

    name: letters and digits that no other drawing of the page has. Gives "" where there are no curves.
    """
    ious = sorted({curve.iou for _, some in lines for curve in some})
    if not ious:
        return ""
    with style():
        figure = Figure(figsize=(9.6, 4.1))
        panels = figure.subplots(1, len(ious), squeeze=False, sharey=True, gridspec_kw={"wspace": 0.07}).ravel()
        figure.subplots_adjust(left=0.055, right=0.98, top=0.92, bottom=0.115)
        for panel, iou in zip(panels, ious, strict=True):
            for color, some in lines:
                for curve in some:
                    if curve.iou == iou and curve.precision:
                        recall = np.linspace(0, 100, len(curve.precision))
                        gray = color is None
                        panel.plot(recall, curve.precision, color=LINE if gray else hue(color), lw=1 if gray else 1.8)
            panel.set_title(f"precision, %, at IoU {iou:g}")
            panel.set_xlabel("recall, %")
            panel.set_xlim(0, 100)
            panel.set_ylim(0, 101)
            values(panel)
        return as_svg(figure, name, "Precision over recall")


def mean_curves(curves: Sequence[Precision]) -> list[Precision]:
    """The mean over classes at each IoU: the area below it is the mean AP."""
    found = []
    for iou in sorted({curve.iou for curve in curves}):
        rows = [curve.precision for curve in curves if curve.iou == iou]
        if len({len(row) for row in rows}) == 1:
            found.append(Precision.model_validate({"class": "", "iou": iou, "precision": np.mean(rows, axis=0).tolist()}))
    return found


MOST = COLORS - 1
"""Classes that are told apart by color, beside the mean."""
