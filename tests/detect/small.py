"""Small detectors, images and targets."""

import torch
from torch import Tensor, nn

from reslearn.detect import Detector, create_detector

TINY = {"min_size": 32, "max_size": 64, "proposals": (60, 24), "regions": 16, "score": 0.05}


def detector(net: str = "resnet8", seed: int = 0, classes: int = 3, **options: object) -> Detector:
    """A detector in evaluation mode, with predictions that differ between regions."""
    torch.manual_seed(seed)
    if options.get("kind", "c4") == "c4":
        options = {"anchors": (8, 16), **options}
    model = create_detector(net, classes, **{**TINY, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 1, 4)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    heads = (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred)
    for layer in heads:  # type: ignore[assignment]
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)  # type: ignore[arg-type]
    return model.eval()


def pictures(*sizes: tuple[int, int], seed: int = 5, channels: int = 3) -> list[Tensor]:
    """Smooth random images of these heights and widths."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(1, channels, h // 8, w // 8, generator=generator) for h, w in sizes]
    return [nn.functional.interpolate(c, size=size, mode="bilinear")[0] for c, size in zip(coarse, sizes, strict=True)]


def target(image: Tensor, *boxes: tuple[float, float, float, float], label: int = 1) -> dict[str, Tensor]:
    """A target of objects of one class, whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), *image.shape[-2:], dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    labels = torch.full((len(boxes),), label, dtype=torch.int64)
    return {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": labels, "masks": masks}
