"""The papers' tables as data: a name is a row, and a row is all that create() needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from reslearn.errors import UserError, did_you_mean
from reslearn.nets.blocks import Body, Merge, Shortcut, StrideIn
from reslearn.nets.resnet import ResNet, Stem


@dataclass(frozen=True)
class Spec:
    """One network. `classes` and `size` (pixels) are the paper's own; `published` its errors in percent."""

    name: str
    stem: Stem
    body: Body
    merge: Merge
    blocks: tuple[int, ...]
    shortcut: Shortcut
    classes: int
    size: int
    stride_in: StrideIn = "1x1"
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage (before a bottleneck's fourfold expansion)."""
        return tuple((64 if self.stem == "imagenet" else 16) << i for i in range(len(self.blocks)))


# DRL Table 1. Published: 10-crop top-1 of Tables 2 (18 and 34, option A) and 3.
IMAGENET: dict[int, tuple[Body, tuple[int, ...], Shortcut]] = {
    18: ("basic", (2, 2, 2, 2), "B"),
    34: ("basic", (3, 4, 6, 3), "B"),
    50: ("bottleneck", (3, 4, 6, 3), "B"),
    101: ("bottleneck", (3, 4, 23, 3), "B"),
    152: ("bottleneck", (3, 8, 36, 3), "B"),
}
IMAGENET_TOP1 = {
    "resnet18": 27.88,
    "resnet34": 24.52,
    "resnet50": 22.85,
    "resnet101": 21.75,
    "resnet152": 21.43,
    "plain18": 27.94,
    "plain34": 28.54,
}
# DRL Table 6: test error on CIFAR-10 by depth 6n + 2.
CIFAR_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}


def _imagenet_rows() -> list[Spec]:
    rows = []
    for depth, (body, blocks, shortcut) in IMAGENET.items():
        published = {"top1": IMAGENET_TOP1[f"resnet{depth}"]}
        row = Spec(f"resnet{depth}", "imagenet", body, "residual", blocks, shortcut, 1000, 224, published=published)
        rows.append(row)
        if body == "bottleneck":  # torchvision's and timm's variant; the paper prints no number for it
            rows.append(replace(row, name=f"{row.name}-v1.5", stride_in="3x3", published={}))
    for depth in (18, 34):
        body, blocks, _ = IMAGENET[depth]
        published = {"top1": IMAGENET_TOP1[f"plain{depth}"]}
        rows.append(Spec(f"plain{depth}", "imagenet", body, "plain", blocks, "A", 1000, 224, published=published))
    return rows


def _cifar_row(merge: Merge, depth: int) -> Spec:
    """Any depth 6n + 2: n blocks of two 3x3 layers at each of 32, 16 and 8 px (DRL 4.2)."""
    kind = "resnet" if merge == "residual" else "plain"
    published = {"top1": CIFAR_ERROR[depth]} if merge == "residual" and depth in CIFAR_ERROR else {}
    return Spec(f"{kind}{depth}", "cifar", "basic", merge, ((depth - 2) // 6,) * 3, "A", 10, 32, published=published)


TABLE: dict[str, Spec] = {
    row.name: row
    for row in [
        *_imagenet_rows(),
        *(_cifar_row("residual", depth) for depth in (20, 32, 44, 56, 110, 1202)),
        *(_cifar_row("plain", depth) for depth in (20, 32, 44, 56, 110)),
    ]
}


def models(pattern: str = "*") -> list[str]:
    """Names of the table's networks that match a shell pattern, in the table's order."""
    return [name for name in TABLE if fnmatchcase(name, pattern)]


def spec(name: str) -> Spec:
    """The row of a network. Besides the table's, `resnetD` and `plainD` of any depth D = 6n + 2 have the CIFAR shape.

    Raises UserError, naming the nearest known names, for any other name.
    """
    if name in TABLE:
        return TABLE[name]
    match = re.fullmatch(r"(resnet|plain)([1-9]\d{0,3})", name)
    if match and int(match[2]) >= 8 and (int(match[2]) - 2) % 6 == 0:
        return _cifar_row("residual" if match[1] == "resnet" else "plain", int(match[2]))
    raise UserError(f"no network called '{name}'{did_you_mean(name, TABLE)}")


# Options of create() and what each may be.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "shortcut": get_args(Shortcut),
    "stride_in": get_args(StrideIn),
    "zero_init_last_gamma": (False, True),
}


def check_options(row: Spec, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that create() does not know, a value it cannot take, or one that does not apply."""
    for key, value in options.items():
        if key not in OPTIONS:
            raise UserError(f"no option '{key}' of network '{row.name}'{did_you_mean(key, OPTIONS)}")
        if value not in OPTIONS[key]:
            raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, OPTIONS[key]))}")
    if row.merge == "plain" and "shortcut" in options:
        raise UserError(f"'{row.name}' is a plain network: it has no shortcuts, so leave shortcut out")
    if row.merge == "plain" and options.get("zero_init_last_gamma"):
        raise UserError(f"'{row.name}' is a plain network: zero_init_last_gamma would stop its signal; leave it out")
    if row.body != "bottleneck" and "stride_in" in options:
        raise UserError(f"'{row.name}' has no 1x1 layer in its body, so stride_in does not apply; leave it out")


def create(name: str, classes: int | None = None, channels: int = 3, **options: Any) -> ResNet:
    """A freshly initialised network (He initialisation; seed it with torch.manual_seed).

    name: of the table (see models()), such as "resnet20" or "plain34"; `resnet50` is the paper's, with the stride in the
    1x1, `resnet50-v1.5` torchvision's. classes: the paper's own number unless given. channels: of the input.
    options: shortcut "A", "B" or "C" (DRL 3.3); stride_in "1x1" or "3x3" (bottlenecks); zero_init_last_gamma.
    Raises UserError for an unknown name or option, a value that does not apply, classes < 2 or channels < 1.
    """
    row = spec(name)
    check_options(row, options)
    classes = row.classes if classes is None else classes
    if classes < 2:
        raise UserError(f"classes={classes}: a network needs at least 2 classes")
    if channels < 1:
        raise UserError(f"channels={channels}: an image has at least 1 channel")
    settings = {"shortcut": row.shortcut, "stride_in": row.stride_in, **options}
    return ResNet(
        row.blocks,
        row.widths,
        stem=row.stem,
        body=row.body,
        merge=row.merge,
        classes=classes,
        channels=channels,
        **settings,
    )
