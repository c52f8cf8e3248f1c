"""fuse(model): a finished network with modules that train faster on a CPU, by fused.cpp.

relu(bn(x) + shortcut) in one go: PyTorch reads and writes every activation for each of the three operations, forward and
backward; on a CPU that is two fifths of a CIFAR net's training step. And the gradient of a 3x3 convolution's weights in bf16,
which takes a fifth less time than oneDNN's. What the kernels do not take, such as evaluation, goes through PyTorch's operations.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reslearn.kernels.compiler import CannotCompile, load
from reslearn.nets.block import BasicBlock, Block, Bottleneck, PlainBlock
from reslearn.nets.resnet import ResNet, Stem
from reslearn.nets.variants import Variant

SOURCE = Path(__file__).with_name("fused.cpp")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
WIDE, LANES = 64, 16  # as in fused.cpp
MOST_WEIGHTS, LEAST_PIXELS, MOST_THREADS = 64 * 64, 8 * 8, 8
WEIGHT_GRADIENT = "weight_gradient_bf16"


def fuse(model: nn.Module) -> nn.Module:
    """Exchange what the kernels can do in all residual, plain and highway networks, or their parts, within a model; in place.

    The modules stay the same objects with the same parameters and names: only their class changes. Raises CannotCompile.
    """
    library()
    modules = list(model.modules())
    for module in modules:
        if fused := _fused_class(type(module)):
            _become(module, fused)
        for convolution, _ in module.layers() if isinstance(module, Block) else []:
            if type(convolution) is nn.Conv2d:
                _become(convolution, FusedConv2d)
    for module in modules:
        if type(module) is nn.Sequential and len(module) and all(isinstance(block, FusedBlock) for block in module):
            _become(module, FusedStage)
    return model


def unavailable() -> str | None:
    """Why this machine cannot have the kernels, or None."""
    try:
        library()
    except CannotCompile as why:
        return str(why)
    return None


@cache
def library() -> ctypes.CDLL:
    """fused.cpp, compiled. Raises CannotCompile."""
    try:
        return _declared(load(SOURCE, ["-fopenmp"]))
    except AttributeError as error:
        raise CannotCompile(f"they cannot be loaded ({error})") from None


class FusedStem(Stem):
    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(bn_relu(self.bn1, self.conv1(x))[0])


class FusedBlock(Block):
    """A BasicBlock or Bottleneck."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x)[0]

    def pair(self, x: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
        """x through the block, and its twin for the shortcut of the next block (see bn_relu). twin: that of x, or x itself."""
        shortcut = self.shortcut(twin)
        return bn_relu(self.layers()[-1][1], _hidden(self, x), shortcut)


class FusedStage(nn.Sequential):
    """A stage of such blocks: in training, each hands the next one its output and the twin."""

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input, input)[0]

    def pair(self, x: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
        """As of a block."""
        if not self.training:
            x = super().forward(x)
            return x, x
        for block in self:
            assert isinstance(block, FusedBlock)
            x, twin = block.pair(x, twin)
        return x, twin


class FusedResNet(FusedStem, ResNet):
    """A network of such stages, which do the same."""

    def body(self, x: Tensor) -> Tensor:
        stages = [self.get_submodule(name) for name in self.stages]
        if not self.training or self.recompute or not all(isinstance(stage, FusedStage) for stage in stages):
            return super().body(x)
        twin = x
        for stage in stages:
            assert isinstance(stage, FusedStage)
            x, twin = stage.pair(x, twin)
        return x


class FusedPlainBlock(PlainBlock):
    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(_hidden(self, x))


class FusedVariant(Variant):
    def bn_relu(self, bn: nn.Module, x: Tensor) -> Tensor:
        return bn_relu(bn, x)[0]


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ResNet: FusedResNet,
    Stem: FusedStem,
    PlainBlock: FusedPlainBlock,
    BasicBlock: FusedBlock,
    Bottleneck: FusedBlock,
    Variant: FusedVariant,
}


@cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fused subclass of a class that the table has, itself or by a base class."""
    for base, fused in FUSED.items():
        if issubclass(kind, base):
            return kind if issubclass(kind, fused) else type(f"Fused{kind.__name__}", (fused, kind), {})
    return None


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)


def _hidden(block: Block, x: Tensor) -> Tensor:
    """x through the branch of a block, except for the last BN."""
    *layers, (last, _) = block.layers()
    for convolution, bn in layers:
        x = bn_relu(bn, convolution(x))[0]
    return last(x)


def bn_relu(bn: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """relu(bn(x) + shortcut), (N, C, H, W), and its twin: the same numbers for another use. The gradient that comes back through
    the twin is added inside the kernel, which is faster than autograd's addition.
    """
    if isinstance(bn, nn.BatchNorm2d) and _fits(bn, x, shortcut):
        assert bn.num_batches_tracked is not None
        bn.num_batches_tracked.add_(1)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        return _BnRelu.apply(x, shortcut, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.momentum, bn.eps)  # type: ignore[return-value]
    out = bn(x)
    out = F.relu(out if shortcut is None else out + shortcut, inplace=True)
    return out, out


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, whole = ctypes.c_void_p, ctypes.c_double, ctypes.c_long
    for kind in TYPES.values():
        forward, backward = getattr(library, f"forward_{kind}"), getattr(library, f"backward_{kind}")
        forward.argtypes = [*[pointer] * 6, number, number, *[pointer] * 3, whole, whole, ctypes.c_int]
        backward.argtypes = [*[pointer] * 12, whole, whole, ctypes.c_int]
        forward.restype = backward.restype = None
    if hasattr(library, WEIGHT_GRADIENT):  # of processors that multiply in bf16
        getattr(library, WEIGHT_GRADIENT).argtypes = [pointer] * 3 + [whole] * 5 + [ctypes.c_int]
        getattr(library, WEIGHT_GRADIENT).restype = None
    return library


def _fits(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether fused.cpp takes these tensors."""
    channels = x.shape[1]
    return (
        bn.training
        and x.device.type == "cpu"
        and x.dtype in TYPES
        and (WIDE % channels == 0 or channels % WIDE == 0)
        and x.numel() % WIDE == 0
        and x.numel() > channels
        and x.is_contiguous(memory_format=torch.channels_last)
        and bn.weight.dtype == torch.float32
        and bn.momentum is not None
        and bn.running_mean is not None
        and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
    )


class FusedConv2d(nn.Conv2d):
    """(N, C, H, W) -> (N, K, H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        return _Conv3x3.apply(input, self.weight) if _takes(self, input) else super().forward(input)  # type: ignore[return-value]


def _takes(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether fused.cpp computes the gradient of this convolution's weights."""
    return (
        module.training
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and module.kernel_size == (3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and module.in_channels * module.out_channels <= MOST_WEIGHTS  # with more of them oneDNN is faster
        and x.shape[2] * x.shape[3] >= LEAST_PIXELS
        and torch.get_num_threads() <= MOST_THREADS  # more would have nothing to do
        and module.bias is None
        and module.in_channels % LANES == 0
        and module.out_channels % LANES == 0
        and x.shape[3] % 2 == 0
        and module.weight.requires_grad
        and module.weight.dtype == torch.float32
        and module.weight.is_contiguous(memory_format=torch.channels_last)
        and x.is_contiguous(memory_format=torch.channels_last)
        and hasattr(library(), WEIGHT_GRADIENT)
    )


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """rows, channels and threads for fused.cpp; a row has at least WIDE numbers."""
    channels = x.shape[1]
    return x.numel() // max(channels, WIDE), channels, torch.get_num_threads()


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        mean, invstd = torch.empty_like(gamma), torch.empty_like(gamma)
        inputs = [t if t is None else t.data_ptr() for t in (x, shortcut, gamma, beta, running_mean, running_var)]
        outputs = [t.data_ptr() for t in (y, mean, invstd)]
        getattr(library(), f"forward_{TYPES[x.dtype]}")(*inputs, momentum, eps, *outputs, *_sizes(x))
        ctx.save_for_backward(x, y if shortcut is not None else None, gamma, beta, mean, invstd)
        ctx.has_shortcut = shortcut is not None
        ctx.set_materialize_grads(False)
        return y, y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, gamma, beta, mean, invstd = ctx.saved_tensors
        grad, more = ([g.to(x.dtype).contiguous(memory_format=torch.channels_last) for g in grads if g is not None] + [None])[:2]
        if grad is None:
            return (None,) * 8
        if more is not None and not ctx.has_shortcut:
            grad, more = grad + more, None
        x_grad = torch.empty_like(x)
        shortcut_grad = torch.empty_like(x) if ctx.has_shortcut else None
        gamma_grad, beta_grad = torch.empty_like(gamma), torch.empty_like(gamma)
        tensors = (grad, more, x, y, gamma, beta, mean, invstd, x_grad, shortcut_grad, gamma_grad, beta_grad)
        getattr(library(), f"backward_{TYPES[x.dtype]}")(*[t if t is None else t.data_ptr() for t in tensors], *_sizes(x))
        return x_grad, shortcut_grad, gamma_grad, beta_grad, None, None, None, None


class _Conv3x3(torch.autograd.Function):
    """A convolution in bf16 of weights in float32, whose gradient is not rounded to bf16 on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        return F.conv2d(x, narrow, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, narrow = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        x_grad = None
        if ctx.needs_input_grad[0]:
            only_x = [True, False, False]
            x_grad = torch.ops.aten.convolution_backward(grad, x, narrow, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, only_x)[0]
        weight_grad = torch.empty_like(narrow, dtype=torch.float32)
        n, inputs, height, width = x.shape
        sizes = (n, height, width, inputs, grad.shape[1], torch.get_num_threads())
        getattr(library(), WEIGHT_GRADIENT)(x.data_ptr(), grad.data_ptr(), weight_grad.data_ptr(), *sizes)
        return x_grad, weight_grad
