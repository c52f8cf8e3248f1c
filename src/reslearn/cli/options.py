"""Options that several commands take."""

import os
from pathlib import Path
from typing import Annotated

import typer

from reslearn.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
# of commands that train
Recipe = Annotated[str | None, typer.Option("--recipe", help="A named recipe (see reslearn recipes), or a .toml/.json file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the recipe; may be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Train N runs with consecutive seeds.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run's new folder; runs/DATA-MODEL by default.")]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Resume this run (bit-exact). Cannot be combined with other options.")
]


def several_ranks() -> bool:
    """Whether torchrun has started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def one_process(command: str) -> UserError:
    """The error of a command that several ranks cannot share."""
    return UserError(f"{command} does not support torchrun: start it as a single process")


def whole_numbers(text: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--scales {text}: write whole numbers with commas between, such as 224,256") from None
