"""A set with boxes and all of its splits, as a task trains on it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from reslearn.data.boxes.box_set import BoxSet


@dataclass(frozen=True, eq=False)
class AnnotatedSet:
    """A set with boxes as it was opened: its splits by name, with one list of classes. train: the split to train on."""

    path: Path
    classes: tuple[str, ...]
    splits: dict[str, BoxSet]
    train: str = "train"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def training(self) -> BoxSet:
        """The images to train on, validation images not yet held out."""
        return self.splits.get(self.train, self.splits.get("all", next(iter(self.splits.values()))))

    @property
    def has_val(self) -> bool:
        """Whether the set brings validation images."""
        return "val" in self.splits and self.train != "val"

    def fingerprint(self) -> str:
        """A sha256 in hex of what all splits hold."""
        return hashlib.sha256("".join(split.fingerprint() for split in self.splits.values()).encode()).hexdigest()
