"""Where to compute, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from reslearn.errors import UserError, did_you_mean


def pick_device(name: str = "auto") -> torch.device:
    """The fastest device there is, or the one asked for. Raises UserError where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind = name.split(":")[0]
    if kind not in there:
        raise UserError(f"no device '{name}'{did_you_mean(name, ['auto', *there])}")
    if not there[kind]:
        raise UserError(f"device '{name}' is not available here: {', '.join(k for k, yes in there.items() if yes)} is")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device '{name}': write a kind, or a kind and a number, such as cuda:1") from error
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise UserError(f"no device '{name}': there is {f'only {kind}:0' if count == 1 else f'{kind}:0 to {kind}:{count - 1}'}")
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 where the hardware computes in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        has = [getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return "bf16" if any(has) else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What the forward pass runs in. The weights, the optimizer and the loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
