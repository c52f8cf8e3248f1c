"""Transfers weights to a network with other classes."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from reslearn.errors import UserError


def adapt_head(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Returns a state dict for `model` with the backbone of `tensors`, and a description of what was reused.

    The head is reused, too, if its shape fits; otherwise it stays as the model has initialized it.
    Raises UserError if a tensor of the backbone is missing or has another shape.
    """
    own = model.state_dict()
    *_, weight, bias = own
    backbone = {name for name in own if name not in (weight, bias) and not name.endswith("num_batches_tracked")}
    for name in own:
        if name in backbone and (name not in tensors or tensors[name].shape != own[name].shape):
            size = shape_text(tensors[name].shape) if name in tensors else "missing"
            raise UserError(f"the weights do not fit this network: '{name}' is {size}, not {shape_text(own[name].shape)}")
    classes = len(own[bias])
    if weight in tensors and bias in tensors and tensors[weight].shape == own[weight].shape:
        return {name: tensors.get(name, own[name]) for name in own}, f"all weights fit, including the head ({classes} classes)"
    adapted = {name: own[name] if name in (weight, bias) else tensors.get(name, own[name]) for name in own}
    head = f"{tensors[weight].shape[0]} classes" if weight in tensors else "no head"
    return adapted, f"backbone reused; the file has {head}, so the head for {classes} classes is new and must be trained"


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
