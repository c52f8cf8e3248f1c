"""What a network costs, row by row: parameters, multiply-adds, activation memory, receptive field. Works on any torch module."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reslearn.nets.variants import StochasticDepth

# Modules that make no new tensor worth counting, beside those that work in place
FREE = (nn.Identity, nn.Flatten, nn.Dropout)
WINDOWS = ("convolution", "max_pool2d", "avg_pool2d")  # operators that widen the receptive field


@dataclass(frozen=True)
class Row:
    """One layer, for one image. output: (C, H, W) or (C,). macs: multiply-adds, of convolutions and linear layers alone.

    values: numbers that it puts out and keeps; an activation in place adds none. field: the side, in pixels, of the input
    square that one output sees; None where it sees all of it.
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
    """All rows of a network on one image of `input` (C, H, W), and what is only known of the whole.

    parameters counts each once, those outside the rows too. backward_bytes: what autograd keeps of one image between the
    forward and the backward pass in training, as measured in float32.
    """

    input: tuple[int, ...]
    rows: tuple[Row, ...]
    parameters: int
    backward_bytes: int | None

    @property
    def macs(self) -> int:
        """Multiply-adds of one image; FLOPs, as most tools count them, are twice as many. The papers' "FLOPs" are these."""
        return sum(row.macs for row in self.rows)

    @property
    def values(self) -> int:
        """Numbers that the forward pass puts out for one image, the input included; 4 bytes each in float32."""
        size = 1
        for side in self.input:
            size *= side
        return size + sum(row.values for row in self.rows)


class _Fields(TorchDispatchMode):
    """Follows (receptive field, step between neighboring outputs), in input pixels, of every tensor of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, tuple[int, int] | None] = {}
        self.alive: list[Tensor] = []  # or an id would be used again

    def put(self, tensor: Tensor, field: tuple[int, int] | None) -> None:
        self.of[id(tensor)] = field
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        seen = [self.of[id(a)] for a in _flat(args) if id(a) in self.of]
        if seen:
            field = None if None in seen else max(f for f in seen if f is not None)
            name = func._schema.name.split("::")[1]
            if name.startswith(("mean", "adaptive_avg_pool2d")) or name in ("addmm", "mm", "linear"):
                field = None
            elif field is not None and name.startswith(WINDOWS):
                field = _widen(field, name, args)
            for tensor in _flat((out,)):
                if isinstance(tensor, Tensor):
                    self.put(tensor, field)
        return out


def _flat(items: Any) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            yield item


def _widen(field: tuple[int, int], name: str, args: tuple) -> tuple[int, int]:
    """The field after a window of one side slides over it."""
    size, step = field
    if name == "convolution":
        side, stride, dilation = args[1].shape[-1], args[3][-1], args[5][-1]
    else:  # pooling: (input, kernel, stride, padding, dilation or others)
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
def _rows(net: nn.Module, fields: _Fields) -> Iterator[list[Row]]:
    """Collects a row from every leaf module that runs. A module without children that holds no layer is a leaf too."""
    rows: list[Row] = []

    def hook(name: str) -> Any:
        def collect(module: nn.Module, inputs: Any, out: Any) -> None:
            if not isinstance(out, Tensor) or isinstance(module, nn.Identity):
                return
            field = fields.of.get(id(out))
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


def _kept_for_backward(net: nn.Module, image: Tensor) -> int:
    """Bytes of activations that autograd keeps between forward and backward, each storage once, parameters left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.survival = 1.0  # with every branch: the most that can be kept
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(image)
    return sum(kept.values())


def cost(net: nn.Module, input: tuple[int, ...] = (3, 224, 224), *, backward: bool = True) -> Cost:
    """What `net` costs on one image of `input` (C, H, W). Nothing is computed: only shapes run through a copy of it.

    backward: measure backward_bytes, too.

    Raises whatever the network raises where it cannot take such an input.
    """
    shadow = copy.deepcopy(net).to("meta")
    fields, image = _Fields(), torch.zeros(1, *input, device="meta")
    fields.put(image, (1, 1))
    with torch.no_grad(), _rows(shadow.eval(), fields) as rows, fields:
        shadow(image)
    kept = None
    if backward:  # two images: BN needs more than one value
        kept = _kept_for_backward(shadow.train(), torch.zeros(2, *input, device="meta")) // 2
    return Cost(tuple(input), tuple(rows), sum(p.numel() for p in shadow.parameters()), kept)


def by_stage(cost: Cost) -> list[Row]:
    """The rows of each top-level part of the network as one row; a row alone stays as it is."""
    parts: dict[str, list[Row]] = {}
    for row in cost.rows:
        parts.setdefault(row.name.split(".")[0], []).append(row)
    folded = []
    for name, rows in parts.items():
        if len(rows) == 1:
            folded += rows
            continue
        parameters, macs, values = (sum(getattr(row, key) for row in rows) for key in ("parameters", "macs", "values"))
        folded.append(Row(name, f"{len(rows)} layers", rows[-1].output, parameters, macs, values, rows[-1].field))
    return folded
