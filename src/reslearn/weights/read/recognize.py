"""Identifies the network of a state dict and converts its tensors to our names.

Our names are torchvision's, so most files need few changes or none. Shapes do not determine everything (the position of a
bottleneck's stride, the padding of shortcut A, plain or residual): such assumptions are reported in `why`, and `net` and
`options` override them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from reslearn.errors import UserError
from reslearn.nets import create, models, spec
from reslearn.nets.options import applies, check_options
from reslearn.weights.head import shape_text

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")  # checkpoint keys of the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of nn.DataParallel, torch.compile, and wrapper modules
RENAMES = (  # pattern, replacement, note
    (r"^linear\.", "fc.", "renamed 'linear' to 'fc'"),
    (r"\.shortcut\.(?=\d\.)", ".downsample.", "renamed 'shortcut' to 'downsample'"),
    (r"(?<=\.)(norm|conv)\.([12])(?=\.)", r"\1\2", "renamed DenseNet's older names such as 'norm.1' to 'norm1'"),
)
AUXILIARY = re.compile(r"^aux(1|2|_logits)\.")
COUNTER = "num_batches_tracked"  # BN's batch count: has no effect, and is missing from files older than 2018
OWN = frozenset(("layer1.0.conv1.weight", "layer1.0.bn1.weight"))  # names in torchvision and here
ROLES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Recognized:
    """An identified network: name, options, tensors with our names, number of classes and input channels, and the reasons."""

    net: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    classes: int
    channels: int
    why: str


def unwrap(content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the state dict in a file's content, without wrappers and prefixes, and notes. Raises UserError if there is none."""
    notes: list[str] = []
    for _ in range(3):
        key = next((key for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content = content[key]
        notes.append(f"weights read from key '{key}'")
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"contains a {kind}, not a state dict; save one with torch.save(model.state_dict(), path)")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # a counter of torch's AveragedModel
    if not tensors:
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "none"
        raise UserError(f"contains no tensors (keys: {keys}); the weights must be at the top or under {', '.join(WRAPPERS)}")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"removed prefix '{prefix}'")
    return tensors, notes


def rename(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Converts known foreign names to ours and returns notes. Raises UserError if two tensors get the same name."""
    notes = []
    renamed = dict(tensors)
    for pattern, replacement, note in RENAMES:
        after = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
        if len(after) < len(renamed):
            raise UserError(f"has tensors with both names ({note})")
        if list(after) != list(renamed):
            notes.append(note)
        renamed = after
    auxiliary = [name for name in renamed if AUXILIARY.match(name)] if "inception3a.branch1.conv.weight" in renamed else []
    if auxiliary:
        notes.append(f"GoogLeNet's auxiliary heads ({len(auxiliary)} tensors, used in training only) are dropped")
    return {name: tensor for name, tensor in renamed.items() if name not in auxiliary}, notes


@lru_cache(maxsize=256)
def _shapes(net: str, options: tuple[tuple[str, Any], ...]) -> Shapes:
    with torch.device("meta"):
        model = create(net, **dict(options))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}


def _adapted(shapes: Shapes, first: tuple[int, ...] | None, head: tuple[int, ...] | None) -> Shapes:
    """A network's shapes, with the numbers of input channels and classes of the file's first convolution and head."""
    shapes = dict(shapes)
    *_, weight, bias = shapes
    name = next(name for name, shape in shapes.items() if len(shape) == 4)
    if first and len(first) == 4 and 1 <= first[1] <= 3:
        shapes[name] = (shapes[name][0], first[1], *shapes[name][2:])
    if head and len(head) == 2 and head[0] >= 2:
        shapes[weight], shapes[bias] = (head[0], shapes[weight][1]), (head[0],)
    return shapes


def by_name(net: str, options: Mapping[str, Any], actual: Shapes) -> Shapes:
    """The shapes that the file must have to be this network, for its numbers of classes and channels."""
    shapes = _shapes(net, tuple(sorted(options.items())))
    *_, weight, _ = shapes
    first = next(name for name, shape in shapes.items() if len(shape) == 4)
    return _adapted(shapes, actual.get(first), actual.get(weight))


def in_order(net: str, options: Mapping[str, Any], actual: Shapes) -> Shapes:
    """Like by_name, but assumes that the file's first tensor is the first convolution and its last but one the head."""
    rows = list(actual.values())
    return _adapted(_shapes(net, tuple(sorted(options.items()))), rows[0], rows[-2] if len(rows) > 1 else None)


def candidates(net: str | None, options: Mapping[str, Any], actual: Shapes) -> list[tuple[str, dict[str, Any]]]:
    """Possible networks of a file as (name, options): the requested one, or the zoo's, common ones first."""
    names = [net] if net else models()
    stages = [int(m[1]) for name in actual if (m := re.match(r"layer(\d+)\.", name))]
    blocks = {m[1] for name in actual if (m := re.match(r"layer1\.(\d+)\.", name))}
    if not net and stages and max(stages) == 3 and f"resnet{6 * len(blocks) + 2}" not in names:
        names = [f"resnet{6 * len(blocks) + 2}", *names]  # a CIFAR network of a depth that is not in the table
    common: list[tuple[str, dict[str, Any]]] = []
    other: list[tuple[str, dict[str, Any]]] = []
    last_error: UserError | None = None
    for name in names:
        try:
            row = spec(name)
            check_options(row, options)
        except UserError as error:
            last_error = error
            continue
        has_v15 = f"{name}-v1.5" in names  # same shapes, and nearly all files are v1.5
        plausible = row.build is not None or row.depth <= len(actual) <= 20 * row.depth  # 1 to 20 tensors per layer
        if not net and (has_v15 or not plausible):
            continue
        common.append((name, dict(options)))
        if applies(row, "shortcut") and "shortcut" not in options:
            other += [(name, {**options, "shortcut": kind}) for kind in ("B", "C", "A") if kind != row.shortcut]
    if last_error and not common and not other:
        raise last_error
    # A plain network has the same shapes as a residual one with shortcut A, so it comes last.
    return sorted(common + other, key=lambda candidate: spec(candidate[0]).plain)


def recognize(content: Any, net: str | None = None, options: Mapping[str, Any] | None = None) -> Recognized:
    """Identifies the network of a state dict and converts the tensors to our names.

    content: a dict of tensors, or the output of torch.load (with wrappers such as "state_dict" and prefixes such as "module.").
    net, options: of `create`, for what shapes do not determine, such as net="resnet50" for the paper's stride (default: v1.5).
    Matches names first, then, for foreign names, the shapes in order. Raises UserError with the nearest network and the first
    differences.
    """
    tensors, notes = unwrap(content)
    has_linear = "linear.weight" in tensors
    tensors, renamed = rename(tensors)
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    options = dict(options or {})
    tried = candidates(net, options, shapes)
    for name, chosen in tried:
        if by_name(name, chosen, shapes) == shapes:
            ours = {key: tensors[key] for key in by_name(name, chosen, shapes)}
            notes += [*renamed, f"names and shapes match {name}"]
            break
    else:
        # Our names with other layers are a different network, even if the shapes match in order, as for pre-activation.
        matches = [] if OWN.intersection(shapes) else [match for match in tried if _fits_in_order(*match, shapes)]
        if not matches:
            raise UserError(_differences(tried, shapes, net))
        (name, chosen), *others = matches
        ambiguous = [other for other, _ in others if spec(other).order != spec(name).order]
        if ambiguous:
            raise UserError(f"has unknown names, and its shapes match {', '.join([name, *ambiguous])}: choose one with net")
        ours = dict(zip(in_order(name, chosen, shapes), (tensors[key] for key in shapes), strict=True))
        notes.append(
            f"the names are unknown, but the {len(shapes)} shapes match {name} in order (a network with BN and ReLU before the "
            "convolutions has the same shapes: set order=full for one)"
        )
    return _with_assumptions(name, chosen, ours, notes, has_linear, net_given=net is not None)


def _fits_in_order(net: str, options: Mapping[str, Any], actual: Shapes) -> bool:
    """Whether the file's shapes equal the network's in order, and no name contradicts: 'x.bias' cannot be a weight."""
    expected = in_order(net, options, actual)
    if list(expected.values()) != list(actual.values()):
        return False
    pairs = ((ours.rpartition(".")[2], theirs.rpartition(".")[2]) for ours, theirs in zip(expected, actual, strict=True))
    return all(theirs == ours or theirs not in ROLES for ours, theirs in pairs)


def _with_assumptions(
    net: str, options: dict[str, Any], tensors: dict[str, Tensor], notes: list[str], has_linear: bool, *, net_given: bool
) -> Recognized:
    """Returns the result, with a note for each property that shapes do not determine."""
    row = spec(net)
    if row.build is None and not row.plain and row.shortcut == "A" and "shortcut" not in options:
        if has_linear:
            options = {**options, "shortcut": "A-centered"}
            notes.append("assuming shortcut A-centered (zeros on both sides), as in the common CIFAR code with a 'linear' head")
        else:
            plain = "" if net_given else " and a residual network"
            notes.append(f"assuming shortcut A with the zeros at the end{plain} (shapes do not determine this)")
    if options.get("shortcut") == row.shortcut:
        del options["shortcut"]
    if net.endswith("-v1.5") and not net_given:
        notes.append(
            "assuming the stride in the 3x3 of a bottleneck, as in torchvision and timm (shapes do not determine this; for the "
            f"stride in the 1x1, set net to {net.removesuffix('-v1.5')})"
        )
    *_, head, _ = tensors
    first = next(tensor for tensor in tensors.values() if tensor.ndim == 4)
    return Recognized(net, options, tensors, tensors[head].shape[0], first.shape[1], "; ".join(notes))


def _differences(tried: list[tuple[str, dict[str, Any]]], actual: Shapes, requested: str | None) -> str:
    """Names the nearest network and lists the first differences."""
    fits = [(name, by_name(name, options, actual)) for name, options in tried]
    similar = [(name, shapes) for name, shapes in fits if shapes.items() & actual.items()]
    if not similar and not requested:
        shown = ", ".join(f"'{name}' {shape_text(shape)}" for name, shape in list(actual.items())[:3])
        return f"matches no known network: none has tensors such as {shown}"
    name, expected = min(similar or fits, key=lambda fit: len(fit[1].items() ^ actual.items()))
    differing = [
        f"'{key}' is {shape_text(actual[key])}, not {shape_text(shape)}"
        if key in actual
        else f"'{key}' {shape_text(shape)} is missing"
        for key, shape in expected.items()
        if actual.get(key) != shape
    ]
    extra = [f"'{key}' {shape_text(shape)} is unexpected" for key, shape in actual.items() if key not in expected]
    shown = [*extra[:2], *differing[:2]]
    more = len(extra) + len(differing) - len(shown)
    start = f"does not fit {name}" if requested else f"matches no known network; the nearest is {name}"
    return f"{start}: {', '.join(shown)}" + (f", and {more} more differences" if more else "")


def complete(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors as a float32 state dict of the model, with BN's counters. Raises UserError for invalid values."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}: only floating-point weights are supported")
        if not tensor.float().isfinite().all():
            raise UserError(f"'{name}' has non-finite values: the file is damaged, or the training diverged")
    return {
        name: torch.zeros((), dtype=torch.int64) if name.endswith(COUNTER) else tensors[name].detach().float().clone()
        for name in model.state_dict()
    }
