"""train, recipes, eval, ensemble, predict and report."""

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reslearn.cli.options import Batch, Device, Epochs, Json, Out, Rate, Recipe, Resume, Seed, Seeds, Set, Size, parse_scales
from reslearn.cli.training import train_command
from reslearn.errors import UserError


def train(
    data: Annotated[
        str | None, typer.Argument(help="fashion-sample, fashion-mnist, cifar10, cifar100, a folder or a list.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Network, such as resnet20, plain34 or resnet50.")] = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    size: Size = None,
    batch: Batch = None,
    lr: Rate = None,
    settings: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    init: Annotated[Path | None, typer.Option("--init", help="Fine-tune this model file or run.")] = None,
    out: Out = None,
    resume: Resume = None,
    task: Annotated[str, typer.Option("--task", help="classify, or a task that another package registers.")] = "classify",
    device: Device = "auto",
) -> None:
    """Train a classifier, or resume an interrupted run.

    \b
    Examples:
      reslearn train fashion-sample
      reslearn train path/to/folder --out runs/mine
      reslearn train cifar10 --model resnet56 --recipe cifar10-paper --seed 1
      reslearn train photos.csv --epochs 20 --size 96
      reslearn train photos --init runs/mine --set net.frozen=2 --set optimizer.backbone_lr=0.1
      reslearn train cifar10 --recipe cifar10-fast --seeds 5 --out runs/five
      reslearn train --resume runs/mine
    """
    if resume is not None and task != "classify":
        raise UserError("--task cannot be combined with --resume: the task is that of the run")
    options = {"model": model, "recipe": recipe, "epochs": epochs, "size": size, "batch": batch, "lr": lr}
    options |= {"settings": settings or (), "seed": seed, "init": init, "out": out}
    train_command(task, data, resume, seeds, device, **options)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print; without it, list all recipes.")] = None,
    data: Annotated[str | None, typer.Argument(help="Data set, for recipes that depend on it.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Network [default: the recipe's own].")] = None,
    init: Annotated[str | None, typer.Option("--init", help="Model file or run to start from, as for train.")] = None,
    as_json: Json = False,
) -> None:
    """List the named recipes, or print one.

    Prints every key with its value, meaning and source.

    \b
    Examples:
      reslearn recipes
      reslearn recipes cifar10-paper
      reslearn recipes default path/to/folder --model resnet34 --json
    """
    from reslearn.training.catalog import list_recipes, print_recipe

    if name is None:
        list_recipes(as_json)
    else:
        print_recipe(name, data, model, init, as_json)


Scores = Annotated[Path | None, typer.Option("--scores", help="Write the class scores of each image to this .npz file.")]


def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Run folders or model files; several form an ensemble.")],
    data: Annotated[str, typer.Argument(help="Data set name, folder or list, as for train.")],
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        typer.Option("--split", help="Split to evaluate [default: test, else val, else all images]."),
    ] = None,
    protocol: Annotated[
        Literal["center", "10crop", "multiscale", "dense"],
        typer.Option("--protocol", help="One center crop, ten crops, or fully convolutional at several scales or at one scale."),
    ] = "center",
    scales: Annotated[str | None, typer.Option("--scales", help="Shorter sides, px, such as 224,256 (multiscale, dense).")] = None,
    on_bad: Annotated[
        Literal["error", "skip"], typer.Option("--on-bad", help="Fail on files that cannot be read, or skip them.")
    ] = "error",
    flip: Annotated[bool, typer.Option("--flip", help="Average each view with its mirror image.")] = False,
    scores: Scores = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Evaluate classifiers: top-1 and top-5 error.

    Also reports 95% bootstrap intervals, calibration error, accuracy by class and the confusion matrix.

    \b
    Examples:
      reslearn eval runs/mine path/to/folder
      reslearn eval model.safetensors cifar10 --json
      reslearn eval runs/mine photos --protocol multiscale --scores mine.npz
      reslearn eval runs/mine runs/larger photos --protocol 10crop
    """
    from reslearn.classify.evaluate import evaluate as run
    from reslearn.training.display import Display

    with Display(stderr=True) as display:
        options = {"protocol": protocol, "scales": parse_scales(scales) or None, "scores": scores}
        result = run(models, data, split, on_bad, device=device, flip=flip, progress=display.progress, **options)
    _print_numbers(result, as_json)


def ensemble(
    files: Annotated[list[Path], typer.Argument(help="Files written by reslearn eval --scores, for the same images.")],
    scores: Scores = None,
    as_json: Json = False,
) -> None:
    """Average the saved scores of several models.

    \b
    Examples:
      reslearn ensemble mine.npz larger.npz
      reslearn ensemble mine.npz larger.npz --scores both.npz --json
    """
    from reslearn.classify.evaluate import evaluate_scores

    _print_numbers(evaluate_scores(files, scores=scores), as_json)


def _print_numbers(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.classify.show import show

    show(result)


def predict(
    model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    files: Annotated[list[str], typer.Argument(help="Image files and folders; - reads one image from standard input.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes per image.")] = 3,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
) -> None:
    """Classify image files.

    Files that cannot be read are reported and skipped; the exit code is then 2.

    \b
    Examples:
      reslearn predict runs/mine shirt.jpg boots.png
      reslearn predict model.safetensors path/to/folder --json
      curl -s URL | reslearn predict runs/mine -
    """
    if as_json and as_csv:
        raise UserError("choose --json or --csv")
    from reslearn.deploy.predict import Image, find_images, stream
    from reslearn.device import pick_device
    from reslearn.weights import load

    network = load(model, pick_device(device))
    images: list[Image] = []
    for file in files:
        images += [sys.stdin.buffer] if file == "-" else find_images([file])
    rows = csv.writer(sys.stdout)
    if as_csv:
        rows.writerow(["file", "rank", "class", "probability", "error"])
    errors: list[str] = []
    width = min(max((len(str(image)) for image in images if image is not sys.stdin.buffer), default=1), 60)
    for prediction in stream(network, images, top):
        file, error = prediction.file, prediction.error
        errors += [error] if error is not None else []
        if as_json:
            classes = [{"class": name, "probability": round(p, 6)} for name, p in prediction.classes]
            typer.echo(json.dumps({"file": file} | ({"predictions": classes} if error is None else {"error": error})))
        elif as_csv:
            rows.writerows([file, i, name, f"{p:.6f}", ""] for i, (name, p) in enumerate(prediction.classes, 1))
            if error is not None:
                rows.writerow([file, "", "", "", error])
        elif error is None:
            typer.echo(f"{file:<{width}}" + "".join(f"  {name} {100 * p:5.1f}%" for name, p in prediction.classes))
        else:
            typer.echo(f"{file:<{width}}  {error.removeprefix(f'{file}: ')}")
    if errors:
        raise UserError(f"{len(errors)} of {len(images)} files could not be read: {errors[0]}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of several seeds; several are overlaid.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file [default: RUN/report.html of a single run].")] = None,
) -> None:
    """Write an HTML report of one or several runs.

    The page is self-contained: curves, confusion matrix, hardest images, recipe and cost.

    \b
    Examples:
      reslearn report runs/mine
      reslearn report runs/resnet20 runs/plain20 -o compare.html
    """
    from reslearn.training.many import seed_folders

    if out is None and len(runs) > 1:
        raise UserError("a report of several runs needs -o PAGE.html")
    from reslearn import report

    folders = [run for folder in runs for run in seed_folders(folder) or [folder]]
    typer.echo(report.write(folders, out or runs[0] / "report.html"))
