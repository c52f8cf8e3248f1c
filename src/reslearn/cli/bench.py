"""bench: speed, beside common PyTorch programs and the limits of the machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import UserError

app = typer.Typer(help="Measure speed beside common PyTorch programs and the limits of this machine.", no_args_is_help=True)


@app.command()
def train(
    nets: Annotated[list[str] | None, typer.Argument(help="Networks [default: resnet20].")] = None,
    data: Annotated[str, typer.Option("--data", help="Data set of small images.")] = "cifar10",
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images per step.")] = 128,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Recipe setting, key=value.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; medians are printed.")] = 7,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps per round.")] = 12,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the results to this file (JSON).")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Measure training: images per second beside a plain PyTorch loop, the shares of a step's time, and the machine's limits.

    \b
    Examples:
      reslearn bench train
      reslearn bench train resnet20 resnet56 --out speeds.json
      reslearn bench train resnet20 --data fashion-sample --set execution=eager
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


@app.command("input")
def input_(
    folder: Annotated[str, typer.Argument(help="A folder or list of photos.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Alternating rounds; medians are printed.")] = 7,
    images: Annotated[int, typer.Option("--images", min=50, help="Images per round and program.")] = 1000,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the results to this file (JSON).")] = None,
    as_json: Json = False,
) -> None:
    """Measure decoding and random crops of photos: images per CPU-second beside two torchvision pipelines, from files and packed.

    \b
    Examples:
      reslearn bench input photos
      reslearn bench input photos --rounds 11 --out input.json
    """
    from reslearn.bench.input import bench
    from reslearn.files import write_text
    from reslearn.training.display import Display

    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    with Display(stderr=True) as display:
        row = bench(folder, rounds, images, display.progress)
    if as_json:
        typer.echo(json.dumps(row, indent=1))
    else:
        size = " and ".join(f"{bytes_ / 1000:,.0f} kB" for bytes_ in row["bytes_a_photo"])
        typer.echo(
            f"{row['photos']:,} photos of {row['folder']}, as they are and packed {size} each: {row['machine']['processor']}"
        )
        typer.echo(f"  {rounds} rounds of {row['images_a_round']:,} images, {row['workers']} threads or processes; {row['reader']}")
        for way in row["ways"]:
            speed = f"{way['images_per_cpu_s']:>8,.0f} images/CPU-s {way['images_per_s']:>8,.0f} images/s {way['ratio']:>6.2f}x"
            typer.echo(f"  {way['what']:<38}{speed}")
    if out is not None:
        write_text(out, json.dumps(row, indent=1) + "\n")


def _print(row: dict[str, Any]) -> None:
    machine, limit, shares = row["machine"], row["limit"], row["shares"]
    typer.echo(f"{row['net']} on {row['data']}, batch {row['batch']}: {machine['processor']}, {machine['threads']} threads")
    for line in row["chose"]:
        typer.echo(f"  chose {line}")
    for speed in row["speeds"]:
        shown = f"{speed['images_per_s']:>10,.0f} images/s {speed['ms_a_step']:>9.2f} ms a step {speed['ratio']:>6.2f}x"
        typer.echo(f"  {speed['what']:<36}{shown}")
    typer.echo("  of a step: " + ", ".join(f"{name} {share:.0f}%" for name, share in shares.items()))
    typer.echo(
        f"  limits: {limit['images_per_s_by_multiply_adds']:,.0f} images/s by multiply-adds "
        f"({limit['multiply_adds_per_s'] / 1e9:,.0f} G/s measured), {limit['images_per_s_by_bytes']:,.0f} by memory "
        f"({limit['bytes_per_s'] / 1e9:,.0f} GB/s measured); {row['share_of_matrix_peak']:.0f}% of the first is reached"
    )
