"""What the command line does, from Python."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from reslearn.files import write_text
from reslearn.training import many, ranks, run
from reslearn.training.recipe import Recipe
from reslearn.training.request import Settings, TrainRequest, parse
from reslearn.training.run import Run

if TYPE_CHECKING:
    from reslearn.data.doctor.diagnosis import Diagnosis
    from reslearn.detect.pictures import DetectedImage
    from reslearn.nets.cost import Cost


def train(
    data: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    model: str | None = None,
    epochs: float | None = None,
    size: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    settings: Settings = (),
    seed: int | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    task: str = "classify",
    quiet: bool = False,
) -> Run:
    """Train a network and write a run folder with a report.

    Args:
        data: data set name, folder or list; for a detector or localizer, a set with boxes.
        recipe: recipe name, file or object; by default chosen from the data.
        model: network name (see `models`).
        epochs: passes over the training images.
        size: side of the network's input in pixels (classification and localization).
        batch: images per step.
        lr: peak learning rate.
        settings: other recipe keys, as a mapping such as `{"optimizer.weight_decay": 1e-4}` or a list of "key=value".
        seed: random seed.
        init: model file or run folder to start from; its network, weights and normalization are reused.
        out: new run folder; by default `runs/DATA-MODEL`.
        device: "auto", "cpu", "cuda" or "mps".
        task: "classify", "detect", "localize", or a task that another package registers.
        quiet: print nothing.

    Returns:
        The run; `run.result` is the content of result.json.

    Raises:
        UserError: invalid input; nothing has been written.
        Interrupted: SIGINT or SIGTERM; the run is saved and can be resumed.
    """
    return train_request(
        parse(
            data,
            recipe,
            model=model,
            epochs=epochs,
            size=size,
            batch=batch,
            lr=lr,
            settings=settings,
            seed=seed,
            init=init,
            out=out,
            device=device,
            task=task,
            quiet=quiet,
        )
    )


def train_seeds(data: str | Path, recipe: str | Path | Recipe | None = None, *, seeds: int, **options: Any) -> list[Run]:
    """Train with consecutive seeds in OUT/seed-0, ...; write OUT/seeds.json and OUT/report.html.

    Args:
        data: as for `train`.
        recipe: as for `train`.
        seeds: number of runs.
        options: those of `train`; `out` is required, and `seed` is the first seed.

    Raises:
        UserError: invalid input; nothing has been written.
        Interrupted: SIGINT or SIGTERM; the runs are saved and can be resumed.
    """
    return train_request_seeds(seeds, parse(data, recipe, **options))


def resume(folder: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Resume an interrupted run (bit-exact on the same machine) and write its report."""
    return _with_report(run.resume(folder, device, quiet))


def resume_seeds(out: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Resume interrupted runs with several seeds."""
    return _with_summary(many.resume_seeds(out, device, quiet))


def write_report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run, or one that compares several. Returns the HTML file.

    Args:
        runs: run folders, or folders of several seeds.
        out: HTML file; by default report.html in the folder of a single run.

    Raises:
        UserError: a folder is not a run, or the tasks differ.
    """
    from reslearn.errors import UserError
    from reslearn.report import write

    given = [Path(runs)] if isinstance(runs, str | Path) else [Path(folder) for folder in runs]
    if out is None and len(given) != 1:
        raise UserError("a report of several runs needs a file: write_report(runs, out)")
    folders = [folder for one in given for folder in many.seed_folders(one) or [one]]
    return write(folders, Path(out) if out is not None else given[0] / "report.html")


def doctor(data: str | Path, fix: str | Path | None = None, *, size: tuple[int, int] | None = None) -> "Diagnosis":
    """Check a data set: damaged files, duplicates, leaks between splits, labels, names, boxes.

    Args:
        data: data set name, folder, packed folder or list.
        fix: new list (.csv) or folder to write the usable images to.
        size: shorter and longest side in pixels to fit anchors at (sets with boxes).

    Returns:
        The diagnosis: `clean`, `findings` and statistics.

    Raises:
        UserError: there is no data set, or `fix` cannot be written.
    """
    from reslearn.data.doctor import check_fix, examine, repair

    if fix is not None:
        check_fix(data, Path(fix))
    diagnosis = examine(data, size=size)
    if fix is not None:
        repair(diagnosis, data, Path(fix))
    return diagnosis


def recipe(name: str, data: str | Path | None = None, *, model: str | None = None, init: str | Path | None = None) -> Recipe:
    """A named recipe as an object; pass it to `train`, changed with `model_copy` if you like.

    Args:
        name: recipe name, such as "default" or "cifar10-paper".
        data: data set, for recipes that choose their values from it.
        model: network name; by default the recipe's own.
        init: model file or run folder to start from, as for `train`.

    Raises:
        UserError: there is no such recipe, or it needs data.
    """
    from reslearn.training.catalog import choose

    return choose(name, data, model, init)[0]


def summary(model: str | Path, input: tuple[int, int, int] | None = None) -> "Cost":
    """Count parameters, multiply-adds and memory of a network.

    Args:
        model: network name, run folder or model file.
        input: (channels, height, width); by default the network's own.

    Returns:
        The cost, with one row per layer in `rows`.

    Raises:
        UserError: there is no such network, or it cannot take the input.
    """
    from reslearn.nets.show import summarize
    from reslearn.weights.store import network

    net, size = network(str(model))
    return summarize(net, input or size)


def features(model: nn.Module | str | Path, images: str | Path | Sequence[str | Path]) -> np.ndarray:
    """Feature embeddings of image files: the input of the last linear layer, float32 (N, D).

    Args:
        model: loaded model, run folder or model file.
        images: image files and folders of images.

    Raises:
        UserError: a file cannot be read, or the network has no linear layer.
    """
    import torch

    from reslearn.analysis.features import features as embed
    from reslearn.data.images.files import read
    from reslearn.deploy.predict import BATCH, card_of, find_images
    from reslearn.weights import load

    network = model if isinstance(model, nn.Module) else load(model)
    view, device, files = card_of(network).preprocessing, next(network.parameters()).device, find_images(images)
    normalize, rows = view.normalizer(device), []
    for start in range(0, len(files), BATCH):
        pixels = torch.stack([view.fit(read(file, view.channels)) for file in files[start : start + BATCH]])
        rows.append(embed(network, normalize(pixels.to(device))))
    return torch.cat(rows).numpy()


def detect_objects(
    models: str | Path | Sequence[str | Path],
    images: str | Path | Sequence[str | Path],
    *,
    score: float = 0.5,
    refinement: bool = False,
    scales: Iterable[int] = (),
    device: str = "auto",
) -> "list[DetectedImage]":
    """Detect objects in image files.

    Args:
        models: run folder or model file of a detector; several form an ensemble.
        images: image files and folders of images.
        score: lowest score of a detection, in [0, 1].
        refinement: refine and vote on the boxes (DRL appendix B).
        scales: shorter sides in pixels for multi-scale testing.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        One result per image. `detections` has boxes (x1, y1, x2, y2 in pixels), labels (from 1: `classes[label - 1]`), scores
        and masks from Mask R-CNN; it is None if the image cannot be read, and `error` says why. `as_json()` has class names.

    Raises:
        UserError: a model is not a detector, or a folder contains no images.
    """
    from reslearn.deploy.predict import find_images
    from reslearn.detect.evaluate import TestOptions, open_detectors
    from reslearn.detect.pictures import predictions
    from reslearn.errors import UserError

    if not 0 <= score <= 1:
        raise UserError(f"score={score}: must be from 0 to 1")
    detectors = open_detectors([models] if isinstance(models, str | Path) else list(models), device)
    return list(predictions(TestOptions(detectors, refinement, tuple(scales)), find_images(images), score))


def train_request(request: TrainRequest) -> Run:
    """Train from a parsed request; see `train`."""
    return _with_report(run.train(request))


def train_request_seeds(seeds: int, request: TrainRequest) -> list[Run]:
    """Train several seeds from a parsed request; see `train_seeds`."""
    return _with_summary(many.train_seeds(seeds, request))


def _with_summary(runs: list[Run]) -> list[Run]:
    out = runs[0].folder.parent
    write_text(out / "seeds.json", json.dumps(many.summary(runs), indent=1))
    _write_report([_with_report(run) for run in runs], out)
    return runs


def _with_report(run: Run) -> Run:
    _write_report([run], run.folder)
    return run


def _write_report(runs: list[Run], folder: Path) -> None:
    """Write FOLDER/report.html, if the task has a report page and the report package is installed."""
    if not ranks.first() or find_spec("reslearn.report") is None:
        return
    from reslearn.report import page

    if all(run.task in page.TASKS for run in runs):
        page.write([run.folder for run in runs], folder / "report.html")
