"""train, eval, ensemble, predict, report: from images to a model, and what it does."""

import csv
import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reslearn.cli.options import Device, Json, Seeds, whole_numbers
from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.training import Run

SPLITS = {"val": "held-out", "test": "test", "train": "training"}


def train(
    data: Annotated[
        str | None, typer.Argument(help="fashion-sample, fashion-mnist, cifar10, cifar100, a folder or a list.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="A network, such as resnet20, plain34 or resnet50.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="default, fashion, cifar10-paper or -fast, imagenet-paper, -classic or -fast; or a .toml/.json file."
        ),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the recipe.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.")] = None,
    seeds: Seeds = None,
    init: Annotated[Path | None, typer.Option("--init", help="Fine-tune this model file or run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's new folder; runs/DATA-MODEL by default.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run, bit for bit; nothing else is given.")] = None,
    device: Device = "auto",
) -> None:
    """Train a network on images; or go on with an interrupted run.

    \b
    Examples:
      reslearn train fashion-sample
      reslearn train path/to/folder --out runs/mine
      reslearn train cifar10 --model resnet56 --recipe cifar10-paper --seed 1
      reslearn train photos.csv --set schedule.epochs=20 --set data.size=96
      reslearn train photos --init runs/mine --set net.frozen=2 --set optimizer.backbone_lr=0.1
      reslearn train cifar10 --recipe cifar10-fast --seeds 5 --out runs/five
      reslearn train --resume runs/mine
    """
    given = {"model": model, "recipe": recipe, "settings": settings or (), "seed": seed, "init": init, "out": out}
    check_given("reslearn train", resume, data, **given, seeds=seeds)
    carry_out(resume, data, seeds, device, **given)


def check_given(command: str, resume: Path | None, data: str | Path | None, **others: Any) -> None:
    """Raises UserError unless there is data to train on, or a run to go on with and nothing else; others: options by name."""
    if resume is None:
        if data is None:
            raise UserError(f"say what to train on: {command} DATA (or --resume RUN)")
        return
    options = {"DATA": data} | {f"--{'set' if name == 'settings' else name.replace('_', '-')}": others[name] for name in others}
    if extra := [name for name, value in options.items() if value not in (None, ())]:
        raise UserError(f"--resume takes its recipe from the run: leave out {', '.join(extra)}")


def carry_out(resume: Path | None, data: Any, seeds: int | None, device: str, **given: Any) -> None:
    """Go on with a run of any task, or with those of several seeds; or train on what is given, as api.train names it. Print the
    last numbers."""
    from reslearn import api

    if resume is not None and api.many.seed_folders(resume):
        _print_seeds(api.resume_seeds(resume, device))
    elif resume is not None:
        _print_run(api.resume(resume, device))
    elif seeds is not None:
        _print_seeds(api.train_seeds(seeds, data, device=device, **given))
    else:
        _print_run(api.train(data, device=device, **given))


def _print_run(run: "Run") -> None:
    """The numbers of a finished run, and where its files are; of several ranks, the first one says so."""
    from reslearn.training import ranks

    if not ranks.first():
        return
    _print_result(run.result)
    typer.echo(f"model    {run.folder / 'model.safetensors'}")
    typer.echo(f"report   {run.folder / 'report.html'}")


def _print_seeds(runs: "list[Run]") -> None:
    """The numbers of runs with several seeds: a line for each split and measure."""
    from reslearn.training.many import summary

    found, folder = summary(runs), runs[0].folder.parent
    for split, what in SPLITS.items():
        for measure, of in found.get(split, {}).items():
            each = ", ".join(f"{_number(value):.2f}" for value in of["each"])
            spread = "" if of["std"] is None else f" +- {of['std']:.2f}"
            seeds = f"n={len(runs)} seed{'s' * (len(runs) > 1)}"
            typer.echo(f"result   {what} {measure} {_number(of['mean']):.2f}{spread}%  ({each}; {seeds})")
    typer.echo(f"report   {folder / 'report.html'}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _print_result(result: dict[str, Any]) -> None:
    """A line for each split of the last and, where they are others, the best weights."""
    from reslearn.training.many import measures

    same = result.get("best", {}).get("step") == result["last"]["step"]
    for name in ["last"] if same else [name for name in ("last", "best") if name in result]:
        step, title = result[name]["step"], "last, best" if same else name
        for split, what in SPLITS.items():
            if split in result[name]:
                numbers = result[name][split]
                note = " (nothing was held out)" if split == "train" else ""
                for measure, (value, interval) in measures(numbers).items():
                    low, high = interval or (math.nan, math.nan)
                    spread = f"95% interval {low:.2f} to {high:.2f}, n={numbers['n']:,}"
                    typer.echo(f"result   {what}{note} {measure} {_number(value):.2f}%  ({spread}; {title}: step {step:,})")


class Split(StrEnum):
    train, val, test, all = "train", "val", "test", "all"


class OnBad(StrEnum):
    error, skip = "error", "skip"


class Protocol(StrEnum):
    one, ten, several, dense = "center", "10crop", "multiscale", "dense"


Scores = Annotated[Path | None, typer.Option("--scores", help="Write the scores of each image to this .npz file.")]


def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Run folders or model files; several: an ensemble.")],
    data: Annotated[str, typer.Argument(help="A data set, folder or list, as for train.")],
    split: Annotated[Split | None, typer.Option("--split", help="By default test, else val, else all images.")] = None,
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="One view of each image, ten crops, or the whole at several scales or at one.")
    ] = Protocol.one,
    scales: Annotated[
        str | None, typer.Option("--scales", help="Shorter sides in pixels for multiscale or dense: 224,256.")
    ] = None,
    on_bad: Annotated[OnBad, typer.Option("--on-bad", help="What to do with files that cannot be read.")] = OnBad.error,
    flip: Annotated[bool, typer.Option("--flip", help="Average each view and its mirror.")] = False,
    scores: Scores = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Top-1 and top-5 error with a bootstrap interval, calibration, accuracy by class, confusion matrix.

    \b
    Examples:
      reslearn eval runs/mine path/to/folder
      reslearn eval model.safetensors cifar10 --json
      reslearn eval runs/mine photos --protocol multiscale --scores mine.npz
      reslearn eval runs/mine runs/larger photos --protocol 10crop
    """
    from reslearn.classify.evaluate import evaluate as run
    from reslearn.training.display import Display

    display = Display(stderr=True)
    try:
        given = {"protocol": protocol.value, "scales": whole_numbers(scales), "scores": scores}
        result = run(models, data, split, on_bad, device=device, flip=flip, progress=display.progress, **given)
    finally:
        display.stop()
    _print_numbers(result, as_json)


def ensemble(
    files: Annotated[list[Path], typer.Argument(help="Files that reslearn eval --scores has written, of the same images.")],
    scores: Scores = None,
    as_json: Json = False,
) -> None:
    """What models say together: the mean of scores that eval has saved, without running a model again.

    \b
    Examples:
      reslearn ensemble mine.npz larger.npz
      reslearn ensemble mine.npz larger.npz --scores both.npz --json
    """
    from reslearn.classify.evaluate import of_scores

    _print_numbers(of_scores(files, scores=scores), as_json)


def _print_numbers(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.classify.show import show

    show(result)


def predict(
    model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    files: Annotated[list[str], typer.Argument(help="Image files and folders; - reads one image from standard input.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 3,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
) -> None:
    """The most probable classes of image files. A file that cannot be read is named, and the others go on (exit code 2).

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
        errors += [prediction.error] if prediction.error is not None else []
        if as_json:
            best = [{"class": name, "probability": round(p, 6)} for name, p in prediction.classes]
            found = {"predictions": best} if prediction.error is None else {"error": prediction.error}
            typer.echo(json.dumps({"file": prediction.file, **found}))
        elif as_csv:
            rows.writerows([prediction.file, i, name, f"{p:.6f}", ""] for i, (name, p) in enumerate(prediction.classes, 1))
            if prediction.error is not None:
                rows.writerow([prediction.file, "", "", "", prediction.error])
        elif prediction.error is None:
            shown = "".join(f"  {name} {100 * p:5.1f}%" for name, p in prediction.classes)
            typer.echo(f"{prediction.file:<{width}}{shown}")
        else:
            typer.echo(f"{prediction.file:<{width}}  {prediction.error.removeprefix(f'{prediction.file}: ')}")
    if errors:
        raise UserError(f"{len(errors)} of {len(images)} files could not be read: {errors[0]}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or those of several seeds; several are laid over each other.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; FOLDER/report.html for one folder.")] = None,
) -> None:
    """One self-contained HTML page: curves, confusion, the hardest images, the recipe, the cost.

    \b
    Examples:
      reslearn report runs/mine
      reslearn report runs/resnet20 runs/plain20 -o compare.html
    """
    from reslearn.training.many import seed_folders

    if out is None and len(runs) > 1:
        raise UserError("several runs make one page: say where with -o PAGE.html")
    from reslearn import report

    folders = [run for folder in runs for run in seed_folders(folder) or [folder]]
    typer.echo(report.write(folders, out or runs[0] / "report.html"))
