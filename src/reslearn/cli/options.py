"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from reslearn.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
JsonFile = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the results to this JSON file.")]
# Commands that train:
Recipe = Annotated[str | None, typer.Option("--recipe", help="Named recipe (see reslearn recipes), or a .toml or .json file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Set a recipe key, as key=value. Repeatable.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the training images.")]
Size = Annotated[int | None, typer.Option("--size", help="Side of the network's input, px.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Images per step.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate; with schedule.lr_batch, for that batch size.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Train N runs with consecutive seeds.")]
Out = Annotated[Path | None, typer.Option("--out", help="New run folder [default: runs/DATA-MODEL].")]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Resume this run (bit-exact). Cannot be combined with other options.")
]


def many_ranks() -> bool:
    """Whether torchrun has started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_ranks(command: str) -> None:
    """Raise UserError under torchrun with several processes."""
    if many_ranks():
        raise UserError(f"{command} does not support torchrun: start it as a single process")


def parse_scales(text: str | None) -> tuple[int, ...]:
    """The sizes of --scales, in pixels; () without the option."""
    if text is None:
        return ()
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--scales {text}: write integers separated by commas, such as 224,256") from None


def check_folder(out: Path | None) -> None:
    """Raise UserError where the folder of an output file does not exist."""
    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
