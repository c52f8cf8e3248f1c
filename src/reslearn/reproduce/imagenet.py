"""ImageNet: counts (DRL Table 1), tests of given models (Tables 4 and 5), and the claims of Tables 2 and 3 on small images."""

from reslearn.nets import create
from reslearn.nets.cost import cost
from reslearn.reproduce.experiment import (
    SEEDS,
    Comparison,
    Dataset,
    Effect,
    Experiment,
    Measured,
    Panel,
    Plan,
    Scale,
    Training,
    minus,
    scales,
)
from reslearn.reproduce.recipes import deviations, shortened
from reslearn.reproduce.testing import measure_ensemble, measure_single
from reslearn.reproduce.verdicts import agreement, row

STEPS = 400  # at small scale
DEPTHS = (18, 34, 50, 101, 152)
# DRL Table 1: multiply-adds in G (its last row, "FLOPs"), and the parameters of its layers with projections where the size
# changes (shortcut B).
GMACS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
ROUNDING = 0.1  # G; the paper prints one decimal (3.6 for 34 layers, where 3.66 are counted)
SMALL = (
    f"{STEPS} iterations on 32 px images of CIFAR-10 instead of 600,000 on ImageNet at 224 px; the networks are the same, so "
    "their last stage has feature maps of one pixel",
)


def _count_row(what: str, expected: float, ours: float, tolerance: float, unit: str, printed: bool = True) -> dict[str, object]:
    """A row of the result. printed: whether the paper prints the expected number."""
    return row(what, unit, [ours], expected if printed else None, **agreement(ours, expected, tolerance))


def _count() -> Measured:
    rows = []
    for depth in DEPTHS:
        net = create(f"resnet{depth}")
        counted = cost(net, (3, 224, 224), backward=False)
        rows.append(_count_row(f"ResNet-{depth}, multiply-adds", GMACS[depth], counted.macs / 1e9, ROUNDING, "G"))
        parameters = PARAMETERS[depth]
        what = f"ResNet-{depth}, parameters (from the table's layers: {parameters:,})"
        rows.append(_count_row(what, parameters / 1e6, counted.parameters / 1e6, 0, "M", printed=False))
        outputs = {layer.name.split(".")[0]: layer.output for layer in counted.rows}
        sizes = [float(shape[1]) for name, shape in outputs.items() if name.startswith("layer")]
        for stage, published, size in zip(("conv2_x", "conv3_x", "conv4_x", "conv5_x"), (56, 28, 14, 7), sizes, strict=True):
            rows.append(_count_row(f"ResNet-{depth}, {stage} output side", published, size, 0, "px"))
    for depth in (18, 34):
        residual = sum(p.numel() for p in create(f"resnet{depth}", shortcut="A").parameters())
        plain = sum(p.numel() for p in create(f"plain{depth}").parameters())
        what = f"plain-{depth}, parameters (those of ResNet-{depth} with shortcut A: {residual:,})"
        rows.append(_count_row(what, residual / 1e6, plain / 1e6, 0, "M", printed=False))
    return Measured(rows)


def table1(data: Dataset, scale: Scale) -> Plan:
    """Every count of the table; the same at every scale."""
    return Plan(count=_count, deviations=("the paper prints no parameter counts; these are derived from its table",))


def _training(net: str, data: Dataset, scale: Scale, *settings: str) -> Training:
    size = () if data.cifar else ("data.size=32",)  # the smallest input for a total stride of 32
    return shortened(net, data, scale, STEPS, *settings, *size)


def _plain_and_residual(data: Dataset, scale: Scale) -> Plan:
    labels = {"plain18": (), "plain34": (), "resnet18": ("net.shortcut=A",), "resnet34": ("net.shortcut=A",)}
    published = {"plain18": 27.94, "plain34": 28.54, "resnet18": 27.88, "resnet34": 25.03}
    gap, deep = minus("plain34", "plain18"), minus("plain34", "resnet34")
    return Plan(
        trainings={net: _training(net, data, scale, *settings) for net, settings in labels.items()},
        seeds=SEEDS[scale],
        rows=(
            *(Comparison(f"{net}, top-1 error", net, published[net]) for net in labels),
            *(Comparison(f"{net}, training error", net, metric="train_error") for net in labels),
        ),
        effects=(
            Effect("The plain net of 34 layers has a higher training error than that of 18", gap, "train_error"),
            Effect("This gap is larger than that of the residual nets", gap | {"resnet34": -1.0, "resnet18": 1.0}, "train_error"),
            Effect("With 34 layers, the residual net has a lower training error than the plain net", deep, "train_error"),
        ),
        panels=(Panel("plain", ("plain18", "plain34")), Panel("residual", ("resnet18", "resnet34"))),
        crossings=(("resnet34", "resnet18"),),
        deviations=deviations(data, scale, *SMALL),
    )


def _shortcuts_and_depths(data: Dataset, scale: Scale) -> Plan:
    kinds = {f"ResNet-34 {kind}": ("resnet34", (f"net.shortcut={kind}",)) for kind in "ABC"}
    deep = {"plain-34": ("plain34", ()), "ResNet-50": ("resnet50", ()), "ResNet-101": ("resnet101", ())}
    published = {"plain-34": 28.54, "ResNet-34 A": 25.03, "ResNet-34 B": 24.52, "ResNet-34 C": 24.19}
    published |= {"ResNet-50": 22.85, "ResNet-101": 21.75}
    trainings = {label: _training(net, data, scale, *settings) for label, (net, settings) in (kinds | deep).items()}
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{label}, top-1 error", label, published[label]) for label in trainings),
        effects=tuple(
            Effect(f"{net} has a lower test error than plain-34", minus("plain-34", net)) for net in trainings if net != "plain-34"
        ),
        deviations=(*deviations(data, scale, *SMALL), "without ResNet-152"),
    )


EXPERIMENTS = (
    Experiment(
        "table1",
        "Layers, multiply-adds and parameters of the networks",
        "DRL, Table 1",
        "Five networks of 18 to 152 layers. Even the deepest has fewer multiply-adds than VGG-16 (15.3 G).",
        scales(table1),
    ),
    Experiment(
        "table2",
        "ImageNet: plain networks get worse with depth, residual networks get better",
        "DRL, Table 2 and Figure 4",
        "Networks of 18 and 34 layers with and without shortcuts. Shortcut A has no parameters, so plain and residual networks of "
        "the same depth have the same number of parameters.",
        scales(_plain_and_residual, "smoke", "small"),
    ),
    Experiment(
        "table3",
        "ImageNet: three kinds of shortcut, and more depth",
        "DRL, Table 3",
        "Projection shortcuts help only a little, so they are not essential; depth is.",
        scales(_shortcuts_and_depths, "smoke", "small"),
    ),
    Experiment(
        "table4",
        "ImageNet: single models, multi-crop and multi-scale testing",
        "DRL, Tables 3 and 4",
        "The errors of given models on ten crops, and on whole images at five scales, next to the paper's. A verdict requires "
        "ImageNet's own 50,000 validation images.",
        scales(lambda data, scale: Plan(analyze=measure_single), "paper"),
        data="imagenet",
        small_data=None,
    ),
    Experiment(
        "table5",
        "ImageNet: ensembles",
        "DRL, Table 5",
        "The scores of several given models, each tested at five scales, are averaged. The ensemble should have a lower error than "
        "any of its models.",
        scales(lambda data, scale: Plan(analyze=measure_ensemble), "paper"),
        data="imagenet",
        small_data=None,
    ),
)
