"""All experiments by name."""

from reslearn.errors import UserError, did_you_mean
from reslearn.reproduce import anatomy, cifar, followups, imagenet
from reslearn.reproduce import detectors as detection
from reslearn.reproduce import localizers as localization
from reslearn.reproduce.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for part in (cifar, imagenet, detection, localization, followups, anatomy) for e in part.EXPERIMENTS
}
ALIASES = {"figure4": "table2"}  # the curves of the same runs


def experiment(name: str) -> Experiment:
    """An experiment by its name. Raises UserError, naming the nearest."""
    name = ALIASES.get(name, name)
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment called '{name}'{did_you_mean(name, [*EXPERIMENTS, *ALIASES])}")
    return EXPERIMENTS[name]
