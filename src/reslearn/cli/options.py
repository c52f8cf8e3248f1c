"""Options that several commands take."""

import os
from typing import Annotated

import typer

from reslearn.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="So many runs, with seeds one after the other.")]


def several_ranks() -> bool:
    """Whether torchrun has started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def one_process(command: str) -> UserError:
    """What is said of a command that ranks cannot share."""
    return UserError(f"{command} is the work of one process: start it without torchrun")


def whole_numbers(text: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--scales {text}: write whole numbers with commas between, such as 224,256") from None
