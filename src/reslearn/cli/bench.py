"""bench: how fast, beside what people use and what the machine can do at most."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import UserError

app = typer.Typer(help="How fast: measured beside what people use, and what the machine can do at most.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure speed on this machine."""


@app.command()
def train(
    nets: Annotated[list[str] | None, typer.Argument(help="Networks; resnet20 unless given.")] = None,
    data: Annotated[str, typer.Option("--data", help="Small images, as for train.")] = "cifar10",
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images a step.")] = 128,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the recipe.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Paired rounds; the medians are printed.")] = 7,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps a round.")] = 12,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON here.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Training steps: images a second beside a plain PyTorch loop, where the time goes, and the machine's limits.

    \b
    Examples:
      reslearn bench train
      reslearn bench train resnet20 resnet56 --out speeds.json
      reslearn bench train resnet20 --data fashion-sample --set step=eager
    """
    from reslearn.bench.train import bench
    from reslearn.files import write_text

    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    rows: list[dict[str, Any]] = []
    for net in nets or ["resnet20"]:
        rows.append(bench(net, data, batch, settings or (), device, rounds, steps))
        if not as_json:
            _print(rows[-1])
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    if out is not None:
        write_text(out, json.dumps(rows, indent=1) + "\n")


def _print(row: dict[str, Any]) -> None:
    machine, limit, shares = row["machine"], row["limit"], row["shares"]
    typer.echo(f"{row['net']} on {row['data']}, batch {row['batch']}: {machine['processor']}, {machine['threads']} threads")
    if "note" in row:
        typer.echo(f"  note: {row['note']}")
    for speed in row["speeds"]:
        shown = f"{speed['images_per_s']:>10,.0f} images/s {speed['ms_a_step']:>9.2f} ms a step {speed['ratio']:>6.2f}x"
        typer.echo(f"  {speed['what']:<36}{shown}")
    typer.echo("  of a step: " + ", ".join(f"{name} {share:.0f}%" for name, share in shares.items()))
    typer.echo(
        f"  limits: {limit['images_per_s_by_multiply_adds']:,.0f} images/s by multiply-adds "
        f"({limit['multiply_adds_per_s'] / 1e9:,.0f} G/s measured), {limit['images_per_s_by_bytes']:,.0f} by memory "
        f"({limit['bytes_per_s'] / 1e9:,.0f} GB/s measured); {row['share_of_matrix_peak']:.0f}% of the first is reached"
    )
