"""A classifier as a map: its view laid over every place of a larger image at once (DRL 3.4, Sermanet et al. 2013)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.errors import UserError


def convolutional(net: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The net as convolutions only: (N, C, H, W) -> logits (N, classes, h, w), one for each place of its view.

    size: the (height, width) in pixels of the net's own input, and the least that the result takes: it gives one place there,
    with the net's logits. Places are as far apart as the pixels of the last feature map (32 px in nets of the ImageNet shape).
    A global average pool becomes one over as many features as it sees at that size; the fully connected layers after it are
    1x1 convolutions. Where a pool leaves several features (VGG, AlexNet), the first layer after it is a convolution as large as
    what it sees. Weights are shared with the net; the result is in evaluation mode, and so must the net be.

    Raises UserError for a net that is not backbone, average pool, fully connected layers.
    """
    backbone, cells, head = _parts(net)
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


def _parts(net: nn.Module) -> tuple[nn.Module, tuple[int, int], list[nn.Module]]:
    """What makes the feature map, the (height, width) that the average pool leaves of it, and the layers after that."""
    children = dict(net.named_children())
    if "avgpool" in children:  # these modules are run in the order in which they are named
        names = [*children]
        place = names.index("avgpool")
        backbone: list[nn.Module] = [children[name] for name in names[:place]]
        rest = [children[name] for name in names[place + 1 :]]
        left = getattr(children["avgpool"], "output_size", None)
    elif [*children] == ["features", "classifier"]:  # DenseNet pools by a function
        backbone, left, rest = [children["features"], nn.ReLU()], 1, [children["classifier"]]
    else:
        backbone, left, rest = [], None, []
    head = [layer for module in rest for layer in (module if isinstance(module, nn.Sequential) else [module])]
    cells = (left, left) if isinstance(left, int) else left
    known = all(isinstance(layer, nn.Linear | nn.ReLU | nn.Dropout) for layer in head)
    if not (backbone and cells and known and any(isinstance(layer, nn.Linear) for layer in head)):
        raise UserError(
            f"{type(net).__name__} cannot be applied to larger images: it needs a backbone, average pool and linear layers"
        )
    return nn.Sequential(*backbone), tuple(cells), head  # type: ignore[return-value]


def _as_convolution(linear: nn.Linear, window: tuple[int, int], cells: tuple[int, int]) -> nn.Conv2d:
    """A fully connected layer after an adaptive average pool from `window` to `cells`, as a convolution over windows."""
    with torch.device("meta"):
        convolution = nn.Conv2d(linear.in_features // (cells[0] * cells[1]), linear.out_features, window, bias=True)
    weight = linear.weight.detach().unflatten(1, (-1, *cells))
    if window != cells:  # not at the size that the net was made for
        rows, columns = (_pooling(n, m).to(weight) for n, m in zip(window, cells, strict=True))
        weight = torch.einsum("ocij,ip,jq->ocpq", weight, rows, columns)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return convolution


def _pooling(n: int, m: int) -> Tensor:
    """An adaptive average pool of n values to m as a matrix (m, n)."""
    return F.adaptive_avg_pool1d(torch.eye(n), m).T
