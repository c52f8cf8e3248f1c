"""Detection (DRL Tables 7 to 12): the same detector on different backbones, and the gains from test-time improvements."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from reslearn.detect.detector import Detector
from reslearn.detect.evaluate import TestOptions, find, matches, open_detectors, open_split
from reslearn.detect.ladder import TABLE_9, default_scales, ways
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import coco, compare, voc
from reslearn.evaluation.matching import Matches
from reslearn.reproduce import plots
from reslearn.reproduce.experiment import (
    METRICS,
    SEEDS,
    Comparison,
    Dataset,
    Effect,
    ExperimentOptions,
    Measured,
    Metric,
    Models,
    Plan,
    Scale,
    Training,
    minus,
    on_boxes,
)
from reslearn.reproduce.runs import open_annotated
from reslearn.reproduce.verdicts import NOT_RUN, compare_to_paper, estimate, row, verdict

EPOCHS = 12
LADDER_EPOCHS = 10  # of table9, which measures test-time gains
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
    "schedule.lr=0.02",
    "evaluate.every=512",
)
SMOKE = ("schedule.steps=2", "detector.min_size=64", "detector.max_size=96", "log.every=1")
BACKBONES = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "plain34": "plain-34", "vgg16-bn": "VGG-16 with BN"}
MINUTES = 7.0  # per run, the mean of the four backbones, on two cores


def training(net: str, scale: Scale, *settings: str, epochs: int = EPOCHS) -> Training:
    """A detector on a backbone with the recipe of these experiments; regions are pooled to 7 x 7, as VGG's fc6 requires."""
    size = "null" if net.startswith("vgg") else "7"
    length = SMOKE if scale == "smoke" else (f"schedule.epochs={epochs}",)
    return Training(net, "detect-default", (*RECIPE, f"detector.roi_size={size}", *settings, *length), task="detect")


def _deviations(scale: Scale, epochs: int = EPOCHS) -> tuple[str, ...]:
    return (
        "trained from scratch with unfrozen BN instead of from ImageNet weights; VGG-16 therefore has BN, too",
        f"shorter side 240 px, regions pooled to 7 x 7, 16 regions per image in training; {epochs} epochs, one cosine schedule"
        if scale == "small"
        else "two steps at 64 px",
        "a small data set: photos of blood cells (BCCD) instead of VOC or COCO; ResNets of 18 and 34 layers instead of 101",
    )


def _backbones(scale: Scale, rows: tuple[tuple[str, Metric, float | None], ...], metric: Metric) -> Plan:
    names = {net: BACKBONES[net] for net in (("resnet18",) if scale == "smoke" else BACKBONES)}
    published = {(net, m): value for net, m, value in rows}
    metrics: dict[Metric, None] = dict.fromkeys(m for _, m, _ in rows)
    effects = (
        Effect("ResNet-34 detects better than plain-34 as a backbone", minus("resnet34", "plain34"), metric),
        Effect("ResNet-34 detects better than VGG-16 as a backbone", minus("resnet34", "vgg16-bn"), metric),
        Effect("ResNet-18 detects better than VGG-16 as a backbone", minus("resnet18", "vgg16-bn"), metric),
    )
    return Plan(
        trainings={net: training(net, scale) for net in names},
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{name}, {m}", net, published.get((net, m)), m) for m in metrics for net, name in names.items()),
        effects=effects if scale != "smoke" else (),
        deviations=_deviations(scale),
        minutes=MINUTES,
    )


def table7(data: Dataset, scale: Scale) -> Plan:
    """VOC's metric. Published: VGG-16 and ResNet-101 on VOC 2007 test."""
    return _backbones(scale, (("vgg16-bn", "VOC10", 73.2), ("resnet34", "VOC10", 76.4)), "VOC10")


def table8(data: Dataset, scale: Scale) -> Plan:
    """COCO's metrics. Published: VGG-16 and ResNet-101 on COCO val."""
    rows: tuple[tuple[str, Metric, float | None], ...] = (
        ("vgg16-bn", "AP", 21.2),
        ("resnet34", "AP", 27.2),
        ("vgg16-bn", "AP50", 41.5),
        ("resnet34", "AP50", 48.4),
        ("resnet34", "AP75", None),
    )
    return _backbones(scale, rows, "AP")


PLAIN, CONTEXT = "resnet18", "resnet18 with context"
# DRL Table 10: ResNet-101 on VOC 2007; the second was trained on COCO first.
VOC_PAPER = {"baseline": 76.4, "+ multi-scale testing": 85.6}
# Published numbers without data to measure ours on.
PUBLISHED_ONLY = {
    "VOC 2012 test, baseline (Table 11)": 73.8,
    "VOC 2012 test, with all three improvements (Table 11)": 83.8,
    "ImageNet detection val2, one model (Table 12)": 60.5,
    "ImageNet detection val2, ensemble (Table 12)": 63.6,
}
# Improvements of the baseline by themselves, outside of the ladder.
NEARBY_SCALES, BASELINE_ENSEMBLE = "multi-scale testing near the baseline's scale", "ensemble of baselines"
SEPARATE = (NEARBY_SCALES, BASELINE_ENSEMBLE)


def table9(data: Dataset, scale: Scale) -> Plan:
    """The test-time improvements, on two detectors that differ only in global context; ensembles combine their seeds."""
    return Plan(
        trainings={
            PLAIN: training("resnet18", scale, epochs=LADDER_EPOCHS),
            CONTEXT: training("resnet18", scale, "detector.context=true", epochs=LADDER_EPOCHS),
        },
        seeds=SEEDS[scale],
        analyze=partial(measure_ladder, limit=4) if scale == "smoke" else measure_ladder,
        deviations=(*_deviations(scale, LADDER_EPOCHS), "multi-scale testing at the paper's five scales, reduced in proportion"),
        minutes=3.0,
    )


def measure_ladder(models: Models, options: ExperimentOptions, limit: int | None = None) -> Measured:
    """Adds one improvement after the other, for every seed. Context needs another detector, which all later rungs use.

    limit: number of test images (the first ones); None for all.
    """
    opened = iter(open_detectors([path for files in models.values() for path in files], options.device))
    groups = [tuple(next(opened) for _ in files) for files in models.values()]
    by_context = {group[0].settings.context: group for group in groups}
    if len(by_context) < len(groups):
        raise UserError("table9 takes one detector, or two of which exactly one has detector.context=true")
    plain, context = by_context.get(False, groups[0]), by_context.get(True, groups[0])
    data = open_annotated(options.source)
    images = open_split(data.path, plain[0].classes, bad="drop")
    images = replace(images, images=images.images[:limit])
    tests = _tests(plain, context)
    options.say(f"testing {len(images)} images with {sum(map(len, tests.values()))} protocols")
    results = iter(find(images.images, [protocol for protocols in tests.values() for protocol in protocols]))
    detections = {rung: [next(results) for _ in protocols] for rung, protocols in tests.items()}
    matched = {rung: [matches(result.detections, images) for result in detections[rung]] for rung in tests}
    rows: list[dict[str, Any]] = []
    metrics: tuple[Metric, ...] = ("AP50", "AP")
    for rung, by_seed in matched.items():
        numbers = [coco(seed) | voc(seed) for seed in by_seed]
        time = f"{1000 * statistics.median(result.seconds for result in detections[rung]):,.0f} ms per image"
        published: dict[Metric, float] = dict(zip(metrics, TABLE_9[rung][:2], strict=True)) if rung in TABLE_9 else {}
        comparisons = [Comparison(f"{rung}, {metric} ({time})", "", published.get(metric), metric) for metric in metrics]
        comparisons.append(Comparison(f"{rung}, VOC's metric (Table 10)", "", VOC_PAPER.get(rung), "VOC10"))
        rows += [compare_to_paper(c, [seed[c.metric] or 0.0 for seed in numbers], comparable=False) for c in comparisons]
    rows += [row(what, "", published=value, verdict=NOT_RUN) for what, value in PUBLISHED_ONLY.items()]
    steps = [*pairwise(rung for rung in matched if rung not in SEPARATE)]
    steps += [("baseline", rung) for rung in SEPARATE if rung in matched]
    claims = [_gain(after, matched[before], matched[after], metric) for metric in metrics for before, after in steps]
    caption = "Gains in AP and AP50 with 95% intervals."
    return Measured(rows, claims, lambda path: plots.effects(claims, path), caption=caption, data=data.name)


def _tests(plain: tuple[Detector, ...], context: tuple[Detector, ...]) -> dict[str, list[TestOptions]]:
    """The test protocols by rung: one per seed, or one for an ensemble of all seeds."""
    by_seed = [ways(model, (), default_scales(model)) for model in plain]
    rungs: dict[str, list[TestOptions | None]] = {rung: [protocols[rung] for protocols in by_seed] for rung in by_seed[0]}
    if context is not plain:
        with_context = [ways(model, (), default_scales(model)) for model in context]
        rungs["+ context"] = [protocols["+ box refinement"] for protocols in with_context]
        rungs["+ multi-scale testing"] = [protocols["+ multi-scale testing"] for protocols in with_context]
    rungs[NEARBY_SCALES] = [TestOptions((model,), False, _nearby_scales(model)) for model in plain]
    if len(plain) > 1:
        rungs["ensemble"] = [ways(context[0], context[1:], default_scales(context[0]))["ensemble"]]
        rungs[BASELINE_ENSEMBLE] = [TestOptions(plain)]
    tests = {rung: [protocol for protocol in protocols if protocol is not None] for rung, protocols in rungs.items()}
    return {rung: protocols for rung, protocols in tests.items() if protocols}


def _nearby_scales(model: Detector) -> tuple[int, ...]:
    """Three shorter sides with the detector's own in the middle: 200, 240 and 288 px."""
    return tuple(round(model.settings.min_size * factor) for factor in (5 / 6, 1, 6 / 5))


def _gain(rung: str, before: Sequence[Matches], after: Sequence[Matches], metric: Metric) -> dict[str, Any]:
    """A claim over the seeds, or for a single seed with a paired interval over images. An ensemble is compared with each seed."""
    after = after if len(after) == len(before) else list(after) * len(before)
    name = rung.removeprefix("+ ")
    text = f"{name[0].upper()}{name[1:]} raises {metric}"
    if len(before) > 1:
        values = {
            "before": {i: coco(seed)[metric] or 0.0 for i, seed in enumerate(before)},
            "after": {i: coco(seed)[metric] or 0.0 for i, seed in enumerate(after)},
        }
        return estimate(Effect(text, minus("after", "before"), metric), values)
    comparison = compare(before[0], after[0])[metric]
    difference, interval = comparison["difference"], comparison["interval"]
    effect = {"n": 1, "mean": difference, "std": None, "interval": interval, "values": [difference]}
    return {"text": text, "metric": METRICS[metric], "effect": effect, "verdict": verdict(interval), "disagree": []}


EXPERIMENTS = (
    on_boxes(
        "table7",
        "Detection, VOC's metric: residual backbones against VGG-16 and a plain network",
        "DRL, Table 7",
        "The same detector, Faster R-CNN, on different backbones. VOC's average precision counts a box as correct if its IoU is at "
        "least 0.5. The published numbers are for VGG-16 and ResNet-101 on PASCAL VOC 2007.",
        table7,
    ),
    on_boxes(
        "table8",
        "Detection, COCO's metric: residual backbones against VGG-16 and a plain network",
        "DRL, Table 8",
        "The same runs with COCO's metric, the mean over ten IoU thresholds from 0.5 to 0.95, which rewards accurate boxes. The "
        "published numbers are for VGG-16 and ResNet-101 on COCO val.",
        table8,
    ),
    on_boxes(
        "table9",
        "Detection: box refinement, global context, multi-scale testing and ensembles, added one by one",
        "DRL, Tables 9 to 12",
        "Each line adds an improvement to the line before, on the same images; the last lines improve the baseline alone. "
        "Intervals are over seeds, or paired over images for a single seed. The published numbers are for ResNet-101 on COCO val "
        "(the ensemble: COCO test-dev) and, with VOC's metric, on VOC 2007. There, the detector with all three improvements was "
        "trained on COCO first.",
        table9,
    ),
)
