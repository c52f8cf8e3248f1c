"""detect: train, evaluate, compare and use detectors."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reslearn.cli.options import (
    Batch,
    Device,
    Epochs,
    Json,
    Out,
    Rate,
    Recipe,
    Resume,
    Seed,
    Seeds,
    Set,
    parse_scales,
    refuse_ranks,
)
from reslearn.cli.training import train_command
from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.data.boxes.box_set import BoxSet
    from reslearn.detect import Detector

app = typer.Typer(help="Train, evaluate, compare and use object detectors.", no_args_is_help=True)

DROP = "--bad-boxes drop"  # the option that error messages suggest


BadBoxPolicy = Literal["drop", "fail"]
DATA_HELP = "VOC folder or VOCdevkit, COCO folder, or COCO .json file."
Model = Annotated[Path, typer.Argument(help="Run folder or model file.")]
Data = Annotated[Path, typer.Argument(help=DATA_HELP)]
Split = Annotated[str | None, typer.Option("--split", help="Split to evaluate [default: test, else val, else the only one].")]
Bad = Annotated[
    BadBoxPolicy | None, typer.Option("--bad-boxes", help="Invalid boxes: drop these objects, or fail [default: as in the run].")
]
Refinement = Annotated[bool, typer.Option("--refinement", help="Box refinement with box voting (DRL appendix B).")]
Scales = Annotated[str | None, typer.Option("--scales", help="Shorter sides for multi-scale testing, px, such as 400,600,800.")]


@app.callback()
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand != "train":
        refuse_ranks(f"detect {context.invoked_subcommand}")


@app.command(no_args_is_help=True)
def train(
    data: Annotated[Path | None, typer.Argument(help=DATA_HELP)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Backbone, such as resnet18, resnet50 or vgg16-bn.")] = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: Rate = None,
    settings: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    init: Annotated[Path | None, typer.Option("--init", help="Classification model or run to start the backbone from.")] = None,
    bad_boxes: Annotated[
        BadBoxPolicy | None, typer.Option("--bad-boxes", help="Drop objects with invalid boxes, or fail [default: fail].")
    ] = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
) -> None:
    """Train a detector, or resume an interrupted run.

    \b
    Examples:
      reslearn detect train bccd --bad-boxes drop --out runs/cells
      reslearn detect train bccd --model resnet50 --init resnet50.safetensors
      reslearn detect train coco --model resnet50 --set detector.kind=fpn --set detector.masks=true
      reslearn detect train VOCdevkit --recipe voc-paper --init runs/imagenet
      reslearn detect train bccd --bad-boxes drop --seeds 3 --out runs/three
      reslearn detect train --resume runs/cells
    """
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by

    if resume is not None and bad_boxes is not None:
        raise UserError("--bad-boxes cannot be combined with --resume: the recipe is that of the run")
    settings = [*(settings or ()), *([] if bad_boxes is None else [f"data.bad={bad_boxes}"])]
    options = {"model": model, "recipe": recipe, "epochs": epochs, "batch": batch, "lr": lr}
    options |= {"settings": settings, "seed": seed, "init": init, "out": out}
    with nullcontext() if resume is not None else bad_boxes_left_out_by(DROP):
        train_command("detect", data, resume, seeds, device, **options)


@app.command("eval", no_args_is_help=True)
def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            default_factory=list,
            show_default=False,
            help="Run folders or model files; several form an ensemble.",
        ),
    ],
    data: Data,
    split: Split = None,
    refinement: Refinement = False,
    scales: Scales = None,
    bad_boxes: Bad = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the detections to this new file, in COCO's format.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Evaluate detectors: average precision and error types.

    Reports COCO's and VOC's average precision with 95% intervals, by class and by size.

    \b
    Examples:
      reslearn detect eval runs/cells bccd
      reslearn detect eval runs/cells bccd --refinement --scales 160,240,320
      reslearn detect eval runs/cells runs/others instances_val.json --out results.json --json
    """
    if not models:  # a single argument is parsed as DATA
        raise UserError(f"DATA is missing: reslearn detect eval {data} DATA")
    sides = parse_scales(scales)
    _check_new("--out", out)
    from reslearn.detect.evaluate import TestOptions, find, numbers, open_detectors
    from reslearn.detect.results import categories, results
    from reslearn.files import write_text
    from reslearn.training.display import Display

    detectors = open_detectors(models, device)
    opened = _open(data, models[0], detectors[0], split, bad_boxes)
    if out is not None:
        categories(opened)  # raises UserError before any work
    with Display(stderr=True) as display:
        (output,) = find(opened.images, [TestOptions(detectors, refinement, sides)], display.progress)
    result = {
        "models": [str(model) for model in models],
        **numbers(output, opened),
        "trained_on": _trained_on(models, data, opened),
    }
    if out is not None:
        write_text(out, json.dumps(results(output.detections, opened)))
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_numbers

    show_numbers(result)
    if out is not None:
        typer.echo(f"wrote {out}")


@app.command(no_args_is_help=True)
def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="Run folder or model file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Run folder or model file to compare with A.")],
    data: Data,
    split: Split = None,
    refinement: Refinement = False,
    scales: Scales = None,
    bad_boxes: Bad = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Compare two detectors: difference in AP, B minus A.

    Both are evaluated on the same images; the 95% interval is paired.

    \b
    Examples:
      reslearn detect compare runs/plain34 runs/resnet34 bccd
      reslearn detect compare runs/plain34 runs/resnet34 bccd --split val --json
    """
    sides = parse_scales(scales)
    from reslearn.detect.evaluate import TestOptions, find, matches, open_detectors
    from reslearn.evaluation.average_precision import compare as difference
    from reslearn.training.display import Display

    detectors = open_detectors([one, other], device)
    opened = _open(data, one, detectors[0], split, bad_boxes)
    with Display(stderr=True) as display:
        outputs = find(opened.images, [TestOptions((model,), refinement, sides) for model in detectors], display.progress)
    numbers = difference(*(matches(output.detections, opened) for output in outputs))
    result = {
        "data": opened.name,
        "n": len(opened),
        "one": str(one),
        "other": str(other),
        "trained_on": [_trained_on([model], data, opened) for model in (one, other)],
        "numbers": {key: numbers[key] for key in ("AP", "AP50", "AP75")},
        "seconds_per_image": [output.seconds for output in outputs],
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_comparison

    show_comparison(result)


@app.command(no_args_is_help=True)
def ladder(
    model: Model,
    data: Data,
    others: Annotated[list[Path] | None, typer.Option("--with", help="Another detector for the ensemble. Repeatable.")] = None,
    scales: Annotated[
        str | None, typer.Option("--scales", help="Shorter sides, px [default: the paper's, scaled to the model].")
    ] = None,
    split: Split = None,
    bad_boxes: Bad = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Reproduce the paper's Table 9 for a detector.

    Adds box refinement, multi-scale testing and an ensemble one by one; reports the gain in AP and the time of each.

    \b
    Examples:
      reslearn detect ladder runs/cells bccd
      reslearn detect ladder runs/cells bccd --scales 160,240,320 --with runs/others --json
    """
    sides = parse_scales(scales)
    from reslearn.detect.evaluate import open_detectors
    from reslearn.detect.ladder import ladder as climb
    from reslearn.training.display import Display

    first, *rest = open_detectors([model, *(others or [])], device)
    opened = _open(data, model, first, split, bad_boxes)
    with Display(stderr=True) as display:
        result = climb(first, opened, others=rest, scales=sides, progress=display.progress)
    paths = [model, *(others or [])]
    result = {"models": [str(path) for path in paths], **result, "trained_on": _trained_on(paths, data, opened)}
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_ladder

    show_ladder(result)


@app.command(no_args_is_help=True)
def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Save annotated copies of the images in this folder.")] = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Minimum detection score.")] = 0.5,
    refinement: Refinement = False,
    scales: Scales = None,
    as_json: Json = False,
    coco: Annotated[Path | None, typer.Option("--coco", help="Write the detections to this new file, in COCO's format.")] = None,
    device: Device = "auto",
) -> None:
    """Detect objects in image files.

    Files that cannot be read are reported and skipped; the exit code is then 2.

    \b
    Examples:
      reslearn detect predict runs/cells slide.jpg
      reslearn detect predict runs/cells path/to/folder --out drawn --score 0.7
      reslearn detect predict model.safetensors path/to/folder --json
    """
    if as_json and coco is not None:
        raise UserError("choose --json or --coco")
    sides = parse_scales(scales)
    _check_new("--coco", coco)
    from reslearn.deploy.predict import find_images
    from reslearn.detect.evaluate import TestOptions, open_detectors
    from reslearn.detect.pictures import output_files, predictions
    from reslearn.detect.results import entries
    from reslearn.files import write_text

    files = list(dict.fromkeys(find_images(images)))
    targets = output_files(files, out) if out is not None else None
    detectors = open_detectors([model], device)
    classes = detectors[0].classes
    errors: list[str] = []
    rows: list[dict[str, Any]] = []
    width = min(max(len(str(file)) for file in files), 60)
    for number, prediction in enumerate(predictions(TestOptions(detectors, refinement, sides), files, score, targets), 1):
        name, detections = str(prediction.file), prediction.detections
        if detections is None:
            errors.append(prediction.error or "")
        elif coco is not None:
            rows += entries(detections, number, range(1, len(classes) + 1), name)
        if as_json:
            typer.echo(json.dumps({"file": name} | prediction.as_json()))
        else:
            typer.echo(f"{name:<{width}}  {prediction.summary()}")
    if coco is not None:
        write_text(coco, json.dumps(rows))
        typer.echo(f"wrote {coco}")
    if errors:
        raise UserError(f"{len(errors)} of {len(files)} files could not be read: {errors[0]}")


def _open(data: Path, model: Path, detector: "Detector", split: str | None, bad: BadBoxPolicy | None) -> "BoxSet":
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by
    from reslearn.detect.evaluate import open_split, run_held_out, run_policy

    policy, held_out = bad or run_policy(model) or "fail", run_held_out(model, data)
    with bad_boxes_left_out_by(DROP):
        return open_split(data, detector.classes, split, policy, held_out)  # type: ignore[arg-type]


def _trained_on(models: list[Path], data: Path, opened: "BoxSet") -> int:
    """The number of images that any of the runs among the models was trained on."""
    from reslearn.detect.evaluate import run_trained_on

    return len(set().union(*(run_trained_on(model, data, opened.images) for model in models)))


def _check_new(option: str, path: Path | None) -> None:
    """Raise UserError, before any work, if the file exists or its folder does not."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"{option} {path}: already exists: choose another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
