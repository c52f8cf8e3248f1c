"""Checks data sets before training (`examine`) and writes cleaned copies (`repair`)."""

from pathlib import Path

from reslearn.data.boxes.read import holds_boxes
from reslearn.data.doctor.boxes import examine_boxes
from reslearn.data.doctor.classes import examine_classes
from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.repair_boxes import check_folder, count_named, repair_boxes
from reslearn.data.doctor.repair_classes import check_source, repair_classes
from reslearn.data.doctor.target import check_target
from reslearn.data.images.stream import Progress, silent
from reslearn.errors import UserError
from reslearn.files import user_path


def examine(data: str | Path, progress: Progress = silent, size: tuple[int, int] | None = None) -> Diagnosis:
    """Reads every image and annotation of a data set once and reports problems.

    size: for sets with boxes only, see examine_boxes. Raises UserError if there is no data set at `data`.
    """
    if holds_boxes(data):
        return examine_boxes(data, progress, size=size)
    if size is not None:
        raise UserError(f"--size applies only to sets with boxes, and {data} has no boxes")
    return examine_classes(data, progress)


def check_fix(data: str | Path, target: Path) -> None:
    """Raises UserError if `repair` cannot write `target`. Reads no images."""
    if holds_boxes(data):
        check_folder(user_path(target))
    else:
        check_target(user_path(target))
        check_source(data)


def repair(diagnosis: Diagnosis, data: str | Path, target: Path, progress: Progress = silent) -> str:
    """Writes the usable images of an examined set to a new list or folder. Returns a summary such as "21 of 22 images".

    Raises UserError.
    """
    if diagnosis.objects is None:
        repair_classes(diagnosis, target, progress)
        return f"{len(diagnosis.entries):,} of {sum(diagnosis.images.values()):,} images"
    (images, objects), (all_images, all_objects) = count_named(repair_boxes(diagnosis, data, target, progress)), count_named(data)
    return f"{images:,} of {all_images:,} images, {objects:,} of {all_objects:,} objects"
