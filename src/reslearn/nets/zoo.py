"""The papers' tables as data: one row per network, from which create() builds it."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from reslearn.errors import UserError, did_you_mean
from reslearn.nets.options import BlockKind, Spec, check_options
from reslearn.nets.resnet import ResNet

TEN_CROP = "ImageNet top-1, 10-crop"
TEN_CROP_5 = "ImageNet top-5, 10-crop"
CIFAR_10 = "CIFAR-10"
CIFAR_100 = "CIFAR-100"

# DRL Table 1 (200: IM): depth -> block, number of blocks in conv2_x, conv3_x, conv4_x, conv5_x
WIDTHS = (64, 128, 256, 512)
IMAGENET: dict[int, tuple[BlockKind, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
# DRL Tables 2 (18, plain; shortcut A) and 3 (34: B): top-1 and, if printed, top-5 error
IMAGENET_ERRORS: dict[str, tuple[float, ...]] = {
    "resnet18": (27.88,),
    "resnet34": (24.52, 7.46),
    "resnet50": (22.85, 6.71),
    "resnet101": (21.75, 6.05),
    "resnet152": (21.43, 5.71),
    "plain18": (27.94,),
    "plain34": (28.54, 10.02),
    "vgg16": (28.07, 9.33),
}
# DRL Table 6, IM Table 3, SD Table 1, DenseNet Table 2: error on CIFAR-10 and, if printed, CIFAR-100
CIFAR_ERRORS: dict[str, tuple[float, ...]] = {
    "resnet20": (8.75,),
    "resnet32": (7.51,),
    "resnet44": (7.17,),
    "resnet56": (6.97,),
    "resnet110": (6.43,),
    "resnet1202": (7.93,),
    "resnet164": (5.93, 25.16),
    "resnet1001": (7.61, 27.82),
    "preact-resnet110": (6.37,),
    "preact-resnet164": (5.46, 24.33),
    "preact-resnet1001": (4.92, 22.71),
    "stochastic-resnet110": (5.25, 24.58),
    "stochastic-resnet1202": (4.91,),
    "highway-19": (7.54,),
    "highway-32": (8.80,),
    "densenet-40-12": (5.24, 24.42),
    "densenet-bc-100-12": (4.51, 22.27),
}


def _published(name: str) -> dict[str, float]:
    metrics = (TEN_CROP, TEN_CROP_5) if name in IMAGENET_ERRORS else (CIFAR_10, CIFAR_100)
    if name == "resnet18":  # DRL Table 2 has it with shortcut A only
        metrics = (f"{TEN_CROP}, shortcut A",)
    return dict(zip(metrics, IMAGENET_ERRORS.get(name, CIFAR_ERRORS.get(name, ())), strict=False))


def _imagenet(name: str, depth: int, source: str = "DRL Table 1", **change: Any) -> Spec:
    block, blocks = IMAGENET[depth]
    settings = {"block": block, "blocks": blocks, "widths": WIDTHS, "published": _published(name), **change}
    return Spec(name=name, stem="imagenet", classes=1000, size=224, source=source, **settings)


def _cifar(name: str, blocks: int | tuple[int, int, int], source: str = "DRL 4.2", **change: Any) -> Spec:
    """Three stages at 32, 16 and 8 px. blocks: number of blocks per stage."""
    counts = blocks if isinstance(blocks, tuple) else (blocks,) * 3
    settings = {"widths": (16, 32, 64), "shortcut": "A", "published": _published(name), **change}
    return Spec(name=name, stem="cifar", classes=10, size=32, source=source, blocks=counts, **settings)


def _imagenet_rows() -> Iterator[Spec]:
    for depth, (block, _) in IMAGENET.items():
        if depth == 200:  # from IM, whose code has the stride in the 3x3
            yield _imagenet("resnet200", 200, "IM", stride_in="3x3")
            continue
        yield _imagenet(f"resnet{depth}", depth)
        if block == "bottleneck":
            yield _imagenet(f"resnet{depth}-v1.5", depth, "torchvision", stride_in="3x3")
    for depth in (18, 34):
        yield _imagenet(f"plain{depth}", depth, block="plain", shortcut="A")
    for depth in IMAGENET:
        yield _imagenet(f"preact-resnet{depth}", depth, "IM", order="full", stride_in="3x3")


def _cifar_rows() -> Iterator[Spec]:
    bottleneck: dict[str, Any] = {"block": "bottleneck", "shortcut": "B"}
    yield from (_cifar(f"resnet{depth}", (depth - 2) // 6) for depth in (20, 32, 44, 56, 110, 1202))
    yield from (_cifar(f"plain{depth}", (depth - 2) // 6, block="plain") for depth in (20, 32, 44, 56, 110))
    yield from (_cifar(f"resnet{depth}", (depth - 2) // 9, "IM", **bottleneck) for depth in (164, 1001))
    yield _cifar("preact-resnet110", 18, "IM", order="full")
    yield from (_cifar(f"preact-resnet{depth}", (depth - 2) // 9, "IM", order="full", **bottleneck) for depth in (164, 1001))
    yield from (_cifar(f"stochastic-resnet{depth}", (depth - 2) // 6, "SD", last_survival=0.5) for depth in (110, 1202))
    # The paper prints depths and parameters (2.3M, 1.25M) but no widths: these come closest with three stages.
    highway: dict[str, Any] = {"block": "highway", "merge": "exclusive-gate"}
    yield _cifar("highway-19", (5, 6, 6), "Highway", **highway, widths=(32, 64, 128), gate_bias=-2.0)
    yield _cifar("highway-32", 10, "Highway", **highway, widths=(24, 44, 68), gate_bias=-4.0)


def _baseline(name: str, module: str) -> Spec:
    def build(classes: int, channels: int) -> nn.Module:
        from reslearn.nets.baselines import torchvision_net  # importing torchvision takes a second

        return torchvision_net(module, classes, channels)

    return Spec(name=name, stem="imagenet", classes=1000, size=224, source="torchvision", published=_published(name), build=build)


def _densenet(name: str, depth: int, growth: int, bc: bool) -> Spec:
    def build(classes: int, channels: int) -> nn.Module:
        from reslearn.nets.baselines import CifarDenseNet

        return CifarDenseNet(depth, growth, bc, classes, channels)

    return Spec(name=name, stem="cifar", classes=10, size=32, source="DenseNet", published=_published(name), build=build)


def _baseline_rows() -> Iterator[Spec]:
    vgg = [f"vgg{depth}{kind}" for kind in ("", "-bn") for depth in (11, 13, 16, 19)]
    dense = [f"densenet{depth}" for depth in (121, 161, 169, 201)]
    yield from (_baseline(name, name.replace("-", "_")) for name in ("alexnet", *vgg, "googlenet", *dense))
    yield _densenet("densenet-40-12", 40, 12, False)
    yield _densenet("densenet-bc-100-12", 100, 12, True)


TABLE: dict[str, Spec] = {row.name: row for row in [*_imagenet_rows(), *_cifar_rows(), *_baseline_rows()]}


def models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, in the order of the table."""
    return [name for name in TABLE if fnmatchcase(name, pattern)]


def spec(name: str) -> Spec:
    """Returns the row of a network: of the table, or `resnetD`, `plainD` or `preact-resnetD` for CIFAR of any depth D = 6n + 2.

    Raises UserError, suggesting the nearest names, for any other name.
    """
    if name in TABLE:
        return TABLE[name]
    match = re.fullmatch(r"(resnet|plain|preact-resnet)([1-9]\d{0,3})", name)
    if match and int(match[2]) >= 8 and (int(match[2]) - 2) % 6 == 0:
        kind: dict[str, Any] = {"plain": {"block": "plain"}, "preact-resnet": {"order": "full", "source": "IM"}}.get(match[1], {})
        return _cifar(name, (int(match[2]) - 2) // 6, **kind)
    raise UserError(f"no network called '{name}'{did_you_mean(name, TABLE)}")


def create(name: str, classes: int | None = None, channels: int = 3, **options: Any) -> nn.Module:
    """Creates a randomly initialized network (He initialization; set the seed with torch.manual_seed).

    name: network name, see models(), such as "resnet20" or "plain34". `resnet50` is the paper's, with the stride in the 1x1;
    `resnet50-v1.5` is torchvision's. classes: default: as in the paper. channels: input channels.
    options: fields of NetOptions, such as shortcut="C"; default: those of the network.
    Raises UserError for an unknown name or option, a value that does not apply, classes < 2 or channels < 1.
    """
    row = check_options(spec(name), options)
    classes = row.classes if classes is None else classes
    if not isinstance(classes, int) or not isinstance(channels, int):
        raise UserError(f"classes={classes!r}, channels={channels!r}: must be integers")
    if classes < 2:
        raise UserError(f"classes={classes}: a network needs at least 2 classes")
    if channels < 1:
        raise UserError(f"channels={channels}: an image has at least 1 channel")
    if row.build is not None:
        return row.build(classes, channels)
    return ResNet(row, classes, channels)
