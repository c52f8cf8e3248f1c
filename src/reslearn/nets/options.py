"""What can be chosen of a network: each option once, with its values, its source and where it applies.

`create`, the zoo's rows, the `net` section of a recipe and the card of a model all take their options from here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args

from torch import nn

from reslearn.errors import UserError, did_you_mean

Stem = Literal["imagenet", "cifar"]
BlockKind = Literal["basic", "bottleneck", "plain", "highway"]

Shortcut = Literal["A", "A-centered", "A-average", "A-average-centered", "B", "C"]
StrideIn = Literal["1x1", "3x3"]
Order = Literal["original", "bn-after-addition", "relu-before-addition", "relu-only", "full"]
Merge = Literal["residual", "constant", "exclusive-gate", "shortcut-gate", "dropout"]
Pool = Literal["padded", "ceil"]

GATED = ("exclusive-gate", "shortcut-gate")
HIGHWAY = "it is a highway network"
PLAIN = "it is a plain network: it has no shortcuts"


@dataclass(frozen=True)
class Option:
    """about: the description of an option, with its source. why_not: of a network with all of its options, why this one does not
    apply to it, or something false. between: the range of a number.
    """

    about: str
    why_not: Callable[["Spec"], str | bool]
    between: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class NetOptions:
    """The options of residual, plain and highway networks; the defaults are the paper's."""

    shortcut: Annotated[
        Shortcut,
        Option(
            "A: zero-padded identity, B: projection where the shape changes, C: projection in every block (DRL 3.3)",
            lambda net: net.plain and PLAIN,
        ),
    ] = "B"
    stride_in: Annotated[
        StrideIn,
        Option(
            "convolution of a bottleneck that has the stride; 3x3 is torchvision's, known as v1.5",
            lambda net: net.block != "bottleneck" and "it has no 1x1 layer in its body",
        ),
    ] = "1x1"
    order: Annotated[
        Order,
        Option("order of convolution, BN, ReLU and addition (IM Figure 4)", lambda net: net.block == "highway" and HIGHWAY),
    ] = "original"
    merge: Annotated[
        Merge,
        Option(
            "how branch and shortcut become one (IM Table 1)",
            lambda net: (net.plain and PLAIN) or (net.block == "highway" and HIGHWAY),
        ),
    ] = "residual"
    gate_bias: Annotated[
        float,
        Option(
            "initial bias of the merge's gate (IM 3.1)",
            lambda net: (net.plain or net.merge not in GATED) and "its merge has no gate",
            between=(-100, 100),
        ),
    ] = -6.0
    last_survival: Annotated[
        float,
        Option(
            "stochastic depth: probability that the last branch is kept, falling linearly from 1 (SD, equation 4)",
            lambda net: net.plain and PLAIN,
            between=(0, 1),
        ),
    ] = 1.0
    per_sample: Annotated[
        bool,
        Option(
            "stochastic depth: one gate for each image instead of one for the mini-batch as published",
            lambda net: (
                (net.plain and PLAIN) or (net.last_survival == 1 and "its blocks always survive: set last_survival below 1")
            ),
        ),
    ] = False
    pool: Annotated[
        Pool,
        Option(
            "max pool of the stem; ceil is the Caffe release's: no padding, sizes rounded up",
            lambda net: net.stem != "imagenet" and "it has no max pool",
        ),
    ] = "padded"
    zero_init_last_gamma: Annotated[
        bool,
        Option(
            "every branch starts at zero (Goyal et al., 2017, 5.1)",
            lambda net: (
                (net.plain and "it is a plain network: its signal would stop")
                or (net.block == "highway" and HIGHWAY)
                or (net.order not in ("original", "relu-only") and "its branches do not end in BN")
            ),
        ),
    ] = False


OPTIONS: dict[str, tuple[Any, Option]] = {field.name: get_args(field.type) for field in fields(NetOptions)}
"""name -> its type and what is said of it."""


@dataclass(frozen=True, kw_only=True)
class Spec(NetOptions):
    """One network. `classes` and `size` (pixels) are the paper's own; `published` its errors in percent, by what they are of.

    blocks, widths: of each stage. build: makes a baseline, which has no block, stages or options.
    """

    name: str
    stem: Stem
    classes: int
    size: int
    source: str
    published: Mapping[str, float] = field(default_factory=dict)
    build: Callable[[int, int], nn.Module] | None = None
    block: BlockKind = "basic"
    blocks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether its blocks have no shortcuts."""
        return self.block == "plain"

    @property
    def depth(self) -> int:
        """Layers with weights on the longest path, as the papers count them; projections and gates do not count."""
        return 2 + sum(self.blocks) * {"basic": 2, "bottleneck": 3, "plain": 2, "highway": 1}[self.block]


def _why_not(net: Spec, option: str) -> str | bool:
    return "it is a baseline as published" if net.build is not None else OPTIONS[option][1].why_not(net)


def applies(net: Spec, option: str) -> bool:
    """Whether an option of create() can be given to this network."""
    return not _why_not(net, option)


def check_options(net: Spec, options: Mapping[str, Any]) -> Spec:
    """The network with these options. Raises UserError for an unknown one, a value it cannot take, or one that does not apply."""
    if unknown := next((key for key in options if key not in OPTIONS), None):
        raise UserError(f"no option '{unknown}' of network '{net.name}'{did_you_mean(unknown, OPTIONS)}")
    chosen = replace(net, **options)
    for key, value in options.items():
        kind, option = OPTIONS[key]
        if option.between:
            low, high = option.between
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{key}={value!r}: must be a number from {low:g} to {high:g}")
        elif value not in (values := get_args(kind) or (False, True)):
            raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, values))}")
        if why := _why_not(chosen, key):
            raise UserError(f"{key} does not apply to '{net.name}', for {why}; leave it out")
    return chosen
