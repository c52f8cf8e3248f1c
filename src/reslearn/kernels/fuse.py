"""fuse(model): replaces modules of a network by faster versions for training on a CPU (fused.cpp).

- relu(bn(x) + shortcut) as one operation. PyTorch reads and writes every activation for each of the three, forward and backward,
  which on a CPU takes two fifths of the training step of a CIFAR network.
- The bf16 gradient of the weights of a 3x3 convolution, in a fifth less time than oneDNN.

Everything else, such as evaluation, uses PyTorch's operations.
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
MAX_WEIGHTS, MIN_PIXELS, MAX_THREADS = 64 * 64, 8 * 8, 8
WEIGHT_GRADIENT = "weight_gradient_bf16"


def fuse(model: nn.Module) -> nn.Module:
    """Fuses all residual, plain and highway networks, or their parts, within a model, in place, and returns the model.

    Modules stay the same objects with the same parameters and names; only their class changes. Raises CannotCompile.
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
    """Why the kernels cannot be used on this machine, or None."""
    try:
        library()
    except CannotCompile as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled fused.cpp. Raises CannotCompile."""
    try:
        return _declared(load(SOURCE, ["-fopenmp"]))
    except AttributeError as error:
        raise CannotCompile(f"cannot load the library of {SOURCE.name} ({error})") from None


class FusedStem(Stem):
    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(bn_relu(self.bn1, self.conv1(x))[0])


class FusedBlock(Block):
    """A BasicBlock or Bottleneck."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x)[0]

    def pair(self, x: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and its twin for the shortcut of the next block (see bn_relu). twin: the twin of x, or x itself."""
        shortcut = self.shortcut(twin)
        return bn_relu(self.layers()[-1][1], _hidden(self, x), shortcut)


class FusedStage(nn.Sequential):
    """A stage of FusedBlocks: in training, each block passes its output and the twin to the next."""

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input, input)[0]

    def pair(self, x: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
        """See FusedBlock.pair."""
        if not self.training:
            x = super().forward(x)
            return x, x
        for block in self:
            assert isinstance(block, FusedBlock)
            x, twin = block.pair(x, twin)
        return x, twin


class FusedResNet(FusedStem, ResNet):
    """A ResNet whose stages, if fused, pass on their outputs and twins."""

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
    """The fused subclass of a class that is in FUSED or has a base class there."""
    for base, fused in FUSED.items():
        if issubclass(kind, base):
            return kind if issubclass(kind, fused) else type(f"Fused{kind.__name__}", (fused, kind), {})
    return None


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)


def _hidden(block: Block, x: Tensor) -> Tensor:
    """Applies the branch of a block up to the last convolution, without its BN."""
    *layers, (last, _) = block.layers()
    for convolution, bn in layers:
        x = bn_relu(bn, convolution(x))[0]
    return last(x)


def bn_relu(bn: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns relu(bn(x) + shortcut), (N, C, H, W), and its twin: a second view of the same values.

    A consumer of its own for the twin saves time: the kernel adds the two gradients faster than autograd.
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
    """Sets the argument types of the library's functions. Raises AttributeError if one is missing."""
    pointer, double, long = ctypes.c_void_p, ctypes.c_double, ctypes.c_long
    for kind in TYPES.values():
        forward, backward = getattr(library, f"forward_{kind}"), getattr(library, f"backward_{kind}")
        forward.argtypes = [*[pointer] * 6, double, double, *[pointer] * 3, long, long, ctypes.c_int]
        backward.argtypes = [*[pointer] * 12, long, long, ctypes.c_int]
        forward.restype = backward.restype = None
    if hasattr(library, WEIGHT_GRADIENT):  # the processor supports bf16 multiplication
        getattr(library, WEIGHT_GRADIENT).argtypes = [pointer] * 3 + [long] * 5 + [ctypes.c_int]
        getattr(library, WEIGHT_GRADIENT).restype = None
    return library


def _fits(bn: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether fused.cpp supports these tensors."""
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
    def forward(self, input: Tensor) -> Tensor:
        if _supports_weight_gradient(self, input):
            return _Conv3x3.apply(input, self.weight)  # type: ignore[return-value]
        return super().forward(input)


def _supports_weight_gradient(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether fused.cpp can compute the gradient of the convolution's weights, and faster than oneDNN."""
    return (
        module.training
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and module.kernel_size == (3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and module.in_channels * module.out_channels <= MAX_WEIGHTS  # oneDNN is faster for more
        and x.shape[2] * x.shape[3] >= MIN_PIXELS
        and torch.get_num_threads() <= MAX_THREADS  # the kernel splits the batch into 8 chunks
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
    """Rows, channels and threads for fused.cpp; a row has at least WIDE values."""
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
        given = [g.to(x.dtype).contiguous(memory_format=torch.channels_last) for g in grads if g is not None]
        grad, twin_grad = (given + [None, None])[:2]
        if grad is None:
            return (None,) * 8
        if twin_grad is not None and not ctx.has_shortcut:
            grad, twin_grad = grad + twin_grad, None
        x_grad = torch.empty_like(x)
        shortcut_grad = torch.empty_like(x) if ctx.has_shortcut else None
        gamma_grad, beta_grad = torch.empty_like(gamma), torch.empty_like(gamma)
        tensors = (grad, twin_grad, x, y, gamma, beta, mean, invstd, x_grad, shortcut_grad, gamma_grad, beta_grad)
        getattr(library(), f"backward_{TYPES[x.dtype]}")(*[t if t is None else t.data_ptr() for t in tensors], *_sizes(x))
        return x_grad, shortcut_grad, gamma_grad, beta_grad, None, None, None, None


class _Conv3x3(torch.autograd.Function):
    """A bf16 convolution with float32 weights. The gradient of the weights is float32 and never rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        x_grad = None
        if ctx.needs_input_grad[0]:
            only_x = [True, False, False]
            x_grad = torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, only_x)[0]
        weight_grad = torch.empty_like(weight, dtype=torch.float32)
        n, inputs, height, width = x.shape
        sizes = (n, height, width, inputs, grad.shape[1], torch.get_num_threads())
        getattr(library(), WEIGHT_GRADIENT)(x.data_ptr(), grad.data_ptr(), weight_grad.data_ptr(), *sizes)
        return x_grad, weight_grad
