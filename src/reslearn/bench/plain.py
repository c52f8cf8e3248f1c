"""The baseline of `bench train`: a training loop like those of popular CIFAR repositories.

It uses worker processes, torchvision's transforms per image, and eager float32. It runs in its own process, so that none of
our settings can affect it.
"""

import multiprocessing
import signal
import time
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from reslearn import data as datasets
from reslearn.bench import limits
from reslearn.data.splits import divide
from reslearn.errors import UserError
from reslearn.nets import create, spec

WORKERS = 2


def reference(net: str) -> str | None:
    """The name of torchvision's network of the same depth, or None."""
    row = spec(net)
    residual = row.build is None and row.stem == "imagenet" and not row.plain
    return f"resnet{row.depth}" if residual and row.depth in (18, 34, 50, 101, 152) else None


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images in memory with torchvision's transforms."""

    def __init__(self, pixels: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], pad: int) -> None:
        self.images = [image.squeeze(2) if image.shape[2] == 1 else image for image in pixels.permute(0, 2, 3, 1).numpy()]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(tuple(pixels.shape[-2:]), pad),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        view: Any = self.transform(Image.fromarray(self.images[i]))
        return view, self.labels[i]


class PlainLoop:
    """The baseline loop. The loader's workers continue between steps."""

    def __init__(
        self, model: nn.Module, images: TransformedImages, batch: int, lr: float, device: torch.device, seed: int = 0
    ) -> None:
        self.model, self.images, self.batch, self.device = model.to(device).train(), images, batch, device
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        self.seed = seed
        self.batches = self._repeat()

    def _repeat(self) -> Generator[list[Tensor]]:
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            yield from DataLoader(
                self.images,
                self.batch,
                sampler=RandomSampler(self.images, generator=generator),
                num_workers=WORKERS,
                drop_last=True,
                pin_memory=self.device.type == "cuda",
                generator=generator,
            )
            epoch += 1

    def close(self) -> None:
        """Stops the workers."""
        self.batches.close()

    def step(self) -> float:
        """Trains on one batch and returns its loss."""
        images, labels = next(self.batches)
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def plain_loop(
    data: datasets.DataSet, net: str, options: dict[str, Any], batch: int, device: torch.device, seed: int, *, theirs: bool = False
) -> PlainLoop:
    """The loop on the training images of a data set in memory. theirs: use torchvision's network of the same depth."""
    torch.manual_seed(seed)
    classes = len(data.classes)
    model = getattr(torchvision.models, reference(net) or "")(num_classes=classes) if theirs else None
    train = divide(data, val=0.1, test=0, seed=seed)[0]["train"]
    assert train.pixels is not None
    x = train.pixels[::10].double() / 255
    mean, std = tuple(x.mean((0, 2, 3)).tolist()), tuple(x.std((0, 2, 3)).tolist())
    images = TransformedImages(train.pixels, torch.from_numpy(train.labels), mean, std, 4)
    return PlainLoop(model or create(net, classes, data.channels, **options), images, batch, 0.1, device, seed)


class PlainProcess:
    """A plain loop in its own process. Takes plain_loop's arguments, but the name of the data set."""

    def __init__(self, data: str, *arguments: Any, threads: int, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, threads, data, *arguments), kwargs=options)
        self.process.start()
        child_pipe.close()

    def seconds(self, steps: int) -> float:
        """Trains `steps` steps and returns their time. Raises UserError if the process has ended."""
        try:
            self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("the plain loop's process has ended; see its output above") from None

    def close(self) -> None:
        """Ends the process and its workers."""
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join()


def _serve(
    pipe: Connection, threads: int, data: str, net: str, options: dict[str, Any], batch: int, device: torch.device, **more: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well and ends this process
    torch.set_num_threads(threads)
    loop = plain_loop(datasets.open(data), net, options, batch, device, **more)
    try:
        while (steps := pipe.recv()) is not None:
            started = time.perf_counter()
            for _ in range(steps):
                loop.step()
            limits.wait_for(device)
            pipe.send(time.perf_counter() - started)
    except (EOFError, OSError):  # the parent has ended
        pass
    finally:
        loop.close()
