"""What is wrong with a set with boxes, what is in it, and how well anchors fit: read once, kept as data."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.anchor_recall import C4, FPN, HALF, SIDES, AnchorRecall, large_enough, reach, try_anchors
from reslearn.data.boxes.box_set import BoxImage, BoxSet, Objects, box_areas
from reslearn.data.boxes.masks import extent
from reslearn.data.boxes.read import survey, unnamed_images
from reslearn.data.boxes.voc import list_file, lists, splits, unannotated, years
from reslearn.data.doctor.diagnosis import FEW, IMBALANCE, KINDS, OUT, Kind
from reslearn.data.doctor.images import LOST, copies, look_at_all, of_files, spans, statistics
from reslearn.data.doctor.look import Look, look_at_file
from reslearn.data.images.files import suffix_for
from reslearn.data.images.folder import Entry
from reslearn.data.images.stream import Progress
from reslearn.errors import UserError

SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}
"""COCO's sizes, each up to this area in pixels of the image as it is."""
SAME = 0.95
"""Two boxes of an image with this IoU or more are about one object."""
ELSEWHERE = 0.5
"""An outline and a box with a lower IoU are hardly of one object."""

BOX_KINDS = {
    "no such image": Kind(True, "annotated, but not there", OUT),
    "unreadable image": Kind(True, "cannot be opened", OUT),
    "wrong size": Kind(True, "annotated with another size than the image has", OUT),
    "unreadable annotation": Kind(True, "annotations that cannot be read", OUT),
    "unreadable image entry": Kind(True, "images that COCO's file does not describe", OUT),
    "unreadable category": Kind(True, "categories that COCO's file does not describe", OUT),
    "two images": Kind(True, "an annotation that fits two files", OUT),
    "image twice": Kind(True, "listed twice in a split", "one of them kept"),
    "category twice": Kind(True, "two categories of one name", "the first kept, with its objects"),
    "duplicate id": Kind(True, "an id that is taken", "the first kept"),
    "unknown class": Kind(True, "objects of no known class", OUT),
    "unknown image": Kind(True, "objects of no known image", OUT),
    "unreadable object": Kind(True, "objects that cannot be read", OUT),
    "not finite": Kind(True, "boxes that are no numbers: they make losses NaN", OUT),
    "no area": Kind(True, "boxes without width or height: they make losses NaN", OUT),
    "outside": Kind(True, "boxes that miss the image", OUT),
    "sticks out": Kind(True, "boxes that leave the image", "cut to it"),
    "box twice": Kind(True, "an object annotated twice", "one of them kept"),
    "bad segmentation": Kind(True, "objects whose outline cannot be used", OUT),
    "duplicate": Kind(True, "one image several times in a split", "one of them kept"),
    "class missing": Kind(True, "a class without objects in a split: its AP is not measured"),
    "class not in train": Kind(True, "there is nothing to learn it from"),
    "no objects": Kind(True, "a split without any object"),
    "list of others": Kind(False, "VOC lists with images of none of train, val and test, which alone are examined", OUT),
    "not annotated": Kind(False, "lists of images without annotations, such as VOC's later tests, which its server judges", OUT),
    "out of reach": Kind(True, "classes of which no anchors reach half of the objects: those will hardly be found"),
    "file aside": Kind(False, "COCO files that could be of a split which another one is", OUT),
    "not listed": Kind(False, "images beside those of the set that no split of it names, and no list in ImageSets/Main", OUT),
    "unknown category": Kind(False, "categories of COCO's file that the first split does not have", OUT),
    "orientation": Kind(False, "EXIF orientation: the boxes are turned with the image where they were drawn before it"),
    "nearly twice": Kind(False, f"boxes of one class with an IoU of {SAME:g} or more: perhaps one object"),
    "two classes": Kind(False, f"boxes of two classes with an IoU of {SAME:g} or more: perhaps one object"),
    "outline elsewhere": Kind(False, f"outlines whose own box has an IoU below {ELSEWHERE:g} with the object's"),
    "imbalance": Kind(False, f"the most frequent class has {IMBALANCE} times the objects of the rarest, or more"),
    "few objects": Kind(False, f"classes of fewer than {FEW} objects in train"),
}
ALL_KINDS = KINDS | BOX_KINDS


@dataclass(frozen=True)
class BoxFinding:
    """One thing that was found: a row of ALL_KINDS, the files, images or classes it is about, `index`, that of the object
    (VOC) or annotation (COCO) in the file, and a detail."""

    kind: str
    names: tuple[str, ...]
    detail: str
    index: int | None = None

    @property
    def fault(self) -> bool:
        """Whether it counts for the exit code."""
        return ALL_KINDS[self.kind].fault


@dataclass(frozen=True)
class BoxDiagnosis:
    """What a set with boxes is and what is wrong with it.

    images, without_objects: by split. objects: {split: {class: number}}. by_size: {class: {small, medium, large}}. side (square
    root of the area, px), box_aspect (width / height), by class, and objects_per_image: minimum, median, maximum; so height, width
    and aspect of the images. bytes, formats, modes, mean, std: see diagnosis.Diagnosis. anchors: of the training images' boxes.
    sets: what could be read; kept: the images of each split that --fix keeps; suffixes: those that fit better than an image's own.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[str, int]
    without_objects: dict[str, int]
    objects: dict[str, dict[str, int]]
    difficult: int
    crowds: int
    segmented: int
    by_size: dict[str, dict[str, int]]
    side: dict[str, tuple[float, ...]]
    box_aspect: dict[str, tuple[float, ...]]
    objects_per_image: tuple[float, ...]
    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    height: tuple[float, ...]
    width: tuple[float, ...]
    aspect: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    anchors: tuple[AnchorRecall, ...]
    findings: tuple[BoxFinding, ...]
    sets: dict[str, BoxSet]
    kept: dict[str, tuple[BoxImage, ...]]
    suffixes: dict[Path, str]

    @property
    def clean(self) -> bool:
        """Whether there is no fault; notes do not count."""
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All but what --fix keeps, in JSON's types."""
        aside = ("findings", "anchors", "sets", "kept", "suffixes")
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in aside}
        findings = [
            {"kind": f.kind, "fault": f.fault, "names": f.names, "index": f.index, "detail": f.detail} for f in self.findings
        ]
        counts = dict(Counter(f.kind for f in self.findings))
        return {
            "clean": self.clean,
            **plain,
            "anchors": [a._asdict() for a in self.anchors],
            "counts": counts,
            "findings": findings,
        }


def examine_boxes(
    data: str | Path,
    progress: Progress = lambda what, done, total: None,
    workers: int | None = None,
    size: tuple[int, int] | None = None,
) -> BoxDiagnosis:
    """Read every annotation and every image of a set with boxes once and say what is found.

    size: shorter and longest side, px, that anchors are tried at; without it C4's at 600 and 1000, a pyramid's at 800 and 1333.
    Raises UserError where there is no set.
    """
    root = Path(data).expanduser()
    sets = survey(root)
    places = [(split, image) for split, one in sets.items() for image in one.images]
    base = root if root.is_dir() else root.parent
    entries = [Entry(image.path, _name(image.path, base), split, "") for split, image in places]
    looks, colors = look_at_all(entries, lambda i: look_at_file(entries[i].file), progress, workers or max(os.cpu_count() or 1, 2))
    gray = all(seen.facts.gray for seen in looks if seen.facts)
    findings = [_of_box(finding) for one in sets.values() for finding in one.findings]
    for found in (*of_files(entries, looks, gray), *copies(entries, looks)):
        if found.kind != "elongated":  # no center is cut out here
            findings.append(BoxFinding(found.kind, tuple(dict.fromkeys(found.names)), found.detail))
    for split, image in places:
        findings += [*_nearly_one(image, sets[split].classes), *_elsewhere(image)]
    first = next(iter(sets.values()))
    findings += [*_balance(sets), *_others(root, sets), *_out_of_reach(first, size)]
    if aside := unnamed_images(root):
        names = tuple(_name(path, base) for path in aside)
        findings.append(BoxFinding("not listed", names, f"{len(aside):,} images"))
    order = list(ALL_KINDS)
    mean, std, *_ = statistics(colors, gray)
    height, width, aspect = spans([seen.size for seen in looks if seen.pixels])
    classes = first.classes
    objects = [image.objects for _, image in places]
    boxes = np.concatenate([np.zeros((0, 4)), *(some.boxes for some in objects)])
    labels = np.concatenate([np.zeros(0, np.int64), *(some.labels for some in objects)])
    areas = np.concatenate([np.zeros(0), *(some.areas for some in objects)])
    sides = boxes[:, 2:] - boxes[:, :2]
    return BoxDiagnosis(
        name=root.resolve().name,
        classes=classes,
        images={split: len(one) for split, one in sets.items()},
        without_objects={split: sum(not len(image.objects) for image in one.images) for split, one in sets.items()},
        objects={split: one.counts() for split, one in sets.items()},
        difficult=sum(int(some.difficult.sum()) for some in objects),
        crowds=sum(int(some.crowd.sum()) for some in objects),
        segmented=sum(s is not None for some in objects for s in some.segmentations or ()),
        by_size={name: _by_size(areas[labels == k]) for k, name in enumerate(classes, 1)},
        side={name: _span(np.sqrt(box_areas(boxes[labels == k]))) for k, name in enumerate(classes, 1)},
        box_aspect={name: _span((sides[:, 0] / sides[:, 1])[labels == k]) for k, name in enumerate(classes, 1)},
        objects_per_image=_span(np.array([len(some) for some in objects], float)),
        bytes=sum(seen.length for seen in looks),
        formats=dict(Counter(seen.facts.format for seen in looks if seen.facts).most_common()),
        modes=dict(Counter(seen.facts.mode for seen in looks if seen.facts).most_common()),
        height=height,
        width=width,
        aspect=aspect,
        mean=mean,
        std=std,
        anchors=try_anchors(first.images, first.classes, size),
        findings=tuple(sorted(findings, key=lambda f: (order.index(f.kind), f.names, -1 if f.index is None else f.index))),
        sets=sets,
        kept=_worth_keeping(places, looks),
        suffixes={
            entry.file: suffix_for(seen.facts.format)
            for entry, seen in zip(entries, looks, strict=True)
            if seen.facts and not seen.facts.fits
        },
    )


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _of_box(finding: Any) -> BoxFinding:
    kind = "box twice" if finding.kind == "duplicate" else finding.kind
    return BoxFinding(kind, (finding.file,), finding.text, finding.index)


def _nearly_one(image: BoxImage, classes: Sequence[str]) -> Iterator[BoxFinding]:
    """Pairs of boxes that can hardly be two objects."""
    those: Objects = image.objects
    iou = _iou(those.boxes[:, None], those.boxes[None])
    for i, j in np.argwhere(np.triu(iou >= SAME, 1)).tolist():
        if those.crowd[i] or those.crowd[j]:
            continue
        kind = "nearly twice" if those.labels[i] == those.labels[j] else "two classes"
        names = " and ".join(classes[int(those.labels[k]) - 1] for k in (i, j))
        yield BoxFinding(kind, (image.name,), f"objects {those.ids[i]} and {those.ids[j]}, {names}, IoU {iou[i, j]:.2f}")


def _elsewhere(image: BoxImage) -> Iterator[BoxFinding]:
    """Outlines that have little to do with their boxes."""
    those = image.objects
    for i, outline in enumerate(those.segmentations or ()):
        if outline is None:
            continue
        around = np.clip(extent(outline), 0, [image.width, image.height] * 2)
        if (iou := float(_iou(those.boxes[i], around))) < ELSEWHERE:
            boxes = [", ".join(f"{side:g}" for side in box) for box in (around, those.boxes[i])]
            detail = f"object {those.ids[i]}, whose outline is within {boxes[0]}, its box {boxes[1]}, IoU {iou:.2f}"
            yield BoxFinding("outline elsewhere", (image.name,), detail)


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of boxes (..., 4) that are broadcast against each other."""
    shared = np.clip(np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return shared / (areas[0] + areas[1] - shared)


def _balance(sets: Mapping[str, BoxSet]) -> Iterator[BoxFinding]:
    """What is wrong with the numbers of objects."""
    first = next(iter(sets))
    for split, one in sets.items():
        counts = one.counts()
        if not any(counts.values()):
            yield BoxFinding("no objects", (split,), f"{len(one):,} images")
            continue
        if split != first and (lacks := tuple(name for name, n in counts.items() if not n)):
            yield BoxFinding("class missing", lacks, f"{split} has no object of {len(lacks):,} of {len(counts):,} classes")
    learned = sets[first].counts()
    there = {name: n for name, n in learned.items() if n}
    if lacks := tuple(name for name, n in learned.items() if not n and any(one.counts()[name] for one in sets.values())):
        yield BoxFinding("class not in train", lacks, f"{len(lacks):,} of {len(learned):,} classes")
    if few := tuple(name for name, n in there.items() if n < FEW):
        yield BoxFinding("few objects", few, f"{len(few):,} of {len(learned):,} classes")
    if there:
        most, least = max(there, key=there.__getitem__), min(there, key=there.__getitem__)
        if there[most] >= IMBALANCE * there[least]:
            detail = f"{first} has {there[most]:,} of {most}, {there[least]:,} of {least}"
            yield BoxFinding("imbalance", (most, least), detail)


def _others(root: Path, sets: Mapping[str, BoxSet]) -> Iterator[BoxFinding]:
    """Lists with images that no split has."""
    left_out = unannotated(root)
    for year in years(root):
        every = {name: {image for image, _ in lines} for name, lines in lists(root / year).items()}
        seen = {image for split in sets for image in every.get(split, ())}
        for name in splits(root / year):
            if (file := list_file(year, name)) not in left_out and (more := every[name] - seen):
                yield BoxFinding("list of others", (file,), f"{len(more):,} of {len(every[name]):,} images")


def _by_size(areas: np.ndarray) -> dict[str, int]:
    places = np.searchsorted(list(SIZES.values()), areas, side="right").clip(max=2)
    return dict(zip(SIZES, np.bincount(places, minlength=3).tolist(), strict=True))


def _span(values: np.ndarray) -> tuple[float, ...]:
    """Minimum, median and maximum; nothing of nothing."""
    return tuple(round(float(f(values)), 4) for f in (np.min, np.median, np.max)) if len(values) else ()


def _out_of_reach(one: BoxSet, size: tuple[int, int] | None) -> Iterator[BoxFinding]:
    """The classes that no anchors fit at this size, and the size at which some do."""
    best = reach(one.images, range(1, len(one.classes) + 1), size)
    few = sorted((label for label, share in best.items() if share < HALF), key=best.__getitem__)
    if few:
        names = tuple(one.classes[label - 1] for label in few)
        at = f"{size[0]} px" if size else f"{C4[0]} or {FPN[0]} px"
        enough = large_enough(one.images, few, size or C4)
        if enough is not None:
            advice = f"{enough} px are enough (--size {enough}; in training --set detector.min_size={enough})"
        else:
            advice = f"they are too small or too thin up to {SIDES[-1]:,} px: cut the images into parts, or leave the class out"
        worst = f"{best[few[0]]:.1f}%" + (f" of {names[0]}" if len(few) > 1 else "")
        yield BoxFinding("out of reach", names, f"{worst} at best, at {at} of the shorter side; {advice}")


def _worth_keeping(places: Sequence[tuple[str, BoxImage]], looks: Sequence[Look]) -> dict[str, tuple[BoxImage, ...]]:
    """The images that can be read, of copies one: in test, else in val."""
    groups: dict[bytes, list[int]] = {}
    for i, seen in enumerate(looks):
        if seen.pixels and not any(kind in LOST for kind, _ in seen.wrong):
            groups.setdefault(seen.pixels, []).append(i)
    order = ("test", "val", "train", "all")
    keep = {min(group, key=lambda i: (order.index(places[i][0]), i)) for group in groups.values()}
    splits = dict.fromkeys(split for split, _ in places)
    return {split: tuple(image for i, (of, image) in enumerate(places) if of == split and i in keep) for split in splits}


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"600"` or `"600,1000"`: shorter and longest side; the longest is 5/3 of the shorter unless told. Raises UserError."""
    if text is None:
        return None
    try:
        shorter, *rest = (int(word) for word in text.split(","))
        longest = rest[0] if rest else round(shorter * 5 / 3)
        if len(rest) > 1 or not 16 <= shorter <= longest <= 4096:
            raise ValueError
    except ValueError:
        raise UserError(f"--size {text}: write the shorter side in px, such as 600, or with the longest, 600,1000") from None
    return shorter, longest
