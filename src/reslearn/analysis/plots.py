"""Pictures of analyses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

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

SMALLEST = 1e-30  # what is 0 stands here on a logarithmic axis


def _figure(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _plain(text: str) -> str:
    """Names are the user's: a dollar in them is a dollar."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG, whole or not at all."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def responses(found: Mapping[str, Sequence[Response]]) -> Figure:
    """DRL Figure 7: in layer order, and sorted. Hollow: not after BN, in a net where other layers are."""
    figure, (order, ranked) = _figure(2, 5.4, 4.2)
    mixed = False
    for i, (name, layers) in enumerate(found.items()):
        stds, color = [response.std for response in layers], list(TABLEAU_COLORS)[i % len(TABLEAU_COLORS)]
        order.plot(range(1, len(stds) + 1), stds, lw=1.4, color=color, label=_plain(name))
        ranked.plot(range(1, len(stds) + 1), sorted(stds, reverse=True), lw=1.4, color=color, label=_plain(name))
        bare = [(k, r.std) for k, r in enumerate(layers, start=1) if r.at == r.layer]
        if bare and len(bare) < len(layers):
            order.plot(*zip(*bare, strict=True), "o", ms=4, mfc="white", color=color)
            mixed = True
    title = "in layer order" + (" (hollow: not followed by BN)" if mixed else "")
    order.set(xlabel="3x3 layer, from the input", ylabel="standard deviation of the response", title=title)
    ranked.set(xlabel="3x3 layers, the strongest first", title="sorted")
    for axis in (order, ranked):
        axis.set_ylim(0, None)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def signal(found: Mapping[str, Signal]) -> Figure:
    """Gradient norms by depth; and how large each block's branch is beside what its shortcut brings."""
    residual = any(one.steps for one in found.values())
    figure, axes = _figure(2 if residual else 1, 5.6, 4.2)
    for name, one in found.items():
        norms = [max(norm, SMALLEST) for _, norm in one.gradients]
        axes[0].semilogy(range(1, len(norms) + 1), norms, "o-", ms=3, label=_plain(name))
        if one.steps:
            axes[1].plot(range(1, len(one.steps) + 1), [step.branch for step in one.steps], "o-", ms=3, label=_plain(name))
    axes[0].set(xlabel="input of block (the last: the end)", ylabel="norm of the gradient of the loss", title="gradient by depth")
    if residual:
        axes[1].set(xlabel="block, from the input", ylabel="norm of the branch / norm of the shortcut", title="what blocks add")
        axes[1].set_ylim(0, None)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def lesion(found: Lesion, name: str) -> Figure:
    """One block, one layer, several, other orders: as far as the network has them."""
    drawn = [bool(found.single), bool(found.layers), bool(found.several), bool(found.orders)]
    figure, axes = _figure(sum(drawn), 4.6, 4.2)
    places = iter(axes)
    if found.single:
        _each(next(places), found.single, found, "block")
    if found.layers:
        _each(next(places), found.layers, found, "layer")
    if found.several:
        axis, sizes = next(places), [0, *found.several]
        axis.plot(sizes, [found.whole, *(statistics.fmean(v) for v in found.several.values())], color="tab:blue", label="mean")
        points = [(k, value) for k, values in found.several.items() for value in values]
        axis.plot(*zip(*points, strict=True), "o", ms=4, mfc="none", color="tab:blue", label="draws")
        axis.set(xlabel=f"{'blocks' if found.single else 'layers'} left out at random", title="without several")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    if found.orders:
        axis = next(places)
        axis.plot(*zip(*found.orders, strict=True), "o", ms=4, mfc="none", color="tab:blue")
        axis.plot(1, found.whole, "o", ms=5, color="black")
        axis.invert_xaxis()
        axis.set(xlabel="Kendall's tau to the trained order", title="blocks in another order")
    for axis in axes:
        axis.set_ylim(0, 125)  # room for the legend
        axis.set_yticks(range(0, 101, 20))
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("test error, %")
    figure.suptitle(_plain(name))
    return figure


def _each(axis: Axes, errors: Mapping[str, float | None], found: Lesion, what: str) -> None:
    """A bar for each part left out; where none can be, none is drawn."""
    for resizing, color, label in ((False, "tab:blue", "left out"), (True, "tab:orange", "left out; it changes the shape")):
        bars = [(i, e) for i, (n, e) in enumerate(errors.items(), 1) if e is not None and (n in found.resizing) == resizing]
        if bars:
            axis.bar(*zip(*bars, strict=True), width=0.8, color=color, label=label)
    if what == "block" and found.shuffled:
        axis.plot(range(1, len(errors) + 1), list(found.shuffled.values()), "x", ms=5, color="black", label="weights shuffled")
    axis.axhline(found.whole, color="black", lw=1, ls="--", label="whole network")
    missing = sum(error is None for error in errors.values())
    note = f"\n({missing} change the shape and have to stay)" if missing else ""
    axis.set(xlabel=f"{what}, from the input{note}", title=f"without one {what}", xlim=(0.3, len(errors) + 0.7))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def paths(found: Paths, name: str) -> Figure:
    """How many paths, how much gradient each, how much in all."""
    figure, (share, norm, carried) = _figure(3, 4.6, 4.2)
    lengths = range(found.blocks + 1)
    share.bar(lengths, [100 * s for s in found.share], color="tab:gray")
    share.set(ylabel="share of all paths, %", title="how many paths")
    points = [(k, max(x, SMALLEST)) for k, each in enumerate(found.sampled) for x in each]
    norm.semilogy(*zip(*points, strict=True), "o", ms=3, alpha=0.4, mew=0, color="tab:blue", label="a path")
    norm.semilogy(lengths, np.maximum(found.norm, SMALLEST), color="tab:blue", label="mean")
    norm.set(ylabel="norm of the gradient that comes by it", title="what one path carries")
    norm.legend(frameon=False, fontsize=8)
    first, last = found.effective
    colors = ["tab:blue" if first <= k <= last else "tab:gray" for k in lengths]
    carried.bar(lengths, [100 * c for c in found.carried], color=colors)
    carried.set(ylabel="share of the gradient, %", title=f"what all paths of a length carry\n(blue: {CARRIED:.0%} of it)")
    for axis in (share, norm, carried):
        axis.set_xlabel("length of the path, blocks")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(_plain(name))
    return figure


def landscape(found: Mapping[str, Landscape]) -> Figure:
    """Contours of the loss, a net beside the other, with one scale."""
    figure, axes = _figure(len(found), 5.2, 4.6)
    heights = {name: np.log10(np.clip(np.nan_to_num(one.loss, nan=1e9, posinf=1e9), 1e-6, 1e9)) for name, one in found.items()}
    bottom, top = min(h.min() for h in heights.values()), max(h.max() for h in heights.values())
    levels = np.linspace(bottom, max(top, bottom + 1e-3), 25)
    drawn = None
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        drawn = axis.contourf(one.steps, one.steps, heights[name].T, levels, cmap="viridis")
        axis.contour(one.steps, one.steps, heights[name].T, levels[::2], colors="white", linewidths=0.4)
        axis.plot(0, 0, "r+", ms=10)
        axis.set(
            xlabel="first direction, filter norms", ylabel="second direction, filter norms", title=_plain(name), aspect="equal"
        )
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=axes, label="loss (mean cross-entropy)")
    bar.ax.yaxis.set_major_locator(MaxNLocator(7))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    return figure


def explained(picture: np.ndarray, seen: Tensor, heat: Tensor, titles: tuple[str, str, str]) -> Figure:
    """An image, what the network sees of it, and the heat upon it.

    picture: uint8 (H, W, C), any size; seen: uint8 (C, h, w); heat: (h, w) in [0, 1].
    """
    figure, axes = _figure(3, 4.0, 4.4)
    extent = (0, seen.shape[2], seen.shape[1], 0)
    for axis, pixels, title in zip(axes, (picture, seen.permute(1, 2, 0).numpy(), picture), titles, strict=True):
        gray = pixels.shape[2] == 1
        shown = pixels[:, :, 0] if gray else pixels
        axis.imshow(shown, cmap="gray" if gray else None, vmin=0, vmax=255, extent=extent, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title, parse_math=False, fontsize=10)
    hot = axes[2].imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    figure.colorbar(hot, ax=axes[2], shrink=0.75, label="of the strongest place")
    return figure


def features(points: Tensor, labels: Sequence[int], classes: Sequence[str], title: str, shares: tuple[float, float]) -> Figure:
    """Images as points, colored by class. shares: of the variance, along each component."""
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
