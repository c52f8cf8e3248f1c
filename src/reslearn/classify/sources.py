"""From a recipe and a data set to what the loop needs: sources of batches, preprocessing, a fresh network."""

import torch
from torch import Tensor, nn

from reslearn.classify.recipes.recipe import ClassifyRecipe, ImageData
from reslearn.data.images.resident import Resident
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import CACHE_BYTES, Photos, cache_fits, shrunk_bytes
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import integer
from reslearn.data.sets import DataSet, Split
from reslearn.errors import UserError
from reslearn.nets import create
from reslearn.progress import Progress
from reslearn.training.sync_bn import synchronized
from reslearn.training.task import Sources
from reslearn.weights.head import adapt_head
from reslearn.weights.store import Card

Images = Resident | Photos


def _preprocessing(data: DataSet, recipe: ImageData) -> Preprocessing:
    size = data.sizes if recipe.size is None else (recipe.size, recipe.size)
    c = data.channels
    return Preprocessing(channels=c, size=size, crop_ratio=recipe.crop_ratio, mean=(0.0,) * c, std=(1.0,) * c)


def make_sources(
    data: DataSet,
    splits: dict[str, Split],
    recipe: ClassifyRecipe,
    device: torch.device,
    progress: Progress,
    preprocessing: Preprocessing | None = None,
    held_out: dict[str, list[str]] | None = None,
) -> Sources[Images]:
    """Sources of a divided data set. preprocessing: a run's own, or that of the model it starts from; otherwise measured."""
    how, batch = recipe.data, recipe.batch.size
    view = preprocessing or _preprocessing(data, how)
    files = [file for split in data.splits.values() for file in split.files or ()]
    # Whether photos are shrunk before they are cropped decides what training sees: it must not depend on the room on the disk.
    small = not data.packed and shrunk_bytes(len(files), view, data.sizes) <= CACHE_BYTES
    direct = how.jitter is not None or (how.cache != "on" and not small)
    keep = how.cache == "on" or (how.cache == "auto" and not direct and cache_fits(len(files), view, data.sizes))

    def source(split: Split) -> Images:
        if split.pixels is not None:
            return Resident(split, view, flip=how.flip, pad=how.pad, pad_with=how.pad_with, device=device)
        return Photos(
            split,
            view,
            flip=how.flip,
            crop_scale=how.crop_scale,
            jitter=how.jitter,
            grow=how.grow,
            epochs=recipe.schedule.total(len(split), batch) * batch / max(len(split), 1),
            color=how.color,
            cache=files if keep else (),
            direct=direct,
            on_bad=how.on_bad,
            workers=how.workers,
            device=device,
            progress=progress,
        )

    sources = {name: source(split) for name, split in splits.items()}
    if empty := next((name for name, made in sources.items() if not len(made)), None):
        raise UserError(f"'{data.name}': none of the {len(splits[empty])} images of {empty} can be read")
    if preprocessing is None:
        view = measure(sources["train"], view, how.normalize, progress)
        for each in sources.values():
            each.normalize = view.normalizer(device)
    return Sources(sources["train"], sources.get("val"), sources.get("test"), view, held_out or {})


def make_model(recipe: ClassifyRecipe, classes: int, channels: int, device: torch.device) -> nn.Module:
    """The freshly initialized network of a recipe, a function of its seed."""
    torch.manual_seed(integer(recipe.seed, 0x1217))
    model = create(recipe.net.name, classes, channels, **recipe.net.options())
    if recipe.recompute:
        model.recompute = True  # type: ignore[assignment]
    if recipe.batch.sync_bn:
        model = synchronized(model, device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def starting_view(card: Card, data: DataSet, recipe: ImageData) -> Preprocessing:
    """The preprocessing of a run that starts from a model: its channels and statistics, at the run's size."""
    view = _preprocessing(data, recipe)
    old = card.preprocessing
    keeps = {"channels": old.channels, "mean": old.mean, "std": old.std}
    if old.pixel_mean is not None:
        if old.size != view.size:
            raise UserError(f"the model subtracts a mean of {old.size[0]}x{old.size[1]} pixels: set data.size={old.size[0]}")
        keeps["pixel_mean"] = old.pixel_mean
    return view.model_copy(update=keeps)


def start_from(model: nn.Module, card: Card, tensors: dict[str, Tensor], classes: tuple[str, ...]) -> str:
    """Load a model's weights into the run's; the last layer stays fresh where the classes are others. Says which it was."""
    if card.classes == classes:
        model.load_state_dict(tensors)
        return f"starts from {card.net} as it is: the same {len(classes)} classes"
    *_, weight, bias = tensors
    backbone = {name: tensor for name, tensor in tensors.items() if name not in (weight, bias)}
    model.load_state_dict(adapt_head(backbone, model)[0])
    return f"starts from the backbone of {card.net}, with a new last layer: {len(classes)} classes instead of {len(card.classes)}"
