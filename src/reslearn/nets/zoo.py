"""The papers' tables as data: a name is a row, and a row is all that create() needs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from reslearn.errors import UserError, did_you_mean
from reslearn.nets.blocks import Body, Order, StrideIn
from reslearn.nets.merges import GATED, Merge
from reslearn.nets.resnet import Pool, ResNet, Stem
from reslearn.nets.shortcuts import Shortcut


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One network. `classes` and `size` (pixels) are the paper's own; `published` its errors in percent, by what they are of.

    `build` is set for a baseline; the other fields are of residual, plain and highway nets.
    """

    name: str
    stem: Stem
    classes: int
    size: int
    source: str
    published: Mapping[str, float] = field(default_factory=dict)
    build: Callable[..., nn.Module] | None = None
    blocks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    body: Body = "basic"
    order: Order = "original"
    merge: Merge = "residual"
    shortcut: Shortcut = "B"
    stride_in: StrideIn = "1x1"
    last_survival: float = 1.0
    gate_bias: float = -6.0

    @property
    def depth(self) -> int:
        """Layers with weights on the longest path, as the papers count them; projections and gates do not count."""
        return 2 + sum(self.blocks) * {"basic": 2, "bottleneck": 3, "single": 1}[self.body]


TEN_CROP = "ImageNet top-1, 10-crop"
TEN_CROP_5 = "ImageNet top-5, 10-crop"
CIFAR_10 = "CIFAR-10"
CIFAR_100 = "CIFAR-100"

# DRL Table 1 (200: IM): depth -> body, blocks of each stage
IMAGENET: dict[int, tuple[Body, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
# DRL Tables 2 (18, plain; shortcut A) and 3 (34: B): top-1, and top-5 where it is printed
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
# DRL Table 6, IM Table 3, SD Table 1, DenseNet Table 2: error on CIFAR-10 and, where printed, CIFAR-100
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
    what = (TEN_CROP, TEN_CROP_5) if name in IMAGENET_ERRORS else (CIFAR_10, CIFAR_100)
    if name == "resnet18":  # DRL Table 2 has it with shortcut A only
        what = (f"{TEN_CROP}, shortcut A",)
    return dict(zip(what, IMAGENET_ERRORS.get(name, CIFAR_ERRORS.get(name, ())), strict=False))


def _imagenet(name: str, depth: int, source: str = "DRL Table 1", **change: Any) -> Spec:
    body, blocks = IMAGENET[depth]
    settings = {"body": body, "blocks": blocks, "widths": (64, 128, 256, 512), "published": _published(name), **change}
    return Spec(name=name, stem="imagenet", classes=1000, size=224, source=source, **settings)


def _cifar(name: str, blocks: int, source: str = "DRL 4.2", **change: Any) -> Spec:
    """Three stages of `blocks` blocks at 32, 16 and 8 px."""
    settings = {"widths": (16, 32, 64), "shortcut": "A", "published": _published(name), **change}
    return Spec(name=name, stem="cifar", classes=10, size=32, source=source, blocks=(blocks,) * 3, **settings)


def _imagenet_rows() -> list[Spec]:
    rows = []
    for depth, (body, _) in IMAGENET.items():
        if depth == 200:  # of the second paper, whose code strides in the 3x3
            rows.append(_imagenet("resnet200", 200, "IM", stride_in="3x3"))
            continue
        rows.append(_imagenet(f"resnet{depth}", depth))
        if body == "bottleneck":
            rows.append(_imagenet(f"resnet{depth}-v1.5", depth, "torchvision", stride_in="3x3"))
    rows += [_imagenet(f"plain{depth}", depth, merge="plain", shortcut="A") for depth in (18, 34)]
    rows += [_imagenet(f"preact-resnet{depth}", depth, "IM", order="full", stride_in="3x3") for depth in IMAGENET]
    return rows


def _cifar_rows() -> list[Spec]:
    bottleneck: dict[str, Any] = {"body": "bottleneck", "shortcut": "B"}
    rows = [_cifar(f"resnet{depth}", (depth - 2) // 6) for depth in (20, 32, 44, 56, 110, 1202)]
    rows += [_cifar(f"plain{depth}", (depth - 2) // 6, merge="plain") for depth in (20, 32, 44, 56, 110)]
    rows += [_cifar(f"resnet{depth}", (depth - 2) // 9, "IM", **bottleneck) for depth in (164, 1001)]
    rows += [_cifar("preact-resnet110", 18, "IM", order="full")]
    rows += [_cifar(f"preact-resnet{depth}", (depth - 2) // 9, "IM", order="full", **bottleneck) for depth in (164, 1001)]
    rows += [_cifar(f"stochastic-resnet{d}", (d - 2) // 6, "SD", last_survival=0.5) for d in (110, 1202)]
    # The paper prints depths and parameters (2.3M, 1.25M), not widths: these are the nearest of three stages.
    highway: dict[str, Any] = {"body": "single", "order": "no-bn", "merge": "exclusive-gate"}
    rows.append(_cifar("highway-19", 6, "Highway", **highway, widths=(32, 64, 128), gate_bias=-2.0))
    rows[-1] = replace(rows[-1], blocks=(5, 6, 6))
    rows.append(_cifar("highway-32", 10, "Highway", **highway, widths=(24, 44, 68), gate_bias=-4.0))
    return rows


def _baseline(name: str, module: str) -> Spec:
    def build(classes: int, channels: int) -> nn.Module:
        from reslearn.nets.baselines import of_torchvision  # torchvision takes a second to import

        return of_torchvision(module)(classes, channels)

    return Spec(name=name, stem="imagenet", classes=1000, size=224, source="torchvision", published=_published(name), build=build)


def _densenet(name: str, depth: int, growth: int, bc: bool) -> Spec:
    def build(classes: int, channels: int) -> nn.Module:
        from reslearn.nets.baselines import cifar_densenet

        return cifar_densenet(depth, growth, bc)(classes, channels)

    return Spec(name=name, stem="cifar", classes=10, size=32, source="DenseNet", published=_published(name), build=build)


def _baseline_rows() -> list[Spec]:
    vgg = [f"vgg{depth}{kind}" for kind in ("", "-bn") for depth in (11, 13, 16, 19)]
    dense = [f"densenet{depth}" for depth in (121, 161, 169, 201)]
    rows = [_baseline(name, name.replace("-", "_")) for name in ("alexnet", *vgg, "googlenet", *dense)]
    return [*rows, _densenet("densenet-40-12", 40, 12, False), _densenet("densenet-bc-100-12", 100, 12, True)]


TABLE: dict[str, Spec] = {row.name: row for row in [*_imagenet_rows(), *_cifar_rows(), *_baseline_rows()]}


def models(pattern: str = "*") -> list[str]:
    """Names of the table's networks that match a shell pattern, in the table's order."""
    return [name for name in TABLE if fnmatchcase(name, pattern)]


def spec(name: str) -> Spec:
    """The row of a network. Besides the table's, `resnetD`, `plainD` and `preact-resnetD` of any depth D = 6n + 2 have the CIFAR
    shape.

    Raises UserError, naming the nearest known names, for any other name.
    """
    if name in TABLE:
        return TABLE[name]
    match = re.fullmatch(r"(resnet|plain|preact-resnet)([1-9]\d{0,3})", name)
    if match and int(match[2]) >= 8 and (int(match[2]) - 2) % 6 == 0:
        kind: dict[str, Any] = {"plain": {"merge": "plain"}, "preact-resnet": {"order": "full", "source": "IM"}}.get(match[1], {})
        return _cifar(name, (int(match[2]) - 2) // 6, **kind)
    raise UserError(f"no network called '{name}'{did_you_mean(name, TABLE)}")


# Options of create(): what each may be, (low, high) for a number
OPTIONS: dict[str, tuple[Any, ...]] = {
    "shortcut": get_args(Shortcut),
    "stride_in": get_args(StrideIn),
    "order": tuple(order for order in get_args(Order) if order != "no-bn"),
    "merge": tuple(merge for merge in get_args(Merge) if merge != "plain"),
    "pool": get_args(Pool),
    "zero_init_last_gamma": (False, True),
    "gate_bias": (-100.0, 100.0),
    "last_survival": (0.0, 1.0),
    "per_sample": (False, True),
}


def _does_not_apply(row: Spec, options: Mapping[str, Any]) -> dict[str, str]:
    """option -> why it cannot be given to this network."""
    if row.build is not None:
        return dict.fromkeys(OPTIONS, "it is a baseline as published")
    why: dict[str, str] = {}
    if row.merge == "plain":
        why |= dict.fromkeys(("shortcut", "merge", "last_survival", "per_sample"), "it is a plain network: it has no shortcuts")
        why["zero_init_last_gamma"] = "it is a plain network: its signal would stop"
    if row.order == "no-bn":
        why |= dict.fromkeys(("order", "merge", "zero_init_last_gamma"), "it is a highway network")
    if row.body != "bottleneck":
        why["stride_in"] = "it has no 1x1 layer in its body"
    if row.stem != "imagenet":
        why["pool"] = "it has no max pool"
    if options.get("merge", row.merge) not in GATED:
        why.setdefault("gate_bias", "its merge has no gate")
    if options.get("last_survival", row.last_survival) == 1:
        why.setdefault("per_sample", "its blocks always survive: set last_survival below 1")
    if options.get("order", row.order) not in ("original", "relu-only"):
        why.setdefault("zero_init_last_gamma", "its branches do not end in BN")
    return why


def applies(row: Spec, option: str) -> bool:
    """Whether an option of create() can be given to this network."""
    return option not in _does_not_apply(row, {})


def check_options(row: Spec, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that create() does not know, a value it cannot take, or one that does not apply."""
    why = _does_not_apply(row, options)
    for key, value in options.items():
        if key not in OPTIONS:
            raise UserError(f"no option '{key}' of network '{row.name}'{did_you_mean(key, OPTIONS)}")
        known = OPTIONS[key]
        if isinstance(known[0], float):
            if isinstance(value, bool) or not isinstance(value, int | float) or not known[0] <= value <= known[1]:
                raise UserError(f"{key}={value!r}: must be a number from {known[0]:g} to {known[1]:g}")
        elif value not in known:
            raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, known))}")
        if key in why:
            raise UserError(f"{key} does not apply to '{row.name}', for {why[key]}; leave it out")


def create(name: str, classes: int | None = None, channels: int = 3, **options: Any) -> nn.Module:
    """A freshly initialized network (He initialization; seed it with torch.manual_seed).

    name: of the table (see models()), such as "resnet20" or "plain34"; `resnet50` is the paper's, with the stride in the
    1x1, `resnet50-v1.5` torchvision's. classes: the paper's own number unless given. channels: of the input.
    options: shortcut "A", "A-centered", "A-average", "A-average-centered", "B" or "C" (DRL 3.3); stride_in "1x1" or "3x3"
    (bottlenecks); order, merge, gate_bias (IM Tables 1 and 2); last_survival, per_sample (SD); pool "padded" or "ceil" (the
    Caffe release's); zero_init_last_gamma.
    Raises UserError for an unknown name or option, a value that does not apply, classes < 2 or channels < 1.
    """
    row = spec(name)
    check_options(row, options)
    classes = row.classes if classes is None else classes
    if not isinstance(classes, int) or not isinstance(channels, int):
        raise UserError(f"classes={classes!r}, channels={channels!r}: must be whole numbers")
    if classes < 2:
        raise UserError(f"classes={classes}: a network needs at least 2 classes")
    if channels < 1:
        raise UserError(f"channels={channels}: an image has at least 1 channel")
    if row.build is not None:
        return row.build(classes, channels)
    fields = ("stem", "body", "order", "merge", "shortcut", "stride_in", "last_survival", "gate_bias")
    settings = {key: getattr(row, key) for key in fields} | options
    return ResNet(row.blocks, row.widths, classes=classes, channels=channels, **settings)
