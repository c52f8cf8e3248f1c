"""Files with the scores of every image, to build ensembles without running the models again."""

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
    """Softmax outputs for N images, averaged over the views of a protocol.

    scores: float32 (N, classes), rows sum to 1. labels: int64 (N,), indices into `classes`. names: of the images.
    model: the model file, or the files of an ensemble. protocol, data, split: names.
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
    """Logarithms of scores (N, classes), finite for a score of 0. Their softmax returns the scores. NaN stays NaN."""
    return scores.clamp_min(torch.finfo(torch.float32).tiny).log()


def check_target(path: Path) -> Path:
    """Returns the path. Raises UserError if scores cannot be written to it."""
    if path.suffix != ".npz":
        raise UserError(f"cannot write scores to {path}: the file must be a .npz")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    return path


def save_scores(scores: Scores, path: Path) -> None:
    """Writes a .npz for numpy.load with scores, labels, names, classes, and the strings model, protocol, data and split."""
    arrays = {"scores": scores.scores.numpy(), "labels": scores.labels.numpy()}
    arrays |= {"names": np.array(scores.names), "classes": np.array(scores.classes)}
    arrays |= {key: np.array(getattr(scores, key)) for key in TEXTS}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomic(check_target(path), write, sum(array.nbytes for array in arrays.values()) / 1e6)


def load_scores(path: Path) -> Scores:
    """Loads a file written by save_scores. Raises UserError if it is missing, damaged or something else."""
    if not path.is_file():
        raise UserError(f"no scores file called {path}")
    try:
        # Opened here because numpy does not close the file if the archive is damaged.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("scores", "labels", "names", "classes", *TEXTS)}
    except KeyError as error:
        raise UserError(f"{path} is not a scores file: it has no {str(error.args[0]).split()[0]}") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a scores file, or is damaged: create it with reslearn eval --scores") from error
    scores, labels, (n, k) = arrays["scores"], arrays["labels"], (len(arrays["names"]), len(arrays["classes"]))
    consistent = scores.shape == (n, k) and scores.dtype == np.float32 and labels.shape == (n,) and labels.dtype == np.int64
    if not consistent or n == 0 or not ((labels >= 0) & (labels < k)).all():
        raise UserError(f"{path} is not a scores file: scores, labels, names and classes are inconsistent")
    if not np.allclose(scores.sum(1), 1, atol=1e-3):  # false for NaN as well
        raise UserError(f"{path} is not a scores file: the rows of scores must sum to 1")
    names, classes = (tuple(map(str, arrays[key])) for key in ("names", "classes"))
    return Scores(torch.from_numpy(scores), torch.from_numpy(labels), names, classes, **{key: str(arrays[key]) for key in TEXTS})


def ensemble(members: Sequence[Scores]) -> Scores:
    """Averages the members' scores (DRL, Table 5).

    Raises UserError with the first difference unless images, labels and classes are the same.
    """
    first, *others = members
    for other in others:
        _check_same(first, other)
    mean = torch.stack([member.scores for member in members]).mean(0)
    texts = {key: " + ".join(dict.fromkeys(getattr(member, key) for member in members)) for key in TEXTS}
    return Scores(mean, first.labels, first.names, first.classes, **texts)


def _check_same(a: Scores, b: Scores) -> None:
    problem = f"cannot average {a.model} and {b.model}"
    seeds = "; runs with different seeds have different validation images: evaluate on images that none was trained on"
    for key, item, hint in (("classes", "class", ""), ("names", "image", seeds)):
        for i, (x, y) in enumerate(zip_longest(getattr(a, key), getattr(b, key))):
            if x != y:
                x, y = (f"'{name}'" if name is not None else "missing" for name in (x, y))
                raise UserError(f"{problem}: {item} {i} is {x} in the first and {y} in the second{hint}")
    for i in (a.labels != b.labels).nonzero()[:1, 0].tolist():
        x, y = a.classes[a.labels[i]], a.classes[b.labels[i]]
        raise UserError(f"{problem}: '{a.names[i]}' is labeled '{x}' in the first and '{y}' in the second")
