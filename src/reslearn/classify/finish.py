"""The end of a run: the test set, once; the numbers, the pictures and the model files."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.classify.sources import Source, Sources, make_model
from reslearn.data.augment import Draws
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.data.sets import DataSet
from reslearn.evaluation.metrics import metrics
from reslearn.evaluation.protocols import Predictions
from reslearn.files import write_atomic
from reslearn.training import ranks, runtime
from reslearn.training.ending import conclude
from reslearn.training.loop import Loop
from reslearn.training.precise_bn import settle_bn
from reslearn.training.recipe import Recipe
from reslearn.weights.store import Card, save

WORST = 16  # images with the highest loss that the report shows
Bad = dict[str, dict[str, str]]
"""Why images could not be read, by split and name."""
SHEET = (4, 12)  # rows and columns of the sheet of augmented images


def _picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as a picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _save_picture(pixels: Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: _picture(pixels).save(temporary, "PNG"))


def save_augmented_sheet(folder: Path, recipe: Recipe, source: Source) -> None:
    """RUN/images/augmented.png: the first training images as the network sees them."""
    rows, columns = SHEET
    epochs, indices = SampleOrder(recipe.seed, len(source), rows * columns)[0]
    views, _ = source.train_batch(Draws(view_seed(recipe.seed), epochs, indices))
    pixels = F.pad(source.normalize.invert(views).cpu(), (1, 1, 1, 1), value=255)
    sheet = torch.cat([torch.cat(list(row), 2) for row in pixels.split(columns)], 1)
    _save_picture(sheet, folder / "images" / "augmented.png")


def _worst(folder: Path, source: Source, seen: Predictions, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The images with the highest loss, their pictures saved beside."""
    losses = F.cross_entropy(seen.logits, seen.labels, reduction="none")
    rows = []
    for rank, i in enumerate(losses.argsort(descending=True)[:WORST].tolist()):
        image, at = f"images/worst-{rank:02d}.png", int(seen.indices[i])
        _save_picture(source.view(at), folder / image)
        row = {"image": image, "name": source.names[at], "label": classes[seen.labels[i]]}
        row |= {"predicted": classes[int(seen.logits[i].argmax())], "loss": losses[i].item()}
        rows.append(row | {"probability": seen.logits[i].softmax(0)[seen.labels[i]].item()})
    return rows


def _held_out(sources: Sources) -> dict[str, Source]:
    """What the final numbers are taken on: val and test; the training images where nothing could be held out."""
    held = {name: source for name, source in (("val", sources.val), ("test", sources.test)) if source is not None}
    return held or {"train": sources.train}


def finish(loop: Loop, data: DataSet, stop: runtime.Stop) -> dict[str, Any]:
    """Evaluate the last and the best weights in fp32, write the model files and result.json. Returns the result.

    All ranks evaluate; the first one writes, and has the worst images in its result.
    """
    recipe, sources = loop.recipe, loop.sources
    held = _held_out(sources)
    shown = "test" if "test" in held else next(iter(held))

    def numbers(model: nn.Module) -> tuple[dict[str, Any], tuple[Predictions, Bad]]:
        settle_bn(model, loop, stop)
        result: dict[str, Any] = {}
        seen: dict[str, Predictions] = {}
        for name, source in held.items():

            def progress(done: int, name: str = name, total: int = len(source)) -> None:
                stop.check()
                loop.display.progress(f"evaluating on {name}", done, total)

            batch = min(loop.eval_batch(), 250)
            seen[name] = ranks.single_view(model, source, batch=batch, flip=recipe.evaluate.flip, progress=progress)
            result[name] = metrics(seen[name].logits, seen[name].labels, data.classes, seed=recipe.seed)
        bad = {name: ranks.merged(source.bad) for name, source in {"train": sources.train, **held}.items()}
        return result, (seen[shown], {name: reasons for name, reasons in bad.items() if reasons})

    def save_model(model: nn.Module, path: Path, numbers: dict[str, Any]) -> None:
        card = Card(
            net=recipe.net.name,
            options=recipe.net.options(),
            classes=data.classes,
            preprocessing=sources.preprocessing,
            recipe=recipe.model_dump(mode="json"),
            metrics=_short(numbers),
            data={"name": data.name, "fingerprint": data.fingerprint(), "arrangement": data.arrangement()},
        )
        save(model, path, card)

    def more(seen: tuple[Predictions, Bad]) -> dict[str, Any]:
        worst, unreadable = _worst(loop.folder, held[shown], seen[0], data.classes), seen[1]
        views = "the image and its mirror, averaged" if recipe.evaluate.flip else "the image"
        return {"views": views, "worst": worst, "worst_split": shown} | ({"unreadable": unreadable} if unreadable else {})

    def network() -> nn.Module:
        return make_model(recipe, len(data.classes), sources.preprocessing.channels, loop.device)

    return conclude(loop, network, numbers, save_model, more)


def _short(numbers: dict[str, Any]) -> dict[str, Any]:
    """What a model's card keeps of its metrics."""
    kept = ("n", "loss", "top1_error", "top1_interval", "top5_error", "calibration_error")
    return {split: {key: values[key] for key in kept if key in values} for split, values in numbers.items()}
