"""Detecting objects: what a run of it is made of. The functions are those of a Task."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reslearn.classify.task import same_net, start_of
from reslearn.data.boxes.box_set import BoxSet, bad_boxes_left_out_by
from reslearn.data.boxes.read import open_boxes, split_names
from reslearn.data.boxes.source import BoxSource, hold_out
from reslearn.data.boxes.voc import splits as voc_splits
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import integer
from reslearn.data.splits import held_out
from reslearn.detect.alternating import AlternatingLoop, AlternatingState, describe, phase_ends
from reslearn.detect.build import assemble, backbone
from reslearn.detect.detector import Detector
from reslearn.detect.evaluate import TestOptions
from reslearn.detect.gallery import save_gallery
from reslearn.detect.loop import DetectLoop
from reslearn.detect.pictures import save_examples
from reslearn.detect.recipes import DETECTION, BoxData, DetectRecipe
from reslearn.detect.step import judge
from reslearn.detect.store import save_detector
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import detection_metrics
from reslearn.evaluation.detection_review import review
from reslearn.evaluation.matching import Matches
from reslearn.nets import create, spec
from reslearn.training import ranks, runtime
from reslearn.training.display import Display
from reslearn.training.ending import conclude
from reslearn.training.loop import Loop
from reslearn.training.precise_bn import settle_backbone
from reslearn.training.recipe import validate
from reslearn.training.resolve import asked_for, resolve
from reslearn.training.state import State
from reslearn.training.task import Asked, Job, Ready
from reslearn.weights.store import Card, load

SHOWN = 8  # findings that are named when a run starts
KEPT = ("n", "objects", "AP", "AP50", "AP75", "VOC07", "VOC10")  # of the numbers, in a model's card


@dataclass(frozen=True)
class Annotated:
    """A set with boxes as it was opened: its splits by name, with one list of classes."""

    path: Path
    classes: tuple[str, ...]
    splits: dict[str, BoxSet]

    @property
    def name(self) -> str:
        return self.path.name

    def to_train(self, train: str) -> dict[str, BoxSet]:
        """The splits, with the one to train on called train."""
        first = next(iter(self.splits.values()))
        return {**self.splits, "train": self.splits.get(train, self.splits.get("all", first))}

    def fingerprint(self) -> str:
        """A sha256 in hex of what all splits hold."""
        return hashlib.sha256("".join(split.fingerprint() for split in self.splits.values()).encode()).hexdigest()

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Sources:
    """Images and targets of each split; val and test are None where there is nothing held out."""

    train: BoxSource
    val: BoxSource | None
    test: BoxSource | None

    def named(self) -> dict[str, BoxSource]:
        """Those that are there, by their names."""
        sources = {"train": self.train, "val": self.val, "test": self.test}
        return {name: source for name, source in sources.items() if source is not None}


def begin(asked: Asked, device: torch.device, display: Display) -> tuple[Ready, list[str], dict[str, list[str]], dict[str, Any]]:
    bad, train = (asked_for(f"data.{key}", asked.recipe, asked.settings) for key in ("bad", "train"))
    if not isinstance(train, str) or not train:  # unless a recipe's file says so; what is no text is refused with the recipe
        base = asked_for("base", asked.recipe, ()) or str(asked.recipe)
        train = "trainval" if base in ("voc-paper", "voc-paper-4step") else "train"
        if train == "trainval" and (there := split_names(asked.data)) and train not in voc_splits(Path(asked.data)):
            raise UserError(f"{asked.data}: {base} trains on VOC's trainval, which is not there: --set data.train={there[0]}")
    data = open_set(asked.data, train, bad or "fail")
    init, settings = _init(asked)
    start = None if init is None else start_of(init, asked.model)
    net = start["name"] if start else asked.model
    recipe, chose = resolve(data.to_train(train), asked.recipe, net, settings, asked.seed, start, DETECTION)
    ranks.check(recipe)
    if recipe.net.init is not None:
        same_net(recipe)
        chose.append("normalization: that of the model it starts from")
        if backbone(recipe.net.init, None)[2].channels == 1:
            chose.append("images are seen in gray, as the model saw them that it starts from")
    changed = recipe.data.val != BoxData.model_fields["val"].default or any(each.startswith("data.val=") for each in asked.settings)
    if "val" in data.splits and train != "val" and changed:
        raise UserError(f"data.val does not apply: '{data.name}' has its own val images; leave it out")
    view = backbone(recipe.net.init or recipe.net.name, None)[2]
    sources, made = _sources(data, recipe, view.channels)
    if recipe.alternate is not None:
        phase_ends(recipe, len(sources.train))
    about = {"data": _describe(data, sources), "preprocessing": view.model_dump(mode="json")}
    return Ready(data, recipe, sources), chose, made, about


def _init(asked: Asked) -> tuple[str | Path | None, list[str]]:
    """The model that the backbone starts from, given by --init, --set or a recipe file, and the other settings."""
    named = [setting for setting in asked.settings if setting.partition("=")[0].strip() == "net.init"]
    if asked.init is not None and named:
        raise UserError(f"--init {asked.init} and --set {named[-1]}: give one of them")
    init = asked.init if asked.init is not None else asked_for("net.init", asked.recipe, asked.settings)
    if init is not None and not isinstance(init, str | Path):
        raise UserError(f"{asked.recipe}: net.init: write the model file or run as text (not {init!r})")
    others = [setting for setting in asked.settings if setting not in named]
    return (None, list(asked.settings)) if init in (None, "None", "null") else (init, others)


def open_set(path: str | Path, train: str, bad: Any) -> Annotated:
    """A set with boxes: all of its splits, or with a split of one's own to train on that one and test."""
    only = None if train == "train" else [train, *(name for name in split_names(path) if name == "test")]
    with bad_boxes_left_out_by("data.bad=drop"):
        splits = open_boxes(path, bad=bad, only=only)
    return Annotated(Path(path).expanduser().absolute(), next(iter(splits.values())).classes, splits)


def _sources(data: Annotated, recipe: DetectRecipe, channels: int) -> tuple[Sources, dict[str, list[str]]]:
    """The splits to train with, in the channels that the backbone takes, and the names of the images that are held out here."""
    splits, made, how = dict(data.splits), {}, recipe.data
    own = next((name for name in (how.train, "all") if name in splits), None)
    if own is None:
        raise UserError(f"'{data.name}' has no images to train on: no {how.train} (only {', '.join(splits)})")
    train = splits.pop(own)
    if "val" not in splits and (count := held_out(how.val, len(train), "data.val")):
        train, splits["val"] = hold_out(train, count, recipe.seed)
        made["val"] = [image.name for image in splits["val"].images]
    if not any(len(image.objects) for image in train.images):
        raise UserError(f"'{data.name}': the training images have no objects")
    masks = recipe.detector.masks
    for name, split in {"train": train, **splits}.items() if masks else ():
        _with_masks(name, split)
    view = {"masks": masks, "difficult": how.difficult, "channels": channels}  # a held-out loss is of what the training's is
    others = {name: BoxSource(split, **view) for name, split in splits.items()}
    boxed = BoxSource(train, flip=how.flip, **view)
    return Sources(boxed, others.get("val"), others.get("test")), made


def _with_masks(name: str, split: BoxSet) -> None:
    """Refuse objects without a mask: in training they would be background, and held out there is nothing to judge by."""
    for image in split.images:
        segmentations = image.objects.segmentations or (None,) * len(image.objects)
        for id, segmentation in zip(image.objects.ids, segmentations, strict=True):
            if segmentation is None:
                raise UserError(
                    f"detector.masks=true: {name} image {image.name}, object {id} has no segmentation to learn or judge masks by: "
                    "give it one, or set detector.masks=false"
                )


def reopen(folder: Path, facts: dict[str, Any], device: torch.device, display: Display) -> Ready:
    recipe: DetectRecipe = validate(facts["recipe"], str(folder / "recipe.json"), DetectRecipe)
    ranks.check(recipe)
    data = open_set(facts["source"], recipe.data.train, recipe.data.bad)
    sources, _ = _sources(data, recipe, facts["preprocessing"]["channels"])
    if _describe(data, sources)["fingerprint"] != facts["data"]["fingerprint"]:
        raise UserError(f"the images or boxes of {facts['source']} have changed since {folder} began: start a new run")
    return Ready(data, recipe, sources)


def resident(ready: Ready) -> bool:
    return False


def network(job: Job, *, fresh: bool) -> nn.Module:
    recipe: DetectRecipe = job.ready.recipe
    torch.manual_seed(integer(recipe.seed, 0x1217))
    view = Preprocessing.model_validate(job.facts["preprocessing"])
    if recipe.net.init is not None and fresh:
        body = load(recipe.net.init)
        job.display.say(f"init     starts from the backbone of {recipe.net.init}")
        if recipe.precise_bn is not None:
            settle_backbone(body.to(job.device), recipe.precise_bn, recipe, view, job.ready.sources.train, job.display)
    else:
        body = create(recipe.net.name, spec(recipe.net.name).classes, view.channels, **recipe.net.options())
    model = assemble(body, job.ready.data.classes, recipe.detector, view, None)
    return model.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_state(job: Job, network: nn.Module) -> State:
    recipe: DetectRecipe = job.ready.recipe
    if recipe.alternate is None:
        return State(network, recipe)
    assert isinstance(network, Detector)
    return AlternatingState(network, recipe, phase_ends(recipe, len(job.ready.sources.train)))


def make_loop(job: Job, state: State) -> Loop:
    kind = DetectLoop if job.ready.recipe.alternate is None else AlternatingLoop
    return kind(job.folder, job.ready.recipe, job.ready.sources, state, job.device, job.mode, job.display)


def introduce(job: Job) -> list[str]:
    described = job.facts["data"]
    counts = " + ".join(f"{n:,} {name}" for name, n in described["n"].items())
    objects = ", ".join(f"{name} {n:,}" for name, n in described["objects"].items())
    lines = [f"data     {described['name']}: {counts} images; in training {objects}"]
    findings = [finding for split in job.ready.data.splits.values() for finding in split.findings]
    lines += [f"         {'left out or cut' if finding.fault else 'note'}: {finding}" for finding in findings[:SHOWN]]
    if len(findings) > SHOWN:
        lines.append(f"         and {len(findings) - SHOWN} more: reslearn doctor {job.facts['source']} names them all")
    if job.ready.recipe.alternate is not None:
        lines += describe(phase_ends(job.ready.recipe, len(job.ready.sources.train)))
    return lines


def _describe(data: Annotated, sources: Sources) -> dict[str, Any]:
    faults = Counter(one.kind for split in data.splits.values() for one in split.findings if one.fault)
    return {
        "name": data.name,
        "classes": list(data.classes),
        "n": {name: len(source) for name, source in sources.named().items()},
        "objects": sources.train.split.counts(),
        "faults": dict(faults),
        "fingerprint": data.fingerprint(),
    }


def finish(job: Job, loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
    recipe, sources, data = loop.recipe, loop.sources, job.ready.data
    held = {name: source for name, source in sources.named().items() if name != "train"} or {"train": sources.train}
    shown = "test" if "test" in held else next(iter(held))

    def numbers(model: nn.Module) -> tuple[dict[str, Any], tuple[Detector, Matches]]:
        assert isinstance(model, Detector)
        result, matches = {}, {}
        for name, source in held.items():

            def progress(done: int, name: str = name, total: int = len(source)) -> None:
                stop.check()
                loop.display.progress(f"evaluating on {name}", done, total)

            seen = judge(model, source, "fp32", recipe.seed, progress)
            matches[name] = seen.boxes
            result[name] = detection_metrics(seen.boxes, seed=recipe.seed) | {
                "loss": sum(seen.losses.values()),
                "losses": seen.losses,
                "review": review(seen.boxes, source.names),
            }
            if seen.masks is not None:
                result[name]["masks"] = detection_metrics(seen.masks, seed=recipe.seed)
        return result, (model, matches[shown])

    def save(model: nn.Module, path: Path, numbers: dict[str, Any]) -> None:
        assert isinstance(model, Detector)
        card = Card(
            net=recipe.net.name,
            options=recipe.net.options(),
            classes=data.classes,
            preprocessing=Preprocessing.model_validate(job.facts["preprocessing"]),
            detector=recipe.detector.model_dump(mode="json"),
            recipe=recipe.model_dump(mode="json"),
            metrics={split: {key: values[key] for key in KEPT} for split, values in numbers.items()},
            data={"name": data.name, "fingerprint": job.facts["data"]["fingerprint"]},
        )
        save_detector(model, path, card)

    def more(seen: tuple[Detector, Matches]) -> dict[str, Any]:
        (model, matches), images = seen, held[shown].split.images
        examples = save_examples(loop.folder, TestOptions((model.eval(),)), images)
        return {"gallery": save_gallery(loop.folder, images, matches), "gallery_split": shown, "examples": examples}

    return conclude(loop, lambda: network(job, fresh=False), numbers, save, more)
