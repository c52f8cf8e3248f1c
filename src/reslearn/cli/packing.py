"""pack: write a folder of images as a few large files."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from reslearn.errors import UserError


def pack(
    data: Annotated[str, typer.Argument(help="Folder or list of images; with --verify, a packed folder.")],
    out: Annotated[Path | None, typer.Argument(help="New folder to write.")] = None,
    short_side: Annotated[
        int | None, typer.Option("--short-side", min=16, max=4096, help="Shorter side, px [default: 256].")
    ] = None,
    quality: Annotated[int | None, typer.Option("--quality", min=1, max=100, help="JPEG quality [default: 90].")] = None,
    as_is: Annotated[bool, typer.Option("--as-is", help="Keep all files byte for byte, without scaling.")] = False,
    on_bad: Annotated[
        Literal["error", "skip"] | None, typer.Option("--on-bad", help="Fail on invalid images, or skip them [default: error].")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=256, help="Threads [default: 2].")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check a packed folder for damage.")] = False,
) -> None:
    """Pack images into a few large files that read faster.

    train and eval accept the packed folder like any other. Images whose shorter side is at most --short-side keep their bytes.
    Run the same command again to resume.

    \b
    Examples:
      reslearn pack photos photos-256
      reslearn pack imagenet imagenet-256 --short-side 256 --quality 90 --workers 16
      reslearn pack photos-256 --verify
    """
    given = {"OUT": out, "--short-side": short_side, "--quality": quality, "--as-is": as_is or None}
    given |= {"--on-bad": on_bad, "--workers": workers}
    if verify:
        if extra := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(extra)} cannot be combined with --verify")
        _verify(data)
        return
    if out is None:
        raise UserError("OUT is missing: reslearn pack DATA OUT (or --verify)")
    if as_is and (extra := [name for name in ("--short-side", "--quality") if given[name] is not None]):
        raise UserError(f"{', '.join(extra)} cannot be combined with --as-is, which keeps all files byte for byte")
    from reslearn.data.images.pack import PackFormat
    from reslearn.data.images.pack import pack as write
    from reslearn.training.display import Display

    form = PackFormat(None) if as_is else PackFormat(short_side or 256, quality or 90)
    with Display() as display:
        packed = write(data, out, form, workers=workers or 2, on_bad=on_bad or "error", progress=display.progress)
    size = sum(packed.about["bytes"].values()) / 1e6
    left_out = "".join(f", {n:,} {reason} left out" for reason, n in packed.about["left_out"].items())
    typer.echo(f"packed   {out}: {len(packed.index):,} images in {len(packed.about['shards'])} shards, {size:,.1f} MB{left_out}")


def _verify(data: str) -> None:
    from reslearn.data.images.packed import Pack, is_packed
    from reslearn.files import user_path

    folder = user_path(data)
    if not folder.is_dir() or not is_packed(folder):
        raise UserError(f"{folder}: not a packed folder: create one with reslearn pack DATA OUT")
    pack = Pack(folder)
    if damaged := pack.verify():
        more = f" (and {len(damaged) - 1} more shards)" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}: damaged{more}; pack the images again")
    typer.echo(f"{folder}: {len(pack.index):,} images in {len(pack.about['shards'])} shards, no damage")
