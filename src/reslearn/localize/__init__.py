"""Where the object of an image is: boxes for each class on a classification network (DRL appendix C)."""

from reslearn.localize.error import is_right, localization_errors
from reslearn.localize.evaluate import evaluate
from reslearn.localize.net import Localizer, create_localizer, load_localizer, save_localizer
from reslearn.localize.refine import refine
from reslearn.localize.train import resume, train

__all__ = [
    "Localizer",
    "create_localizer",
    "evaluate",
    "is_right",
    "load_localizer",
    "localization_errors",
    "refine",
    "resume",
    "save_localizer",
    "train",
]
