"""A plain training loop as popular CIFAR repositories have it: worker processes, torchvision's transforms on each image, eager
float32. It is what `bench train` compares with, so it is written the usual way and no worse, and runs in a process of its own,
which nothing that we set for ours can slow or help.
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
TORCHVISION = {18: "resnet18", 34: "resnet34", 50: "resnet50", 101: "resnet101", 152: "resnet152"}


def reference(net: str) -> str | None:
    """The name of torchvision's own network of the same depth, where there is one."""
    row = spec(net)
    if row.build is not None or row.stem != "imagenet" or row.plain or row.depth not in TORCHVISION:
        return None
    return TORCHVISION[row.depth]


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, one at a time through the transforms."""

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
    """One step at a time of the plain loop; the loader runs on between steps, as it does there."""

    def __init__(
        self, model: nn.Module, images: TransformedImages, batch: int, lr: float, device: torch.device, seed: int = 0
    ) -> None:
        self.model, self.images, self.batch, self.device = model.to(device).train(), images, batch, device
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        self.seed = seed
        self.batches = self._endless()

    def _endless(self) -> Generator[list[Tensor]]:
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
        """End the workers."""
        self.batches.close()

    def step(self) -> float:
        """Train on one batch. Returns its loss."""
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
    """The loop on the training images of a data set in memory. theirs: with torchvision's network of the same depth."""
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
    """A plain loop in a process of its own. Takes plain_loop's arguments, with a data set's name."""

    def __init__(self, data: str, *arguments: Any, threads: int, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads, data, *arguments), kwargs=options)
        self.process.start()
        other.close()

    def seconds(self, steps: int) -> float:
        """Train so many steps. Returns how long they took. Raises UserError where the process has ended."""
        try:
            self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("the plain loop's process has ended; what it said is above") from None

    def close(self) -> None:
        """End the process and its workers."""
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join()


def _serve(
    pipe: Connection, threads: int, data: str, net: str, options: dict[str, Any], batch: int, device: torch.device, **more: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked gets it too, and ends this process
    torch.set_num_threads(threads)
    loop = plain_loop(datasets.open(data), net, options, batch, device, **more)
    try:
        while (steps := pipe.recv()) is not None:
            started = time.perf_counter()
            for _ in range(steps):
                loop.step()
            limits.wait_for(device)
            pipe.send(time.perf_counter() - started)
    except (EOFError, OSError):  # whoever asked has gone
        pass
    finally:
        loop.close()
