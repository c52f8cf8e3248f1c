"""The command line. Each command is one short function that imports what is heavy itself, so that --help is fast."""

import errno
import io
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from reslearn import __version__
from reslearn.cli import analyze, bench, detect, doctor, localize, models, packing, reproduce, runs
from reslearn.cli.options import many_ranks, refuse_ranks
from reslearn.errors import Interrupted, Lost, UserError

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
    try:
        code = app(standalone_mode=False)
    except Lost as error:
        _print_error(str(error))
        sys.stdout.flush()
        os._exit(2)  # a normal exit could wait for ranks that do not respond
    except UserError as error:
        code = _print_error(str(error), error.shared)
    except TyperException as error:  # an unknown command, option or value; or the help, where no argument was given
        message = getattr(error, "format_message", error.__str__)().replace("Value error, ", "")
        code = _print_error(message.rstrip(".")) if "\n" not in message else (typer.echo(message, err=True) or 2)
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


def _rank() -> int:
    """The rank of this process under torchrun, otherwise 0."""
    return int(os.environ.get("RANK", "0")) if many_ranks() else 0


def _print_error(message: str, shared: bool = False) -> int:
    """Print an error and return the exit code. shared: every rank has this error, and only the first one prints it."""
    if not (shared and _rank()):
        typer.echo(f"reslearn: rank {_rank()}: {message}" if _rank() else f"reslearn: {message}", err=True)
    return 2
