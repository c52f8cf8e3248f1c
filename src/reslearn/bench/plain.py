"""A plain training loop as popular CIFAR repositories have it: worker processes, torchvision's transforms on each image, eager
float32. It is what `bench train` compares with, so it is written the usual way and no worse.
"""

from collections.abc import Generator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

WORKERS = 2


class Images(Dataset[tuple[Tensor, int]]):
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

    def __init__(self, model: nn.Module, images: Images, batch: int, lr: float, device: torch.device, seed: int = 0) -> None:
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
