"""The command line: one short function a command. What is heavy is imported inside it, so that --help answers at once."""

import errno
import io
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from reslearn import __version__
from reslearn.cli import analyze, bench, detect, doctor, localize, models, packing, reproduce, runs
from reslearn.cli.options import one_process, several_ranks
from reslearn.errors import Interrupted, Lost, UserError

app = typer.Typer(
    name="reslearn",
    help="Residual networks: train on your own images, see what they learned, use them.",
    no_args_is_help=True,
    add_completion=False,
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
LISTS = (models.models, reproduce.reproduce, runs.recipes)  # what they print without an argument is a list, not the help
for name, command in COMMANDS.items():
    app.command(name, no_args_is_help=command not in LISTS)(command)


app.add_typer(analyze.app, name="analyze")
app.add_typer(bench.app, name="bench")
app.add_typer(detect.app, name="detect")
app.add_typer(localize.app, name="localize")


def _rank() -> int:
    """Which of the processes that torchrun has started this one is."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"reslearn {__version__}")
        raise typer.Exit
    if not several_ranks():
        return
    # Before PyTorch is imported: each rank would be told that a flag of DDP costs time, which training/ranks.py has a use for.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if context.invoked_subcommand not in ("train", "detect", "localize"):  # whose other commands are refused there
        raise one_process(str(context.invoked_subcommand))


def main() -> None:
    """Run the command line. Exit code 2 and one line on standard error for a user's mistake; 130 and 143 after a signal."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except Lost as error:
        _complain(str(error))
        sys.stdout.flush()
        os._exit(2)  # the usual way out may wait for those that do not answer
    except UserError as error:
        code = _complain(str(error), error.shared)
    except TyperException as error:  # an unknown command, option or value; or nothing at all, answered by the help
        message = getattr(error, "format_message", error.__str__)()
        code = _complain(message.rstrip(".")) if "\n" not in message else (typer.echo(message, err=True) or 2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("reslearn: stopped", err=True)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code = _complain("the disk is full: the output could not be written")
    except Interrupted as error:
        if not _rank():
            typer.echo(f"reslearn: stopped by {error}; the run is saved, and {error.again} goes on with it", err=True)
        code = 128 + error.number
    sys.exit(code)


def _complain(message: str, shared: bool = False) -> int:
    """shared: all ranks have it, and the first one says so."""
    if not (shared and _rank()):
        typer.echo(f"reslearn: rank {_rank()}: {message}" if _rank() else f"reslearn: {message}", err=True)
    return 2
