"""The weights of a network for one with other classes."""

from collections.abc import Mapping

from torch import Tensor, nn

from reslearn.errors import UserError


def adapt_head(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Weights for a model with other classes: the backbone is kept, the head is the model's own, newly initialized one.

    tensors: a state dict under our names. model: the same network. Returns the model's whole state dict and a sentence.
    Raises UserError where more than the head differs.
    """
    own = model.state_dict()
    *_, weight, bias = own
    backbone = {name for name in own if name not in (weight, bias) and not name.endswith("num_batches_tracked")}
    for name in own:
        if name in backbone and (name not in tensors or tensors[name].shape != own[name].shape):
            there = _size(tensors[name]) if name in tensors else "missing"
            raise UserError(f"the weights do not fit this network: '{name}' is {there}, not {_size(own[name])}")
    if weight in tensors and bias in tensors and tensors[weight].shape == own[weight].shape:
        return {name: tensors.get(name, own[name]) for name in own}, f"all weights fit, with the head's {len(own[bias])} classes"
    kept = {name: own[name] if name in (weight, bias) else tensors.get(name, own[name]) for name in own}
    had = f"{tensors[weight].shape[0]} classes" if weight in tensors else "no head"
    return kept, f"the backbone is kept; the file has {had}, so the head for {len(own[bias])} classes is new and has to be trained"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
