"""Cost of any torch module by layer: parameters, multiply-adds, activation memory, receptive field."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reslearn.nets.variants import StochasticDepth

FREE = (nn.Identity, nn.Flatten, nn.Dropout)  # modules that store no output worth counting, in addition to in-place ones
WINDOWS = ("convolution", "max_pool2d", "avg_pool2d")  # operators that widen the receptive field


@dataclass(frozen=True)
class Row:
    """One layer, for one image. output: (C, H, W) or (C,). macs: multiply-adds of convolutions and linear layers.

    values: stored output values; 0 for in-place activations. field: receptive field, side in pixels; None for the whole input.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    macs: int
    values: int
    field: int | None


@dataclass(frozen=True)
class Cost:
    """Cost of a network for one image of shape `input` (C, H, W).

    parameters: counts shared parameters once, and includes those outside the rows. backward_bytes: float32 activations that
    autograd stores per image between the forward and the backward pass in training, as measured.
    """

    input: tuple[int, ...]
    rows: tuple[Row, ...]
    parameters: int
    backward_bytes: int | None

    @property
    def macs(self) -> int:
        """Multiply-adds per image (the papers' "FLOPs"); most tools count 2 FLOPs per multiply-add."""
        return sum(row.macs for row in self.rows)

    @property
    def values(self) -> int:
        """Values stored by the forward pass for one image, including the input; 4 bytes each in float32."""
        return math.prod(self.input) + sum(row.values for row in self.rows)


class _ReceptiveFields(TorchDispatchMode):
    """Tracks (receptive field, stride), in input pixels, of every tensor of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[int, tuple[int, int] | None] = {}
        self.alive: list[Tensor] = []  # references, so that no id is reused

    def put(self, tensor: Tensor, field: tuple[int, int] | None) -> None:
        self.by_id[id(tensor)] = field
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [self.by_id[id(a)] for a in tree_leaves(args) if id(a) in self.by_id]
        if inputs:
            field = None if None in inputs else max(f for f in inputs if f is not None)
            name = func._schema.name.split("::")[1]
            if name.startswith(("mean", "adaptive_avg_pool2d")) or name in ("addmm", "mm", "linear"):
                field = None
            elif field is not None and name.startswith(WINDOWS):
                field = _widen(field, name, args)
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.put(tensor, field)
        return out


def _widen(field: tuple[int, int], name: str, args: tuple) -> tuple[int, int]:
    """(receptive field, stride) after a convolution or pooling with these arguments."""
    size, step = field
    if name == "convolution":
        side, stride, dilation = args[1].shape[-1], args[3][-1], args[5][-1]
    else:  # pooling: (input, kernel, stride, padding, and for max pooling dilation)
        side = args[1][-1]
        stride = args[2][-1] if len(args) > 2 and args[2] else side
        dilation = args[4][-1] if name.startswith("max") and len(args) > 4 else 1
    return size + (side - 1) * dilation * step, step * stride


def _macs(module: nn.Module, out: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size[0] * module.kernel_size[1]
        return out[0].numel() * kernel * module.in_channels // module.groups
    return out[0].numel() * module.in_features if isinstance(module, nn.Linear) else 0


def _values(module: nn.Module, out: Tensor) -> int:
    free = isinstance(module, FREE) or getattr(module, "inplace", False)
    return 0 if free else out[0].numel()


@contextmanager
def _rows(net: nn.Module, fields: _ReceptiveFields) -> Iterator[list[Row]]:
    """Collects a row from every module without children that runs."""
    rows: list[Row] = []

    def hook(name: str) -> Any:
        def collect(module: nn.Module, inputs: Any, out: Any) -> None:
            if not isinstance(out, Tensor) or isinstance(module, nn.Identity):
                return
            field = fields.by_id.get(id(out))
            count = sum(p.numel() for p in module.parameters())
            shape, kind = tuple(out.shape[1:]), type(module).__name__
            side = field[0] if field else None
            rows.append(Row(name, kind, shape, count, _macs(module, out), _values(module, out), side))

        return collect

    handles = [m.register_forward_hook(hook(name)) for name, m in net.named_modules() if not list(m.children())]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _saved_bytes(net: nn.Module, images: Tensor) -> int:
    """Bytes of activations that autograd saves for the backward pass, counting each storage once and no parameters."""
    own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}
    saved: dict[int, int] = {}
    alive = []  # references, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.survival = 1.0  # the worst case: no branch is dropped
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(images)
    return sum(saved.values())


def cost(net: nn.Module, input: tuple[int, ...] = (3, 224, 224), *, backward: bool = True) -> Cost:
    """Returns the cost of `net` for one image of shape `input` (C, H, W), from a copy on the meta device.

    backward: also measure backward_bytes. Propagates the network's own error for an input that it does not support.
    """
    meta = copy.deepcopy(net).to("meta")
    fields, image = _ReceptiveFields(), torch.zeros(1, *input, device="meta")
    fields.put(image, (1, 1))
    with torch.no_grad(), _rows(meta.eval(), fields) as rows, fields:
        meta(image)
    saved = None
    if backward:  # two images: BN needs more than one value
        saved = _saved_bytes(meta.train(), torch.zeros(2, *input, device="meta")) // 2
    return Cost(tuple(input), tuple(rows), sum(p.numel() for p in meta.parameters()), saved)


def by_stage(cost: Cost) -> list[Row]:
    """Sums the rows of each top-level module."""
    stages: dict[str, list[Row]] = {}
    for row in cost.rows:
        stages.setdefault(row.name.split(".")[0], []).append(row)
    folded = []
    for name, rows in stages.items():
        if len(rows) == 1:
            folded += rows
            continue
        parameters, macs, values = (sum(getattr(row, key) for row in rows) for key in ("parameters", "macs", "values"))
        folded.append(Row(name, f"{len(rows)} layers", rows[-1].output, parameters, macs, values, rows[-1].field))
    return folded
