"""Detection (DRL Tables 7, 8): the same detector on different trunks."""

from reslearn.reproduce.experiment import Dataset, Effect, Experiment, Metric, Plan, Row, Scale, Training, scales

EPOCHS = 10
RECIPE = (
    "data.bad=drop",
    "data.flip=both",
    "detector.min_size=240",
    "detector.max_size=320",
    "detector.anchors=[16,32,48,64,96]",
    "detector.ratios=[1.0]",
    "detector.ranked=[600,600]",
    "detector.proposals=[300,100]",
    "detector.regions=16",
    "detector.nms=0.5",
    f"schedule.epochs={EPOCHS}",
    "schedule.lr=0.02",
    "evaluate.every=512",
)
SMOKE = ("schedule.steps=2", "detector.min_size=64", "detector.max_size=96", "log.every=1")
TRUNKS = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "plain34": "plain-34", "vgg16-bn": "VGG-16 with BN"}
MINUTES = 6.0  # of a run, the mean of the four, on two cores


def training(net: str, scale: Scale, *more: str) -> Training:
    """A detector on a network under the recipe of these experiments, regions pooled to 7 x 7 as VGG's fc6 takes them."""
    size = "null" if net.startswith("vgg") else "7"
    smoke = SMOKE if scale == "smoke" else ()
    return Training(net, "detect-default", (*RECIPE, f"detector.roi_size={size}", *more, *smoke), task="detect")


def _deviations(scale: Scale) -> tuple[str, ...]:
    return (
        "trained from scratch with live BN, not from ImageNet weights; VGG-16 has BN for that, too",
        f"shorter side 240 px, regions pooled to 7 x 7 px, 16 of them in training; {EPOCHS} epochs of one cosine"
        if scale == "small"
        else "two steps at 64 px",
        "the data set is small: photos of blood cells (BCCD), not VOC or COCO; ResNets of 18 and 34 layers, not 101",
    )


def _compared(scale: Scale, rows: tuple[tuple[str, Metric, float | None], ...], metric: Metric) -> Plan:
    names = {net: TRUNKS[net] for net in (("resnet18",) if scale == "smoke" else TRUNKS)}
    published = {(net, m): value for net, m, value in rows}
    metrics: dict[Metric, None] = dict.fromkeys(m for _, m, _ in rows)
    effects = (
        Effect("The residual trunk of 34 layers detects better than the plain one", {"resnet34": 1.0, "plain34": -1.0}, metric),
        Effect("The residual trunk of 34 layers detects better than VGG-16", {"resnet34": 1.0, "vgg16-bn": -1.0}, metric),
        Effect("The residual trunk of 18 layers detects better than VGG-16", {"resnet18": 1.0, "vgg16-bn": -1.0}, metric),
    )
    return Plan(
        trainings={net: training(net, scale) for net in names},
        seeds=3 if scale == "small" else 1,
        rows=tuple(Row(f"{name}, {m}", net, published.get((net, m)), m) for m in metrics for net, name in names.items()),
        effects=effects if scale != "smoke" else (),
        deviations=_deviations(scale),
        minutes=MINUTES,
    )


def table7(data: Dataset, scale: Scale) -> Plan:
    """VOC's measure. The paper's numbers: VOC 2007 test, VGG-16 and ResNet-101."""
    return _compared(scale, (("vgg16-bn", "VOC10", 73.2), ("resnet34", "VOC10", 76.4)), "VOC10")


def table8(data: Dataset, scale: Scale) -> Plan:
    """COCO's measures. The paper's numbers: COCO val, VGG-16 and ResNet-101."""
    rows: tuple[tuple[str, Metric, float | None], ...] = (
        ("vgg16-bn", "AP", 21.2),
        ("resnet34", "AP", 27.2),
        ("vgg16-bn", "AP50", 41.5),
        ("resnet34", "AP50", 48.4),
        ("resnet34", "AP75", None),
    )
    return _compared(scale, rows, "AP")


EXPERIMENTS = (
    Experiment(
        "table7",
        "Detection, VOC's measure: residual trunks against VGG-16 and a plain net",
        "DRL, Table 7",
        "One detector, Faster R-CNN, whose trunk alone is exchanged. VOC's average precision counts a box as right from an "
        "overlap of one half. The published numbers are VGG-16's and ResNet-101's on PASCAL VOC 2007.",
        scales(table7, "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
    Experiment(
        "table8",
        "Detection, COCO's measure: residual trunks against VGG-16 and a plain net",
        "DRL, Table 8",
        "The same runs by COCO's measure, the mean over ten overlaps from 0.5 to 0.95: it asks for boxes that fit. The published "
        "numbers are VGG-16's and ResNet-101's on COCO val.",
        scales(table8, "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
)
