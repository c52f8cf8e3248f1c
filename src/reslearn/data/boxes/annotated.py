"""A set with boxes and all its splits, for training."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from reslearn.data.boxes.box_set import BoxSet


@dataclass(frozen=True, eq=False)
class AnnotatedSet:
    """An opened set with boxes: its splits by name, with common classes. train: the name of the training split."""

    path: Path
    classes: tuple[str, ...]
    splits: dict[str, BoxSet]
    train: str = "train"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def training(self) -> BoxSet:
        """The training images, including any that will be held out for validation."""
        return self.splits.get(self.train, self.splits.get("all", next(iter(self.splits.values()))))

    @property
    def has_val(self) -> bool:
        """Whether the set has its own validation split."""
        return "val" in self.splits and self.train != "val"

    def fingerprint(self) -> str:
        """The sha256 of all splits, in hex."""
        return hashlib.sha256("".join(split.fingerprint() for split in self.splits.values()).encode()).hexdigest()
