"""bench: speed next to common PyTorch programs and the limits of the machine."""

import json
from typing import Annotated, Any

import typer

from reslearn.cli.options import Device, Json, JsonFile, check_folder

app = typer.Typer(help="Compare speed with common PyTorch programs and machine limits.", no_args_is_help=True)


@app.command()
def train(
    nets: Annotated[list[str] | None, typer.Argument(help="Networks [default: resnet20].")] = None,
    data: Annotated[str, typer.Option("--data", help="Data set of small images.")] = "cifar10",
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images per step.")] = 128,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Set a recipe key, as key=value. Repeatable.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to take medians over.")] = 7,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps per round.")] = 12,
    out: JsonFile = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Measure training speed. Compares images per second with a plain PyTorch loop and the limits of the machine.

    \b
    Examples:
      reslearn bench train
      reslearn bench train resnet20 resnet56 --out speeds.json
      reslearn bench train resnet20 --data fashion-sample --set execution=eager
    """
    from reslearn.bench.train import bench
    from reslearn.files import write_text

    check_folder(out)
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
    folder: Annotated[str, typer.Argument(help="Folder or list of photos.")],
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to take medians over.")] = 7,
    images: Annotated[int, typer.Option("--images", min=50, help="Images per round and program.")] = 1000,
    out: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Measure decoding and cropping of photos. Compares images per CPU-second with two torchvision pipelines.

    \b
    Examples:
      reslearn bench input photos
      reslearn bench input photos --rounds 11 --out input.json
    """
    from reslearn.bench.input import bench
    from reslearn.files import write_text
    from reslearn.training.display import Display

    check_folder(out)
    with Display(stderr=True) as display:
        row = bench(folder, rounds, images, display.progress)
    if as_json:
        typer.echo(json.dumps(row, indent=1))
    else:
        sizes = " and ".join(f"{size / 1000:,.0f} kB" for size in row["bytes_a_photo"])
        typer.echo(f"{row['photos']:,} photos of {row['folder']}, files and packed, {sizes} each: {row['machine']['processor']}")
        typer.echo(f"  {rounds} rounds of {row['images_a_round']:,} images, {row['workers']} threads or processes; {row['reader']}")
        for program in row["ways"]:
            speed = f"{program['images_per_cpu_s']:>8,.0f} images/CPU-s {program['images_per_s']:>8,.0f} images/s"
            typer.echo(f"  {program['what']:<38}{speed} {program['ratio']:>6.2f}x")
    if out is not None:
        write_text(out, json.dumps(row, indent=1) + "\n")


def _print(row: dict[str, Any]) -> None:
    machine, limit, shares = row["machine"], row["limit"], row["shares"]
    typer.echo(f"{row['net']} on {row['data']}, batch {row['batch']}: {machine['processor']}, {machine['threads']} threads")
    for line in row["chose"]:
        typer.echo(f"  chose {line}")
    for speed in row["speeds"]:
        numbers = f"{speed['images_per_s']:>10,.0f} images/s {speed['ms_a_step']:>9.2f} ms/step {speed['ratio']:>6.2f}x"
        typer.echo(f"  {speed['what']:<36}{numbers}")
    typer.echo("  time per step: " + ", ".join(f"{name} {share:.0f}%" for name, share in shares.items()))
    typer.echo(
        f"  limits: {limit['images_per_s_by_multiply_adds']:,.0f} images/s by multiply-adds "
        f"({limit['multiply_adds_per_s'] / 1e9:,.0f} G/s measured), {limit['images_per_s_by_bytes']:,.0f} by memory "
        f"({limit['bytes_per_s'] / 1e9:,.0f} GB/s measured); {row['share_of_matrix_peak']:.0f}% of the first is reached"
    )
