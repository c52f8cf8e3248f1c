"""The zoo and one network's layers as tables for a terminal, and as what JSON holds."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from reslearn.errors import UserError, did_you_mean
from reslearn.nets.block import Block
from reslearn.nets.cost import Cost, Row, by_stage, cost
from reslearn.nets.resnet import ResNet
from reslearn.nets.zoo import TABLE, create, models

MANY = 40  # more rows than this are folded into stages, unless all are asked for


def listing(pattern: str = "*") -> Iterator[dict[str, Any]]:
    """One dict a network of the table, as it is counted; macs and flops are of one image of its own size.

    Raises UserError where no name matches.
    """
    names = models(pattern)
    if not names:
        raise UserError(f"no network matches '{pattern}'{did_you_mean(pattern, TABLE)}")
    for name in names:
        row = TABLE[name]
        with torch.device("meta"):
            counted = cost(create(name), (3, row.size, row.size), backward=False)
        yield {
            "name": name,
            "source": row.source,
            "input": list(counted.input),
            "parameters": counted.parameters,
            "macs": counted.macs,
            "flops": 2 * counted.macs,
            "activation_bytes": 4 * counted.values,
            "published_error": dict(row.published),
        }


def print_models(pattern: str = "*") -> None:
    """The zoo, a line a network, as the lines come."""
    head = f"{'network':<22} {'parameters':>12} {'multiply-adds':>14} {'FLOPs':>9} {'activations':>12}  published error, %"
    for i, row in enumerate(listing(pattern)):
        if i == 0:
            print(head)
        errors = ", ".join(f"{value:.2f} ({what})" for what, value in row["published_error"].items())
        sizes = f"{_giga(row['macs']):>14} {_giga(row['flops']):>9} {row['activation_bytes'] / 1e6:>9.1f} MB"
        print(f"{row['name']:<22} {row['parameters']:>12,} {sizes}  {errors or '-'}", flush=True)
    print(
        "one image of the network's own size; FLOPs = 2 x multiply-adds, which the papers call FLOPs; activations: forward, float32"
    )


def _giga(n: int) -> str:
    return f"{n / 1e9:.3f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"


def label(net: nn.Module, name: str) -> str:
    """A layer's name with the paper's label (DRL Table 1) before it, for networks in the ImageNet shape."""
    stage = name.split(".")[0]
    if isinstance(net, ResNet) and isinstance(net.maxpool, nn.MaxPool2d) and stage in net.stages:
        return f"conv{int(stage.removeprefix('layer')) + 1}_x {name}"
    return name


def notes(net: nn.Module) -> list[str]:
    """What the lectures say of the bottleneck, with this network's own numbers (DRL Figure 5)."""
    for module in net.modules():
        if isinstance(module, Block) and len(module.layers()) == 3 and module.keeps_shape():
            convolutions = [convolution for convolution, _ in module.layers()]
            weights = sum(c.weight.numel() for c in convolutions)
            channels = convolutions[0].in_channels
            direct = 9 * channels * channels
            return [
                f"a bottleneck on {channels} channels has {weights:,} weights; one 3x3 convolution of them would have {direct:,}"
            ]
    return []


def summarize(net: nn.Module, input: tuple[int, ...]) -> Cost:
    """`cost`, with a UserError where the network cannot take such an input."""
    try:
        return cost(net, input)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, input))
        raise UserError(f"the network cannot take an input of {shape}: {str(error).splitlines()[0]}") from error


def as_json(net: nn.Module, counted: Cost) -> dict[str, Any]:
    """Everything of a summary."""
    rows = [asdict(row) | {"label": label(net, row.name)} for row in counted.rows]
    totals = {"parameters": counted.parameters, "macs": counted.macs, "flops": 2 * counted.macs}
    memory = {"values": counted.values, "forward_bytes": 4 * counted.values, "backward_bytes": counted.backward_bytes}
    return {"input": list(counted.input), **totals, **memory, "rows": rows, "notes": notes(net)}


def print_summary(net: nn.Module, counted: Cost, every_row: bool = False) -> None:
    """The layer table: label, output, parameters, multiply-adds, activations, receptive field; totals."""
    rows: list[Row] = list(counted.rows)
    folded = len(rows) > MANY and not every_row
    table = Table(box=SIMPLE, show_footer=True)
    table.add_column("layer", footer="total")
    table.add_column("kind")
    table.add_column("output", justify="right")
    table.add_column("parameters", footer=f"{counted.parameters:,}", justify="right")
    table.add_column("multiply-adds", footer=f"{counted.macs:,}", justify="right")
    table.add_column("values", footer=f"{counted.values:,}", justify="right")
    table.add_column("field", justify="right")
    shape = "x".join(map(str, counted.input))
    table.add_row("input", "", shape, "", "", f"{counted.values - sum(r.values for r in rows):,}", "1")
    for row in by_stage(counted) if folded else rows:
        sizes = [f"{n:,}" if n else "" for n in (row.parameters, row.macs, row.values)]
        output = "x".join(map(str, row.output))
        table.add_row(label(net, row.name), row.kind, output, *sizes, str(row.field or "all"))
    console = Console(highlight=False, width=max(Console().width, 110))
    console.print(table)
    console.print(f"multiply-adds {_giga(counted.macs)} (FLOPs {_giga(2 * counted.macs)}) an image")
    console.print(f"activations   {4 * counted.values / 1e6:,.1f} MB an image forward (4 bytes a value)")
    if counted.backward_bytes is not None:
        console.print(f"              {counted.backward_bytes / 1e6:,.1f} MB an image kept for the backward pass, as measured")
    for note in notes(net):
        console.print(note)
    if folded:
        console.print(f"{len(rows)} layers, folded into stages; --all shows each")
