"""Converts other libraries' weights to a model file with a card: `reslearn import`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError, naming
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.weights.read import caffe, files, timm_config
from reslearn.weights.read.recognize import complete, recognize
from reslearn.weights.store import Card, save

# RGB on [0, 1]; used by nearly all published weights
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
    """Converts a .pth, .pt, .th, .safetensors or .caffemodel file, or a timm folder, to a model file. Never runs code from it.

    net, options: of `create`, for what the file does not determine (see recognize). classes: class names in the order of the
    head, or a text file with one name per line, or a JSON list or {"0": name}. mean, std: one value per channel on [0, 1].
    prototxt, mean_file: for a .caffemodel: a prototxt to check the layers against, and the mean image.
    Returns the file written and notes on what was recognized and assumed. Raises UserError.
    """
    path, out = Path(path), Path(out)
    if net is not None:
        check_options(spec(net), options or {})
    if mean is not None and mean_file is not None:
        raise UserError("pass either mean or a mean file, not both")
    labels, folder = None, path.is_dir() and (path / timm_config.NAME).is_file()
    if folder:
        path = next((path / file for file in timm_config.WEIGHTS if (path / file).is_file()), path / timm_config.WEIGHTS[0])
    if not path.is_file():
        raise UserError(f"no weights file called {path}" + (" (it is a folder: pass a file in it)" if path.is_dir() else ""))
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    if out.suffix != ".safetensors":
        raise UserError(f"cannot write {out}: the name of a model file ends in .safetensors")
    if path.suffix == ".caffemodel":
        if options:
            raise UserError("options do not apply to a .caffemodel; leave them out")
        name, tensors, notes = caffe.read(path, net, prototxt)
        options, count = {"pool": "ceil"}, len(tensors["fc.bias"])
        view, input_note = caffe.default_input(mean_file)
    elif prototxt is not None or mean_file is not None:
        raise UserError(f"a prototxt and a mean file apply to a .caffemodel, which {path} is not")
    else:
        with naming(path):
            match = recognize(files.read(path), net, options)
        name, options, tensors, notes, count = match.net, match.options, match.tensors, [match.why], match.classes
        view, input_note = default_input(name, match.channels)
        if (config := _timm_config(path, folder, name, count, view.channels, notes)) is not None:
            labels, size = config.classes, "x".join(map(str, config.view.size))
            view, input_note = config.view, f"input: {size} px, mean and std from {timm_config.NAME}"
            notes += config.notes
    view, override_notes = with_overrides(view, mean, std)
    if classes is None and labels is not None:
        names, names_note = labels, f"class names from {timm_config.NAME}"
        if len(set(names)) != count:
            raise UserError(f"{path.parent / timm_config.NAME}: {len(set(names))} label_names for a head of {count} classes")
    else:
        names, names_note = class_names(name, count, classes, view.channels)
    with torch.device("meta"):
        model = create(name, count, view.channels, **options)
    with naming(path):
        model.load_state_dict(complete(tensors, model), assign=True)
    card = Card(net=name, options=dict(options), classes=names, preprocessing=view, data={"imported_from": path.name})
    return save(model, out, card), [f"{name} with {count} classes", *notes, names_note, input_note, *override_notes]


def _timm_config(path: Path, folder: bool, net: str, count: int, channels: int, notes: list[str]) -> timm_config.TimmConfig | None:
    """The config.json beside a weights file. Of a folder that was given, it must fit; beside a file, it may be another model's."""
    file = path.parent / timm_config.NAME
    if not file.is_file():
        return None
    try:
        return timm_config.read(file, net, count, channels)
    except UserError as error:
        if folder:
            raise
        notes.append(f"ignored {error}")
        return None


def class_names(net: str, count: int, given: Sequence[str] | str | Path | None, channels: int = 3) -> tuple[tuple[str, ...], str]:
    """Returns the class names and a note on their source. Raises UserError if their number is not `count`."""
    if given is not None:
        is_file = isinstance(given, str | Path)
        source = str(given) if is_file else "classes"
        names = _read_names(Path(given)) if is_file else tuple(given)
        if len(names) != count:
            raise UserError(f"{source}: {len(names)} class names for a head of {count} classes")
        if len(set(names)) < len(names) or not all(names):
            duplicate = next((name for i, name in enumerate(names) if not name or name in names[:i]), "")
            raise UserError(f"{source}: class name '{duplicate}' is empty or occurs twice")
        return names, f"class names from {source}" if is_file else "class names as given"
    if count == 1000 and spec(net).stem == "imagenet":
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]), "class names: ImageNet's 1000 classes in the usual order"
    if count == 10 and channels == 3 and spec(net).stem == "cifar":
        return CIFAR_10, "class names: CIFAR-10 (assumed; use --classes for others)"
    return tuple(f"class{i}" for i in range(count)), "class names: class0, class1, ... (not in the file; use --classes to set them)"


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() != ".json":
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        content = json.loads(text)
        if isinstance(content, dict):  # {"0": "tench"}, or Keras's {"0": ["n01440764", "tench"]}
            content = [content[str(i)] for i in range(len(content))]
        names = tuple(name[-1] if isinstance(name, list) and name else name for name in content)
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        return names  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected class names, one per line, or a JSON list or {{'0': name}}") from error


def default_input(net: str, channels: int) -> tuple[Preprocessing, str]:
    """Returns the most likely preprocessing for a file that does not specify it, and a note."""
    row = spec(net)
    mean, std, values = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and std"
    if net == "googlenet":  # torchvision's pretrained GoogLeNet converts inputs from ImageNet's mean and std to 0.5
        mean, std, values = (0.5,) * 3, (0.5,) * 3, "mean and std 0.5 (the effective values of torchvision's pretrained GoogLeNet)"
    if channels != 3:
        mean, std = (sum(mean) / 3,) * channels, (sum(std) / 3,) * channels
    crop_ratio = 0.875 if row.stem == "imagenet" else 1.0
    view = Preprocessing(channels=channels, size=(row.size, row.size), crop_ratio=crop_ratio, mean=mean, std=std)
    return view, f"input: {row.size} px with {values} (assumed: not in the file)"


def with_overrides(
    view: Preprocessing, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Preprocessing, list[str]]:
    """Returns the preprocessing with the user's mean and std, and notes. Raises UserError for invalid values."""
    given: dict[str, Any] = {} if mean is None else {"mean": tuple(mean), "pixel_mean": None}
    given |= {} if std is None else {"std": tuple(std)}
    notes = [f"{key} {' '.join(f'{x:g}' for x in given[key])}, as given" for key in ("mean", "std") if key in given]
    try:
        return Preprocessing(**view.model_dump() | given), notes
    except ValueError as error:
        raise UserError(f"mean and std need {view.channels} finite values each, on the scale [0, 1], std above 0") from error
