"""The named recipes of classification. Each is a function (data, network) -> Chosen; both arguments may be None."""

from collections.abc import Callable

from reslearn.classify.recipes.cifar import cifar10_paper
from reslearn.classify.recipes.cifar_fast import cifar10_fast
from reslearn.classify.recipes.default import default
from reslearn.classify.recipes.fashion import fashion
from reslearn.classify.recipes.imagenet import imagenet_classic, imagenet_fast, imagenet_paper
from reslearn.classify.recipes.recipe import ClassifyRecipe
from reslearn.data.sets import DataSet
from reslearn.training.recipe import Chosen

NAMED: dict[str, Callable[[DataSet | None, str | None], Chosen]] = {
    "cifar10-fast": cifar10_fast,
    "cifar10-paper": cifar10_paper,
    "default": default,
    "fashion": fashion,
    "imagenet-classic": imagenet_classic,
    "imagenet-fast": imagenet_fast,
    "imagenet-paper": imagenet_paper,
}

__all__ = ["NAMED", "ClassifyRecipe"]
