"""Figures of the analyses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from reslearn.analysis.landscape import Landscape
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import CARRIED, Paths
from reslearn.analysis.responses import Response
from reslearn.analysis.signal import Signal
from reslearn.files import write_atomic

SMALLEST = 1e-30  # stands for 0 on a logarithmic axis


def _figure(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _plain(text: str) -> str:
    """Escapes dollar signs, which matplotlib would read as math."""
    return text.replace("$", r"\$")


def _finish(axis: Axes, grid: Literal["both", "y"] = "both") -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3, axis=grid)


def save(figure: Figure, path: Path) -> None:
    """Saves the figure as a PNG, atomically."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def responses(by_model: Mapping[str, Sequence[Response]]) -> Figure:
    """DRL Figure 7: responses in layer order, and sorted. Hollow markers: layers without BN in a network that has BN elsewhere."""
    figure, (order, ranked) = _figure(2, 5.4, 4.2)
    mixed = False
    for i, (name, layers) in enumerate(by_model.items()):
        stds, color = [response.std for response in layers], list(TABLEAU_COLORS)[i % len(TABLEAU_COLORS)]
        order.plot(range(1, len(stds) + 1), stds, lw=1.4, color=color, label=_plain(name))
        ranked.plot(range(1, len(stds) + 1), sorted(stds, reverse=True), lw=1.4, color=color, label=_plain(name))
        bare = [(k, r.std) for k, r in enumerate(layers, start=1) if r.at == r.layer]
        if bare and len(bare) < len(layers):
            order.plot(*zip(*bare, strict=True), "o", ms=4, mfc="white", color=color)
            mixed = True
    title = "in layer order" + (" (hollow: not followed by BN)" if mixed else "")
    order.set(xlabel="3x3 layer, from the input", ylabel="standard deviation of the response", title=title)
    ranked.set(xlabel="3x3 layers, strongest first", title="sorted")
    for axis in (order, ranked):
        axis.set_ylim(0, None)
        _finish(axis)
        axis.legend(frameon=False)
    return figure


def signal(by_model: Mapping[str, Signal]) -> Figure:
    """Gradient norms by depth, and each block's branch norm relative to its shortcut."""
    residual = any(one.steps for one in by_model.values())
    figure, axes = _figure(2 if residual else 1, 5.6, 4.2)
    for name, one in by_model.items():
        norms = [max(norm, SMALLEST) for _, norm in one.gradients]
        axes[0].semilogy(range(1, len(norms) + 1), norms, "o-", ms=3, label=_plain(name))
        if one.steps:
            axes[1].plot(range(1, len(one.steps) + 1), [step.branch for step in one.steps], "o-", ms=3, label=_plain(name))
    axes[0].set(xlabel="input of block (last: the end)", ylabel="gradient norm of the loss", title="gradient by depth")
    if residual:
        axes[1].set(xlabel="block, from the input", ylabel="branch norm / shortcut norm", title="relative branch size")
        axes[1].set_ylim(0, None)
    for axis in axes:
        _finish(axis)
        axis.legend(frameon=False)
    return figure


def lesion(result: Lesion, name: str) -> Figure:
    """The error without one block, one layer or several, and with reordered blocks, as far as the network has them."""
    figure, axes = _figure(sum(map(bool, (result.single, result.layers, result.several, result.orders))), 4.6, 4.2)
    remaining = iter(axes)
    if result.single:
        _bars(next(remaining), result.single, result, "block")
    if result.layers:
        _bars(next(remaining), result.layers, result, "layer")
    if result.several:
        axis, sizes = next(remaining), [0, *result.several]
        axis.plot(sizes, [result.whole, *(statistics.fmean(v) for v in result.several.values())], color="tab:blue", label="mean")
        points = [(k, value) for k, values in result.several.items() for value in values]
        axis.plot(*zip(*points, strict=True), "o", ms=4, mfc="none", color="tab:blue", label="trials")
        axis.set(xlabel=f"number of random {'blocks' if result.single else 'layers'} removed", title="several removed")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    if result.orders:
        axis = next(remaining)
        axis.plot(*zip(*result.orders, strict=True), "o", ms=4, mfc="none", color="tab:blue")
        axis.plot(1, result.whole, "o", ms=5, color="black")
        axis.invert_xaxis()
        axis.set(xlabel="Kendall's tau to the trained order", title="blocks reordered")
    for axis in axes:
        axis.set_ylim(0, 125)  # room for the legend
        axis.set_yticks(range(0, 101, 20))
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("test error, %")
    figure.suptitle(_plain(name))
    return figure


def _bars(axis: Axes, errors: Mapping[str, float | None], result: Lesion, part: Literal["block", "layer"]) -> None:
    """A bar for each block or layer that can be removed."""
    for resizing, color, label in ((False, "tab:blue", "removed"), (True, "tab:orange", "removed; changes the shape")):
        bars = [(i, e) for i, (n, e) in enumerate(errors.items(), 1) if e is not None and (n in result.resizing) == resizing]
        if bars:
            axis.bar(*zip(*bars, strict=True), width=0.8, color=color, label=label)
    if part == "block" and result.shuffled:
        axis.plot(range(1, len(errors) + 1), list(result.shuffled.values()), "x", ms=5, color="black", label="weights shuffled")
    axis.axhline(result.whole, color="black", lw=1, ls="--", label="whole network")
    fixed = sum(error is None for error in errors.values())
    note = f"\n({fixed} change the shape and cannot be removed)" if fixed else ""
    axis.set(xlabel=f"{part}, from the input{note}", title=f"one {part} removed", xlim=(0.3, len(errors) + 0.7))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def paths(result: Paths, name: str) -> Figure:
    """By path length: number of paths, gradient norm of one path, and share of the gradient carried by all."""
    figure, (share, norm, carried) = _figure(3, 4.6, 4.2)
    lengths = range(result.blocks + 1)
    share.bar(lengths, [100 * s for s in result.share], color="tab:gray")
    share.set(ylabel="share of all paths, %", title="number of paths")
    points = [(k, max(x, SMALLEST)) for k, norms in enumerate(result.sampled) for x in norms]
    norm.semilogy(*zip(*points, strict=True), "o", ms=3, alpha=0.4, mew=0, color="tab:blue", label="one path")
    norm.semilogy(lengths, np.maximum(result.norm, SMALLEST), color="tab:blue", label="mean")
    norm.set(ylabel="gradient norm", title="gradient of one path")
    norm.legend(frameon=False, fontsize=8)
    first, last = result.effective
    colors = ["tab:blue" if first <= k <= last else "tab:gray" for k in lengths]
    carried.bar(lengths, [100 * c for c in result.carried], color=colors)
    carried.set(ylabel="share of the gradient, %", title=f"gradient of all paths of a length\n(blue: {CARRIED:.0%})")
    for axis in (share, norm, carried):
        axis.set_xlabel("path length, blocks")
        _finish(axis, "y")
    figure.suptitle(_plain(name))
    return figure


def landscape(by_model: Mapping[str, Landscape]) -> Figure:
    """Contours of the loss, one panel per network, on a shared scale."""
    figure, axes = _figure(len(by_model), 5.2, 4.6)
    heights = {name: np.log10(np.clip(np.nan_to_num(one.loss, nan=1e9, posinf=1e9), 1e-6, 1e9)) for name, one in by_model.items()}
    bottom, top = min(h.min() for h in heights.values()), max(h.max() for h in heights.values())
    levels = np.linspace(bottom, max(top, bottom + 1e-3), 25)
    contours = None
    labels = {"xlabel": "first direction, filter norms", "ylabel": "second direction, filter norms"}
    for axis, (name, one) in zip(axes, by_model.items(), strict=True):
        contours = axis.contourf(one.steps, one.steps, heights[name].T, levels, cmap="viridis")
        axis.contour(one.steps, one.steps, heights[name].T, levels[::2], colors="white", linewidths=0.4)
        axis.plot(0, 0, "r+", ms=10)
        axis.set(title=_plain(name), aspect="equal", **labels)
    assert contours is not None
    bar = figure.colorbar(contours, ax=axes, label="loss (mean cross-entropy)")
    bar.ax.yaxis.set_major_locator(MaxNLocator(7))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    return figure


def explained(image: np.ndarray, view: Tensor, heat: Tensor, titles: tuple[str, str, str]) -> Figure:
    """An image, the network's input, and the image with the heat map.

    image: uint8 (H, W, C), any size. view: uint8 (C, h, w), the network's input. heat: (h, w) on [0, 1].
    """
    figure, axes = _figure(3, 4.0, 4.4)
    extent = (0, view.shape[2], view.shape[1], 0)
    for axis, pixels, title in zip(axes, (image, view.permute(1, 2, 0).numpy(), image), titles, strict=True):
        gray = pixels.shape[2] == 1
        shown = pixels[:, :, 0] if gray else pixels
        axis.imshow(shown, cmap="gray" if gray else None, vmin=0, vmax=255, extent=extent, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title, parse_math=False, fontsize=10)
    hot = axes[2].imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    figure.colorbar(hot, ax=axes[2], shrink=0.75, label="relative to the maximum")
    return figure


def features(points: Tensor, labels: Sequence[int], classes: Sequence[str], title: str, shares: tuple[float, float]) -> Figure:
    """A scatter plot of images, colored by class. shares: of the variance explained by each component."""
    figure, (axis,) = _figure(1, 7.0, 5.6)
    marks = np.array(labels)
    shown = sorted(set(labels))
    colors = list(TABLEAU_COLORS)
    for i, label in enumerate(shown):
        chosen = points[marks == label].numpy()
        name = _plain(classes[label]) if label >= 0 else "no label"
        marker = "os^Dvx+"[i // len(colors) % 7]
        axis.scatter(chosen[:, 0], chosen[:, 1], s=9, alpha=0.7, color=colors[i % len(colors)], marker=marker, label=name)
    first, second = (f"{100 * share:.0f}% of the variance" for share in shares)
    axis.set(xlabel=f"first principal component, {first}", ylabel=f"second principal component, {second}", title=_plain(title))
    if len(shown) <= 20:
        axis.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    return figure
