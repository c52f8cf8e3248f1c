"""All experiments by name."""

from reslearn.errors import UserError, did_you_mean
from reslearn.reproduce import anatomy, cifar, detectors, followups, imagenet, localizers
from reslearn.reproduce.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for module in (cifar, imagenet, detectors, localizers, followups, anatomy) for e in module.EXPERIMENTS
}
ALIASES = {"figure4": "table2"}  # the curves of the same runs


def experiment(name: str) -> Experiment:
    """Returns an experiment by name. Raises UserError with the nearest name."""
    name = ALIASES.get(name, name)
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment called '{name}'{did_you_mean(name, [*EXPERIMENTS, *ALIASES])}")
    return EXPERIMENTS[name]
