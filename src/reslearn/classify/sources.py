"""Makes the sources of batches, the preprocessing and the initial network of a run."""

import torch
from torch import Tensor, nn

from reslearn.classify.recipes.recipe import ClassifyRecipe, ImageData
from reslearn.classify.sync_bn import synchronized
from reslearn.data.images.resident import Resident
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import CACHE_BYTES, Photos, cache_fits, shrunk_bytes
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import integer
from reslearn.data.sets import DataSet, Split
from reslearn.errors import UserError
from reslearn.nets import create
from reslearn.progress import Progress
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
    """Makes the sources of splits. preprocessing: None to measure it on the training images."""
    d, batch = recipe.data, recipe.batch.size
    view = preprocessing or _preprocessing(data, d)
    files = [file for split in data.splits.values() for file in split.files or ()]
    # Shrinking photos before cropping changes the training images, so it must not depend on free disk space.
    small = not data.packed and shrunk_bytes(len(files), view, data.sizes) <= CACHE_BYTES
    direct = d.jitter is not None or (d.cache != "on" and not small)
    keep = d.cache == "on" or (d.cache == "auto" and not direct and cache_fits(len(files), view, data.sizes))

    def make(split: Split) -> Images:
        if split.pixels is not None:
            return Resident(split, view, flip=d.flip, pad=d.pad, pad_with=d.pad_with, device=device)
        return Photos(
            split,
            view,
            flip=d.flip,
            crop_scale=d.crop_scale,
            jitter=d.jitter,
            grow=d.grow,
            epochs=recipe.schedule.total(len(split), batch) * batch / max(len(split), 1),
            color=d.color,
            cache=files if keep else (),
            direct=direct,
            on_bad=d.on_bad,
            workers=d.workers,
            device=device,
            progress=progress,
        )

    sources = {name: make(split) for name, split in splits.items()}
    if empty := next((name for name, source in sources.items() if not len(source)), None):
        raise UserError(f"'{data.name}': none of the {len(splits[empty])} {empty} images can be read")
    if preprocessing is None:
        view = measure(sources["train"], view, d.normalize, progress)
        for source in sources.values():
            source.normalize = view.normalizer(device)
    return Sources(sources["train"], sources.get("val"), sources.get("test"), view, held_out or {})


def make_model(recipe: ClassifyRecipe, classes: int, channels: int, device: torch.device) -> nn.Module:
    """Makes the network of a recipe, initialized by its seed."""
    torch.manual_seed(integer(recipe.seed, 0x1217))
    model = create(recipe.net.name, classes, channels, **recipe.net.options())
    if recipe.recompute:
        model.recompute = True  # type: ignore[assignment]
    if recipe.batch.sync_bn:
        model = synchronized(model, device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def starting_view(card: Card, data: DataSet, recipe: ImageData) -> Preprocessing:
    """The preprocessing of a run with net.init: channels and statistics of the model, at the size of the run."""
    view = _preprocessing(data, recipe)
    old = card.preprocessing
    update = {"channels": old.channels, "mean": old.mean, "std": old.std}
    if old.pixel_mean is not None:
        if old.size != view.size:
            raise UserError(f"net.init subtracts a per-pixel mean of {old.size[0]}x{old.size[1]} px: set data.size={old.size[0]}")
        update["pixel_mean"] = old.pixel_mean
    return view.model_copy(update=update)


def start_from(model: nn.Module, card: Card, tensors: dict[str, Tensor], classes: tuple[str, ...]) -> str:
    """Loads weights into the network of a run; for other classes, the last layer keeps its initialization. Returns a log line."""
    if card.classes == classes:
        model.load_state_dict(tensors)
        return f"starts from all layers of {card.net}: the same {len(classes)} classes"
    *_, weight, bias = tensors
    backbone = {name: tensor for name, tensor in tensors.items() if name not in (weight, bias)}
    model.load_state_dict(adapt_head(backbone, model)[0])
    return f"starts from the backbone of {card.net}, with a new last layer: {len(classes)} classes instead of {len(card.classes)}"
