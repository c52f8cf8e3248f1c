"""Distributed training with torchrun. All functions also work in a single process, where they do nothing.

After each step all ranks hold the same state, bit for bit: weights, momentum buffers, averages, BN statistics and counts. Rank 0
writes it for all. Each rank takes its slice of every batch; sampling and augmentation are pure functions, so the samples and their
order are those of a single process.
"""

import inspect
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from reslearn.errors import Interrupted, Lost, UserError
from reslearn.nets.variants import StochasticDepth
from reslearn.training.recipe import Recipe

T = TypeVar("T")
# A rank that does not respond within a step is dead or hangs. torchrun gives the others 30 s more to exit and needs a few seconds
# itself, so the job ends within 90 s.
ANSWER = timedelta(seconds=40)
NOTICE = 3.0  # seconds until all ranks have noticed that one does not respond
WRITING = timedelta(minutes=10)  # limit for rank 0 to write a checkpoint
PREPARING = timedelta(hours=2)  # limit for preparing the data: photos may have to be decoded once
GLOO = ("gloo", "pair closure", "Barrier")  # parts of gloo's error messages, which are plain RuntimeErrors

_host: Any = None  # the gloo group for communication between hosts, whatever backend the gradients use
_patient: dict[timedelta, Any] = {}  # gloo groups with longer timeouts: monitored_barrier uses that of the group on ranks above 0
_store: Any = None  # the key-value store of torchrun, or of rank 0


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process prints and writes. Valid also before the ranks have joined, and after."""
    return (rank() if count() > 1 or launched() == 1 else int(os.environ["RANK"])) == 0


def launched() -> int:
    """The number of ranks that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def job() -> str | None:
    """An id of the current torchrun job, the same after restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} of process {os.getppid()}" if name == "none" else name  # "none" is the default of every job on one host


def restarts() -> tuple[int, int]:
    """The number of times that torchrun has restarted the ranks, and its maximum."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Connect the ranks that torchrun has started. device: as for device.pick_device.

    If a rank dies, the others raise Lost, a UserError, at once, and torchrun names it. If a rank hangs, they raise Lost after
    ANSWER, and the error names it.
    """
    global _host, _patient, _store
    if _host is not None or (launched() == 1 and count() == 1):
        yield
        return
    if not dist.is_available():
        raise UserError("training on several ranks needs a PyTorch build with torch.distributed")
    backend = "nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(own_device(torch.device("cuda")))
    if not dist.is_initialized():
        # torchrun keeps its store after a restart: without a prefix, the ranks would find the addresses of the dead processes.
        store, number, ranks = next(rendezvous("env://", timeout=ANSWER))
        _store = PrefixStore(f"attempt-{restarts()[0]}", store)
        dist.init_process_group(backend, store=_store, rank=number, world_size=ranks, timeout=ANSWER)
    _host = dist.new_group(backend="gloo", timeout=ANSWER)
    _patient = {limit: dist.new_group(backend="gloo", timeout=limit) for limit in (WRITING, PREPARING)}
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in GLOO)):
            raise
        reason = str(error).splitlines()[0].split("cc:")[-1].split("] ", 1)[-1].split(". ")[0].rstrip(".")
        if re.search("timed out|timeout|failed to pass", reason, re.IGNORECASE) and (silent := _unresponsive()):
            subject = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} have"
            reason = f"{subject} not responded for {ANSWER.total_seconds():.0f} s"
        raise Lost(f"lost contact between ranks: {reason}; resume the run from its last checkpoint") from error
    except Interrupted:
        _leave()
        raise
    _leave()


def _unresponsive() -> list[int]:
    """The ranks that hang: those that have not reported, as this one does, that they miss another rank."""
    if _store is None:
        return []
    results: list[list[int]] = []

    def query() -> None:
        _store.set(f"waiting-{rank()}", "")
        time.sleep(NOTICE)
        results.append([other for other in range(count()) if not _store.check([f"waiting-{other}"])])

    thread = Thread(target=query, daemon=True)  # if the host of the store hangs, the store's own timeout has no effect
    thread.start()
    thread.join(3 * NOTICE)
    return results[0] if results else [0]  # rank 0 or its host, which keeps the store


def _leave() -> None:
    global _host, _patient
    dist.destroy_process_group()
    _host, _patient = None, {}


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: its own GPU, or the CPU. Raises UserError if there is no such GPU."""
    if launched() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"training on several ranks does not support {device.type}: use --device cpu")
    if device.index is not None:
        raise UserError(f"--device {device}: each rank needs its own GPU; use --device cuda")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"no GPU for rank {local} of this host: start at most one rank per GPU, --nproc-per-node {gpus}")
    return torch.device("cuda", local)


def check(recipe: Recipe) -> None:
    """Raise UserError if the batch cannot be divided among the ranks."""
    multiple = count() * (recipe.batch.micro or 1)
    if recipe.batch.size % multiple:
        ranks = f"{count()} ranks" + (f" with batch.micro={recipe.batch.micro}" if recipe.batch.micro else "")
        raise UserError(f"batch.size={recipe.batch.size} cannot be divided among {ranks}: set a multiple of {multiple}")


def own(images: int) -> slice:
    """This rank's slice of a batch. Micro-batches are the same for any number of ranks."""
    share = images // count()
    return slice(rank() * share, (rank() + 1) * share)


def seed_rank(model: nn.Module) -> int:
    """The rank to seed the network's random numbers with: this one, or 0 for gates that a whole mini-batch shares."""
    shared = any(isinstance(module, StochasticDepth) and not module.per_sample for module in model.modules())
    return 0 if shared else rank()


def parallel(model: nn.Module) -> nn.Module:
    """Wraps the model in DDP, which averages gradients over the ranks.

    find_unused_parameters is for blocks that stochastic depth skips. It also keeps DDP from rebuilding its buckets after the first
    step: a resumed run would then sum gradients in another order.
    """
    if count() == 1:
        return model
    on = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in PyTorch 2.15
    options: dict[str, Any] = {sync: False, "find_unused_parameters": True}  # buffers: see average
    return DistributedDataParallel(model, device_ids=[on] if on.type == "cuda" else None, **options)


def accumulating(model: Any, last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch: only the last one of a step synchronizes gradients."""
    return nullcontext() if last or count() == 1 else model.no_sync()


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if count() > 1:
        dist.all_reduce(tensor, group=_host if tensor.device.type == "cpu" else None)
    return tensor


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks."""
    if count() == 1 or not tensors:
        return
    flat = total(torch.cat([tensor.reshape(-1) for tensor in tensors])) / count()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def agree(number: int) -> int:
    """The maximum of a number over all ranks."""
    if count() == 1:
        return number
    maximum = torch.tensor(number)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, _host)
    return int(maximum)


def wait(limit: timedelta, others: timedelta | None = None) -> None:
    """Barrier. Raises RuntimeError after `limit`, which is WRITING or PREPARING.

    others: a shorter limit for rank 0, whose error names the missing ranks.
    """
    if count() > 1:
        dist.monitored_barrier(_patient[limit], others if others is not None and first() else limit)


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, _host)
    return values


def merged(entries: dict[str, str]) -> dict[str, str]:
    """The union of the dicts of all ranks."""
    return {key: value for own in gather(entries) for key, value in own.items()}


def by_first(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on all ranks. A UserError is raised on all ranks."""
    if count() == 1:
        return function()
    result: list[Any] = [None, None]  # value, error message
    own: UserError | None = None
    if first():
        try:
            result[0] = function()
        except UserError as error:
            own, result[1] = error, str(error)  # only the message is sent: subclasses may not survive pickling
    wait(PREPARING)
    dist.broadcast_object_list(result, 0, _host)
    if result[1] is not None:
        error = own or UserError(result[1])
        error.shared = True
        raise error
    return result[0]
