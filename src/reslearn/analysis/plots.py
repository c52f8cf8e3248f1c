"""Pictures of analyses."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from torch import Tensor

from reslearn.analysis.landscape import Landscape
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import CARRIED, Paths
from reslearn.analysis.responses import Response
from reslearn.analysis.signal import Signal
from reslearn.files import write_atomic


def _figure(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG, whole or not at all."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def responses(found: Mapping[str, Sequence[Response]]) -> Figure:
    """DRL Figure 7: in layer order, and sorted."""
    figure, (order, ranked) = _figure(2)
    for name, layers in found.items():
        stds = [response.std for response in layers]
        order.plot(range(1, len(stds) + 1), stds, lw=1.4, label=name)
        ranked.plot(range(1, len(stds) + 1), sorted(stds, reverse=True), lw=1.4, label=name)
    order.set(xlabel="layer, from the input", ylabel="standard deviation of the response", title="in order")
    ranked.set(xlabel="layer, sorted by magnitude", title="sorted")
    for axis in (order, ranked):
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def lesion(found: Lesion, name: str) -> Figure:
    """One block, several blocks, other orders."""
    figure, (single, several, order) = _figure(3, 4.6)
    names = list(found.single)
    costs = [error if error is not None else 0 for error in found.single.values()]
    colours = ["tab:orange" if block in found.resizing else "tab:blue" for block in names]
    single.bar(range(len(names)), costs, color=colours, width=0.85)
    single.axhline(found.whole, color="black", lw=1, ls="--")
    single.set(
        xlabel=f"block left out, of {len(names)}\n(orange: it changes the shape)", ylabel="test error, %", title="without one block"
    )
    if found.several:
        sizes = list(found.several)
        several.plot(sizes, [statistics.fmean(v) for v in found.several.values()], color="tab:blue")
        for k, values in found.several.items():
            several.plot([k] * len(values), values, "o", ms=4, mfc="none", color="tab:blue")
    several.set(xlabel="blocks left out at random", ylabel="test error, %", title="without several")
    order.plot([tau for tau, _ in found.orders], [error for _, error in found.orders], "o", ms=4, mfc="none", color="tab:blue")
    order.invert_xaxis()
    order.set(xlabel="Kendall's tau to the trained order", ylabel="test error, %", title="in another order")
    for axis in (single, several, order):
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(name)
    return figure


def paths(found: Paths, name: str) -> Figure:
    """How many paths, how much gradient each, how much in all."""
    figure, (share, norm, carried) = _figure(3, 4.6)
    lengths = range(found.blocks + 1)
    share.bar(lengths, [100 * s for s in found.share], color="tab:gray")
    share.set(ylabel="share of all paths, %", title="how many paths")
    norm.semilogy(lengths, [max(n, 1e-30) for n in found.norm], "o-", ms=3)
    norm.set(ylabel="gradient norm of one path", title="what one path carries")
    low, high = found.effective
    colours = ["tab:blue" if low <= k <= high else "tab:gray" for k in lengths]
    carried.bar(lengths, [100 * c for c in found.carried], color=colours)
    carried.set(ylabel="share of the gradient, %", title=f"what all paths of a length carry\n(blue: {CARRIED:.0%} of it)")
    for axis in (share, norm, carried):
        axis.set_xlabel("length of the path, blocks")
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(name)
    return figure


def signal(found: Mapping[str, Signal]) -> Figure:
    """Gradient norms by depth."""
    figure, (axis,) = _figure(1, 6.5)
    for name, one in found.items():
        axis.semilogy(range(1, len(one.gradients) + 1), [max(norm, 1e-30) for _, norm in one.gradients], "o-", ms=3, label=name)
    axis.set(xlabel="block, from the input", ylabel="norm of the gradient at its input", title="the gradient on its way back")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def landscape(found: Mapping[str, Landscape]) -> Figure:
    """Contours of the loss, a net beside the other, with one scale."""
    figure, axes = _figure(len(found), 5.2, 4.6)
    top = max(np.log10(np.array(one.loss)).max() for one in found.values())
    bottom = min(np.log10(np.array(one.loss)).min() for one in found.values())
    levels = np.linspace(bottom, max(top, bottom + 1e-6), 25)
    drawn = None
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        drawn = axis.contourf(one.steps, one.steps, np.log10(np.array(one.loss)).T, levels, cmap="viridis")
        axis.contour(one.steps, one.steps, np.log10(np.array(one.loss)).T, levels[::2], colors="white", linewidths=0.4)
        axis.plot(0, 0, "r+", ms=10)
        axis.set(xlabel="first direction, filter norms", ylabel="second direction, filter norms", title=name)
    assert drawn is not None
    figure.colorbar(drawn, ax=axes, label="log10 of the loss")
    return figure


def explained(pixels: Tensor, heat: Tensor, title: str) -> Figure:
    """An image, and the heat upon it. pixels: uint8 (C, H, W); heat: (H, W) in [0, 1]."""
    figure, (left, right) = _figure(2, 4.4, 4.6)
    picture = pixels.permute(1, 2, 0).numpy()
    picture = picture[:, :, 0] if picture.shape[2] == 1 else picture
    for axis in (left, right):
        axis.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
        axis.set_axis_off()
    right.imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    left.set_title("as the network sees it")
    right.set_title(title, parse_math=False)
    return figure


def features(points: Tensor, labels: Sequence[int], classes: Sequence[str], title: str) -> Figure:
    """Images as points, coloured by class."""
    figure, (axis,) = _figure(1, 7.0, 5.6)
    marks = np.array(labels)
    shown = sorted(set(labels))
    colours = list(TABLEAU_COLORS)
    for i, label in enumerate(shown):
        chosen = points[marks == label].numpy()
        name = (classes[label] if label >= 0 else "no label").replace("$", r"\$")
        marker = "os^Dvx+"[i // len(colours) % 7]
        axis.scatter(chosen[:, 0], chosen[:, 1], s=9, alpha=0.7, color=colours[i % len(colours)], marker=marker, label=name)
    axis.set(xlabel="first principal component", ylabel="second principal component", title=title)
    if len(shown) <= 20:
        axis.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    return figure
