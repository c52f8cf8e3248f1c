"""Feature embeddings: the input of a network's last linear layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reslearn.analysis.subject import chunks
from reslearn.errors import UserError
from reslearn.files import write_atomic


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings of images (N, C, H, W): float32 (N, D), on the CPU. Raises UserError if the network has no linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("this network has no linear layer")
    rows: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].float().cpu()))
    try:
        for (part,) in chunks(images):
            model(part)
    finally:
        handle.remove()
    return torch.cat(rows)


def in_two_dimensions(rows: Tensor, seed: int = 0) -> tuple[Tensor, tuple[float, float]]:
    """The first two principal components, float32 (N, 2), and the share of the variance that each explains."""
    centered = rows - rows.mean(0)
    torch.manual_seed(seed)
    _, _, directions = torch.pca_lowrank(centered, q=min(6, *rows.shape), center=False)
    points = centered @ directions[:, :2]
    one, two = (points.square().sum(0) / centered.square().sum().clamp(min=1e-12)).tolist()
    return points, (one, two)


def check_format(path: Path) -> None:
    """Raises UserError if `write` does not support this file name."""
    if path.suffix not in (".npz", ".parquet"):
        raise UserError(f"{path}: unknown format: features are saved as .npz or .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            raise UserError(f"{path}: writing .parquet needs pyarrow: pip install pyarrow, or use .npz") from None


def write(path: Path, rows: Tensor, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
    """Writes features (N, D) with the images' names and labels. labels: indices into `classes`, -1 for no label.

    .npz: arrays `features`, `labels`, `names`, `classes`. .parquet: one row per image, `name`, `label` (class name), `features`.
    """
    check_format(path)
    if path.suffix == ".npz":
        arrays = {"features": rows.numpy(), "labels": np.array(labels), "names": np.array(names), "classes": np.array(classes)}

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:  # numpy would append .npz to a path
                np.savez(file, **arrays)  # type: ignore[arg-type]

    else:
        import pyarrow  # type: ignore[import-not-found]
        import pyarrow.parquet  # type: ignore[import-not-found]

        label_names = [classes[label] if label >= 0 else None for label in labels]
        columns = {"name": list(names), "label": pyarrow.array(label_names, pyarrow.string()), "features": list(rows.numpy())}

        def save(temporary: Path) -> None:
            pyarrow.parquet.write_table(pyarrow.table(columns), temporary)

    write_atomic(path, save, rows.nbytes / 1e6)
