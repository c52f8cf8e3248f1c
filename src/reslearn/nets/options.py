"""The options of a network: values, source, and which networks they apply to.

Used by `create`, the rows of the zoo, the `net` section of a recipe and the card of a model file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args

from torch import nn

from reslearn.errors import UserError, did_you_mean

StemKind = Literal["imagenet", "cifar"]
BlockKind = Literal["basic", "bottleneck", "plain", "highway"]

Shortcut = Literal["A", "A-centered", "A-average", "A-average-centered", "B", "C"]
StrideIn = Literal["1x1", "3x3"]
Order = Literal["original", "bn-after-addition", "relu-before-addition", "relu-only", "full"]
Merge = Literal["residual", "constant", "exclusive-gate", "shortcut-gate", "dropout"]
Pool = Literal["padded", "ceil"]

Rule = tuple[Callable[["Spec"], bool], str]  # whether an option is excluded for a network (with all its options), and why
PLAIN: Rule = (lambda net: net.plain, "it is a plain network: it has no shortcuts")
STOPS: Rule = (lambda net: net.plain, "it is a plain network: its output would be constant")
HIGHWAY: Rule = (lambda net: net.block == "highway", "it is a highway network")
NO_1X1: Rule = (lambda net: net.block != "bottleneck", "it has no 1x1 layer in its body")
NO_GATE: Rule = (lambda net: net.plain or net.merge not in ("exclusive-gate", "shortcut-gate"), "its merge has no gate")
SURVIVES: Rule = (lambda net: net.last_survival == 1, "stochastic depth is off: set last_survival below 1")
NO_POOL: Rule = (lambda net: net.stem != "imagenet", "it has no max pool")
NO_LAST_BN: Rule = (lambda net: net.order not in ("original", "relu-only"), "its branches do not end in BN")


@dataclass(frozen=True)
class Option:
    """about: one-line description with the source. between: range of a number, inclusive."""

    about: str
    rules: tuple[Rule, ...]
    between: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class NetOptions:
    """The options of residual, plain and highway networks; the defaults are the paper's."""

    shortcut: Annotated[
        Shortcut, Option("A: zero padding, B: projection where the shape changes, C: projection in every block (DRL 3.3)", (PLAIN,))
    ] = "B"
    stride_in: Annotated[StrideIn, Option("bottleneck convolution with the stride; 3x3: torchvision's v1.5", (NO_1X1,))] = "1x1"
    order: Annotated[Order, Option("order of convolution, BN, ReLU and addition (IM Figure 4)", (HIGHWAY,))] = "original"
    merge: Annotated[Merge, Option("how branch and shortcut are combined (IM Table 1)", (PLAIN, HIGHWAY))] = "residual"
    gate_bias: Annotated[float, Option("initial bias of the gate (IM 3.1)", (NO_GATE,), between=(-100, 100))] = -6.0
    last_survival: Annotated[
        float, Option("stochastic depth: survival probability of the last block (SD, equation 4)", (PLAIN,), between=(0, 1))
    ] = 1.0
    per_sample: Annotated[
        bool, Option("stochastic depth: a gate per image instead of one per mini-batch (as published)", (PLAIN, SURVIVES))
    ] = False
    pool: Annotated[Pool, Option("max pool of the stem; ceil: no padding, sizes rounded up (Caffe)", (NO_POOL,))] = "padded"
    zero_init_last_gamma: Annotated[
        bool, Option("initialize every branch to zero (Goyal et al., 2017, 5.1)", (STOPS, HIGHWAY, NO_LAST_BN))
    ] = False


OPTIONS: dict[str, tuple[Any, Option]] = {field.name: get_args(field.type) for field in fields(NetOptions)}
"""name -> (type, Option)."""


@dataclass(frozen=True, kw_only=True)
class Spec(NetOptions):
    """A row of the zoo's table. `classes` and `size` (pixels) are the paper's; `published` maps a data set to the error in percent.

    blocks, widths: number and width of the blocks, per stage. build: builder (classes, channels) of a baseline, which has no
    blocks or options.
    """

    name: str
    stem: StemKind
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
        """Whether the blocks have no shortcuts."""
        return self.block == "plain"

    @property
    def depth(self) -> int:
        """Number of layers with weights on the longest path, without projections and gates, as the papers count them."""
        return 2 + sum(self.blocks) * {"basic": 2, "bottleneck": 3, "plain": 2, "highway": 1}[self.block]


def _why_excluded(net: Spec, option: str) -> str | None:
    """Why an option does not apply to a network (with all its options), or None."""
    if net.build is not None:
        return "it is a baseline as published"
    return next((why for excluded, why in OPTIONS[option][1].rules if excluded(net)), None)


def applies(net: Spec, option: str) -> bool:
    """Whether an option of create() can be given to this network."""
    return not _why_excluded(net, option)


def check_options(net: Spec, options: Mapping[str, Any]) -> Spec:
    """Returns the network with these options. Raises UserError for an unknown or inapplicable option or an invalid value."""
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
        if why := _why_excluded(chosen, key):
            raise UserError(f"{key} does not apply to '{net.name}' ({why}); leave it out")
    return chosen
