"""detect: detectors trained on annotated sets, tested there, and used on images."""

import json
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reslearn.cli.options import (
    Device,
    Json,
    Out,
    Recipe,
    Resume,
    Seed,
    Seeds,
    Set,
    one_process,
    several_ranks,
    whole_numbers,
)
from reslearn.cli.training import train_command
from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.data.boxes.box_set import BoxSet
    from reslearn.detect import Detector

app = typer.Typer(help="Find objects: detectors trained, tested, compared and used.", no_args_is_help=True)


DROP = "--bad-boxes drop"  # how invalid boxes are left out


class BadBoxPolicy(StrEnum):
    drop, fail = "drop", "fail"


Data = Annotated[Path, typer.Argument(help="A VOC folder or VOCdevkit, a COCO folder or a COCO .json file.")]
Split = Annotated[str | None, typer.Option("--split", help="By default test, else val, otherwise whichever split exists.")]
Bad = Annotated[
    BadBoxPolicy | None,
    typer.Option("--bad-boxes", help="Invalid boxes: leave them out, or stop. By default as the run did, otherwise fail."),
]
Refinement = Annotated[bool, typer.Option("--refinement", help="Box refinement with box voting (DRL appendix B).")]
Scales = Annotated[str | None, typer.Option("--scales", help="Multi-scale testing: shorter sides in pixels, 200,400,600,800,1000.")]


@app.callback()
def _group(context: typer.Context) -> None:
    """Detectors trained, tested, compared and used."""
    if several_ranks() and context.invoked_subcommand != "train":
        raise one_process(f"detect {context.invoked_subcommand}")


@app.command(no_args_is_help=True)
def train(
    data: Annotated[Path | None, typer.Argument(help="A VOC folder or VOCdevkit, a COCO folder or a COCO .json file.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The backbone, such as resnet18, resnet50 or vgg16-bn.")] = None,
    recipe: Recipe = None,
    settings: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    init: Annotated[Path | None, typer.Option("--init", help="Classification model or run to start the backbone from.")] = None,
    bad_boxes: Annotated[
        BadBoxPolicy | None, typer.Option("--bad-boxes", help="Invalid boxes: leave them out, or stop (the default).")
    ] = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
) -> None:
    """Train a detector on images with boxes (and masks), or resume an interrupted run.

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
        raise UserError("--resume takes its recipe from the run: leave out --bad-boxes")
    settings = [*(settings or ()), *([] if bad_boxes is None else [f"data.bad={bad_boxes.value}"])]
    options = {"model": model, "recipe": recipe, "settings": settings, "seed": seed, "init": init, "out": out}
    with nullcontext() if resume is not None else bad_boxes_left_out_by(DROP):
        train_command("detect", data, resume, seeds, device, **options)


@app.command("eval", no_args_is_help=True)
def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", default_factory=list, show_default=False, help="Run folders or model files; several: an ensemble."
        ),
    ],
    data: Data,
    split: Split = None,
    refinement: Refinement = False,
    scales: Scales = None,
    bad_boxes: Bad = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the detections to this new file, as COCO's results.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """COCO's and VOC's average precision with intervals, by class and size, and the mistakes by kind.

    \b
    Examples:
      reslearn detect eval runs/cells bccd
      reslearn detect eval runs/cells bccd --refinement --scales 160,240,320
      reslearn detect eval runs/cells runs/others instances_val.json --out results.json --json
    """
    if not models:  # the last of the arguments is DATA, whatever was meant
        raise UserError(f"DATA is missing: reslearn detect eval {data} DATA")
    sides = whole_numbers(scales)
    _new_file("--out", out)
    from reslearn.detect.evaluate import TestOptions, find, numbers, open_detectors
    from reslearn.detect.results import categories, results
    from reslearn.files import write_text
    from reslearn.training.display import Display

    detectors = open_detectors(models, device)
    opened = _open(data, models[0], detectors[0], split, bad_boxes)
    if out is not None:
        categories(opened)  # before any work
    way = TestOptions(detectors, refinement, tuple(sides or ()))
    with Display(stderr=True) as display:
        (found,) = find(opened.images, [way], display.progress)
    result = {"models": [str(model) for model in models], **numbers(found, opened), "trained_on": _trained_on(models, data, opened)}
    if out is not None:
        write_text(out, json.dumps(results(found.detections, opened)))
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_numbers

    show_numbers(result)
    if out is not None:
        typer.echo(f"wrote {out}")


@app.command(no_args_is_help=True)
def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="A run folder or model file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    data: Data,
    split: Split = None,
    refinement: Refinement = False,
    scales: Scales = None,
    bad_boxes: Bad = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Whether B is better than A: the difference in AP on the same images, with its paired 95% interval.

    \b
    Examples:
      reslearn detect compare runs/plain34 runs/resnet34 bccd
      reslearn detect compare runs/plain34 runs/resnet34 bccd --split val --json
    """
    sides = tuple(whole_numbers(scales) or ())
    from reslearn.detect.evaluate import TestOptions, find, matches, open_detectors
    from reslearn.evaluation.average_precision import compare as difference
    from reslearn.training.display import Display

    detectors = open_detectors([one, other], device)
    opened = _open(data, one, detectors[0], split, bad_boxes)
    with Display(stderr=True) as display:
        ways = [TestOptions((model,), refinement, sides) for model in detectors]
        found = find(opened.images, ways, display.progress)
    numbers = difference(*(matches(each.detections, opened) for each in found))
    result = {
        "data": opened.name,
        "n": len(opened),
        "one": str(one),
        "other": str(other),
        "trained_on": [_trained_on([model], data, opened) for model in (one, other)],
        "numbers": {key: numbers[key] for key in ("AP", "AP50", "AP75")},
        "seconds_per_image": [each.seconds for each in found],
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_comparison

    show_comparison(result)


@app.command(no_args_is_help=True)
def ladder(
    model: Annotated[Path, typer.Argument(help="A run folder or model file.")],
    data: Data,
    others: Annotated[list[Path] | None, typer.Option("--with", help="Another detector, for an ensemble; may be repeated.")] = None,
    scales: Annotated[
        str | None, typer.Option("--scales", help="Shorter sides in pixels; by default the paper's, in proportion to the model's.")
    ] = None,
    split: Split = None,
    bad_boxes: Bad = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The paper's Table 9 for a detector: what refinement, several scales and an ensemble bring, rung by rung, and cost.

    \b
    Examples:
      reslearn detect ladder runs/cells bccd
      reslearn detect ladder runs/cells bccd --scales 160,240,320 --with runs/others --json
    """
    sides = whole_numbers(scales)
    from reslearn.detect.evaluate import open_detectors
    from reslearn.detect.ladder import ladder as climb
    from reslearn.training.display import Display

    first, *rest = open_detectors([model, *(others or [])], device)
    opened = _open(data, model, first, split, bad_boxes)
    with Display(stderr=True) as display:
        result = climb(first, opened, others=rest, scales=sides or (), progress=display.progress)
    paths = [model, *(others or [])]
    result = {"models": [str(path) for path in paths], **result, "trained_on": _trained_on(paths, data, opened)}
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.detect.show import show_ladder

    show_ladder(result)


@app.command(no_args_is_help=True)
def predict(
    model: Annotated[Path, typer.Argument(help="A run folder or model file.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Draw what is found on copies of the images in this folder.")] = None,
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Only what is found with at least this score.")] = 0.5,
    refinement: Refinement = False,
    scales: Scales = None,
    as_json: Json = False,
    coco: Annotated[Path | None, typer.Option("--coco", help="Write what is found to this new file, as COCO's results.")] = None,
    device: Device = "auto",
) -> None:
    """The objects in image files. A file that cannot be read is named, and the others go on (exit code 2).

    \b
    Examples:
      reslearn detect predict runs/cells slide.jpg
      reslearn detect predict runs/cells path/to/folder --out drawn --score 0.7
      reslearn detect predict model.safetensors path/to/folder --json
    """
    if as_json and coco is not None:
        raise UserError("choose --json or --coco")
    sides = tuple(whole_numbers(scales) or ())
    _new_file("--coco", coco)
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
        name, found = str(prediction.file), prediction.detections
        if found is None:
            errors.append(prediction.error or "")
        elif coco is not None:
            rows += entries(found, number, range(1, len(classes) + 1), name)
        if as_json:
            typer.echo(json.dumps({"file": name} | prediction.as_json(classes)))
        else:
            typer.echo(f"{name:<{width}}  {prediction.summary(classes)}")
    if coco is not None:
        write_text(coco, json.dumps(rows))
        typer.echo(f"wrote {coco}")
    if errors:
        raise UserError(f"{len(errors)} of {len(files)} files could not be read: {errors[0]}")


def _open(data: Path, model: Path, detector: "Detector", split: str | None, bad: BadBoxPolicy | None) -> "BoxSet":
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by
    from reslearn.detect.evaluate import open_split, run_held_out, run_policy

    policy, held_out = bad.value if bad else run_policy(model) or "fail", run_held_out(model, data)
    with bad_boxes_left_out_by(DROP):
        return open_split(data, detector.classes, split, policy, held_out)  # type: ignore[arg-type]


def _trained_on(models: list[Path], data: Path, opened: "BoxSet") -> int:
    """How many of the images one of the models, where it is a run, was trained on."""
    from reslearn.detect.evaluate import run_trained_on

    return len(set().union(*(run_trained_on(model, data, opened.images) for model in models)))


def _new_file(option: str, path: Path | None) -> None:
    """Raises UserError, before any work, where a file cannot be written as new."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"{option} {path}: is there already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
