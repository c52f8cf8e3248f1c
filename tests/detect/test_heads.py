"""Detections and losses in one pass; which RoIAlign implementation runs."""

from collections.abc import Iterator

import pytest
import torch
import torchvision.models.detection.roi_heads
import torchvision.ops.poolers

import reslearn.detect.heads
from detect.small import detector, pictures, target

PLACES = (reslearn.detect.heads, torchvision.ops.poolers, torchvision.models.detection.roi_heads)
KINDS = [("resnet8", {}), ("resnet8", {"masks": True}), ("resnet18", {"kind": "fpn", "masks": True})]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("net", "options"), KINDS, ids=["c4", "c4 with masks", "pyramid with masks"])
def test_detections_and_losses_in_one_pass(net: str, options: dict) -> None:
    model, images = detector(net, **options), pictures((48, 64), (56, 40))
    targets = [target(images[0], (5, 5, 30, 30), (10, 10, 50, 40)), target(images[1], (3, 3, 20, 20))]
    with torch.no_grad():
        expected = model(images)
        torch.manual_seed(3)
        losses = model.losses(images, targets)
        torch.manual_seed(3)
        found, own = model.detect_with_losses(images, targets)
    assert list(own) == list(losses) and all(torch.equal(own[name], losses[name]) for name in losses)
    for mine, one in zip(found, expected, strict=True):
        assert len(one["boxes"]) > 3 and mine.keys() == one.keys()
        assert all(torch.equal(mine[key], one[key]) for key in one)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("net", "options"), KINDS, ids=["c4", "c4 with masks", "pyramid with masks"])
@pytest.mark.parametrize("warn_only", [True, False])
def test_roi_align_uses_the_kernel_unless_determinism_is_strict(
    net: str, options: dict, warn_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, torchvision uses its compiled Python version if deterministic algorithms are enabled."""
    seen = []
    for place in PLACES:
        kernel = place.roi_align

        def watched(*arguments: object, kernel: object = kernel, **more: object) -> torch.Tensor:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return kernel(*arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(place, "roi_align", watched)
    model, images = detector(net, **options), pictures((48, 64))
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    sum(model.losses(images, [target(images[0], (5, 5, 30, 30), (10, 10, 50, 40))]).values()).backward()
    with torch.no_grad():
        model(images)
    assert len(seen) >= (4 if options.get("masks") else 2) and set(seen) == {not warn_only}
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
