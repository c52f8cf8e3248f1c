"""Findings in sentences, computed from the numbers of the analyses."""

import statistics
from collections.abc import Mapping, Sequence

from reslearn.analysis.landscape import Landscape
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import Paths
from reslearn.analysis.responses import Response
from reslearn.analysis.signal import Signal


def of_responses(by_model: Mapping[str, Sequence[Response]]) -> list[str]:
    """Mean responses of each network."""
    means = {name: statistics.fmean(response.std for response in layers) for name, layers in by_model.items()}
    lines = [f"{name}: {len(by_model[name])} layers, mean standard deviation {mean:.3f}" for name, mean in means.items()]
    for name, layers in by_model.items():
        bare = sum(response.at == response.layer for response in layers)
        if 0 < bare < len(layers):
            lines.append(f"{name}: {bare} of these layers are measured before any BN, because their output goes into the addition.")
        elif bare:
            lines.append(f"{name}: no BN follows these layers; their outputs are measured directly.")
    if len(means) > 1:
        lines.append(f"{min(means, key=means.__getitem__)} has the smallest responses.")
    return lines


def of_signal(signal: Signal) -> list[str]:
    """Gradients by depth, and the contribution of the shortcuts."""
    first, last = signal.gradients[0][1], signal.gradients[-1][1]
    lines = [
        f"The gradient norm at the first block is {first / last:.3g} times that at the end."
        if last
        else "The gradient of the loss is zero."
    ]
    if signal.steps:
        top = max(signal.steps, key=lambda step: step.branch)
        median = statistics.median(step.branch for step in signal.steps)
        lines.append(f"Norm of a branch relative to its shortcut: median {median:.2f}, largest {top.branch:.2f} (in {top.block}).")
    for stretch in signal.stretches:
        exact = " (rounding)" if stretch.difference < 1e-5 else ""
        lines.append(
            f"{stretch.stage}, {stretch.blocks} blocks: x_L - x_l equals the sum of F to a relative error of "
            f"{stretch.difference:.1e}{exact}; of the gradient, {_shares(stretch.identity)}."
        )
    if signal.whole is not None:
        lines.append(f"From the end to the first block: of the gradient, {_shares(signal.whole[0])}.")
    return lines


def _shares(identity: float) -> str:
    return f"{100 * identity:.0f}% came through the shortcuts alone and {100 * (1 - identity):.0f}% through branches"


def of_lesion(lesion: Lesion) -> list[str]:
    """The effect of removing, shuffling and reordering blocks or layers."""
    lines = [f"Test error of the whole network: {lesion.whole:.2f}%.", *_of_blocks(lesion)]
    if layers := {name: error - lesion.whole for name, error in lesion.layers.items() if error is not None}:
        worst = max(layers, key=layers.__getitem__)
        lines.append(
            f"Removing one layer increases the error by {statistics.median(layers.values()):.2f} points "
            f"(median of {len(layers)}); the most important is {worst}: {layers[worst]:+.2f}."
        )
    if lesion.several:
        parts = "blocks" if lesion.single else "layers"
        means = ", ".join(f"{k}: {statistics.fmean(errors):.1f}%" for k, errors in lesion.several.items())
        lines.append(f"Mean error without k random {parts}: {means}.")
    if lesion.orders:
        by_tau: dict[float, list[float]] = {}
        for tau, error in lesion.orders:
            by_tau.setdefault(tau, []).append(error)
        by_order = [f"{statistics.fmean(by_tau[tau]):.1f}% at {tau:.2f}" for tau in sorted(by_tau, reverse=True) if tau < 1]
        lines.append(f"Mean error with reordered blocks, by Kendall's tau: {', '.join(by_order) or 'no order differs'}.")
    return lines


def _of_blocks(lesion: Lesion) -> list[str]:
    costs = {name: error - lesion.whole for name, error in lesion.single.items() if error is not None}
    if not costs:
        return []
    lines = []
    same = [name for name in costs if name not in lesion.resizing]
    if same:
        lines.append(f"Removing one block that keeps the shape increases the error by {_median(costs, same):.2f} points (median).")
    if resizing := [name for name in costs if name in lesion.resizing]:
        lines.append(f"Removing one block that changes the shape increases it by {_median(costs, resizing):.2f} points (median).")
    worst, least = max(costs, key=costs.__getitem__), min(costs, key=costs.__getitem__)
    lines.append(f"The most important block is {worst}: {costs[worst]:+.2f} points; the least, {least}: {costs[least]:+.2f}.")
    if same and lesion.shuffled:
        shuffled = {name: lesion.shuffled[name] - lesion.whole for name in same}
        lines.append(
            f"Shuffling the weights of a block that keeps the shape increases it by {_median(shuffled, same):.2f} points (median)."
        )
    return lines


def _median(costs: Mapping[str, float], names: Sequence[str]) -> float:
    return statistics.median(costs[name] for name in names)


def of_paths(paths: Paths) -> list[str]:
    """The path lengths that carry the gradient."""
    low, high = paths.effective
    mean = sum(k * share for k, share in enumerate(paths.carried))
    if paths.norm[0]:
        ratio = paths.norm[-1] / paths.norm[0]
        ends = f"The path through all branches has {ratio:.3g} times the gradient norm of that through none."
    else:
        ends = "The path through the shortcuts alone has no gradient."
    return [
        f"{paths.blocks} blocks make 2^{paths.blocks} paths, with {paths.blocks / 2:g} blocks on average.",
        f"Paths of {low} to {high} blocks, {100 * paths.effective_share:.3g}% of all, carry 95% of the gradient.",
        f"The gradient comes through {mean:.1f} blocks on average.",
        ends,
    ]


def of_landscape(by_model: Mapping[str, Landscape]) -> list[str]:
    """The loss at the weights and around them."""
    lines = []
    for name, one in by_model.items():
        size = len(one.steps)
        center, points = one.loss[size // 2][size // 2], [loss for row in one.loss for loss in row]
        near = sum(loss <= center + 1 for loss in points) / len(points)
        lines.append(
            f"{name}: loss {center:.3f} at the center, median {statistics.median(points):.3g}, maximum {max(points):.3g}; "
            f"{100 * near:.0f}% of the grid is within 1 of the center."
        )
    return lines
