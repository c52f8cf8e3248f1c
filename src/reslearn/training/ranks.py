"""Several processes ("ranks") train one network, as torchrun starts them: torch.distributed, and where it is used. A process
alone goes through here unchanged.

After each step all ranks hold the same state, bit for bit: weights, velocities, averages, BN's statistics, counts. So what rank 0
writes is everyone's, and which rank evaluates what does not matter. Each rank takes its slice of every batch, of which the draws
are pure functions: the samples and their order are those of one rank.
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
# A rank that does not answer within a step is dead or hangs. torchrun gives it half a minute more to end by itself and needs a
# few seconds of its own: the job is over within 90.
ANSWER = timedelta(seconds=40)
MOMENT = 3.0  # seconds in which all ranks notice that one does not answer
WRITING = timedelta(minutes=10)  # of a checkpoint, by rank 0
PREPARING = timedelta(hours=2)  # of the images: photos may be decoded, once
GLOO = ("gloo", "pair closure", "Barrier")  # words of its errors, which have no class of their own

_host: Any = None  # the group in which processes talk: gloo, whatever the gradients travel by
_patient: dict[timedelta, Any] = {}  # the same, where they wait longer: all but rank 0 wait as long as their group does
_store: Any = None  # where they leave word for each other; kept by torchrun, or by rank 0


def count() -> int:
    """How many ranks train."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that prints and writes; also before the ranks have joined, and after."""
    return (rank() if count() > 1 or asked() == 1 else int(os.environ["RANK"])) == 0


def asked() -> int:
    """How many ranks torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def job() -> str | None:
    """A name of torchrun's present job, the same in all of its restarts; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} of process {os.getppid()}" if name == "none" else name  # "none" is the default, of any job on one host


def restarts() -> tuple[int, int]:
    """How often torchrun has restarted the ranks, and how often it may."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    done, most = (int(os.environ.get(name, "0")) for name in names)
    return done, most


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """The ranks that torchrun has started, together; one process alone as it is. device: as for device.pick_device.

    A rank that dies ends the others at once with Lost, a UserError, and torchrun names it; one that hangs does so after ANSWER,
    and the error names it.
    """
    global _host, _patient, _store
    if _host is not None or (asked() == 1 and count() == 1):
        yield
        return
    if not dist.is_available():
        raise UserError("this PyTorch cannot train on several ranks: it was built without torch.distributed")
    backend = "nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(own_device(torch.device("cuda")))
    if not dist.is_initialized():
        # torchrun keeps its store when it starts ranks again: without a name of their own they would find the dead ones' addresses.
        store, number, ranks = next(rendezvous("env://", timeout=ANSWER))
        _store = PrefixStore(f"attempt-{restarts()[0]}", store)
        dist.init_process_group(backend, store=_store, rank=number, world_size=ranks, timeout=ANSWER)
    _host = dist.new_group(backend="gloo", timeout=ANSWER)
    _patient = {most: dist.new_group(backend="gloo", timeout=most) for most in (WRITING, PREPARING)}
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in GLOO)):
            raise
        what = str(error).splitlines()[0].split("cc:")[-1].split("] ", 1)[-1].split(". ")[0].rstrip(".")
        if re.search("timed out|timeout|failed to pass", what, re.IGNORECASE) and (silent := _silent()):
            which = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} have"
            what = f"{which} not answered for {ANSWER.total_seconds():.0f} s"
        raise Lost(f"the ranks have lost each other: {what}; the run's last checkpoint is whole") from error
    except Interrupted:
        _leave()
        raise
    _leave()


def _silent() -> list[int]:
    """The ranks that have not noticed, as this one has, that another does not answer: those that hang."""
    if _store is None:
        return []
    found: list[list[int]] = []

    def ask() -> None:
        _store.set(f"waiting-{rank()}", "")
        time.sleep(MOMENT)
        found.append([other for other in range(count()) if not _store.check([f"waiting-{other}"])])

    asking = Thread(target=ask, daemon=True)  # a store whose host hangs never answers, whatever its timeout
    asking.start()
    asking.join(3 * MOMENT)
    return found[0] if found else [0]  # or rank 0's host, which keeps the store


def _leave() -> None:
    global _host, _patient
    dist.destroy_process_group()
    _host, _patient = None, {}


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: a GPU of its own. Raises UserError where there is none."""
    if asked() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"several ranks train on CPUs or NVIDIA's GPUs, not on {device.type}: give --device cpu")
    if device.index is not None:
        raise UserError(f"--device {device}: each rank takes a GPU of its own; give --device cuda")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise UserError(f"there is no GPU for rank {local} of this host: start no more ranks than GPUs, --nproc-per-node {there}")
    return torch.device("cuda", local)


def check(recipe: Recipe) -> None:
    """Raise UserError where ranks cannot share the recipe's batches."""
    parts, micro = count(), recipe.batch.micro or 1
    if recipe.batch.size % (parts * micro):
        each = f"{parts} ranks" if micro == 1 else f"{parts} ranks of micro-batches of {micro}"
        raise UserError(f"batch.size={recipe.batch.size} cannot be shared by {each}: make it a multiple of {parts * micro}")


def own(images: int) -> slice:
    """This rank's part of a batch. Micro-batches are the same ones on any number of ranks, and so are those of BN."""
    share = images // count()
    return slice(rank() * share, (rank() + 1) * share)


def draws(model: nn.Module) -> int:
    """Whose draws inside the network a rank takes: its own, or, for gates of a whole mini-batch, those of rank 0."""
    shared = any(isinstance(module, StochasticDepth) and not module.per_sample for module in model.modules())
    return 0 if shared else rank()


def parallel(model: nn.Module) -> nn.Module:
    """The model, with gradients that are the mean over all ranks after a backward pass.

    DDP sends gradients while others are still computed. Looking for parameters that were not used (a block that stochastic depth
    left out) also keeps it from rearranging its buckets after the first step, after which sums would be taken in another order
    than in a run that has not been resumed.
    """
    if count() == 1:
        return model
    on = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before PyTorch 2.15
    how: dict[str, Any] = {sync: False, "find_unused_parameters": True}  # buffers: see average
    return DistributedDataParallel(model, device_ids=[on] if on.type == "cuda" else None, **how)


def accumulating(model: Any, last: bool) -> AbstractContextManager[Any]:
    """What all but the last micro-batch of a step run in: their gradients travel with the last one's."""
    return nullcontext() if last or count() == 1 else model.no_sync()


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place, on its device."""
    if count() > 1:
        dist.all_reduce(tensor, group=_host if tensor.device.type == "cpu" else None)
    return tensor


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Make each tensor its mean over all ranks."""
    if count() == 1 or not tensors:
        return
    flat = total(torch.cat([tensor.reshape(-1) for tensor in tensors])) / count()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def agree(number: int) -> int:
    """The largest of the ranks' numbers: what all of them act on."""
    if count() == 1:
        return number
    asked_for = torch.tensor(number)
    dist.all_reduce(asked_for, dist.ReduceOp.MAX, _host)
    return int(asked_for)


def wait(most: timedelta, others: timedelta | None = None) -> None:
    """Until all ranks are here. Raises RuntimeError after `most`, WRITING or PREPARING; rank 0 waits for `others` so long, if it is
    given, and names those that are not here.
    """
    if count() > 1:
        dist.monitored_barrier(_patient[most], others if others is not None and first() else most)


def gather(value: T) -> list[T]:
    """Every rank's value, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, _host)
    return values


def merged(parts: dict[str, str]) -> dict[str, str]:
    """The entries of all ranks."""
    return {key: value for part in gather(parts) for key, value in part.items()}


def by_first(work: Callable[[], T]) -> T:
    """What work() is on rank 0, for all ranks; a UserError of it is everyone's."""
    if count() == 1:
        return work()
    found: list[Any] = [None, None]
    own: UserError | None = None
    if first():
        try:
            found[0] = work()
        except UserError as error:
            own, found[1] = error, str(error)  # its text alone: one with more to it may not be made anew from what is sent
    wait(PREPARING)
    dist.broadcast_object_list(found, 0, _host)
    if found[1] is not None:
        error = own or UserError(found[1])
        error.shared = True
        raise error
    return found[0]
