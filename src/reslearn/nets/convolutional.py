"""Fully convolutional classifiers: a network applied to every position of a larger image (DRL 3.4, Sermanet et al. 2013)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.errors import UserError


def convolutional(net: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Converts a classifier into a fully convolutional network: (N, C, H, W) -> logits (N, classes, h, w).

    size: the (height, width) in pixels of the classifier's input, and the minimum input size of the result. At this size the
    result has one position, with the classifier's logits. Its stride is that of the last feature map (32 px for ImageNet
    networks). A global average pool becomes an average pool over the features it covers at this size, and linear layers become
    1x1 convolutions. If the pool leaves several cells (VGG, AlexNet), the first linear layer becomes a convolution over all of
    them. Weights are shared with `net`, which must be in evaluation mode, as the result is.

    Raises UserError unless the network is a backbone, an average pool and linear layers.
    """
    backbone, cells, head = _split(net)
    first = next(net.parameters())
    channels = next(module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d))
    with torch.inference_mode():
        features = backbone(torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype))
    window = (features.shape[2], features.shape[3])
    layers: list[nn.Module] = [backbone]
    if cells == (1, 1):
        layers.append(nn.AvgPool2d(window, stride=1))
        window = (1, 1)
    for module in head:
        if isinstance(module, nn.Linear):
            layers.append(_as_convolution(module, window, cells))
            window = cells = (1, 1)
        else:
            layers.append(module)
    return nn.Sequential(*layers).eval()


def _split(net: nn.Module) -> tuple[nn.Module, tuple[int, int], list[nn.Module]]:
    """Splits a network into its backbone, the output size (height, width) of its average pool, and the layers after the pool."""
    children = dict(net.named_children())
    if "avgpool" in children:  # these networks run their modules in the order of definition
        index = [*children].index("avgpool")
        modules = [*children.values()]
        backbone, rest = modules[:index], modules[index + 1 :]
        output_size = getattr(children["avgpool"], "output_size", None)
    elif [*children] == ["features", "classifier"]:  # DenseNet pools in forward()
        backbone, output_size, rest = [children["features"], nn.ReLU()], 1, [children["classifier"]]
    else:
        backbone, output_size, rest = [], None, []
    head = [layer for module in rest for layer in (module if isinstance(module, nn.Sequential) else [module])]
    cells = (output_size, output_size) if isinstance(output_size, int) else output_size
    supported = all(isinstance(layer, nn.Linear | nn.ReLU | nn.Dropout) for layer in head)
    if not (backbone and cells and supported and any(isinstance(layer, nn.Linear) for layer in head)):
        raise UserError(
            f"{type(net).__name__} cannot be applied to larger images: it is not a backbone, an average pool and linear layers"
        )
    return nn.Sequential(*backbone), tuple(cells), head  # type: ignore[return-value]


def _as_convolution(linear: nn.Linear, window: tuple[int, int], cells: tuple[int, int]) -> nn.Conv2d:
    """Converts an adaptive average pool from `window` to `cells` and the linear layer after it to one convolution over windows."""
    with torch.device("meta"):
        convolution = nn.Conv2d(linear.in_features // (cells[0] * cells[1]), linear.out_features, window, bias=True)
    weight = linear.weight.detach().unflatten(1, (-1, *cells))
    if window != cells:  # not the input size that the network was designed for
        rows, columns = (_pooling(n, m).to(weight) for n, m in zip(window, cells, strict=True))
        weight = torch.einsum("ocij,ip,jq->ocpq", weight, rows, columns)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return convolution


def _pooling(n: int, m: int) -> Tensor:
    """The matrix (m, n) of an adaptive average pool from n values to m."""
    return F.adaptive_avg_pool1d(torch.eye(n), m).T
