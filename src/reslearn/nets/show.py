"""Tables of the zoo and of a network's layers, for the terminal and as JSON."""

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

MAX_ROWS = 40  # longer tables are folded into stages unless --all is given


def listing(pattern: str = "*") -> Iterator[dict[str, Any]]:
    """Yields a dict per network, as each is counted; macs and flops are per image of the network's default size.

    Raises UserError if no name matches.
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
    """Prints one line per network, as each is counted."""
    head = f"{'network':<22} {'parameters':>12} {'multiply-adds':>14} {'FLOPs':>9} {'activations':>12}  published error, %"
    for i, row in enumerate(listing(pattern)):
        if i == 0:
            print(head)
        errors = ", ".join(f"{value:.2f} ({metric})" for metric, value in row["published_error"].items())
        sizes = f"{_giga(row['macs']):>14} {_giga(row['flops']):>9} {row['activation_bytes'] / 1e6:>9.1f} MB"
        print(f"{row['name']:<22} {row['parameters']:>12,} {sizes}  {errors or '-'}", flush=True)
    print("per image of the default size; FLOPs = 2 x multiply-adds (papers: FLOPs = multiply-adds); activations: forward, float32")


def _giga(n: int) -> str:
    return f"{n / 1e9:.3f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"


def label(net: nn.Module, name: str) -> str:
    """A layer's name, preceded by the paper's label (DRL Table 1) in ImageNet networks."""
    stage = name.split(".")[0]
    if isinstance(net, ResNet) and isinstance(net.maxpool, nn.MaxPool2d) and stage in net.stages:
        return f"conv{int(stage.removeprefix('layer')) + 1}_x {name}"
    return name


def notes(net: nn.Module) -> list[str]:
    """Compares the weights of the network's bottleneck with those of a direct 3x3 convolution (DRL Figure 5)."""
    for module in net.modules():
        if isinstance(module, Block) and len(module.layers()) == 3 and module.keeps_shape():
            convolutions = [convolution for convolution, _ in module.layers()]
            weights = sum(c.weight.numel() for c in convolutions)
            channels = convolutions[0].in_channels
            direct = 9 * channels * channels
            return [
                f"a bottleneck on {channels} channels has {weights:,} weights; one 3x3 convolution on them would have {direct:,}"
            ]
    return []


def summarize(net: nn.Module, input: tuple[int, ...]) -> Cost:
    """Returns cost(net, input). Raises UserError if the network does not support the input."""
    try:
        return cost(net, input)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, input))
        raise UserError(f"the network does not support an input of {shape}: {str(error).splitlines()[0]}") from error


def as_json(net: nn.Module, counted: Cost) -> dict[str, Any]:
    """A summary as JSON."""
    rows = [asdict(row) | {"label": label(net, row.name)} for row in counted.rows]
    totals = {"parameters": counted.parameters, "macs": counted.macs, "flops": 2 * counted.macs}
    memory = {"values": counted.values, "forward_bytes": 4 * counted.values, "backward_bytes": counted.backward_bytes}
    return {"input": list(counted.input), **totals, **memory, "rows": rows, "notes": notes(net)}


def print_summary(net: nn.Module, counted: Cost, every_row: bool = False) -> None:
    """Prints the layer table, totals and notes."""
    rows: list[Row] = list(counted.rows)
    folded = len(rows) > MAX_ROWS and not every_row
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
    console.print(f"multiply-adds {_giga(counted.macs)} (FLOPs {_giga(2 * counted.macs)}) per image")
    console.print(f"activations   {4 * counted.values / 1e6:,.1f} MB per image in the forward pass (4 bytes per value)")
    if counted.backward_bytes is not None:
        console.print(f"              {counted.backward_bytes / 1e6:,.1f} MB per image saved for the backward pass (measured)")
    for note in notes(net):
        console.print(note)
    if folded:
        console.print(f"{len(rows)} layers, folded into stages; use --all to show every layer")
