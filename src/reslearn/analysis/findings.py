"""Analyses in sentences, computed from their numbers."""

import statistics
from collections.abc import Mapping, Sequence

from reslearn.analysis.landscape import Landscape
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import Paths
from reslearn.analysis.responses import Response
from reslearn.analysis.signal import Signal


def of_responses(found: Mapping[str, Sequence[Response]]) -> list[str]:
    """Mean responses, net beside net."""
    means = {name: statistics.fmean(response.std for response in layers) for name, layers in found.items()}
    said = [f"{name}: {len(found[name])} layers, mean standard deviation {mean:.3f}" for name, mean in means.items()]
    for name, layers in found.items():
        bare = sum(response.at == response.layer for response in layers)
        if 0 < bare < len(layers):
            said.append(f"{name}: {bare} of them are measured before any BN, for it is the addition that takes their output.")
        elif bare:
            said.append(f"{name}: no layer's output goes into BN; they are measured as they are.")
    if len(means) > 1:
        said.append(f"{min(means, key=means.__getitem__)} responds least.")
    return said


def of_signal(found: Signal) -> list[str]:
    """Gradients from the end to the start, and what the shortcuts carry."""
    first, last = found.gradients[0][1], found.gradients[-1][1]
    said = [
        f"The gradient at the first block has {first / last:.3g} times the norm of that at the end."
        if last
        else "No gradient comes back from the loss."
    ]
    if found.steps:
        top = max(found.steps, key=lambda step: step.branch)
        middle = statistics.median(step.branch for step in found.steps)
        said.append(
            f"The median branch is {middle:.2f} times as large as what it is added to; at most, in {top.block}, {top.branch:.2f}."
        )
    for stretch in found.stretches:
        exact = " (rounding)" if stretch.difference < 1e-5 else ""
        said.append(
            f"{stretch.stage}, {stretch.blocks} blocks: x_L - x_l is the sum of F to {stretch.difference:.1e} of its size{exact}; "
            f"of the gradient {_shares(stretch.identity)}."
        )
    if found.whole is not None:
        said.append(f"From the end to the first block, of the gradient {_shares(found.whole[0])}.")
    return said


def _shares(identity: float) -> str:
    return f"{100 * identity:.0f}% came through the shortcuts alone and {100 * (1 - identity):.0f}% through branches"


def of_lesion(found: Lesion) -> list[str]:
    """What a block is worth, and what resizing ones are."""
    said = [f"The whole network errs on {found.whole:.2f}%."]
    said += _of_blocks(found)
    if layers := {name: error - found.whole for name, error in found.layers.items() if error is not None}:
        worst = max(layers, key=layers.__getitem__)
        said.append(
            f"Without one layer the error grows by {statistics.median(layers.values()):.2f} points (median of {len(layers)}); "
            f"{worst} is missed most: {layers[worst]:+.2f}."
        )
    if found.several:
        what = "blocks" if found.single else "layers"
        said.append(
            f"Without k {what} at random: " + ", ".join(f"{k}: {statistics.fmean(v):.1f}%" for k, v in found.several.items())
        )
    if found.orders:
        by_tau: dict[float, list[float]] = {}
        for tau, error in found.orders:
            by_tau.setdefault(tau, []).append(error)
        means = [f"{statistics.fmean(by_tau[tau]):.1f}% at {tau:.2f}" for tau in sorted(by_tau, reverse=True) if tau < 1]
        said.append("In another order, by Kendall's tau to the trained one, it errs on " + ", ".join(means or ["the same"]) + ".")
    return said


def _of_blocks(found: Lesion) -> list[str]:
    costs = {name: error - found.whole for name, error in found.single.items() if error is not None}
    if not costs:
        return []
    said = []
    same = [name for name in costs if name not in found.resizing]
    if same:
        said.append(f"Without one block that keeps its shape the error grows by {_median(costs, same):.2f} points (median).")
    if resizing := [name for name in costs if name in found.resizing]:
        said.append(f"Without one block that changes its shape it grows by {_median(costs, resizing):.2f} points (median).")
    worst, least = max(costs, key=costs.__getitem__), min(costs, key=costs.__getitem__)
    said.append(f"The block that is missed most is {worst}: {costs[worst]:+.2f} points; least, {least}: {costs[least]:+.2f}.")
    if same and found.shuffled:
        wrong = {name: found.shuffled[name] - found.whole for name in same}
        said.append(f"With one block's weights shuffled it grows by {_median(wrong, same):.2f} points (median, shape kept).")
    return said


def _median(costs: Mapping[str, float], names: Sequence[str]) -> float:
    return statistics.median(costs[name] for name in names)


def of_paths(found: Paths) -> list[str]:
    """Which lengths carry the gradient."""
    low, high = found.effective
    mean = sum(k * share for k, share in enumerate(found.carried))
    return [
        f"{found.blocks} blocks make 2^{found.blocks} paths, of {found.blocks / 2:g} blocks on the average.",
        f"Paths of {low} to {high} blocks, {100 * found.effective_share:.3g}% of all, carry 95% of the gradient.",
        f"The gradient has come through {mean:.1f} blocks on the average.",
        f"A path through all branches has {_ratio(found.norm[-1], found.norm[0])} of the gradient of the one through none.",
    ]


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3g} times the norm" if b else "no part"


def of_landscape(found: Mapping[str, Landscape]) -> list[str]:
    """How deep, and how wide, the middle lies."""
    said = []
    for name, one in found.items():
        size = len(one.steps)
        middle, points = one.loss[size // 2][size // 2], [loss for row in one.loss for loss in row]
        near = sum(loss <= middle + 1 for loss in points) / len(points)
        said.append(
            f"{name}: loss {middle:.3f} in the middle, {statistics.median(points):.3g} in the median, {max(points):.3g} at most; "
            f"{100 * near:.0f}% of the square lies within 1 of the middle."
        )
    return said
