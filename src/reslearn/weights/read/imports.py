"""Foreign weights -> a model file with its card: `reslearn import`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError, naming
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.weights.read import caffe, files
from reslearn.weights.read.recognize import complete, recognize
from reslearn.weights.store import Card, save

# Of RGB on [0, 1]; what nearly all files were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def import_weights(
    path: str | Path,
    net: str | None = None,
    classes: Sequence[str] | str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    out: str | Path,
    prototxt: str | Path | None = None,
    mean_file: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Path, list[str]]:
    """Read a .pth, .pt, .th, .safetensors or .caffemodel and write it as a model file.

    net, options: of `create`; they set what a file cannot show (see recognize). classes: names in the order of the
    head, or a text file with one a line, or a JSON list or {"0": name}. mean, std: one number a channel on [0, 1].
    prototxt, mean_file: of a .caffemodel; the first is compared with our layers, the second is its mean image.
    Returns the file written and sentences of what was recognized, and why. No code of the file is run. Raises UserError.
    """
    path, out = Path(path), Path(out)
    if net is not None:
        check_options(spec(net), options or {})
    if mean is not None and mean_file is not None:
        raise UserError("give a mean for each channel or a mean image, not both")
    if not path.is_file():
        raise UserError(f"no weights file called {path}" + (": that is a folder, name a file in it" if path.is_dir() else ""))
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    if out.suffix != ".safetensors":
        raise UserError(f"cannot write {out}: a model file is a .safetensors")
    if path.suffix == ".caffemodel":
        if options:
            raise UserError("a .caffemodel is its net as released: leave options out")
        name, tensors, said = caffe.read(path, net, prototxt)
        options, count = {"pool": "ceil"}, len(tensors["fc.bias"])
        view, seen = caffe.usual_input(mean_file)
    elif prototxt is not None or mean_file is not None:
        raise UserError(f"a prototxt and a mean file belong to a .caffemodel, which {path} is not")
    else:
        with naming(path):
            known = recognize(files.read(path), net, options)
        name, options, tensors, said, count = known.net, known.options, known.tensors, [known.why], known.classes
        view, seen = usual_input(name, known.channels)
    view, more = with_given(view, mean, std)
    names, how = class_names(name, count, classes, view.channels)
    with torch.device("meta"):
        model = create(name, count, view.channels, **options)
    with naming(path):
        model.load_state_dict(complete(tensors, model), assign=True)
    card = Card(net=name, options=dict(options), classes=names, preprocessing=view, data={"imported_from": path.name})
    return save(model, out, card), [f"{name} with {count} classes", *said, how, seen, *more]


def class_names(net: str, count: int, given: Sequence[str] | str | Path | None, channels: int = 3) -> tuple[tuple[str, ...], str]:
    """The names of a head's classes and a sentence of where they come from. Raises UserError where their number differs."""
    if given is not None:
        where = str(given) if isinstance(given, str | Path) else "the names given"
        names = _read_names(Path(given)) if isinstance(given, str | Path) else tuple(given)
        if len(names) != count:
            raise UserError(f"{where}: {len(names)} class names for a head of {count} classes")
        if len(set(names)) < len(names) or not all(names):
            twice = next((name for i, name in enumerate(names) if not name or name in names[:i]), "")
            raise UserError(f"{where}: class name '{twice}' occurs twice or is empty")
        return names, f"class names of {where}"
    if count == 1000 and spec(net).stem == "imagenet":
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]), "class names of ImageNet's 1000, in their usual order"
    if count == 10 and channels == 3 and spec(net).stem == "cifar":
        return CIFAR_10, "class names of CIFAR-10, as is usual for such a net: give others where it is of other classes"
    return tuple(
        f"class{i}" for i in range(count)
    ), "the file has no class names: they are class0, class1, ... unless you give them"


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() != ".json":
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        found = json.loads(text)
        if isinstance(found, dict):  # {"0": "tench"}, or Keras's {"0": ["n01440764", "tench"]}
            found = [found[str(i)] for i in range(len(found))]
        names = tuple(name[-1] if isinstance(name, list) and name else name for name in found)
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        return names  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: class names are a text file with one a line, or a JSON list or {{'0': name}}") from error


def usual_input(net: str, channels: int) -> tuple[Preprocessing, str]:
    """What images most probably went through in training, for a file that does not say it; and a sentence."""
    row = spec(net)
    mean, std, why = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and std"
    if net == "googlenet":  # torchvision's, once pretrained, changes inputs made with ImageNet's mean and std to these
        mean, std, why = (0.5,) * 3, (0.5,) * 3, "mean and std 0.5, which torchvision's pretrained GoogLeNet has in effect"
    if channels != 3:
        mean, std = (sum(mean) / 3,) * channels, (sum(std) / 3,) * channels
    crop_ratio = 0.875 if row.stem == "imagenet" else 1.0
    view = Preprocessing(channels=channels, size=(row.size, row.size), crop_ratio=crop_ratio, mean=mean, std=std)
    return view, f"input of {row.size} px with {why}, as is usual: the file does not say it"


def with_given(view: Preprocessing, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Preprocessing, list[str]]:
    """The preprocessing with the user's mean and std. Raises UserError for numbers that cannot be used."""
    given: dict[str, Any] = {} if mean is None else {"mean": tuple(mean), "pixel_mean": None}
    given |= {} if std is None else {"std": tuple(std)}
    said = [f"{key} {' '.join(f'{x:g}' for x in given[key])}, as given" for key in ("mean", "std") if key in given]
    try:
        return Preprocessing(**view.model_dump() | given), said
    except ValueError as error:
        raise UserError(
            f"mean and std: {view.channels} finite numbers each are needed, on the scale [0, 1], std above 0"
        ) from error
