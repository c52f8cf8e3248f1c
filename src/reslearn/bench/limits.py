"""Measured limits of a device: multiply-adds and bytes per second."""

import time
from collections.abc import Callable

import torch

SECONDS = 1.0  # per measurement


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def rate(work: Callable[[], object], device: torch.device, seconds: float = SECONDS) -> float:
    """Calls of `work` per second: the best of rounds that take about a tenth of `seconds`."""
    work()
    wait_for(device)
    best, end = 0.0, time.perf_counter() + seconds
    calls = 1
    while time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(device)
        elapsed = time.perf_counter() - started
        best = max(best, calls / elapsed)
        calls = max(1, round(calls * min(10.0, seconds / 10 / elapsed)))
    return best


def matrix_rate(device: torch.device, precision: str) -> float:
    """Multiply-adds per second of a product of two large matrices."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return n**3 * rate(lambda: a @ b, device)


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy larger than the caches."""
    n = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n * rate(lambda: target.copy_(source), device)
