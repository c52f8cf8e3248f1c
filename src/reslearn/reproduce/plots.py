"""Plots of experiments in the paper's style: dashed lines are training error, bold lines held-out error."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from reslearn.files import write_atomic
from reslearn.reproduce.experiment import Panel
from reslearn.reproduce.runs import Curve

COLORS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:cyan", "tab:olive")


def _shared_steps(curves: Sequence[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps that all curves have, (n,), and the values there, (seeds, n)."""
    by_step = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*map(set, by_step)))
    return np.array(shared), np.array([[values[step] for step in shared] for values in by_step])


def curves(panels: Sequence[Panel], runs: Mapping[str, Sequence[Curve]], path: Path, title: str) -> None:
    """Saves error by iteration, panels side by side; lines are means over seeds and bands their range. runs: curves by label."""
    panels = [Panel(p.title, tuple(label for label in p.runs if runs.get(label))) for p in panels]
    panels = [p for p in panels if p.runs]
    figure = Figure(figsize=(5.2 * len(panels), 4.1), layout="constrained")
    figure.suptitle(title, fontsize=9, color="dimgray")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for color, label in zip(COLORS, panel.runs, strict=False):
            for kind, style in (("train", {"ls": "--", "lw": 1.1}), ("held_out", {"lw": 2.4})):
                lines = [line for curve in runs[label] if (line := getattr(curve, kind))]
                if not lines:
                    continue
                steps, values = _shared_steps(lines)
                axis.plot(steps, values.mean(0), color=color, label=label if kind == "held_out" else None, **style)
                if len(values) > 1:
                    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axis.set_title(panel.title)
        axis.set_xlabel("iterations")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    # As in the paper, the limits fit the end of a run and may cut off its beginning.
    ends = [line[-1][1] for p in panels for label in p.runs for c in runs[label] for line in (c.train, c.held_out) if line]
    axes[0].set_ylim(0, min(100, max(20, 3 * max(ends))))
    axes[0].set_ylabel("error, %   (dashed: training, bold: held-out)")
    _save(figure, path)


def effects(claims: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Saves each effect with its interval and its seeds, one axis per metric; values right of zero support the claim."""
    metrics = {metric: [claim for claim in claims if claim["metric"] == metric] for metric in {c["metric"]: None for c in claims}}
    heights = [0.8 + 0.5 * len(group) for group in metrics.values()]
    figure = Figure(figsize=(8.5, sum(heights)), layout="constrained")
    axes = figure.subplots(len(metrics), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (metric, group) in zip(axes, metrics.items(), strict=True):
        for y, claim in enumerate(reversed(group)):
            effect = claim["effect"]
            color = {"holds": "tab:green", "differs": "tab:red"}.get(claim["verdict"], "tab:gray")
            if effect["interval"]:
                axis.plot(effect["interval"], [y, y], color=color, lw=3, alpha=0.5, solid_capstyle="round")
            axis.plot(effect["values"], [y] * effect["n"], "o", color=color, ms=4, mfc="none")
            axis.plot(effect["mean"], y, "o", color=color, ms=7)
        axis.axvline(0, color="black", lw=0.8)
        texts = [textwrap.fill(claim["text"], 52, break_on_hyphens=False) for claim in reversed(group)]
        axis.set_yticks(range(len(group)), texts, fontsize=8)
        axis.set_xlabel(f"{metric.replace(', %', ', points')}; values right of 0 support the claim", fontsize=8)
        axis.set_ylim(-0.6, len(group) - 0.4)
        axis.grid(alpha=0.3, axis="x")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=140))
