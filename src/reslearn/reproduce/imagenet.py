"""ImageNet: counts (DRL Table 1), and what its tables claim, on small images."""

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
from reslearn.reproduce.verdicts import DIFFERS, HOLDS, summarize

STEPS = 400  # at small scale
DEPTHS = (18, 34, 50, 101, 152)
# DRL Table 1, its last row ("FLOPs", which are multiply-adds), in G; and parameters as counted from the table's layers,
# projections where the size changes (B)
GMACS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
ROUNDING = 0.1  # G: the paper prints one decimal, and 34 layers are 3.66
SMALL = (
    f"{STEPS} iterations on 32 px images of CIFAR-10 instead of 600,000 on ImageNet at 224 px: the nets are the same, and their "
    "last stages see one pixel",
)


def _count_line(what: str, expected: float, ours: float, tolerance: float, unit: str, printed: bool = True) -> dict[str, object]:
    """printed: whether the paper prints the expected number."""
    return {
        "what": what,
        "metric": unit,
        "published": expected if printed else None,
        "ours": summarize([ours]),
        "difference": ours - expected,
        "tolerance": tolerance,
        "verdict": HOLDS if abs(ours - expected) <= tolerance else DIFFERS,
    }


def _count() -> Measured:
    rows = []
    for depth in DEPTHS:
        net = create(f"resnet{depth}")
        counted = cost(net, (3, 224, 224), backward=False)
        rows.append(_count_line(f"ResNet-{depth}, multiply-adds", GMACS[depth], counted.macs / 1e9, ROUNDING, "G"))
        parameters = PARAMETERS[depth]
        what = f"ResNet-{depth}, parameters (from the table's layers: {parameters:,})"
        rows.append(_count_line(what, parameters / 1e6, counted.parameters / 1e6, 0, "M", printed=False))
        ends = {row.name.split(".")[0]: row.output for row in counted.rows}
        sizes = [float(shape[1]) for name, shape in ends.items() if name.startswith("layer")]
        for stage, published, size in zip(("conv2_x", "conv3_x", "conv4_x", "conv5_x"), (56, 28, 14, 7), sizes, strict=True):
            rows.append(_count_line(f"ResNet-{depth}, {stage} output side", published, size, 0, "px"))
    for depth in (18, 34):
        twin = sum(p.numel() for p in create(f"resnet{depth}", shortcut="A").parameters())
        plain = sum(p.numel() for p in create(f"plain{depth}").parameters())
        what = f"plain-{depth}, parameters (those of its residual twin with shortcut A: {twin:,})"
        rows.append(_count_line(what, twin / 1e6, plain / 1e6, 0, "M", printed=False))
    return Measured(rows)


def table1(data: Dataset, scale: Scale) -> Plan:
    """Every count of the table, at its own scale whatever is asked for: counting costs nothing."""
    return Plan(count=_count, deviations=("the paper prints no parameters: these are counted from its table",))


def _training(net: str, data: Dataset, scale: Scale, *settings: str) -> Training:
    at_least = () if data.cifar else ("data.size=32",)  # these nets shrink their input 32 times
    return shortened(net, data, scale, STEPS, *settings, *at_least)


def _plain_and_residual(data: Dataset, scale: Scale) -> Plan:
    labels = {"plain18": (), "plain34": (), "resnet18": ("net.shortcut=A",), "resnet34": ("net.shortcut=A",)}
    published = {"plain18": 27.94, "plain34": 28.54, "resnet18": 27.88, "resnet34": 25.03}
    return Plan(
        trainings={net: _training(net, data, scale, *settings) for net, settings in labels.items()},
        seeds=SEEDS[scale],
        rows=(
            *(Comparison(f"{net}, top-1 error", net, published[net]) for net in labels),
            *(Comparison(f"{net}, training error", net, metric="train_error") for net in labels),
        ),
        effects=(
            Effect("Plain: 34 layers have more training error than 18", minus("plain34", "plain18"), "train_error"),
            Effect(
                "That gap is larger than the residual twins' own",
                minus("plain34", "plain18") | {"resnet34": -1.0, "resnet18": 1.0},
                "train_error",
            ),
            Effect("At 34 layers the residual net has less training error", minus("plain34", "resnet34"), "train_error"),
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
            Effect(f"{label} errs less than plain-34", minus("plain-34", label)) for label in trainings if label != "plain-34"
        ),
        deviations=(*deviations(data, scale, *SMALL), "152 layers are left out"),
    )


EXPERIMENTS = (
    Experiment(
        "table1",
        "The networks, layer by layer, counted",
        "DRL, Table 1",
        "Five nets from 18 to 152 layers. The deepest has fewer multiply-adds than VGG-16 (15.3 G).",
        scales(table1),
    ),
    Experiment(
        "table2",
        "ImageNet: plain nets get worse with depth, residual nets better",
        "DRL, Table 2 and Figure 4",
        "Nets of 18 and 34 layers, with shortcuts and without; shortcut A has no parameters, so the twins have the same number.",
        scales(_plain_and_residual, "smoke", "small"),
    ),
    Experiment(
        "table3",
        "ImageNet: three kinds of shortcut, and more depth",
        "DRL, Table 3",
        "Projections help a little, so they are not what makes the difference; depth does.",
        scales(_shortcuts_and_depths, "smoke", "small"),
    ),
    Experiment(
        "table4",
        "ImageNet: single models, tested on many views",
        "DRL, Tables 3 and 4",
        "The errors of given models on ten crops, and on whole images at five scales, beside the paper's. Only ImageNet's own "
        "50,000 validation images are compared.",
        scales(lambda data, scale: Plan(analyze=measure_single), "paper"),
        data="imagenet",
        small_data=None,
    ),
    Experiment(
        "table5",
        "ImageNet: ensembles",
        "DRL, Table 5",
        "The scores of several given models are averaged, each at five scales: together they should err less than any alone.",
        scales(lambda data, scale: Plan(analyze=measure_ensemble), "paper"),
        data="imagenet",
        small_data=None,
    ),
)
