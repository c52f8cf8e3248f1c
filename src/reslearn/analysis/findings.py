"""Analyses in sentences, computed from their numbers."""

import statistics
from collections.abc import Mapping, Sequence

from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import Paths
from reslearn.analysis.responses import Response
from reslearn.analysis.signal import Signal


def of_responses(found: Mapping[str, Sequence[Response]]) -> list[str]:
    """Mean responses, net beside net."""
    means = {name: statistics.fmean(response.std for response in layers) for name, layers in found.items()}
    said = [f"{name}: {len(found[name])} layers, mean standard deviation {mean:.3f}" for name, mean in means.items()]
    if len(means) > 1:
        said.append(f"{min(means, key=means.__getitem__)} responds least.")
    return said


def of_lesion(found: Lesion) -> list[str]:
    """What a block is worth, and what resizing ones are."""
    costs = {name: error - found.whole for name, error in found.single.items() if error is not None}
    said = [f"The whole network errs on {found.whole:.2f}%."]
    plain = [cost for name, cost in costs.items() if name not in found.resizing]
    if plain:
        said.append(f"Without one block that keeps its shape the error grows by {statistics.median(plain):.2f} points (median).")
    if resizing := [cost for name, cost in costs.items() if name in found.resizing]:
        said.append(f"Without one block that changes its shape it grows by {statistics.median(resizing):.2f} points (median).")
    if costs:
        worst = max(costs, key=costs.__getitem__)
        said.append(f"The block that is missed most is {worst}: {costs[worst]:+.2f} points.")
    if found.several:
        said.append(
            "Without " + ", ".join(f"{k}: {statistics.fmean(v):.1f}%" for k, v in found.several.items()) + " blocks at random."
        )
    if found.orders:
        tau, error = min(found.orders)
        said.append(f"In another order (Kendall's tau {tau:.2f}) it errs on {error:.1f}%.")
    return said


def of_paths(found: Paths) -> list[str]:
    """Which lengths carry the gradient."""
    low, high = found.effective
    mean = sum(k * share for k, share in enumerate(found.carried))
    return [
        f"{found.blocks} blocks make 2^{found.blocks} paths, half of them of {found.blocks / 2:g} blocks or fewer.",
        f"Paths of {low} to {high} blocks, {100 * found.effective_share:.3g}% of all, carry 95% of the gradient.",
        f"The gradient has come through {mean:.1f} blocks on the average.",
        f"A path through all branches has {_ratio(found.norm[-1], found.norm[0])} of the gradient of the one through none.",
    ]


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.1e} times that" if b else "no part"


def of_signal(found: Signal) -> list[str]:
    """Gradients from the end to the start, and what the shortcuts carry."""
    first, last = found.gradients[0][1], found.gradients[-1][1]
    said = [
        f"The gradient at the first block has {first / last:.3g} times the norm of that at the end." if last else "No gradient."
    ]
    for stretch in found.stretches:
        said.append(
            f"{stretch.stage}, {stretch.blocks} blocks: x_L - x_l is the sum of F up to {stretch.difference:.1e} of its size; "
            f"{100 * stretch.identity:.0f}% of the gradient came through the shortcuts alone."
        )
    return said
