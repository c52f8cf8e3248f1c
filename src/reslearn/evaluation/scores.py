"""Scores of every image, kept in a file, so that models make an ensemble without being run again."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reslearn.errors import UserError
from reslearn.evaluation.metrics import metrics
from reslearn.files import write_atomic

TEXTS = ("model", "protocol", "data", "split")


@dataclass(frozen=True, eq=False)
class Scores:
    """What models say of images: the softmax outputs as a protocol has averaged them.

    scores: float32 (N, classes), rows add up to 1; labels: int64 (N,), places in `classes`; names: of the N images.
    model: its file, or those of an ensemble; protocol, data, split: what they are called.
    """

    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    model: str
    protocol: str
    data: str
    split: str

    def metrics(self, seed: int = 0) -> dict[str, Any]:
        """See evaluation.metrics.metrics."""
        return metrics(log(self.scores), self.labels, self.classes, seed=seed)


def log(scores: Tensor) -> Tensor:
    """Logarithms of scores (N, classes), finite where a score is 0; their softmax gives the scores back. NaN stays NaN."""
    return scores.clamp_min(torch.finfo(torch.float32).tiny).log()


def check_target(path: Path) -> Path:
    """A path that scores can be written to. Raises UserError."""
    if path.suffix != ".npz":
        raise UserError(f"cannot write scores to {path}: the file must be a .npz")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    return path


def save_scores(scores: Scores, path: Path) -> None:
    """A .npz (numpy.load reads it): scores, labels, names, classes, and model, protocol, data and split as texts."""
    arrays = {"scores": scores.scores.numpy(), "labels": scores.labels.numpy()}
    arrays |= {"names": np.array(scores.names), "classes": np.array(scores.classes)}
    arrays |= {key: np.array(getattr(scores, key)) for key in TEXTS}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomic(check_target(path), write, sum(array.nbytes for array in arrays.values()) / 1e6)


def load_scores(path: Path) -> Scores:
    """The scores of a file that save_scores has written. Raises UserError where it is missing, damaged or something else."""
    if not path.is_file():
        raise UserError(f"there is no file of scores called {path}")
    try:
        # Opened here: numpy leaves a file open where the archive is broken.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {key: file[key] for key in ("scores", "labels", "names", "classes", *TEXTS)}
    except KeyError as error:
        raise UserError(f"{path}: is no file of scores: it has no {str(error.args[0]).split()[0]}") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no file of scores, or is damaged: make it with reslearn eval --scores") from error
    scores, labels, (n, k) = found["scores"], found["labels"], (len(found["names"]), len(found["classes"]))
    whole = scores.shape == (n, k) and scores.dtype == np.float32 and labels.shape == (n,) and labels.dtype == np.int64
    if not whole or n == 0 or not ((labels >= 0) & (labels < k)).all():
        raise UserError(f"{path}: is no file of scores: scores, labels, names and classes do not fit together")
    if not np.allclose(scores.sum(1), 1, atol=1e-3):  # false for NaN as well
        raise UserError(f"{path}: is no file of scores: rows must add up to 1")
    names, classes = (tuple(map(str, found[key])) for key in ("names", "classes"))
    return Scores(torch.from_numpy(scores), torch.from_numpy(labels), names, classes, **{key: str(found[key]) for key in TEXTS})


def ensemble(members: Sequence[Scores]) -> Scores:
    """The mean of the members' scores (DRL, Table 5). Raises UserError, naming the first difference, where they are not of the
    same images, labels and classes.
    """
    first, *others = members
    for other in others:
        _check_same(first, other)
    mean = torch.stack([member.scores for member in members]).mean(0)
    texts = {key: " + ".join(dict.fromkeys(getattr(member, key) for member in members)) for key in TEXTS}
    return Scores(mean, first.labels, first.names, first.classes, **texts)


def _check_same(a: Scores, b: Scores) -> None:
    both = f"{a.model} and {b.model} cannot be averaged"
    for what in ("classes", "names"):
        for i, (x, y) in enumerate(zip_longest(getattr(a, what), getattr(b, what))):
            if x != y:
                one = {"classes": "class", "names": "image"}[what]
                told = [f"'{name}'" if name is not None else "none" for name in (x, y)]
                hint = "; runs with other seeds hold out other images: give images that none has seen" if what == "names" else ""
                raise UserError(f"{both}: {one} {i} is {told[0]} of the first and {told[1]} of the second{hint}")
    for i in (a.labels != b.labels).nonzero()[:1, 0].tolist():
        x, y = a.classes[a.labels[i]], a.classes[b.labels[i]]
        raise UserError(f"{both}: '{a.names[i]}' is labeled '{x}' in the first and '{y}' in the second")
