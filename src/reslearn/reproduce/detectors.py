"""Detection (DRL Tables 7 to 11): the same detector on different backbones, and what the improvements at test time bring."""

import statistics
from collections.abc import Mapping, Sequence
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
    Experiment,
    ExperimentOptions,
    Measured,
    Metric,
    Models,
    Plan,
    Scale,
    Training,
    minus,
)
from reslearn.reproduce.experiment import scales as at
from reslearn.reproduce.runs import open_annotated
from reslearn.reproduce.verdicts import NOT_RUN, compare_to_paper, estimate, verdict

EPOCHS = 12
LADDER_EPOCHS = 10  # table9 is about what testing adds to any detector
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
MINUTES = 7.0  # of a run, the mean of the four, on two cores


def training(net: str, scale: Scale, *more: str, epochs: int = EPOCHS) -> Training:
    """A detector on a network under the recipe of these experiments, regions pooled to 7 x 7 as VGG's fc6 takes them."""
    size = "null" if net.startswith("vgg") else "7"
    length = SMOKE if scale == "smoke" else (f"schedule.epochs={epochs}",)
    return Training(net, "detect-default", (*RECIPE, f"detector.roi_size={size}", *more, *length), task="detect")


def _deviations(scale: Scale, epochs: int = EPOCHS) -> tuple[str, ...]:
    return (
        "trained from scratch with live BN, not from ImageNet weights; VGG-16 has BN for that, too",
        f"shorter side 240 px, regions pooled to 7 x 7 px, 16 of them in training; {epochs} epochs of one cosine"
        if scale == "small"
        else "two steps at 64 px",
        "the data set is small: photos of blood cells (BCCD), not VOC or COCO; ResNets of 18 and 34 layers, not 101",
    )


def _compared(scale: Scale, rows: tuple[tuple[str, Metric, float | None], ...], metric: Metric) -> Plan:
    names = {net: BACKBONES[net] for net in (("resnet18",) if scale == "smoke" else BACKBONES)}
    published = {(net, m): value for net, m, value in rows}
    metrics: dict[Metric, None] = dict.fromkeys(m for _, m, _ in rows)
    effects = (
        Effect("The residual backbone of 34 layers detects better than the plain one", minus("resnet34", "plain34"), metric),
        Effect("The residual backbone of 34 layers detects better than VGG-16", minus("resnet34", "vgg16-bn"), metric),
        Effect("The residual backbone of 18 layers detects better than VGG-16", minus("resnet18", "vgg16-bn"), metric),
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


PLAIN, CONTEXT = "resnet18", "resnet18 with context"
# DRL Table 10, VOC 2007, ResNet-101, the latter trained on COCO first
VOC_PAPER = {"baseline": 76.4, "+ multi-scale testing": 85.6}
# What there is no data for here: Table 11, Table 12
ELSEWHERE = {
    "VOC 2012 test, as it is (Table 11)": 73.8,
    "VOC 2012 test, with all three (Table 11)": 83.8,
    "ImageNet detection val2, one model (Table 12)": 60.5,
    "ImageNet detection val2, ensemble (Table 12)": 63.6,
}
# Beside the ladder: what improves the baseline by itself
NEAR, ALONE = "multi-scale testing near the baseline's own side", "ensemble of baselines"
BESIDE = (NEAR, ALONE)


def table9(data: Dataset, scale: Scale) -> Plan:
    """The rungs, on two detectors that differ in global context alone; ensembles are of their seeds."""
    return Plan(
        trainings={
            PLAIN: training("resnet18", scale, epochs=LADDER_EPOCHS),
            CONTEXT: training("resnet18", scale, "detector.context=true", epochs=LADDER_EPOCHS),
        },
        seeds=SEEDS[scale],
        analyze=partial(measure_ladder, most=4) if scale == "smoke" else measure_ladder,
        deviations=(*_deviations(scale, LADDER_EPOCHS), "multi-scale testing at the paper's five sides in proportion"),
        minutes=3.0,
    )


def measure_ladder(models: Models, options: ExperimentOptions, most: int | None = None) -> Measured:
    """Each rung on the one before, for every seed. Context is another detector, so both are tested with all the rest.

    most: how many of the test images, the first ones, are looked at; without it, all.
    """
    opened = iter(open_detectors([path for each in models.values() for path in each], options.device))
    groups = [tuple(next(opened) for _ in each) for each in models.values()]
    by_context = {group[0].settings.context: group for group in groups}
    if len(by_context) < len(groups):
        raise UserError("table9 takes one detector, or two of which one alone has detector.context=true")
    plain, context = by_context.get(False, groups[0]), by_context.get(True, groups[0])
    data = open_annotated(options.source)
    images = open_split(data.path, plain[0].classes, bad="drop")
    images = replace(images, images=images.images[:most])
    tests = _tests(plain, context)
    options.say(f"testing {len(images)} images in {sum(map(len, tests.values()))} ways")
    found = iter(find(images.images, [way for each in tests.values() for way in each]))
    seen = {rung: [next(found) for _ in each] for rung, each in tests.items()}
    matched = {rung: [matches(one.detections, images) for one in each] for rung, each in seen.items()}
    rows: list[dict[str, Any]] = []
    metrics: tuple[Metric, ...] = ("AP50", "AP")
    for rung, each in matched.items():
        numbers = [coco(one) | voc(one) for one in each]
        time = f"{1000 * statistics.median(one.seconds for one in seen[rung]):,.0f} ms an image"
        published: dict[Metric, float] = dict(zip(metrics, TABLE_9[rung][:2], strict=True)) if rung in TABLE_9 else {}
        rows += [_row(f"{rung}, {metric} ({time})", metric, numbers, published.get(metric)) for metric in metrics]
        rows.append(_row(f"{rung}, VOC's measure (Table 10)", "VOC10", numbers, VOC_PAPER.get(rung)))
    rows += [{"what": what, "published": value, "ours": None, "verdict": NOT_RUN} for what, value in ELSEWHERE.items()]
    steps = [*pairwise(rung for rung in matched if rung not in BESIDE), *(("baseline", rung) for rung in BESIDE if rung in matched)]
    claims = [_gain(after, matched[before], matched[after], m) for m in metrics for before, after in steps]
    caption = "Differences in AP and in AP50, and their 95% intervals."
    return Measured(rows, claims, lambda path: plots.effects(claims, path), caption=caption, data=data.name)


def _tests(plain: tuple[Detector, ...], context: tuple[Detector, ...]) -> dict[str, list[TestOptions]]:
    """The ways to test by rung: one for each seed, and of ensembles one of all."""
    each = [ways(model, (), default_scales(model)) for model in plain]
    rungs: dict[str, list[TestOptions | None]] = {rung: [own[rung] for own in each] for rung in each[0]}
    if context is not plain:
        fuller = [ways(model, (), default_scales(model)) for model in context]
        rungs["+ context"] = [own["+ box refinement"] for own in fuller]
        rungs["+ multi-scale testing"] = [own["+ multi-scale testing"] for own in fuller]
    rungs[NEAR] = [TestOptions((model,), False, _near(model)) for model in plain]
    if len(plain) > 1:
        rungs["ensemble"] = [ways(context[0], context[1:], default_scales(context[0]))["ensemble"]]
        rungs[ALONE] = [TestOptions(plain)]
    return {rung: real for rung, some in rungs.items() if (real := [way for way in some if way is not None])}


def _near(model: Detector) -> tuple[int, ...]:
    """Three shorter sides, the detector's own in the middle: 200, 240 and 288 px."""
    return tuple(round(model.settings.min_size * factor) for factor in (5 / 6, 1, 6 / 5))


def _row(what: str, metric: Metric, numbers: Sequence[Mapping[str, Any]], published: float | None) -> dict[str, Any]:
    return compare_to_paper(Comparison(what, "", published, metric), [each[metric] or 0.0 for each in numbers], comparable=False)


def _gain(rung: str, before: Sequence[Matches], after: Sequence[Matches], metric: Metric) -> dict[str, Any]:
    """A claim about the seeds, or about one of them, with its paired interval over the images. An ensemble stands beside each."""
    after = after if len(after) == len(before) else list(after) * len(before)
    text = f"{(said := rung.removeprefix('+ '))[0].upper()}{said[1:]} raises {metric}"
    if len(before) > 1:
        values = {
            "before": {i: coco(one)[metric] or 0.0 for i, one in enumerate(before)},
            "after": {i: coco(one)[metric] or 0.0 for i, one in enumerate(after)},
        }
        return estimate(Effect(text, minus("after", "before"), metric), values)
    found = compare(before[0], after[0])[metric]
    difference, interval = found["difference"], found["interval"]
    effect = {"n": 1, "mean": difference, "std": None, "interval": interval, "values": [difference]}
    return {"text": text, "metric": METRICS[metric], "effect": effect, "verdict": verdict(interval), "disagree": []}


EXPERIMENTS = (
    Experiment(
        "table7",
        "Detection, VOC's measure: residual backbones against VGG-16 and a plain net",
        "DRL, Table 7",
        "One detector, Faster R-CNN, whose backbone alone is exchanged. VOC's average precision counts a box as right from an "
        "overlap of one half. The published numbers are VGG-16's and ResNet-101's on PASCAL VOC 2007.",
        at(table7, "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
    Experiment(
        "table8",
        "Detection, COCO's measure: residual backbones against VGG-16 and a plain net",
        "DRL, Table 8",
        "The same runs by COCO's measure, the mean over ten overlaps from 0.5 to 0.95: it asks for boxes that fit. The published "
        "numbers are VGG-16's and ResNet-101's on COCO val.",
        at(table8, "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
    Experiment(
        "table9",
        "Detection: box refinement, global context, multi-scale testing and ensembles, one on the other",
        "DRL, Tables 9 to 12",
        "Each line adds an improvement to the one before, on the same images; the last ones improve the baseline by "
        "themselves. Intervals are of the difference, over the seeds, or for one of them paired over the images. The "
        "published numbers are ResNet-101's on COCO val (the ensemble's on COCO test-dev), and on VOC 2007 by VOC's measure. On "
        "VOC, the detector with all three was trained on COCO before.",
        at(table9, "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
)
