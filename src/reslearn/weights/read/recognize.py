"""Which network a state dict belongs to, and its tensors under our names.

Our names are torchvision's, so most files need none or few changes. Nothing is guessed in silence: what shapes cannot tell
(where a bottleneck strides, how shortcut A pads, plain or residual) is said in `why` and set by `net` and `options`.
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

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")  # where training programs put the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of nn.DataParallel, torch.compile, and modules that hold the net
RENAMES = (  # pattern, replacement, what it is
    (r"^linear\.", "fc.", "'linear' is our 'fc'"),
    (r"\.shortcut\.(?=\d\.)", ".downsample.", "'shortcut' is our 'downsample'"),
    (r"(?<=\.)(norm|conv)\.([12])(?=\.)", r"\1\2", "DenseNet's older names, such as 'norm.1', are our 'norm1'"),
)
AUXILIARY = re.compile(r"^aux(1|2|_logits)\.")
COUNTER = "num_batches_tracked"  # BN's count of batches; without effect, and missing in files older than 2018
OWN = frozenset(("layer1.0.conv1.weight", "layer1.0.bn1.weight"))  # as torchvision and we name them
ROLES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Recognized:
    """A network's name and options, its tensors under our names, what the head and first layer say, and why it is this one."""

    net: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    classes: int
    channels: int
    why: str


def unwrap(found: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in what a file holds, without wrappers and prefixes, and sentences of what was taken off.

    Raises UserError where there is none.
    """
    said: list[str] = []
    for _ in range(3):
        inner = next((key for key in WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
        said.append(f"the weights are under '{inner}'")
    if not isinstance(found, Mapping):
        raise UserError(f"holds a {type(found).__name__}, not a state dict; save one with torch.save(model.state_dict(), path)")
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # torch's AveragedModel counts in it
    if not tensors:
        keys = ", ".join(repr(key) for key in list(found)[:5]) or "nothing"
        raise UserError(f"holds no tensors by name, but {keys}; weights are looked for there and under {', '.join(WRAPPERS)}")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        said.append(f"every name began with '{prefix}'")
    return tensors, said


def rename(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Known foreign names to ours, and sentences of what was renamed. Raises UserError where two names become one."""
    said = []
    renamed = dict(tensors)
    for pattern, replacement, what in RENAMES:
        after = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
        if len(after) < len(renamed):
            raise UserError(f"holds tensors under both of two names ({what})")
        if list(after) != list(renamed):
            said.append(what)
        renamed = after
    auxiliary = [name for name in renamed if AUXILIARY.match(name)] if "inception3a.branch1.conv.weight" in renamed else []
    if auxiliary:
        said.append(f"GoogLeNet's auxiliary heads ({len(auxiliary)} tensors, used in training only) are left out")
    return {name: tensor for name, tensor in renamed.items() if name not in auxiliary}, said


@lru_cache(maxsize=256)
def _shapes(net: str, options: tuple[tuple[str, Any], ...]) -> Shapes:
    with torch.device("meta"):
        model = create(net, **dict(options))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}


def _adapted(shapes: Shapes, first: tuple[int, ...] | None, head: tuple[int, ...] | None) -> Shapes:
    """A net's shapes with as many input channels and classes as the file's first convolution and head have."""
    shapes = dict(shapes)
    *_, weight, bias = shapes
    name = next(name for name, shape in shapes.items() if len(shape) == 4)
    if first and len(first) == 4 and 1 <= first[1] <= 3:
        shapes[name] = (shapes[name][0], first[1], *shapes[name][2:])
    if head and len(head) == 2 and head[0] >= 2:
        shapes[weight], shapes[bias] = (head[0], shapes[weight][1]), (head[0],)
    return shapes


def by_name(net: str, options: Mapping[str, Any], found: Shapes) -> Shapes:
    """The shapes a file should have to be this net, whatever its classes and channels."""
    shapes = _shapes(net, tuple(sorted(options.items())))
    *_, weight, _ = shapes
    first = next(name for name, shape in shapes.items() if len(shape) == 4)
    return _adapted(shapes, found.get(first), found.get(weight))


def in_order(net: str, options: Mapping[str, Any], found: Shapes) -> Shapes:
    """As by_name, taking the file's first tensor for the first convolution, and its last but one for the head."""
    rows = list(found.values())
    return _adapted(_shapes(net, tuple(sorted(options.items()))), rows[0], rows[-2] if len(rows) > 1 else None)


def candidates(net: str | None, options: Mapping[str, Any], found: Shapes) -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of each net that a file may be: the one asked for, or the zoo's, plausible and frequent ones first."""
    names = [net] if net else models()
    stages = [int(m[1]) for name in found if (m := re.match(r"layer(\d+)\.", name))]
    blocks = {m[1] for name in found if (m := re.match(r"layer1\.(\d+)\.", name))}
    if not net and stages and max(stages) == 3 and f"resnet{6 * len(blocks) + 2}" not in names:
        names = [f"resnet{6 * len(blocks) + 2}", *names]  # a CIFAR net of a depth that the table does not list
    usual: list[tuple[str, dict[str, Any]]] = []
    other: list[tuple[str, dict[str, Any]]] = []
    refused: UserError | None = None
    for name in names:
        try:
            row = spec(name)
            check_options(row, options)
        except UserError as error:
            refused = error
            continue
        twin = f"{name}-v1.5" in names  # it has the same shapes, and its stride is nearly every file's
        plausible = row.build is not None or row.depth <= len(found) <= 20 * row.depth  # 1 to 20 tensors a layer
        if not net and (twin or not plausible):
            continue
        usual.append((name, dict(options)))
        if applies(row, "shortcut") and "shortcut" not in options:
            other += [(name, {**options, "shortcut": kind}) for kind in ("B", "C", "A") if kind != row.shortcut]
    if refused and not usual and not other:
        raise refused
    # A plain net has the shapes of a residual one with shortcut A, so it comes last.
    return sorted(usual + other, key=lambda candidate: spec(candidate[0]).plain)


def recognize(found: Any, net: str | None = None, options: Mapping[str, Any] | None = None) -> Recognized:
    """The network that a state dict belongs to, and its tensors under our names.

    found: a dict of tensors, or what torch.load gives (wrapped in "state_dict", "model", ...; prefixed with "module.", ...).
    net, options: of `create`; they decide what shapes cannot, such as net="resnet50" for the paper's stride (else "-v1.5").
    Names are tried first; then the order of the shapes, for files with names of their own. Raises UserError, naming the
    nearest network and the first differences.
    """
    tensors, said = unwrap(found)
    linear = "linear.weight" in tensors
    tensors, renamed = rename(tensors)
    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    options = dict(options or {})
    tried = candidates(net, options, shapes)
    for name, chosen in tried:
        if by_name(name, chosen, shapes) == shapes:
            ours = {key: tensors[key] for key in by_name(name, chosen, shapes)}
            said += [*renamed, f"names and shapes are those of {name}"]
            break
    else:
        # Our own names with other layers are another network, whatever the shapes: pre-activation has the same ones in order.
        fits = [] if OWN.intersection(shapes) else [fit for fit in tried if _fits_in_order(*fit, shapes)]
        if not fits:
            raise UserError(_differences(tried, shapes, net))
        (name, chosen), *others = fits
        alike = [other for other, _ in others if spec(other).order != spec(name).order]
        if alike:
            raise UserError(
                f"has foreign names, and its shapes, in order, are those of {name} and {', '.join(alike)}: choose with net"
            )
        ours = dict(zip(in_order(name, chosen, shapes), (tensors[key] for key in shapes), strict=True))
        said.append(
            f"the names are foreign, but the {len(shapes)} shapes, in order, are those of {name} (were BN and ReLU before the "
            "convolutions, they would be the same: then ask for the option order=full)"
        )
    return _described(name, chosen, ours, said, linear, asked=net is not None)


def _fits_in_order(net: str, options: Mapping[str, Any], found: Shapes) -> bool:
    """Whether a file's shapes, one after the other, are those of a network."""
    expected = in_order(net, options, found)
    return list(expected.values()) == list(found.values()) and _same_roles(expected, found)


def _same_roles(expected: Shapes, found: Shapes) -> bool:
    """Whether no name says otherwise: a file's 'x.bias' may not become a weight."""
    pairs = ((ours.rpartition(".")[2], theirs.rpartition(".")[2]) for ours, theirs in zip(expected, found, strict=True))
    return all(theirs == ours or theirs not in ROLES for ours, theirs in pairs)


def _described(
    net: str, options: dict[str, Any], tensors: dict[str, Tensor], said: list[str], linear: bool, *, asked: bool
) -> Recognized:
    """The result, with a sentence for each thing that shapes do not tell."""
    row = spec(net)
    shortcut = options.get("shortcut", row.shortcut)
    if row.build is None and not row.plain and shortcut == "A":
        if linear and "shortcut" not in options:
            options, shortcut = {**options, "shortcut": "A-centered"}, "A-centered"
            said.append("a head called 'linear' is the mark of the common CIFAR code, whose shortcuts A have zeros on both sides")
        elif "shortcut" not in options:
            plain = "" if asked else ", nor a plain net from a residual one"
            said.append(f"no shapes tell how shortcut A pads{plain}: A with the zeros behind is taken")
    if options.get("shortcut") == row.shortcut:
        del options["shortcut"]
    if net.endswith("-v1.5") and not asked:
        paper = net.removesuffix("-v1.5")
        said.append(
            "no shapes tell where a bottleneck strides: in the 3x3 is taken, as torchvision, timm and most do "
            f"(where it is in the 1x1, ask for net {paper})"
        )
    *_, head, _ = tensors
    first = next(tensor for tensor in tensors.values() if tensor.ndim == 4)
    return Recognized(net, options, tensors, tensors[head].shape[0], first.shape[1], "; ".join(said))


def _differences(tried: list[tuple[str, dict[str, Any]]], found: Shapes, asked: str | None) -> str:
    """The nearest network, and the first names and shapes that differ."""
    fits = [(name, by_name(name, options, found)) for name, options in tried]
    alike = [(name, shapes) for name, shapes in fits if shapes.items() & found.items()]
    if not alike and not asked:
        shown = ", ".join(f"'{name}' {_size(shape)}" for name, shape in list(found.items())[:3])
        return f"fits no network here: none has tensors like its {shown}"
    name, expected = min(alike or fits, key=lambda fit: len(fit[1].items() ^ found.items()))
    words = [
        f"'{key}' is {_size(found[key])}, not {_size(shape)}" if key in found else f"'{key}' {_size(shape)} is missing"
        for key, shape in expected.items()
        if found.get(key) != shape
    ]
    extra = [f"'{key}' {_size(shape)} does not belong to it" for key, shape in found.items() if key not in expected]
    shown = [*extra[:2], *words[:2]]
    more = len(extra) + len(words) - len(shown)
    start = f"does not fit {name}" if asked else f"fits no network here; the nearest is {name}"
    return f"{start}: {', '.join(shown)}" + (f", and {more} more differences" if more else "")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def complete(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Recognized tensors as a state dict of the model: float32, with BN's counters. Raises UserError for what is no number."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise UserError(f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}: only floating-point weights can be read")
        if not tensor.float().isfinite().all():
            raise UserError(f"'{name}' has values that are not finite: the weights are damaged, or their training failed")
    return {
        name: torch.zeros((), dtype=torch.int64) if name.endswith(COUNTER) else tensors[name].detach().float().clone()
        for name in model.state_dict()
    }
