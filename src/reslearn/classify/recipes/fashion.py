"""Photos of clothing; trains in a few minutes on a laptop.

reslearn train fashion-sample
"""

from reslearn.data.sets import DataSet
from reslearn.training.recipe import Chosen


def fashion(data: DataSet | None, net: str | None) -> Chosen:
    """A short schedule: one-cycle learning rate (Smith and Topin, 2017), Nesterov momentum, flips and shifts."""
    values = {
        "name": "fashion",
        "net": {"name": net or "resnet20"},
        "data": {"val": 0.1, "flip": True, "pad": 2},
        "batch": {"size": 128},
        "optimizer": {"weight_decay": 5e-4, "nesterov": True},
        "schedule": {"epochs": 15, "lr": 0.2, "shape": "one-cycle", "warmup": 0.2},
        "log": {"every": 20},
    }
    return Chosen(values, {})
