"""Device and precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from reslearn.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """Returns a device; "auto" is the fastest one available. Raises UserError for a device that is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    kind = name.split(":")[0]
    if kind not in available:
        raise UserError(f"no device '{name}': must be auto, cpu, cuda or mps")
    if not available[kind]:
        raise UserError(f"device '{name}' is not available; available: {', '.join(k for k, yes in available.items() if yes)}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device '{name}': must be a kind, or a kind and an index, such as cuda:1") from error
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise UserError(f"no device '{name}'; available: {', '.join(f'{kind}:{i}' for i in range(count))}")
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """Returns "fp32" or "bf16"; "auto" is bf16 if the hardware supports it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of the forward pass. Weights, optimizer and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
