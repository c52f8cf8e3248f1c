"""The command line. Each command is one short function that imports what is heavy itself, so that --help is fast."""

import errno
import io
import os
import re
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from reslearn import __version__
from reslearn.cli import analyze, bench, detect, doctor, localize, models, packing, reproduce, runs
from reslearn.cli.options import many_ranks, refuse_ranks
from reslearn.errors import Interrupted, Lost, Notice, UserError

app = typer.Typer(
    name="reslearn",
    help="Train, evaluate, analyze and use residual networks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

COMMANDS = {
    "train": runs.train,
    "recipes": runs.recipes,
    "eval": runs.evaluate,
    "ensemble": runs.ensemble,
    "predict": runs.predict,
    "report": runs.report,
    "pack": packing.pack,
    "doctor": doctor.doctor,
    "models": models.models,
    "summary": models.summary,
    "deepen": models.deepen,
    "import": models.import_,
    "export": models.export,
    "reproduce": reproduce.reproduce,
}
PYTHONS_SHOWWARNING = warnings.showwarning
_notices: set[str] = set()  # printed already
LISTS = (models.models, reproduce.reproduce, runs.recipes)  # without arguments they print a list instead of the help
for name, command in COMMANDS.items():
    app.command(name, no_args_is_help=command not in LISTS)(command)
app.add_typer(analyze.app, name="analyze")
app.add_typer(bench.app, name="bench")
app.add_typer(detect.app, name="detect")
app.add_typer(localize.app, name="localize")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"reslearn {__version__}")
        raise typer.Exit
    if not many_ranks():
        return
    # Set before PyTorch is imported: DDP would warn on every rank that find_unused_parameters costs time; see training/ranks.py.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if context.invoked_subcommand not in ("train", "detect", "localize"):  # these groups check their own subcommands
        refuse_ranks(str(context.invoked_subcommand))


def main() -> None:
    """Run the command line.

    Exit codes: 2 with one line on standard error for invalid input, 130 after SIGINT, 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
        if code == 130:  # the parser has caught the KeyboardInterrupt
            typer.echo("reslearn: stopped", err=True)
    except Lost as error:
        _print_error(str(error))
        sys.stdout.flush()
        os._exit(2)  # a normal exit could wait for ranks that do not respond
    except UserError as error:
        code = _print_error(str(error), error.shared)
    except TyperException as error:  # an unknown command, option or value; or the help, where no argument was given
        message = getattr(error, "format_message", error.__str__)().replace("Value error, ", "").rstrip(".")
        message = re.sub(r"Input should be a valid (\w+), .*", r"must be a valid \1", message) + _recipe_key(error)
        code = _print_error(message) if "\n" not in message else (typer.echo(message, err=True) or 2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("reslearn: stopped", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = _print_error("the disk is full: the output could not be written")
    except Interrupted as error:
        if not _rank():
            typer.echo(f"reslearn: stopped by {error}; the run is saved; to resume it: {error.again}", err=True)
        code = 128 + error.number
    sys.exit(code)


def _recipe_key(error: TyperException) -> str:
    """A hint for an unknown option of a command that trains, if it is the name of a recipe key."""
    name, context = getattr(error, "option_name", ""), getattr(error, "ctx", None)
    if not name or context is None or context.info_name != "train":
        return ""
    from reslearn import tasks
    from reslearn.training.recipe import keys

    task = next((part for part in ("detect", "localize") if part in context.command_path.split()), "classify")
    wanted = name.strip("-").replace("-", "_")
    found = [key for key in keys(tasks.get(task).recipe) if wanted in (key, key.rpartition(".")[2])]
    return f"; to set the recipe key: {' or '.join(f'--set {key}=VALUE' for key in found)}" if found else ""


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
    """Print a Notice as one line, and other warnings as Python does."""
    if issubclass(category, Notice):
        if str(message) not in _notices:
            typer.echo(f"note: {message}", err=True)
        _notices.add(str(message))
    else:
        PYTHONS_SHOWWARNING(message, category, *place, **options)


def _rank() -> int:
    """The rank of this process under torchrun, otherwise 0."""
    return int(os.environ.get("RANK", "0")) if many_ranks() else 0


def _print_error(message: str, shared: bool = False) -> int:
    """Print an error and return the exit code. shared: every rank has this error, and only the first one prints it."""
    if not (shared and _rank()):
        typer.echo(f"reslearn: rank {_rank()}: {message}" if _rank() else f"reslearn: {message}", err=True)
    return 2
